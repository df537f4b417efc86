"""`rlsd run ... --dry-run`: resolve a run, check it, and say what it would do. No network, no GPU.

What is on this machine is looked at (a data folder, a tokenizer, a model's configuration); what is
only on the hub is noted as not checked.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PretrainedConfig

from rlsd_lib.experiment.controls import apply_control
from rlsd_lib.experiment.launch import accelerate_config, launch_command
from rlsd_lib.experiment.plan import FIELDS, describe, plan_of
from rlsd_lib.experiment.presets import Preset, Resolved, RunParameters, resolve_preset
from rlsd_lib.methods import PRIVILEGED, PROMPT
from rlsd_lib.runs.parameters import as_text, complete
from rlsd_lib.runs.paths import find_notebook
from rlsd_lib.tasks import DATA, Task
from rlsd_lib.tasks.encode import Processing, prompt_lengths, within
from rlsd_lib.tasks.lab import model as lab
from rlsd_lib.trainer.checks import check_arguments, check_wrong_references
from rlsd_lib.trainer.config import RLSDConfig


@dataclass
class Findings:
    """What a dry run found out: `wrong` must be mended, `unseen` is not on this machine."""

    lines: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def text(self) -> str:
        """All of it, for a terminal."""
        marked = {"ok": self.checked, "not checked": self.unseen, "WRONG": self.wrong}
        parts = [f"{mark:<13}{line}" for mark, lines in marked.items() for line in lines]
        return "\n".join([*self.lines, "", *parts])

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note what a check raises and go on: the next checks are made in any case."""
        try:
            yield
        except (ValueError, FileNotFoundError) as error:
            self.wrong.append(str(error))


def dry_run(notebook: str, parameters: Mapping[str, Any]) -> Findings:
    """Resolve and check a run of `notebook` with all its parameters.

    Raises ValueError for a notebook that trains nothing, an unknown method, preset, override or
    control, or a batch that the processes cannot share; TypeError for an override of another type
    than its field's; FileNotFoundError for an unknown accelerate config.
    """
    if "preset" not in parameters or "method" not in parameters:
        raise ValueError(f"{notebook} has no preset and method: it trains nothing to check.")
    run = resolve(parameters)
    preset = run.preset
    found = Findings([f"{notebook}: {preset.summary}", *_settings(run)])
    found.checked += ["method, preset, overrides and control exist", _batch(run)[1]]
    found.lines += [f"note: {line}" for line in RunParameters.of(parameters).idle(run.config)]
    config, processing = _local_model(preset)
    if config is None:
        found.unseen.append(f"{preset.model} is not on this machine: positions, prompt lengths")
    positions = config and getattr(config.get_text_config(), "max_position_embeddings", None)
    with found.noting():
        found.checked.append(_check_limits(run, positions))
    source = preset.task_options.get("source", "")
    if preset.task in DATA and not (source and Path(source).is_dir()):
        place = '-p overrides=\'{"task_options": {"source": FOLDER}}\''
        found.unseen.append(f"the rows of {preset.task} ({source or 'from the hub'}): give {place}")
    else:
        with found.noting():
            task = preset.load_task(run.config.method)
            found.checked.append(f"{len(task.train)} training and {len(task.test)} test rows")
            run = resolve(parameters, task.privileged_template)
            with found.noting():
                check_rows(run, task)
                found.checked.append("the trainer takes every row")
            if processing is not None:
                found.checked += _check_lengths(run, task, processing)
    found.lines += ["", *_plan(run), *_start(notebook, parameters, run)]
    return found


def resolve(parameters: Mapping[str, Any], template: str | None = None) -> Resolved:
    """Resolve a notebook's parameters, with the errors of its `Experiment`.

    Unlike there, `num_processes=1` stands for the number of processes that the preset is meant for.
    """
    run = RunParameters.of(parameters)
    preset, _ = resolve_preset(run.preset, run.overrides, run.seed)
    count = preset.processes if run.num_processes == 1 else run.num_processes
    return run.checked(template=template, processes=count)


