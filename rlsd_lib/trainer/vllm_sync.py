"""Weights that go to vLLM, and come back as they were."""

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from trl.generation.vllm_generation import VLLMGeneration

HALF = (torch.bfloat16, torch.float16)


def keep_base_exact(model: nn.Module, backend: VLLMGeneration) -> None:
    """Restore the frozen half-precision weights of a PEFT model after each sync.

    TRL 1.16.0 adds the adapter to the frozen weights, sends them, and subtracts it again. In
    bfloat16 that rounds twice at every step, and it adds up (TRL's issue 6688): the frozen weights
    drift, and base model and saved adapter no longer make the model that was trained. The copy is
    kept in CPU memory and costs one transfer to the device per sync. Models without an adapter,
    and float32, are left alone.
    """
    if not isinstance(model, PeftModel):
        return
    sync = backend.sync_weights
    held: dict[str, Tensor] = {}

    @torch.no_grad()
    def exact_sync() -> None:
        # Taken at the first sync, when the weights have been sharded if they are to be.
        held.update({} if held else _frozen_halves(model))
        sync()
        for name, value in held.items():
            _local(model.get_parameter(name)).copy_(value)

    backend.sync_weights = exact_sync


def _frozen_halves(model: PeftModel) -> dict[str, Tensor]:
    return {
        name: _local(parameter).cpu().clone()
        for name, parameter in model.named_parameters()
        if ".base_layer." in name and parameter.dtype in HALF and not parameter.requires_grad
    }


def _local(parameter: Tensor) -> Tensor:
    """The part of a parameter that this rank holds, without its history."""
    whole = parameter.detach()
    return whole.to_local() if isinstance(whole, DTensor) else whole
