"""Means with their intervals: over problems by bootstrap, over seeds by Student's t; and power."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats
from scipy.optimize import brentq


class Interval(NamedTuple):
    """A mean with the ends of its interval; both are NaN where one value gives no interval."""

    mean: float
    low: float
    high: float

    @property
    def is_known(self) -> bool:
        """Whether there is an interval and not a mean alone."""
        return not math.isnan(self.low)

    def __format__(self, spec: str) -> str:
        """`f"{interval:.3f}"` is "mean [low, high]", or the mean alone where nothing else is known."""
        ends = f" [{self.low:{spec}}, {self.high:{spec}}]" if self.is_known else ""
        return f"{self.mean:{spec}}{ends}"


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    *,
    level: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> Interval:
    """Return the mean of one value per problem with its percentile bootstrap interval.

    `values` (N,) must be independent draws: one per problem, never one per sample, because samples
    of one problem rise and fall together. One value gives NaN ends; none raises ValueError.
    """
    data = np.asarray(values, dtype=float)
    if data.ndim != 1 or data.size == 0 or not np.isfinite(data).all():
        raise ValueError(f"values have shape {data.shape}; give one finite number per problem")
    return _interval(data, level=level, resamples=resamples, seed=seed)


def student_interval(values: Sequence[float] | np.ndarray, *, level: float = 0.95) -> Interval:
    """Return the mean of independent values (S,), one per seed, with Student's interval.

    Wider than a bootstrap, which covers far less often than it promises for a handful of values.
    """
    data = np.asarray(values, dtype=float)
    mean = float(data.mean())
    if data.size < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(stats.sem(data) * stats.t.ppf((1 + level) / 2, data.size - 1))
    return Interval(mean, mean - half, mean + half)


def paired_interval(
    first: Sequence[Sequence[float]] | np.ndarray,
    second: Sequence[Sequence[float]] | np.ndarray,
    *,
    over: str,
    level: float = 0.95,
    resamples: int = 5000,
    seed: int = 0,
) -> Interval:
    """Return the mean difference second - first of paired scores, with an interval.

    Both are (S, N): one row per seed, one column per problem, the same seeds and problems in the
    same order. `over="problems"` says how far the difference would move with other problems (a
    percentile bootstrap of whole columns), `over="seeds"` with other training seeds (Student's t on
    the rows' means: a bootstrap of five rows covers far less often than it promises). Raises
    ValueError for shapes that do not match and another `over`; one row or column has NaN ends.
    """
    one, two = (np.atleast_2d(np.asarray(side, dtype=float)) for side in (first, second))
    if one.shape != two.shape or one.size == 0:
        raise ValueError(f"shapes are {one.shape} and {two.shape}; pairs need equal (S, N) shapes")
    if over == "problems":
        means = (two - one).mean(axis=0)
        return bootstrap_interval(means, level=level, resamples=resamples, seed=seed)
    if over == "seeds":
        return student_interval((two - one).mean(axis=1), level=level)
    raise ValueError(f"over is {over!r}; choose 'problems' or 'seeds'")


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


def _interval(data: np.ndarray, *, level: float, resamples: int, seed: int) -> Interval:
    mean = float(data.mean())
    if data.size == 1:
        return Interval(mean, float("nan"), float("nan"))
    if np.ptp(data) == 0:  # every resample has this mean
        return Interval(mean, mean, mean)
    ends = stats.bootstrap(
        (data,),
        np.mean,
        confidence_level=level,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(ends.low), float(ends.high))
