"""Plans: sizes against real tensors, FLOPs against torch's counter; what fits."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, Qwen3Config, Qwen3ForCausalLM
from trl.trainer.utils import add_fused_lm_head

from rlsd_lib.__main__ import main
from rlsd_lib.experiment.bench import Sizes, race
from rlsd_lib.experiment.plan import (
    ALWAYS,
    GIB,
    ModelShape,
    Plan,
    describe,
    plan_of,
    shape_of,
)
from rlsd_lib.experiment.presets import Preset
from rlsd_lib.tasks.models import SHAPES, config_named
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


def shape_named(model: str) -> ModelShape:
    return shape_of(config_named(model))


PAPER = Plan(
    shape=shape_named("Qwen/Qwen3-VL-8B-Instruct"),
    gpus=8,
    prompt_length=4096,
    max_completion_length=4096,
    rollouts=2048,
    sharding="fsdp2",
    use_vllm=True,
    vllm_enable_sleep_mode=True,
    vllm_gpu_memory_utilization=0.4,
)


def small(vocabulary: int, **changes: Any) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**{**SMALL, **changes}, vocab_size=vocabulary))


def numbers(tensors: Any) -> int:
    return sum(tensor.numel() for tensor in tensors)


def counted(run: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


# Sizes


def test_shipped_sizes_have_not_drifted() -> None:
    """Counts of the hand-kept table that shapes.json replaces; not looked up on the hub."""
    before = {
        "synthetic": 4_197_888,
        "smollm2": 134_515_008,
        "Qwen/Qwen3-0.6B": 596_049_920,
        "Qwen/Qwen3-1.7B": 1_720_574_976,
        "Qwen/Qwen3-4B": 4_022_468_096,
        "Qwen/Qwen3-8B": 8_190_735_360,
        "Qwen/Qwen3-VL-4B-Instruct": 4_437_815_808,
        "Qwen/Qwen3-VL-8B-Instruct": 8_767_123_696,
    }
    assert {name: shape_named(name).parameters for name in SHAPES} == before
    assert PAPER.shape.ends == 2 * 151936 * 4096
    assert shape_named("Qwen/Qwen3-4B").ends == 151936 * 2560  # tied


@pytest.mark.parametrize("lora", [False, True])
def test_weights_optimiser_and_teacher_weigh_what_is_predicted(tmp_path: Path, lora: bool) -> None:
    student: Any = tiny.model(**SMALL)
    shape = shape_of(student.config)
    if lora:
        student = get_peft_model(student, LoraConfig(r=8, target_modules="all-linear"))
    trainer = tiny.trainer(tmp_path, student, max_steps=1)
    trainer.train()
    predicted = Plan(shape, 1, 64, 8, rollouts=8, lora_rank=8 if lora else 0).memory()[ALWAYS]
    states = trainer.optimizer.state.values()
    pairs = trainer.teacher._parameter_pairs(trainer.model)
    actual = {
        "weights": [p for n, p in trainer.model.named_parameters() if ".teacher." not in n],
        "optimiser": [value for s in states for value in s.values() if value.dim() > 0],
        "teacher": [teacher for teacher, _ in pairs],
    }
    for part, tensors in actual.items():
        assert predicted[part] * GIB == pytest.approx(4 * numbers(tensors), rel=1e-6), part


@pytest.mark.parametrize(
    ("dtype", "autocast", "residual"), [(torch.float32, True, 4), (torch.bfloat16, False, 2)]
)
def test_activations_are_what_autograd_keeps(dtype, autocast, residual) -> None:
    rows, length = 2, 96
    kept = []
    for layers in (1, 3):
        model = small(64, attn_implementation="sdpa", num_hidden_layers=layers).to(dtype).train()
        kept.append(_kept_by_autograd(model, rows, length, autocast))
    shape = shape_of(model.config)
    predicted = shape.layer_activations(rows, length, residual=residual)
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


def test_flops_are_those_that_torch_counts() -> None:
    """Forward, backward and teacher pass through TRL's fused head, within two percent."""
    prompt, new, rows, more = 96, 48, 4, 24
    model = small(2048)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    plan = Plan(
        shape_of(model.config), 1, prompt, new, rows, num_generations=1,
        privileged_length=more, gradient_checkpointing=False,
    )  # fmt: skip
    assert not plan.shares_prompts
    predicted = plan.flops()

    def forward(length: int) -> torch.Tensor:
        ids = torch.randint(0, 2048, (rows, length))
        scored = completions_only(model, new)(input_ids=ids, labels=ids, fused_lm_head=True)
        return scored.log_probs.sum()

    loss: list[torch.Tensor] = []
    assert counted(lambda: loss.append(forward(prompt + new))) == pytest.approx(
        predicted["policy forward"], rel=0.02
    )
    # TRL adds the head's two gradients up in place (`addmm_`), which torch's counter passes over.
    unseen = 2 * plan.shape.head_flops(rows * new)
    backward = counted(loss[0].backward) + unseen
    assert backward == pytest.approx(predicted["policy backward"], rel=0.02)
    with torch.no_grad():
        assert counted(lambda: forward(prompt + more + new)) == pytest.approx(
            predicted["teacher"], rel=0.02
        )


