"""The network behind P_T: how it is made, refreshed, saved, restored and released.

| kind       | full fine-tuning           | PEFT student                    | refreshed              |
|------------|----------------------------|---------------------------------|------------------------|
| `live`     | the policy itself          | the policy itself               | always current         |
| `base`     | frozen copy                | frozen copy of the adapter      | never                  |
| `snapshot` | frozen copy                | frozen copy of the adapter      | every `sync_steps`     |
| `ema`      | frozen copy                | frozen copy of the adapter      | averaged, `sync_steps` |
| external   | another model, frozen      | another model, frozen           | never                  |
"""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.models.utils import prepare_deepspeed
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, use_adapter

from rlsd_lib.trainer import sharded, upstream
from rlsd_lib.trainer.checks import on_every_rank
from rlsd_lib.trainer.config import RLSDConfig
from rlsd_lib.trainer.sharded import Pairs

ADAPTER = "teacher"
EXTERNAL = "external"
COPIED = ("base", "ema", "snapshot")
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
        self.memory: list[float] = []  # of the credit, in numbers: a checkpoint keeps it too
        self.accelerator = accelerator
        self.adapter = ADAPTER if self.kind in COPIED and isinstance(student, PeftModel) else None
        self.model: nn.Module | None = student
        if self.adapter is not None:
            add_teacher_adapter(student)
        elif self.kind != "live":
            source = student if external is None else external
            self.model = prepare(copy_for_scoring(source, args, student.dtype), accelerator)

    @property
    def is_refreshed(self) -> bool:
        """Whether the teacher has weights of its own that change over the run."""
        return self.kind in ("ema", "snapshot")

    @contextmanager
    def active(self, student: nn.Module) -> Iterator[nn.Module]:
        """Yield the module to score with; the teacher's adapter is active only inside this block."""
        if self.adapter is not None:
            # Switching freezes one adapter and unfreezes the other: needs the sharded parameters.
            sharded.reshard(student)
            with use_adapter(self.accelerator.unwrap_model(student), self.adapter):
                yield student
                sharded.reshard(student)
        elif self.kind == "live":
            yield student
        else:
            yield self.model
            sharded.reshard(self.model)

    def age(self, step: int) -> int | None:
        """Optimiser steps since the teacher's weights were the policy's; None if they never were."""
        if self.kind == EXTERNAL:
            return None
        return 0 if self.kind == "live" else step - self.last_sync_step

    def sync(self, student: nn.Module, step: int) -> None:
        """Refresh after optimiser step `step`, if kind and interval say so."""
        if self.model is not None and self.is_refreshed and step % self.sync_steps == 0:
            self.take(student, step, self.rate)

    def take(self, student: nn.Module, step: int, rate: float = 1.0) -> None:
        """Move a copy by `rate` towards the student of `step`, from which its age counts."""
        if self.kind in COPIED:
            for target, source in self._parameter_pairs(student):
                sharded.move(target, source, rate)
        self.last_sync_step = step

    def release(self) -> None:
        """Free a full copy for good: no later step needs it."""
        if self.kind != "live" and self.adapter is None and self.model is not None:
            sharded.free(self.accelerator.unwrap_model(self.model))
        self.model = None
        # The copy is part of a reference cycle (its patched forward): do not wait for the collector.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def save(self, folder: Path, step: int) -> None:
        """Write the teacher's state into a checkpoint folder, one parameter at a time. Collective.

        Of a snapshot taken at this very step, which equals the student, only that fact is written.
        """
        lives = self.model is not None and (self.is_refreshed or self.adapter is not None)
        same = self.kind == "snapshot" and self.last_sync_step == step
        weights = {}
        for name, parameter in self._own_parameters().items() if lives and not same else ():
            value = sharded.whole(parameter, self.accelerator)
            if self.accelerator.is_main_process:
                weights[name] = value.contiguous()
        if not self.accelerator.is_main_process:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if weights:
            save_file(weights, str(folder / WEIGHTS_FILE))
        state = {"kind": self.kind, "last_sync_step": self.last_sync_step}
        state["weights"] = WEIGHTS_FILE if weights else "student" if lives else None
        state["released"] = self.model is None
        state |= {"memory": self.memory} if self.memory else {}
        (folder / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")

    def load(self, folder: Path, student: nn.Module) -> None:
        """Restore what `save` wrote, once the student is restored; else ValueError. Collective."""
        with on_every_rank():
            state = self._checked_state(folder)
        if state is None:
            return
        self.memory = state.get("memory", [])
        if state["released"]:
            return self.release()
        self.last_sync_step = state["last_sync_step"]
        if state["weights"] == "student":
            self.take(student, self.last_sync_step)
        elif state["weights"] is not None:
            with safe_open(str(folder / WEIGHTS_FILE), "pt") as file:
                for name, parameter in self._own_parameters().items():
                    sharded.write(parameter, file.get_tensor(name), self.accelerator)

    def _checked_state(self, folder: Path) -> dict[str, Any] | None:
        path = folder / STATE_FILE
        state = json.loads(path.read_text()) if path.exists() else None
        if state is None and self.is_refreshed:
            raise ValueError(
                f"{folder} holds no teacher state ({STATE_FILE}) for the {self.kind!r} teacher. Use "
                "a checkpoint of RLSDTrainer, or use teacher_model_kind='live' or 'base'."
            )
        return state

    def trained_weights(self, student: nn.Module) -> list[Tensor]:
        """The teacher's own copies of what the student trains; [] if it is never refreshed."""
        if self.model is None or not self.is_refreshed:
            return []
        return [own for own, trained in self._parameter_pairs(student) if trained.requires_grad]

    def fixed_weights(self) -> list[Tensor]:
        """The teacher's own weights that never change, so that no checkpoint holds them."""
        if self.model is None or self.kind not in ("base", EXTERNAL) or self.adapter is not None:
            return []
        return list(self._own_parameters().values())

    def _own_parameters(self) -> dict[str, nn.Parameter]:
        """What the teacher does not share with the student, by name."""
        parameters = sharded.named(self.accelerator.unwrap_model(self.model))
        if self.adapter is None:
            return parameters
        return {name: p for name, p in parameters.items() if f".{self.adapter}." in name}

    def _parameter_pairs(self, student: nn.Module) -> Pairs:
        """(teacher, student) parameters, matched by name."""
        student = self.accelerator.unwrap_model(student)
        if self.adapter is not None:
            return adapter_pairs(student)
        return sharded.pairs(self.accelerator.unwrap_model(self.model), student)


def copy_for_scoring(
    source: PreTrainedModel | str, args: RLSDConfig, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A frozen copy of a model, or the model at a path, with TRL's fused LM head.

    The caller's model keeps its forward, its mode and its gradients. `dtype` is of a path's model.
    Raises ValueError if a model is spread over several devices.
    """
    if isinstance(source, str):
        settings = {"dtype": dtype, **(args.model_init_kwargs or {}), "device_map": None}
        teacher = create_model_from_path(source, **settings)
    elif len(set(getattr(source, "hf_device_map", {}).values())) > 1:
        raise ValueError(
            f"device_map={source.hf_device_map}: a model in parts cannot be copied for a teacher. Use "
            "teacher_model_kind='live', PEFT, or a single device per process."
        )
    else:
        with upstream.without_fused_head(source):
            teacher = sharded.copy_of(source)
    exact = args.cast_lm_head_to_fp32
    add_fused_lm_head(teacher, temperature=args.temperature, cast_lm_head_to_fp32=exact)
    return teacher.requires_grad_(False).eval()


def prepare(teacher: PreTrainedModel, accelerator: Accelerator) -> nn.Module:
    """Wrap a frozen model for scoring, sharded as the policy will be. Collective."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return prepare_deepspeed(teacher, accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        return upstream.prepare_fsdp2(teacher, accelerator)
    return accelerator.prepare_model(teacher, evaluation_mode=True)


def add_teacher_adapter(student: PeftModel) -> None:
    """Add a frozen copy of the active adapter, which is "default", as TRL trains, or ValueError."""
    if student.active_adapter != "default":
        raise ValueError(
            f"The active adapter is {student.active_adapter!r}: load it under the name 'default'."
        )
    if ADAPTER not in student.peft_config:
        # Adapter initialisation draws random numbers; rollouts must not depend on it.
        with torch.random.fork_rng():
            student.add_adapter(ADAPTER, student.peft_config["default"])
    for target, source in adapter_pairs(student):
        sharded.move(target, source)
        target.requires_grad_(False)


def adapter_pairs(student: PeftModel) -> Pairs:
    """(teacher, trained) adapter parameters, matched by name."""
    parameters = sharded.named(student)
    for name, source in parameters.items():
        if ".default." in name:
            yield parameters[name.replace(".default.", f".{ADAPTER}.")], source
