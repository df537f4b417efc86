"""The paper's empirical claims as rules over run directories, and the verdicts on them.

A claim has parts: a number per seed, and the range in which the claim puts it. Student's 95 %
interval of the mean over seeds decides: inside the range the part holds, outside it fails, across a
border it is open, and one seed, which has none, decides nothing. "Above 0" fails also where the
interval lies within `MARGIN` of 0: else no number of runs could refute a gain that is not there.
Thresholds that the paper does not give are ours and stand in a claim's rule.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import inf, nan

import pandas as pd

from rlsd_lib.measure.intervals import Interval, decide, pooled_share, student_interval
from rlsd_lib.report import paper_numbers as paper
from rlsd_lib.report.tables import LAST, NO_VALUES, Arms, Table, source_notes
from rlsd_lib.runs.records import Runs

REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"
NOT_SETTLED, NO_RUNS, NOT_TESTABLE = "not settled", "no runs", "not testable at this scale"
MARGIN = 0.02  # accuracy or leak rate: the size of the paper's gain of RLSD over GRPO
CLEAN = 189  # the fewest completions whose Wilson interval, without a leak, ends below MARGIN
ACCURACY, REWARD = "accuracy_after", "reward"
LEAK, DIVERGENCE = "rewards/leak/mean", "rlsd/divergence"
VARIANTS = ("opsd", "opsd_teacher_top1", "opsd_student_top1")  # the paper's order of severity
PEAK = (10, 20)  # steps
ABOVE = "the difference is above 0"


@dataclass
class Part:
    """One number per seed, and where the claim puts its mean: low < mean < high.

    A border of 0 is that of a difference, for `decide` with `MARGIN`. Seeds without a number (NaN) do
    not count. `slack` widens the interval by what each value leaves open by itself: no leak in 24
    completions is no proof of none in a thousand. `why_not` says why such runs cannot measure it.
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
        found = self.estimate()  # NaN, of one seed or none, is on no side of a border
        if 0.0 in (self.low, self.high):
            claimed = "above" if self.low == 0.0 else "below"
            return {claimed: True, "not settled": None}.get(decide(found, MARGIN), False)
        return self._side(found.low, found.high)

    def leans(self) -> bool | None:
        """Return True or False where the mean lies within the claim's borders or beyond, else None."""
        mean = self.values.mean()
        return self._side(mean - self.slack, mean + self.slack)

    def _side(self, low: float, high: float) -> bool | None:
        if low > self.low and high < self.high:
            return True
        return False if high < self.low or low > self.high else None

    def __str__(self) -> str:
        if self.values.empty:
            return f"{self.name}: {self.why_not or NO_RUNS}"
        return f"{self.name}: {self.estimate():.3f}, n={len(self.values)}"


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, its number there, our rule in words, and what to measure."""

    statement: str
    paper: str
    rule: str
    parts: Callable[[Arms], list[Part]]


def verdict(parts: list[Part]) -> str:
    """Return what the parts of a claim say together: every one holds, one fails, or neither.

    Single seeds decide nothing, but speak for a claim or against it. Without any value it is "not
    testable at this scale" if a part says why, else "no runs".
    """
    if all(part.values.empty for part in parts):
        return NOT_TESTABLE if any(part.why_not for part in parts) else NO_RUNS
    words = NOT_REPRODUCED, REPRODUCED, NOT_SETTLED
    found = [part.holds() for part in parts]
    if all(len(part.values) <= 1 for part in parts):
        words = [f"one seed: not decided{way}" for way in (", speaks against", ", speaks for", "")]
        found = [part.leans() for part in parts]
    return words[0 if False in found else 1 if all(found) else 2]


def claims_table(lab: Runs, real: Runs) -> Table:
    """Return a row per measured claim: the paper's number, the rule, and ours with the verdict.

    Only plain runs (see `Arms`) of RLSD's length count, save where a claim is about another. The
    real model has columns if it has runs. A note names the claims that were not measured, and why.
    """
    arms = {"lab": Arms(lab)} | ({"real model": Arms(real)} if len(real.runs) else {})
    rows = []
    for n, c in enumerate(CLAIMS, 1):
        row = {"#": str(n), "claim": c.statement, "the paper": c.paper, "reproduced if": c.rule}
        for where, runs in arms.items():
            parts = c.parts(runs)
            row |= {where: _cell(parts), f"verdict, {where}": verdict(parts)}
        rows.append(row)
    table = pd.DataFrame(rows)
    unseen = table.filter(like="verdict, ").isin((NO_RUNS, NOT_TESTABLE)).all(axis=1)
    others = map("{#}, {claim} ({lab})".format_map, table[unseen].to_dict("records"))
    notes = [
        *(f"{where}: {runs}" for where, runs in arms.items()),
        "[low, high]: Student's 95 % interval over n seeds; of twenty verdicts one may be chance",
        f"above or below 0: not reproduced where the interval lies within {MARGIN} of 0, or beyond it",
        f"not measured: {'; '.join(others) or 'none'}",
        *(note for runs in (lab, real) if len(runs.runs) for note in source_notes(runs)),
    ]
    return Table(table[~unseen], notes)


def _cell(parts: list[Part]) -> str:
    """The parts of a claim; where none was measured, the reason."""
    if any(len(part.values) for part in parts):
        return ";\n".join(map(str, parts))
    return next((part.why_not for part in parts if part.why_not), NO_RUNS)


def _above(*others: str) -> Callable[[Arms], list[Part]]:
    """RLSD's held-out accuracy against that of others, seed by seed."""
    return lambda arms: [
        Part(f"accuracy, rlsd - {x}", arms.final("rlsd", ACCURACY) - arms.final(x, ACCURACY), low=0)
        for x in others
    ]


