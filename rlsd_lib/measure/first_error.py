"""Does credit find the step that went wrong, and where does it go instead?

A task that knows its chains (`Task.first_error`) says at which token a failed rollout first went
wrong. The gap should be most negative there, and the weight largest. Everything here is measured on
rollouts of `lens.look`.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pandas as pd
import torch

from rlsd_lib.credit import clipped_weight, signed_evidence
from rlsd_lib.measure.intervals import Interval, bootstrap_interval
from rlsd_lib.measure.rollouts import Rollout
from rlsd_lib.tasks import Task

ERRORS = ("rollout", "place", "token", "gap", "rank", "auroc_gap", "auroc_weight")
KINDS = ("first error", "after it", "filler", "other")


def first_errors(task: Task, rollouts: Sequence[Rollout]) -> pd.DataFrame:
    """Where each failed rollout first went wrong, and what the credit says there; a row per rollout.

    `rank` 0 means that no token of the rollout has a more negative gap. `auroc_gap` is the share of
    the rollout's other tokens that have a less negative gap, ties counting half: 0.5 for evidence
    that knows nothing, 1 for evidence that always points at the error. `auroc_weight` is the same
    for a larger clipped weight, and NaN where A = 0 and there is no weight. Rollouts whose first
    error is that they stopped too early have no such token and are left out.
    """
    rows = []
    for number, rollout in enumerate(rollouts):
        place = _place(task, rollout)
        if place is None:
            continue
        blame = [-gap for gap in rollout.gap]
        weight = _auroc(rollout.weight, place) if rollout.advantage < 0 else float("nan")
        rank = sum(other > blame[place] for other in blame)
        row = (number, place, rollout.tokens[place], rollout.gap[place], rank)
        rows.append((*row, _auroc(blame, place), weight))
    return pd.DataFrame(rows, columns=list(ERRORS))


def auroc_by_problem(
    task: Task, groups: Sequence[Sequence[Rollout]], column: str = "auroc_gap"
) -> pd.Series:
    """Mean AUROC of the first error of each problem, indexed by the group's place in `groups`.

    `groups` holds one group of rollouts per problem, `column` is "auroc_gap" or "auroc_weight".
    Problems without a failed rollout that has a first error are left out: it may be empty.
    """
    means = [first_errors(task, group)[column].mean() for group in groups]
    return pd.Series(means, dtype=float).dropna()


def error_auroc(
    task: Task, groups: Sequence[Sequence[Rollout]], column: str = "auroc_gap"
) -> Interval:
    """The mean of `auroc_by_problem`, with its 95 % bootstrap interval over problems.

    NaN throughout where no failed rollout has a first error to point at.
    """
    found = auroc_by_problem(task, groups, column)
    return bootstrap_interval(found.to_numpy()) if len(found) else Interval(*[float("nan")] * 3)


def clip_sweep(
    task: Task, groups: Sequence[Sequence[Rollout]], widths: Sequence[float]
) -> pd.DataFrame:
    """What a clip leaves of the evidence: a row per width epsilon_w and kind of clip.

    The weight's AUROC at the first error with its interval over problems, and `intervention`, the
    mean of abs(w - 1) over the tokens of rollouts with A != 0, at lambda = 1. Weights are RLSD's,
    from the rollouts' gaps, whatever method the rollouts were looked at with.
    """
    rows = []
    for width, kind in product(widths, ("linear", "log")):
        weighed = [
            [_weighed(rollout, width, log_clip=kind == "log") for rollout in group]
            for group in groups
        ]
        moved = [abs(w - 1) for group in weighed for x in group if x.advantage for w in x.weight]
        found = error_auroc(task, weighed, "auroc_weight")
        rows.append((width, kind, *found, sum(moved) / len(moved)))
    return pd.DataFrame(
        rows, columns=["epsilon_w", "clip", "AUROC of the weight", "low", "high", "intervention"]
    )


def _weighed(rollout: Rollout, width: float, *, log_clip: bool) -> Rollout:
    advantage = torch.tensor([rollout.advantage])
    evidence = signed_evidence(advantage, torch.tensor([rollout.gap]))
    return replace(rollout, weight=clipped_weight(evidence, width, log_clip=log_clip)[0].tolist())


def credit_shares(task: Task, rollouts: Sequence[Rollout]) -> pd.DataFrame:
    """Which tokens get the credit: a row per kind of token of failed and right rollouts.

    `tokens` is the kind's share of the tokens, `moved` its share of sum abs(A_hat_t - A), which is
    what the method changes against GRPO; both within failed, or within right rollouts. Rollouts
    with A = 0 move nothing and are left out. Raises ValueError where nothing is moved.
    """
    rows = []
    for rollout in rollouts:
        ended = "right" if rollout.advantage > 0 else "wrong"
        for kind, credit in zip(_kinds(task, rollout), rollout.credit, strict=True):
            if rollout.advantage:
                rows.append((ended, kind, abs(credit - rollout.advantage)))
    frame = pd.DataFrame(rows, columns=["rollout ended", "kind", "moved"])
    if not frame["moved"].any():
        raise ValueError("no token's credit differs from its rollout's advantage: nothing to share")
    cells = frame.groupby(["rollout ended", "kind"])["moved"].agg(["size", "sum"])
    shares = cells / cells.groupby("rollout ended").transform("sum")
    return shares.rename(columns={"size": "tokens", "sum": "moved"}).reset_index()


def _place(task: Task, rollout: Rollout) -> int | None:
    """The index of a failed rollout's first wrong token, None where there is none to point at."""
    if rollout.reward or task.first_error is None:
        return None
    place = task.first_error(rollout.completion, rollout.problem)
    return place if place is not None and place < len(rollout.gap) else None


def _auroc(scores: Sequence[float], place: int) -> float:
    own, others = scores[place], [s for i, s in enumerate(scores) if i != place]
    beaten = sum((other < own) + 0.5 * (other == own) for other in others)
    return beaten / len(others) if others else float("nan")


def _kinds(task: Task, rollout: Rollout) -> list[str]:
    """One of `KINDS` per token; the end token is "other"."""
    error = _place(task, rollout)
    words = task.nuisance_mask(rollout.completion) if task.nuisance_mask else []
    filler = [*words, *[False] * (len(rollout.tokens) - len(words))]
    kinds = []
    for place, is_filler in enumerate(filler):
        if place == error:
            kinds.append("first error")
        elif is_filler:
            kinds.append("filler")
        else:
            kinds.append("after it" if error is not None and place > error else "other")
    return kinds
