"""Reading run directories: one manifest, the state of a run, or a whole folder as tidy frames."""

import json
import logging
import math
import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from filelock import FileLock

from rlsd_lib.runs.paths import REPOSITORY, outputs_root

LOCK = ".run.lock"  # in a run directory: whoever has the lock on it writes the run, see `run`
# What every manifest holds, by example.
SHAPE: dict[str, Any] = {
    **{"status": "", "attempt": 0, "parameters": {}, "git": {}, "started": ""},
    "owner": {"pid": 0, "host": ""},
}
DAMAGED = {
    "status": "damaged",
    "error": "its manifest.json cannot be read; --if-exists overwrite sets it aside",
    **dict.fromkeys(("notebook", "seconds"), None),
}
PLAN = "suite.json"  # in a suite's folder: the runs that it is to have, and the commands


logger = logging.getLogger(__name__)


class Runs(NamedTuple):
    """Tidy frames: `runs` has a row per run, `steps` a row per run and step."""

    runs: pd.DataFrame
    steps: pd.DataFrame

    def of_preset(self, preset: str) -> "Runs":
        """Return the runs of one preset, and those that are planned and have not told theirs."""
        return Runs(
            *(frame[frame["preset"].isna() | (frame["preset"] == preset)] for frame in self)
        )


def read_runs(folder: str | Path) -> Runs:
    """Read every run directory at or below `folder`.

    A row of `runs` holds path, group (the folder above), name, status, error, notebook, each
    parameter (and all of them as `parameters`), commit, dirty, started, seconds, and the final
    metrics. A status is as in `state_of`, or "not started" where a suite has planned the run. A row
    of `steps` holds the same identity and one logged line. Raises FileNotFoundError if `folder`
    does not exist; ValueError if a run's file cannot be read, and names it.
    """
    root = Path(folder).resolve()
    if not root.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; runs lie in outputs/ by default")
    paths = sorted({p.parent for mark in ("manifest.json", LOCK) for p in root.rglob(mark)})
    rows, lines = [], []
    for path in paths:
        if manifest_or_none(path) is None and not (path / LOCK).exists():
            logger.warning("%s is no run's: skipped", path / "manifest.json")
            continue
        facts = _facts(path)
        metrics = path / "metrics.json"
        rows.append({**(_read_json(metrics) if metrics.exists() else {}), **facts})
        identity = {k: v for k, v in facts.items() if k not in ("error", "started", "parameters")}
        # Only a run that was cut off may end in half a line.
        logged = read_lines(path / "metrics.jsonl", torn=facts["status"] != "finished")
        lines += [{**row, **identity} for row in logged]
    for file in sorted(root.rglob(PLAN)):
        planned = [
            file.parent / name for plan in _read_json(file)["plans"] for name in plan["runs"]
        ]
        rows += [_identity(path, "not started") for path in planned if path not in paths]
    return Runs(pd.DataFrame(rows), pd.DataFrame(lines))


def runs_folder(named: str | Path = "") -> Path:
    """The folder of runs with this path, from here or from the repository, or name in outputs.

    Without one it is that of the suite in outputs which finished last, every planned run included.
    Raises FileNotFoundError if there is none.
    """
    if named:
        places = (Path(named), REPOSITORY / named, outputs_root() / named)
        found = [place.resolve() for place in places if place.is_dir()]
        missing = f"{named}: no such folder here, in {REPOSITORY} or in {outputs_root()}"
    else:
        ended = {f.parent: _ended(f) for f in outputs_root().glob(f"*/{PLAN}")}
        found = sorted((f for f in ended if ended[f]), key=ended.__getitem__, reverse=True)
        missing = f"no suite has finished in {outputs_root()}"
    if not found:
        raise FileNotFoundError(f"{missing}. Run one (rlsd suite demo), or name a folder of runs.")
    return found[0]


def _ended(plan: Path) -> float:
    """When the last run of a suite finished, in seconds of the clock; 0 where one has not."""
    runs = [plan.parent / name for each in _read_json(plan)["plans"] for name in each["runs"]]
    done = all(state_of(path) == "finished" for path in runs)
    return max((path / "manifest.json").stat().st_mtime for path in runs) if done else 0.0


def is_finished(frame: pd.DataFrame) -> pd.Series:
    """Whether a row is of a finished run; a frame without a status is one run at work, and counts."""
    return frame["status"] == "finished" if "status" in frame else pd.Series(True, frame.index)


def left_out(frame: pd.DataFrame) -> str:
    """Which runs (by `name`, or `path`) a table or figure leaves out as unfinished; "" for none."""
    column = "name" if "name" in frame else "path"
    rows = frame[~is_finished(frame)].drop_duplicates(column)
    if rows.empty:
        return ""
    shown = ", ".join((rows[column] + " (" + rows["status"] + ")").head(4))
    more = ", ..." if len(rows) > 4 else ""
    return f"INCOMPLETE, {len(rows)} left out: {shown}{more}"


