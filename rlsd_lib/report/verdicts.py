"""How runs decide a claim: parts, each a number per seed and the range in which the claim puts it.

Student's 95 % interval of the mean over seeds decides: inside the range the part holds, outside it
fails, across a border it is open. `verdict` says what the parts of a claim come to.
"""

from dataclasses import dataclass
from math import inf, nan

import pandas as pd

from rlsd_lib.measure.intervals import Interval, student_interval

REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"
NOT_SETTLED, NO_RUNS, NOT_TESTABLE = "not settled", "no runs", "not testable at this scale"


@dataclass
class Part:
    """One number per seed, and where the claim puts its mean: low < mean < high.

    Seeds without a number (NaN, because only one side of a comparison has them) do not count.
    `slack` widens the interval at both ends by what each value leaves open by itself, where seeds
    that agree would hide it: no leak in 24 completions is no proof of none in a thousand. `why_not`
    says why runs of this kind cannot measure it, whatever their number.
    """

    name: str
    values: pd.Series
    low: float = -inf
    high: float = inf
    slack: float = 0.0
    why_not: str = ""

    def __post_init__(self) -> None:
        self.values = self.values.dropna()

    def estimate(self) -> Interval:
        """Return the mean over seeds with its interval, NaN where nothing was measured."""
        mean, low, high = student_interval(self.values) if len(self.values) else (nan, nan, nan)
        return Interval(mean, low - self.slack, high + self.slack)

    def holds(self) -> bool | None:
        """Return True or False where the interval over seeds decides, else None."""
        _, low, high = self.estimate()  # NaN, of one seed or none, is on no side of a border
        if low > self.low and high < self.high:
            return True
        return False if high < self.low or low > self.high else None

    def __str__(self) -> str:
        if self.values.empty:
            return f"{self.name}: {self.why_not or NO_RUNS}"
        return f"{self.name}: {self.estimate():.3f}, n={len(self.values)}"


def verdict(parts: list[Part]) -> str:
    """Return what the parts of a claim say together.

    reproduced: every part holds; not reproduced: a part fails; not settled: otherwise, for an
    interval contains the border or there is one seed only; not testable at this scale: runs of this
    kind cannot measure any part; no runs: none says anything about it.
    """
    if all(part.values.empty for part in parts):
        return NOT_TESTABLE if any(part.why_not for part in parts) else NO_RUNS
    found = [part.holds() for part in parts]
    if False in found:
        return NOT_REPRODUCED
    return REPRODUCED if all(found) else NOT_SETTLED
