"""Every training notebook, executed under `preset=smoke` from a foreign working directory."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from hashlib import sha256
from html import unescape
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import nbformat
import numpy as np
import pandas as pd
import pytest
from filelock import FileLock
from forked import forked_kernels
from IPython.display import Markdown

from rlsd_lib.__main__ import main
from rlsd_lib.report import plots
from rlsd_lib.report.learned import course
from rlsd_lib.report.paper_tables import HELD_OUT, compare
from rlsd_lib.runs.execute import execute_notebook
from rlsd_lib.runs.paths import find_notebook
from rlsd_lib.runs.records import read_runs

NOTEBOOKS = (
    "00_tour",
    "10_grpo",
    "11_opd",
    "12_opsd",
    "13_sdpo",
    "14_grpo_opsd",
    "15_rlsd",
    "16_credits",
)
# Their kernels start from nothing, as a user's do.
COLD = {"00_tour", "smoke-vl"}


def execute(name: str, parameters: Mapping[str, Any], folder: Path, **options: Any) -> Path:
    """`execute_notebook`, in a forked kernel where the start is not what is tested."""
    is_cold = COLD & {name, parameters.get("preset")}
    with nullcontext() if is_cold else forked_kernels():
        return execute_notebook(name, parameters, run_dir=folder, **options)


@pytest.fixture
def smoke_run(shared_outputs, tmp_path, monkeypatch) -> Callable[..., Path]:
    """Puts a finished smoke run into a folder; the same run is trained once for all tests.

    It is made from a working directory of its own, in which nothing may be written.
    """
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("RLSD_OUTPUTS", str(shared_outputs))

    def put(folder: Path, name: str, **parameters) -> Path:
        chosen = {"preset": "smoke", **parameters}
        key = sha256(json.dumps([name, chosen], sort_keys=True).encode()).hexdigest()[:10]
        kept = shared_outputs / "runs" / key
        with FileLock(f"{shared_outputs}-{key}.lock"):
            if not (kept / "metrics.json").exists():
                execute(name, chosen, kept, if_exists="overwrite")
        assert not list(elsewhere.iterdir()), "a notebook wrote into the working directory"
        return Path(shutil.copytree(kept, folder))

    return put


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_training_notebook_runs_from_anywhere(name, tmp_path, smoke_run):
    folder = smoke_run(tmp_path / "run", name)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["config"]["method"] == json.loads(json.dumps(manifest["parameters"]["method"]))
    assert len(set(manifest["data"].values())) == 3  # train, test, test without references
    assert json.loads((folder / "metrics.json").read_text())
    assert list((folder / "figures").glob("*.png"))
    assert (folder / "samples.jsonl").read_text().count("\n") >= 8
    if name != "00_tour":
        check_trained(folder)


def check_trained(folder: Path) -> None:
    """Two steps are logged, and what metrics.json says of the model after them is what was kept."""
    metrics = json.loads((folder / "metrics.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for name in ("accuracy", "accuracy_greedy", "pass@2"):
        assert metrics[f"{name}_after_low"] <= metrics[f"{name}_after"]
    kept = json.loads((folder / "evaluation_after.json").read_text())
    assert np.mean(kept["correct"]) == pytest.approx(metrics["accuracy_after"])
    assert np.mean(kept["greedy"]) == pytest.approx(metrics["accuracy_greedy_after"])
    [executed] = (path.read_text() for path in folder.glob("*.ipynb"))
    assert executed.count("95 % interval over problems") == 2  # before, and before beside after
    assert "accuracy_after_low" not in executed, "the table of both, once more, as raw keys"
    assert "in the first of 2 steps" in executed, "a sentence on the course, of any length"


def test_a_run_without_any_advantage_is_shown_all_the_same() -> None:
    """Where every reward of a run is the same, no step has an intervention to draw."""
    steps = pd.DataFrame({"step": [1, 2], "path": "p", "method": "m", "reward": 0.0})
    steps[["rlsd/lambda", "rlsd/intervention", "rlsd/gap_mean"]] = 0.5, np.nan, 0.1
    experiment = MagicMock()
    experiment.config.epsilon_w = 0.2
    for name in ("15_rlsd", "16_credits"):
        cells = nbformat.read(find_notebook(name), as_version=4).cells
        (cell,) = [c for c in cells if "assert" in c.source and "rlsd/intervention" in c.source]
        shown = {"steps": steps, "plots": plots, "course": course, "Markdown": Markdown}
        exec(cell.source, {**shown, "experiment": experiment, "display": MagicMock()})


def test_an_own_credit_is_shown_aligned_trained_and_compared(tmp_path, smoke_run):
    small = {"steps": 2, "seeds": 1, "batches": 2, "problems": 4}
    folder = smoke_run(tmp_path / "run", "01_your_own_credit", **small)
    assert "def my_credit" in json.loads((folder / "manifest.json").read_text())["credit"]
    runs = read_runs(folder / "runs").runs
    assert sorted(runs["method"]) == ["grpo", "mine", "rlsd"]
    assert (runs["status"] == "finished").all()
    assert abs(json.loads((folder / "metrics.json").read_text())["cosine"]) <= 1
    assert {path.stem for path in (folder / "figures").glob("*.png")} >= {"wrong_mine", "alignment"}
    executed = (folder / "01_your_own_credit.ipynb").read_text()
    assert "Not seen: mine" not in executed, "equal answers are no evidence"
    assert "No problem's share of right answers differs" in executed


def test_a_grpo_script_becomes_rlsd_and_four_settings_are_refused(tmp_path, smoke_run):
    folder = smoke_run(tmp_path / "run", "02_from_grpo_to_rlsd", steps=2)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert 0 < metrics["intervention"] <= 0.1 and metrics["dropout_noise"] > 0
    pages = {page.name for page in (folder / "checkpoints" / "rlsd" / "credit").glob("*.html")}
    assert pages == {"step-000001.html", "step-000002.html"}
    executed = unescape((folder / "02_from_grpo_to_rlsd.ipynb").read_text())
    for said in (
        "tensors of weights are equal, bit by bit",
        "needs a 'answers' column",
        "averages the token credit of method='rlsd' away",
        "Dropout is active in",
        "typical_p would draw rollouts from another distribution",
    ):
        assert said in executed, said


def test_a_notebook_trains_on_two_processes(tmp_path, smoke_run):
    """From its parameters cell to the trained weights, which the kernel evaluates."""
    folder = smoke_run(tmp_path / "run", "15_rlsd", num_processes=2)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["launch"]["config"]["use_cpu"] is True
    assert "--num_processes 2" in " ".join(manifest["launch"]["command"])
    check_trained(folder)
    assert (folder / "model" / "model.safetensors").exists()
    # The kernel that launches has the model, rows and sampling of one that trains by itself.
    alone = smoke_run(tmp_path / "alone", "15_rlsd")
    assert len({(run / "evaluation_before.json").read_text() for run in (folder, alone)}) == 1


@pytest.mark.parametrize(
    ("preset", "overrides", "rows"),
    [
        ("smoke-vl", {}, ["base", "rlsd"]),
        ("smoke", {"epsilon_w": 0.3}, ["rlsd (epsilon_w=0.3)"]),
    ],
)
def test_the_papers_recipe_ends_in_table_2(
    preset, overrides, rows, tmp_path, monkeypatch, shared_outputs
):
    """From data to Table 2, offline: what was run is filled in, what was not is a dash."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("RLSD_OUTPUTS", str(shared_outputs))
    parameters = {"preset": preset, "overrides": overrides}
    folder = execute("40_qwen3_vl", parameters, tmp_path / "runs" / "rlsd")
    metrics = json.loads((folder / "metrics.json").read_text())
    table = compare(read_runs(tmp_path / "runs"), preset)
    ours = table.rows[table.rows["from"] == "ours"].set_index("method")
    filled = ours[HELD_OUT][ours[HELD_OUT] != "-"]
    assert filled.index.tolist() == rows
    assert filled[rows[-1]].startswith(f"{100 * metrics['accuracy_after']:.2f}")
    assert (ours.drop(columns=["from", HELD_OUT]) == "-").all(axis=None)
    assert f"ours: {folder}" in table.notes
    executed = (folder / "40_qwen3_vl.ipynb").read_text()
    assert "examples/s" not in executed, "a progress bar is kept in the notebook"
    read = json.loads((folder / "data_report.json").read_text())
    assert ("generated" in read) == (preset == "smoke")  # else counts of what was dropped
    assert (folder / "figures" / "reward.png").exists()
    assert not list(elsewhere.iterdir()), "a notebook wrote into the working directory"


