"""One figure per function; every function returns its Figure.

Some show the tidy frames of one run, the others a whole folder of `Runs`. Runs that did not finish
are left out, and the figure says so. Lines differ in colour and in dashes, points in colour and in
place, so that a print in grey can be read too.
"""

import textwrap
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlsd_lib.report.heatmap import new_figure
from rlsd_lib.report.heatmap import token_heatmap as token_heatmap
from rlsd_lib.report.tables import WORDS, with_arms
from rlsd_lib.runs.records import Runs, described, is_finished, left_out

SIZE = (6.4, 3.8)
Colour = tuple[float, float, float]
# Ten colours and seven dashes: seventy names before a pair comes again.
DASHES = ("", (4, 1.5), (1, 1), (3, 1.2, 1.5, 1.2), (6, 2), (5, 1, 1, 1), (2, 2))


def training_curve(
    steps: pd.DataFrame,
    metric: str,
    *,
    window: int = 1,
    title: str = "",
    bound: pd.Series | None = None,
) -> Figure:
    """A metric against the step: the mean over seeds, with the 95 % bootstrap interval shaded.

    `steps` has a row per run and step, with columns `step`, `path`, `method` (a line each, with the
    look that it has in every figure of these steps) and the metric, averaged over the last `window`
    steps of a run first, at most over a tenth of the longest. The axis begins at 0 where no value is
    negative, and rewards are shown on [0, 1]. `bound` is what theory allows at each row of `steps`,
    one run's then: a dotted line, never averaged. The title is the metric in words, or `title`.
    Raises ValueError for an absent column, no row with a value, or a window below 1.
    """
    if window < 1:
        raise ValueError(f"window={window}: expected 1 or more")
    data = _present(steps, ["step", "path", "method", metric], metric)
    runs = data.sort_values(["path", "step"]).groupby("path")[metric]
    window = min(window, max(1, runs.size().max() // 10))
    data[metric] = runs.rolling(window, min_periods=1).mean().droplevel("path")
    smoothing = f"; a point is the mean of the last {window}" if window > 1 else ""
    figure, axes = canvas(title or WORDS.get(metric, metric))
    colours = _colours(steps.loc[is_finished(steps), "method"])
    dashes = {name: DASHES[i % len(DASHES)] for i, name in enumerate(colours)}
    look = {"palette": colours, "dashes": dashes, "errorbar": ("ci", 95), "seed": 0}
    sns.lineplot(data, x="step", y=metric, hue="method", style="method", ax=axes, **look)
    if bound is not None:
        axes.plot(steps["step"], bound, color="0.3", ls=":", label="largest possible")
    axes.set(xlabel=f"optimiser step{smoothing}", ylabel="")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if data[metric].min() >= 0:
        whole = metric.startswith("reward") and data[metric].max() <= 1
        axes.set_ylim(0, 1 if whole else 1.05 * axes.dataLim.y1 or None)
    _name_legend(axes, data.groupby("method")["path"].nunique())
    return footnote(figure, left_out(steps))


def curve(runs: Runs, metric: str, *, window: int = 1, title: str = "") -> Figure:
    """A logged metric against the step, a line per method and settings; ValueError for none."""
    arms = with_arms(runs.runs).set_index("path")["arm"]
    steps = runs.steps[is_finished(runs.steps)]
    steps = steps.assign(method=steps["path"].map(arms))
    return footnote(training_curve(steps, metric, window=window, title=title), described(runs))


def leak_measures(frame: pd.DataFrame, title: str) -> Figure:
    """Every measure of leakage in a panel: a point per run with its own 95 % interval.

    `frame` has the rows of `leakage.summarise`, and a column `arm`, whose values get a row each. The
    band is the base model's interval, the dashed line the mean null value of the runs. Raises
    ValueError for an absent column, or no row of a model.
    """
    data = _present(frame, ["arm", "measure", "of", "null", "mean", "low", "high"], "mean")
    colours, measures = _colours(data["arm"]), list(dict.fromkeys(data["measure"]))
    figure, panels = _panels(len(measures), (2.2 * len(measures) + 2.2, 0.4 * len(colours) + 1.6))
    for axes, measure in zip(panels, measures, strict=True):
        rows = data[data["measure"] == measure]
        base, model = (rows[rows["of"] == of] for of in ("base", "model"))
        axes.axvspan(base["low"].min(), base["high"].max(), color="0.85", label="base model")
        axes.axvline(model["null"].mean(), color="0.3", linestyle="--", linewidth=1, label="null")
        for place, (name, colour) in enumerate(colours.items()):
            chosen = model[model["arm"] == name]
            heights = place + 0.6 * ((np.arange(len(chosen)) + 0.5) / len(chosen) - 0.5)
            axes.hlines(heights, chosen["low"], chosen["high"], color=colour, linewidth=1.2)
            axes.plot(chosen["mean"], heights, "o", color=colour, markersize=4)
        axes.set_title(measure, loc="left", fontsize=10)
        axes.set(xlabel="nats" if measure == "evidence" else "share")
    labels = [textwrap.fill(str(name), 34) for name in colours]
    panels[0].set_yticks(range(len(labels)), labels, fontsize=8)
    panels[0].set_ylim(len(labels) - 0.4, -0.6)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="upper right", ncols=2)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def costs(ratios: pd.DataFrame) -> Figure:
    """What training costs beside a base: a panel per model, a row per trainer, a bar per column.

    The index of `ratios` reads "MODEL, TRAINER"; each column is a cost over the base's.
    """
    names = ratios.index.str.split(", ", n=1)
    data = ratios.assign(model=names.str[0], trainer=names.str[1])
    data = data.melt(["model", "trainer"], var_name="cost", value_name="ratio")
    models = data.groupby("model", sort=False)
    size = 3 * len(models) + 2, 0.4 * data["trainer"].nunique() + 1.4
    figure, panels = _panels(len(models), size)
    look = {"x": "ratio", "y": "trainer", "hue": "cost", "palette": "colorblind"}
    for axes, (model, rows) in zip(panels, models, strict=True):
        sns.barplot(rows, ax=axes, legend=axes is panels[-1], **look)
        axes.axvline(1, color="0.3", linestyle="--", linewidth=1)
        axes.set_title(model, loc="left", fontsize=10)
        axes.set(xlabel="over the base's", ylabel="")
    sns.move_legend(panels[-1], "upper left", bbox_to_anchor=(1, 1), title=None, frameon=False)
    return figure


def canvas(title: str) -> tuple[Figure, Axes]:
    """Return an empty figure with one pair of axes, in the look of the others."""
    figure, (axes,) = _panels(1, SIZE)
    axes.set_title(title, loc="left", fontsize=11, parse_math=False)
    sns.despine(ax=axes)
    return figure, axes


def footnote(figure: Figure, text: str) -> Figure:
    """Write small text under a figure, such as which runs it shows; returns the figure."""
    lines = "\n".join(textwrap.wrap(text, 120, break_on_hyphens=False))
    figure.text(0.01, -0.01, lines, fontsize=7, color="0.35", va="top", parse_math=False)
    return figure


def _panels(count: int, size: tuple[float, float]) -> tuple[Figure, Sequence[Axes]]:
    figure = new_figure(size)
    with sns.axes_style("whitegrid"):
        return figure, figure.subplots(1, count, sharey=True, squeeze=False)[0]


def _present(frame: pd.DataFrame, columns: list[str], needed: str) -> pd.DataFrame:
    """These columns of the finished runs' rows that have the needed value."""
    absent = [name for name in columns if name not in frame]
    if absent:
        raise ValueError(f"no column {', '.join(absent)}; there are {', '.join(map(str, frame))}")
    finished = is_finished(frame)
    data = frame.loc[finished & frame[needed].notna(), columns]
    if data.empty:
        also = "" if finished.all() else "; rows of unfinished runs are left out"
        raise ValueError(f"no value in column {needed}: nothing to show{also}")
    return data.reset_index(drop=True)


def _colours(names: Iterable[object]) -> dict[object, Colour]:
    """A colour per name, in order of appearance."""
    unique = list(dict.fromkeys(names))
    return dict(zip(unique, sns.color_palette("colorblind", len(unique)), strict=True))


def _name_legend(axes: Axes, runs: pd.Series) -> None:
    """Say under the axes, which get room for it, how many runs each line stands for."""
    handles, names = axes.get_legend_handles_labels()
    labels = [f"{name} (runs: {runs[name]})" if name in runs else name for name in names]
    columns = 2 if max(map(len, labels)) < 44 else 1
    axes.get_figure().set_size_inches(SIZE[0], SIZE[1] + 0.18 * -(-len(labels) // columns))
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": columns}
    axes.legend(handles, labels, title=None, fontsize=8, frameon=False, handlelength=3, **place)
