"""One figure per function, from the tidy frames of `read_runs`; every function returns its Figure.

Rows of a run that did not finish are left out, and the figure says so. Lines differ in colour and in
dashes, points in colour and in place, so that a print in grey can be read too.
"""

import textwrap
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlsd_lib.measure.intervals import student_interval
from rlsd_lib.report.heatmap import TokenHeatmap, new_figure, token_heatmap
from rlsd_lib.runs.records import is_finished, left_out

__all__ = [
    "TokenHeatmap",
    "before_after",
    "footnote",
    "histogram",
    "leak_measures",
    "means",
    "token_heatmap",
    "training_curve",
]

SIZE = (6.4, 3.8)
PALETTE = "colorblind"
MARKERS = "os^DvPX"
# Ten colours and eight dashes: forty names before a pair comes again.
DASHES = (
    "",
    (4, 1.5),
    (1, 1),
    (3, 1.2, 1.5, 1.2),
    (6, 2),
    (5, 1, 1, 1),
    (2, 2),
    (3, 1, 1, 1, 1, 1),
)


def training_curve(
    steps: pd.DataFrame,
    metric: str,
    *,
    hue: str = "method",
    names: Sequence[str] = (),
    window: int = 1,
    title: str = "",
) -> Figure:
    """A metric against the step: the mean over seeds, with the 95 % bootstrap interval shaded.

    Args:
        steps: a row per run and step, with columns `step`, `path`, `hue` and the metric.
        metric: the column to show.
        hue: the column whose values get a colour each.
        names: values of `hue` in the order in which they get colours and dashes, so that a name
            looks alike in several figures; those that are not in it come after.
        window: average over this many steps within each run before anything else.
        title: defaults to the metric's name.

    Raises:
        ValueError: an absent column, no row with a value, or a window below 1.
    """
    if window < 1:
        raise ValueError(f"window={window}: expected 1 or more")
    lines = list(dict.fromkeys(["path", hue]))
    data = _present(steps, ["step", *lines, metric], metric).sort_values([*lines, "step"])
    smooth = data.groupby(lines)[metric].rolling(window, min_periods=1).mean()
    data[metric] = smooth.droplevel(lines)
    figure, axes = _canvas(title or metric)
    ordered = list(dict.fromkeys([*names, *data[hue]]))
    sns.lineplot(
        data=data,
        x="step",
        y=metric,
        hue=hue,
        style=hue,
        palette=_colours(ordered),
        dashes={name: DASHES[i % len(DASHES)] for i, name in enumerate(ordered)},
        errorbar=("ci", 95),
        seed=0,
        ax=axes,
    )
    axes.set(xlabel="optimiser step", ylabel=metric)
    _name_legend(axes, data.groupby(hue)["path"].nunique())
    return footnote(figure, left_out(steps))


def histogram(
    values: pd.DataFrame,
    column: str,
    *,
    hue: str | None = None,
    marks: Sequence[float] = (),
    log_counts: bool = False,
    title: str = "",
) -> Figure:
    """How a token quantity is spread, such as the gap or the evidence weight.

    Args:
        values: a row per token.
        column: the quantity.
        hue: a column to split by, such as the sign of the advantage.
        marks: where vertical lines stand, such as the clip bounds.
        log_counts: count on a logarithmic axis, to see the tails.
        title: defaults to the column's name.

    Raises:
        ValueError: an absent column, or no value in it.
    """
    data = _present(values, [column, *([hue] if hue else [])], column)
    figure, axes = _canvas(title or column)
    sns.histplot(
        data=data,
        x=column,
        hue=hue,
        bins=60,
        element="step",
        palette=_colours(data[hue]) if hue else None,
        fill=not log_counts,  # there is no zero to fill down to on a logarithmic axis
        ax=axes,
    )
    if log_counts:
        axes.set_yscale("log")
    for mark in marks:
        axes.axvline(mark, color="0.3", linestyle="--", linewidth=1)
    axes.set(xlabel=column, ylabel="tokens")
    return footnote(figure, left_out(values))


def before_after(runs: pd.DataFrame, *, hue: str = "method", title: str = "") -> Figure:
    """Accuracy before and after training, one pair per run, with each run's own 95 % interval.

    Args:
        runs: a row per run with accuracy_before, accuracy_after and their _low and _high.
        hue: the column whose values get a colour and a place on the axis each.
        title: stands above the figure.

    Raises:
        ValueError: an absent column, or no run with an accuracy.
    """
    ends = [
        f"accuracy_{when}{end}" for when in ("before", "after") for end in ("", "_low", "_high")
    ]
    data = _present(runs, [hue, *ends], "accuracy_after")
    figure, axes = _canvas(title or "accuracy before (hollow) and after training")
    names = list(dict.fromkeys(data[hue]))
    colours = _colours(data[hue])
    for place, name in enumerate(names):
        chosen = data[data[hue] == name]
        for number, (_, run) in enumerate(chosen.iterrows()):
            shift = place + 0.5 * (number - (len(chosen) - 1) / 2) / len(chosen)
            _interval(axes, shift - 0.06, run, "before", colours[name], hollow=True)
            _interval(axes, shift + 0.06, run, "after", colours[name], hollow=False)
    turned = {"rotation": 30, "ha": "right"} if len(names) > 4 else {}
    axes.set_xticks(range(len(names)), [str(name) for name in names], **turned)
    axes.set(ylabel="accuracy", xlim=(-0.6, len(names) - 0.4))
    return footnote(figure, left_out(runs))


