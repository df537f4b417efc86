"""The paper beside ours, whose cells come from finished runs and from nothing else."""

import json
from pathlib import Path

from rlsd_lib.__main__ import main
from rlsd_lib.report.benchmarks import BENCHMARKS as ROWS
from rlsd_lib.report.paper_numbers import AVERAGE, BENCHMARKS
from rlsd_lib.report.paper_tables import HELD_OUT, compare
from rlsd_lib.report.tables import DASH
from rlsd_lib.runs.records import read_runs
from rlsd_lib.runs.run import Run

PRESET = "smoke-vl"
FACTS = {"method": "rlsd", "preset": PRESET, "seed": 0, "overrides": {}, "max_steps": -1}
FACTS["benchmarks"] = list(BENCHMARKS)


def made(folder: Path, metrics: dict, **parameters) -> Path:
    Run.start(folder, parameters={**FACTS, **parameters}).finish(metrics)
    return folder


def judged(folder: Path, when: str = "after", **shares: float) -> Path:
    """Results of the tool in a run directory; what is not given has a share of one half."""
    chosen = {name: ROWS[name] for name in BENCHMARKS}
    results = {
        "results": {r.task: {r.metric: shares.get(n, 0.5)} for n, r in chosen.items()},
        "n-samples": {r.task: {"effective": r.questions} for r in chosen.values()},
    }
    file = folder / "benchmarks" / when / "results.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(results))
    return folder


def held_out(**values: float) -> dict[str, float]:
    ends = ("", "_low", "_high")
    return {f"accuracy_{when}{end}": value for when, value in values.items() for end in ends}


def cell(folder: Path, row: str, column: str, who: str = "ours", **options) -> str:
    rows = compare(read_runs(folder), PRESET, **options).rows.set_index(["method", "from"])
    return rows.loc[(row, who), column]


def test_without_a_finished_run_every_cell_of_ours_is_a_dash(tmp_path):
    Run.start(tmp_path / "killed", parameters=FACTS)
    judged(tmp_path / "killed")
    table = compare(read_runs(tmp_path), PRESET)
    ours = table.rows[table.rows["from"] == "ours"]
    assert (ours.drop(columns=["method", "from"]) == DASH).all(axis=None)
    assert cell(tmp_path, "base", AVERAGE, "the paper") == "51.49"
    assert cell(tmp_path, "rlsd", HELD_OUT, "the paper") == DASH
    assert "ours: none" in table.notes


def test_cells_come_from_runs_which_are_named(tmp_path):
    run = made(tmp_path / "train", held_out(before=0.25, after=0.5))
    assert cell(tmp_path, "rlsd", "MMMU") == DASH
    judged(judged(run, MMMU=0.7), "before", MMMU=0.6)
    assert cell(tmp_path, "rlsd", "MMMU") == "70.00"  # no standard error, no interval
    assert cell(tmp_path, "rlsd", "MMMU", "the paper") == "67.22"
    assert cell(tmp_path, "base", "MMMU") == "60.00"
    assert cell(tmp_path, "rlsd", HELD_OUT) == "50.00 [50.00, 50.00]"
    assert cell(tmp_path, "base", HELD_OUT) == "25.00 [25.00, 25.00]"
    assert cell(tmp_path, "rlsd", AVERAGE) == "54.00"
    table = compare(read_runs(tmp_path), PRESET)
    assert f"ours: {run}" in table.notes


def test_an_average_needs_every_benchmark(tmp_path):
    judged(made(tmp_path / "a", {}, benchmarks=["MMMU", "MathVista"]))
    made(tmp_path / "b", {}, seed=1, benchmarks=["MMMU", "MathVista", "WeMath"])
    assert cell(tmp_path, "rlsd", "MathVista") == "50.00"
    assert cell(tmp_path, "rlsd", "WeMath") == DASH
    assert cell(tmp_path, "rlsd", AVERAGE) == DASH
    judged(tmp_path / "b", WeMath=0.8)
    assert cell(tmp_path, "rlsd", AVERAGE) == "60.00"


def test_seeds_are_taken_together_and_settings_apart(tmp_path):
    for seed, share in enumerate((0.60, 0.62, 0.64)):
        judged(made(tmp_path / f"s{seed}", {}, seed=seed), MMMU=share)
    judged(made(tmp_path / "wide", {}, overrides={"epsilon_w": 0.5}), MMMU=0.9)
    judged(made(tmp_path / "other", {}, preset="qwen3-vl-8b"), MMMU=0.1)
    mean, _, count = cell(tmp_path, "rlsd", "MMMU").partition(" ")
    assert mean == "62.00"
    assert count.endswith("(n=3)")
    assert cell(tmp_path, "rlsd (epsilon_w=0.5)", "MMMU").startswith("90.00")


def test_the_untrained_model_is_read_from_plain_runs_once_per_seed(tmp_path):
    def run(name: str, before: float, **parameters) -> None:
        made(tmp_path / name, held_out(before=before, after=before), **parameters)

    run("plain", 0.5)
    run("override", 0.1, overrides={"model": "a/copy"})
    run("shuffled", 0.1, control="shuffled")
    run("same seed", 0.5, max_steps=3)
    assert cell(tmp_path, "base", HELD_OUT) == "50.00 [50.00, 50.00]"
    run("another seed", 0.7, seed=1)
    assert cell(tmp_path, "base", HELD_OUT).startswith("60.00")
    assert cell(tmp_path, "base", HELD_OUT).endswith("(n=2)")


def test_a_run_that_is_still_open_counts_only_where_it_is_named(tmp_path):
    folder = tmp_path / "open"
    Run.start(folder, parameters={**FACTS, "method": "grpo"})
    # As in a kernel under a runner, which closes the run after the last cell.
    Run.attach(folder).finish(held_out(before=0.4, after=0.5))
    assert cell(tmp_path, "grpo", HELD_OUT) == DASH
    assert cell(tmp_path, "grpo", HELD_OUT, own=folder) == "50.00 [50.00, 50.00]"
    notes = compare(read_runs(tmp_path), PRESET, own=folder).notes
    assert not any("not in the table" in note for note in notes)


def test_the_command_prints_the_table(tmp_path, capsys):
    judged(made(tmp_path / "train", held_out(before=0.25, after=0.5)), MMMU=0.7)
    assert main(["table", str(tmp_path), "--paper", PRESET]) == 0
    printed = capsys.readouterr().out
    assert "| rlsd      | the paper | 67.22 |" in printed
    assert "| rlsd      | ours      | 70.00 |" in printed
