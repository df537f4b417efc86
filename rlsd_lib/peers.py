"""SDPO's privileged text: successful rollouts of the same group, wherever they were generated."""

from collections.abc import Sequence
from typing import NamedTuple

from rlsd_lib.tasks.task import Completion, text_of


class Demonstrations(NamedTuple):
    """One text per local rollout, None where its group offers none; and the groups' tally."""

    texts: list[str | None]
    groups_with_success: int
    groups: int


def demonstrations(
    completions: Sequence[Completion],
    rewards: Sequence[float],
    feedback: Sequence[str | None],
    local: slice,
    *,
    group_size: int,
    threshold: float,
    with_failed: bool,
) -> Demonstrations:
    """Write the privileged text of each rollout in `local`.

    All sequences are global, in rank order: a group of `group_size` may lie across two ranks. A
    rollout is never its own demonstration. NaN rewards (unscorable rollouts) never succeed.

    Raises:
        ValueError: if the sequences differ in length, or do not hold whole groups.
    """
    total = len(completions)
    if len(rewards) != total or len(feedback) != total or total % group_size:
        raise ValueError(
            f"{total} completions, {len(rewards)} rewards and {len(feedback)} feedback texts do "
            f"not make whole groups of {group_size}."
        )
    good = [reward >= threshold for reward in rewards]
    failed = [reward < threshold for reward in rewards]
    texts = []
    for index in range(total)[local]:
        first = index // group_size * group_size
        peers = [i for i in range(first, first + group_size) if i != index]
        shown = [text_of(completions[i]) for i in peers if good[i]][:1]
        if shown and with_failed:
            shown += [f"A wrong attempt:\n{text_of(completions[i])}" for i in peers if failed[i]][
                :1
            ]
        if feedback[index]:
            shown.append(f"Feedback:\n{feedback[index]}")
        texts.append("\n\n".join(shown) or None)
    groups = [good[i : i + group_size] for i in range(0, total, group_size)]
    return Demonstrations(texts, sum(map(any, groups)), len(groups))
