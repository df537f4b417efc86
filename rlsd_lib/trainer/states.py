"""The distillation term inside the loss: hidden states, heads, masks, and the mean over tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import GRPOConfig

from rlsd_lib.trainer import sharded

# What TRL's output dictionary holds of the images; the teacher sees the very same tensors.
IMAGE_FIELDS = (
    *("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask"),
    *("spatial_shapes", "num_tiles", "image_sizes", "image_position_ids"),
)
# In front of the names of a credit's own signals, so that TRL's dictionary has no other of the name.
SIGNAL = "signal "
TYPE_ID_FIELDS = ("token_type_ids", "mm_token_type_ids")


def predicting(states: Tensor, length: int) -> Tensor:
    """The states (N, T, H) that predict the last T = `length` tokens: position t - 1 predicts t."""
    return states[:, -length - 1 : -1]


@contextmanager
def hidden_states(model: nn.Module, wanted: bool) -> Iterator[list[Tensor]]:
    """Yield a list to which every forward inside the block adds what the LM head is given.

    States (N, P + T, H) with their graph, if `wanted`: TRL's fused head returns log-probabilities
    only.
    """
    collected: list[Tensor] = []
    if not wanted:
        yield collected
        return

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        collected.append(output.last_hidden_state)

    handle = causal_lm(model).base_model.register_forward_hook(keep)
    try:
        yield collected
    finally:
        handle.remove()


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The causal LM inside data-parallel and PEFT wrappers."""
    while not isinstance(model, PreTrainedModel):
        model = model.get_base_model() if isinstance(model, PeftModel) else model.module
    return model


def head_of(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Whole weight (V, H) and bias (V,) of the LM head. Collective if parameters are sharded."""
    head = causal_lm(model).get_output_embeddings()
    return sharded.outside_forward(model, head.weight), sharded.outside_forward(model, head.bias)


def token_mean(
    per_token: Tensor,
    mask: Tensor,
    args: GRPOConfig,
    *,
    num_items: Tensor,
    num_processes: int,
    accumulation: int,
) -> Tensor:
    """The mean of (N, T) values over tokens as TRL's policy loss takes it, a scalar."""
    per_token = per_token * mask
    total = per_token.sum()
    if args.loss_type in ("cispo", "dapo", "vespo"):
        items = num_items.clamp(min=1.0) / num_processes
        return total / (items * accumulation / args.steps_per_generation)
    if args.loss_type == "bnpo":
        mean = total / mask.sum().clamp(min=1.0)
    elif args.loss_type == "dr_grpo":
        mean = total / (per_token.size(0) * args.max_completion_length)
    elif args.loss_type == "luspo":
        mean = per_token.sum(-1).mean()
    else:
        mean = (per_token.sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    return mean / accumulation


def type_ids(prompt: Tensor, output: dict[str, Any], name: str) -> Tensor:
    """Type ids `name` of the teacher's prompt (N, P) and those that TRL gave the completion."""
    completion = torch.zeros_like(output["completion_ids"])
    if name in output:
        # Not all 0 where a tool answered with an image.
        completion = output[name][:, -completion.size(1) :]
        if "pixel_values" not in output:
            # TRL dropped the images of the batch, because a cut completion held part of one.
            prompt = torch.zeros_like(prompt)
    return torch.cat([prompt, completion], dim=1)


def loss_mask(inputs: dict[str, Any]) -> Tensor:
    """1 on the tokens (N, T) that the policy wrote: TRL's mask, over which every mean is taken."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def credit_mask(inputs: dict[str, Any]) -> Tensor:
    """1 on the tokens (N, T) that the policy wrote and that the method may move."""
    mask = loss_mask(inputs)
    if "has_demonstration" in inputs:
        mask = mask * inputs["has_demonstration"][:, None]
    return mask
