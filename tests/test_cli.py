"""The `rlsd` command: user mistakes cost one line, runs come back as a table."""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path

import pytest
from conftest import START, NotebookMaker

import rlsd_lib
from rlsd_lib import __main__ as cli
from rlsd_lib.__main__ import main
from rlsd_lib.experiment.controls import CONTROLS
from rlsd_lib.experiment.presets import PRESETS
from rlsd_lib.methods import METHODS
from rlsd_lib.report.tables import make_table, settings_of
from rlsd_lib.runs import suites
from rlsd_lib.runs.records import read_runs, state_of
from rlsd_lib.runs.run import Run
from rlsd_lib.runs.suites import Suite, jobs_of

MEASURE = (
    'run.finish({"accuracy_before": 0.5, "accuracy_before_low": 0.4, "accuracy_before_high": 0.6,'
    ' "accuracy_after": 0.7 + seed / 10, "accuracy_after_low": 0.6, "accuracy_after_high": 0.8,'
    ' "reward": 0.25, "seconds_per_step": 1.5})'
)


def _finished(path: Path, after: float = 0.7, **parameters: object) -> None:
    given = {"method": "rlsd", "preset": "lab", "seed": 0, **parameters}
    metrics = {f"accuracy_before{end}": 0.5 for end in ("", "_low", "_high")}
    metrics |= {"accuracy_after": after, "accuracy_after_low": 0.6, "accuracy_after_high": 0.8}
    Run.start(path, parameters=given).finish({**metrics, "reward": 0.25})


