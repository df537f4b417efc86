"""Verdicts over claims: what our runs say about each statement of the paper, by a rule.

A claim is a list of parts; a part is one number per seed, and the range in which the claim puts it.
Student's 95 % interval of the mean over seeds decides: inside the range the part holds, outside it
fails, across a border it is open. A claim is

    reproduced        if every part holds,
    not reproduced    if a part fails,
    not settled       otherwise: the interval contains the border, or there is only one seed,
    not testable at this scale    if no part can be measured in runs of this kind,
    no runs           if no run says anything about it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import pandas as pd

from rlsd_lib.measure.intervals import Interval, student_interval
from rlsd_lib.report.tables import DASH, Arms, Table, source_notes
from rlsd_lib.runs.records import Runs

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

    def estimate(self) -> Interval | None:
        """Return the mean over seeds with its interval; None where nothing was measured."""
        if self.values.empty:
            return None
        mean, low, high = student_interval(self.values)
        return Interval(mean, low - self.slack, high + self.slack)

    def holds(self) -> bool | None:
        """Return True or False where the interval over seeds decides, else None."""
        found = self.estimate()
        if found is None or not found.is_known:
            return None
        if found.low > self.low and found.high < self.high:
            return True
        return False if found.high < self.low or found.low > self.high else None

    def __str__(self) -> str:
        found = self.estimate()
        if found is None:
            return f"{self.name}: {self.why_not or NO_RUNS}"
        return f"{self.name}: {found:.3f}, n={len(self.values)}"


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, its number there, our rule in words, and what to measure."""

    statement: str
    paper: str
    rule: str
    parts: Callable[[Arms], list[Part]]


def verdict(parts: list[Part]) -> str:
    """Return what the parts of a claim say together."""
    if all(part.values.empty for part in parts):
        return NOT_TESTABLE if any(part.why_not for part in parts) else NO_RUNS
    found = [part.holds() for part in parts]
    if False in found:
        return NOT_REPRODUCED
    return REPRODUCED if all(found) else NOT_SETTLED


def claims_table(claims: Sequence[Claim], lab: Runs, real: Runs) -> Table:
    """Return a row per claim: the paper's number, ours on lab and real model, and two verdicts.

    Only plain runs count: no override, no control, and RLSD's own number of steps, save where a
    claim is about another. Runs that did not finish give no numbers; the notes name them.
    """
    arms = {"lab": Arms(lab), "real model": Arms(real)}
    rows = []
    for number, claim in enumerate(claims, 1):
        row = {"#": str(number), "claim": claim.statement, "the paper": claim.paper}
        for where, runs in arms.items():
            parts = claim.parts(runs)
            row[where] = _cell(parts)
            row[f"verdict, {where}"] = verdict(parts)
        rows.append(row)
    notes = [f"{where}: {_described(chosen)}" for where, chosen in arms.items()]
    notes += [
        "[low, high]: Student's 95 % interval of the mean over seeds. Each stands alone: among "
        "twenty verdicts one may be wrong by chance",
        *(f"claim {n} is reproduced if {c.rule}" for n, c in enumerate(claims, 1)),
        *(note for runs in (lab, real) if len(runs.runs) for note in source_notes(runs)),
    ]
    return Table(pd.DataFrame(rows), notes)


def _cell(parts: list[Part]) -> str:
    """The parts of a claim; where none was measured, the reason if it is not lack of runs."""
    if any(len(part.values) for part in parts):
        return "<br>".join(map(str, parts))
    return next((part.why_not for part in parts if part.why_not), DASH)


def _described(arms: Arms) -> str:
    if arms.length is None:
        return NO_RUNS
    methods = ", ".join(arms.methods())
    return f"preset {arms.preset}, {arms.length} steps; plain runs of {methods}"
