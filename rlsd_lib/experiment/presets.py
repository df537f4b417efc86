"""Presets: model, task and sizes of a run. A run is a preset, a method, a seed, and overrides."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch

from rlsd_lib.experiment.controls import PLAIN_TEMPLATE, check_control
from rlsd_lib.experiment.launch import accelerate_config
from rlsd_lib.experiment.paper_presets import DISTILLING, PAPER, REAL_PRESETS
from rlsd_lib.measure.rollouts import check_from_tasks
from rlsd_lib.methods import METHODS, PROMPT
from rlsd_lib.names import check_fields, look_up
from rlsd_lib.tasks import Task, load_task
from rlsd_lib.tasks.lab.model import LabRecipe
from rlsd_lib.trainer.config import RLSDConfig, check_type


@dataclass(frozen=True)
class Preset:
    """One row of the presets table."""

    summary: str
    model: str
    task: str
    training: Mapping[str, Any]  # fields of `RLSDConfig`
    by_method: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # where they differ
    model_options: Mapping[str, Any] = field(default_factory=dict)
    teacher_model: str = ""  # the external teacher of `opd`
    teacher_options: Mapping[str, Any] = field(default_factory=dict)
    task_options: Mapping[str, Any] = field(default_factory=dict)  # of `load_task`
    task_by_method: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    train_size: int = 2000
    test_size: int = 200
    num_samples: int = 4  # completions per held-out problem at temperature 1
    evaluation_batch_size: int = 64
    save_model: bool = False
    lab_per_seed: bool = False  # the run's seed pretrains a lab of its own: seeds are labs
    redraw: int = 0  # another one is the same lab with another order and sampling
    sees_images: bool = False
    lora: Mapping[str, Any] = field(default_factory=dict)  # fields of `peft.LoraConfig`
    max_prompt_length: int = 0  # tokens; longer prompts are left out of the data; 0: no limit
    rollouts_per_step: int = 0  # for any number of processes; 0: whatever `training` says
    processes: int = 1  # with `accelerate`, a shipped config, how it is meant to be launched
    accelerate: str = ""

    def load_task(self, method: str) -> Task:
        """The rows of a run of `method`, whatever its seed; ValueError as from `tasks.load_task`."""
        sizes = {"train_size": self.train_size, "test_size": self.test_size}
        options = {**self.task_options, **self.task_by_method.get(method, {})}
        return load_task(self.task, seed=0, **sizes, **options)


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

OUR_WEIGHT = {"grpo_opsd": {"distillation_weight": 0.1}}  # the paper does not report its own
# The paper trains OPSD and SDPO at ten times the learning rate of the others; OPD's is not
# reported, and as pure distillation it takes theirs.
FASTER = {"learning_rate": 10 * LAB["learning_rate"]}
# SDPO and SRPO compare the 100 likeliest tokens; the lab's vocabulary has fewer.
FULL_LOGITS = {"distillation_mode": "full_logits"}
LAB_BY_METHOD = {
    **dict.fromkeys(("opd", *DISTILLING), FASTER),
    "sdpo": {**FASTER, **FULL_LOGITS},
    "srpo": FULL_LOGITS,
    **OUR_WEIGHT,
}

# A lab whose corpus was right everywhere: the external teacher of OPD.
EXPERT = {"hard_share": 0.0, "easy_rate": 0.0, "seed": 1}

LAB_PRESET = Preset(
    "three-digit column addition, 0.4 M parameters: minutes on a CPU",
    model="lab",
    teacher_model="lab",
    teacher_options=EXPERT,
    task="arithmetic",
    training=LAB,
    by_method=LAB_BY_METHOD,
    train_size=4000,
    test_size=250,
    save_model=True,
)
# Six uncertain columns a problem, pairs of rollouts, and eight of them a step: a gradient so noisy
# that it matters which tokens it moves. LOG.md has the map of what was tried.
CREDIT_LAB = {
    "digits": 6,
    "nuisance": 0.25,
    "hard_share": 0.4,
    "hard_low": 0.3,
    "hard_high": 0.7,
    "referenced_share": 0.5,
    "trace_share": 0.15,
    "steps": 900,
}
SMALL_LAB = {
    "digits": 1,
    "hidden_size": 64,
    "layers": 2,
    "steps": 500,
    "ramp_steps": 150,
    "hard_share": 0.5,
}
SMALL = {"per_device_train_batch_size": 16, "max_completion_length": 32, "max_steps": 2}

PRESETS: dict[str, Preset] = {
    "smoke": replace(
        LAB_PRESET,
        summary="a lab of one digit, two steps: does everything run?",
        model_options=SMALL_LAB,
        teacher_options={**SMALL_LAB, **EXPERT, "steps": 100, "ramp_steps": 30},
        task_options={"digits": 1},
        training={**LAB, **SMALL},
        train_size=40,
        test_size=8,
        num_samples=2,
    ),
    "lab": LAB_PRESET,
    "lab-bare": replace(
        LAB_PRESET,
        summary="the lab without filler words: every uncertain token bears on the answer",
        model_options={"nuisance": 0.0},
    ),
    "lab-trace": replace(
        LAB_PRESET,
        summary="the lab with a whole right chain as the reference, where `lab` gives the answer",
        task_options={"reference": "trace"},
    ),
    "lab-credit": replace(
        LAB_PRESET,
        summary="the bench for credit: six-digit addition, another lab for each seed",
        model_options=CREDIT_LAB,
        teacher_options={**CREDIT_LAB, **EXPERT},
        task_options={"digits": 6},
        training={
            **LAB,
            # The best of four for GRPO and for `oracle` on a validation lab (`rlsd suite rates`).
            "learning_rate": 1e-4,
            "per_device_train_batch_size": 8,
            "num_generations": 2,
            "max_completion_length": 108,
            "max_steps": 250,
        },
        by_method={
            # The paper's OPSD: a verified trace, read by the policy as it was at the start. Its rate
            # is the best of four, and the highest.
            **{
                name: {"teacher_model_kind": "base", "learning_rate": 2e-4}
                for name in DISTILLING[:3]
            },
            # Every higher rate of six collapses.
            "sdpo": {**FULL_LOGITS, "learning_rate": 6e-6},
            "srpo": FULL_LOGITS,
            # The best of three weights at the best of its rates.
            "grpo_opsd": {"distillation_weight": 0.03},
        },
        task_by_method={name: {"reference": "trace"} for name in (*DISTILLING[:3], "grpo_opsd")},
        test_size=200,
        num_samples=2,
        lab_per_seed=True,
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
        by_method=OUR_WEIGHT,
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
        by_method=OUR_WEIGHT,
        train_size=-1,
        test_size=8,
        num_samples=2,
        max_prompt_length=512,
        rollouts_per_step=32,
    ),
    **{name: Preset(**row) for name, row in REAL_PRESETS.items()},
}

IDENTITY = ("method", "seed", "max_steps", "output_dir")
# What a run may change of its preset beside `RLSDConfig` fields: a local copy of the model, the
# folder of the data, sizes. Options are merged, everything else is replaced.
OF_OTHER_MODEL = ("teacher_model", "teacher_options")
OF_PRESET = (
    *("model", "model_options", *OF_OTHER_MODEL, "task_options", "lora", "lab_per_seed", "redraw"),
    *("train_size", "test_size", "num_samples", "evaluation_batch_size"),
    *("max_prompt_length", "rollouts_per_step"),
)
# Overrides that matter only where a run has lambda, or a teacher.
OF_LAMBDA = ("lambda_init", "lambda_warmup_steps", "lambda_decay_steps")
OF_TEACHER = ("teacher_model_kind", "teacher_pass")
OF_TEACHER += ("privileged_template", "max_teacher_prompt_length")


Steps = Annotated[int, lambda n: n >= 1 or n == -1, "a step count >= 1, or -1 for the preset's"]


class Resolved(NamedTuple):
    """A run that is checked and not begun: its preset with the overrides, and its configuration."""

    preset: Preset
    config: RLSDConfig  # with the batch of one of the `processes`
    processes: int
    control: str


@dataclass(frozen=True)
class RunParameters:
    """What decides a run: the parameters of a training notebook, as its manifest keeps them."""

    method: str  # a key of `METHODS`
    preset: str  # a key of `PRESETS`
    seed: Annotated[int, lambda value: value >= 0, "a number >= 0"] = 0  # of order and sampling
    max_steps: Steps = -1  # optimiser steps
    overrides: Mapping[str, Any] = field(default_factory=dict)  # of `RLSDConfig` or `OF_PRESET`
    control: str = "none"  # a key of `CONTROLS`
    num_processes: int = 1  # which share the batch of one, see `launch`
    run_dir: str = ""  # "" for the default directory

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> "RunParameters":
        """Take the run's own out of a notebook's or a manifest's parameters; None is the default."""
        given = {f.name: parameters.get(f.name) for f in fields(cls)}
        return cls(**{name: value for name, value in given.items() if value is not None})

    def resolve(
        self, output_dir: str | Path = "unused", *, template: str | None = None, processes: int = 1
    ) -> Resolved:
        """The preset, then the task's `template`, then what this run sets, for one of `processes`.

        Raises ValueError for an unknown method, preset, override or control, naming the nearest
        valid one, a control that changes nothing, or a batch that cannot be shared; TypeError for
        an override of another type than its field's.
        """
        check_control(self.control, self.method)
        check_fields(self)
        preset, overrides = resolve_preset(self.preset, self.overrides, self.seed)
        if METHODS[self.method].teacher_sees == PROMPT and not preset.teacher_model:
            raise ValueError(
                f"method={self.method!r} needs a teacher_model: {self.preset!r} has none"
            )
        on_gpu = torch.cuda.is_available()
        settings: dict[str, Any] = {
            "output_dir": str(output_dir),
            "run_name": Path(output_dir).parent.name or None,  # in a tracker, with report_to
            "method": self.method,
            "seed": self.seed + 1000 * preset.redraw,
            "use_cpu": not on_gpu,
            "bf16": on_gpu,
            "disable_tqdm": True,
            "logging_steps": 1,
            # Of the task's rewards: accuracy counts, the leak rate is only logged.
            "reward_weights": [1.0, 0.0],
            "save_steps": 50,
            "save_total_limit": 1,
            **preset.training,
            **preset.by_method.get(self.method, {}),
        }
        if (shown := PLAIN_TEMPLATE if self.control == "empty" else template) is not None:
            settings["privileged_template"] = shown
        if self.max_steps > 0:
            settings["max_steps"] = self.max_steps
        settings |= overrides
        if preset.rollouts_per_step and "gradient_accumulation_steps" not in settings:
            settings["gradient_accumulation_steps"] = _micro_batches(preset, settings)
        settings |= shared_batch(settings, processes)
        return Resolved(preset, RLSDConfig(**settings), processes, self.control)

    def checked(self, *, template: str | None = None, processes: int | None = None) -> Resolved:
        """As `resolve`, and refuse all else that can be judged before a directory is claimed."""
        count = self.num_processes if processes is None else processes
        found = self.resolve(template=template, processes=count)
        check_from_tasks(found.config)
        if count > 1:
            accelerate_config(found.preset.accelerate)
        if found.preset.model == "lab":
            for name in found.preset.model_options:
                look_up(name, [option.name for option in fields(LabRecipe)], "option of the lab")
        return found

    def idle(self, config: RLSDConfig) -> list[str]:
        """Which overrides change nothing in a run with this `config`, a sentence each."""
        row, kind = config.row, config.teacher_model_kind
        matters = {
            "epsilon_w": row.has_lambda and "epsilon_w" in row.asks,
            **dict.fromkeys(OF_LAMBDA, row.has_lambda),
            **dict.fromkeys(OF_TEACHER, config.uses_teacher),
            **dict.fromkeys(OF_OTHER_MODEL, row.teacher_sees == PROMPT),
            "teacher_sync_steps": config.uses_teacher and kind in ("ema", "snapshot"),
            "teacher_update_rate": config.uses_teacher and kind == "ema",
        }
        said = [
            f"{name}={value!r} changes nothing for method={self.method!r}"
            for name, value in self.overrides.items()
            if not matters.get(name, True)
        ]
        if "epsilon" in self.overrides and matters["epsilon_w"]:
            said.append("epsilon clips GRPO's policy ratio; the weight's clip is epsilon_w")
        return said


