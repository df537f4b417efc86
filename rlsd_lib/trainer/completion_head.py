"""TRL's fused LM head on completion positions only, on a CPU, where it takes every position.

With Triton the head scores just the labelled positions, one logits tile at a time and in place.
Without it, it scores prompts too, and holds several copies of a tile of 4,096 tokens. Here states
and labels are cut to the completion before the head, and tiles are made to fit a CPU's cache: the
same numbers up to rounding, in less time and memory.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_compiled_module
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from trl.kernels import chunked_logprob

from rlsd_lib.trainer.states import causal_lm

# Tokens per logits tile: the fastest and smallest of those measured, see outputs/LOG.md.
TILE = 128


class CompletionHead:
    """The head's work cut to the completions, inside of `applied`, for the models that `wrap` gives."""

    def __init__(self, device: torch.device) -> None:
        self.applies = False
        self.saves = device.type == "cpu"

    @contextmanager
    def applied(self, wanted: bool) -> Iterator[None]:
        """Cut inside, if `wanted` and if TRL's head would do more than the completions need.

        The backward pass computes its tiles again, so it belongs in the block with its forward.
        """
        if not (wanted and self.saves):
            yield
            return
        self.applies = True
        try:
            with tiles_of(TILE):
                yield
        finally:
            self.applies = False

    def wrap(self, model: nn.Module, length: int) -> Callable[..., Any]:
        """What TRL's log-probabilities are to call for `model`, with completions of `length`."""
        return completions_only(model, length) if self.applies and can_cut(model) else model


@contextmanager
def tiles_of(tokens: int) -> Iterator[None]:
    """Tiles of `tokens` rows in every fused head inside."""
    before = chunked_logprob.TOKEN_CHUNK_SIZE
    chunked_logprob.TOKEN_CHUNK_SIZE = tokens
    try:
        yield
    finally:
        chunked_logprob.TOKEN_CHUNK_SIZE = before


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
        scored, tile = scored_and_tile(length, labels.size(1) - 1)
        # The position before the first scored token predicts it.
        kept = slice(-scored - 1, None)

        def cut(module: nn.Module, args: Any, output: Any) -> Any:
            output.last_hidden_state = output.last_hidden_state[:, kept]
            return output

        handle = causal_lm(model).base_model.register_forward_hook(cut)
        try:
            with tiles_of(tile):
                return model(labels=labels[:, kept], **inputs)
        finally:
            handle.remove()

    return call


def scored_and_tile(length: int, most: int) -> tuple[int, int]:
    """How many of the last `most` tokens to score, at least `length`, and the rows of one tile.

    A matrix product rounds a row by how many rows there are and where it lies. Every sequence fills
    whole tiles, all of one size, so that what it scores does not depend on its place in the batch:
    a teacher that sees what the student sees must agree to the bit.
    """
    pieces = -(-length // TILE)
    tile = -(-length // pieces)
    return (pieces * tile, tile) if pieces * tile <= most else (length, length)
