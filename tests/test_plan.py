"""The planner's arithmetic against real tensors, counted FLOPs, and a measured step."""

import collections
import dataclasses
import statistics
import time
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

from rlsd_lib import RLSDConfig
from rlsd_lib.__main__ import main
from rlsd_lib.budget import GIB, Setting, memory
from rlsd_lib.cost import Speed, flops
from rlsd_lib.plan import CHANGES, advice, describe, faster, make_plan, setting_of
from rlsd_lib.shapes import SHAPES, ModelShape, VisionShape, shape_of

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "attn_implementation": "eager",  # a kernel for CPUs that torch's FLOP counter passes over
}
PAPER = Setting(
    shape=SHAPES["Qwen/Qwen3-VL-8B-Instruct"],
    gpus=8,
    prompt_length=4096,
    max_completion_length=4096,
    rollouts=2048,
    image_tokens=1024,
    sharding="fsdp2",
    use_vllm=True,
    vllm_enable_sleep_mode=True,
    vllm_gpu_memory_utilization=0.4,
)


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
    setting = dataclasses.replace(
        PAPER, shape=shape, gpus=1, sharding="ddp", image_tokens=0, lora_rank=8 if lora else 0
    )
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
    predicted = flops(setting, teacher=True, head_tokens=prompt + new - 1)

    def forward(length: int) -> torch.Tensor:
        ids = torch.randint(0, 2048, (rows, length))
        return model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.sum()

    loss: list[torch.Tensor] = []
    assert counted(lambda: loss.append(forward(prompt + new))) == pytest.approx(
        predicted["policy forward"], rel=0.02
    )
    # TRL adds the head's two gradients up in place (`addmm_`), which torch's counter passes over.
    unseen = 2 * setting.shape.head_flops(rows * (prompt + new - 1))
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


# Plans


def test_the_papers_setting_fits_sharded_and_not_on_one_gpu() -> None:
    plan = make_plan(PAPER, gpu_memory=80)
    assert plan.fits
    assert 1.0 < plan.ratio < 1.25
    alone = make_plan(dataclasses.replace(PAPER, gpus=1, sharding="ddp"), gpu_memory=80)
    assert not alone.fits
    assert "does NOT fit" in describe(alone, "alone")


def test_rlsd_costs_one_teacher_pass_more_and_nothing_else() -> None:
    plan = make_plan(PAPER, gpu_memory=80)
    grpo, rlsd = plan.cost("grpo"), plan.cost("rlsd")
    extra = {part: rlsd.seconds[part] for part in rlsd.seconds.keys() - grpo.seconds.keys()}
    assert set(extra) == {"teacher"}
    assert rlsd.total - grpo.total == pytest.approx(extra["teacher"])
    assert plan.memory("grpo").kept == {
        part: value for part, value in plan.memory("rlsd").kept.items() if part != "teacher"
    }


def test_a_shared_pass_computes_each_prompt_once() -> None:
    """At the setting of the prefix measurements the floor in tokens is 3.3."""
    setting = dataclasses.replace(
        PAPER, gpus=1, sharding="ddp", prompt_length=1024, max_completion_length=256,
        image_tokens=0, privileged_length=0, num_generations=8, rollouts=8,
    )  # fmt: skip
    plain, shared = (
        flops(dataclasses.replace(setting, teacher_pass=kind), teacher=True)["teacher"]
        for kind in ("plain", "shared")
    )
    assert 2.5 < plain / shared < 4
    assert setting.shares_prompts
    assert not dataclasses.replace(setting, num_generations=1).shares_prompts
    assert not dataclasses.replace(setting, sharding="fsdp2").shares_prompts


@pytest.mark.parametrize(
    ("changes", "method", "frees"),
    [
        ({"teacher_offload": True}, "rlsd", "teacher"),
        ({"vllm_enable_sleep_mode": True}, "grpo", "vLLM"),
        ({"teacher_model_kind": "live"}, "rlsd", "teacher"),
    ],
)
def test_what_is_put_away_does_not_stay(changes: dict, method: str, frees: str) -> None:
    before = dataclasses.replace(PAPER, vllm_enable_sleep_mode=False)
    kept = [
        make_plan(setting, gpu_memory=80).memory(method).kept
        for setting in (before, dataclasses.replace(before, **changes))
    ]
    assert frees in kept[0]
    assert frees not in kept[1]


def test_advice_is_followed_until_it_fits_and_each_step_saves() -> None:
    tight = dataclasses.replace(
        PAPER, sharding="ddp", vllm_enable_sleep_mode=False, gradient_checkpointing=False
    )
    plan = make_plan(tight, gpu_memory=80)
    steps = list(advice(plan))
    assert steps[-1][1].fits
    assert not any(changed.fits for _, changed in steps[:-1])
    peaks = [plan.memory("rlsd").peak, *(p.memory("rlsd").peak for _, p in steps)]
    assert peaks == sorted(peaks, reverse=True)
    text = describe(plan, "tight")
    assert "vllm_enable_sleep_mode=True" in text
    assert "sharding=fsdp2" in text


def test_advice_admits_when_nothing_suffices() -> None:
    plan = make_plan(dataclasses.replace(PAPER, gpus=1, sharding="ddp"), gpu_memory=8)
    assert "these changes do not suffice" in describe(plan, "tiny GPU")
    assert len(list(advice(plan))) <= len(CHANGES)


def test_a_share_for_vllm_without_room_for_one_rollout_does_not_fit() -> None:
    plan = make_plan(dataclasses.replace(PAPER, vllm_gpu_memory_utilization=0.2), gpu_memory=80)
    assert plan.at_once < 1
    assert not plan.fits
    assert "not one rollout of 8192 tokens" in describe(plan, "no room")


def test_more_room_for_vllm_is_proposed_where_it_saves_time() -> None:
    plan = make_plan(PAPER, gpu_memory=80)
    quicker = faster(plan)
    assert quicker.fits
    assert quicker.cost("rlsd").total < 0.9 * plan.cost("rlsd").total
    assert faster(quicker) is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"gpus": 0}, "gpus=0: expected a whole number >= 1"),
        ({"sharding": "fsdp3"}, "sharding='fsdp3': expected ddp, fsdp2, zero3"),
        ({"rollouts": 2047}, "rollouts=2047 per step do not divide among 8 GPUs"),
        ({"num_generations": 7}, "rollouts=2048 are not a multiple of num_generations=7"),
        ({"vllm_gpu_memory_utilization": 1.5}, "expected a share in (0, 1)"),
        ({"image_tokens": 5000}, "image_tokens=5000 leave no room"),
        ({"dtype": "int8"}, "dtype='int8': expected float32, bfloat16"),
        ({"lora_rank": -1}, "lora_rank=-1: expected a number >= 0"),
        ({"teacher_pass": "shared"}, "teacher_pass='shared' with sharding='fsdp2'"),
    ],
)
def test_bad_settings_are_refused(changes: dict, expected: str) -> None:
    with pytest.raises(ValueError) as error:
        dataclasses.replace(PAPER, **changes)
    assert expected in str(error.value)


def test_bad_speeds_and_memories_are_refused() -> None:
    with pytest.raises(ValueError, match="mfu=40: expected a share"):
        Speed(mfu=40)
    with pytest.raises(ValueError, match="gpu_memory=0: expected GiB"):
        make_plan(PAPER, gpu_memory=0)
    with pytest.raises(ValueError, match="model_type='gpt2'"):
        shape_of(_Gpt2())


class _Gpt2:
    model_type = "gpt2"

    def get_text_config(self) -> "_Gpt2":
        return self


