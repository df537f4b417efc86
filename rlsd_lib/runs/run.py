"""A run is a directory: parameters in, everything out.

`Run.start` claims the directory, `run.log` and `run.finish` fill it, `read_runs` reads any number
of them back into tidy frames. Layout of a run directory:

    manifest.json   what ran, on what, how it ended     metrics.jsonl   one line per step
    metrics.json    the final numbers                   samples.jsonl   rollouts with token credit
    figures/        pictures                            <name>.ipynb    the executed notebook
    evaluation_before.json, evaluation_after.json       scores, problem by problem
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from IPython import get_ipython

from rlsd_lib.runs import paths, provenance
from rlsd_lib.runs.claims import Claim, latest_claim, make_claim, owned
from rlsd_lib.runs.records import (
    append_lines,
    attempts_of,
    drop_torn_line,
    manifest_or_none,
    read_lines,
    read_manifest,
    read_runs,
    replace_text,
    scalar,
    state_of,
    write_json,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Run", "read_manifest", "read_runs", "state_of"]

HANDED_ON = "RLSD_CLAIM"  # environment variable by which a runner gives its claim to the kernel
IF_EXISTS = ("raise", "overwrite", "resume")
# What the manifest says by itself; `record` may not replace it.
RESERVED = ("status", "error", "attempt", "previous", "resumed", "started", "seconds", "owner")


class Run:
    """One open run directory. Made by `Run.start` or `Run.attach`, not by hand."""

    def __init__(self, path: Path, attempt: int, *, attached: bool) -> None:
        self.path = path
        self.attempt = attempt
        self.attached = attached  # someone else claimed the directory and decides how it ended

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

        Under `rlsd run` the directory is claimed already and is only taken over. Elsewhere an
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
        handed = json.loads(os.environ.get(HANDED_ON, "null"))
        if handed and (not str(run_dir) or Path(run_dir).resolve() == Path(handed["run_dir"])):
            run = cls.attach(handed["run_dir"])
            full = {**run.manifest["parameters"], **parameters}
            run._update(parameters=full, seeds=_seeds(full), attached=True)
            return run
        group = source.stem if source else "runs"
        default = run_dir or paths.default_run_dir(group, parameters)
        run, previous = cls._claim(Path(default).resolve(), if_exists)
        write_json(run.path / "manifest.json", _manifest(run, parameters, source, previous))
        run._watch_cells()
        return run

    @classmethod
    def attach(cls, run_dir: str | Path) -> "Run":
        """Open a run that another process claimed, for a launched worker.

        Raises:
            FileNotFoundError: there is no run in `run_dir`.
        """
        path = Path(run_dir).resolve()
        return cls(path, read_manifest(path)["attempt"], attached=True)

    @classmethod
    def _claim(cls, path: Path, if_exists: str) -> tuple["Run", list[dict[str, Any]]]:
        """Claim the directory; returns the run and the attempts that it continues."""
        owner = latest_claim(path)  # first: whoever claims after this makes `make_claim` fail
        state = state_of(path)
        again = get_ipython() is not None and owner is not None and owner.is_mine()
        _check_allowed(path, state, if_exists, owner, again=again and state != "finished")
        claim = make_claim(path, owner.attempt + 1 if owner else 1)
        run = cls(path, claim.attempt, attached=False)
        if if_exists != "resume":
            _empty(path)
            return run, []
        for name in ("metrics.jsonl", "samples.jsonl"):
            drop_torn_line(path / name)
        (path / "metrics.json").unlink(missing_ok=True)
        return run, attempts_of(path)

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
        if not self.attached:
            self.close("finished")

    def fail(self, error: str) -> None:
        """Mark the run failed, with the reason."""
        self.close("failed", error)

    def close(self, status: str, error: str | None = None) -> None:
        """Write how the run ended and how long it took."""
        begun = datetime.fromisoformat(self.manifest["started"])
        seconds = round((datetime.now(UTC) - begun).total_seconds(), 2)
        self._update(status=status, error=error, seconds=seconds)

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

    def _watch_cells(self) -> None:
        if shell := get_ipython():
            shell.events.register("post_run_cell", self._after_cell)

    def _after_cell(self, result: Any) -> None:
        error = result.error_before_exec or result.error_in_exec
        now = manifest_or_none(self.path)
        if error is None or now is None:
            return
        # A finished run stays finished, and a run that was begun anew has its own watcher.
        if now["attempt"] == self.attempt and now["status"] != "finished":
            self.fail(f"{type(error).__name__}: {error}")


def _check_allowed(
    path: Path, state: str | None, if_exists: str, owner: Claim | None, *, again: bool
) -> None:
    """Refuse to start where a run stands that `if_exists` does not give up."""
    if if_exists not in IF_EXISTS:
        raise ValueError(f"if_exists={if_exists!r}: expected one of {', '.join(IF_EXISTS)}")
    files = path.iterdir() if path.exists() else ()
    foreign = any(not file.name.startswith(".claim-") for file in files)
    if state is None and foreign and state_of(path) is None:  # asked again: a run may just begin
        raise FileExistsError(f"{path} holds files but no run: choose another run_dir")
    if again:
        return
    if state == "running":
        # Asked again: it may have claimed after the first look.
        raise FileExistsError(owned(path, latest_claim(path)))
    if if_exists == "resume" and state == "finished":
        raise FileExistsError(f"{path} is finished: there is nothing to resume")
    if if_exists == "raise" and state is not None:
        raise FileExistsError(
            f"{path} already holds a run ({state}). Choose another run_dir, or say "
            'if_exists="overwrite" (--if-exists overwrite) to replace it'
        )


def _empty(path: Path) -> None:
    """Delete an earlier run's files; the claims stay, so that attempts go on counting."""
    for item in path.iterdir():
        if item.is_dir():
            shutil.rmtree(item)
        elif not item.name.startswith(".claim-"):
            item.unlink()


def _seeds(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if "seed" in name}


def _manifest(
    run: Run, parameters: Mapping[str, Any], source: Path | None, previous: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "status": "running",
        "error": None,
        "attempt": run.attempt,
        "resumed": bool(previous),
        "previous": previous,
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
        "owner": latest_claim(run.path)._asdict(),
        "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "seconds": None,
    }
