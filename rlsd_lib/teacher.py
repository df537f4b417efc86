"""The network behind P_T: how it is made, refreshed, saved, restored and released.

| kind       | full fine-tuning           | PEFT student                    | refreshed              |
|------------|----------------------------|---------------------------------|------------------------|
| `live`     | the policy itself          | the policy itself               | always current         |
| `base`     | frozen copy                | frozen copy of the adapter      | never                  |
| `snapshot` | frozen copy                | frozen copy of the adapter      | every `sync_steps`     |
| `ema`      | frozen copy                | frozen copy of the adapter      | averaged, `sync_steps` |
| external   | another model, frozen      | another model, frozen           | never                  |
"""

import copy
import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedType
from peft import PeftModel
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, use_adapter

from rlsd_lib.config import RLSDConfig
from rlsd_lib.offload import check_offload, to_host, visiting

if TYPE_CHECKING:
    from rlsd_lib.trainer import RLSDTrainer

ADAPTER = "teacher"
EXTERNAL = "external"
STATE_FILE = "rlsd_teacher.json"
WEIGHTS_FILE = "rlsd_teacher.safetensors"


class Teacher:
    """The teacher of one run. `model` is None once it has been released.

    Args:
        student: the policy, after `GRPOTrainer.__init__` has patched its forward.
        args: the run's configuration.
        accelerator: of the trainer; prepares a full copy as TRL prepares a reference model.
        external: another model to learn from, or its path; `args.teacher_model_kind` is ignored.
    """

    def __init__(
        self,
        student: PreTrainedModel | PeftModel,
        args: RLSDConfig,
        accelerator: Accelerator,
        external: PreTrainedModel | str | None = None,
    ) -> None:
        self.kind = args.teacher_model_kind if external is None else EXTERNAL
        self.sync_steps = args.teacher_sync_steps
        self.rate = args.teacher_update_rate if self.kind == "ema" else 1.0
        self.last_sync_step = 0
        self.accelerator = accelerator
        copies = self.kind not in ("live", EXTERNAL)
        self.adapter = ADAPTER if copies and isinstance(student, PeftModel) else None
        self.model: nn.Module | None = student
        if external is not None:
            self.model = _prepare(_for_scoring(_loaded(external, args, student), args), accelerator)
        elif self.adapter is not None:
            add_teacher_adapter(student)
        elif copies:
            self.model = _prepare(copy_for_scoring(student, args), accelerator)
        self.offloaded = args.teacher_offload
        if self.offloaded:
            check_offload(accelerator, self.adapter)
            to_host(self.model, accelerator.device)

    @property
    def is_refreshed(self) -> bool:
        """Whether the teacher has a state of its own that changes over the run."""
        return self.kind in ("ema", "snapshot")

    @contextmanager
    def active(self, student: nn.Module) -> Iterator[nn.Module]:
        """Yield the module to score with. `student` is the policy, wrapped or not.

        An adapter is active only inside this block, so that nothing else (weight sync, saving, the
        optimiser) ever meets it.
        """
        if self.adapter is not None:
            with use_adapter(self.accelerator.unwrap_model(student), self.adapter):
                yield student
        elif self.offloaded:
            with visiting(self.model, self.accelerator.device):
                yield self.model
        else:
            yield student if self.kind == "live" else self.model

    def age(self, step: int) -> int | None:
        """Optimiser steps since the teacher's weights were the policy's; None if they never were."""
        if self.kind == EXTERNAL:
            return None
        return 0 if self.kind == "live" else step - self.last_sync_step

    @torch.no_grad()
    def sync(self, student: nn.Module, step: int) -> None:
        """Refresh after optimiser step `step`, if the kind and the interval say so."""
        if self.model is None or not self.is_refreshed or step % self.sync_steps:
            return
        for target, source in self._parameter_pairs(student):
            if self.rate == 1.0:
                target.data.copy_(source.data)
            else:
                target.data.lerp_(source.data.to(target.data), self.rate)
        self.last_sync_step = step

    def release(self) -> None:
        """Drop a full copy for good: lambda has reached 0 and will not come back."""
        self.model = None
        # The copy holds itself in a cycle (its patched forward); memory should not wait for luck.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def save(self, folder: Path, step: int) -> None:
        """Write the teacher's state into a checkpoint folder (adapters are saved by PEFT).

        A snapshot taken at this very step equals the student, so only that fact is written.
        """
        weights = None
        if self.model is not None and self.is_refreshed and self.adapter is None:
            same = self.kind == "snapshot" and self.last_sync_step == step
            weights = "student" if same else WEIGHTS_FILE
        if not self.accelerator.is_main_process:
            return
        if weights == WEIGHTS_FILE:
            save_model(self.accelerator.unwrap_model(self.model), str(folder / WEIGHTS_FILE))
        state = {"kind": self.kind, "last_sync_step": self.last_sync_step, "weights": weights}
        state["released"] = self.model is None
        (folder / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")

    @torch.no_grad()
    def load(self, folder: Path, student: nn.Module) -> None:
        """Restore what `save` wrote. The student must already hold the checkpoint's weights.

        Raises:
            ValueError: if the checkpoint has no teacher state, or that of another kind.
        """
        state = self._read_state(folder)
        if state is None:
            return
        if state["released"]:
            return self.release()
        self.last_sync_step = state["last_sync_step"]
        if state["weights"] == "student":
            for target, source in self._parameter_pairs(student):
                target.data.copy_(source.data)
        elif state["weights"] is not None:
            load_model(self.accelerator.unwrap_model(self.model), str(folder / state["weights"]))

    def _read_state(self, folder: Path) -> dict[str, Any] | None:
        path = folder / STATE_FILE
        if not path.exists():
            if not self.is_refreshed:
                return None
            raise ValueError(
                f"{folder} holds no teacher state ({STATE_FILE}), so the {self.kind!r} teacher "
                "would silently restart from the initial policy. Resume from a checkpoint written "
                "by RLSDTrainer, or use teacher_model_kind='live' or 'base'."
            )
        state = json.loads(path.read_text())
        if state["kind"] != self.kind:
            raise ValueError(
                f"{folder} was written with teacher_model_kind={state['kind']!r}, this run has "
                f"{self.kind!r}. Resume with the same kind."
            )
        if self.adapter is not None and not (folder / ADAPTER).is_dir():
            raise ValueError(f"{folder} holds no {ADAPTER!r} adapter to restore the teacher from.")
        return state

    def _parameter_pairs(self, student: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """(teacher, student) parameters, matched by name."""
        student = self.accelerator.unwrap_model(student)
        if self.adapter is not None:
            yield from adapter_pairs(student)
            return
        sources = dict(student.named_parameters())
        targets = dict(self.accelerator.unwrap_model(self.model).named_parameters())
        if sources.keys() != targets.keys():
            differ = sorted(sources.keys() ^ targets.keys())[:5]
            raise RuntimeError(f"Teacher and student differ in their parameters, e.g. {differ}.")
        for name, target in targets.items():
            yield target, sources[name]


class TeacherCallback(TrainerCallback):
    """Refreshes the teacher after the optimiser step, and releases it once lambda is 0 for good."""

    def __init__(self, trainer: "RLSDTrainer") -> None:
        self.trainer = trainer

    def on_step_end(self, args: RLSDConfig, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer on every rank, before a checkpoint of the same step is written."""
        teacher = self.trainer.teacher
        if args.teacher_is_over(state.global_step) and teacher.model is not None:
            teacher.release()
        else:
            self.trainer.teacher.sync(self.trainer.model, state.global_step)


def copy_for_scoring(student: PreTrainedModel, args: RLSDConfig) -> PreTrainedModel:
    """A frozen copy of the student that scores tokens through TRL's fused LM head.

    The head's patch keeps the original forward in a closure, so a plain deep copy would answer with
    the student's live weights. The patch is taken off for the copy and put on anew.

    Raises:
        ValueError: if the student is spread over several devices.
    """
    if len(set(getattr(student, "hf_device_map", {}).values())) > 1:
        raise ValueError(
            f"A model split by device_map ({student.hf_device_map}) cannot be copied for a teacher. "
            "Use teacher_model_kind='live', PEFT, or a single device per process."
        )
    patched = student.__dict__.pop("forward")
    try:
        teacher = copy.deepcopy(student)
    finally:
        student.forward = patched
    return _for_scoring(teacher, args)


def _for_scoring(teacher: PreTrainedModel, args: RLSDConfig) -> PreTrainedModel:
    """Freeze a model and give it the fused head, at the student's temperature."""
    add_fused_lm_head(
        teacher, temperature=args.temperature, cast_lm_head_to_fp32=args.cast_lm_head_to_fp32
    )
    return teacher.requires_grad_(False).eval()


def _loaded(
    external: PreTrainedModel | str, args: RLSDConfig, student: PreTrainedModel | PeftModel
) -> PreTrainedModel:
    if not isinstance(external, str):
        # A copy: the caller's model keeps its forward, its mode and its gradients.
        return copy.deepcopy(external)
    settings = {"dtype": student.dtype, **(args.model_init_kwargs or {}), "device_map": None}
    return create_model_from_path(external, **settings)


def add_teacher_adapter(student: PeftModel) -> None:
    """Add a frozen adapter that starts as a copy of the active one.

    Raises:
        ValueError: if the active adapter is not called "default", the name TRL trains.
    """
    if student.active_adapter != "default":
        raise ValueError(
            f"The active adapter is {student.active_adapter!r}; the teacher copies 'default'. "
            "Load the adapter to train under the name 'default'."
        )
    if ADAPTER not in student.peft_config:
        # Adapter initialisation draws random numbers; rollouts must not depend on it.
        with torch.random.fork_rng():
            student.add_adapter(ADAPTER, student.peft_config["default"])
    with torch.no_grad():
        for target, source in adapter_pairs(student):
            target.data.copy_(source.data)
            target.requires_grad_(False)


def adapter_pairs(student: PeftModel) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """(teacher, trained) adapter parameters, matched by name."""
    for name, source in student.named_parameters():
        if ".default." in name:
            yield student.get_parameter(name.replace(".default.", f".{ADAPTER}.")), source


def _prepare(teacher: PreTrainedModel, accelerator: Accelerator) -> nn.Module:
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return prepare_deepspeed(teacher, accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        return prepare_fsdp(teacher, accelerator)
    return accelerator.prepare_model(teacher, evaluation_mode=True)
