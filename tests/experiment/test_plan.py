"""Plans: what fits, what it costs, what to change; and the cost ratio of measured steps."""

import collections
import dataclasses
import logging
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from test_shapes import SMALL

from rlsd_lib.__main__ import main
from rlsd_lib.experiment.cost.budget import Setting
from rlsd_lib.experiment.cost.plan import CHANGES, advice, describe, faster, make_plan, setting_of
from rlsd_lib.experiment.cost.shapes import SHAPES, shape_of
from rlsd_lib.experiment.cost.step import Speed, flops

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
        sum(v for k, v in flops(setting, teacher=t).items() if k != "generation")
        for t in (False, True)
    )
    measured = statistics.median(seconds["rlsd"][1:]) / statistics.median(seconds["grpo"][1:])
    said = f"RLSD / GRPO, generation aside: {rlsd / grpo:.3f} by the plan, {measured:.3f} measured"
    logging.getLogger(__name__).info(said)
    assert measured == pytest.approx(rlsd / grpo, rel=0.2)


REFERENCE = "9" * 40


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
        teacher_pass="plain",
        completion_head=True,
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
