"""The paper beside ours, whose cells come from finished runs and from nothing else."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from synthetic import write_folder

from rlsd_lib.report import benchmarks, paper_tables
from rlsd_lib.report.benchmarks import VISION, judge
from rlsd_lib.report.paper_numbers import AVERAGE, BENCHMARKS, table_2
from rlsd_lib.report.paper_tables import HELD_OUT, compare, dropped, open_items
from rlsd_lib.report.tables import DASH
from rlsd_lib.runs.records import read_manifest, read_runs
from rlsd_lib.runs.run import Run

PRESET = "smoke-vl"
ENDS = ("", "_low", "_high")


def made(folder: Path, metrics: dict, *, finish: bool = True, **parameters) -> Path:
    facts = {"method": "rlsd", "preset": PRESET, "seed": 0, "overrides": {}, "max_steps": -1}
    run = Run.start(folder, parameters={**facts, **parameters})
    if finish:
        run.finish(metrics)
    return folder


def shares(**values: float) -> dict[str, float | None]:
    """Metrics of an evaluation run, with an interval of two points on either side."""
    ends = (("", 0.0), ("_low", -0.02), ("_high", 0.02))
    return {f"benchmark/{name}{e}": value + d for name, value in values.items() for e, d in ends}


def ours(folder: Path, row: str, column: str, **options) -> str:
    table, _ = compare(read_runs(folder), BENCHMARKS, PRESET, **options)
    return table.loc[row, (column, "ours")]


def test_ours_and_the_papers_stand_in_columns_of_their_own(tmp_path: Path) -> None:
    runs = read_runs(write_folder(tmp_path, ["grpo", "opd"]))
    rows = paper_tables.beside_paper(runs, runs).rows.set_index("method")
    printed = rows.loc[table_2().index, "paper: average"]
    assert printed.astype(float).to_dict() == table_2()["average"].to_dict()
    assert rows.loc["opd", "paper: average"] == "-"
    assert rows.loc["grpo", "lab: accuracy"].startswith("80.0 [")
    assert rows.loc["base", "lab: accuracy"] == "50.0 [50.0, 50.0]"
    assert rows.loc["rlsd", "lab: accuracy"] == "-"


def test_without_a_run_every_cell_of_ours_is_a_dash(tmp_path):
    made(tmp_path / "killed", shares(MMMU=0.7), finish=False)
    table, sources = compare(read_runs(tmp_path), BENCHMARKS, PRESET)
    assert (table.xs("ours", axis=1, level=1) == DASH).all(axis=None)
    assert table.loc["rlsd", ("MMMU", "paper")] == "67.22"
    assert table.loc["base", (AVERAGE, "paper")] == "51.49"
    assert table.loc["rlsd", (HELD_OUT, "paper")] == DASH
    assert sources.empty
    table, _ = compare(read_runs(tmp_path), [], PRESET)
    assert (table.xs("ours", axis=1, level=1) == DASH).all(axis=None)


def test_cells_come_from_runs_which_are_named(tmp_path):
    held = {"accuracy_before": 0.25, "accuracy_after": 0.5}
    trained = made(
        tmp_path / "train", {k + e: v for k, v in held.items() for e in ("", "_low", "_high")}
    )
    judged = made(trained / "benchmarks", shares(MMMU=0.7, WeMath=0.6))
    table, sources = compare(read_runs(tmp_path), BENCHMARKS, PRESET)
    assert table.loc["rlsd", ("MMMU", "ours")] == "70.00 [68.00, 72.00]"
    assert table.loc["rlsd", (HELD_OUT, "ours")] == "50.00 [50.00, 50.00]"
    assert table.loc["base", (HELD_OUT, "ours")] == "25.00 [25.00, 25.00]"
    assert table.loc["rlsd", ("MathVista", "ours")] == DASH
    assert table.loc["rlsd", (AVERAGE, "ours")] == DASH  # three benchmarks are missing
    assert set(sources["run"]) == {str(trained), str(judged)}
    filled = (table.xs("ours", axis=1, level=1) != DASH).sum(axis=None)
    assert filled == len(sources) == 4


def test_an_average_needs_every_benchmark(tmp_path):
    made(
        tmp_path / "all", shares(MMMU=0.6, MathVista=0.7, MathVision=0.5, ZeroBench=0.2, WeMath=0.5)
    )
    assert ours(tmp_path, "rlsd", AVERAGE) == "50.00"


def test_seeds_are_taken_together_and_settings_apart(tmp_path):
    for seed, share in enumerate((0.60, 0.62, 0.64)):
        made(tmp_path / f"s{seed}", shares(MMMU=share), seed=seed)
    made(tmp_path / "wide", shares(MMMU=0.9), overrides={"epsilon_w": 0.5})
    made(tmp_path / "other", shares(MMMU=0.1), preset="qwen3-vl-8b")
    mean, _, count = ours(tmp_path, "rlsd", "MMMU").partition(" ")
    assert mean == "62.00"
    assert count.endswith("(n=3)")
    assert ours(tmp_path, "rlsd (epsilon_w=0.5)", "MMMU").startswith("90.00")


def test_the_untrained_model_is_told_of_by_every_run_that_leaves_it_alone(tmp_path):
    def run(name: str, before: float, **parameters) -> Path:
        ends = {f"accuracy_{when}{end}": before for when in ("before", "after") for end in ENDS}
        return made(tmp_path / name, ends, **parameters)

    mixed = run("mixed", 0.5, method="grpo_opsd", overrides={"distillation_weight": 0.1})
    assert ours(tmp_path, "base", HELD_OUT) == "50.00 [50.00, 50.00]"
    for name, value in {"model": "a/copy", "test_size": 4, "max_completion_length": 9}.items():
        run(name, 0.1, overrides={name: value})
    run("shuffled", 0.1, control="shuffled")
    run("same seed", 0.5, max_steps=3)
    assert ours(tmp_path, "base", HELD_OUT) == "50.00 [50.00, 50.00]"
    run("another seed", 0.7, seed=1)
    assert ours(tmp_path, "base", HELD_OUT).startswith("60.00")
    assert ours(tmp_path, "base", HELD_OUT).endswith("(n=2)")
    _, sources = compare(read_runs(tmp_path), BENCHMARKS, PRESET)
    assert str(mixed) in set(sources["run"][sources["row"] != "base"])


def test_a_run_that_is_still_open_counts_only_where_it_is_named(tmp_path):
    folder = tmp_path / "open"
    Run.start(folder, parameters={"method": "grpo", "preset": PRESET, "seed": 0})
    # As in a kernel under a runner, which closes the run after the last cell.
    Run.attach(folder).finish(shares(MMMU=0.5))
    assert ours(tmp_path, "grpo", "MMMU") == DASH
    assert ours(tmp_path, "grpo", "MMMU", own=folder) == "50.00 [48.00, 52.00]"


def test_what_was_left_open_is_read_from_the_manifest(tmp_path):
    run = Run.start(tmp_path / "run", parameters={"method": "rlsd", "seed": 4})
    run.record(
        config={"privileged_template": None, "max_steps": 200},
        preset={"task": "mmfinereason", "task_options": {"reward": "binary"}},
        data={"train": "a" * 64, "test": "b" * 64},
        evaluation={"temperature": 1.0},
    )
    items = open_items(read_manifest(run.path), VISION)["this run"]
    assert "seed 4" in items["seeds"]
    assert f"test {'b' * 12}" in items["splits"]
    assert "presence_penalty 1.5" in items["evaluation sampling"]
    assert "262,144 to 1,048,576" in items["images"]
    without = open_items(read_manifest(run.path), None)["this run"].to_dict()
    assert without.items() <= items.to_dict().items()
    assert "graders" not in without
    with pytest.raises(KeyError):
        open_items({**read_manifest(run.path), "packages": {}}, VISION)


def test_both_models_are_judged_and_an_untrained_one_once(tmp_path, monkeypatch):
    asked = []

    def evaluate(model, names, *, run_dir, trained, **options):
        asked.append((str(model), trained["method"], trained["seed"]))
        made(run_dir, shares(MMMU=0.5), **{**trained, "benchmarks": names})

    monkeypatch.setattr(benchmarks, "evaluate_benchmarks", evaluate)
    facts = {"method": "rlsd", "preset": PRESET, "seed": 2, "overrides": {"epsilon_w": 0.5}}
    run = Run.start(tmp_path / "runs" / "rlsd", parameters=facts)
    run.record(preset={"sees_images": True, "model": "hub/base"})
    (run.path / "model").mkdir()
    (run.path / "model" / "config.json").write_text("{}")
    judge(run, ["MMMU"], tmp_path / "runs")
    assert asked == [("hub/base", "base", 2), (str(run.path / "model"), "rlsd", 2)]
    judge(run, ["MMMU"], tmp_path / "runs")
    assert len(asked) == 2
    assert ours(tmp_path, "base", "MMMU") == "50.00 [48.00, 52.00]"
    assert ours(tmp_path, "rlsd (epsilon_w=0.5)", "MMMU") == "50.00 [48.00, 52.00]"


def test_what_was_dropped_is_counted_and_kept(tmp_path):
    read = {"read": 10, "dropped: broken_image": 2, "dropped: empty": 1, "kept": 8}
    task = SimpleNamespace(train=range(6), test=range(2), report=read)
    assert dropped(task, tmp_path)["rows"].to_dict() == {**read, "train": 6, "test": 2}
    assert json.loads((tmp_path / "data_report.json").read_text()) == read
    task.report = None
    made_up = {"generated": 8, "train": 6, "test": 2}
    assert dropped(task, tmp_path)["rows"].to_dict() == made_up
