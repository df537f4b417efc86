"""`WorkbookTrainer`: an `RLSDTrainer` that stops in order when something around it breaks."""

import logging
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from rlsd_lib.runs.processes import on_sigterm
from rlsd_lib.trainer.trainer import RLSDTrainer

MARK = "complete.json"  # the last file of a checkpoint

logger = logging.getLogger(__name__)


class Stopped(RuntimeError):
    """Training was stopped by a signal, after a checkpoint of its last step was written."""


class WorkbookTrainer(RLSDTrainer):
    """The trainer of `Experiment`: orderly stops, whole checkpoints."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sigterm = StopOnSigterm(self.accelerator)
        self.add_callback(self.sigterm)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As the parent's.

        Raises:
            Stopped: after a SIGTERM, with a checkpoint of the finished step.
            RuntimeError: a checkpoint could not be written; earlier ones are untouched.
        """
        self.sigterm.asked = self.sigterm.stopped = False
        with on_sigterm(self.sigterm.ask):
            output = super().train(*args, **kwargs)
        if self.sigterm.stopped:
            raise Stopped(
                f"stopped by SIGTERM after step {self.state.global_step} of "
                f"{self.state.max_steps}, resumable: {last_checkpoint(self.args.output_dir)}"
            )
        return output

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        try:
            if self.args.should_save:
                (folder / MARK).unlink(missing_ok=True)
            # The parent would delete older checkpoints before the mark of this one is written.
            with patch("transformers.trainer.rotate_checkpoints"):
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                (folder / MARK).write_text(f'{{"step": {self.state.global_step}}}\n')
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            disk = shutil.disk_usage(next(place for place in folder.parents if place.exists()))
            last = last_checkpoint(folder.parent)
            kept = f"{last} is complete and untouched" if last else "there is no earlier checkpoint"
            raise RuntimeError(
                f"{folder.name} could not be written to {folder.parent}, which has "
                f"{disk.free / 2**30:.1f} GiB free: {type(error).__name__}: {error}. What was "
                f"written of it is removed; {kept}."
            ) from error
        if self.args.should_save:
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(str(folder.parent), limit, best, use_mtime=True)
        self.accelerator.wait_for_everyone()


# Signals


class StopOnSigterm(TrainerCallback):
    """On SIGTERM, which clusters send before they kill: finish the step, save, stop, on all ranks."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.asked = self.stopped = False

    def ask(self) -> None:
        """What the signal's handler does."""
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop if any rank got the signal; called on every rank."""
        flag = torch.tensor(float(self.asked), device=self.accelerator.device)
        if self.accelerator.reduce(flag, reduction="sum") > 0:
            logger.warning("SIGTERM: saving after step %s, then stopping", state.global_step)
            self.stopped = control.should_save = control.should_training_stop = True


# Checkpoints


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint in `output_dir`; a warning names newer incomplete ones."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if p.name[11:].isdecimal()]
    for path in sorted(found, key=lambda path: int(path.name[11:]), reverse=True):
        if (path / MARK).is_file():
            return path
        logger.warning("%s has no %s: incomplete, ignored", path, MARK)
    return None