def test_a_preset_says_what_it_can_and_the_command_line_the_rest() -> None:
    preset = {
        "training": {"per_device_train_batch_size": 2, "max_completion_length": 4096},
        "model_options": {"dtype": "bfloat16"},
        "lora": {"r": 32},
        "max_prompt_length": 4096,
        "rollouts_per_step": 2048,
        "sees_images": True,
    }
    setting = setting_of(preset, shape=PAPER.shape, gpus=8, changes={"lora_rank": 16})
    assert (setting.dtype, setting.lora_rank, setting.image_tokens) == ("bfloat16", 16, 1024)
    assert (setting.prompt_length, setting.rollouts) == (4096, 2048)
    with pytest.raises(ValueError, match="how long a prompt is"):
        setting_of({**preset, "max_prompt_length": 0}, shape=PAPER.shape, gpus=8, changes={})


def test_the_command_prints_a_plan_and_names_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--preset", "smollm2", "--gpu-memory", "24"]
    assert main([*command, "-p", "prompt_length=64"]) == 0
    said = capsys.readouterr().out
    assert "0.13 B parameters" in said
    assert "RLSD fits: peak" in said
    assert "RLSD / GRPO: 1.0" in said
    for words, expected in (
        ([*command], "how long a prompt is"),
        ([*command, "-p", "mfv=0.3"], "Did you mean 'mfu'"),
        (["plan", "--preset", "lab"], "No sizes are known for model 'lab'"),
        ([*command, "-p", "prompt_length=0"], "prompt_length=0: expected"),
    ):
        assert main(words) == 2
        assert expected in capsys.readouterr().err


# Time


@pytest.mark.slow
def test_the_cost_ratio_is_that_of_measured_steps(tmp_path: Path) -> None:
    """FLOPs predict RLSD's step over GRPO's, generation aside, which one core decodes slowly."""
    prompt, new, rows = 128, 32, 8
    seconds = collections.defaultdict(list)
    for method in ("grpo", "rlsd"):
        trainer = _timed(tmp_path, method, prompt, new, rows, seconds[method])
        trainer.train()
    setting = Setting(
        shape=shape_of(trainer.model.config),
        gpus=1,
        prompt_length=prompt,
        max_completion_length=new,
        rollouts=rows,
        privileged_length=len(REFERENCE) + 1,
        gradient_checkpointing=False,
        teacher_pass="plain",
    )
    grpo, rlsd = (
        sum(v for k, v in flops(setting, teacher=t, head_tokens=prompt + new - 1).items()
            if k != "generation")
        for t in (False, True)
    )  # fmt: skip
    measured = statistics.median(seconds["rlsd"][1:]) / statistics.median(seconds["grpo"][1:])
    assert measured == pytest.approx(rlsd / grpo, rel=0.2)


REFERENCE = "9" * 40
PLAIN = {"teacher_pass": "plain"} if "teacher_pass" in RLSDConfig.__dataclass_fields__ else {}


def _timed(folder: Path, method: str, prompt: int, new: int, rows: int, into: list[float]) -> Any:
    """A trainer of full-length rollouts that appends its CPU seconds per step, without generation."""
    texts = [(f"{i:02d}" + "7" * prompt)[: prompt - 3] for i in range(32)]
    data = tiny.dataset(
        prompt=[[{"role": "user", "content": text}] for text in texts],
        privileged_context=[REFERENCE] * 32,
    )
    trainer = tiny.trainer(
        folder / method,
        tiny.model(**SMALL),
        data,
        method=method,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        num_generations=rows,
        max_completion_length=new,
        max_steps=4,
        lambda_decay_steps=0,
        generation_kwargs={"min_new_tokens": new},
        **PLAIN,
    )
    generate, callback = trainer._generate_single_turn, trainer.callback_handler.callbacks[-1]
    spent = {"begun": 0.0, "generating": 0.0}

    def timed(*args: Any, **kwargs: Any) -> Any:
        begun = time.process_time()
        result = generate(*args, **kwargs)
        spent["generating"] = time.process_time() - begun
        return result

    def begin(*_: Any, **__: Any) -> None:
        spent["begun"] = time.process_time()

    def end(*_: Any, **__: Any) -> None:
        into.append(time.process_time() - spent["begun"] - spent["generating"])

    trainer._generate_single_turn = timed
    callback.on_step_begin, callback.on_step_end = begin, end
    return trainer
