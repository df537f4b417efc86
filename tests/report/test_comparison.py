"""Tables and figures over runs: right numbers, honest partners, and nothing hidden."""

import json
from io import StringIO
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from synthetic import flat, write_folder, write_run

from rlsd_lib.__main__ import main
from rlsd_lib.report import comparison, figures
from rlsd_lib.report.claims import CLAIMS
from rlsd_lib.report.paper_numbers import table_2
from rlsd_lib.report.tables import make_table, paired_differences, with_arms
from rlsd_lib.report.verdicts import claims_table
from rlsd_lib.runs.records import Runs, described, read_runs


@pytest.fixture
def incomplete(tmp_path: Path) -> Runs:
    """Two methods and two seeds; a third seed failed, and a fourth was planned only."""
    folder = write_folder(tmp_path / "paper", ["grpo", "rlsd"], seeds=2)
    write_run(folder / "rlsd-s2", "rlsd", 2, status="failed")
    plan = {"command": "rlsd suite paper", "runs": ["rlsd-s0", "rlsd-s2", "rlsd-s3"]}
    (folder / "suite.json").write_text(json.dumps({"plans": [plan]}))
    return read_runs(folder)


def _texts(figure: plt.Figure) -> str:
    return "\n".join(text.get_text() for text in figure.texts).replace("\n", " ")


MISSING = "INCOMPLETE, 2 left out: rlsd-s2 (failed), rlsd-s3 (not started)"


@pytest.mark.parametrize(
    "make",
    [
        lambda runs: figures.curve(runs, "reward"),
        lambda runs: figures.clip_fractions(runs),
        lambda runs: figures.double_budget(runs),
        lambda runs: figures.before_after(runs),
    ],
)
def test_a_figure_names_its_runs_and_those_it_leaves_out(incomplete: Runs, make) -> None:
    said = _texts(make(incomplete))
    assert "paper: 4 of 6 runs, seeds 0 1" in said
    assert MISSING in said


@pytest.mark.parametrize(
    "make",
    [
        make_table,
        paired_differences,
        comparison.paradigms,
        lambda runs: comparison.beside_paper(runs, runs),
        comparison.cost_of_a_point,
        lambda runs: claims_table(CLAIMS, runs, runs),
    ],
)
def test_a_table_names_its_runs_and_those_it_leaves_out(incomplete: Runs, make) -> None:
    shown = make(incomplete)._repr_markdown_()
    assert MISSING in shown
    assert "failed, not in the table" in shown
    assert "not started, not in the table" in shown


def test_a_csv_says_so_too(incomplete: Runs) -> None:
    table = make_table(incomplete)
    assert MISSING in table.csv().splitlines()[-1]
    assert pd.read_csv(StringIO(table.csv()), comment="#")["n"].tolist() == [2, 2]


def test_every_run_is_in_the_list_and_its_suite_in_the_commands(
    incomplete: Runs, tmp_path: Path
) -> None:
    states = comparison.run_list(incomplete).rows.set_index("run")["status"]
    assert states["paper/rlsd-s2"] == "failed"
    assert states["paper/rlsd-s3"] == "not started"
    assert len(states) == 6
    assert comparison.commands(tmp_path / "paper", incomplete) == ["rlsd suite paper"]
    assert described(incomplete).startswith("paper: 4 of 6 runs")


def test_a_run_is_compared_with_the_baseline_that_differs_least(tmp_path: Path) -> None:
    strong = {"overrides": {"epsilon_w": 0.9}}
    looks = {
        "rlsd": (0.80, {}),
        "shuffled": (0.70, {"control": "shuffled"}),
        "strong": (0.60, strong),
        "strong-shuffled": (0.55, {**strong, "control": "shuffled"}),
        "strong-peer": (0.58, {"overrides": {"epsilon_w": 0.9, "peer_context": True}}),
        "other": (0.90, {"preset": "lab-bare"}),
    }
    for name, (after, parameters) in looks.items():
        for seed in range(3):
            write_run(tmp_path / f"{name}{seed}", "rlsd", seed, after=after, parameters=parameters)
    write_run(tmp_path / "sdpo0", "sdpo", 0, after=0.5, parameters={"preset": "lab-bare", **strong})
    write_run(tmp_path / "opd9", "opd", 9)
    table = paired_differences(read_runs(tmp_path), "rlsd")
    found = table.rows.set_index("method")["accuracy - rlsd"].mul(3).round(6).to_dict()
    assert found == {
        "rlsd (lab, control=shuffled)": -0.1,
        "rlsd (lab, epsilon_w=0.9)": -0.2,
        "rlsd (lab, control=shuffled, epsilon_w=0.9)": -0.05,
        "rlsd (lab, epsilon_w=0.9, peer_context=True)": -0.02,
        "sdpo (lab-bare, epsilon_w=0.9)": -0.4,
    }
    assert "no rlsd run of the same preset, length and seed as opd (lab)" in table.notes
    drift = [{"overrides": {"lambda_init": 1.0, "epsilon_w": clip}} for clip in (0.2, 9.0)]
    for number, parameters in enumerate(drift):
        write_run(tmp_path / "drift" / f"{number}", "rlsd", 0, parameters=parameters)
    arms = with_arms(read_runs(tmp_path / "drift").runs)["arm"]  # lambda is alike in both
    assert arms.tolist() == ["rlsd (epsilon_w=0.2)", "rlsd (epsilon_w=9.0)"]
    with pytest.raises(ValueError, match="no finished run of 'grpo'"):
        paired_differences(read_runs(tmp_path))


def test_a_run_that_two_suites_share_counts_once(tmp_path: Path) -> None:
    for suite in ("ablations", "controls"):
        for seed in range(3):
            folder = tmp_path / suite
            write_run(folder / f"grpo-s{seed}", "grpo", seed)
            write_run(folder / f"rlsd-s{seed}", "rlsd", seed, after=0.8 + 0.05 * seed)
    alone, both = (paired_differences(read_runs(f)) for f in (tmp_path / "controls", tmp_path))
    values = [name for name in alone.rows if name != "method"]
    assert both.rows[values].equals(alone.rows[values])
    assert "the same settings and seed as another run: controls/grpo-s0, " in both.markdown()
    assert comparison.cost_of_a_point(read_runs(tmp_path)).rows["n"].tolist() == ["3", "3"]


def test_the_command_shows_differences_over_several_folders(tmp_path: Path, capsys) -> None:
    for seed in range(3):
        write_run(tmp_path / "a" / f"grpo-s{seed}", "grpo", seed)
        write_run(tmp_path / "b" / f"rlsd-s{seed}", "rlsd", seed)
    folders = [str(tmp_path / name) for name in ("a", "b")]
    assert main(["table", *folders, "--against", "grpo"]) == 0
    said = capsys.readouterr().out
    assert "| rlsd   | 0.033" in said
    assert "a, b: 6 of 6 runs" in said
    assert main(["table", folders[1], "--against", "grpo"]) == 2
    assert "no finished run of 'grpo'" in capsys.readouterr().err


def test_other_problems_are_no_pair(tmp_path: Path) -> None:
    write_folder(tmp_path, ["grpo", "rlsd"], seeds=1)
    file = tmp_path / "rlsd-s0" / "manifest.json"
    file.write_text(file.read_text().replace('"the same"', '"others"'))
    with pytest.raises(ValueError, match="grpo-s0 and rlsd-s0 were not judged on the same"):
        paired_differences(read_runs(tmp_path))


def test_ours_and_the_papers_stand_in_columns_of_their_own(tmp_path: Path) -> None:
    runs = read_runs(write_folder(tmp_path, ["grpo", "opd"]))
    rows = comparison.beside_paper(runs, runs).rows.set_index("method")
    printed = rows.loc[table_2().index, "paper: average"]
    assert printed.astype(float).to_dict() == table_2()["average"].to_dict()
    assert rows.loc["opd", "paper: average"] == "-"
    assert rows.loc["grpo", "lab: accuracy"].startswith("80.0 [")
    assert rows.loc["base", "lab: accuracy"] == "50.0 [50.0, 50.0]"
    assert rows.loc["rlsd", "lab: accuracy"] == "-"


def test_a_point_has_a_price_only_where_there_is_a_gain(tmp_path: Path) -> None:
    runs = read_runs(write_folder(tmp_path, ["grpo", "sdpo"], sdpo={"after": 0.4}))
    rows = comparison.cost_of_a_point(runs).rows.set_index("method")
    assert rows.loc["grpo", "s per point"] == "2.0"  # 60 steps of a second for 30 points
    assert rows.loc["sdpo", "s per point"] == "-"


def test_clipped_sides_are_not_averaged_into_each_other(tmp_path: Path) -> None:
    runs = read_runs(write_folder(tmp_path, ["rlsd"], rlsd={"rlsd/clip_low_frac": flat(0.01)}))
    [axes] = figures.clip_fractions(runs, window=5).axes
    ends = {round(float(line.get_ydata()[0]), 3) for line in axes.lines if len(line.get_ydata())}
    assert ends == {0.01, 0.04}


def test_lines_can_be_told_apart_without_colour(tmp_path: Path) -> None:
    runs = read_runs(write_folder(tmp_path, ["grpo", "rlsd", "opd"], seeds=1))
    [axes] = figures.curve(runs, "reward").axes
    lines = [line for line in axes.lines if len(line.get_ydata())]
    assert len({str(line._dash_pattern) for line in lines}) == 3


def test_a_method_looks_alike_in_every_figure(tmp_path: Path) -> None:
    runs = read_runs(write_folder(tmp_path, ["grpo", "opd", "opsd"], seeds=1))
    looks = []
    for metric in ("reward", "rlsd/divergence"):  # which GRPO does not log
        [axes] = figures.curve(runs, metric).axes
        last = [line for line in axes.lines if len(line.get_ydata())][-1]
        looks.append((last.get_color(), last._dash_pattern))
    assert looks[0] == looks[1]
