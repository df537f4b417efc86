"""Where things lie: the repository, its notebooks, and the directory of each run."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlsd_lib.names import nearest

# The folder that holds the package: the repository, when the package is installed editable.
REPOSITORY = Path(__file__).resolve().parents[2]
# What a run is called when these parameters hold these values: nothing.
NEUTRAL = {"overrides": {}, "max_steps": -1, "control": "none", "num_processes": 1}


def outputs_root() -> Path:
    """Where runs and caches lie: RLSD_OUTPUTS, else `outputs` in the installed clone, else here."""
    if told := os.environ.get("RLSD_OUTPUTS"):
        return Path(told).resolve()
    is_clone = (REPOSITORY / "pyproject.toml").is_file()  # not so where a wheel is installed
    return (REPOSITORY if is_clone else Path.cwd()) / "outputs"


def default_run_dir(group: str, parameters: Mapping[str, Any]) -> Path:
    """The folder of a run: its parameter `run_dir`, else outputs/<suite or notebook>/<run_name>."""
    return Path(parameters.get("run_dir") or outputs_root() / group / run_name(parameters))


def short(path: Path) -> str:
    """A run's directory from the folder of all outputs on, for a reader."""
    return "/".join(path.parts[-3:])


def run_name(parameters: Mapping[str, Any]) -> str:
    """What a run is called: <method>-<preset>-s<seed>, a control, a hash of what is not neutral."""
    parts = [str(parameters[k]) for k in ("method", "preset") if parameters.get(k)]
    parts += [f"s{parameters['seed']}"] if "seed" in parameters else []
    rest = settings(parameters)
    parts += [str(rest.pop("control"))] if "control" in rest else []
    parts += [digest(rest)[:6]] if rest else []
    return "-".join(parts).replace(os.sep, "_").lstrip(".") or "run"


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


def find_notebook(name_or_path: str | Path) -> Path:
    """The notebook of a path, or of a name such as "15_rlsd"; FileNotFoundError for none."""
    given = Path(name_or_path)
    file = given if given.suffix == ".ipynb" else given.with_name(given.name + ".ipynb")
    folders = [root / "notebooks" for root in (Path.cwd(), REPOSITORY)]
    for candidate in (file, *(folder / file for folder in folders)):
        if candidate.is_file():
            return candidate.resolve()
    known = sorted({p.stem for folder in folders for p in folder.glob("*.ipynb")})
    raise FileNotFoundError(
        f"no notebook {str(name_or_path)!r}{nearest(given.stem, known)}; looked here and in "
        f"{', '.join(str(f) for f in dict.fromkeys(folders))}"
    )


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON (keys sorted)."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
