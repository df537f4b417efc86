"""Figures over a folder of runs: the paper's, for ours. Under each stands which runs it shows.

Every function takes all runs, shows the finished ones and names those that are left out.
"""

import pandas as pd
from matplotlib.figure import Figure

from rlsd_lib.report import plots
from rlsd_lib.report.arms import Arms
from rlsd_lib.report.tables import with_arms
from rlsd_lib.runs.records import Runs, described

CLIPS = {"rlsd/clip_low_frac": "low side", "rlsd/clip_high_frac": "high side"}


def curve(runs: Runs, metric: str, *, window: int = 1, title: str = "") -> Figure:
    """A logged metric against the step, one line per method and settings.

    Raises:
        ValueError: no finished run logged it.
    """
    frame = with_arms(runs.runs)
    names = list(dict.fromkeys(frame.loc[frame["status"] == "finished", "arm"]))
    figure = plots.training_curve(
        _lines(runs), metric, hue="arm", names=names, window=window, title=title
    )
    return plots.footnote(figure, described(runs))


def logged(runs: Runs, metric: str) -> bool:
    """Whether a finished run has a value of a metric other than 0."""
    return metric in runs.steps and bool(_lines(runs)[metric].any())


def clip_fractions(runs: Runs, *, window: int = 1) -> Figure:
    """The share of RLSD's tokens whose weight is clipped, by side (the paper's Figure 5c).

    Raises:
        ValueError: no finished run of RLSD logged it.
    """
    lines = _lines(runs)
    rlsd = lines[(lines["method"] == "rlsd") & lines["path"].isin(Arms(runs).frame["path"])]
    sides = [
        rlsd[["step", "path"]].assign(side=name, share=rlsd.get(column))
        for column, name in CLIPS.items()
    ]
    title = "share of tokens whose weight is clipped, plain RLSD"
    figure = plots.training_curve(pd.concat(sides), "share", hue="side", window=window, title=title)
    return plots.footnote(figure, described(runs))


def double_budget(runs: Runs) -> Figure:
    """RLSD at N steps beside GRPO at N and at 2N (the paper's Figure 1b).

    Raises:
        ValueError: no plain run of either.
    """
    measure, n, series = Arms(runs).doubled()
    names = (f"rlsd, {n} steps", f"grpo, {n} steps", f"grpo, {2 * n} steps")
    values = dict(zip(names, series, strict=True))
    figure = plots.means(values, ylabel=measure, title=f"twice the steps: {measure}")
    return plots.footnote(figure, described(runs))


def before_after(runs: Runs) -> Figure:
    """Accuracy before and after training, a pair per run, by method and settings."""
    frame = with_arms(runs.runs)
    figure = plots.before_after(frame[frame["status"] == "finished"], hue="arm")
    return plots.footnote(figure, described(runs))


def _lines(runs: Runs) -> pd.DataFrame:
    """The logged steps of the finished runs, with their arms."""
    arms = with_arms(runs.runs).set_index("path")["arm"]
    steps = runs.steps[runs.steps["status"] == "finished"]
    return steps.assign(arm=steps["path"].map(arms))
