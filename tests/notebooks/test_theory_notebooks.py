"""The theory notebooks run from any directory; their asserts are the test."""

from pathlib import Path

import papermill
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("3[0-9]_theory_*.ipynb"))
FASTER = {"37_theory_on_the_lab": {"digits": 2, "pretrain_steps": 360, "problems": 12}}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_theory_notebook_holds_what_it_claims(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "run"
    parameters = {"run_dir": str(run_dir), **FASTER.get(path.stem, {})}
    papermill.execute_notebook(
        path, tmp_path / path.name, parameters, kernel_name="python3", progress_bar=False
    )
    assert list((run_dir / "figures").glob("*.png"))
    assert {entry.name for entry in tmp_path.iterdir()} <= {"run", path.name, "outputs"}


def test_every_statement_has_a_notebook() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == [str(n) for n in range(30, 38)]
