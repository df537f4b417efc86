"""Folders that are written once: the pretrained lab, converted weights, drawn pictures."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def write_once(folder: Path, write: Callable[[Path], object]) -> Path:
    """Return `folder`, filled by `write` on the first call, whole or not at all; others wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as scratch:
                written = Path(scratch) / folder.name
                written.mkdir()
                write(written)
                written.rename(folder)
    return folder
