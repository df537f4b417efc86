"""Where a chain went wrong, and how likely it was to succeed: what perfect credit is given."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlsd_lib.measure.evaluate import sample
from rlsd_lib.measure.exact import RightChains
from rlsd_lib.tasks import Row, Task
from rlsd_lib.tasks.encode import messages_of

OF_ERRORS = {"first_error", "decisions"}  # what `error_signals` gives
OF_SUCCESS = {"success_before", "success_after"}  # what `success_signals` gives


def error_signals(
    task: Task, rows: Sequence[Row], texts: Sequence[str], width: int
) -> dict[str, Tensor]:
    """What `credit.oracle` needs of completions that are `width` tokens wide.

    `first_error` (N,) is the index of a failed rollout's first wrong token, `width` where there is
    none among its tokens; `decisions` (N, `width`) marks the tokens that the answer follows from. Of
    tasks whose tokenizer splits a text as the task does. Raises ValueError if the task knows
    neither.
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


def success_signals(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[Row],
    completions: Sequence[list[int]],
    *,
    width: int,
    max_new_tokens: int,
) -> dict[str, Tensor]:
    """What `credit.oracle_value` needs: the policy's own success probability along its rollouts.

    V is 0 from the first wrong token on, and before it the probability that `model` keeps to the
    rest of a right chain, as in `measure.exact` from one chain for each rollout, averaged over those
    of a problem. `success_before` (N,) is V before the first token and `success_after` (N, `width`) V
    after each. `completions` are token ids with their end token. Raises ValueError if the task
    cannot tell a right chain.
    """
    drawn = RightChains(task, rows, tokenizer)
    prompts = [messages_of(row) for row in rows]
    settings = {"max_new_tokens": max_new_tokens, "batch_size": len(rows), "processors": [drawn]}
    sample(model, tokenizer, prompts, seed=sum(map(sum, completions)), **settings)
    # By how much of the chain is behind: nothing, one token, ..., all of it with the end.
    ahead = drawn.log_kept.flip(1).cumsum(1).flip(1)
    values = torch.cat([ahead, torch.zeros(len(rows), 1)], dim=1).exp()
    alike = torch.tensor([[mine == other for other in prompts] for mine in prompts]).float()
    values = alike @ values / alike.sum(dim=1, keepdim=True)
    after = torch.zeros(len(rows), width)
    for i, ids in enumerate(completions):
        chain = task.right_chain(rows[i])
        for t, token in enumerate(ids):
            if chain.is_complete and token == drawn.end:
                after[i, t] = 1.0
            elif chain.read(drawn.texts[token]):
                after[i, t] = values[i, chain.position]
            else:
                break
    return {"success_before": values[:, 0], "success_after": after}
