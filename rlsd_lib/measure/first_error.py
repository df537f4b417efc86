"""Does credit find the step that went wrong, and where does it go instead?

A task that knows its chains (`Task.first_error`) says at which token a failed rollout first went
wrong. The gap should be most negative there. Everything here is measured on the rollouts of
`rollouts.look`.
"""

import math
from collections.abc import Sequence

import pandas as pd

from rlsd_lib.measure.intervals import Interval, bootstrap_interval
from rlsd_lib.measure.rollouts import Rollout, token_frame
from rlsd_lib.tasks import Row, Task


def first_errors(task: Task, rollouts: Sequence[Rollout]) -> pd.DataFrame:
    """Where each failed rollout first went wrong, and what the gap says there; a row per rollout.

    `rank` 0 means that no token of the rollout has a more negative gap. `auroc_gap` is the share of
    the rollout's other tokens that have a less negative gap, ties counting half: 0.5 for evidence
    that knows nothing. Rollouts that stopped too early have no such token and are left out.
    """
    tokens = _tokens(task, rollouts).rename(columns={"position": "place"})
    by_rollout = tokens.groupby("rollout")
    others = by_rollout["gap"].transform("size") - 1
    ranked = tokens.assign(
        rank=by_rollout["gap"].rank(method="min").astype(int) - 1,
        # A mean rank counts the tokens below it, and ties by half.
        auroc_gap=(by_rollout["gap"].rank(ascending=False) - 1) / others,
    )
    columns = ["rollout", "place", "token", "gap", "rank", "auroc_gap"]
    return ranked.loc[ranked["kind"] == "first error", columns].reset_index(drop=True)


def auroc_by_problem(task: Task, groups: Sequence[Sequence[Rollout]]) -> pd.Series:
    """Mean first-error AUROC of each problem that has one, indexed by its place in `groups`."""
    means = [first_errors(task, group)["auroc_gap"].mean() for group in groups]
    return pd.Series(means, dtype=float).dropna()


def error_auroc(task: Task, groups: Sequence[Sequence[Rollout]]) -> Interval:
    """The mean of `auroc_by_problem`, with its 95 % bootstrap interval over problems, or NaN."""
    found = auroc_by_problem(task, groups)
    return bootstrap_interval(found) if len(found) else Interval(math.nan)


def credit_shares(task: Task, rollouts: Sequence[Rollout]) -> pd.DataFrame:
    """Which tokens get the credit: a row per kind of token of failed and right rollouts.

    `tokens` is the kind's share of the tokens, `moved` its share of sum abs(A_hat_t - A), which is
    what the method changes against GRPO; both within failed, or within right rollouts. Rollouts
    with A = 0 move nothing and are left out. Raises ValueError where nothing is moved.
    """
    tokens = _tokens(task, rollouts).query("advantage != 0")
    ended = (tokens["advantage"] > 0).map({True: "right", False: "wrong"}).rename("rollout ended")
    moved = (tokens["credit"] - tokens["advantage"]).abs()
    if not moved.any():
        raise ValueError("no token's credit differs from its rollout's advantage: nothing to share")
    sums = moved.groupby([ended, tokens["kind"]]).agg(tokens="size", moved="sum")
    return (sums / sums.groupby("rollout ended").transform("sum")).reset_index()


def _tokens(task: Task, rollouts: Sequence[Rollout]) -> pd.DataFrame:
    """`token_frame`, and the `kind` of each token."""
    kinds = [
        kind
        for one in rollouts
        for kind in kinds_of(task, one.completion, one.problem, len(one.tokens))
    ]
    return token_frame(rollouts).assign(kind=kinds)


def kinds_of(task: Task, completion: str, problem: Row, count: int) -> list[str]:
    """The kind of each of `count` tokens: "first error", "after it", "filler", "other" (its end)."""
    error = None
    if task.first_error is not None and not task.verify(completion, problem):
        error = task.first_error(completion, problem)
    fillers = task.nuisance_mask(completion) if task.nuisance_mask else []
    kinds = ["filler" if is_filler else "other" for is_filler in fillers]
    kinds += ["other"] * (count - len(kinds))
    if error is None or error >= len(kinds):
        return kinds
    after = ["after it" if kind == "other" else kind for kind in kinds[error + 1 :]]
    return [*kinds[:error], "first error", *after]