def resolve_preset(
    name: str, overrides: Mapping[str, Any], seed: int = 0
) -> tuple[Preset, dict[str, Any]]:
    """The preset with its part of `overrides` (`OF_PRESET`), and the overrides that are left.

    `seed` is the run's, for presets that pretrain a lab for each. Raises ValueError for an unknown
    preset or override, naming the nearest valid one; TypeError for an override of another type than
    its field's.
    """
    preset = PRESETS[look_up(name, PRESETS, "preset")]
    # The tasks name their columns themselves.
    known = {f.name: f.type for f in fields(RLSDConfig) if f.init and f.name != "privileged_column"}
    known |= {f.name: f.type for f in fields(Preset) if f.name in OF_PRESET}
    for key, value in overrides.items():
        if look_up(key, known, "override") in IDENTITY:
            raise ValueError(f"overrides may not set {key!r}: it is a parameter of the run itself.")
        if key == "hub_token":
            raise ValueError(
                "overrides may not set 'hub_token': it would stand in the manifest. Log in with "
                "`hf auth login`, or set HF_TOKEN."
            )
        try:
            check_type(key, value, known[key])
        except TypeError as error:
            raise TypeError(f"overrides: {error}") from None
    changes = {key: value for key, value in overrides.items() if key in OF_PRESET}
    merged = {
        key: {**getattr(preset, key), **value} if isinstance(value, Mapping) else value
        for key, value in changes.items()
    }
    # What the run says of the task goes before what the preset says of it for the method.
    asked = changes.get("task_options", {})
    by_method = {m: {**options, **asked} for m, options in preset.task_by_method.items()}
    preset = replace(preset, **merged, task_by_method=by_method)
    if preset.lab_per_seed:
        if preset.model != "lab" or "seed" in preset.model_options:
            raise ValueError(
                f"lab_per_seed gives a lab the run's seed: not model={preset.model!r} with "
                f"model_options={dict(preset.model_options)}. Set lab_per_seed=False."
            )
        preset = replace(preset, model_options={**preset.model_options, "seed": seed})
    return preset, {k: v for k, v in overrides.items() if k not in changes}


