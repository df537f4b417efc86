"""The theory notebooks run from any directory; their asserts are the test."""

import math
import re
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import plain_papermill
from forked import forked_kernels

from rlsd_lib import credit
from rlsd_lib.theory import direction, shared
from rlsd_lib.theory import worlds as wo

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("3[0-9]_theory_*.ipynb"))
FASTER = {"37_theory_on_the_lab": {"digits": 1, "pretrain_steps": 280}}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_theory_notebook_holds_what_it_claims(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "run"
    parameters = {"run_dir": str(run_dir), **FASTER.get(path.stem, {})}
    with forked_kernels():
        plain_papermill(path, tmp_path / path.name, parameters)
    assert list((run_dir / "figures").glob("*.png"))
    assert {entry.name for entry in tmp_path.iterdir()} <= {"run", path.name, "outputs"}


def _verdicts() -> dict[str, tuple[str, list[str]]]:
    """The table at the end of 30: of each statement its verdict, and the notebooks behind it."""
    cells = nbformat.read(NOTEBOOKS[0], as_version=4).cells
    [text] = [cell.source.replace(r"\|", "¦") for cell in cells if "| verdict |" in cell.source]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == ["statement", "verdict", "where"]
    return {name: (found, re.findall(r"`(\d\d)`", where)) for name, found, where in rows[2:]}


def test_the_one_table_of_verdicts_says_what_was_found() -> None:
    rows = _verdicts()
    words = (
        "holds|holds under an extra condition|does not hold|definitional|bounded by the schedule"
    )
    numbers = {path.name[:2] for path in NOTEBOOKS}
    for statement, (found, where) in rows.items():
        assert re.match(rf"\*\*({words})\*\*", found), statement
        assert where and set(where) <= numbers, statement
    for path in NOTEBOOKS[1:]:
        assert "| verdict |" not in path.read_text(), path.stem
    found = {statement: verdict for statement, (verdict, _) in rows.items()}
    assert "If it is one, $I = 0$" in found["Theorem 1, I is an irreducible floor"]
    assert "in logits, for a fixed teacher" in found["two phases, noise overtakes signal"]
    assert "in a world without a style channel" in found["Theorem 3, trilemma"]
    assert found["RLSD has all three: a stable objective, improvement, no leak"].startswith(
        "**bounded by the schedule**"
    )
    assert "Prop. 3, the leak begins to grow" in found
    assert "Prop. 3, the leak takes over" in found

    prior, boost = wo.table([0.5, 0.5]), wo.table([[1, 8, 1], [1, 1, 8]])
    old = wo.table([0.8, 0.1, 0.1])
    pull = wo.mean_teacher(prior, shared.tilt(old, boost)) - old
    step = torch.softmax(old.log() + 1e-6 * pull, -1)
    student, teacher = (float(x) / 1e-6 for x in shared.loss_split(prior, boost, old, step))
    assert f"rates {teacher:.3f} and {-student:.3f}" in found[r"Theorem 2, $\Delta_S + \Delta_T$"]

    lams = [credit.lambda_schedule(k, 0.5, 0, 50) for k in range(200)]
    rising = [direction.group_mean_abs(0.9 - 0.36 * math.exp(-k / 40), 8) for k in range(200)]
    for sizes in ([1.0] * 200, rising):
        share = 100 * direction.largest_share_moved(lams, sizes, 0.2)
        assert f"{share:.3f} %" in found["intervention under the schedule"]


def test_every_statement_has_a_notebook() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == [str(n) for n in range(30, 40)]