def check(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Judge runs as their `Experiment` would; returns what they set that changes nothing."""
    idle: list[str] = []
    for run in map(RunParameters.of, runs):
        preset, config, *_ = run.checked()
        if preset.task not in DATA:
            try:
                preset.load_task(run.method)  # by which a wrong option comes to light
            except TypeError as error:
                raise TypeError(f"task_options={dict(preset.task_options)}: {error}") from error
        idle += run.idle(config)
    return list(dict.fromkeys(idle))


def _settings(run: Resolved) -> Iterator[str]:
    """What decides the run, then every field that is not TRL's default."""
    preset, config = run.preset, run.config
    yield f"  {'model':<28} {preset.model}"
    yield f"  {'task':<28} {preset.task} {dict(preset.task_options)}"
    yield f"  {'trained':<28} {f'LoRA {dict(preset.lora)}' if preset.lora else 'all weights'}"
    yield f"  {'teacher':<28} {config.teacher_model_kind if config.uses_teacher else 'none'}"
    plain = RLSDConfig(output_dir="unused", use_cpu=True, bf16=False).to_dict()
    chosen = {*preset.training, *preset.by_method.get(config.method, {})}
    for name, value in sorted(config.to_dict().items()):
        # Not the generation batch, which is that of one process here.
        kept = name not in ("output_dir", "generation_batch_size", "disable_tqdm")
        if kept and (name in chosen or plain.get(name) != value):
            yield f"  {name:<28} {value!r}"


def _batch(run: Resolved) -> tuple[int, str]:
    """Rollouts of one optimiser step over all processes, and how they are made up, in words."""
    config, group = run.config, run.config.num_generations
    rows, micro = config.per_device_train_batch_size, config.gradient_accumulation_steps
    rollouts = run.processes * rows * micro
    return rollouts, (
        f"{rollouts} rollouts per step = {rollouts // group} prompts x {group} = {run.processes} "
        f"processes x {rows} rows x {micro} micro-batches; {config.max_steps} steps"
    )


def _plan(run: Resolved) -> list[str]:
    """Memory and time by arithmetic, for models whose sizes are known."""
    planned = {name: getattr(run.config, name) for name in FIELDS if hasattr(run.config, name)}
    try:
        plan = plan_of(run.preset, gpus=run.processes, **planned, rollouts=_batch(run)[0])
    except ValueError as error:
        return [f"no `rlsd plan`: {error}"]
    return [describe(plan, f"{run.processes} GPUs of 80 GiB"), ""]


def _start(notebook: str, parameters: Mapping[str, Any], run: Resolved) -> list[str]:
    """The command that starts the run, and what it starts where there are several processes."""
    declared = complete(find_notebook(notebook), {})
    always = ("method", "preset", "seed")
    given = {
        name: value
        for name, value in parameters.items()
        if name in always or (value != declared.get(name) and name != "num_processes")
    }
    command = ["rlsd", "run", notebook]
    command += [word for k, v in given.items() for word in ("-p", f"{k}={as_text(v)}")]
    if run.processes > 1:
        command += ["--num-processes", str(run.processes)]
        command += ["--accelerate", run.preset.accelerate] if run.preset.accelerate else []
    start = ["start it with", f"  {shlex.join(command)}"]
    if run.processes == 1:
        return start
    config = accelerate_config(run.preset.accelerate)
    launched = launch_command(config, run.processes, Path("RUN_DIR"))
    return [*start, "which starts", f"  {shlex.join(launched)}"]


def _local_model(preset: Preset) -> tuple[PretrainedConfig, Processing] | tuple[None, None]:
    """The configuration and the tokenizer or processor, if they are whole on this machine."""
    if preset.model == "lab":
        tokenizer = lab.build_tokenizer()
        recipe = lab.LabRecipe(**preset.model_options)
        return lab.build_model(recipe, len(tokenizer)).config, tokenizer
    if preset.model == "toy-vlm":
        from rlsd_lib.tasks.lab import vision  # needs Pillow

        return vision.build_model().config, vision.build_processor()
    name = str(Path(preset.model).expanduser())
    kind = AutoProcessor if preset.sees_images else AutoTokenizer
    here = {"local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(name, **here)
        return config, kind.from_pretrained(name, padding_side="left", **here)
    except OSError:
        return None, None


def check_rows(run: Resolved, task: Task) -> None:
    """Refuse, as the trainer does, rows as the run's control leaves them: ValueError."""
    rows = apply_control(task.train, run.control, run.config.seed)
    teacher = run.preset.teacher_model if run.config.row.teacher_sees == PROMPT else None
    check_arguments([task.reward], run.config, rows, teacher)
    check_wrong_references(rows, run.config.row.asks, run.config)


def _check_limits(run: Resolved, positions: int | None) -> str:
    """Refuse lengths that vLLM or the model has no room for."""
    settings, prompt = run.config, run.preset.max_prompt_length
    completion, limit = settings.max_completion_length, settings.vllm_max_model_length
    if settings.use_vllm and limit and prompt + completion > limit:
        raise ValueError(
            f"vllm_max_model_length={limit} is less than max_prompt_length={prompt} + "
            f"max_completion_length={completion}: raise it or lower these"
        )
    teacher = settings.max_teacher_prompt_length or 0 if settings.uses_teacher else 0
    needed = max(teacher, prompt) + completion
    if positions is not None and needed > positions:
        raise ValueError(f"a rollout may take {needed} positions, the model has {positions}")
    return f"at most {needed} positions" + (f" of the model's {positions}" if positions else "")


def _check_lengths(run: Resolved, task: Task, processing: Processing) -> Iterator[str]:
    """Refuse rows that the run would refuse for their length; say what it leaves out or shortens."""
    config, limit = run.config, run.preset.max_prompt_length
    how = {"chat_template_kwargs": config.chat_template_kwargs}
    if limit:
        task, long = within(task, processing, limit, **how)
        yield f"prompts: {long} over {limit} will be left out"
    limit, how["privileged_template"] = config.max_teacher_prompt_length, config.privileged_template
    if limit is None or config.row.teacher_sees != PRIVILEGED or not config.uses_teacher:
        return
    lengths = prompt_lengths(task.train, processing, **how)
    bare = apply_control(task.train, "empty", config.seed)
    full = [i for i, n in enumerate(prompt_lengths(bare, processing, **how)) if n >= limit]
    if full:
        raise ValueError(
            f"max_teacher_prompt_length={limit} leaves the privileged text no room in {len(full)} "
            f"rows (rows {full[:5]}): raise it"
        )
    long = sum(length > limit for length in lengths)
    yield f"teacher prompts have up to {max(lengths)} tokens; {long} will be shortened to {limit}"
