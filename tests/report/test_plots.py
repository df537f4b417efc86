"""Figures show what the frames hold; the token heat map shows every token legibly."""

import json
import warnings
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import NotebookMaker
from matplotlib.colors import to_rgb
from PIL import Image

from rlsd_lib.report import plots
from rlsd_lib.report.heatmap import MISSING, place, show_token, text_width


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
    assert {t.get_text() for t in axes.get_legend().get_texts()} == {"grpo (n=2)", "rlsd (n=2)"}
    assert len(axes.collections) == 2  # an interval each


def test_a_window_averages_within_a_run_and_never_across(steps: pd.DataFrame) -> None:
    one = steps[(steps["method"] == "grpo") & (steps["seed"] == 0)]
    [axes] = plots.training_curve(one, "reward", window=2).axes
    assert axes.lines[0].get_ydata().tolist() == [1.0, 1.5, 2.5, 3.5]
    both = steps[steps["method"] == "grpo"]
    [axes] = plots.training_curve(both, "reward", window=4).axes
    assert axes.lines[0].get_ydata()[0] == 1.5  # not an average with the run before


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
    assert legend == {"grpo (n=2)", "rlsd (n=1)"}
    assert [t.get_text() for t in figure.texts] == [
        "INCOMPLETE, 1 left out: rlsd1 (running/killed)"
    ]


def test_a_histogram_counts_every_token_and_marks_the_bounds() -> None:
    tokens = pd.DataFrame({"weight": [0.8] * 3 + [1.0] * 10 + [1.2] * 2, "sign": ["+"] * 15})
    [axes] = plots.histogram(tokens, "weight", marks=(0.8, 1.2)).axes
    heights = np.concatenate([c.get_paths()[0].vertices[:, 1] for c in axes.collections])
    assert heights.max() == 10
    assert sorted(line.get_xdata()[0] for line in axes.lines) == [0.8, 1.2]
    [split] = plots.histogram(tokens, "weight", hue="sign", log_counts=True).axes
    assert split.get_legend() is not None
    assert split.get_yscale() == "log"
    assert max(line.get_ydata().max() for line in split.lines) == 10


def test_before_and_after_stand_with_their_own_intervals() -> None:
    run = {"accuracy_before": 0.5, "accuracy_before_low": 0.4, "accuracy_before_high": 0.6}
    run |= {"accuracy_after": 0.8, "accuracy_after_low": 0.7, "accuracy_after_high": 0.95}
    runs = pd.DataFrame([{"method": m, **run} for m in ("grpo", "rlsd", "rlsd")])
    [axes] = plots.before_after(runs).axes
    spans = [tuple(c.get_segments()[0][:, 1]) for c in axes.collections]
    assert spans == [(0.4, 0.6), (0.7, 0.95)] * 3
    assert [label.get_text() for label in axes.get_xticklabels()] == ["grpo", "rlsd"]
    with pytest.raises(ValueError, match="accuracy_before_low"):
        plots.before_after(runs.drop(columns="accuracy_before_low"))


def test_the_heat_map_colours_by_sign_and_greys_what_has_no_value() -> None:
    heat = plots.token_heatmap(["a", "b", "c", "d"], [1.4, 1.0, 0.6, np.nan], title="w", center=1)
    above, at, below, none = heat.colours
    assert to_rgb(above)[2] > to_rgb(above)[0]  # blue
    assert to_rgb(below)[0] > to_rgb(below)[2]  # red
    assert min(to_rgb(at)) > 0.95
    assert none == MISSING
    assert heat.limit == pytest.approx(0.4)


def test_a_limit_clips_and_equal_values_are_neutral() -> None:
    clipped = plots.token_heatmap(["a", "b"], [0.5, 50.0], title="gap", limit=0.5).colours
    assert clipped[0] == clipped[1]
    [colour] = plots.token_heatmap(["a"], [0.0], title="gap").colours
    assert min(to_rgb(colour)) > 0.95


@pytest.mark.parametrize(
    ("tokens", "values", "limit", "message"),
    [
        (["a"], [1.0, 2.0], None, "1 tokens and 2 values"),
        ([], [], None, "0 tokens"),
        (["a"], [float("inf")], None, "infinite"),
        (["a"], [1.0], 0.0, "limit=0.0"),
    ],
)
def test_bad_heat_maps_are_refused(
    tokens: list[str], values: list[float], limit: float | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plots.token_heatmap(tokens, values, title="x", limit=limit)


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("Ġthe", "·the"),
        ("▁the", "·the"),
        (" x", "·x"),
        ("\n", "↵\n"),
        ("Ċ", "↵\n"),
        ("<|im_end|>", "<|im_end|>"),
        ("\x00", "\\x00"),
        ("\u200b", "\\x200b"),
        ("", "∅"),
        ("数", "数"),
    ],
)
def test_tokens_are_shown_legibly(token: str, shown: str) -> None:
    assert show_token(token) == shown


def test_html_escapes_what_a_model_may_write() -> None:
    text = plots.token_heatmap(["<script>", "a&b", "\n"], [1, -1, 0], title="<b>")._repr_html_()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "a&amp;b" in text
    assert "↵<br>" in text
    assert "<b>&lt;b&gt;</b>" in text
    assert "title='+1'" in text


def test_layout_wraps_at_the_margin_and_at_line_ends() -> None:
    laid = list(place(["abc", "def", "↵\n", "gh"], ["#000000"] * 4, 8))
    assert [(p.text, p.column, p.row) for p in laid] == [
        ("abc", 0, 0),
        ("def", 3, 0),
        ("↵", 6, 0),
        ("gh", 0, 1),
    ]
    wrapped = list(place(["abcde", "fghij"], ["#000000"] * 2, 8))
    assert [(p.column, p.row) for p in wrapped] == [(0, 0), (0, 1)]
    long = list(place(["x" * 30], ["#000000"], 8))
    assert "".join(p.text for p in long) == "x" * 30
    assert all(p.column + p.width <= 8 for p in long)
    assert text_width("数a") == 3


def test_the_picture_is_written_and_a_dollar_is_no_formula(tmp_path: Path) -> None:
    heat = plots.token_heatmap(["$\\x$", "_", "^$", "\\frac"], [1, -1, 0.2, 0], title="$\\x$")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = heat.save_png(tmp_path / "heat.png")
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 10
    with pytest.raises(ValueError, match="columns=4"):
        heat.figure(columns=4)


def test_a_notebook_shows_each_figure_once(make_notebook: NotebookMaker, tmp_path: Path) -> None:
    from rlsd_lib.runs.execute import execute_notebook

    cells = (
        "import pandas as pd\nfrom rlsd_lib.report import plots",
        "plots.histogram(pd.DataFrame({'gap': [0.0, 1.0]}), 'gap')",
        "plots.token_heatmap(['a', 'b'], [0.5, -0.5], title='gap')",
    )
    folder = execute_notebook(make_notebook(cells=cells), run_dir=tmp_path / "a")
    executed = nbformat.read(folder / "tiny.ipynb", as_version=4)
    shown = [list(o.data) for c in executed.cells for o in c.get("outputs", []) if "data" in o]
    assert len(shown) == 2, json.dumps(shown)
    assert "image/png" in shown[0]
    assert "text/html" in shown[1]