def test_the_report_shows_every_table_and_figure_and_hides_no_run(tmp_path, smoke_run, capsys):
    runs = tmp_path / "some-runs"
    for name in ("10_grpo", "15_rlsd", "12_opsd"):
        smoke_run(runs / name, name)
    (runs / "12_opsd" / "manifest.json").write_text(
        (runs / "12_opsd" / "manifest.json").read_text().replace('"finished"', '"failed"')
    )
    with forked_kernels():
        assert main(["report", str(runs)]) == 0
    page = Path(capsys.readouterr().out.split()[0])
    assert json.loads((page.parent / "metrics.json").read_text()) == {"runs": 2, "incomplete": 1}
    assert "| RLSD is above GRPO" in (page.parent / "claims.md").read_text()
    text = page.read_text()
    assert text.count("INCOMPLETE, 1 left out: 12_opsd (failed)") >= 6  # above, and at every table
    assert text.count('src="data:image/png;base64,') >= 5
    assert re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', text) == []  # nothing from elsewhere
    assert "experiment.train" not in text
    assert "import pandas" not in text  # no code
    assert text.index("What was learned") < text.index("What was measured")
    assert "Not seen: rlsd" in text
    assert not re.search(r"[\[(]'|'[\])]|\.\.\.</td>", text), (
        "a Python repr, or a cell that was cut"
    )
    pictures = {path.stem for path in (page.parent / "figures").glob("*.png")}
    assert {"rollout_best", "rollout_worst"} <= pictures


