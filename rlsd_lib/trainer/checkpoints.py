"""Checkpoints that are whole or absent: written beside their place, moved into it when complete.

transformers writes straight into `checkpoint-N`, one file after another, so a full disk or a kill
leaves half a checkpoint under the name by which a resume looks for a good one.
"""

import logging
import re
import shutil
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

INCOMPLETE = ".incomplete"  # folder in the output directory in which checkpoints are written

logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; earlier ones are untouched."""


def checkpoint_name(step: int) -> str:
    """Name of the folder of the checkpoint after optimiser step `step`."""
    return f"{PREFIX_CHECKPOINT_DIR}-{step}"


def staging(output_dir: str | Path) -> Path:
    """Where checkpoints of `output_dir` are written until they are complete."""
    return Path(output_dir) / INCOMPLETE


def clear(output_dir: str | Path) -> None:
    """Remove what a save that never ended has left."""
    shutil.rmtree(staging(output_dir), ignore_errors=True)


def publish(output_dir: str | Path, name: str) -> Path:
    """Move the complete checkpoint `name` from staging into its place and return that place.

    Called once per node. Where nodes share the disk, the first rename takes the folder and the
    others find nothing to do.
    """
    source, target = staging(output_dir) / name, Path(output_dir) / name
    try:
        taken = source.rename(staging(output_dir) / f"whole-{name}")
    except FileNotFoundError:
        return target
    if target.exists():  # a folder cannot be renamed over one that holds files
        target.rename(staging(output_dir) / f"replaced-{name}")
    return taken.rename(target)


def is_complete(checkpoint: str | Path) -> bool:
    """Whether a checkpoint folder holds the file that transformers writes last."""
    return (Path(checkpoint) / TRAINER_STATE_NAME).is_file()


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete checkpoint in `output_dir`; incomplete ones are named in a warning."""
    found = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if path.is_dir() and (match := re.fullmatch(r".*-(\d+)", path.name)):
            found[int(match[1])] = path
    for step in sorted(found, reverse=True):
        if is_complete(found[step]):
            return found[step]
        logger.warning("%s has no %s: incomplete, ignored", found[step], TRAINER_STATE_NAME)
    return None


def to_resume(output_dir: str | Path, given: str | bool | None) -> str | None:
    """The checkpoint that `train(resume_from_checkpoint=given)` means; None for a fresh start.

    Raises:
        ValueError: there is no complete checkpoint, or the one that was named is incomplete.
    """
    if not given:
        return None
    if given is not True and is_complete(given):
        return str(given)
    last = last_checkpoint(output_dir)
    if given is not True:
        raise ValueError(
            f"{given} is no complete checkpoint (no {TRAINER_STATE_NAME}). The last complete one "
            f"in {output_dir} is {last.name if last else 'not there'}."
        )
    if last is None:
        raise ValueError(f"{output_dir} holds no complete checkpoint to resume from.")
    return str(last)


def save_error(output_dir: str | Path, name: str, error: Exception) -> CheckpointError:
    """What to tell after `error` kept checkpoint `name` from being written."""
    last = last_checkpoint(output_dir)
    kept = f"{last} is complete and untouched" if last else "there is no earlier checkpoint"
    free = shutil.disk_usage(output_dir).free / 2**30
    return CheckpointError(
        f"{name} could not be written to {output_dir}, which has {free:.1f} GiB free: "
        f"{type(error).__name__}: {error}. What was written of it is removed; {kept}."
    )