def means(values: Mapping[str, pd.Series], *, ylabel: str, title: str) -> Figure:
    """The mean of each series of independent values, with Student's 95 % interval.

    `values` holds one number per seed under the name of each group, such as a method.

    Raises:
        ValueError: every series is empty.
    """
    found = {name: student_interval(series) for name, series in values.items() if len(series)}
    if not found:
        raise ValueError(f"no value for {', '.join(values)}: nothing to show")
    figure, axes = _canvas(title)
    colours = _colours(found)
    for place, (name, (mean, low, high)) in enumerate(found.items()):
        axes.vlines(place, low, high, color=colours[name], linewidth=1.5)  # nothing where NaN
        axes.plot([place], [mean], MARKERS[place % len(MARKERS)], color=colours[name], markersize=7)
    names = [f"{name}\n(n={len(values[name])})" for name in found]
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel=ylabel, xlim=(-0.6, len(names) - 0.4))
    return figure


def _interval(
    axes: Axes, x: float, run: pd.Series, when: str, colour: tuple[float, ...], *, hollow: bool
) -> None:
    mid, low, high = (run[f"accuracy_{when}{end}"] for end in ("", "_low", "_high"))
    face = "white" if hollow else colour
    # vlines, not errorbar: an interval need not contain its estimate, and must not be bent to.
    axes.vlines(x, low, high, color=colour, linewidth=1.5)
    axes.plot([x], [mid], "o", color=colour, markerfacecolor=face, markersize=6)


def _present(frame: pd.DataFrame, columns: Sequence[str], needed: str) -> pd.DataFrame:
    absent = [name for name in columns if name not in frame]
    if absent:
        raise ValueError(f"no column {', '.join(absent)}; there are {', '.join(map(str, frame))}")
    finished = is_finished(frame)
    data = frame.loc[finished & frame[needed].notna(), list(dict.fromkeys(columns))]
    if data.empty:
        also = "" if finished.all() else "; rows of unfinished runs are left out"
        raise ValueError(f"no value in column {needed}: nothing to show{also}")
    return data.reset_index(drop=True)


def footnote(figure: Figure, text: str) -> Figure:
    """Write small text under a figure, such as which runs it shows; returns the figure."""
    lines = "\n".join(textwrap.wrap(text, 120, break_on_hyphens=False))
    figure.text(0.01, -0.01, lines, fontsize=7, color="0.35", va="top", parse_math=False)
    return figure


def _colours(names: Iterable[object]) -> dict[object, tuple[float, ...]]:
    """A colour per name, in order of appearance."""
    unique = list(dict.fromkeys(names))
    return dict(zip(unique, sns.color_palette(PALETTE, len(unique)), strict=True))


def _canvas(title: str) -> tuple[Figure, Axes]:
    figure = new_figure(SIZE)
    with sns.axes_style("whitegrid"):
        axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11, parse_math=False)
    sns.despine(ax=axes)
    return figure, axes


def _name_legend(axes: Axes, runs: pd.Series) -> None:
    """Say in the legend how many runs each line stands for; many lines have it under the axes."""
    handles, names = axes.get_legend_handles_labels()
    counted = {str(name): count for name, count in runs.items()}
    labels = [f"{name} (n={counted[name]})" for name in names]
    if len(labels) <= 4:
        axes.legend(handles, labels, title=None)
        return
    columns = 2 if max(map(len, labels)) < 44 else 1
    rows = -(-len(labels) // columns)
    figure = axes.get_figure()
    figure.set_size_inches(SIZE[0], SIZE[1] + 0.18 * rows)
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": columns}
    axes.legend(handles, labels, title=None, fontsize=8, frameon=False, handlelength=3, **place)


def leak_measures(frame: pd.DataFrame, *, by: str = "method", title: str = "") -> Figure:
    """Every measure of leakage in a panel: a point per run with its own 95 % interval.

    The band is the base model's interval, the dashed line the mean null value of the runs.

    Args:
        frame: rows of `leakage.summarise` for one run or several, with a column `by`.
        by: the column whose values get a row and a colour each.
        title: stands above the figure.

    Raises:
        ValueError: an absent column, or no row of a model.
    """
    ends = ["mean", "low", "high"]
    data = _present(frame, [by, "measure", "of", "null", *ends], "mean")
    names, measures = (list(dict.fromkeys(data[column])) for column in (by, "measure"))
    colours = _colours(data[by])
    figure = new_figure((2.2 * len(measures) + 2.2, 0.4 * len(names) + 1.6))
    with sns.axes_style("whitegrid"):
        panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, measure in zip(panels, measures, strict=True):
        rows = data[data["measure"] == measure]
        base, model = (rows[rows["of"] == of] for of in ("base", "model"))
        axes.axvspan(base["low"].min(), base["high"].max(), color="0.85", label="base model")
        if model["null"].notna().any():  # an accuracy has none
            axes.axvline(
                model["null"].mean(), color="0.3", linestyle="--", linewidth=1, label="null"
            )
        for place, name in enumerate(names):
            chosen = model[model[by] == name]
            for number, (_, run) in enumerate(chosen.iterrows()):
                height = place + 0.6 * ((number + 0.5) / len(chosen) - 0.5)
                axes.hlines(height, run["low"], run["high"], color=colours[name], linewidth=1.2)
                axes.plot([run["mean"]], [height], "o", color=colours[name], markersize=4)
        axes.set_title(measure, loc="left", fontsize=10)
        axes.set(xlabel="nats" if measure == "evidence" else "share")
    labels = [textwrap.fill(str(name), 34) for name in names]
    panels[0].set_yticks(range(len(names)), labels, fontsize=8)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="upper right", ncols=2)
    figure.suptitle(title or "leakage", x=0.01, ha="left", fontsize=11)
    return figure