def _left(arms: Arms, method: str, column: str) -> pd.Series:
    """The share of a curve's start that is left at its end."""
    return arms.end(method, column) / arms.start(method, column)


def _double(arms: Arms) -> list[Part]:
    n, what = arms.length, "held-out accuracy"
    ours, theirs = arms.final("rlsd", ACCURACY), arms.final("grpo", ACCURACY, steps=2 * n)
    if theirs.empty:  # one length of run has to do
        n, what = n // 2, "training reward"
        ours, theirs = arms.mean("rlsd", REWARD, n - LAST + 1, n), arms.end("grpo", REWARD)
    return [Part(f"{what}, rlsd, {n} steps - grpo, {2 * n} steps", ours - theirs, low=0.0)]


def _early(arms: Arms) -> list[Part]:
    last = arms.length // 4
    ours, theirs = (arms.mean(method, REWARD, 1, last) for method in ("rlsd", "grpo"))
    return [Part(f"reward of steps 1 to {last}, rlsd - grpo", ours - theirs, low=0.0)]


def _peak(arms: Arms) -> list[Part]:
    if 0 < arms.length < PEAK[1] + LAST:
        why_not = f"{arms.length} steps end before a fall could show"
        return [Part("opsd", NO_VALUES, why_not=why_not)]
    peak = {method: arms.mean(method, REWARD, *PEAK) for method in ("opsd", "rlsd")}
    change = {method: arms.end(method, REWARD) - peak[method] for method in peak}
    return [
        Part("opsd, reward, steps 10-20 - start", peak["opsd"] - arms.start("opsd", REWARD), low=0),
        Part("opsd, reward, end - steps 10-20", change["opsd"], high=0.0),
        Part("rlsd, reward, end - steps 10-20", change["rlsd"], low=0.0),
    ]


def _leak_order(arms: Arms) -> list[Part]:
    end = {method: arms.end(method, LEAK) for method in VARIANTS}
    growth = {f"leaks of {m}, end - start": end[m] - arms.start(m, LEAK) for m in VARIANTS}
    order = {f"leaks at the end, {a} - {b}": end[a] - end[b] for a, b in pairwise(VARIANTS)}
    return [Part(name, values, low=0.0) for name, values in {**growth, **order}.items()]


def _leak_free(arms: Arms) -> list[Part]:
    ours, theirs = (arms.final(method, "leak_rate_after") for method in ("rlsd", "grpo"))
    name, slack = "leak rate, rlsd - grpo", 0.0
    if len(ours):
        all_seeds = pooled_share(ours, arms.final("rlsd", "leak_rate_after_high"))
        slack = all_seeds.high - all_seeds.mean
        name += ", too few completions to hold" if slack >= MARGIN else ""
    return [Part(name, ours - theirs, high=MARGIN, slack=slack)]


def _entropy(arms: Arms) -> list[Part]:
    if arms.preset.startswith("lab"):  # most of the entropy there is which filler word is said
        arms = Arms(arms.runs, f"{arms.preset.removesuffix('-bare')}-bare")
        if not arms.length:
            why_not = "most of the lab's entropy is filler words, and no runs are without them"
            return [Part("entropy", NO_VALUES, why_not=why_not)]
    grpo, rlsd = (_left(arms, method, "entropy") for method in ("grpo", "rlsd"))
    why_not = ""
    if (arms.end("rlsd", "rlsd/lambda") > 0).any():
        rlsd, why_not = NO_VALUES, "lambda is above 0 to the end"
    return [
        Part("grpo, entropy at the end / start", grpo, high=0.75),
        Part("rlsd, the same", rlsd, low=0.75, why_not=why_not),
    ]


def _answer(arms: Arms) -> list[Part]:
    trace = Arms(arms.runs, f"{arms.preset}-trace")
    gap = arms.gain("rlsd", steps=trace.length) - trace.gain("rlsd")
    return [Part("gain with the answer - gain with the trace", gap, low=-MARGIN)]


