"""Fixtures for every test: no network, run folders in a temporary place, tiny notebooks."""

import gc
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Before anything imports a library that reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or no sum on a card is exact twice

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
    parser.addoption(
        "--record", action="store_true", help="add what passed to outputs/tables/machines"
    )


def pytest_collection_finish() -> None:
    """Leave what the imports made out of every later garbage collection.

    accelerate collects after each training, and would walk half a million objects every time.
    """
    gc.freeze()


# The rows of the README's hardware table; a test counts for the first that its id matches.
ROWS = {
    r"trainer/test_sharded\.py.*fsdp2": "FSDP2, two processes as one",
    r"trainer/test_sharded\.py.*zero-3": "ZeRO-3, two processes as one",
    r"trainer/test_distributed": "two processes as one (DDP), every method",
    r"test_vllm(_http)?\.py": "vLLM: rollouts and weights at every step (`make test-vllm`)",
    r"gpu/": "what a card can show (`make test-gpu`)",
    r"(test_vlm|lab/|vision)": "images: Qwen3-VL, Qwen2.5-VL, Gemma 3 at toy size",
    r"tests/trainer/": "trainer: traps, teachers, LoRA, shared prompts, resume, against TRL",
    r"tests/theory/|test_theory": "theory, its notebooks too",
    r"tests/notebooks/": "notebooks, end to end",
    r"tests/tasks/": "tasks and graders, on fixtures of the paper's data",
    r"tests/(runs|report|measure|experiment)/": "runs, measures, reports, launch, plan and bench",
    r"": "credit, divergences, methods, command, set-up",
}


def row_of(test: str) -> str:
    """The row of the hardware table that a test, by its id, counts for."""
    return next(row for mark, row in ROWS.items() if re.search(mark, test.lower()))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """With --record, one sentence for each row that tests of this session belong to."""
    if not config.getoption("--record"):
        return
    from rlsd_lib.runs.machines import record

    counts: dict[str, Counter] = {row: Counter() for row in ROWS.values()}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            counts[row_of(report.nodeid)][outcome] += 1
    told = {
        row: ", ".join(f"{number} {outcome}" for outcome, number in found.items())
        for row, found in counts.items()
        if set(found) - {"skipped"}
    }
    folder = Path(__file__).parents[1] / "outputs" / "tables" / "machines"
    terminalreporter.write_line(f"recorded in {record(folder, told)}")


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


def plain_papermill(source: Path, target: Path, parameters: dict[str, Any] | None = None) -> Any:
    """Execute as `papermill SOURCE TARGET` does, but over no TCP port that a neighbour may take."""
    import papermill

    from rlsd_lib.runs.execute import sockets_of_its_own

    with sockets_of_its_own() as config:
        return papermill.execute_notebook(
            source, target, parameters, kernel_name="python3", progress_bar=False, config=config
        )


@pytest.fixture(scope="session")
def shared_outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One place for all workers of this session, so that the small lab is pretrained once.

    Of this session alone: what earlier code wrote must not pass for the work of today's.
    """
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smoke-outputs"


@pytest.fixture(scope="module")
def smoke_lab(shared_outputs: Path) -> tuple:
    """Model and tokenizer of the preset `smoke`: the lab that the training notebooks pretrain."""
    from rlsd_lib.experiment.presets import PRESETS
    from rlsd_lib.tasks.models import load_model

    return load_model("lab", shared_outputs / "cache", **PRESETS["smoke"].model_options)