def test_run_executes_and_names_the_folder(
    make_notebook: NotebookMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(make_notebook(cells=(START, MEASURE)))
    words = ["run", source, "-p", "seed=1", "-p", 'overrides={"a": 1e-3}']
    assert main(words) == 0
    [path] = read_runs(tmp_path / "outputs").runs["path"]
    assert path in capsys.readouterr().out
    assert Path(path).parent == tmp_path / "outputs" / "tiny"
    parameters = json.loads((Path(path) / "manifest.json").read_text())["parameters"]
    assert parameters["seed"] == 1
    assert parameters["overrides"] == {"a": 1e-3}

    assert main(words) == 2  # raise is the default
    assert "already holds a run (finished)" in capsys.readouterr().err
    before = (Path(path) / "manifest.json").read_text()
    assert main([*words, "--if-exists", "skip"]) == 0
    assert "kept" in capsys.readouterr().out
    assert (Path(path) / "manifest.json").read_text() == before


def test_a_failing_cell_gives_status_1_and_its_reason(
    make_notebook: NotebookMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(make_notebook(cells=(START, "raise ValueError('gap is not finite')")))
    assert main(["run", source, "--run-dir", str(tmp_path / "a")]) == 1
    said = capsys.readouterr().err
    assert "ValueError: gap is not finite" in said
    assert str(tmp_path / "a" / "tiny.ipynb") in said
    assert "Traceback" not in said
    # skip keeps finished runs only: the failed one is made again
    assert main(["run", source, "--run-dir", str(tmp_path / "a"), "--if-exists", "skip"]) == 1
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["attempt"] == 2


def test_mistakes_cost_one_line_and_write_nothing(
    make_notebook: NotebookMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, folder = str(make_notebook()), tmp_path / "a"
    for pairs, message in (
        (["sedd=4"], "did you mean 'seed'"),
        (["seed"], "expected name=value"),
        (["seed=four"], "expected int"),
        (["overrides={a: 1}"], "neither JSON nor a Python literal"),
        (["seed=1", "seed=2"], "given twice"),
    ):
        words = [word for pair in pairs for word in ("-p", pair)]
        assert main(["run", source, *words, "--run-dir", str(folder)]) == 2, pairs
        assert message in capsys.readouterr().err
    for words, message in (
        (["rnu", source], "Unknown command 'rnu'. Did you mean 'run'?"),
        (
            ["run", source, "--if-exists", "skipp"],
            "Unknown --if-exists 'skipp'. Did you mean 'skip'?",
        ),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err
    assert main(["run", "99_nothing"]) == 2
    assert "no notebook '99_nothing'" in capsys.readouterr().err
    assert not folder.exists()


def test_an_interrupted_run_says_once_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(options: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", functools.wraps(cli._run)(stop))
    for given in (
        [],
        ["--if-exists", "resume"],
        ["--if-exists", "overwrite"],
        ["--if-exists=skip"],
    ):
        assert main(["run", "15_rlsd", *given]) == 130
        said = capsys.readouterr().err
        assert said.endswith("go on with\n  rlsd run 15_rlsd --if-exists resume\n")


def test_a_checkout_that_was_never_installed_has_a_command_and_a_version(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> Distribution:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(Distribution, "from_name", absent)
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"rlsd {rlsd_lib.__version__}\n"


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    """As `head` after its lines: a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "rlsd_lib", "list"]
    with open(writing, "w") as closed:
        done = subprocess.run(words, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_command_is_installed_and_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    words = [sys.executable, "-m", "rlsd_lib", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "usage: rlsd" in done.stdout
    assert (Path(sys.executable).parent / "rlsd").exists()
    for command in ("run", "suite", "table", "headroom", "report", "list", "plan", "bench"):
        with pytest.raises(SystemExit) as left:
            main([command, "--help"])
        assert left.value.code == 0
        said = capsys.readouterr().out
        assert f"usage: rlsd {command}" in said
        assert re.search(r"\n\n[A-Z][^.]+\.\n\n", said), "a sentence"
        examples = said.split("examples:")[1].strip().splitlines()
        assert [line.strip().startswith(f"rlsd {command}") for line in examples] == [True] * 2


def test_everything_that_has_a_name_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    for names in (METHODS, PRESETS, CONTROLS, suites.SUITES, ("15_rlsd", "epsilon_w=0.2")):
        assert all(re.search(rf"\b{re.escape(name)}\b", said) for name in names)
    assert max(map(len, said.splitlines())) <= 80


def test_a_training_run_is_judged_before_a_directory_or_a_kernel_exists(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "15_rlsd", "-p", "preset=smok"]) == 2
    assert "Did you mean 'smoke'?" in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


# ---- suites -----------------------------------------------------------------------------------


@pytest.fixture
def tiny_suite(make_notebook: NotebookMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_notebook("two", cells=(START, "assert seed != 1, 'seed 1 fails'", MEASURE))
    grid = {"method": ("rlsd",), "seed": (0, 1), "notebook": (str(source),)}
    monkeypatch.setitem(suites.SUITES, "tiny", Suite("for a test", [grid]))


@pytest.mark.usefixtures("tiny_suite")
def test_a_suite_keeps_what_is_finished_and_lists_what_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "outputs" / "tiny"
    assert main(["suite", "tiny"]) == 1
    said = capsys.readouterr()
    assert "[2/2]" in said.out
    assert said.out.count(": done in") == 1
    assert said.out.count(": failed in") == 1
    assert "2 runs: 2 to run" in said.out
    assert re.search(r"\[1/2\].*, about \d:\d\d:\d\d left", said.out)
    [broken] = [p for p in folder.iterdir() if p.name.startswith("rlsd-s1")]
    assert f"failed: {broken}" in said.err
    assert "seed 1 fails" in said.err
    states = {p.name: state_of(p) for p in folder.iterdir() if p.is_dir()}
    assert sorted(states.values()) == ["failed", "finished"]

    [plan] = json.loads((folder / "suite.json").read_text())["plans"]
    assert plan["command"] == "rlsd suite tiny"
    assert set(plan["runs"]) == set(states)
    first = read_runs(folder).runs.set_index("name")["started"]
    assert main(["suite", "tiny", "--list"]) == 0
    assert f"failed      {broken}" in capsys.readouterr().out
    assert main(["suite", "tiny"]) == 1  # and a failed run is told again, but not made again
    said = capsys.readouterr()
    assert said.out.count(": kept") == 1
    assert f"failed before: {broken}" in said.err
    assert "seed 1 fails" in said.err
    assert "--retry-failed" in said.err
    assert first.equals(read_runs(folder).runs.set_index("name")["started"])

    assert main(["suite", "tiny", "--retry-failed"]) == 1
    again = read_runs(folder).runs.set_index("name")["started"]
    changed = first.index[first != again]
    assert [states[name] for name in changed] == ["failed"]


@pytest.mark.usefixtures("tiny_suite")
def test_a_suite_is_checked_before_its_first_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["suite", "tiny", "-p", "sedd=0"]) == 2
    assert "did you mean 'seed'" in capsys.readouterr().err
    assert main(["suite", "demmo"]) == 2
    assert "Did you mean 'demo'" in capsys.readouterr().err
    assert main(["suite", "tiny", "--jobs", "0"]) == 2
    assert main(["suite", "demo", "-p", 'overrides={"epsilon": "x"}', "--list"]) == 2
    assert "epsilon='x'" in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


@pytest.mark.usefixtures("tiny_suite")
def test_changes_reach_every_run_and_collisions_are_refused() -> None:
    changed = jobs_of("tiny", {"overrides": {"a": 1}})
    assert all(job.parameters["overrides"] == {"a": 1} for job in changed)
    assert {j.run_dir for j in changed}.isdisjoint(j.run_dir for j in jobs_of("tiny"))
    with pytest.raises(ValueError, match="is named by both"):
        jobs_of("tiny", {"seed": 0})


# ---- tables -----------------------------------------------------------------------------------


def test_seeds_are_taken_together_with_the_interval_of_their_mean(tmp_path: Path) -> None:
    for seed, after in enumerate((0.6, 0.7, 0.8)):
        _finished(tmp_path / f"s{seed}", after, seed=seed)
    _finished(tmp_path / "g", 0.7, method="grpo")
    rows, notes = make_table(read_runs(tmp_path))
    rlsd, grpo = (rows[rows["method"] == m].iloc[0] for m in ("rlsd", "grpo"))
    # 0.7 +- t(0.975, 2) * 0.1 / sqrt(3) = 0.7 +- 0.248
    assert rlsd["accuracy after"] == "0.700 [0.452, 0.948]"
    assert (rlsd["n"], rlsd["seeds"]) == ("3", "0 1 2")
    assert grpo["accuracy after"] == "0.700 [0.600, 0.800]"
    assert any("n = 1: over problems, not over seeds" in note for note in notes)
    assert "preset" not in rows and "in every row: preset lab" in notes


def test_runs_that_differ_in_more_than_the_seed_stand_apart(tmp_path: Path) -> None:
    _finished(tmp_path / "a")
    _finished(tmp_path / "b", control="shuffled")
    _finished(tmp_path / "c", overrides={"lambda_init": 1.0})
    _finished(tmp_path / "d", max_steps=5)
    rows, _ = make_table(read_runs(tmp_path))
    assert sorted(rows["settings"]) == ["", "control=shuffled", "lambda_init=1.0", "max_steps=5"]
    assert settings_of({"method": "rlsd", "control": "none", "overrides": {}}) == ""


def test_incomplete_runs_stand_under_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _finished(tmp_path / "a")
    Run.start(tmp_path / "b", parameters={"method": "rlsd", "seed": 1}).fail("ValueError: no")
    assert main(["table", str(tmp_path)]) == 0
    table, notes = capsys.readouterr().out.split("\n\n", 1)
    assert "| rlsd" in table
    assert "| 1 |" in table  # n: the failed run gives no number
    assert f"failed, not in the table: {tmp_path / 'b'}: ValueError: no" in notes


def test_absent_columns_show_a_dash(tmp_path: Path) -> None:
    _finished(tmp_path / "a")
    given = {"method": "opsd", "preset": "lab", "seed": 0}
    Run.start(tmp_path / "b", parameters=given).finish({"leak_rate_after": 0.5})
    rows, _ = make_table(read_runs(tmp_path))
    cells = rows.set_index("method")
    assert cells.loc["rlsd", "leak after"] == "-"
    assert cells.loc["opsd", "accuracy after"] == "-"
    assert cells.loc["opsd", "leak after"] == "0.500"
    assert "entropy" not in rows


def test_a_seed_that_stands_twice_is_told(tmp_path: Path) -> None:
    _finished(tmp_path / "a")
    _finished(tmp_path / "b")
    assert any("a seed stands more than once" in n for n in make_table(read_runs(tmp_path)).notes)


def test_other_commits_and_finished_runs_without_metrics_are_told(tmp_path: Path) -> None:
    for seed in (0, 1):
        _finished(tmp_path / f"s{seed}", seed=seed)
    manifest = tmp_path / "s1" / "manifest.json"
    other = {**json.loads(manifest.read_text()), "git": {"commit": "f00", "dirty": True}}
    manifest.write_text(json.dumps(other))
    Run.start(tmp_path / "tour", parameters={"seed": 0}).finish({})
    notes = "\n".join(make_table(read_runs(tmp_path)).notes)
    assert "different commits" in notes
    assert "not committed" in notes
    assert f"finished, no metrics: {tmp_path / 'tour'}" in notes


def test_paths_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _finished(tmp_path / "a")
    (tmp_path / "a" / "figures").mkdir()
    (tmp_path / "a" / "figures" / "curve.png").touch()
    (tmp_path / "a" / "15_rlsd.ipynb").touch()
    assert main(["table", str(tmp_path), "--paths"]) == 0
    said = capsys.readouterr().out
    assert str(tmp_path / "a" / "figures" / "curve.png") in said
    assert str(tmp_path / "a" / "15_rlsd.ipynb") in said


def test_an_empty_folder_says_so_and_an_absent_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["table", str(tmp_path / "empty")]) == 0
    assert "no runs here yet" in capsys.readouterr().out
    assert main(["table", str(tmp_path / "absent")]) == 2
    assert "no such folder" in capsys.readouterr().err