def test_flops_of_decoding_and_of_a_shared_prompt_are_those_counted() -> None:
    """The KV cache of the prompt first, then tokens one by one, or all at once (shared)."""
    prompt, new, group = 64, 16, 4
    model = small(512).eval()
    shape = shape_of(model.config)
    plan = Plan(shape, 1, prompt, new, group, num_generations=group, privileged_length=0)
    assert plan.shares_prompts
    predicted = plan.flops()
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


# Plans


def test_the_papers_setting_fits_sharded_and_not_on_one_gpu() -> None:
    assert PAPER.fits
    assert 1.0 < PAPER.step() / PAPER.grpo.step() < 1.25
    alone = dataclasses.replace(PAPER, gpus=1, sharding="ddp")
    assert not alone.fits
    assert "does NOT fit" in (said := describe(alone, "alone"))
    assert max(map(len, said.splitlines())) <= 80, "wider than a terminal"


def test_rlsd_costs_one_teacher_pass_more_and_nothing_else() -> None:
    grpo, rlsd = PAPER.grpo.seconds(), PAPER.seconds()
    assert rlsd.keys() - grpo.keys() == {"teacher"}
    assert PAPER.step() - PAPER.grpo.step() == pytest.approx(rlsd["teacher"])
    kept = {part: gib for part, gib in PAPER.memory()[ALWAYS].items() if part != "teacher"}
    assert PAPER.grpo.memory() == PAPER.memory() | {ALWAYS: kept}


def test_a_shared_pass_computes_each_prompt_once() -> None:
    """At the setting of the prefix measurements the floor in tokens is 3.3."""
    plan = Plan(PAPER.shape, 1, 1024, 256, rollouts=8, privileged_length=0)
    apart = dataclasses.replace(plan, num_generations=1)
    assert plan.shares_prompts
    assert not apart.shares_prompts
    assert 2.5 < apart.flops()["teacher"] / plan.flops()["teacher"] < 4
    for change in ({"sharding": "fsdp2"}, {"sees_images": True}):
        assert not dataclasses.replace(plan, **change).shares_prompts, change


def test_what_is_put_away_does_not_stay() -> None:
    before = dataclasses.replace(PAPER, vllm_enable_sleep_mode=False)
    for change, frees in (
        ({"vllm_enable_sleep_mode": True}, "vLLM"),
        ({"teacher_model_kind": "live"}, "teacher"),
    ):
        after = dataclasses.replace(before, **change)
        kept = [plan.memory()[ALWAYS] for plan in (before, after)]
        assert frees in kept[0], change
        assert frees not in kept[1], change


def test_a_vllm_without_room_for_one_rollout_does_not_fit() -> None:
    cramped = dataclasses.replace(PAPER, vllm_gpu_memory_utilization=0.2)
    assert cramped.at_once < 1
    assert not cramped.fits
    assert "no room for one rollout of 8192 tokens" in describe(cramped, "no room")


