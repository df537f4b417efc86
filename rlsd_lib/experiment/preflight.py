"""What can be checked of a run before it begins: limits, rows and prompt lengths, offline.

What is on this machine is looked at (a data folder, a tokenizer, a model's configuration); what is
only on the hub is not, and is noted as unseen.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoProcessor, AutoTokenizer

from rlsd_lib.experiment.controls import apply_control
from rlsd_lib.experiment.paper_presets import Preset
from rlsd_lib.methods import PRIVILEGED
from rlsd_lib.prompts import COLUMN, check_contexts, count_in_prompts
from rlsd_lib.tasks import DATA, Task, load_task
from rlsd_lib.tasks.encode import Processing
from rlsd_lib.tasks.lengths import prompt_lengths
from rlsd_lib.trainer.config import RLSDConfig

GENERATED = ("arithmetic", "colours")  # tasks whose rows are made in code


@dataclass
class Findings:
    """What a dry run found out: `wrong` must be mended, `unseen` could not be looked at here."""

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


@dataclass(frozen=True)
class Resolved:
    """A run that was resolved and not begun."""

    preset: Preset
    config: RLSDConfig
    num_processes: int
    control: str

    @property
    def rollouts(self) -> int:
        """Rollouts of one optimiser step, of all processes."""
        config = self.config
        each = config.per_device_train_batch_size * config.gradient_accumulation_steps
        return each * self.num_processes


def attempt(found: Findings, check: Callable[[], str]) -> None:
    """Note what a check says, or what it raises: the next ones are made in any case."""
    try:
        found.checked.append(check())
    except (ValueError, FileNotFoundError) as error:
        found.wrong.append(str(error))


def check_benchmark_names(names: list[str]) -> str:
    """Refuse a benchmark that there is not."""
    from rlsd_lib.report.benchmarks import check_benchmarks

    if names:
        check_benchmarks(names)
    return f"benchmarks: {', '.join(names) or 'none'}"


def local_model(preset: Preset, found: Findings) -> tuple[Any, Processing | None]:
    """The configuration and the tokenizer or processor, if they can be had on this machine."""
    if preset.model == "lab":
        from rlsd_lib.tasks.lab.model import LabRecipe, build_model, build_tokenizer

        tokenizer = build_tokenizer()
        return build_model(LabRecipe(**preset.model_options), len(tokenizer)).config, tokenizer
    if preset.model == "toy-vlm":
        from rlsd_lib.tasks.lab.vision import build_model as build_toy
        from rlsd_lib.tasks.lab.vision import build_processor

        return build_toy().config, build_processor()
    here = Path(preset.model).expanduser()
    if not here.is_dir() and not isinstance(
        try_to_load_from_cache(preset.model, "config.json"), str
    ):
        found.unseen.append(f"{preset.model} is not on this machine: positions, prompt lengths")
        return None, None
    name = str(here) if here.is_dir() else preset.model
    load = AutoProcessor if preset.sees_images else AutoTokenizer
    config = AutoConfig.from_pretrained(name, local_files_only=True)
    return config, load.from_pretrained(name, local_files_only=True, padding_side="left")


def local_task(run: Resolved, found: Findings) -> Task | None:
    """The task, if its rows are on this machine or made in code."""
    preset = run.preset
    options = {**preset.task_options, **preset.task_by_method.get(run.config.method, {})}
    if preset.task in DATA and preset.task not in GENERATED:
        source = options.get("source", "")
        if not Path(source).is_dir() or not source:
            found.unseen.append(
                f"the rows of {preset.task} ({source or 'from the hub'}): give a folder with "
                '-p overrides=\'{"task_options": {"source": FOLDER}}\' to have them checked'
            )
            return None
    sizes = {"train_size": preset.train_size, "test_size": preset.test_size}
    try:
        task = load_task(preset.task, **sizes, seed=preset.data_seed, **options)
    except (ValueError, FileNotFoundError) as error:
        found.wrong.append(str(error))
        return None
    found.checked.append(f"{len(task.train)} training and {len(task.test)} test rows")
    return task


def check_rows(run: Resolved, task: Task) -> str:
    """Refuse rows that the trainer would refuse."""
    if run.config.row.teacher_sees != PRIVILEGED:
        return "this method reads no privileged text"
    if COLUMN not in task.train.column_names:
        raise ValueError(f"the data has no column {COLUMN!r}, only {task.train.column_names}")
    rows = apply_control(task.train, run.control, run.config.seed)
    check_contexts(rows[COLUMN][:], run.config.privileged_template)
    held = count_in_prompts(rows["prompt"][:], rows[COLUMN][:])
    return f"every row has a {COLUMN}; in {held} of {len(rows)} it also stands in the question"


def check_limits(run: Resolved, config: Any) -> str:
    """Refuse lengths that vLLM or the model has no room for."""
    settings, prompt = run.config, run.preset.max_prompt_length
    longest = prompt + settings.max_completion_length
    if settings.use_vllm and (limit := settings.vllm_max_model_length) and longest > limit:
        raise ValueError(
            f"vllm_max_model_length={limit} is less than max_prompt_length={prompt} + "
            f"max_completion_length={settings.max_completion_length}: raise it or lower these"
        )
    if settings.use_vllm and run.num_processes % settings.vllm_tensor_parallel_size:
        raise ValueError(
            f"vllm_tensor_parallel_size={settings.vllm_tensor_parallel_size} does not divide "
            f"{run.num_processes} processes"
        )
    teacher = (
        max(settings.max_teacher_prompt_length or 0, prompt) if settings.uses_teacher else prompt
    )
    needed, most = teacher + settings.max_completion_length, _positions(config)
    if most is not None and needed > most:
        raise ValueError(f"prompt and completion may take {needed} positions, the model has {most}")
    return f"at most {needed} positions" + (f" of the model's {most}" if most else "")


def _positions(config: Any) -> int | None:
    return config and getattr(config.get_text_config(), "max_position_embeddings", None)


def check_prompts(run: Resolved, task: Task, processing: Processing, config: Any) -> str:
    """Refuse data of which no prompt fits; say how many rows will be left out."""
    settings, limit = run.config, run.preset.max_prompt_length
    lengths = prompt_lengths(
        task.train, processing, chat_template_kwargs=settings.chat_template_kwargs
    )
    if limit:
        long = sum(length > limit for length in lengths)
        if long == len(lengths):
            raise ValueError(
                f"max_prompt_length={limit}: every prompt is longer, from {min(lengths)} tokens on"
            )
        return f"prompts have up to {max(lengths)} tokens; {long} over {limit} will be left out"
    most = _positions(config)
    if most is not None and max(lengths) + settings.max_completion_length > most:
        raise ValueError(
            f"row {lengths.index(max(lengths))} has a prompt of {max(lengths)} tokens: with "
            f"max_completion_length={settings.max_completion_length} it exceeds the model's {most} "
            "positions. Set max_prompt_length, or lower max_completion_length"
        )
    return f"prompts have up to {max(lengths)} tokens"


def check_teacher_prompts(run: Resolved, task: Task, processing: Processing, config: Any) -> str:
    """Refuse a limit that leaves the privileged text no room; say how many will be shortened."""
    settings = run.config
    if settings.row.teacher_sees != PRIVILEGED or not settings.uses_teacher:
        return "no teacher prompt is made before the run"
    how = {"chat_template_kwargs": settings.chat_template_kwargs}
    how["privileged_template"] = task.privileged_template or settings.privileged_template
    lengths = prompt_lengths(task.train, processing, **how)
    limit, most = settings.max_teacher_prompt_length, _positions(config)
    if limit is None:
        if most is not None and max(lengths) + settings.max_completion_length > most:
            raise ValueError(
                f"row {lengths.index(max(lengths))} has a teacher prompt of {max(lengths)} tokens, "
                f"too long for the model's {most} positions. Set max_teacher_prompt_length"
            )
        return f"teacher prompts have up to {max(lengths)} tokens"
    bare = prompt_lengths(_without_context(task.train), processing, **how)
    kept = run.preset.max_prompt_length or max(bare)
    full = [i for i, n in enumerate(bare) if n >= limit and n <= kept]
    if full:
        raise ValueError(
            f"max_teacher_prompt_length={limit} leaves the privileged text no room in {len(full)} "
            f"rows (rows {full[:5]}): raise it, or lower max_prompt_length"
        )
    long = sum(length > limit for length in lengths)
    return f"teacher prompts have up to {max(lengths)} tokens; {long} will be shortened to {limit}"


def _without_context(rows: Dataset) -> Dataset:
    return rows.remove_columns(COLUMN).add_column(COLUMN, [""] * len(rows))
