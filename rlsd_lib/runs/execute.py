"""Strict papermill: a notebook and its parameters in, a finished run directory out.

papermill warns of an unknown parameter, takes any type, creates no folder and runs where the
caller stands. Here each of these is an error or is done.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from rlsd_lib.runs.parameters import check_parameters, read_parameters
from rlsd_lib.runs.paths import default_run_dir, find_notebook, outputs_root
from rlsd_lib.runs.processes import on_sigterm, terminate_children
from rlsd_lib.runs.run import HANDED_ON, Run

KERNEL = {
    "TQDM_DISABLE": "1",  # a bar in a saved notebook is a line per update
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    # The executed copy must hold the figures, whatever backend the caller's shell has set.
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
}


class NotebookError(RuntimeError):
    """A cell raised, the kernel died, or the notebook never finished its run."""


class _OwnInterpreter(AsyncKernelManager):
    """The python3 kernel of this interpreter, whatever kernels the user has registered."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(**get_kernel_dict(["--IPKernelApp.log_level=ERROR"]))


def execute_notebook(
    notebook: str | Path,
    parameters: Mapping[str, Any] | None = None,
    *,
    run_dir: str | Path = "",
    if_exists: str = "raise",
) -> Path:
    """Run a notebook in a fresh kernel, inside its run directory; returns that directory.

    The executed copy is written there cell by cell and stays there when the notebook fails.

    Args:
        notebook: a path, or a name in the notebooks folder such as "15_rlsd".
        parameters: values for names of the notebook's parameters cell.
        run_dir: the run directory; "" means the default for these parameters.
        if_exists: "raise", "overwrite" or "resume", see `Run.start`.

    Raises:
        FileNotFoundError: there is no such notebook.
        ValueError: no parameters cell, or an unknown parameter.
        TypeError: a value does not fit its annotation.
        FileExistsError: the run directory is taken.
        NotebookError: a cell raised, the kernel died, or the notebook began a run and did not
            finish it; the run is marked failed.
    """
    source = find_notebook(notebook)
    declared = read_parameters(source)
    chosen = {**(parameters or {}), **({"run_dir": str(run_dir)} if run_dir else {})}
    check_parameters(source, declared, parameters or {})
    full = {**{p.name: p.default for p in declared.values()}, **chosen}
    folder = Path(full.get("run_dir") or default_run_dir(source.stem, full)).resolve()
    if "run_dir" in declared:
        chosen["run_dir"] = full["run_dir"] = str(folder)
    run = Run.start(folder, parameters=full, notebook=source, if_exists=if_exists)
    try:
        _run_cells(source, run, {k: v for k, v in chosen.items() if k in declared})
        _check_finished(run)
    except Exception as error:
        reason = _reason(error)
        run.fail(reason)
        raise NotebookError(f"{reason}; see {run.path / source.name}") from error
    except BaseException as error:  # interrupted: nobody will look for a reason in the notebook
        run.fail(type(error).__name__)
        raise
    run.close("finished")
    return run.path


def _run_cells(source: Path, run: Run, parameters: dict[str, Any]) -> None:
    import papermill  # a second to import: only when something runs

    handed = json.dumps({"run_dir": str(run.path), "attempt": run.attempt})
    # papermill formats its paths with the parameters, so a brace must be doubled to stay one.
    source_path, target = (
        str(p).replace("{", "{{").replace("}", "}}") for p in (source, run.path / source.name)
    )
    variables = {HANDED_ON: handed, "RLSD_OUTPUTS": str(outputs_root()), **KERNEL}
    told: list[str] = []

    def hand_on() -> None:  # the kernel may save and stop; its end then ends this run
        told.append("SIGTERM")
        terminate_children()

    with _environment(variables), _errors_only("papermill"), on_sigterm(hand_on):
        try:
            papermill.execute_notebook(
                source_path,
                target,
                parameters,
                kernel_name="python3",
                cwd=str(run.path),
                progress_bar=False,
                kernel_manager_class=_OwnInterpreter,
            )
        except Exception as error:
            reason = _reason(error)
            if told and not reason.startswith("Stopped: "):
                raise NotebookError(f"Stopped: SIGTERM outside of training ({reason})") from error
            raise


def _check_finished(run: Run) -> None:
    """A notebook that opens its run must also write its metrics; others need not open one."""
    if run.manifest["attached"] and not (run.path / "metrics.json").exists():
        raise NotebookError("the notebook ended without run.finish(metrics)")


def _reason(error: BaseException) -> str:
    """One line for the manifest: papermill's own message is a page with the traceback."""
    from papermill import PapermillExecutionError

    if isinstance(error, PapermillExecutionError):
        return f"{error.ename}: {error.evalue} (in cell [{error.exec_count}])"
    if isinstance(error, NotebookError):
        return str(error)
    return f"{type(error).__name__}: {error}"


@contextmanager
def _errors_only(logger: str) -> Iterator[None]:
    """Silence a library's warnings: what papermill warns of was checked before, and more."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for what is started inside, and put them back."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
