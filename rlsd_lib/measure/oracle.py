"""Where a chain went wrong, as tensors: what perfect credit is given."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlsd_lib.tasks import Row, Task


def oracle_signals(
    task: Task, rows: Sequence[Row], texts: Sequence[str], width: int
) -> dict[str, Tensor]:
    """What `credit.oracle` needs of completions that are `width` tokens wide.

    `first_error` (N,) is the index of a failed rollout's first wrong token, `width` where there is
    none among its tokens; `decisions` (N, `width`) marks the tokens that the answer follows from. Of
    tasks whose tokenizer splits a text as the task does.

    Raises:
        ValueError: the task knows neither.
    """
    if task.first_error is None or task.decisions is None:
        raise ValueError(f"task {task.name!r} does not know where a chain went wrong: no oracle")
    first, decisions = torch.full((len(rows),), width), torch.zeros(len(rows), width).bool()
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        error = None if task.verify(text, row) else task.first_error(text, row)
        if error is not None:
            first[i] = min(error, width)
        marked = task.decisions(text)[:width]
        decisions[i, : len(marked)] = torch.tensor(marked)
    return {"first_error": first, "decisions": decisions}
