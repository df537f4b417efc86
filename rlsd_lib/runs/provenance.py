"""Where a run came from: code, packages, hardware and data, as its manifest records them."""

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from rlsd_lib.runs.paths import REPOSITORY, digest

PACKAGES = ("torch", "trl", "transformers", "accelerate", "datasets", "peft", "vllm", "numpy")


def fingerprint(rows: Iterable[Any]) -> str:
    """SHA-256 over the rows of a data set, in order: two runs on the same data print the same.

    Images are not decoded: the column `key`, a hash of a row's question and images, stands for them.

    Raises:
        ValueError: for rows with images and without a column `key`.
    """
    features = getattr(rows, "features", None) or {}
    # A column of images, or of lists of them.
    inner = {name: getattr(feature, "feature", feature) for name, feature in features.items()}
    images = [name for name, feature in inner.items() if type(feature).__name__ == "Image"]
    if images and "key" not in features:
        raise ValueError(
            f"the column {images[0]!r} holds images, and there is no column 'key' that tells them "
            "apart: add one with a hash of each row's question and image files"
        )
    rows = rows.remove_columns(images) if images else rows
    blank = dict.fromkeys(images, ())  # as JSON, what a row without images holds
    total = hashlib.sha256()
    for row in rows:
        total.update(digest({**row, **blank} if images else row).encode())
    return total.hexdigest()


def git_state(root: Path = REPOSITORY) -> dict[str, Any]:
    """Commit and dirty flag of the checkout that runs; both None where there is none.

    Dirty means that package, notebooks or pins differ from the commit, files not yet added
    included; other files change no result.
    """
    if not (root / "pyproject.toml").is_file():  # installed as a wheel: the folder is not ours
        return {"commit": None, "dirty": None}
    commit = _git(root, "rev-parse", "HEAD")
    code = ("rlsd_lib", "notebooks", "pyproject.toml")
    changes = _git(root, "status", "--porcelain", "--", *code) if commit else None
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(root: Path, *words: str) -> str | None:
    # Without the lock that `git status` takes: killed with the run it would block the next commit.
    command = ["git", "--no-optional-locks", *words]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None  # no git, no checkout or no commit yet: recorded as unknown
    return done.stdout.strip()


def package_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide a result; None where not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and accelerators of this machine.

    Accelerators are known where torch is loaded: a run that never loads it does not use one.
    """
    torch = sys.modules.get("torch")
    cuda = range(torch.cuda.device_count()) if torch else ()
    return {
        "machine": platform.machine(),
        "system": platform.platform(),
        "cpu_cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in cuda],
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }
