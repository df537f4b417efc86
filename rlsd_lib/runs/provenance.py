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

CODE = ("rlsd_lib", "notebooks", "pyproject.toml")
PACKAGES = ("torch", "trl", "transformers", "accelerate", "datasets", "peft", "vllm", "numpy")


def fingerprint(rows: Iterable[Any]) -> str:
    """SHA-256 over the rows of a data set, in order: two runs on the same data print the same.

    Images are not decoded: the column `key`, a hash of a row's question and images, stands for
    them. Raises ValueError for rows with images and without a column `key`.
    """
    features = getattr(rows, "features", None) or {}
    # A column of images, or of lists of them.
    inner = {name: getattr(feature, "feature", feature) for name, feature in features.items()}
    images = [name for name, feature in inner.items() if type(feature).__name__ == "Image"]
    if images and "key" not in features:
        raise ValueError(
            f"the column {images[0]!r} holds images, and there is no column 'key': add a hash of each "
            "row's question and image files"
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
    # Without the lock that `git status` takes: killed with the run it would block the next commit.
    words = ["--no-optional-locks", "status", "--porcelain=v2", "--branch", "--", *CODE]
    # Where a wheel is installed the folder is not ours.
    said = git(root, *words) if (root / "pyproject.toml").is_file() else None
    if said is None:
        return {"commit": None, "dirty": None}
    lines = said.splitlines()
    commit = lines[0].removeprefix("# branch.oid ")
    return {"commit": commit, "dirty": not all(line.startswith("# ") for line in lines)}


def git(folder: Path, *words: str) -> str | None:
    """What `git WORDS` prints in `folder`; None where it fails, or where there is no git."""
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def package_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide a result; None where not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores, memory, and where torch is loaded accelerators of this machine."""
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
