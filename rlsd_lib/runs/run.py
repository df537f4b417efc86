"""A run is a directory: parameters in, everything out.

`Run.start` claims the directory, `run.log` and `run.finish` fill it, `read_runs` reads any number
of them back into tidy frames. Layout of a run directory:

    manifest.json   what ran, on what, how it ended     metrics.jsonl   one line per step
    metrics.json    the final numbers                   samples.jsonl   rollouts with token credit
    figures/        pictures                            <name>.ipynb    the executed notebook
    evaluation_before.json, evaluation_after.json       scores, problem by problem

One process at a time owns the directory: the one with the operating system's lock on `.run.lock`.
The system drops the lock when that process ends, however it ends, so nothing has to be cleaned up.
Across hosts the lock is certain only on disks that share it (NFS 4, GPFS, Lustre with `-o flock`).
Therefore an unfinished run of another host counts as alive until its lock file is deleted, and two
hosts should not start the same directory in the same second.
"""

import json
import os
import shutil
import socket
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from IPython import get_ipython

from rlsd_lib.runs import paths, provenance
from rlsd_lib.runs.records import (
    LOCK,
    append_lines,
    drop_torn_line,
    manifest_or_none,
    owned,
    owner_of,
    read_lines,
    read_manifest,
    replace_text,
    scalar,
    state_of,
    write_json,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HANDED_ON = "RLSD_RUN"  # environment variable: the directory that a runner claimed for its kernel
IF_EXISTS = ("raise", "overwrite", "resume")
# What the manifest says by itself; `record` may not replace it.
RESERVED = ("status", "error", "attempt", "previous", "resumed", "started", "seconds", "owner")
OF_ATTEMPT = ("attempt", "status", "error", "started", "seconds")  # kept of an attempt gone on with
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

        Under `rlsd run` the runner owns the directory, and its kernel attaches. Elsewhere an
        exception in a later notebook cell marks the run failed. A cell that starts a run may be
        run again in the same kernel: an unfinished run of this very process is begun anew.

        Args:
            run_dir: the directory; "" means the default, see `paths.default_run_dir`.
            parameters: everything that decides the run, as JSON-like values.
            notebook: name or path of the notebook, for its hash and the default directory.
            if_exists: "raise", "overwrite" (start from empty), or "resume" (keep the files of a
                failed or killed run, if there is one, and go on).

        Raises:
            FileExistsError: the directory holds a run that `if_exists` does not give up, another
                process owns it, or it holds files that are no run.
            FileNotFoundError: `notebook` does not exist.
            ValueError: `if_exists` is unknown.
        """
        source = paths.find_notebook(notebook) if notebook else None
        handed = os.environ.get(HANDED_ON)
        if handed and (not str(run_dir) or Path(run_dir).resolve() == Path(handed)):
            run = cls.attach(handed)
            full = {**run.manifest["parameters"], **parameters}
            run._update(parameters=full, seeds=_seeds(full), attached=True)
            return run
        group = source.stem if source else "runs"
        path = Path(run_dir or paths.default_run_dir(group, parameters)).resolve()
        found = manifest_or_none(path)
        if _is_begun_here(path, found):
            _STARTED[path]._lock.release(force=True)
        else:
            _check_allowed(path, if_exists)
        earlier = found if if_exists == "resume" else None
        attempt = found["attempt"] + 1 if found else 1
        # Everything slow comes first: a process that is refused reads in the manifest by whom.
        manifest = {"attempt": attempt, **_manifest(parameters, source, earlier)}
        run = _STARTED[path] = cls(path, attempt, _lock(path, found))
        if earlier:
            for name in ("metrics.jsonl", "samples.jsonl"):
                drop_torn_line(path / name)
            (path / "metrics.json").unlink(missing_ok=True)
        else:
            _empty(path)
        write_json(path / "manifest.json", manifest)
        if shell := get_ipython():
            shell.events.register("post_run_cell", run._after_cell)
        return run

    @classmethod
    def attach(cls, run_dir: str | Path) -> "Run":
        """Open a run that another process owns, for a kernel or a launched worker.

        Raises:
            FileNotFoundError: there is no run in `run_dir`.
        """
        path = Path(run_dir).resolve()
        return cls(path, read_manifest(path)["attempt"])

    @property
    def figures(self) -> Path:
        """The folder for pictures, made when first asked for."""
        (self.path / "figures").mkdir(exist_ok=True)
        return self.path / "figures"

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as it stands on disk."""
        return read_manifest(self.path)

    def record(self, **facts: Any) -> None:
        """Add facts to the manifest, such as `config=...`, `data=...` or `seeds=...`.

        Raises:
            ValueError: a name that the manifest keeps by itself.
        """
        if taken := sorted(set(facts) & set(RESERVED)):
            raise ValueError(f"{', '.join(taken)}: kept by the run itself; use another name")
        self._update(**facts)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl. Values must be numbers, strings or None.

        Raises:
            TypeError: a value of another kind.
            RuntimeError: another attempt has taken the directory over.
        """
        line = {"step": int(step), **{name: scalar(name, v) for name, v in metrics.items()}}
        self._check_mine()
        append_lines(self.path / "metrics.jsonl", [line])

    def add_samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rollouts (text, tokens, credit, ...) to samples.jsonl, one line each."""
        self._check_mine()
        append_lines(self.path / "samples.jsonl", rows)

    def add_evaluation(self, when: str, **scores: Sequence[float]) -> None:
        """Write scores per problem to evaluation_<when>.json, in order: `correct=...`, and others."""
        write_json(self.path / f"evaluation_{when}.json", {k: list(v) for k, v in scores.items()})

    def save_figure(self, figure: "Figure", name: str) -> Path:
        """Save a figure as figures/<name>.png and return its path."""
        path = self.figures / f"{name}.png"
        figure.savefig(path, dpi=150, bbox_inches="tight")
        return path

    def rewind(self, step: int) -> None:
        """Drop logged lines after `step`: a resumed run logs them again from its checkpoint."""
        path = self.path / "metrics.jsonl"
        rows = read_lines(path) if path.exists() else []
        kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= step]
        replace_text(path, "".join(kept))

    def finish(self, metrics: Mapping[str, Any] | None = None) -> None:
        """Write metrics.json and mark the run finished (a runner does so after the last cell)."""
        self._check_mine()
        write_json(self.path / "metrics.json", dict(metrics or {}))
        # The kernel knows its accelerators; the runner that wrote the manifest may not.
        self._update(hardware=provenance.hardware())
        if self._lock:
            self.close("finished")

    def fail(self, error: str) -> None:
        """Mark the run failed, with the reason."""
        self.close("failed", error)

    def close(self, status: str, error: str | None = None) -> None:
        """Write how the run ended and how long it took; its directory is free again."""
        begun = datetime.fromisoformat(self.manifest["started"])
        seconds = round((datetime.now(UTC) - begun).total_seconds(), 2)
        self._update(status=status, error=error, seconds=seconds)
        if self._lock:
            self._lock.release(force=True)

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: Any
    ) -> None:
        if error is not None:
            self.fail(f"{kind.__name__}: {error}")

    def _update(self, **facts: Any) -> None:
        write_json(self.path / "manifest.json", {**self._check_mine(), **facts})

    def _check_mine(self) -> dict[str, Any]:
        """The manifest, if this attempt is still the one that the directory is about."""
        manifest = self.manifest
        if manifest["attempt"] != self.attempt:
            raise RuntimeError(
                f"{self.path} was taken over by attempt {manifest['attempt']}; this is attempt "
                f"{self.attempt}, which was stopped or declared dead. Nothing was written"
            )
        return manifest

    def _after_cell(self, result: Any) -> None:
        error = result.error_before_exec or result.error_in_exec
        now = manifest_or_none(self.path)
        if error is None or now is None:
            return
        # A finished run stays finished, and a run that was begun anew has its own watcher.
        if now["attempt"] == self.attempt and now["status"] != "finished":
            self.fail(f"{type(error).__name__}: {error}")


