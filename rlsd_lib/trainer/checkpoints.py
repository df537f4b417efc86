"""Checkpoints that can be trusted: each lists its files, and the settings that made it.

A checkpoint counts once its last file, `complete.json`, is there. It holds sizes and SHA-256 of all
others, so that no damaged file is loaded, and the settings of the run, so that none goes on as
another.
"""

import hashlib
import json
import logging
import math
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from datasets import Dataset, Value
from peft import PeftModel
from torch import Tensor, nn
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    TrainOutput,
    get_last_checkpoint,
    rotate_checkpoints,
    sort_checkpoints,
)
from trl import GRPOTrainer

from rlsd_lib.prompts import prompt_text
from rlsd_lib.trainer import sharded, states, upstream
from rlsd_lib.trainer.checks import on_every_rank

PYTHON = "{}.{}".format(*sys.version_info)
MARK = "complete.json"  # the last file of a checkpoint
ROLLOUTS = "rlsd_rollouts_{rank}.pt"
# What a resumed run may have otherwise: where it writes, what it logs, how many steps it makes.
FREE = re.compile(
    r"(?:output_dir|run_name|project|report_to|disable_tqdm|num_completions_to_print|"
    r"resume_from_checkpoint|debug|skip_memory_metrics|enable_jit_checkpoint|torch_empty_cache_steps|"
    r"vllm_gpu_memory_utilization|vllm_enable_sleep_mode|dataloader_(?:num_workers|pin_memory|"
    r"persistent_workers|prefetch_factor)|"
    r"(?:log|logging|save|hub|push|do|ddp|trackio|vllm_server|vllm_group)_\w+)"
)
GROWS = ("max_steps", "num_train_epochs")

# transformers' mark of a save that is under way, which it takes away after this list is written.
UNDER_WAY = "checkpoint-is-incomplete.txt"

logger = logging.getLogger(__name__)


