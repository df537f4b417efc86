"""Figures show what the frames hold, and notebooks show each figure once."""

import json
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import NotebookMaker
from synthetic import write_folder

from rlsd_lib.report import plots
from rlsd_lib.runs.records import read_runs


@pytest.fixture
def steps() -> pd.DataFrame:
    rows = [
        {"path": f"{m}{s}", "method": m, "seed": s, "step": t, "reward": t * k + s}
        for m, k in (("grpo", 1), ("rlsd", 2))
        for s in (0, 1)
        for t in range(1, 5)
    ]
    return pd.DataFrame(rows).sample(frac=1, random_state=0)  # order must not matter


def test_a_training_curve_is_the_mean_over_seeds(steps: pd.DataFrame) -> None:
    figure = plots.training_curve(steps, "reward")
    [axes] = figure.axes
    lines = [line.get_ydata() for line in axes.lines if len(line.get_ydata())]
    found = sorted(tuple(np.round(line, 6)) for line in lines)
    assert found == [(1.5, 2.5, 3.5, 4.5), (2.5, 4.5, 6.5, 8.5)]
    assert {t.get_text() for t in axes.get_legend().get_texts()} == {
        "grpo (runs: 2)",
        "rlsd (runs: 2)",
    }
    assert len(axes.collections) == 2  # an interval each


def test_a_window_averages_within_a_run_and_never_across(steps: pd.DataFrame) -> None:
    rows = [("grpo", f"grpo{s}", t, t + 10.0 * s) for s in (0, 1) for t in range(1, 41)]
    both = pd.DataFrame(rows, columns=["method", "path", "step", "reward"])
    one = both[both["path"] == "grpo0"]
    [axes] = plots.training_curve(one, "reward", window=2, bound=one["reward"] + 1).axes
    assert axes.lines[0].get_ydata()[:4].tolist() == [1.0, 1.5, 2.5, 3.5]
    assert axes.lines[-1].get_ydata().tolist() == list(range(2, 42)), "a bound is no average"
    assert axes.get_xlabel() == "optimiser step; a point is the mean of the last 2"
    [axes] = plots.training_curve(both, "reward", window=4, title="own").axes
    assert axes.lines[0].get_ydata()[0] == 6  # not an average with the run before
    assert axes.get_title(loc="left") == "own"
    [axes] = plots.training_curve(one.head(19), "reward", window=10).axes
    assert axes.lines[0].get_ydata().tolist() == list(range(1, 20)), "the window hides the course"
    assert axes.get_xlabel() == "optimiser step"


def test_what_cannot_be_shown_is_refused(steps: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match=r"no column entropy; there are .*reward"):
        plots.training_curve(steps, "entropy")
    with pytest.raises(ValueError, match="window=0"):
        plots.training_curve(steps, "reward", window=0)
    with pytest.raises(ValueError, match="nothing to show"):
        plots.training_curve(steps.assign(reward=np.nan), "reward")
    with pytest.raises(ValueError, match="rows of unfinished runs are left out"):
        plots.training_curve(steps.assign(status="failed"), "reward")


def test_a_run_that_did_not_finish_is_left_out_and_named(steps: pd.DataFrame) -> None:
    killed = (steps["path"] == "rlsd1").map({True: "running/killed", False: "finished"})
    figure = plots.training_curve(steps.assign(status=killed, name=steps["path"]), "reward")
    legend = {text.get_text() for text in figure.axes[0].get_legend().get_texts()}
    assert legend == {"grpo (runs: 2)", "rlsd (runs: 1)"}
    assert [t.get_text() for t in figure.texts] == [
        "INCOMPLETE, 1 left out: rlsd1 (running/killed)"
    ]


