"""The presets of real size say what the paper says, for any number of processes."""

from pathlib import Path
from typing import Any

import pytest

from rlsd_lib.experiment.paper_presets import REAL_PRESETS
from rlsd_lib.experiment.presets import (
    OF_PRESET,
    PRESETS,
    RunParameters,
    resolve_preset,
    shared_batch,
)
from rlsd_lib.methods import METHODS
from rlsd_lib.trainer.config import RLSDConfig


def resolved(preset: str, method: str = "rlsd", processes: int = 1, **given: Any) -> RLSDConfig:
    return RunParameters(method, preset, **given).resolve(processes=processes).config


def test_the_paper_as_printed() -> None:
    config, preset = resolved("qwen3-vl-8b", processes=32), PRESETS["qwen3-vl-8b"]
    printed = {
        "learning_rate": 1e-6, "max_steps": 200, "num_generations": 8, "temperature": 1.0,
        "max_completion_length": 4096, "epsilon": 0.2, "epsilon_high": 0.28, "beta": 0.0,
        "weight_decay": 0.01, "max_grad_norm": 1.0, "lambda_init": 0.5, "lambda_decay_steps": 50,
        "epsilon_w": 0.2, "teacher_model_kind": "snapshot", "teacher_sync_steps": 10,
        "warmup_steps": 0, "top_p": 1.0, "num_iterations": 1, "loss_type": "dapo",
    }  # fmt: skip
    assert {name: getattr(config, name) for name in printed} == printed
    assert preset.max_prompt_length == 4096
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps * 32 == 256 * 8
    # One optimiser step per rollout batch: nothing is off-policy.
    assert config.steps_per_generation == config.gradient_accumulation_steps
    assert preset.model == "Qwen/Qwen3-VL-8B-Instruct"
    assert not preset.lora
    for method in ("opsd", "opsd_teacher_top1", "opsd_student_top1", "sdpo"):
        assert resolved("qwen3-vl-8b", method).learning_rate == 1e-5
    with pytest.raises(ValueError, match="distillation_weight"):
        resolved("qwen3-vl-8b", "grpo_opsd")


def test_the_differences_of_the_script_are_all_there_is() -> None:
    printed, script = (REAL_PRESETS[name] for name in ("qwen3-vl-8b", "qwen3-vl-8b-script"))
    changed = {"lambda_decay_steps": 60, "teacher_sync_steps": 20, "delta": 3.0}
    assert script == printed | {
        "summary": script["summary"],
        "training": printed["training"] | changed,
        "task_options": {"reward": "weighted"},
    }


def test_what_a_run_is_comes_out_of_its_manifest_or_notebook() -> None:
    given = {"method": "rlsd", "preset": "lab", "overrides": {"epsilon_w": 0.5}, "seed": 3}
    run = RunParameters.of({**given, "max_steps": None, "benchmarks": ["MMMU"]})
    assert run == RunParameters(**given)
    assert (run.max_steps, run.control, run.num_processes, run.run_dir) == (-1, "none", 1, "")
    assert (run.resolve().config.seed, run.resolve().config.epsilon_w) == (3, 0.5)


@pytest.mark.parametrize("preset", ["smoke-vl", *REAL_PRESETS])
def test_every_method_resolves_or_says_what_it_needs(preset: str) -> None:
    for method in METHODS:
        if method == "grpo_opsd" and preset in REAL_PRESETS:
            overrides = {"distillation_weight": 0.1}
        else:
            overrides = {}
        if method == "opd" and preset in REAL_PRESETS:
            with pytest.raises(ValueError, match="teacher_model"):
                resolved(preset, method)
        else:
            config = resolved(preset, method, overrides=overrides)
            room = config.max_teacher_prompt_length
            if room and PRESETS[preset].task_by_method.get(method):
                assert room >= PRESETS[preset].max_prompt_length


def test_a_run_may_change_its_model_data_and_sizes() -> None:
    overrides = {"model": "/a/copy", "task_options": {"source": "/rows"}, "learning_rate": 2e-6}
    preset, rest = resolve_preset("qwen3-vl-8b", overrides)
    assert preset.model == "/a/copy"
    assert preset.task_options == {"reward": "binary", "source": "/rows"}
    assert rest == {"learning_rate": 2e-6}
    assert PRESETS["qwen3-vl-8b"].model == "Qwen/Qwen3-VL-8B-Instruct"
    assert resolved("qwen3-vl-8b", overrides=overrides).learning_rate == 2e-6
    assert all(hasattr(preset, name) for name in OF_PRESET)
    with pytest.raises(ValueError, match="Did you mean 'task_options'"):
        resolve_preset("qwen3-vl-8b", {"task_option": {}})


