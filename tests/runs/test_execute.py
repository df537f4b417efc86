"""Strict papermill: a notebook and its parameters in, a finished or failed run directory out."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path

import nbformat
import papermill
import pytest
from conftest import FINISH, START, NotebookMaker, plain_papermill

from rlsd_lib.__main__ import main
from rlsd_lib.runs import execute
from rlsd_lib.runs.execute import NotebookError, execute_notebook
from rlsd_lib.runs.records import read_lines, read_manifest, read_runs, state_of
from rlsd_lib.runs.run import Run

# A cell after which the kernel ends as one that trains: on a SIGTERM, with a reason of its own.
TRAINED = """import signal
class Stopped(RuntimeError): pass
def stop(*_): raise Stopped("stopped by SIGTERM after step 1 of 2")
signal.signal(signal.SIGTERM, stop)"""


def test_a_notebook_runs_from_a_foreign_folder_inside_its_run_directory(
    make_notebook: NotebookMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = (
        "import os, sys\nfrom pathlib import Path\n"
        "from ipykernel.kernelapp import IPKernelApp\n"
        "assert Path.cwd() == run.path\n"
        "assert IPKernelApp.instance().transport == 'ipc'  # no port that a neighbour may take\n"
        "run.finish({'here': str(Path.cwd()), 'python': sys.executable})"
    )
    source = make_notebook(cells=(START, look))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    monkeypatch.chdir(foreign)
    # What papermill and Jupyter would fill in stays as it is in a path.
    monkeypatch.setenv("RLSD_OUTPUTS", str(tmp_path / "a{seed}$HOME"))
    folder = execute_notebook(source, {"seed": 7, "overrides": {"a": [1, None]}})

    assert list(foreign.iterdir()) == []
    assert folder.parent == tmp_path / "a{seed}$HOME" / "tiny"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == {"here": str(folder), "python": sys.executable}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["notebook_sha256"] == sha256(source.read_bytes()).hexdigest()
    assert manifest["parameters"]["seed"] == 7
    assert manifest["parameters"]["overrides"] == {"a": [1, None]}
    assert (folder / "tiny.ipynb").exists()
    assert execute.HANDED_ON not in os.environ


def test_a_failed_notebook_is_marked_and_its_executed_copy_kept(
    make_notebook: NotebookMaker, tmp_path: Path
) -> None:
    source = make_notebook(cells=(START, FINISH, "assert 1 > 2, 'the figure claims it'"))
    with pytest.raises(NotebookError, match="AssertionError: the figure claims it"):
        execute_notebook(source, run_dir=tmp_path / "a")
    frame = read_runs(tmp_path / "a").runs
    assert frame.loc[0, "status"] == "failed"  # although the notebook had called run.finish
    assert "the figure claims it" in frame.loc[0, "error"]
    executed = nbformat.read(tmp_path / "a" / "tiny.ipynb", as_version=4)
    assert any(cell.get("outputs") for cell in executed.cells)
    with pytest.raises(FileExistsError, match="failed"):
        execute_notebook(source, run_dir=tmp_path / "a")


def test_a_kernel_that_dies_leaves_a_failed_run(
    make_notebook: NotebookMaker, tmp_path: Path
) -> None:
    source = make_notebook(cells=(START, "import os\nos.kill(os.getpid(), 9)", FINISH))
    with pytest.raises(NotebookError, match="died"):
        execute_notebook(source, run_dir=tmp_path / "a")
    assert state_of(tmp_path / "a") == "failed"


@pytest.mark.parametrize(
    ("cell", "reason"),
    [("1", "ctrl-C outside of training"), (TRAINED, "stopped by ctrl-C after step 1 of 2")],
)
def test_ctrl_c_interrupts_a_run_and_says_how_it_goes_on(
    cell: str, reason: str, make_notebook: NotebookMaker, tmp_path: Path
) -> None:
    # In a cell, and not between two, where no handler of a notebook's is anybody's.
    wait = "import time\nrun.log(1, {})\nfor _ in range(600 * (not run.manifest['resumed'])):\n"
    cells = (START, cell, wait + "    time.sleep(0.1)", FINISH)
    source, folder = make_notebook(cells=cells), tmp_path / "a"
    words = ["run", str(source), "-p", "seed=3", "--run-dir", str(folder)]
    command = [sys.executable, "-m", "rlsd_lib", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not (folder / "metrics.jsonl").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130
    assert f"go on with\n  rlsd {' '.join(words)} --if-exists resume" in said
    assert "Traceback" not in said
    assert f"interrupted: {reason}" in said
    assert read_manifest(folder)["error"].startswith(f"Stopped: {reason}")
    assert state_of(folder) == "interrupted"
    assert main([*words, "--if-exists", "resume"]) == 0
    assert state_of(folder) == "finished"


def test_a_run_that_is_begun_must_be_finished(make_notebook: NotebookMaker, tmp_path: Path) -> None:
    with pytest.raises(NotebookError, match=r"without run\.finish"):
        execute_notebook(make_notebook(cells=(START,)), run_dir=tmp_path / "a")
    assert state_of(tmp_path / "a") == "failed"


def test_a_notebook_without_a_run_may_be_executed_too(
    make_notebook: NotebookMaker, tmp_path: Path
) -> None:
    execute_notebook(make_notebook(cells=("1 + 1",)), run_dir=tmp_path / "a")
    assert state_of(tmp_path / "a") == "finished"


def test_a_long_temporary_folder_is_no_place_for_sockets(
    make_notebook: NotebookMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    folder = execute_notebook(make_notebook(), {"seed": 1}, run_dir=tmp_path / "a")
    assert state_of(folder) == "finished"


def test_plain_papermill_claims_by_itself_and_may_run_the_start_cell_again(
    make_notebook: NotebookMaker, tmp_path: Path
) -> None:
    source = make_notebook(cells=(START, 'run.log(1, {"reward": 0.0})', START, FINISH))
    words = str(source), str(tmp_path / "out.ipynb"), {"run_dir": str(tmp_path / "a")}
    plain_papermill(*words)
    assert state_of(tmp_path / "a") == "finished"
    assert [row["reward"] for row in read_lines(tmp_path / "a" / "metrics.jsonl")] == [0.5]
    with pytest.raises(papermill.PapermillExecutionError, match="FileExistsError"):
        plain_papermill(*words)
    assert state_of(tmp_path / "a") == "finished"


def test_plain_papermill_runs_a_notebook_as_often_as_one_likes(
    make_notebook: NotebookMaker, tmp_path: Path
) -> None:
    # In the default directory, where nobody has chosen what is there; and the start cell twice.
    fails = make_notebook("fails", cells=(START, START, "1 / 0"))
    works = make_notebook("works", cells=(START, START, FINISH))
    with pytest.raises(papermill.PapermillExecutionError, match="ZeroDivisionError"):
        plain_papermill(fails, tmp_path / "out.ipynb")
    for _ in range(2):
        done = plain_papermill(works, tmp_path / "out.ipynb")
    runs = read_runs(tmp_path / "outputs").runs
    assert runs["group"].tolist() == ["runs"] * 3
    assert runs["status"].tolist() == ["failed", "finished", "finished"]
    first, second, third = runs["name"]
    assert (second, third) == (f"{first}-2", f"{first}-3")
    said = [cell.outputs[0].text for cell in done.cells[1:3]]
    assert said == [f"{first} is kept (failed).\nThis run is outputs/runs/{third}\n"] * 2
    with pytest.raises(FileExistsError, match=r"failed.*--if-exists resume"):  # batches are strict
        Run.start(parameters={"method": "rlsd", "seed": 0, "rate": 1e-5, "overrides": {}})


def test_a_cell_that_raises_under_plain_papermill_fails_the_run(
    make_notebook: NotebookMaker, tmp_path: Path
) -> None:
    words = str(make_notebook(cells=(START, "1 / 0"))), str(tmp_path / "out.ipynb")
    with pytest.raises(papermill.PapermillExecutionError):
        plain_papermill(*words, {"run_dir": str(tmp_path / "a")})
    run = read_runs(tmp_path / "a").runs.loc[0]
    assert run["status"] == "failed"
    assert run["error"].startswith("ZeroDivisionError")