def test_what_no_run_can_have_is_refused() -> None:
    for changes, expected in (
        ({"gpus": 0}, "gpus=0: expected a number > 0"),
        ({"lora_rank": -1}, "lora_rank=-1: expected a number >= 0"),
        ({"gpu_memory": 0}, "gpu_memory=0: expected a number > 0"),
        ({"sharding": "fsdp3"}, "sharding='fsdp3': expected ddp, fsdp2, zero3"),
        ({"dtype": "int8"}, "dtype='int8': expected float32, bfloat16"),
        ({"vllm_gpu_memory_utilization": 1.5}, "expected a share in (0, 1)"),
        ({"mfu": 40}, "mfu=40: expected a share in (0, 1)"),
    ):
        with pytest.raises(ValueError) as error:
            dataclasses.replace(PAPER, **changes)
        assert expected in str(error.value)
    for kind in ("gpt2", "qwen3_moe"):
        with pytest.raises(ValueError, match=f"model_type='{kind}': the planner knows"):
            shape_of(AutoConfig.for_model(kind, num_hidden_layers=1))


def test_a_preset_says_what_it_can_and_the_command_line_the_rest() -> None:
    preset = Preset(
        "images",
        model="Qwen/Qwen3-VL-8B-Instruct",
        task="colours",
        training={"per_device_train_batch_size": 2, "max_completion_length": 4096},
        model_options={"dtype": "bfloat16"},
        lora={"r": 32},
        max_prompt_length=4096,
        rollouts_per_step=2048,
        sees_images=True,
    )
    plan = plan_of(preset, gpus=8, lora_rank=16)
    assert (plan.dtype, plan.lora_rank) == ("bfloat16", 16)
    assert (plan.prompt_length, plan.rollouts, plan.sharding) == (4096, 2048, "ddp")
    assert plan.sees_images
    sharded = dataclasses.replace(preset, accelerate="fsdp2")
    assert plan_of(sharded, gpus=8).sharding == "fsdp2"
    with pytest.raises(ValueError, match="how long a prompt is"):
        plan_of(dataclasses.replace(preset, max_prompt_length=0), gpus=8)


def test_the_command_prints_a_plan_and_names_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--preset", "smollm2", "-p", "gpu_memory=24"]
    assert main([*command, "-p", "prompt_length=64"]) == 0
    said = capsys.readouterr().out
    assert "0.13 B parameters" in said
    assert "RLSD fits: peak" in said
    assert "of 24 GiB" in said
    assert "RLSD / GRPO: 1.0" in said
    assert "speeds: assumed" in said
    for words, expected in (
        ([*command], "how long a prompt is"),
        ([*command, "-p", "mfv=0.3"], "Did you mean 'mfu'"),
        (["plan", "--preset", "lab"], "No sizes are known for model 'lab'"),
        ([*command, "-p", "prompt_length=0"], "prompt_length=0: expected a number > 0"),
    ):
        assert main(words) == 2
        assert expected in capsys.readouterr().err


@pytest.mark.slow
def test_the_cost_ratio_is_that_of_measured_steps() -> None:
    """FLOPs predict RLSD's step over GRPO's, generation aside, which one core decodes slowly."""
    sizes = Sizes(prompt=128, completion=32, reference=41, vocabulary=1024)
    table = race(sizes.build, ["GRPO, completion head", "RLSD"], steps=3, rounds=3)
    plan = Plan(
        shape_of(sizes.config()), 1, sizes.prompt, sizes.completion, sizes.generations,
        privileged_length=sizes.reference, gradient_checkpointing=False,
    )  # fmt: skip
    grpo, rlsd = (
        sum(count for part, count in p.flops().items() if part != "generation")
        for p in (plan.grpo, plan)
    )
    measured = table["without generation, s"].iloc[2] / table["without generation, s"].iloc[1]
    said = f"RLSD / GRPO, generation aside: {rlsd / grpo:.3f} by the plan, {measured:.3f} measured"
    logging.getLogger(__name__).info(said)
    assert measured == pytest.approx(rlsd / grpo, rel=0.2)