def test_an_override_of_another_type_is_named() -> None:
    for overrides, said in (
        ({"epsilon_w": "0.5"}, "epsilon_w='0.5' is str, expected float"),
        ({"epsilon_w": True}, "epsilon_w=True is bool, expected float"),
        ({"use_vllm": "yes"}, "use_vllm='yes' is str, expected bool"),
        ({"distillation_topk": "5"}, "expected int or None"),
        ({"task_options": "rows"}, "task_options='rows' is str, expected dict"),
        ({"test_size": "4"}, "test_size='4' is str, expected int"),
    ):
        with pytest.raises(TypeError, match=said):
            resolve_preset("lab", overrides)


def test_overrides_of_every_kind_are_taken() -> None:
    given = {"epsilon_w": 1, "optim": "sgd", "reward_weights": [1.0, 0.0], "report_to": "none"}
    given |= {"distillation_weight": None, "save_steps": 5, "lr_scheduler_kwargs": {}}
    assert resolve_preset("lab", given)[1] == given


def test_a_tracker_gets_the_name_of_the_run(tmp_path: Path) -> None:
    parameters = RunParameters("rlsd", "lab", overrides={"report_to": "trackio"})
    config = parameters.resolve(tmp_path / "rlsd-lab-s0" / "checkpoints").config
    assert (config.report_to, config.run_name) == (["trackio"], "rlsd-lab-s0")
    with pytest.raises(ValueError, match="Unknown override 'privileged_column'"):
        resolve_preset("lab", {"privileged_column": "answer"})


def test_an_unknown_override_names_a_few_of_the_many() -> None:
    with pytest.raises(ValueError, match=r"'lambda_inti'\. Did you mean 'lambda_init'") as error:
        resolve_preset("lab", {"lambda_inti": 1.0})
    assert len(str(error.value)) < 200
    with pytest.raises(ValueError, match=r"Unknown override 'foo'\. None of the \d+ valid names"):
        resolve_preset("lab", {"foo": 1.0})
    with pytest.raises(ValueError, match=r"Unknown method 'xyz'\. Valid: grpo, rlsd"):
        resolved("lab", "xyz")


def test_adapters_train_at_ten_times_the_rate() -> None:
    for method in ("rlsd", "opsd"):
        rates = [resolved(p, method).learning_rate for p in ("qwen3-text-full", "qwen3-text")]
        assert rates[1] == pytest.approx(10 * rates[0])
    assert PRESETS["qwen3-text"].lora["lora_dropout"] == 0.0  # else noise in the gap


ROWS, ACCUMULATION, STEPS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
)


def test_processes_share_the_batch_of_one() -> None:
    for settings, count, expected in (
        ({ROWS: 64}, 4, {ROWS: 16, ACCUMULATION: 1}),
        ({ROWS: 1, ACCUMULATION: 256}, 8, {ROWS: 1, ACCUMULATION: 32}),
        ({ROWS: 4, ACCUMULATION: 6}, 8, {ROWS: 1, ACCUMULATION: 3}),
        ({ROWS: 4, ACCUMULATION: 6, STEPS: 12}, 8, {ROWS: 1, ACCUMULATION: 3, STEPS: 6}),
        ({ROWS: 2, ACCUMULATION: 1024}, 8, {ROWS: 2, ACCUMULATION: 128}),
        ({}, 1, {ROWS: 8, ACCUMULATION: 1}),
    ):
        shared = shared_batch(settings, count)
        assert shared == expected, (settings, count)
        whole = settings.get(ROWS, 8) * settings.get(ACCUMULATION, 1)
        assert shared[ROWS] * shared[ACCUMULATION] * count == whole, (settings, count)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    for settings, count in (
        ({ROWS: 64}, 3),
        ({ROWS: 64}, 0),
        ({ROWS: 2, ACCUMULATION: 2}, 8),
        ({ROWS: 1, ACCUMULATION: 4, STEPS: 2}, 4),
        ({ROWS: 1, ACCUMULATION: 4, "generation_batch_size": 2}, 4),
    ):
        said = f"num_processes={count} does not divide .*{ROWS}={settings[ROWS]}, {ACCUMULATION}="
        with pytest.raises(ValueError, match=said):
            shared_batch(settings, count)
