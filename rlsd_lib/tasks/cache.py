"""Folders that are written once: the pretrained lab, converted weights, drawn pictures."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def write_once(folder: Path, write: Callable[[Path], object]) -> Path:
    """Return `folder`, written by `write` on the first call; processes that start at once wait.

    `write` fills an empty scratch folder, which gets its name at the end.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as scratch:
                written = Path(scratch) / folder.name
                written.mkdir()
                write(written)
                written.rename(folder)
    return folder
