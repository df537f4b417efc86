"""The mean of independent values, such as one per seed: its interval, and what it can tell from 0."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats
from scipy.optimize import brentq


class Estimate(NamedTuple):
    """A mean with its 95 % interval; the ends are None where there is no interval."""

    mean: float
    low: float | None
    high: float | None


def estimate(values: Sequence[float], level: float = 0.95) -> Estimate:
    """Mean and Student interval of values that are independent, such as one per seed."""
    mean = float(pd.Series(values).mean())
    if len(values) < 2:
        return Estimate(mean, None, None)
    half = float(stats.sem(values) * stats.t.ppf((1 + level) / 2, len(values) - 1))
    return Estimate(mean, mean - half, mean + half)


def smallest_detectable(
    differences: Sequence[float] | np.ndarray, *, power: float = 0.8, level: float = 0.95
) -> float:
    """Return the smallest true mean that a t-test on these many differences would find.

    `differences` (S,) are paired, one per seed; their spread estimates that of a repetition. A mean
    of this size is told from 0 (two-sided, at 1 - `level`) in a share `power` of repetitions: the
    root in d of P(|T| > t_crit), T noncentral Student with S - 1 degrees of freedom and
    noncentrality d sqrt(S) / s. NaN for one seed; 0 where the differences are all equal.
    """
    data = np.asarray(differences, dtype=float)
    count, spread = data.size, data.std(ddof=1) if data.size > 1 else float("nan")
    if not spread > 0:
        return float(spread)
    critical = stats.t.ppf((1 + level) / 2, count - 1)
    # The lower tail adds less than 0.001 at any usual power.
    shift = brentq(lambda d: stats.nct.sf(critical, count - 1, d) - power, 0.0, 100.0 * critical)
    return float(shift * spread / np.sqrt(count))
