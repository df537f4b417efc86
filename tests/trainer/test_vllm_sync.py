"""TRL's walk over the weights that it sends to vLLM, without vLLM: nothing may stay changed."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from trl.generation.vllm_generation import VLLMGeneration

from rlsd_lib.trainer.teacher import add_teacher_adapter
from rlsd_lib.trainer.upstream import keep_base_exact


def adapted(dtype: torch.dtype) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(tiny.model().to(dtype), LoraConfig(r=4, init_lora_weights=False))


def backend_of(model: torch.nn.Module) -> tuple[VLLMGeneration, dict[str, torch.Tensor]]:
    """TRL's backend without an engine, and what it would have sent last."""
    backend = object.__new__(VLLMGeneration)
    backend.model = model
    backend._dist = SimpleNamespace(is_fsdp=False, gather_params=lambda _: nullcontext())
    sent: dict[str, torch.Tensor] = {}
    backend.sync_weights = lambda: sent.update(
        {name: value.clone() for name, value in backend._iter_named_params()}
    )
    return backend, sent


def frozen(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".base_layer." in n}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frozen_weights_survive_many_syncs(dtype: torch.dtype) -> None:
    """Without the restoration they do not, which is why it is there."""
    drifting, kept = adapted(dtype), adapted(dtype)
    start = frozen(kept)
    plain, _ = backend_of(drifting)
    backend, sent = backend_of(kept)
    keep_base_exact(kept, backend)
    for _ in range(5):
        plain.sync_weights()
        backend.sync_weights()
    assert not same(start, frozen(drifting))
    assert same(start, frozen(kept))
    name = "model.layers.0.self_attn.q_proj"
    layer = kept.get_submodule(f"base_model.model.{name}")
    merged = layer.base_layer.weight + layer.get_delta_weight("default")
    assert torch.equal(sent[f"{name}.weight"], merged.to(dtype)), "vLLM gets the merged weights"


def test_trap_17_what_is_sent_is_the_students_adapter_and_not_the_teachers() -> None:
    model = adapted(torch.bfloat16)
    add_teacher_adapter(model)
    backend, sent = backend_of(model)
    keep_base_exact(model, backend)
    backend.sync_weights()
    first = dict(sent)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".teacher." in name:
                parameter.mul_(3)
    backend.sync_weights()
    assert same(first, sent)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name:
                parameter.mul_(3)
    backend.sync_weights()
    assert not same(first, sent)
    assert not any("lora_" in name for name in sent)


def test_weights_that_are_trained_and_models_without_adapters_are_left_alone() -> None:
    model = adapted(torch.bfloat16)
    bias = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer")
    bias.bias = torch.nn.Parameter(torch.zeros(32, dtype=torch.bfloat16))
    backend, _ = backend_of(model)
    keep_base_exact(model, backend)
    backend.sync_weights()
    with torch.no_grad():
        bias.bias.add_(1)
    backend.sync_weights()
    assert torch.all(bias.bias == 1)
    full = tiny.model()
    backend, _ = backend_of(full)
    sync = backend.sync_weights
    keep_base_exact(full, backend)
    assert backend.sync_weights is sync
