"""The least work that scoring needs, and how fast this machine could do it.

FLOPs count a multiplication and an addition as two; matrix products only.
"""

import time
from typing import NamedTuple

import torch
from torch import nn

from rlsd_lib.experiment.cost.contenders import Setting
from rlsd_lib.trainer.states import causal_lm, head_of


class Work(NamedTuple):
    """FLOPs and bytes moved by one pass."""

    flops: float
    bytes: float


def teacher_pass(model: nn.Module, setting: Setting, *, shared: bool) -> Work:
    """The work of scoring one group: every distinct position once, every visible pair once.

    Bytes are the weights, read once, and the keys and values, written once and read once by each
    rollout. Activations are left out: they could stay in cache.
    """
    text = causal_lm(model).config.get_text_config()
    prompt, completion = setting.prompt + setting.reference, setting.completion
    copies = 1 if shared else setting.generations
    positions = copies * (prompt - 1) + setting.generations * completion
    pairs = copies * prompt * (prompt - 1) / 2
    pairs += setting.generations * completion * (prompt - 1 + (completion + 1) / 2)
    weight, _ = head_of(model)
    backbone = causal_lm(model).base_model
    named = backbone.named_parameters()
    dense = sum(p.numel() for name, p in named if p.dim() > 1 and "embed" not in name)
    width = text.num_attention_heads * text.head_dim
    flops = 2 * dense * positions
    flops += 4 * text.num_hidden_layers * width * pairs
    flops += 2 * weight.numel() * setting.generations * completion
    states = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    kept = states * (positions + setting.generations * (prompt - 1))
    return Work(flops, (dense + weight.numel() + kept) * weight.element_size())


class Machine(NamedTuple):
    """FLOPs and bytes per second."""

    flops: float
    bandwidth: float

    def seconds(self, work: Work) -> float:
        """The roofline: whichever of arithmetic and memory takes longer."""
        return max(work.flops / self.flops, work.bytes / self.bandwidth)


def measure_machine(device: torch.device, dtype: torch.dtype, clock=time.perf_counter) -> Machine:
    """The best of a few square matrix products, and of a few copies, on `device`.

    `clock` must wait for the device.
    """
    big = device.type == "cuda"
    size, length = (8192, 2**28) if big else (1024, 2**24)
    square = torch.randn(size, size, device=device, dtype=dtype)
    line = torch.zeros(length, device=device, dtype=dtype)
    other = torch.empty_like(line)
    products = [_timed(lambda: square @ square, clock) for _ in range(4)]
    copies = [_timed(lambda: other.copy_(line), clock) for _ in range(4)]
    moved = 2 * line.numel() * line.element_size()
    return Machine(2 * size**3 / min(products[1:]), moved / min(copies[1:]))


def _timed(call, clock) -> float:
    begun = clock()
    call()
    return clock() - begun