def shared_batch(settings: Mapping[str, Any], num_processes: int) -> dict[str, int]:
    """The batch settings of each of `num_processes` that together make the batch of one.

    The micro-batches are shared first; what their number does not divide by is taken from their
    rows. Then every optimiser step and every generation batch has the same rows. Raises ValueError
    if the batch does not divide, and names the values.
    """
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
    batch = {name: settings.get(name) or getattr(RLSDConfig, name) for name in names}
    batch = {name: count for name, count in batch.items() if count}
    generated = settings.get("generation_batch_size")
    rows = batch.pop(names[0])
    counts = [*batch.values(), *([generated // rows] if generated else [])]
    by_steps = math.gcd(num_processes, *counts)
    by_rows = num_processes // by_steps
    if num_processes < 1 or rows % by_rows:
        values = ", ".join(f"{name}={count}" for name, count in batch.items())
        raise ValueError(
            f"num_processes={num_processes} does not divide the batch of {names[0]}={rows}, "
            f"{values}, generation_batch_size={generated}: choose a divisor of their product."
        )
    return {names[0]: rows // by_rows, **{name: n // by_steps for name, n in batch.items()}}


def _micro_batches(preset: Preset, settings: Mapping[str, Any]) -> int:
    """By how many micro-batches one process makes a step of the preset's rollouts."""
    rollouts, rows = preset.rollouts_per_step, settings["per_device_train_batch_size"]
    if rollouts % rows:
        raise ValueError(
            f"{rollouts} rollouts per step cannot be shared by per_device_train_batch_size={rows}: "
            "choose a divisor, or set gradient_accumulation_steps."
        )
    return rollouts // rows