def _cost(arms: Arms) -> list[Part]:
    # Once lambda is 0 the pass is saved: only the steps before that say what it costs.
    taught = (arms.curve("rlsd", "rlsd/lambda") > 0).any(axis=1)
    last = max(taught.index[taught], default=0)
    ours, theirs = (arms.mean(method, "step_time", 2, last) for method in ("rlsd", "grpo"))
    what = f"seconds per step, rlsd / grpo - 1, steps 2-{last}"
    return [Part(what, ours / theirs - 1, high=0.1)]


def _points(other: str) -> str:
    averages = paper.table_2()[paper.AVERAGE]
    return f"{averages['rlsd'] - averages[other]:+.2f} points (average of five)"


def _from_to(values: tuple[float, float]) -> str:
    return f"{values[0]:.3g} to {values[1]:.3g}"


_doubled = paper.figure_1b()
CLAIMS = (
    Claim(
        "RLSD is best on average",
        f"56.18; next is GRPO, {_points('grpo')}",
        "RLSD is above every other method of Table 2 in held-out accuracy, seed by seed",
        _above(*paper.table_2().index.drop(["base", "rlsd"])),
    ),
    Claim("RLSD is above GRPO", _points("grpo"), ABOVE, _above("grpo")),
    Claim("RLSD is above GRPO+OPSD", _points("grpo_opsd"), ABOVE, _above("grpo_opsd")),
    Claim(
        "RLSD at N steps beats GRPO at 2N",
        f"{(_doubled.loc['rlsd, 200 steps'] - _doubled.loc['grpo, 400 steps']).mean():+.2f} points "
        "(average of three, N = 200)",
        "the difference is above 0; held-out accuracy where GRPO was run for 2N steps, else the "
        "training reward of one length of run",
        _double,
    ),
    Claim(
        "RLSD progresses faster early on",
        "Fig. 1a: both 0.50 at step 20, RLSD 0.61 at 75",
        "RLSD's mean training reward over the first quarter of the steps is above GRPO's",
        _early,
    ),
    Claim(
        "OPSD peaks within 10 to 20 steps and then falls, RLSD does not",
        "Fig. 1a: OPSD 0.59 near 15, 0.52 at the end",
        "OPSD's reward in steps 10 to 20 is above its first three steps and above its last ten, and "
        "RLSD's last ten are above its steps 10 to 20",
        _peak,
    ),
    Claim(
        "Leakage grows in full OPSD, Teacher's Top-1, Student's Top-1, in this order of severity",
        "Fig. 3a: 10 to 50 a step, up to 95, up to 37",
        "the leak rate of the rollouts grows in all three and falls in this order at the end",
        _leak_order,
    ),
    Claim(
        "RLSD does not leak",
        "stated (Theorem 5), no curve",
        f"RLSD's held-out leak rate is less than {MARGIN} above GRPO's, widened by what the completions "
        f"of all seeds leave open (Wilson); {CLEAN} of them without a leak are the fewest that can do",
        _leak_free,
    ),
    Claim(
        "OPSD's KL stalls where OPD's falls",
        f"Fig. 3c: OPD {_from_to(paper.FIGURE_3C['opd'])}, OPSD {_from_to(paper.FIGURE_3C['opsd'])}",
        "OPD's divergence falls below half of its start and OPSD's stays above half",
        lambda arms: [
            Part("opd, KL at the end / start", _left(arms, "opd", DIVERGENCE), high=0.5),
            Part("opsd, KL at the end / start", _left(arms, "opsd", DIVERGENCE), low=0.5),
        ],
    ),
    Claim(
        "3 to 6 % of the tokens are clipped",
        f"Fig. 5c: high {_from_to(paper.FIGURE_5C['high'])} %, low {_from_to(paper.FIGURE_5C['low'])} %",
        "both shares, averaged over the steps with a teacher, lie in the ranges of Fig. 5c",
        lambda arms: [
            Part(f"% clipped, {side}", 100 * arms.final("rlsd", f"rlsd/clip_{side}_frac"), *ends)
            for side, ends in paper.FIGURE_5C.items()
        ],
    ),
    Claim(
        "GRPO's entropy collapses; RLSD's does not, even after lambda = 0",
        f"Fig. 5b: GRPO {_from_to(paper.FIGURE_5B['grpo'])}, RLSD {_from_to(paper.FIGURE_5B['rlsd'])}",
        "GRPO loses more than a quarter of its entropy and RLSD, at lambda = 0, less; on the lab in "
        "runs without filler words alone",
        _entropy,
    ),
    Claim(
        "The bare answer is enough as privileged information",
        "stated, no number",
        f"the gain with the answer is less than {MARGIN} below the gain with the whole trace",
        _answer,
    ),
    Claim(
        "One extra forward pass is a negligible cost",
        "stated, no number",
        "a step with a teacher pass takes less than 10 % longer than the same step of GRPO",
        _cost,
    ),
)
