"""`rlsd run ... --dry-run`: resolve a run, check it, and say what it would do. No network, no GPU.

What is on this machine is looked at (a data folder, a tokenizer, a model's configuration); what is
only on the hub is noted as not checked.
"""

import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PretrainedConfig

from rlsd_lib.experiment.controls import apply_control
from rlsd_lib.experiment.plan import describe, plan_of
from rlsd_lib.experiment.presets import Preset, Resolved, RunParameters, resolve_preset
from rlsd_lib.experiment.shapes import SHAPES
from rlsd_lib.methods import PRIVILEGED
from rlsd_lib.prompts import COLUMN, check_contexts, count_in_prompts
from rlsd_lib.report.benchmarks import check_benchmarks
from rlsd_lib.tasks import DATA, Task
from rlsd_lib.tasks.encode import Processing
from rlsd_lib.tasks.lab import model as lab
from rlsd_lib.tasks.lengths import fitting, prompt_lengths
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
        parts = [*self.lines, ""]
        parts += [f"ok           {line}" for line in self.checked]
        parts += [f"not checked  {line}" for line in self.unseen]
        parts += [f"WRONG        {line}" for line in self.wrong]
        return "\n".join(parts)

    def attempt(self, check: Callable[..., str], *of: Any) -> None:
        """Note what a check of `of` says, or what it raises: the next ones are made in any case."""
        try:
            self.checked.append(check(*of))
        except (ValueError, FileNotFoundError) as error:
            self.wrong.append(str(error))


def dry_run(notebook: str, parameters: Mapping[str, Any]) -> Findings:
    """Resolve and check a run of `notebook` with all its parameters.

    Raises:
        ValueError: for a notebook that trains nothing, an unknown method, preset, override, control
            or benchmark, or a batch that the processes cannot share.
        TypeError: for an override of another type than its field's.
    """
    if "preset" not in parameters or "method" not in parameters:
        raise ValueError(f"{notebook} has no preset and method: it trains nothing to check.")
    run = resolve(parameters)
    found = Findings(lines=[f"{notebook}: {run.preset.summary}", *_settings(run)])
    found.checked += ["method, preset, overrides and control exist", _batch_in_words(run)]
    if "benchmarks" in parameters:
        names = parameters["benchmarks"]
        if names:
            check_benchmarks(names)
        found.checked.append(f"benchmarks: {', '.join(names) or 'none'}")
    config, processing = _local_model(run.preset, found)
    positions = config and getattr(config.get_text_config(), "max_position_embeddings", None)
    found.attempt(_check_limits, run, positions)
    if (task := _local_task(run, found)) is not None:
        run = resolve(parameters, task.privileged_template)
        found.attempt(check_rows, run, task)
        if processing is not None:
            found.attempt(_check_prompts, run, task, processing, positions)
            found.attempt(_check_teacher_prompts, run, task, processing, positions)
    found.lines += ["", *_plan(run), *_start(notebook, parameters, run)]
    return found


def resolve(parameters: Mapping[str, Any], template: str | None = None) -> Resolved:
    """Resolve a notebook's parameters as its `Experiment` does, with the same errors.

    Where they leave `num_processes` at 1, the number that the preset is meant for counts.
    """
    run = RunParameters.of(parameters)
    preset, _ = resolve_preset(run.preset, run.overrides)
    count = preset.processes if run.num_processes == 1 else run.num_processes
    return run.resolve(template=template, processes=count)


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
    if preset.validation:
        yield f"  {'validation':<28} {dict(preset.validation)}"


def _batch_in_words(run: Resolved) -> str:
    config = run.config
    each = config.per_device_train_batch_size * config.gradient_accumulation_steps
    rollouts = each * run.processes
    return (
        f"{rollouts} rollouts per step = {rollouts // config.num_generations} prompts x "
        f"{config.num_generations} = {run.processes} processes x "
        f"{config.per_device_train_batch_size} rows x {config.gradient_accumulation_steps} "
        f"micro-batches; {config.max_steps} steps"
    )


