"""Tables over runs: right numbers, honest partners, and nothing hidden."""

import json
import re
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
from synthetic import write_folder, write_run

from rlsd_lib.__main__ import main
from rlsd_lib.report import plots, tables
from rlsd_lib.report.claims import claims_table
from rlsd_lib.report.paper_tables import compare
from rlsd_lib.report.tables import LEAST, make_table, paired_differences, with_arms
from rlsd_lib.runs.records import Runs, read_runs
from rlsd_lib.runs.run import Run


@pytest.fixture
def incomplete(tmp_path: Path) -> Runs:
    """Two methods and two seeds; a third seed failed, and a fourth was planned only."""
    folder = write_folder(tmp_path / "paper", ["grpo", "rlsd"], seeds=2)
    write_run(folder / "rlsd-s2", "rlsd", 2, status="failed")
    plan = {"command": "rlsd suite paper", "runs": ["rlsd-s0", "rlsd-s2", "rlsd-s3"]}
    (folder / "suite.json").write_text(json.dumps({"plans": [plan]}))
    return read_runs(folder)


MISSING = "INCOMPLETE, 2 left out: rlsd-s2 (failed), rlsd-s3 (not started)"


def test_a_figure_names_its_runs_and_those_it_leaves_out(incomplete: Runs) -> None:
    figure = plots.curve(incomplete, "reward")
    said = "\n".join(text.get_text() for text in figure.texts).replace("\n", " ")
    assert "paper: 4 of 6 runs, seeds 0 1" in said
    assert MISSING in said


def test_a_table_names_its_runs_and_those_it_leaves_out(incomplete: Runs) -> None:
    tables = {
        "make_table": make_table(incomplete),
        "paired_differences": paired_differences(incomplete),
        "compare": compare(incomplete, "lab"),
        "claims_table": claims_table(incomplete, incomplete),
    }
    for name, table in tables.items():
        shown = table._repr_html_()
        assert MISSING in shown, name
        assert not re.search(r" \[[-+\d.]+, ", shown), f"{name}: a line may end inside an interval"
        assert "failed, not in the table" in shown, name
        assert "not started, not in the table" in shown, name


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


def test_a_table_fits_the_screen_and_says_what_it_left_out(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = {"lambda_init": 1.0, "lambda_decay_steps": 0, "epsilon_w": 9.0, "weight_clip": "log"}
    for name, given in {"a": {}, "b": {"overrides": many}}.items():
        write_run(tmp_path / name, "rlsd", 0, parameters=given)
    write_run(tmp_path / "grpo", "grpo", 0)
    runs = read_runs(tmp_path)
    for words in ([], ["--against", "grpo"]):
        for columns in (80, 120, 300):
            monkeypatch.setenv("COLUMNS", str(columns))
            assert main(["table", str(tmp_path), *words]) == 0
            said = capsys.readouterr().out
            assert max(map(len, said.splitlines())) <= min(columns, 120)
            assert words or "lambda_decay_steps=0," in said  # wrapped between words
    assert main(["table", str(tmp_path), "--all"]) == 0
    said = capsys.readouterr().out
    assert all(f"| {name} " in said for name in LEAST if name in make_table(runs).rows)
    narrow = make_table(runs).fitted(80)
    assert "no room for clip low, clip high, s / step" in narrow
    assert "| clip low" not in narrow


def test_a_table_for_machines_has_numbers(tmp_path: Path, capsys) -> None:
    write_folder(tmp_path, ["grpo", "rlsd"], seeds=3)
    assert main(["table", str(tmp_path), "--format", "csv"]) == 0
    table = pd.read_csv(StringIO(capsys.readouterr().out)).set_index("method")
    assert table.loc["rlsd", "n"] == 3
    ends = table.loc["rlsd", ["accuracy_after_low", "accuracy_after", "accuracy_after_high"]]
    assert ends.is_monotonic_increasing
    assert ends["accuracy_after"] == pytest.approx(0.9, abs=0.02)
    assert main(["table", str(tmp_path), "--against", "grpo", "--format", "csv"]) == 0
    found = pd.read_csv(StringIO(capsys.readouterr().out))
    assert found["low, seeds"][0] <= found["accuracy - grpo"][0] <= found["high, seeds"][0]


def test_a_run_without_method_and_preset_is_no_arm_and_stops_no_table(tmp_path: Path) -> None:
    write_folder(tmp_path, ["grpo", "rlsd"])
    Run.start(tmp_path / "tour", parameters={"seed": 0}).finish({})
    assert paired_differences(read_runs(tmp_path)).rows["method"].tolist() == ["rlsd (lab)"]


def test_other_problems_are_no_pair(tmp_path: Path) -> None:
    write_folder(tmp_path, ["grpo", "rlsd"], seeds=1)
    file = tmp_path / "rlsd-s0" / "manifest.json"
    file.write_text(file.read_text().replace('"the same"', '"others"'))
    with pytest.raises(ValueError, match="grpo-s0 and rlsd-s0 were not judged on the same"):
        paired_differences(read_runs(tmp_path))


def test_a_table_for_a_notebook_is_whole_left_aligned_and_no_markup():
    text = "a <b>question</b>\nin two lines, " + "long " * 20
    frame = pd.DataFrame({"text": [text, 5e-05], "share": [0.12345, 1.0]}, index=["x", "rate"])
    page = tables.readable(frame).to_html()
    assert text.replace("<b>", "&lt;b&gt;").replace("</b>", "&lt;/b&gt;") in page
    assert "white-space: pre-wrap" in page and "text-align: left" in page
    assert re.search(r"#T_\w+ \* \{\s+text-align: left;", page)  # numbers under their heading
    for shown in (">5e-05<", ">0.123<", ">1<"):
        assert shown in page
    told = pd.DataFrame({"gap": [float("inf"), float("nan")]}, index=["leak_rate", "x"])
    told = tables.readable(told).to_html()
    for shown in (">gap, nats<", ">leak rate<", ">too large to tell<", ">-<"):
        assert shown in told
    folded = tables.answer("0 < 1").data
    assert folded.startswith("<details>") and "0 &lt; 1" in folded
