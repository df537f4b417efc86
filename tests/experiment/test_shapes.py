"""The planner's sizes against real tensors and the FLOPs that torch counts."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from trl.trainer.utils import add_fused_lm_head

from rlsd_lib.experiment.cost.budget import GIB, Setting, memory
from rlsd_lib.experiment.cost.shapes import SHAPES, ModelShape, VisionShape, shape_of
from rlsd_lib.experiment.cost.step import flops
from rlsd_lib.trainer.upstream import completions_only

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "attn_implementation": "eager",  # a kernel for CPUs that torch's FLOP counter passes over
}


def sized(shape: ModelShape) -> torch.nn.Module:
    """A model of these sizes without memory."""
    text = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
    }
    with torch.device("meta"):
        if shape.vision is None:
            return Qwen3ForCausalLM(Qwen3Config(**text, tie_word_embeddings=shape.tied))
        tower = {
            "hidden_size": shape.vision.hidden,
            "depth": shape.vision.layers,
            "intermediate_size": shape.vision.intermediate,
            "out_hidden_size": shape.vision.output,
            "deepstack_visual_indexes": list(range(shape.vision.taps)),
        }
        config = Qwen3VLConfig(
            text_config=text, vision_config=tower, tie_word_embeddings=shape.tied
        )
        return Qwen3VLForConditionalGeneration(config)


def numbers(tensors: Any) -> int:
    return sum(tensor.numel() for tensor in tensors)


# Sizes


@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("Qwen")])
def test_parameters_are_those_of_the_model(name: str) -> None:
    model, shape = sized(SHAPES[name]), SHAPES[name]
    assert shape.parameters == numbers(model.parameters())
    assert shape_of(model.config) == shape
    assert shape.ends == numbers({model.lm_head.weight, model.get_input_embeddings().weight})


def test_lora_parameters_are_those_of_peft() -> None:
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL, vocab_size=64))
    shape = shape_of(model.config)
    adapted = get_peft_model(model, LoraConfig(r=5, target_modules="all-linear"))
    assert shape.lora_parameters(5) == numbers(p for p in adapted.parameters() if p.requires_grad)


@pytest.mark.parametrize("lora", [False, True])
def test_weights_optimiser_and_teacher_weigh_what_is_predicted(tmp_path: Path, lora: bool) -> None:
    student: Any = tiny.model(**SMALL)
    shape = shape_of(student.config)
    if lora:
        student = get_peft_model(student, LoraConfig(r=8, target_modules="all-linear"))
    trainer = tiny.trainer(tmp_path, student, max_steps=1)
    trainer.train()
    setting = Setting(shape, 1, 64, 8, rollouts=8, lora_rank=8 if lora else 0)
    predicted = memory(setting, 80, teacher=True).kept
    pairs = trainer.teacher._parameter_pairs(trainer.model)
    moments = [
        value
        for state in trainer.optimizer.state.values()
        for value in state.values()
        if value.dim() > 0
    ]
    weights = [p for n, p in trainer.model.named_parameters() if ".teacher." not in n]
    actual = {
        "weights": numbers(weights),
        "optimiser": numbers(moments),
        "teacher": numbers(teacher for teacher, _ in pairs),
    }
    for part, count in actual.items():
        assert predicted[part] * GIB == pytest.approx(4 * count, rel=1e-6), part


@pytest.mark.parametrize(
    ("dtype", "autocast", "residual", "compute"),
    [
        (torch.float32, False, 4, 4),
        (torch.float32, True, 4, 2),
        (torch.bfloat16, False, 2, 2),
    ],
)
def test_activations_are_what_autograd_keeps(dtype, autocast, residual, compute) -> None:
    rows, length = 2, 96
    kept = []
    for layers in (1, 3):
        sizes = {**SMALL, "attn_implementation": "sdpa", "num_hidden_layers": layers}
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, vocab_size=64)).to(dtype).train()
        kept.append(_kept_by_autograd(model, rows, length, autocast))
    shape = shape_of(model.config)
    predicted = shape.layer_activations(rows, length, residual=residual, compute=compute)
    # The bf16 copies that autocast makes of a layer's weights are counted apart.
    copies = shape.layer_weights * 2 if autocast else 0
    assert (kept[1] - kept[0]) / 2 - copies == pytest.approx(predicted, rel=0.01)


def _kept_by_autograd(model: torch.nn.Module, rows: int, length: int, autocast: bool) -> int:
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (storage := tensor.untyped_storage().data_ptr()) not in weights:
            seen[storage] = tensor
        return tensor

    ids = torch.randint(0, 64, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model.model(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


# FLOPs


def counted(run: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_flops_are_those_that_torch_counts() -> None:
    """Forward, backward and teacher pass through TRL's fused head, within two percent."""
    prompt, new, rows, more = 96, 48, 4, 24
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL, vocab_size=2048))
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    setting = Setting(
        shape=shape_of(model.config),
        gpus=1,
        prompt_length=prompt,
        max_completion_length=new,
        rollouts=rows,
        num_generations=rows,
        privileged_length=more,
        teacher_pass="plain",
        gradient_checkpointing=False,
    )
    predicted = flops(setting, teacher=True)

    def forward(length: int) -> torch.Tensor:
        ids = torch.randint(0, 2048, (rows, length))
        scored = completions_only(model, new)(input_ids=ids, labels=ids, fused_lm_head=True)
        return scored.log_probs.sum()

    loss: list[torch.Tensor] = []
    assert counted(lambda: loss.append(forward(prompt + new))) == pytest.approx(
        predicted["policy forward"], rel=0.02
    )
    # TRL adds the head's two gradients up in place (`addmm_`), which torch's counter passes over.
    unseen = 2 * setting.shape.head_flops(rows * new)
    backward = counted(loss[0].backward) + unseen
    assert backward == pytest.approx(predicted["policy backward"], rel=0.02)
    with torch.no_grad():
        assert counted(lambda: forward(prompt + more + new)) == pytest.approx(
            predicted["teacher"], rel=0.02
        )