def test_a_report_without_grpo_and_rlsd_compares_with_the_first_method(tmp_path, smoke_run, capsys):
    smoke_run(tmp_path / "distilled" / "12_opsd", "12_opsd")
    with forked_kernels():
        assert main(["report", str(tmp_path / "distilled")]) == 0
    assert "accuracy - opsd" in Path(capsys.readouterr().out.split()[0]).read_text()


def test_leakage_is_measured_on_the_saved_models_of_finished_runs(tmp_path, smoke_run):
    folders = {name: tmp_path / name for name in ("methods", "controls")}
    smoke_run(folders["methods"] / "grpo", "10_grpo")
    smoke_run(folders["methods"] / "broken", "10_grpo")
    smoke_run(folders["controls"] / "peer", "15_rlsd", overrides={"peer_context": True})
    manifest = folders["methods"] / "broken" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"finished"', '"failed"'))
    parameters = {f"{'runs' if n == 'methods' else n}_dir": str(f) for n, f in folders.items()}
    parameters["preset"] = "smoke"
    found = execute("21_leakage", parameters, tmp_path / "leakage")
    metrics = json.loads((found / "metrics.json").read_text())
    assert metrics["methods_incomplete"] == 1
    assert {"grpo/phrase", "grpo/value", "grpo/privileged view", "grpo/evidence"} < metrics.keys()
    measured = pd.read_csv(found / "leakage.csv")
    assert measured.groupby("suite")["path"].nunique().to_dict() == {"controls": 1, "methods": 1}
    executed = (found / "21_leakage.ipynb").read_text()
    assert "INCOMPLETE, 1 left out: broken (failed)" in executed
    assert "without a saved model: ['methods/broken']" in executed
    pictures = {path.stem for path in (found / "figures").glob("*.png")}
    assert {"rewards_leak_mean", "reward", "measures", "controls"} <= pictures


def test_where_credit_lands_is_measured_on_runs_of_every_suite(tmp_path, smoke_run):
    drift = {"lambda_init": 1.0, "lambda_decay_steps": 0, "teacher_model_kind": "live"}
    for name in ("runs", "ablations"):
        smoke_run(tmp_path / name / "rlsd", "15_rlsd")
    smoke_run(tmp_path / "ablations" / "grpo", "10_grpo")
    for method in ("rlsd", "rlsd_neutral"):
        smoke_run(tmp_path / "drift" / method, "15_rlsd", method=method, overrides=drift)
    broken = smoke_run(tmp_path / "drift" / "broken", "15_rlsd") / "manifest.json"
    broken.write_text(broken.read_text().replace('"finished"', '"failed"'))
    folders = {f"{name}_dir": str(tmp_path / name) for name in ("runs", "ablations", "drift")}
    parameters = {"preset": "smoke", "problems": 8, **folders}
    found = execute("22_credit", parameters, tmp_path / "credit")
    metrics = json.loads((found / "metrics.json").read_text())
    for name in ("auroc_none", "auroc_shuffled"):
        assert 0 <= metrics[name] <= 1
    assert "INCOMPLETE, 1 left out: broken (failed)" in (found / "22_credit.ipynb").read_text()
    assert (found / "figures" / "credit_wrong.png").exists()
    assert (found / "figures" / "drift_smoke_reward.png").exists()


def test_there_is_no_report_without_a_finished_run(tmp_path, capsys):
    assert main(["report", "papr"]) == 2
    assert "papr: no such folder" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    assert "no finished run to report on" in capsys.readouterr().err


@pytest.mark.slow
def test_the_benchmark_prints_ratios(monkeypatch, shared_outputs, capsys):
    monkeypatch.setenv("RLSD_OUTPUTS", str(shared_outputs))
    assert main(["bench", "--preset", "smoke", "--steps", "2", "--rounds", "1"]) == 0
    _, *rows = capsys.readouterr().out.splitlines()
    printed = {line.split()[0]: [float(value) for value in line.split()[1:]] for line in rows}
    grpo, rlsd = printed["GRPO"], printed["RLSD"]
    step, _, _, teacher, peak, ratio, *_ = range(len(rlsd))
    assert rlsd[ratio] == pytest.approx(rlsd[step] / grpo[step], rel=0.05)
    assert 0 < rlsd[teacher] < rlsd[step]
    assert rlsd[peak] > 0
    assert main(["bench", "--preset", "smok"]) == 2
