"""A run is a directory: parameters in, everything out.

    manifest.json   what ran, on what, how it ended     metrics.jsonl   one line per step
    metrics.json    the final numbers                   samples.jsonl   rollouts with token credit
    figures/        pictures                            <name>.ipynb    the executed notebook
    evaluation_before.json, evaluation_after.json       scores, problem by problem

The process with the operating system's lock on `.run.lock` owns the directory; the system drops the
lock when that process ends, however it ends. Not every shared disk carries locks between hosts (NFS
4, GPFS and Lustre with `-o flock` do): an unfinished run of another host counts as alive until its
lock file is deleted, and two hosts should not start the same directory in the same second.
"""

import json
import os
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from fnmatch import fnmatch
from hashlib import sha256
from itertools import chain, count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from IPython import get_ipython

from rlsd_lib.runs import paths, provenance, records

HANDED_ON = "RLSD_RUN"  # environment variable: the directory that a runner claimed for its kernel
INTERRUPTED = ("KeyboardInterrupt", "Stopped: ")  # how the reasons of runs begin that can go on
IF_EXISTS = ("raise", "overwrite", "resume", "resume-older")
# What a resumed run may have otherwise; its trainer judges the steps.
FREE = ("max_steps", "run_dir")
# The files of a run, beside its notebook and those that its manifest lists under `files`.
OWN = (
    *("manifest.json*", "metrics.json*", "samples.jsonl", "evaluation_*.json", "figures/*.png"),
    *("checkpoints/*", "model/*", "workers.log", "worker_errors.jsonl", "training.json"),
    *(records.LOCK, ".*.json*", "*.ipynb_checkpoints/*"),
)
# What the manifest says by itself; `record` may not replace it.
RESERVED = ("status", "error", "attempt", "resumed", "started", "seconds", "owner")
PATIENCE_SECONDS = 0.5  # `state_of` takes the lock for an instant, which must not refuse a start

_STARTED: dict[Path, "Run"] = {}  # by this process; a run's lock must not end with a variable


