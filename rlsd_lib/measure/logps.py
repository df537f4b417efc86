"""Log-probabilities of completions, for whoever looks at a model outside of its trainer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, ProcessorMixin

from rlsd_lib.prompts import Prompt
from rlsd_lib.tasks.encode import Processing, encode


def log_probabilities(
    model: PreTrainedModel,
    processing: Processing,
    prompts: Sequence[Prompt],
    completions: Sequence[list[int]],
    *,
    temperature: float = 1.0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    differentiable: bool = False,
) -> Tensor:
    """log P(. | prompt, y_<t) at each completion token, nats: (N, T, V) in float32.

    Completions are token ids, so that nothing is encoded a second time. What stands behind the end
    of a shorter one means nothing. Without a gradient, unless `differentiable`.
    """
    encoded = encode(processing, prompts, **(chat_template_kwargs or {}))
    answers, mask = padded(completions), padded([[1] * len(ids) for ids in completions])
    # Every field with an entry per token grows: a completion's type ids are 0, those of text.
    grown = {name: v for name, v in encoded.items() if v.shape == encoded["input_ids"].shape}
    behind = {name: torch.zeros_like(answers) for name in grown}
    behind |= {"input_ids": answers, "attention_mask": mask}
    inputs = {**encoded, **{name: torch.cat([v, behind[name]], dim=1) for name, v in grown.items()}}
    if not isinstance(processing, ProcessorMixin):
        # Padding on the left shall not move a text; models with images count their own positions.
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    # Only the positions that predict a completion's token go through the vocabulary.
    with torch.set_grad_enabled(differentiable):
        logits = model(**inputs, logits_to_keep=answers.shape[1] + 1).logits[:, :-1]
        return (logits.float() / temperature).log_softmax(-1)


def of_tokens(log_p: Tensor, completions: Sequence[list[int]]) -> list[Tensor]:
    """log P(y_t) of N completions: (N, T, V) -> N tensors (T_i,) on the CPU."""
    chosen = log_p.gather(2, padded(completions).to(log_p.device)[..., None])[..., 0].cpu()
    return [row[: len(ids)] for row, ids in zip(chosen, completions, strict=True)]


def padded(rows: Sequence[list[int]]) -> Tensor:
    """Token ids as one tensor (N, T), zeros on the right."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
