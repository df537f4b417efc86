"""Means with their intervals: bootstrap over problems, Student over seeds, Wilson for shares."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats
from scipy.optimize import brentq

LEVEL = 0.95  # share of repetitions whose interval holds the true mean
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

    def __format__(self, spec: str) -> str:
        """`f"{interval:.3f}"` is "mean [low, high]", or the mean alone where nothing else is known."""
        ends = f" [{self.low:{spec}}, {self.high:{spec}}]" if self.is_known else ""
        return f"{self.mean:{spec}}{ends}"


def bootstrap_interval(values: Values, *, resamples: int = 5000, seed: int = 0) -> Interval:
    """Return the mean of one value per problem with its percentile bootstrap interval.

    `values` (N,) are independent: one per problem, never one per sample, because samples of one
    problem rise and fall together. One value gives NaN ends; none raises ValueError.
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


def student_interval(values: Values) -> Interval:
    """Return the mean of independent values (S,), one per seed, with Student's interval.

    Wider than a bootstrap, which covers far less often than it promises for a handful of values.
    """
    data = np.asarray(values, dtype=float)
    mean = float(data.mean())
    if data.size < 2:
        return Interval(mean)
    half = float(stats.sem(data) * stats.t.ppf((1 + LEVEL) / 2, data.size - 1))
    return Interval(mean, mean - half, mean + half)


def paired_interval(
    first: Sequence[Sequence[float]] | np.ndarray,
    second: Sequence[Sequence[float]] | np.ndarray,
    *,
    over: str,
    resamples: int = 5000,
) -> Interval:
    """Return the mean difference second - first of paired scores, with an interval.

    Both are (S, N): a row per seed, a column per problem, in the same order. `over="problems"` says
    how far the difference would move with other problems (a percentile bootstrap of whole columns),
    `over="seeds"` with other training seeds (Student's t on the rows' means); one row or column has
    NaN ends. Raises ValueError for shapes that do not match and another `over`.
    """
    one, two = (np.atleast_2d(np.asarray(side, dtype=float)) for side in (first, second))
    if one.shape != two.shape or one.size == 0:
        raise ValueError(f"shapes are {one.shape} and {two.shape}; pairs need equal (S, N) shapes")
    if over == "problems":
        return bootstrap_interval((two - one).mean(axis=0), resamples=resamples)
    if over == "seeds":
        return student_interval((two - one).mean(axis=1))
    raise ValueError(f"over is {over!r}; choose 'problems' or 'seeds'")


def share_interval(found: Iterable[bool]) -> Interval:
    """Return the share of True with its Wilson interval.

    Wilson's interval stays honest at a count of 0, where it says how large the share could still
    be. It takes the values as independent, so give one per problem where problems were sampled
    repeatedly. Raises ValueError for none.
    """
    marks = [bool(mark) for mark in found]
    if not marks:
        raise ValueError("there are no completions; give at least one")
    ends = stats.binomtest(sum(marks), len(marks)).proportion_ci(LEVEL, method="wilson")
    return Interval(sum(marks) / len(marks), float(ends.low), float(ends.high))


def share_difference(first: Interval, second: Interval) -> Interval:
    """Return first - second, two results of `share_interval`, with Newcombe's interval.

    Distances to the ends add up in squares. It stays honest where both counts are 0, and takes the
    two as independent, which for completions of the same problems is on the safe side.
    """
    share = first.mean - second.mean
    below = math.hypot(first.mean - first.low, second.high - second.mean)
    above = math.hypot(first.high - first.mean, second.mean - second.low)
    return Interval(share, share - below, share + above)


def smallest_detectable(differences: Values, *, power: float = 0.8) -> float:
    """Return the smallest true mean that a t-test on these many differences would find.

    `differences` (S,) are paired, one per seed; their spread estimates that of a repetition. A mean
    of this size is told from 0 (two-sided, at 5 %) in a share `power` of repetitions: the root in d
    of P(|T| > t_crit), T noncentral Student with S - 1 degrees of freedom and noncentrality
    d sqrt(S) / s. NaN for one seed; 0 where the differences are all equal.
    """
    data = np.asarray(differences, dtype=float)
    count, spread = data.size, data.std(ddof=1) if data.size > 1 else math.nan
    if not spread > 0:
        return float(spread)
    critical = stats.t.ppf((1 + LEVEL) / 2, count - 1)
    # The lower tail adds less than 0.001 at any usual power.
    shift = brentq(lambda d: stats.nct.sf(critical, count - 1, d) - power, 0.0, 100.0 * critical)
    return float(shift * spread / np.sqrt(count))