def test_a_panel_per_measure_with_every_run_the_base_model_and_the_null():
    rows = [
        ("phrase", "model", 0.6, 0.5, 0.7, 0.01, "opsd"),
        ("phrase", "base", 0.01, 0.0, 0.03, 0.01, "opsd"),
        ("phrase", "model", 0.02, 0.0, 0.04, 0.01, "grpo"),
        ("phrase", "base", 0.01, 0.0, 0.03, 0.01, "grpo"),
        ("evidence", "model", 7.0, 6.0, 8.0, 1.0, "opsd"),
        ("evidence", "base", 0.1, 0.0, 0.2, 1.0, "opsd"),
    ]
    columns = ["measure", "of", "mean", "low", "high", "null", "arm"]
    figure = plots.leak_measures(pd.DataFrame(rows, columns=columns), "leakage")
    phrase, evidence = figure.axes
    assert [t.get_text() for t in phrase.get_yticklabels()] == ["opsd", "grpo"]
    points = [line.get_xdata()[0] for line in phrase.lines if len(line.get_xdata()) == 1]
    assert points == [0.6, 0.02]
    [dashed] = [line for line in evidence.lines if line.get_linestyle() == "--"]
    assert dashed.get_xdata()[0] == 1.0
    assert phrase.patches[0].get_extents().width > 0  # the base model's interval
    with pytest.raises(ValueError, match="no column arm"):
        plots.leak_measures(pd.DataFrame(rows, columns=columns).drop(columns="arm"), "leakage")


def test_lines_can_be_told_apart_without_colour(tmp_path: Path) -> None:
    runs = read_runs(write_folder(tmp_path, ["grpo", "rlsd", "opd"], seeds=1))
    [axes] = plots.curve(runs, "reward").axes
    lines = [line for line in axes.lines if len(line.get_ydata())]
    assert len({str(line._dash_pattern) for line in lines}) == 3


def test_a_method_looks_alike_in_every_figure(tmp_path: Path) -> None:
    runs = read_runs(write_folder(tmp_path, ["grpo", "opd", "opsd"], seeds=1))
    looks = []
    for metric in ("reward", "rlsd/divergence"):  # which GRPO does not log
        [axes] = plots.curve(runs, metric).axes
        last = [line for line in axes.lines if len(line.get_ydata())][-1]
        looks.append((last.get_color(), last._dash_pattern))
    assert looks[0] == looks[1]


def test_a_notebook_shows_each_figure_once(make_notebook: NotebookMaker, tmp_path: Path) -> None:
    from rlsd_lib.runs.execute import execute_notebook

    cells = (
        "from rlsd_lib.report import plots",
        "figure, axes = plots.canvas('gap')\naxes.plot([0.0, 1.0])\nfigure",
        "plots.token_heatmap(['a', 'b'], [0.5, -0.5], title='gap')",
    )
    folder = execute_notebook(make_notebook(cells=cells), run_dir=tmp_path / "a")
    executed = nbformat.read(folder / "tiny.ipynb", as_version=4)
    shown = [list(o.data) for c in executed.cells for o in c.get("outputs", []) if "data" in o]
    assert len(shown) == 2, json.dumps(shown)
    assert "image/png" in shown[0]
    assert "text/html" in shown[1]


def test_axes_say_what_they_show(steps: pd.DataFrame) -> None:
    one = steps[(steps["method"] == "grpo") & (steps["seed"] == 0)].sort_values("step")
    share = one.assign(reward=one["reward"] / 4)
    figure = plots.training_curve(share, "reward", bound=share["reward"] + 1)
    [axes] = figure.axes
    figure.canvas.draw()
    ticks = [tick for tick in axes.get_xticks() if 1 <= tick <= 4]
    assert ticks and all(float(tick).is_integer() for tick in ticks)
    assert axes.get_ylim() == (0, 1)
    assert axes.get_title(loc="left") == "mean reward of the step's rollouts"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["grpo (runs: 1)", "largest possible"]
    [beyond] = plots.training_curve(one, "reward").axes  # 4 is no share
    assert beyond.get_ylim()[0] == 0 and beyond.get_ylim()[1] > 4
    [below] = plots.training_curve(one.assign(gap=-one["step"]), "gap").axes
    assert below.get_ylim()[0] < -4


def test_costs_are_a_bar_per_trainer_and_column_in_a_panel_per_model() -> None:
    names = ["org/small, GRPO", "org/small, RLSD, plain pass", "org/large, GRPO"]
    table = pd.DataFrame({"time": [1.0, 1.3, 1.0], "peak": [1.0, 1.2, np.nan]}, index=names)
    figure = plots.costs(table)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["org/small", "org/large"]
    small, large = ([bar.get_width() for bar in axes.patches] for axes in figure.axes)
    assert sorted(width for width in small if width > 0) == [1.0, 1.0, 1.2, 1.3]
    assert [width for width in large if width > 0] == [
        1.0
    ]  # a trainer that found no room has no bar
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ["GRPO", "RLSD, plain pass"]