def test_flops_of_decoding_and_of_a_shared_prompt_are_those_counted() -> None:
    """Keys and values of the prompt first, then tokens one by one, or all at once (shared)."""
    prompt, new, group = 64, 16, 4
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL, vocab_size=512)).eval()
    setting = Setting(
        shape=shape_of(model.config),
        gpus=1,
        prompt_length=prompt,
        max_completion_length=new,
        rollouts=group,
        num_generations=group,
        privileged_length=0,
        teacher_pass="shared",
    )
    predicted = flops(setting, teacher=True)
    ids = torch.randint(0, 512, (group, prompt))

    @torch.no_grad()
    def shared() -> None:
        cache = model.model(ids[:1, :-1], use_cache=True).past_key_values
        cache.batch_repeat_interleave(group)
        model(ids[:, :new], past_key_values=cache)

    @torch.no_grad()
    def decode() -> None:
        model.generate(ids, do_sample=False, max_new_tokens=new, min_new_tokens=new)

    assert counted(shared) == pytest.approx(predicted["teacher"], rel=0.02)
    assert counted(decode) == pytest.approx(predicted["generation"], rel=0.06)


def test_flops_of_the_vision_tower_are_those_counted() -> None:
    shape = VisionShape(hidden=64, layers=3, intermediate=160, output=96, taps=1, positions=64)
    text = {**SMALL, "hidden_size": 96, "vocab_size": 32}
    sizes = dataclasses.replace(shape_of(Qwen3Config(**text)), vision=shape)
    with torch.device("cpu"):
        config = sized(sizes).config
        config.vision_config._attn_implementation = "eager"
        config.vision_config.num_position_embeddings = 64
        tower = Qwen3VLForConditionalGeneration(config).model.visual
    tokens = 16
    grid = torch.tensor([[1, 8, 8]])
    patches = torch.randn(4 * tokens, shape.patch_values)
    with torch.no_grad():
        assert counted(lambda: tower(patches, grid_thw=grid)) == pytest.approx(
            shape.forward_flops(tokens), rel=0.02
        )
