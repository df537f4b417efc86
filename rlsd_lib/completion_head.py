"""TRL's fused LM head on completion positions only, on devices where it takes every position.

With Triton the head scores just the labelled positions, one logits tile at a time and in place.
Without it, on a CPU above all, it scores prompts too, and holds several copies of a tile of 4,096
tokens. Here states and labels are cut to the completion before the head, and tiles are made to fit
a cache: the same numbers up to rounding, in less time and memory.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from peft import PeftModel
from torch import nn
from trl.kernels import chunked_logprob

from rlsd_lib.distillation import causal_lm

# Tokens per logits tile: the fastest and smallest of those measured, see outputs/LOG.md.
TILE = 128
WITH_TRITON = ("cuda", "xpu")


class CompletionHead:
    """Cuts the head's work to the completions within `cutting`, for the models that `of` returns."""

    def __init__(self) -> None:
        self.cuts = False

    @contextmanager
    def cutting(self, wanted: bool, device: torch.device) -> Iterator[None]:
        """Cut inside if `wanted` and if TRL's head does more on `device` than completions need.

        A backward pass computes its tiles again, so it belongs in the same block as its forward.
        """
        if not wanted or device.type in WITH_TRITON:
            yield
            return
        self.cuts = True
        try:
            with mock.patch.object(chunked_logprob, "TOKEN_CHUNK_SIZE", TILE):
                yield
        finally:
            self.cuts = False

    def of(self, model: nn.Module, length: int) -> Callable[..., Any]:
        """What TRL's log-probabilities are to call for `model`, with completions of `length`."""
        return completions_only(model, length) if self.cuts else model


def completions_only(model: nn.Module, length: int) -> Callable[..., Any]:
    """`model` with the fused head on the last `length` tokens: its outputs are (N, `length`).

    The position before the completion predicts its first token, so `length` + 1 are kept. An adapter
    that puts positions of its own in front pads the labels by itself, and is called as it is.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return model
    kept = length + 1

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[:, -kept:]
        return output

    def call(*, labels: torch.Tensor, **inputs: Any) -> Any:
        handle = causal_lm(model).base_model.register_forward_hook(cut)
        try:
            return model(labels=labels[:, -kept:], **inputs)
        finally:
            handle.remove()

    return call
