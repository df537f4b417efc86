"""Presets: model, task and sizes of a run. A run is a preset, a method, a seed, and overrides."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import torch

from rlsd_lib.experiment.batches import shared_batch, split_rollouts
from rlsd_lib.experiment.controls import check_control, control_overrides
from rlsd_lib.experiment.paper_presets import PAPER, REAL_PRESETS, Preset
from rlsd_lib.methods import METHODS, PROMPT
from rlsd_lib.names import look_up
from rlsd_lib.trainer.config import RLSDConfig

LAB = {
    **PAPER,
    "per_device_train_batch_size": 64,
    "max_completion_length": 64,  # room for the longest chain and a quoted reference
    "learning_rate": 5e-5,
    "max_steps": 200,
    "gradient_checkpointing": False,
    # Its head is small, and GRPO's runs are TRL's to the bit.
    "completion_head": False,
    "bf16": False,
}

SMALL_LAB = {
    "digits": 1,
    "hidden_size": 64,
    "layers": 2,
    "steps": 500,
    "ramp_steps": 150,
    "hard_share": 0.5,
}
# A lab whose corpus was right everywhere: the external teacher of OPD.
EXPERT = {"hard_share": 0.0, "easy_rate": 0.0, "seed": 1}

# The paper trains OPSD and SDPO at ten times the learning rate of the others; OPD's is not
# reported, and as pure distillation it takes theirs. The weight of GRPO + OPSD is ours.
LAB_BY_METHOD = {
    **{
        name: {"learning_rate": 10 * LAB["learning_rate"]}
        for name in ("opd", "opsd", "opsd_teacher_top1", "opsd_student_top1", "sdpo")
    },
    "grpo_opsd": {"distillation_weight": 0.1},
}
# SDPO compares the 100 likeliest tokens; the lab's vocabulary has fewer.
LAB_BY_METHOD["sdpo"]["distillation_mode"] = "full_logits"

LAB_PRESET: dict[str, Any] = {
    "model": "lab",
    "teacher_model": "lab",
    "teacher_options": EXPERT,
    "task": "arithmetic",
    "training": LAB,
    "by_method": LAB_BY_METHOD,
    "train_size": 4000,
    "test_size": 250,
    "num_samples": 4,
    "save_model": True,
}

IDENTITY = ("method", "seed", "max_steps", "output_dir")
# What a run may change of its preset beside `RLSDConfig` fields: a local copy of the model, the
# folder of the data, sizes. Options are merged, everything else is replaced.
OF_PRESET = (
    "model",
    "model_options",
    "teacher_model",
    "teacher_options",
    "task_options",
    "train_size",
    "test_size",
    "num_samples",
    "evaluation_batch_size",
    "max_prompt_length",
    "rollouts_per_step",
    "lora",
)

_PLAIN = (bool, int, float, str, list, dict, Mapping, NoneType)

PRESETS: dict[str, Preset] = {
    "smoke": Preset(
        "a lab of one digit, two steps: does everything run?",
        model="lab",
        model_options=SMALL_LAB,
        teacher_model="lab",
        teacher_options={**SMALL_LAB, "hard_share": 0.0, "easy_rate": 0.0, "seed": 1},
        task="arithmetic",
        task_options={"digits": 1},
        training={
            **LAB,
            "per_device_train_batch_size": 16,
            "num_generations": 8,
            "max_completion_length": 32,
            "max_steps": 2,
        },
        by_method=LAB_BY_METHOD,
        train_size=40,
        test_size=8,
        num_samples=2,
        save_model=True,
    ),
    "lab": Preset("three-digit column addition, 0.4 M parameters: minutes on a CPU", **LAB_PRESET),
    "lab-bare": Preset(
        "the lab without filler words: every uncertain token bears on the answer",
        **{**LAB_PRESET, "model_options": {"nuisance": 0.0}},
    ),
    "lab-trace": Preset(
        "the lab with a whole right chain as the reference, where `lab` gives the answer alone",
        **{**LAB_PRESET, "task_options": {"reference": "trace"}},
    ),
    "smollm2": Preset(
        "SmolLM2-135M-Instruct adds two digits: a real model, on a CPU or a GPU",
        model="smollm2",
        task="chain_sum",
        task_options={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        training={
            **PAPER,
            "per_device_train_batch_size": 32,
            "max_completion_length": 32,
            "learning_rate": 5e-6,
            "max_steps": 20,
            "gradient_checkpointing": False,
            "save_strategy": "no",
        },
        by_method={"grpo_opsd": {"distillation_weight": 0.1}},
        # There are only about 200 questions of this kind.
        train_size=100,
        test_size=24,
        num_samples=8,
    ),
    "smoke-vl": Preset(
        "the paper's path at toy size: a tiny Qwen3-VL sees coloured squares, two steps",
        model="toy-vlm",
        sees_images=True,
        teacher_model="toy-vlm",
        teacher_options={"seed": 1},
        task="colours",
        task_options={"reward": "weighted"},
        task_by_method={"opsd": {"privileged": "trace"}},
        training={
            **PAPER,
            "per_device_train_batch_size": 8,
            "max_completion_length": 6,
            "max_teacher_prompt_length": 768,
            "learning_rate": 1e-3,
            "max_steps": 2,
            "gradient_checkpointing": False,
            "bf16": False,
        },
        by_method={"grpo_opsd": {"distillation_weight": 0.1}},
        train_size=-1,
        test_size=8,
        num_samples=2,
        max_prompt_length=512,
        rollouts_per_step=32,
    ),
    **REAL_PRESETS,
}


def resolve_preset(name: str, overrides: Mapping[str, Any]) -> tuple[Preset, dict[str, Any]]:
    """The preset with its part of `overrides` (`OF_PRESET`), and the overrides that are left.

    Raises:
        ValueError: for an unknown preset or override, naming the nearest valid one.
        TypeError: for an override of another type than its field's.
    """
    preset = PRESETS[look_up(name, PRESETS, "preset")]
    known = override_types()
    for key, value in overrides.items():
        look_up(key, known, "override")
        if key in IDENTITY:
            raise ValueError(
                f"overrides may not set {key!r}: it is a parameter of the run itself, by which its "
                "directory and tables name it."
            )
        _check_type(key, value, known[key])
    changes = {key: value for key, value in overrides.items() if key in OF_PRESET}
    merged = {
        key: {**getattr(preset, key), **value} if isinstance(value, Mapping) else value
        for key, value in changes.items()
    }
    return replace(preset, **merged), {k: v for k, v in overrides.items() if k not in changes}


def override_types() -> dict[str, Any]:
    """The annotation of every name that `overrides` may hold."""
    of_preset = {f.name: f.type for f in fields(Preset) if f.name in OF_PRESET}
    return {f.name: f.type for f in fields(RLSDConfig) if f.init} | of_preset


def _check_type(name: str, value: Any, annotation: Any) -> None:
    """Refuse what a field cannot hold: comparing or counting it would fail with no name in sight."""
    union = get_origin(annotation) in (Union, UnionType)
    types = [get_origin(t) or t for t in (get_args(annotation) if union else (annotation,))]
    if not set(types) <= set(_PLAIN):
        return  # an enum or the like, which the field itself converts
    fitting = (*types, int) if float in types else tuple(types)
    if not isinstance(value, fitting) or (isinstance(value, bool) and bool not in types):
        names = {Mapping: "dict", NoneType: "None"}
        wanted = " or ".join(names.get(kind, kind.__name__) for kind in types)
        raise TypeError(f"overrides: {name}={value!r} is {type(value).__name__}, expected {wanted}")


def resolve_config(
    method: str,
    preset: str,
    seed: int,
    output_dir: Path,
    *,
    template: str | None = None,
    max_steps: int = -1,
    overrides: Mapping[str, Any] | None = None,
    num_processes: int = 1,
) -> RLSDConfig:
    """The full configuration of a run: preset, then the task's template, then overrides.

    Batch sizes are those of one process; `num_processes` of them share the same batch.

    Raises:
        ValueError: for an unknown method, preset or override, naming the nearest valid one, or a
            batch that the processes cannot share.
    """
    look_up(method, METHODS, "method")
    chosen, overrides = resolve_preset(preset, overrides or {})
    if METHODS[method].teacher_sees == PROMPT and not chosen.teacher_model:
        raise ValueError(
            f"method={method!r} needs a preset with a teacher_model; {preset!r} has none."
        )
    on_gpu = torch.cuda.is_available()
    settings: dict[str, Any] = {
        "output_dir": str(output_dir),
        "method": method,
        "seed": seed,
        "use_cpu": not on_gpu,
        "bf16": on_gpu,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        # Of the task's rewards: accuracy counts, the leak rate is only logged.
        "reward_weights": [1.0, 0.0],
        "save_strategy": "steps",
        "save_steps": 50,
        "save_total_limit": 1,
        **chosen.training,
        **chosen.by_method.get(method, {}),
    }
    if template is not None:
        settings["privileged_template"] = template
    if max_steps > 0:
        settings["max_steps"] = max_steps
    settings |= overrides
    share = (
        split_rollouts(chosen, settings, num_processes)
        if chosen.rollouts_per_step
        else shared_batch(settings, num_processes)
    )
    return RLSDConfig(**{**settings, **share})


def resolve_parameters(
    parameters: Mapping[str, Any],
    output_dir: Path,
    template: str | None = None,
    num_processes: int = 1,
) -> RLSDConfig:
    """`resolve_config` for the parameters of a run, what its control sets included.

    Raises:
        ValueError: as `resolve_config`, and for an unknown control or one that changes nothing.
    """
    check_control(parameters["control"], parameters["method"])
    return resolve_config(
        parameters["method"],
        parameters["preset"],
        parameters["seed"],
        output_dir,
        template=template,
        max_steps=parameters["max_steps"],
        overrides={**control_overrides(parameters["control"]), **parameters["overrides"]},
        num_processes=num_processes,
    )