def described(runs: Runs) -> str:
    """Folders, finished runs, seeds and commits in a line; what is left out in capitals."""
    frame = runs.runs
    if frame.empty:
        return "no runs"
    finished = frame[is_finished(frame)]
    folders = ", ".join(dict.fromkeys(frame["group"]))
    seeds = sorted(finished["seed"].dropna().unique()) if "seed" in finished else []
    commits = dict.fromkeys(c[:7] for c in finished.get("commit", ()) if isinstance(c, str))
    line = f"{folders}: {len(finished)} of {len(frame)} runs"
    line += f", seed{'s' * (len(seeds) > 1)} {' '.join(f'{x:g}' for x in seeds)}" if seeds else ""
    line += f", commit {' '.join(commits)}" if commits else ""
    missing = left_out(frame)
    return f"{line}. {missing}" if missing else line


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a run directory; FileNotFoundError for none, ValueError for invalid JSON."""
    return _read_json(Path(path) / "manifest.json")


def manifest_or_none(path: Path) -> dict[str, Any] | None:
    """The manifest of the run directory `path`, or None where there is none, or no run's.

    Beside a run's lock file, one that cannot be read stands as `DAMAGED`.
    """
    try:
        manifest = read_manifest(path)
    except FileNotFoundError:  # asking first would miss a run that is overwritten in between
        return None
    except (ValueError, IsADirectoryError):
        manifest = None
    if isinstance(manifest, dict) and all(
        isinstance(manifest.get(name), type(value)) for name, value in SHAPE.items()
    ):
        return manifest
    return {**SHAPE, **DAMAGED} if (path / LOCK).exists() else None


def state_of(path: Path) -> str | None:
    """How a run stands; None for no run.

    finished, failed, interrupted (by ctrl-C or a cluster), damaged, running, or running/killed where
    its owner is gone. One of another host counts as running while its lock file is there, see `run`.
    """
    manifest, lock = manifest_or_none(path), path / LOCK
    if manifest and manifest["status"] != "running":
        return manifest["status"]
    if not lock.exists():
        return "running/killed" if manifest else None
    elsewhere = manifest and manifest["owner"]["host"] != socket.gethostname()
    if elsewhere or _is_locked(lock):
        return "running"
    # Its status is written before the lock is given up: read again, it may have ended just now.
    status = (manifest_or_none(path) or {"status": "running"})["status"]
    return "running/killed" if status == "running" else status


def _is_locked(file: Path) -> bool:
    try:
        # Not at once: another reader may have it for the same instant.
        with FileLock(file).acquire(timeout=0.2, poll_interval=0.02):
            return False
    except OSError:  # a timeout, or somebody else's file
        return True


def owned(path: Path, how: str = "is being written") -> str:
    """Who writes in `path`, and what to do should that process be gone."""
    owner = "a process that has only just begun"
    if manifest := manifest_or_none(path):
        owner = "process {pid} on {host}".format(**manifest["owner"])
    return (
        f"{path} {how} by {owner}. Wait for it or choose another run_dir; if you know that process "
        f"to be gone, delete {path / LOCK}"
    )


def _facts(path: Path) -> dict[str, Any]:
    facts = _identity(path, state_of(path))
    manifest = manifest_or_none(path)
    if manifest is None:  # killed before it could write one
        return facts
    names = ("error", "notebook", "started", "seconds", "parameters")
    kept = {name: manifest[name] for name in names}
    return {**manifest["parameters"], **facts, **kept, **manifest["git"]}


def _identity(path: Path, status: str | None) -> dict[str, Any]:
    names = {"path": str(path), "group": path.parent.name, "name": path.name}
    return {**names, "status": status, "error": None, "parameters": None}


def read_lines(file: Path, *, torn: bool = False) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file if it is there, without a `torn` last line; ValueError for no JSON."""
    lines = file.read_text().split("\n") if file.exists() else [""]
    if torn:
        lines[-1] = ""
    return [_parse(line, f"{file}, line {n}") for n, line in enumerate(lines, 1) if line]


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write JSON as `replace_text` does."""
    replace_text(file, json.dumps(value, indent=2, default=plain) + "\n")


def replace_text(file: Path, text: str) -> None:
    """Replace a file's text in one step: a reader sees the old or the new, never half of one."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_text(text)
    draft.replace(file)


def append_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a JSON-lines file and hand them to the system at once."""
    text = as_lines(rows)
    with file.open("a") as handle:
        handle.write(text)


def as_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as the text of a JSON-lines file."""
    return "".join(json.dumps(row, default=plain) + "\n" for row in rows)


def drop_torn_line(file: Path) -> None:
    """Remove a last line that was cut off, so that the next one begins on a line of its own."""
    if file.exists() and not (text := file.read_text()).endswith("\n"):
        replace_text(file, text[: text.rfind("\n") + 1])


def scalar(name: str, value: Any) -> float | int | str | bool | None:
    """A metric as JSON can hold it, tensors of one number as numbers; TypeError for all else."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"metric {name!r} is {type(value).__name__}: a metric is one number, a string or None"
        ) from error


def plain(value: Any) -> Any:
    """What JSON writes for a value that it does not know: lists for arrays, else its text."""
    return value.tolist() if "tolist" in dir(value) else str(value)


def is_number(value: Any) -> bool:
    """Whether a table cell holds a number that can be shown."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_json(file: Path) -> dict[str, Any]:
    return _parse(file.read_text(), str(file))


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from error
