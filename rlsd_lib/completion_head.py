"""TRL's fused LM head on completion positions only, on devices where it takes every position.

With Triton the head scores just the labelled positions, one logits tile at a time and in place.
Without it, on a CPU above all, it scores prompts too, and holds several copies of a tile of 4,096
tokens. Here states and labels are cut to the completion before the head, and a CPU's tiles are made
to fit its cache: the same numbers up to rounding, in less time and memory.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_compiled_module
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_triton_available
from trl.kernels import chunked_logprob

from rlsd_lib.distillation import causal_lm

# Tokens per logits tile on a CPU: the fastest and smallest of those measured, see outputs/LOG.md.
TILE = 128
# Matrix products of fewer rows take another kernel, which rounds the same row differently.
FEWEST = 4


class CompletionHead:
    """The head's work cut to the completions, inside of `applied`, for the models that `wrap` gives."""

    def __init__(self, device: torch.device) -> None:
        self.applies = False
        self.saves = not (device.type in ("cuda", "xpu") and is_triton_available())
        self.on_cpu = device.type == "cpu"

    @contextmanager
    def applied(self, wanted: bool) -> Iterator[None]:
        """Cut inside, if `wanted` and if TRL's head would do more than the completions need.

        The backward pass computes its tiles again, so it belongs in the block with its forward.
        """
        if not (wanted and self.saves):
            yield
            return
        before = chunked_logprob.TOKEN_CHUNK_SIZE
        self.applies = True
        if self.on_cpu:
            chunked_logprob.TOKEN_CHUNK_SIZE = TILE
        try:
            yield
        finally:
            self.applies = False
            chunked_logprob.TOKEN_CHUNK_SIZE = before

    def wrap(self, model: nn.Module, length: int) -> Callable[..., Any]:
        """What TRL's log-probabilities are to call for `model`, with completions of `length`."""
        return completions_only(model, length) if self.applies and can_cut(model) else model


def can_cut(model: nn.Module) -> bool:
    """Whether a hook on the backbone is seen, and labels are as long as what it returns."""
    while not isinstance(model, PreTrainedModel | PeftModel):
        if is_compiled_module(model):
            return False
        model = model.module
    return not (isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning)


def completions_only(model: nn.Module, length: int) -> Callable[..., Any]:
    """`model` with the fused head on the last tokens only: its outputs are (N, `length` or more)."""

    def call(*, labels: torch.Tensor, **inputs: Any) -> Any:
        scored = length
        while 0 < len(labels) * scored % TILE < FEWEST:
            scored += 1
        # The position before the first scored token predicts it.
        kept = slice(-scored - 1, None)

        def cut(module: nn.Module, args: Any, output: Any) -> Any:
            output.last_hidden_state = output.last_hidden_state[:, kept]
            return output

        handle = causal_lm(model).base_model.register_forward_hook(cut)
        try:
            return model(labels=labels[:, kept], **inputs)
        finally:
            handle.remove()

    return call
