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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from trl.trainer.utils import use_adapter

from rlsd_lib.trainer import sharded
from rlsd_lib.trainer.config import RLSDConfig
from rlsd_lib.trainer.copies import (
    ADAPTER,
    adapter_pairs,
    add_teacher_adapter,
    copy_for_scoring,
    external_for_scoring,
)
from rlsd_lib.trainer.offload import check_offload, to_host, visiting

if TYPE_CHECKING:
    from rlsd_lib.trainer.trainer import RLSDTrainer

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
            model = external_for_scoring(external, args, student)
            self.model = sharded.prepare(model, accelerator)
        elif self.adapter is not None:
            add_teacher_adapter(student)
        elif copies:
            self.model = sharded.prepare(copy_for_scoring(student, args), accelerator)
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
            # Switching freezes one adapter and thaws the other: on the parameters that last.
            sharded.reshard(student)
            with use_adapter(self.accelerator.unwrap_model(student), self.adapter):
                yield student
                sharded.reshard(student)
        elif self.kind == "live":
            yield student
        elif self.offloaded:
            with visiting(self.model, self.accelerator.device):
                yield self.model
        else:
            yield self.model
            sharded.reshard(self.model)

    def age(self, step: int) -> int | None:
        """Optimiser steps since the teacher's weights were the policy's; None if they never were."""
        if self.kind == EXTERNAL:
            return None
        return 0 if self.kind == "live" else step - self.last_sync_step

    def sync(self, student: nn.Module, step: int) -> None:
        """Refresh after optimiser step `step`, if the kind and the interval say so."""
        if self.model is None or not self.is_refreshed or step % self.sync_steps:
            return
        for target, source in self._parameter_pairs(student):
            sharded.move(target, source, self.rate)
        self.last_sync_step = step

    def release(self) -> None:
        """Drop a full copy for good: lambda has reached 0 and will not come back."""
        if self.kind != "live" and self.adapter is None and self.model is not None:
            sharded.free(self.accelerator.unwrap_model(self.model))
        self.model = None
        # The copy holds itself in a cycle (its patched forward); memory should not wait for luck.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def save(self, folder: Path, step: int) -> None:
        """Write the teacher's state into a checkpoint folder. Every rank must call it.

        Parameters are made whole one at a time, on the CPU. A snapshot taken at this very step
        equals the student, so only that fact is written.
        """
        lives = self.model is not None and self.is_refreshed
        same = lives and self.kind == "snapshot" and self.last_sync_step == step
        writes = lives and not same
        whole = {}
        for name, parameter in self._own_parameters().items() if writes else ():
            value = sharded.whole(parameter, self.accelerator)
            if self.accelerator.is_main_process:
                whole[name] = value.contiguous()
        if not self.accelerator.is_main_process:
            return
        if writes:
            save_file(whole, str(folder / WEIGHTS_FILE))
        state = {"kind": self.kind, "last_sync_step": self.last_sync_step}
        state["weights"] = WEIGHTS_FILE if writes else "student" if same else None
        state["released"] = self.model is None
        (folder / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")

    def load(self, folder: Path, student: nn.Module) -> None:
        """Restore what `save` wrote. The student must already hold the checkpoint's weights.

        Raises:
            ValueError: on every rank, if one finds no teacher state, or that of another teacher.
        """
        state = self._read_state(folder)
        if state is None:
            return
        if state["released"]:
            return self.release()
        self.last_sync_step = state["last_sync_step"]
        if state["weights"] == "student":
            for target, source in self._parameter_pairs(student):
                sharded.move(target, source)
        elif state["weights"] is not None:
            with safe_open(str(folder / WEIGHTS_FILE), "pt") as file:
                for name, parameter in self._own_parameters().items():
                    sharded.write(parameter, file.get_tensor(name), self.accelerator)

    def _read_state(self, folder: Path) -> dict[str, Any] | None:
        """The state that `save` wrote, None if there is none and none is needed."""
        problem = self._problem_with(folder)
        # Told to all before anyone raises: a rank that stopped alone would leave the others waiting.
        problems = [text for text in gather_object([problem]) if text is not None]
        if problems:
            raise ValueError(problems[0])
        path = folder / STATE_FILE
        return json.loads(path.read_text()) if path.exists() else None

    def _problem_with(self, folder: Path) -> str | None:
        """Why this rank cannot restore the teacher from a checkpoint folder."""
        path = folder / STATE_FILE
        if not path.exists():
            if not self.is_refreshed:
                return None
            return (
                f"{folder} holds no teacher state ({STATE_FILE}), so the {self.kind!r} teacher "
                "would silently restart from the initial policy. Resume from a checkpoint written "
                "by RLSDTrainer, or use teacher_model_kind='live' or 'base'."
            )
        state = json.loads(path.read_text())
        if state["kind"] != self.kind:
            return (
                f"{folder} was written with teacher_model_kind={state['kind']!r}, this run has "
                f"{self.kind!r}. Resume with the same kind."
            )
        if state["weights"] != WEIGHTS_FILE:
            return None
        if not (folder / WEIGHTS_FILE).exists():
            return f"{folder} holds no {WEIGHTS_FILE} to restore the teacher from."
        with safe_open(str(folder / WEIGHTS_FILE), "pt") as file:
            differ = sorted(set(file.keys()) ^ self._own_parameters().keys())
        if differ:
            return f"{folder / WEIGHTS_FILE} is of another model: its parameters differ in {differ[:5]}."
        return None

    def _own_parameters(self) -> dict[str, nn.Parameter]:
        """What the teacher does not share with the student, by name."""
        parameters = sharded.named(self.accelerator.unwrap_model(self.model))
        if self.adapter is None:
            return parameters
        return {name: p for name, p in parameters.items() if f".{self.adapter}." in name}

    def _parameter_pairs(self, student: nn.Module) -> Iterable[tuple[nn.Parameter, nn.Parameter]]:
        """(teacher, student) parameters, matched by name."""
        student = self.accelerator.unwrap_model(student)
        if self.adapter is not None:
            return adapter_pairs(student)
        return sharded.pairs(self.accelerator.unwrap_model(self.model), student)


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