def _plan(run: Resolved) -> list[str]:
    """Memory and time by arithmetic, for models whose sizes are known."""
    if run.preset.model not in SHAPES:
        return [f"no plan: the sizes of {run.preset.model} are not known to `rlsd plan`"]
    if not run.preset.max_prompt_length:
        return ["no plan: the preset has no max_prompt_length; `rlsd plan` takes a prompt_length"]
    plan = plan_of(run.preset, gpus=run.processes)
    return [describe(plan, f"{run.processes} GPUs of 80 GiB"), ""]


def _start(notebook: str, parameters: Mapping[str, Any], run: Resolved) -> list[str]:
    """The command that starts the run, and what it starts where there are several processes."""
    shown = ("method", "preset", "seed", "max_steps", "overrides", "control")
    given = {k: parameters[k] for k in shown if parameters.get(k) not in (None, {}, -1, "none")}
    texts = {k: json.dumps(v) if isinstance(v, dict) else v for k, v in given.items()}
    command = ["rlsd", "run", notebook]
    command += [part for k, v in texts.items() for part in ("-p", f"{k}={v}")]
    if run.processes == 1:
        return ["start it with", f"  {shlex.join(command)}"]
    command += ["--num-processes", str(run.processes)]
    command += ["--accelerate", run.preset.accelerate] if run.preset.accelerate else []
    config = f"{run.preset.accelerate or 'multi_gpu'}.yaml"
    start = f"accelerate launch --config_file {config} --num_processes {run.processes}"
    launched = f"  {start} -m rlsd_lib.experiment.launch RUN_DIR"
    return ["start it with", f"  {shlex.join(command)}", "which starts", launched]


def _local_model(
    preset: Preset, found: Findings
) -> tuple[PretrainedConfig | None, Processing | None]:
    """The configuration and the tokenizer or processor, if they can be had on this machine."""
    if preset.model == "lab":
        tokenizer = lab.build_tokenizer()
        recipe = lab.LabRecipe(**preset.model_options)
        return lab.build_model(recipe, len(tokenizer)).config, tokenizer
    if preset.model == "toy-vlm":
        from rlsd_lib.tasks.lab import vision  # needs Pillow

        return vision.build_model().config, vision.build_processor()
    folder = Path(preset.model).expanduser()
    cached = isinstance(try_to_load_from_cache(preset.model, "config.json"), str)
    if not folder.is_dir() and not cached:
        found.unseen.append(f"{preset.model} is not on this machine: positions, prompt lengths")
        return None, None
    name = str(folder) if folder.is_dir() else preset.model
    kind = AutoProcessor if preset.sees_images else AutoTokenizer
    config = AutoConfig.from_pretrained(name, local_files_only=True)
    return config, kind.from_pretrained(name, local_files_only=True, padding_side="left")


def _local_task(run: Resolved, found: Findings) -> Task | None:
    """The task, if its rows are on this machine or made in code."""
    preset, source = run.preset, run.preset.task_options.get("source", "")
    if preset.task in DATA and not (source and Path(source).is_dir()):
        found.unseen.append(
            f"the rows of {preset.task} ({source or 'from the hub'}): give a folder with "
            '-p overrides=\'{"task_options": {"source": FOLDER}}\' to have them checked'
        )
        return None
    try:
        task = preset.load_task(run.config.method)
    except (ValueError, FileNotFoundError) as error:
        found.wrong.append(str(error))
        return None
    found.checked.append(f"{len(task.train)} training and {len(task.test)} test rows")
    return task


def check_rows(run: Resolved, task: Task) -> str:
    """Refuse rows that the trainer would refuse; returns what was found in words.

    Raises:
        ValueError: no privileged column, or contexts that the trainer refuses, under the control.
    """
    if run.config.row.teacher_sees != PRIVILEGED:
        return "this method reads no privileged text"
    if COLUMN not in task.train.column_names:
        raise ValueError(f"the data has no column {COLUMN!r}, only {task.train.column_names}")
    rows = apply_control(task.train, run.control, run.config.seed)
    check_contexts(rows[COLUMN][:], run.config.privileged_template)
    shown = count_in_prompts(rows["prompt"][:], rows[COLUMN][:])
    return f"every row has a {COLUMN}; in {shown} of {len(rows)} it also stands in the question"


