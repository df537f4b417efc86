"""Where a run came from: code, packages, hardware, notebook, data, and where its folder goes."""

import difflib
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("torch", "trl", "transformers", "accelerate", "datasets", "peft", "vllm", "numpy")
# What a run is called when these parameters hold these values: nothing.
NEUTRAL = {"overrides": {}, "max_steps": -1, "control": "none", "num_processes": 1}


def project_root(start: Path | None = None) -> Path | None:
    """The nearest folder at or above `start` (default: here) that holds a pyproject.toml."""
    here = (start or Path.cwd()).resolve()
    return next((f for f in (here, *here.parents) if (f / "pyproject.toml").is_file()), None)


def repository_root() -> Path:
    """The folder that holds the package: the repository, when the package is installed editable."""
    return Path(__file__).resolve().parents[2]


def outputs_root() -> Path:
    """Where run folders go: RLSD_OUTPUTS if set, else `outputs` in the project, else here."""
    told = os.environ.get("RLSD_OUTPUTS")
    return Path(told).resolve() if told else (project_root() or Path.cwd()) / "outputs"


def default_run_dir(group: str, parameters: Mapping[str, Any]) -> Path:
    """The folder of a run, from what it is: outputs/<group>/<method>-<preset>-s<seed>[...].

    `group` is a suite's name or a notebook's stem. A control other than "none" stands in the name;
    every other parameter that is not neutral goes into a short hash, so that the same parameters
    always give the same folder and different ones never share it.
    """
    return outputs_root() / group / run_name(parameters)


def run_name(parameters: Mapping[str, Any]) -> str:
    """The last part of a run's folder; see `default_run_dir`."""
    parts = [str(parameters[k]) for k in ("method", "preset") if parameters.get(k)]
    parts += [f"s{parameters['seed']}"] if "seed" in parameters else []
    rest = settings(parameters)
    parts += [str(rest.pop("control"))] if "control" in rest else []
    parts += [digest(rest)[:6]] if rest else []
    return "-".join(parts).replace(os.sep, "_") or "run"


def settings(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What sets a run apart beside method, preset and seed: parameters that are not neutral."""
    named = ("method", "preset", "seed", "run_dir")
    return {
        name: value
        for name, value in parameters.items()
        if name not in named and (name not in NEUTRAL or value != NEUTRAL[name])
    }


def flat_settings(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The `settings` of a run, its overrides among them."""
    rest = settings(parameters)
    return {**rest.pop("overrides", {}), **rest}


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON (keys sorted)."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(rows: Iterable[Any]) -> str:
    """SHA-256 over the rows of a data set, in order: two runs on the same data print the same.

    Raises:
        ValueError: for rows with images and without a column `key` that stands for them.
    """
    total = hashlib.sha256()
    for row in _without_images(rows):
        total.update(digest(row).encode())
    return total.hexdigest()


def _without_images(rows: Iterable[Any]) -> Iterator[Any]:
    """The rows with their images left out, for which the hash in `key` stands: none is decoded."""
    features = getattr(rows, "features", None) or {}
    images = [name for name, feature in features.items() if _is_of_images(feature)]
    if not images:
        yield from rows
        return
    if "key" not in features:
        raise ValueError(
            f"the column {images[0]!r} holds images, and there is no column 'key' that tells them "
            "apart: add one with a hash of each row's question and image files"
        )
    empty: dict[str, list] = {name: [] for name in images}  # what a row without images holds
    for row in rows.remove_columns(images):
        yield {**row, **empty}


def _is_of_images(feature: Any) -> bool:
    inner = getattr(feature, "feature", feature)  # a column of images, or of lists of them
    return type(inner).__name__ == "Image"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def git_state(root: Path | None = None) -> dict[str, Any]:
    """Commit and dirty flag of the checkout that runs; both None where there is none.

    Dirty means that package, notebooks or pins differ from the commit, files not yet added
    included; other files change no result.
    """
    root = root or repository_root()
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

    Accelerators are asked of torch only where torch is loaded already: a run that never loads it
    does not use one, and reading a manifest must not cost the import.
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


def find_notebook(name_or_path: str | Path) -> Path:
    """The notebook file for a path, or for a name such as "15_rlsd" in the notebooks folder.

    Raises:
        FileNotFoundError: there is none; the message names the nearest that exists.
    """
    given = Path(name_or_path)
    file = given if given.suffix == ".ipynb" else given.with_name(given.name + ".ipynb")
    folders = [root / "notebooks" for root in (project_root(), repository_root()) if root]
    for candidate in (file, *(folder / file for folder in folders)):
        if candidate.is_file():
            return candidate.resolve()
    known = sorted({p.stem for folder in folders for p in folder.glob("*.ipynb")})
    raise FileNotFoundError(
        f"no notebook {str(name_or_path)!r}{nearest(given.stem, known)}; looked here and in "
        f"{', '.join(str(f) for f in dict.fromkeys(folders))}"
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an error message: the nearest valid name, or all of them."""
    known = list(known)
    like = alike(name, known)
    return f" (did you mean {like[0]!r}?)" if like else f" (valid: {', '.join(known) or 'none'})"


def alike(name: str, known: Iterable[str], count: int = 1) -> list[str]:
    """At most `count` names that `name` may have been meant for, the nearest first."""
    return difflib.get_close_matches(str(name), list(known), n=count, cutoff=0.5)