class Resumable(GRPOTrainer):
    """GRPO that saves the teacher too, and whose resumed run is the same, bit by bit, or refused.

    For a class with `TeacherPass` behind it, which sets `credit` and `signals`. `changes` lists the
    settings that resumes changed, by the step from which they hold; `fixed_weights` is
    `print_of_fixed`.
    """

    teacher: Any = None  # the `Teacher`, which `TeacherPass` makes
    changes: Sequence[dict[str, Any]] = ()
    _checkpoint: str | None = None
    _saved: Path | None = None
    _sampler: Any = None  # streamed rows have none

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Once: later, parameters may be sharded, merged or released.
        self.fixed_weights = print_of_fixed(self)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """As the parent's; a resumed run is the same run, bit by bit, or it is refused.

        Another call without a checkpoint copies the student anew: steps and teacher age start at 0.
        `changes` lists the settings that resumes changed, by the step from which they hold. Raises
        ValueError on every rank, if a file of the checkpoint is missing or damaged, if it is of a run
        with other settings, model, rows or rewards, if it has no teacher state, or if an earlier call
        released a teacher that this one needs; FloatingPointError on every rank, if weights or
        gradient are no longer finite.
        """
        given = resume_from_checkpoint
        if given is True:
            folder = self.args.output_dir
            given = last_checkpoint(folder) or get_last_checkpoint(folder) or True
        self._checkpoint = str(given) if given and given is not True else None
        self._settings, self.changes = settings_of(self), []
        # Of an earlier call: rollouts that it had not used up, and where it was in them.
        self._step, self._buffered_inputs = 0, None
        if self._checkpoint is not None:
            self._restore(Path(self._checkpoint))
        output = super().train(self._checkpoint or given, *args, **kwargs)
        check_weights(self.model, self.state.global_step, self.accelerator)
        return output

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._sampler = super()._get_train_sampler(dataset)
        return self._sampler

    def _run_epoch(self, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            return  # stopped after its last step; the parent would make one more
        upstream.order_of_epoch(self._sampler, kwargs["epoch"])
        super()._run_epoch(**kwargs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As the parent's; refuses a gradient that would destroy the weights. Collective."""
        norm = super()._get_grad_norm(model, grad_norm)
        # In float16 an infinite gradient lowers the loss scale, and the step is left out.
        known = norm is not None and self.accelerator.mixed_precision != "fp16"
        if known and not math.isfinite(norm):
            raise FloatingPointError(
                f"The gradient's norm is {float(norm)} at step {self.state.global_step}. Nothing is "
                f"saved of that step; checkpoints under {self.args.output_dir} are intact."
            )
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step, output_dir = self.state.global_step, self._get_output_dir(trial)
        self._saved = folder = Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        own = [] if self.teacher is None else self.teacher.trained_weights(self.model)
        check_weights(self.model, step, self.accelerator, own)
        folder.mkdir(parents=True, exist_ok=True)
        if self.args.should_save:
            (folder / MARK).unlink(missing_ok=True)
        if self.teacher is not None:
            self.teacher.save(folder, step)
        self._save_rollouts(folder)
        with upstream.without_rotation():
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            facts = {"step": step, "settings": self._settings, "changes": self.changes}
            seal(folder, **facts)
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(output_dir, limit, best, use_mtime=True)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The parent asks for it in the midst of saving: what is pushed shall be whole.
        if (Path(checkpoint_folder) / MARK).exists():
            super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if self.teacher is not None and self.teacher.adapter is not None and folder != self._saved:
            # PEFT writes every adapter; the trained model is the student alone.
            shutil.rmtree(folder / self.teacher.adapter, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        whole = not sharded.is_sharded(self.accelerator)
        if self.teacher is not None and self.teacher.adapter is not None and whole:
            student = self.accelerator.unwrap_model(self.model)
            upstream.load_trained_adapter(student, resume_from_checkpoint)

    def _restore(self, folder: Path) -> None:
        """Judge a checkpoint, and restore the rollouts of its midst. Collective, and raises so."""
        content, differ = None, {}
        with on_every_rank():
            if self.args.sync_ref_model:
                raise ValueError(
                    "sync_ref_model=True: the reference model has moved, and no checkpoint holds it. "
                    "Train without interruption, or leave it False."
                )
            if self.accelerator.is_main_process:  # one reads, for all of them
                is_deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
                apart = is_deepspeed or sharded.is_sharded(self.accelerator)
                content = check(folder, sharded_state=apart)
            if content is not None:
                differ = changed(folder, content["settings"], self._settings)
        content, differ = broadcast_object_list([content, differ])
        if content is None:
            return
        now = [{"step": content["step"], **differ}] if differ else []
        self.changes = [*content["changes"], *now]
        file = folder / ROLLOUTS.format(rank=self.accelerator.process_index)
        state = torch.load(file, map_location=self.accelerator.device, weights_only=True)
        self._step, self._served = state["step"], range(*state["served"])
        self._buffered_inputs, self._teacher_head = state["inputs"], state["head"]

    def _save_rollouts(self, folder: Path) -> None:
        """Write the rollouts that later steps will use again, and how far they are used."""
        midway = self._step % self._micro_steps_served() != 0
        state = {
            "step": self._step,
            "served": [self._served.start, self._served.stop],
            "inputs": self._buffered_inputs if midway else None,
            "head": self._teacher_head if midway else None,
        }
        torch.save(state, folder / ROLLOUTS.format(rank=self.accelerator.process_index))


def seal(folder: Path, **facts: Any) -> None:
    """List every file of a checkpoint in its last one, beside `step`, `settings` and `changes`."""
    content = {"files": _prints(folder), **facts}
    content["sha256"] = _digest(content)
    draft = folder / f".{MARK}"
    draft.write_text(json.dumps(content, indent=1) + "\n")
    draft.replace(folder / MARK)


def check(folder: Path, *, sharded_state: bool = False) -> dict[str, Any] | None:
    """The content of a checkpoint's `MARK`; None if TRL's trainer or an earlier version wrote it.

    Raises ValueError with the file that is missing or not as it was written, and the way out.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such checkpoint.")
    if not (folder / MARK).exists():
        # Under FSDP and DeepSpeed optimisers lie elsewhere; generator states come after all of them.
        wanted = ["rng_state*.pth", *(() if sharded_state else ("optimizer.pt", "scheduler.pt"))]
        lacking = [name for name in wanted if not any(folder.glob(name))]
        if lacking or any(folder.glob(ROLLOUTS.format(rank="*"))):
            name = (lacking or [MARK])[0]
            raise _refusal(folder, f"/{name} is missing: it was not written whole")
        logger.warning("%s has no %s: its files cannot be checked", folder, MARK)
        return None
    try:
        content = json.loads((folder / MARK).read_text())
        if content.keys() == {"step"}:
            logger.warning("%s is of an earlier version: its files cannot be checked", folder)
            return None
        intact = content.pop("sha256") == _digest(content)
    except (ValueError, LookupError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise _refusal(folder, f"/{MARK} is damaged: it is not as it was written")
    found = _prints(folder)
    for name, size_and_hash in content["files"].items():
        if found.get(name) != size_and_hash:
            how = "is damaged: its hash differs" if name in found else "is missing"
            raise _refusal(folder, f"/{name} {how}")
    if not any(name.startswith("rng_state") for name in content["files"]):
        raise _refusal(folder, " holds weights alone (save_only_model=True)")
    return content


def changed(
    folder: Path, recorded: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, list[Any]]:
    """What of the settings is not as recorded, as [before, now]; what one side lacks is listed too.

    Raises ValueError with the first setting that decides the result and differs.
    """
    differ = {
        name: [recorded.get(name), settings.get(name)]
        for name in recorded.keys() | settings.keys()
        if recorded.get(name) != settings.get(name)
    }
    for name, (before, now) in sorted(differ.items()):
        known = name in recorded and name in settings
        if known and not (FREE.fullmatch(name) or (name in GROWS and now > before)):
            more = " (it may only grow)" if name in GROWS else ""
            raise ValueError(
                f"{folder} was written with {name}={before!r}, this run has {now!r}{more}. Resume "
                "with the same, or begin anew."
            )
    return differ


def settings_of(trainer: Any) -> dict[str, Any]:
    """What decides a run, as JSON: its configuration, its model, its rows, its functions."""
    model = states.causal_lm(trainer.model)
    count = sum(sharded.shape_of(p).numel() for p in trainer.model.parameters())
    facts = {
        **trainer.args.to_dict(),
        "world_size": trainer.args.world_size,
        "model": f"{type(model).__name__} of {count} parameters in {model.dtype}",
        "adapter": _adapter_of(trainer.model),
        "rows": _rows(trainer.train_dataset),
        "rewards": trainer.reward_func_names,
        "credit": getattr(trainer.credit, "__name__", None),
        "credit function": _named(trainer.credit),
        # Another Python compiles another code: then it is listed as new, and not compared.
        f"credit code, Python {PYTHON}": _code_of(trainer.credit),
        "signals": _named(trainer.signals),
        "fixed weights": trainer.fixed_weights,
    }
    return json.loads(json.dumps(facts, default=str))


def last_checkpoint(output_dir: str | Path, *, whole: bool = False) -> Path | None:
    """The newest complete, or `whole`, checkpoint; warnings name what is passed over."""
    for path in map(Path, reversed(sort_checkpoints(output_dir))):
        if not (path / MARK).is_file():
            logger.warning("%s has no %s: incomplete, ignored", path, MARK)
            continue
        try:
            _ = check(path) if whole else None
        except ValueError as damage:
            logger.warning("passed over: %s", damage)
            continue
        return path
    return None


def check_weights(
    model: nn.Module, step: int, accelerator: Accelerator, teacher: Iterable[Tensor] = ()
) -> None:
    """Refuse trained weights that are NaN, infinite, or so large that their squares are. Collective.

    `teacher` are those that a teacher has of its own. Raises FloatingPointError on every rank, with
    the step.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    for whose, weights in (("student", trained), ("teacher", teacher)):
        parts = [part for p in weights if (part := sharded.local(p)).numel()]
        largest = torch.nn.utils.get_total_norm(parts, float("inf"))
        bad = (~(largest.float() ** 2).isfinite()).float().to(accelerator.device)
        if accelerator.reduce(bad, reduction="sum") == 0:
            continue
        raise FloatingPointError(
            f"The {whose}'s weights are NaN, infinite or beyond 1e19 after step {step}. Earlier "
            "checkpoints are intact. Begin a new run with a lower learning_rate or max_grad_norm."
        )


def _prints(folder: Path) -> dict[str, list[Any]]:
    """Size and SHA-256 of every file below `folder` but the list itself, by relative name."""
    mine = (MARK, f".{MARK}", UNDER_WAY)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in mine)

    def sha256(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(8) as pool:  # hashing lets other threads run
        hashes = list(pool.map(sha256, files))
    return {
        str(path.relative_to(folder)): [path.stat().st_size, found]
        for path, found in zip(files, hashes, strict=True)
    }


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _refusal(folder: Path, how: str) -> ValueError:
    found = sort_checkpoints(folder.parent)  # oldest first
    before = found.index(str(folder)) if str(folder) in found else 0
    older = [path for path in found[:before] if Path(path, MARK).exists()]
    way = "There is no older checkpoint: begin anew (rlsd run: --if-exists overwrite)"
    if older:
        way = f"The next older checkpoint is {older[-1]}: resume it (rlsd run: --if-exists resume-older)"
    return ValueError(f"{folder}{how}. {way}.")


def _adapter_of(model: nn.Module) -> dict[str, str] | None:
    """The configuration of the trained adapter; None where all weights are trained."""
    if not isinstance(model, PeftModel):
        return None
    config = model.peft_config[model.active_adapter].to_dict()
    # Where the base lies, and what loading sets: the same run elsewhere has them otherwise.
    free = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")
    return {
        name: str(sorted(value) if isinstance(value, set) else value)
        for name, value in config.items()
        if name not in free
    }


def _named(function: Any) -> str | None:
    """A function by its name, with the numbers and texts that a partial binds."""
    if not isinstance(function, partial):
        return function and getattr(function, "__name__", type(function).__name__)
    bound = sorted({**dict(enumerate(function.args)), **function.keywords}.items(), key=str)
    plain = (bool, int, float, str)
    told = {k: v if isinstance(v, plain) else type(v).__name__ for k, v in bound}
    return f"{_named(function.func)} with {told}"


def _code_of(function: Any) -> str | None:
    """A hash of what a function does, not of how it is written down; None where it is no function."""
    bare = function.func if isinstance(function, partial) else function

    def told(constant: Any) -> Any:
        if isinstance(constant, CodeType):
            return [constant.co_code.hex(), constant.co_names, [*map(told, constant.co_consts)]]
        # A set has another order in every process.
        return sorted(map(repr, constant)) if isinstance(constant, frozenset) else repr(constant)

    code = getattr(bare, "__code__", None)
    return code and hashlib.sha256(repr(told(code)).encode()).hexdigest()[:16]


def print_of_fixed(trainer: Any) -> str | None:
    """A hash of a few numbers of each weight that a run depends on and no checkpoint holds.

    Those of a fixed teacher, the reference model, and the base below adapters: whole ones, before
    anything is sharded, of the main process, since others may hold none yet. None for no weights.
    """
    if not trainer.accelerator.is_main_process:
        return None
    weights = [] if trainer.teacher is None else trainer.teacher.fixed_weights()
    if isinstance(trainer.model, PeftModel):
        adapters = tuple(f".{name}." for name in trainer.model.peft_config)
        named = trainer.model.named_parameters()
        base = (p for name, p in named if not any(adapter in name for adapter in adapters))
        weights += [p for p in base if not p.requires_grad]
    if trainer.ref_model is not None:
        weights += trainer.ref_model.parameters()
    parts = map(sharded.local, weights)
    few = [w.flatten()[:: max(1, w.numel() // 16)][:16].float().cpu() for w in parts]
    return hashlib.sha256(torch.cat(few).numpy()).hexdigest()[:16] if few else None


def _rows(dataset: Any) -> str | None:
    """Count and hash of the texts and numbers of a data set's rows; None for a streamed one."""
    if not isinstance(dataset, Dataset):
        return None
    plain = [name for name, kind in dataset.features.items() if isinstance(kind, Value)]
    columns = [dataset[name][:] for name in plain if name != "prompt"]
    digest = hashlib.sha256()
    for row in zip(map(prompt_text, dataset["prompt"][:]), *columns, strict=True):
        digest.update(repr(row).encode())
    return f"{len(dataset)}, SHA-256 {digest.hexdigest()[:16]}"
