"""Means with their intervals, and what they decide.

Bootstrap over problems, Student over seeds or labs, also of many arms against one, Wilson for shares.
`decide` is the one rule from an interval to a verdict.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats
from scipy.optimize import brentq

LEVEL = 0.95  # share of repetitions whose interval holds the true mean
POWER = 0.8  # share of repetitions that tell a detectable difference from 0
Values = Sequence[float] | np.ndarray


class Interval(NamedTuple):
    """A mean or share with its 95 % interval; both ends are NaN where one value gives none."""

    mean: float
    low: float = math.nan
    high: float = math.nan

    @property
    def is_known(self) -> bool:
        """Whether there is an interval and not a mean alone."""
        return not math.isnan(self.low)

    def within(self, least: float, most: float) -> "Interval":
        """The same with ends that do not leave the range of its quantity; NaN ends stay."""
        low, high = np.clip([self.low, self.high], least, most).tolist()
        return Interval(self.mean, low, high)

    def __format__(self, spec: str) -> str:
        """`f"{interval:.3f}"` is "mean [low, high]", or the mean alone where nothing else is known."""
        ends = f" [{self.low:{spec}}, {self.high:{spec}}]" if self.is_known else ""
        return f"{self.mean:{spec}}{ends}"


def bootstrap_interval(values: Values, *, resamples: int = 5000, seed: int = 0) -> Interval:
    """Return the mean of values (N,), one per problem, with its percentile bootstrap interval.

    Never one per sample: those of one problem rise and fall together. NaN ends for one value;
    ValueError for none.
    """
    data = np.asarray(values, dtype=float)
    if data.ndim != 1 or data.size == 0 or not np.isfinite(data).all():
        raise ValueError(f"values have shape {data.shape}; give one finite number per problem")
    mean = float(data.mean())
    if data.size == 1:
        return Interval(mean)
    if np.ptp(data) == 0:  # every resample has this mean
        return Interval(mean, mean, mean)
    ends = stats.bootstrap(
        (data,),
        np.mean,
        confidence_level=LEVEL,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(ends.low), float(ends.high))


def student_interval(values: Values, level: float = LEVEL) -> Interval:
    """Return the mean of independent values (S,), one per seed, with Student's interval."""
    data = np.asarray(values, dtype=float)
    mean = float(data.mean())
    if data.size < 2:
        return Interval(mean)
    half = float(stats.sem(data) * stats.t.ppf((1 + level) / 2, data.size - 1))
    return Interval(mean, mean - half, mean + half)


def share_interval(found: Iterable[bool]) -> Interval:
    """Return the share of True, one mark per problem, with Wilson's interval; ValueError for none."""
    marks = [bool(mark) for mark in found]
    if not marks:
        raise ValueError("there are no completions; give at least one")
    ends = stats.binomtest(sum(marks), len(marks)).proportion_ci(LEVEL, method="wilson")
    return Interval(sum(marks) / len(marks), float(ends.low), float(ends.high))


def pooled_share(shares: Values, highs: Values) -> Interval:
    """Return the share of all completions of several runs (S,) with its Wilson interval.

    `highs` (S,) are the upper ends of `share_interval`; they say how many completions there were,
    because an end e solves (e - share)^2 = z^2 e (1 - e) / n.
    """
    share, high = np.asarray(shares, dtype=float), np.asarray(highs, dtype=float)
    z = stats.norm.ppf((1 + LEVEL) / 2)
    counts = np.round(z**2 * high * (1 - high) / (high - share) ** 2)
    return share_interval(np.arange(int(counts.sum())) < round(float(counts @ share)))


def share_difference(first: Interval, second: Interval) -> Interval:
    """Return first - second of `share_interval`s, taken as independent, with Newcombe's interval."""
    share = first.mean - second.mean
    below = math.hypot(first.mean - first.low, second.high - second.mean)
    above = math.hypot(first.high - first.mean, second.mean - second.low)
    return Interval(share, share - below, share + above)


def smallest_detectable(differences: Values) -> float:
    """Return the smallest true mean that a t-test on so many differences finds with power `POWER`.

    `differences` (S,) are paired, one per seed. The root in d of P(|T| > t_crit) = POWER, two-sided
    at 5 %, T noncentral Student with S - 1 degrees of freedom and noncentrality d sqrt(S) / s. NaN
    where the spread is not known: for one seed, or differences that are all equal.
    """
    data = np.asarray(differences, dtype=float)
    count, spread = data.size, data.std(ddof=1) if data.size > 1 else math.nan
    if not spread > 0:
        return math.nan
    critical = stats.t.ppf((1 + LEVEL) / 2, count - 1)
    # The lower tail adds less than 0.001 at any usual power.
    shift = brentq(lambda d: stats.nct.sf(critical, count - 1, d) - POWER, 0.0, 100.0 * critical)
    return float(shift * spread / np.sqrt(count))


def simultaneous_intervals(values: pd.DataFrame, control: str) -> dict[str, Interval]:
    """Return each arm's mean minus the control's, with simultaneous 95 % intervals.

    `values` has a row per block (a lab, or a seed) and a column per arm, with no gaps. Each
    interval is Student's of the paired differences at Bonferroni's level: all hold their true
    differences together in a share `LEVEL` of repetitions or more. No arm lends its noise to
    another, as Dunnett's common variance would. NaN ends for one block. Raises ValueError if there
    is no such arm, no other arm, or an arm lacks a block.
    """
    if control not in values or values.shape[1] < 2:
        raise ValueError(f"arms are {list(values)}; give {control!r} and at least one other")
    if values.isna().any(axis=None):
        gaps = values.columns[values.isna().any()].tolist()
        raise ValueError(f"not every block has a value of {gaps}; leave out those arms, or blocks")
    differences = values.drop(columns=control).sub(values[control], axis=0)
    level = 1 - (1 - LEVEL) / differences.shape[1]
    return {arm: student_interval(differences[arm], level) for arm in differences}


def decide(difference: Interval, margin: float, shown: str = "") -> str:
    """Return what an interval of a difference decides, with a margin of equivalence.

    "above" or "below" where it excludes 0, "no difference larger than `margin`" (or `shown`, its
    text) where it lies within +-`margin` and does not, "not settled" otherwise. Raises ValueError
    for a margin that is not above 0.
    """
    if not margin > 0:
        raise ValueError(f"margin is {margin}; give the largest difference that does not matter")
    if difference.low > 0 or difference.high < 0:
        return "above" if difference.low > 0 else "below"
    if -margin < difference.low and difference.high < margin:
        return f"no difference larger than {shown or format(margin, 'g')}"
    return "not settled"
