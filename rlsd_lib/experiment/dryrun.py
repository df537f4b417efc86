"""`rlsd run ... --dry-run`: resolve a run, check it, and say what it would do. No network, no GPU."""

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlsd_lib.experiment.controls import control_template
from rlsd_lib.experiment.plan import describe, plan_of
from rlsd_lib.experiment.preflight import (
    Findings,
    Resolved,
    attempt,
    check_benchmark_names,
    check_limits,
    check_prompts,
    check_rows,
    check_teacher_prompts,
    local_model,
    local_task,
)
from rlsd_lib.experiment.presets import resolve_parameters, resolve_preset
from rlsd_lib.experiment.shapes import SHAPES
from rlsd_lib.trainer.config import RLSDConfig


def dry_run(notebook: str, parameters: Mapping[str, Any]) -> Findings:
    """Resolve and check a run of `notebook` with all its parameters.

    Raises:
        ValueError: for a notebook that trains nothing, an unknown method, preset, override, control
            or benchmark, or a batch that the processes cannot share.
    """
    if "preset" not in parameters or "method" not in parameters:
        raise ValueError(f"{notebook} has no preset and method: it trains nothing to check.")
    run = resolve(parameters)
    found = Findings(lines=[f"{notebook}: {run.preset.summary}", *_settings(run)])
    found.checked.append("method, preset, overrides and control exist")
    found.checked.append(_batch_in_words(run))
    if "benchmarks" in parameters:
        found.checked.append(check_benchmark_names(parameters["benchmarks"]))
    config, processing = local_model(run.preset, found)
    attempt(found, lambda: check_limits(run, config))
    if (task := local_task(run, found)) is not None:
        attempt(found, lambda: check_rows(run, task))
        if processing is not None:
            for check in (check_prompts, check_teacher_prompts):
                attempt(found, lambda check=check: check(run, task, processing, config))
    found.lines += ["", *_plan(run), *_launch(notebook, parameters, run)]
    return found


def resolve(parameters: Mapping[str, Any]) -> Resolved:
    """Resolve a run's parameters as `Experiment` does; raises ValueError like it."""
    given = {name: value for name, value in parameters.items() if value is not None}
    full = {"seed": 0, "max_steps": -1, "control": "none", "overrides": {}, **given}
    preset, _ = resolve_preset(full["preset"], full["overrides"])
    count = full.get("num_processes", 1)
    count = preset.processes if count == 1 else count
    template = control_template(full["control"], None)
    config = resolve_parameters(full, Path("unused"), template, count)
    return Resolved(preset, config, count, full["control"])


def _settings(run: Resolved) -> Iterator[str]:
    """What decides the run, then every field that is not TRL's default."""
    preset, config = run.preset, run.config
    sources = {"model": preset.model, "task": f"{preset.task} {dict(preset.task_options)}"}
    sources["trained"] = f"LoRA {dict(preset.lora)}" if preset.lora else "all weights"
    sources["teacher"] = config.teacher_model_kind if config.uses_teacher else "none"
    yield from (f"  {name:<28} {value}" for name, value in sources.items())
    plain = RLSDConfig(output_dir="unused", use_cpu=True, bf16=False).to_dict()
    chosen = {*preset.training, *preset.by_method.get(config.method, {})}
    # Not the generation batch, which is that of one process here.
    own = {
        name: value
        for name, value in config.to_dict().items()
        if (name in chosen or plain.get(name) != value)
        and name not in ("output_dir", "generation_batch_size", "disable_tqdm")
    }
    yield from (f"  {name:<28} {value!r}" for name, value in sorted(own.items()))
    if preset.validation:
        yield f"  {'validation':<28} {dict(preset.validation)}"


def _batch_in_words(run: Resolved) -> str:
    config = run.config
    return (
        f"{run.rollouts} rollouts per step = {run.rollouts // config.num_generations} prompts x "
        f"{config.num_generations} = {run.num_processes} processes x "
        f"{config.per_device_train_batch_size} rows x {config.gradient_accumulation_steps} "
        f"micro-batches; {config.max_steps} steps"
    )


def _plan(run: Resolved) -> list[str]:
    """Memory and time by arithmetic, for models whose sizes are known."""
    if run.preset.model not in SHAPES:
        return [f"no plan: the sizes of {run.preset.model} are not known to `rlsd plan`"]
    if not run.preset.max_prompt_length:
        return ["no plan: the preset has no max_prompt_length; `rlsd plan` takes a prompt_length"]
    count = run.num_processes
    plan = plan_of(asdict(run.preset), gpus=count)
    return [describe(plan, f"{count} GPUs of 80 GiB"), ""]


def _launch(notebook: str, parameters: Mapping[str, Any], run: Resolved) -> list[str]:
    """The command that starts the run, and what it starts where there are several processes."""
    shown = ("method", "preset", "seed", "max_steps", "overrides", "control")
    given = {k: parameters[k] for k in shown if parameters.get(k) not in (None, {}, -1, "none")}
    texts = {k: json.dumps(v) if isinstance(v, dict) else v for k, v in given.items()}
    pairs = [part for k, v in texts.items() for part in ("-p", f"{k}={v}")]
    command = ["rlsd", "run", notebook, *pairs]
    if run.num_processes > 1:
        command += ["--num-processes", str(run.num_processes)]
        command += ["--accelerate", run.preset.accelerate] if run.preset.accelerate else []
    lines = ["start it with", f"  {shlex.join(command)}"]
    if run.num_processes > 1:
        config = f"{run.preset.accelerate or 'multi_gpu'}.yaml"
        start = f"accelerate launch --config_file {config} --num_processes {run.num_processes}"
        lines += ["which starts", f"  {start} -m rlsd_lib.experiment.worker RUN_DIR"]
    return lines