class Run:
    """One open run directory. Made by `Run.start` or `Run.attach`, not by hand."""

    def __init__(self, path: Path, attempt: int, lock: FileLock | None = None) -> None:
        self.path = path
        self.attempt = attempt
        self._lock = lock  # None: another process owns the directory and decides how the run ended

    @classmethod
    def start(
        cls,
        run_dir: str | Path = "",
        *,
        parameters: Mapping[str, Any],
        notebook: str | Path | None = None,
        if_exists: str = "raise",
    ) -> "Run":
        """Claim a run directory and write its manifest.

        Under `rlsd run` the runner owns the directory, and its kernel attaches. In other kernels
        an exception in a later cell marks the run failed, and the cell that starts a run may be
        executed again: it begins an unfinished run of this kernel anew. What another process has
        left in the default directory stays, and the run gets a directory beside it.

        Args:
            run_dir: the directory; "" means the default, see `paths.default_run_dir`.
            parameters: everything that decides the run, as JSON-like values.
            notebook: name or path of the notebook, for its hash and the default directory.
            if_exists: "raise", "overwrite" (start from empty), "resume" (go on with a failed or
                killed run, if there is one) or "resume-older" (and pass over damaged checkpoints).

        Raises:
            FileExistsError: the directory holds a run that `if_exists` does not give up, another
                process owns it, or it holds files that are of no run.
            FileNotFoundError: `notebook` does not exist.
            ValueError: `if_exists` is unknown, or the run to resume has other parameters.
        """
        source = paths.find_notebook(notebook) if notebook else None
        handed = os.environ.get(HANDED_ON)
        if handed and (not run_dir or Path(run_dir).resolve() == Path(handed)):
            run = cls.attach(handed)
            run._update(parameters={**run.manifest["parameters"], **parameters}, attached=True)
            return run
        group = source.stem if source else "runs"
        path = Path(run_dir or paths.default_run_dir(group, parameters)).resolve()
        if get_ipython() and not run_dir and if_exists == "raise":
            path = _beside(path)
        found = records.manifest_or_none(path)
        if get_ipython() and _is_ours(path):
            _STARTED[path]._lock.release(force=True)
        else:
            _check_allowed(path, if_exists, found, parameters)
        attempt = found["attempt"] + 1 if found else 1
        # Everything slow comes first: a process that is refused reads in the manifest by whom.
        resumed = found is not None and if_exists.startswith("resume")
        manifest = {"attempt": attempt, "if_exists": if_exists, "resumed": resumed}
        manifest |= _manifest(parameters, source)
        if resumed:
            before = {name: found[name] for name in ("attempt", "started", "git")}
            manifest |= {"earlier": [*found.get("earlier", ()), before]}
        run = _STARTED[path] = cls(path, attempt, _lock(path, found))
        if resumed:
            for name in ("metrics.jsonl", "samples.jsonl"):
                records.drop_torn_line(path / name)
            (path / "metrics.json").unlink(missing_ok=True)
        else:
            _empty(path, found)
        records.write_json(path / "manifest.json", manifest)
        if shell := get_ipython():
            shell.events.register("post_run_cell", run._after_cell)
        return run

    @classmethod
    def attach(cls, run_dir: str | Path) -> "Run":
        """Open a run that another process owns; FileNotFoundError where there is none."""
        path = Path(run_dir).resolve()
        return cls(path, records.read_manifest(path)["attempt"])

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as it stands on disk."""
        return records.read_manifest(self.path)

    def record(self, **facts: Any) -> None:
        """Add facts to the manifest, such as `data=...`; ValueError for a name of `RESERVED`."""
        if taken := sorted(set(facts) & set(RESERVED)):
            raise ValueError(f"{', '.join(taken)}: kept by the run itself; use another name")
        # Again: what started the run may not have loaded torch, which knows the accelerators.
        self._update(hardware=provenance.hardware(), **facts)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl. Values must be numbers, strings or None.

        Raises TypeError for a value of another kind; RuntimeError if another attempt has taken the
        directory over.
        """
        line = {"step": int(step), **{name: records.scalar(name, v) for name, v in metrics.items()}}
        self._check_mine()
        records.append_lines(self.path / "metrics.jsonl", [line])

    def add_samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rollouts (text, tokens, credit, ...) to samples.jsonl, one line each."""
        self._check_mine()
        records.append_lines(self.path / "samples.jsonl", rows)

    def add_evaluation(self, when: str, **scores: Sequence[float]) -> None:
        """Write scores per problem to evaluation_<when>.json, in order: `correct=...`, and others."""
        lists = {name: list(values) for name, values in scores.items()}
        records.write_json(self.path / f"evaluation_{when}.json", lists)

    def save_figure(self, figure: Any, name: str) -> Path:
        """Save a figure, or what else has `savefig`, as figures/<name>.png and return its path."""
        path = self.path / "figures" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=150, bbox_inches="tight")
        return path

    def rewind(self, step: int) -> None:
        """Drop logged lines after `step`: a resumed run logs them again from its checkpoint."""
        file = self.path / "metrics.jsonl"
        kept = [row for row in records.read_lines(file) if row["step"] <= step]
        records.replace_text(file, records.as_lines(kept))

    def finish(self, metrics: Mapping[str, Any] = {}) -> None:
        """Write metrics.json and mark the run finished (a runner does so after the last cell)."""
        self._update(hardware=provenance.hardware())
        records.write_json(self.path / "metrics.json", metrics)
        if self._lock:
            self.close()

    def fail(self, error: str) -> None:
        """Mark the run failed, or interrupted, with the reason."""
        self.close(error)

    def close(self, error: str | None = None) -> None:
        """Mark the run finished, or with an `error` failed or interrupted; it is free again."""
        begun = datetime.fromisoformat(self.manifest["started"])
        seconds = round((datetime.now(UTC) - begun).total_seconds(), 2)
        ended = "interrupted" if (error or "").startswith(INTERRUPTED) else "failed"
        status, files = "finished" if error is None else ended, _others(self.path, None)
        self._update(status=status, error=error, seconds=seconds, files=files)
        if self._lock:
            self._lock.release(force=True)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            self.fail(f"{kind.__name__}: {error}")

    def _update(self, **facts: Any) -> None:
        records.write_json(self.path / "manifest.json", {**self._check_mine(), **facts})

    def _check_mine(self) -> dict[str, Any]:
        """The manifest, if this attempt is still the one that the directory is about."""
        manifest = self.manifest
        if manifest["attempt"] != self.attempt:
            raise RuntimeError(
                f"{self.path} was taken over by attempt {manifest['attempt']}; attempt {self.attempt} "
                "was stopped or declared dead. Nothing was written"
            )
        return manifest

    def _is_open(self) -> bool:
        """Whether the directory is still this attempt's, and the run has not finished."""
        now = records.manifest_or_none(self.path)
        return bool(now) and now["attempt"] == self.attempt and now["status"] != "finished"

    def _after_cell(self, result: Any) -> None:
        error = result.error_before_exec or result.error_in_exec
        if error and self._is_open():
            self.fail(f"{type(error).__name__}: {error}")