def _is_begun_here(path: Path, found: Mapping[str, Any] | None) -> bool:
    """Whether the run in `path` is an unfinished one of this kernel."""
    mine = _STARTED.get(path)
    return bool(
        get_ipython()
        and mine
        and found
        and found["attempt"] == mine.attempt
        and found["status"] != "finished"
    )


def _check_allowed(path: Path, if_exists: str) -> None:
    """Refuse to start where a run stands that `if_exists` does not give up."""
    if if_exists not in IF_EXISTS:
        raise ValueError(f"if_exists={if_exists!r}: expected one of {', '.join(IF_EXISTS)}")
    # Files before the state: a run that begins in between is then no foreign file.
    has_files = path.exists() and any(path.iterdir())
    state = state_of(path)
    if state is None and has_files:
        raise FileExistsError(f"{path} holds files but no run: choose another run_dir")
    if state == "running":
        raise FileExistsError(owned(path))
    if if_exists == "resume" and state == "finished":
        raise FileExistsError(f"{path} is finished: there is nothing to resume")
    if if_exists == "raise" and state is not None:
        raise FileExistsError(
            f"{path} already holds a run ({state}). Choose another run_dir, or say "
            'if_exists="overwrite" (--if-exists overwrite) to replace it'
        )


def _lock(path: Path, found: Mapping[str, Any] | None) -> FileLock:
    """The lock on a directory whose manifest still is `found`.

    Raises:
        FileExistsError: another process owns the directory, or has written a run since.
    """
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / LOCK, thread_local=False)
    try:
        lock.acquire(timeout=PATIENCE_SECONDS)
    except Timeout:
        raise FileExistsError(owned(path)) from None
    if manifest_or_none(path) != found:
        lock.release()
        raise FileExistsError(f"{path} was claimed a moment ago by {owner_of(path)}")
    return lock


def _empty(path: Path) -> None:
    """Delete an earlier run's files, the manifest first: half a run must not be resumed."""
    (path / "manifest.json").unlink(missing_ok=True)
    for item in path.iterdir():
        if item.is_dir():
            shutil.rmtree(item)
        elif item.name != LOCK:
            item.unlink()


def _seeds(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if "seed" in name}


def _manifest(
    parameters: Mapping[str, Any], source: Path | None, earlier: Mapping[str, Any] | None
) -> dict[str, Any]:
    last = {name: earlier[name] for name in OF_ATTEMPT} if earlier else None
    return {
        "status": "running",
        "error": None,
        "resumed": earlier is not None,
        "previous": [*earlier["previous"], last] if earlier else [],
        "attached": False,
        "parameters": dict(parameters),
        "seeds": _seeds(parameters),
        "config": None,
        "data": None,
        "notebook": source.name if source else None,
        "notebook_sha256": provenance.file_sha256(source) if source else None,
        "git": provenance.git_state(),
        "packages": provenance.package_versions(),
        "hardware": provenance.hardware(),
        "owner": {"pid": os.getpid(), "host": socket.gethostname()},
        "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "seconds": None,
    }
