"""The probability of a right chain by importance sampling, where a task knows its right chains.

A completion is drawn from the model among the tokens that keep the chain right, and weighted by the
probability that the model itself keeps to them, w = prod_t P(allowed_t | y_<t). Its mean is the
probability of a right chain, without bias, and varies far less than the 0 or 1 of a plain sample:
what differs between two draws is filler words and the order of operands. d log P(y) weighted by w
is an unbiased gradient of the same probability.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from rlsd_lib.measure.evaluate import sample
from rlsd_lib.tasks import Row, Task
from rlsd_lib.tasks.encode import messages_of


class RightChains(LogitsProcessor):
    """Keeps generation on right chains, and the log-probability that the model would have.

    `log_kept` (N, P) is the sum of log P(allowed_t | y_<t) in nats over the tokens t at each position
    of the chain; `is_complete` (N,) says which rows have come to their end token. Raises ValueError
    if the task cannot tell a right chain.
    """

    def __init__(self, task: Task, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> None:
        if task.right_chain is None:
            raise ValueError(f"task {task.name!r} cannot tell a right chain: draw samples instead")
        self.chains = [task.right_chain(row) for row in rows]
        self.ids, self.end = tokenizer.get_vocab(), tokenizer.eos_token_id
        self.texts = {index: text for text, index in self.ids.items()}
        self.masks: dict[frozenset[str], Tensor] = {}  # by the tokens that are allowed
        self.is_complete = torch.zeros(len(rows), dtype=torch.bool)
        self.log_kept = torch.zeros(len(rows), 1 + max(len(c.shortest) for c in self.chains))
        self._begun = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Read the token that was drawn last, and mask those (N, V) that would be wrong now."""
        masks, positions = [], []
        for i, (chain, last) in enumerate(zip(self.chains, input_ids[:, -1].tolist(), strict=True)):
            if self._begun and not self.is_complete[i]:
                self.is_complete[i] = last == self.end
                if last != self.end:
                    chain.read(self.texts[last])
            masks.append(self._mask(chain.allowed(), scores))
            positions.append(chain.position)
        self._begun = True
        allowed = torch.stack(masks)
        log_mass = scores.log_softmax(-1).masked_fill(~allowed, -torch.inf).logsumexp(-1)
        kept = torch.where(self.is_complete, 0.0, log_mass.float().cpu())
        self.log_kept.scatter_add_(1, torch.tensor(positions)[:, None], kept[:, None])
        return scores.masked_fill(~allowed, -torch.inf)

    def _mask(self, tokens: frozenset[str], scores: Tensor) -> Tensor:
        if tokens not in self.masks:
            mask = torch.zeros_like(scores[0], dtype=torch.bool)
            mask[[self.ids[token] for token in tokens] or [self.end]] = True
            self.masks[tokens] = mask
        return self.masks[tokens]


def right_chains(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[Row],
    *,
    max_new_tokens: int,
    batch_size: int = 256,
    seed: int = 0,
    **template: Any,
) -> tuple[list[list[int]], np.ndarray]:
    """Draw one right completion for each row; returns token ids, and weights w in [0, 1] (N,).

    Their mean estimates, without bias, the mean probability over `rows` that a completion at
    temperature 1 is a right chain within `max_new_tokens`. `template` are arguments of the chat
    template. Raises ValueError if the task cannot tell a right chain.
    """
    completions, weights = [], []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        chains = RightChains(task, batch, tokenizer)
        ids = sample(
            model,
            tokenizer,
            [messages_of(row) for row in batch],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed + start,
            chat_template_kwargs=template,
            processors=[chains],
        )
        ended = torch.tensor([row[-1] == tokenizer.eos_token_id for row in ids])
        weights += torch.where(ended, chains.log_kept.sum(dim=1).exp(), 0.0).tolist()
        completions += ids
    return completions, np.array(weights)
