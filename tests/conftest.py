"""Fixtures for every test: no network, run folders in a temporary place, tiny notebooks."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

# Before anything imports a library that reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import nbformat
import pytest

NotebookMaker = Callable[..., Path]

PARAMETERS = (
    'method: str = "rlsd"  # credit function',
    "seed: int = 0",
    "rate: float = 1e-5",
    "overrides: dict = {}",
    'run_dir: str = ""  # "" = default',
)
START = (
    "from rlsd_lib import Run\n"
    "parameters = dict(method=method, seed=seed, rate=rate, overrides=overrides)\n"
    "run = Run.start(run_dir, parameters=parameters)"
)
FINISH = 'run.log(1, {"reward": 0.5})\nrun.finish({"accuracy_after": 0.75})'


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--on-cpu", action="store_true", help="run the tests marked gpu on the CPU, at tiny size"
    )


@pytest.fixture(autouse=True)
def _own_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test writes into the project's outputs, and none inherits a run."""
    monkeypatch.setenv("RLSD_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.delenv("RLSD_RUN", raising=False)


@pytest.fixture
def make_notebook(tmp_path: Path) -> NotebookMaker:
    """A maker of small notebooks: cells of code, the first tagged `parameters`."""

    def make(
        name: str = "tiny",
        cells: Sequence[str] = (START, FINISH),
        parameters: Sequence[str] = PARAMETERS,
    ) -> Path:
        notebook = nbformat.v4.new_notebook(
            metadata={
                "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
            }
        )
        first = nbformat.v4.new_code_cell("\n".join(parameters), metadata={"tags": ["parameters"]})
        notebook.cells = [first, *(nbformat.v4.new_code_cell(cell) for cell in cells)]
        path = tmp_path / f"{name}.ipynb"
        nbformat.write(notebook, path)
        return path

    return make


@pytest.fixture(scope="session")
def shared_outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One place for all workers of this session, so that the small lab is pretrained once.

    Of this session alone: what earlier code wrote must not pass for the work of today's.
    """
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smoke-outputs"
