"""Strict papermill: a notebook and its parameters in, a finished run directory out.

papermill warns of unknown parameters, takes any type, creates no folder and runs where the caller
stands. Here the first two are errors, the folder is made, and the notebook runs inside it.
"""

import logging
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import papermill
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from traitlets.config import Config

from rlsd_lib.runs import Interrupted, NotebookError
from rlsd_lib.runs.parameters import complete
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


def execute_notebook(
    notebook: str | Path,
    parameters: Mapping[str, Any] = {},
    *,
    run_dir: str | Path = "",
    if_exists: str = "raise",
) -> Path:
    """Run a notebook in a fresh kernel, inside its run directory; returns that directory.

    The executed copy is written there cell by cell and stays there when the notebook fails. The
    notebook is a path or a name such as "15_rlsd"; `run_dir` and `if_exists` are as in `Run.start`.

    Raises:
        ValueError, TypeError: as `parameters.complete`.
        FileExistsError, FileNotFoundError: as `Run.start`.
        NotebookError: a cell raised, the kernel died, or the notebook began a run and did not
            finish it; the run is marked failed.
        Interrupted: ctrl-C or a SIGTERM, after a checkpoint. The run is marked interrupted. A second
            ctrl-C ends the kernel at once and raises KeyboardInterrupt.
    """
    source = find_notebook(notebook)
    full = complete(source, parameters)
    folder = Path(run_dir or default_run_dir(source.stem, full)).resolve()
    place = {"run_dir": str(folder)} if "run_dir" in full else {}
    run = Run.start(folder, parameters={**full, **place}, notebook=source, if_exists=if_exists)
    told: list[str] = []

    def hand_on(name: str = "SIGTERM") -> None:  # the kernel saves and stops; that ends this run
        told.append(name)
        terminate_children()

    def ctrl_c() -> None:
        if "ctrl-C" in told:
            raise KeyboardInterrupt
        said = "stopping; training saves a checkpoint first, ctrl-C again does not wait"
        sys.stderr.write(f"\n{said}\n")
        hand_on("ctrl-C")

    try:
        with on_sigterm(hand_on), on_sigterm(ctrl_c, signal.SIGINT):
            _run_cells(source, run, {**parameters, **place})
        if run.manifest["attached"] and not (run.path / "metrics.json").exists():
            raise NotebookError("the notebook ended without run.finish(metrics)")
    except Exception as error:
        reason = _stopped(_reason(error), told[0]) if told else _reason(error)
        run.fail(reason)
        if told:
            raise Interrupted(reason.removeprefix("Stopped: ").partition(" (in cell")[0]) from error
        raise NotebookError(f"{reason}; see {run.path / source.name}") from error
    except BaseException as error:  # interrupted: nobody will look for a reason in the notebook
        run.fail(type(error).__name__)
        raise
    run.close()
    return run.path


def _run_cells(source: Path, run: Run, parameters: dict[str, Any]) -> None:
    logging.getLogger("papermill").setLevel(logging.ERROR)  # its warnings are errors here, above
    # papermill formats its paths with the parameters, so a brace must be doubled to stay one.
    source_path, target = (
        str(p).replace("{", "{{").replace("}", "}}") for p in (source, run.path / source.name)
    )
    with sockets_of_its_own() as config:
        papermill.execute_notebook(
            source_path,
            target,
            parameters,
            kernel_name="python3",
            cwd=str(run.path),
            start_timeout=300,  # papermill's 60 s are short where the environment is on a network drive
            # A notebook that trains has steps to show, see `followed`; others count their cells.
            progress_bar="method" not in run.manifest["parameters"] and sys.stderr.isatty(),
            kernel_manager_class=_kernel_manager(run),
            config=config,
        )


@contextmanager
def sockets_of_its_own() -> Iterator[Config]:
    """Jupyter's configuration of a kernel that is reached through files in a temporary folder.

    The five free TCP ports that Jupyter picks by default may be taken when the kernel binds them.
    """
    short = len(gettempdir()) < 70  # the path of a socket has at most 104 characters
    with TemporaryDirectory(prefix="rlsd-", dir=None if short else "/tmp") as folder:
        yield Config(KernelManager={"transport": "ipc", "ip": f"{folder}/kernel"})


def _kernel_manager(run: Run) -> type[AsyncKernelManager]:
    """Starts this interpreter, whatever kernels the user has registered, and hands the run on."""
    variables = {HANDED_ON: str(run.path), "RLSD_OUTPUTS": str(outputs_root()), **KERNEL}
    # Jupyter fills in variables that stand in these texts; a dollar of a path must stay one.
    variables = {name: value.replace("$", "$$") for name, value in variables.items()}
    spec = KernelSpec(**get_kernel_dict(["--IPKernelApp.log_level=CRITICAL"]), env=variables)
    return type("OwnInterpreter", (AsyncKernelManager,), {"kernel_spec": spec})


def _reason(error: BaseException) -> str:
    """One line for the manifest: papermill's own message is a page with the traceback."""
    if isinstance(error, papermill.PapermillExecutionError):
        return f"{error.ename}: {error.evalue} (in cell [{error.exec_count}])"
    return f"{type(error).__name__}: {error}"


def _stopped(reason: str, by: str) -> str:
    """The line for a run that `by` has stopped; its kernel knows of a SIGTERM alone."""
    if reason.startswith("Stopped: "):
        return reason.replace("by SIGTERM", f"by {by}")
    return f"Stopped: {by} outside of training ({reason})"
