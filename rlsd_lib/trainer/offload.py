"""A full-copy teacher that lives in CPU memory and is on the device for the length of a pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, DistributedType
from torch import nn


def check_offload(accelerator: Accelerator, adapter: str | None) -> None:
    """Refuse `teacher_offload=True` where there is no full copy, or where it is in parts.

    Raises:
        ValueError: saying what already keeps the memory down there.
    """
    if adapter is not None:
        raise ValueError(
            "teacher_offload=True: the teacher of a PEFT student is an adapter, which costs no "
            "more than its few weights. Set teacher_offload=False."
        )
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"teacher_offload=True under {kind}: it would bypass the sharding. Set it to False and "
            "offload with the sharding's own settings."
        )


def to_host(model: nn.Module, device: torch.device) -> None:
    """Move parameters to CPU memory, pinned where `device` can copy from it at full speed."""
    for parameter in model.parameters():
        host = torch.empty_like(parameter, device="cpu", pin_memory=device.type == "cuda")
        parameter.data = host.copy_(parameter.data)


@contextmanager
def visiting(model: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """Yield the model with its parameters on `device`; what was there is freed on leaving.

    A pass changes no weights, so nothing is copied back.
    """
    homes = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        for parameter, home in homes:
            parameter.data = _sent(home, device)
        yield model
    finally:
        for parameter, home in homes:
            parameter.data = home


def _sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.to(device, non_blocking=True)