def _check_limits(run: Resolved, positions: int | None) -> str:
    """Refuse lengths that vLLM or the model has no room for."""
    settings, prompt = run.config, run.preset.max_prompt_length
    completion, limit = settings.max_completion_length, settings.vllm_max_model_length
    if settings.use_vllm and limit and prompt + completion > limit:
        raise ValueError(
            f"vllm_max_model_length={limit} is less than max_prompt_length={prompt} + "
            f"max_completion_length={completion}: raise it or lower these"
        )
    if settings.use_vllm and run.processes % settings.vllm_tensor_parallel_size:
        raise ValueError(
            f"vllm_tensor_parallel_size={settings.vllm_tensor_parallel_size} does not divide "
            f"{run.processes} processes"
        )
    teacher = settings.max_teacher_prompt_length or 0 if settings.uses_teacher else 0
    needed = max(teacher, prompt) + completion
    if positions is not None and needed > positions:
        raise ValueError(
            f"prompt and completion may take {needed} positions, the model has {positions}"
        )
    return f"at most {needed} positions" + (f" of the model's {positions}" if positions else "")


def _check_prompts(run: Resolved, task: Task, processing: Processing, positions: int | None) -> str:
    """Refuse data of which no prompt fits; say how many rows will be left out."""
    template, limit = run.config.chat_template_kwargs, run.preset.max_prompt_length
    lengths = prompt_lengths(task.train, processing, chat_template_kwargs=template)
    if not limit:
        return _check_longest("prompt", lengths, run, positions)
    long = len(lengths) - len(fitting(lengths, limit))
    if long == len(lengths):
        raise ValueError(
            f"max_prompt_length={limit}: every prompt is longer, from {min(lengths)} tokens on"
        )
    return f"prompts have up to {max(lengths)} tokens; {long} over {limit} will be left out"


def _check_teacher_prompts(
    run: Resolved, task: Task, processing: Processing, positions: int | None
) -> str:
    """Refuse a limit that leaves the privileged text no room; say how many will be shortened."""
    settings, limit = run.config, run.config.max_teacher_prompt_length
    if settings.row.teacher_sees != PRIVILEGED or not settings.uses_teacher:
        return "no teacher prompt is made before the run"
    template = settings.privileged_template
    how = {"chat_template_kwargs": settings.chat_template_kwargs, "privileged_template": template}
    lengths = prompt_lengths(task.train, processing, **how)
    if limit is None:
        return _check_longest("teacher prompt", lengths, run, positions)
    blank = task.train.remove_columns(COLUMN).add_column(COLUMN, [""] * len(task.train))
    bare = prompt_lengths(blank, processing, **how)
    kept = run.preset.max_prompt_length or max(bare)
    full = [i for i, n in enumerate(bare) if limit <= n <= kept]
    if full:
        raise ValueError(
            f"max_teacher_prompt_length={limit} leaves the privileged text no room in {len(full)} "
            f"rows (rows {full[:5]}): raise it, or lower max_prompt_length"
        )
    long = len(lengths) - len(fitting(lengths, limit))
    return f"teacher prompts have up to {max(lengths)} tokens; {long} will be shortened to {limit}"


def _check_longest(what: str, lengths: list[int], run: Resolved, positions: int | None) -> str:
    """Refuse prompts without a limit of which the longest and a completion exceed the model."""
    longest, completion = max(lengths), run.config.max_completion_length
    if positions is not None and longest + completion > positions:
        raise ValueError(
            f"row {lengths.index(longest)} has a {what} of {longest} tokens: with "
            f"max_completion_length={completion} it exceeds the model's {positions} positions. Set "
            f"max_{what.replace(' ', '_')}_length, or lower max_completion_length"
        )
    return f"{what}s have up to {longest} tokens"