def _beside(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, ... with no run but an open one of this kernel."""
    names = chain([path], (path.with_name(f"{path.name}-{number}") for number in count(2)))
    free = next(name for name in names if _is_ours(name) or records.state_of(name) is None)
    if free != path:
        kept = f"{path.name} is kept ({records.state_of(path)})."
        sys.stdout.write(f"{kept}\nThis run is {paths.short(free)}\n")
    return free


def _is_ours(path: Path) -> bool:
    return path in _STARTED and _STARTED[path]._is_open()


def _check_allowed(
    path: Path, if_exists: str, found: Mapping[str, Any] | None, parameters: Mapping[str, Any]
) -> None:
    if if_exists not in IF_EXISTS:
        raise ValueError(f"if_exists={if_exists!r}: expected one of {', '.join(IF_EXISTS)}")
    # Files before the state: a run that begins in between is then no foreign file.
    has_files = path.exists() and any(path.iterdir())
    state = records.state_of(path)
    if state is None and has_files:
        raise FileExistsError(f"{path} holds files but no run: choose another run_dir")
    if state == "running":
        raise FileExistsError(records.owned(path))
    if if_exists.startswith("resume") and found is not None:
        if state in ("finished", "damaged"):
            why = "there is nothing" if state == "finished" else "nobody knows what there is"
            raise FileExistsError(f"{path} is {state}: {why} to resume")
        _check_same(path, found["parameters"], parameters)
    if if_exists == "overwrite" and (others := _others(path, found)):
        raise FileExistsError(
            f"{path} holds {', '.join(others[:5])}, which its run has not written, and overwriting "
            "would delete it. Move it elsewhere, or choose another run_dir"
        )
    if if_exists == "raise" and state is not None:
        resume = 'if_exists="resume" (--if-exists resume) goes on with it; '
        again = resume if state != "finished" else ""
        raise FileExistsError(
            f'{path} already holds a run ({state}). {again}if_exists="overwrite" '
            "(--if-exists overwrite) replaces it; or choose another run_dir"
        )


def _lock(path: Path, found: Mapping[str, Any] | None) -> FileLock:
    """Lock a directory whose manifest must still be `found`."""
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / records.LOCK, thread_local=False)
    try:
        lock.acquire(timeout=PATIENCE_SECONDS)
    except Timeout:
        raise FileExistsError(records.owned(path)) from None
    if records.manifest_or_none(path) != found:
        lock.release()
        raise FileExistsError(records.owned(path, "was claimed a moment ago"))
    return lock


def _check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to resume a run with other parameters: its manifest would claim them for old steps."""
    now = json.loads(json.dumps(dict(now), default=records.plain))
    for name in before.keys() & now.keys() - {*FREE}:
        if before[name] != now[name]:
            raise ValueError(
                f"{path} was begun with {name}={before[name]!r}, and this call has {now[name]!r}. "
                "Resume with the same parameters, or choose another run_dir"
            )


def _others(path: Path, found: Mapping[str, Any] | None) -> list[str]:
    """Files below a run directory that the run of manifest `found` has not written."""
    listed = {*(found or {}).get("files", ())} | {(found or {}).get("notebook")}
    files = (str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    foreign = (n for n in files if not any(fnmatch(n, pattern) for pattern in OWN))
    return sorted(set(foreign) - listed)


def _empty(path: Path, found: Mapping[str, Any] | None) -> None:
    """Delete an earlier run's files, the manifest first: half a run must not be resumed.

    A damaged manifest is set aside. What the run has not written stays.
    """
    if found and found["status"] == "damaged":
        (path / "manifest.json").replace(path / "manifest.json.damaged")
    (path / "manifest.json").unlink(missing_ok=True)
    kept = {path / name for name in (*_others(path, found), records.LOCK, "manifest.json.damaged")}
    for item in sorted(path.rglob("*"), reverse=True):  # what a folder holds comes before it
        if item.is_dir() and not item.is_symlink():
            with suppress(OSError):  # not empty
                item.rmdir()
        elif item not in kept:
            item.unlink()


def _manifest(parameters: Mapping[str, Any], source: Path | None) -> dict[str, Any]:
    return {
        "status": "running",
        "error": None,
        "attached": False,
        "parameters": dict(parameters),
        "config": None,
        "data": None,
        "notebook": source.name if source else None,
        "notebook_sha256": sha256(source.read_bytes()).hexdigest() if source else None,
        "git": provenance.git_state(),
        "packages": provenance.package_versions(),
        "hardware": provenance.hardware(),
        "owner": {"pid": os.getpid(), "host": socket.gethostname()},
        "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "seconds": None,
    }
