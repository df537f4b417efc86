"""Run directories as tables: a row per method, seeds taken together, nothing left out.

`Arms` picks the plain runs of one preset, which claims and the tables of the paper are about.
"""

import json
import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from IPython.display import HTML
from pandas.io.formats.style import Styler

from rlsd_lib.measure.intervals import (
    Interval,
    bootstrap_interval,
    smallest_detectable,
    student_interval,
)
from rlsd_lib.runs.paths import flat_settings, settings
from rlsd_lib.runs.records import Runs, described, is_finished, is_number, read_manifest

DASH = "-"
MOST_LINES = 12  # of runs named one by one under a table
# Column of metrics.json -> heading, digits. An interval stands beside accuracy alone.
METRICS = {
    "accuracy_before": ("accuracy before", 3),
    "accuracy_after": ("accuracy after", 3),
    "accuracy_greedy_after": ("greedy after", 3),
    "pass@4_after": ("pass@4 after", 3),
    "pass@8_after": ("pass@8 after", 3),
    "reward": ("reward", 3),
    "entropy": ("entropy", 3),
    "rlsd/clip_low_frac": ("clip low", 4),
    "rlsd/clip_high_frac": ("clip high", 4),
    "rlsd/intervention": ("intervention", 4),
    "leak_rate_before": ("leak before", 3),
    "leak_rate_after": ("leak after", 3),
    "seconds_per_step": ("s / step", 2),
}
SHARES = ("accuracy", "pass@", "leak_rate", "right_chain")  # begin the names of what lies in [0, 1]
# What a logged metric is, in words and with its unit.
WORDS = {
    "reward": "mean reward of the step's rollouts",
    "entropy": "entropy, nats per token",
    "rewards/leak/mean": "share of rollouts that speak of a reference",
    "rlsd/divergence": "divergence of teacher and student, nats per token",
    "rlsd/intervention": "mean of |token advantage / A - 1|",
    "rlsd/clip_low_frac": "share of tokens clipped from below",
    "rlsd/clip_high_frac": "share of tokens clipped from above",
    "rlsd/gap_mean": "mean of the gap, nats",
    "rlsd/gap_abs_mean": "mean size of the gap, nats",
    "rlsd/weight_mean": "mean weight after clipping",
    "rlsd/teacher_age": "optimiser steps since the teacher was renewed",
    "rlsd/reference_in_prompt_frac": "share of questions that hold their reference by chance",
    "rlsd/lambda": "lambda",
    "rlsd/drift": "pull to the teacher without a verdict / reverse KL's",
    "leak_rate_after": "leak rate after training",
}
# The same of columns and rows in a notebook's table.
HEADINGS = {"low": "95 % interval from", "high": "to", "gap": "gap, nats", "place": "token number"}
HEADINGS |= {"rank": "rank, 0 for the most negative", "auroc_gap": "share of other tokens above it"}
HEADINGS |= {"noise / signal": "variance of a batch's gradient / its squared mean"}
HEADINGS |= {"first error": "blame on the first error, share", "filler": "on filler words"}
HEADINGS |= {"accuracy_greedy": "accuracy, greedy", "leak_rate": "leak rate"}
HEADINGS |= {"right_chain": "probability of a right chain"}
# Columns that a narrow screen can do without, the first of them first.
LEAST = (
    *("clip low", "clip high", "intervention", "entropy", "greedy after", "pass@4 after"),
    *("pass@8 after", "s / step", "reward", "leak before", "detectable", "seeds"),
    *("accuracy before", "n"),
)
NARROW = 26  # to which a column of words may be wrapped before others go
FIRST, LAST = 3, 10  # steps averaged at the start and at the end of a curve
NO_VALUES = pd.Series(dtype=float)


class Table(NamedTuple):
    """Rows, and the notes without which nobody should read them."""

    rows: pd.DataFrame
    notes: list[str]

    def markdown(self) -> str:
        """Return the table as aligned Markdown, with a list of its notes below."""
        notes = "\n".join(f"- {note}" for note in self.notes)
        return "\n\n".join(part for part in (_markdown(self.rows), notes) if part)

    def _repr_html_(self) -> str:
        """Return the rows, in a box that scrolls where the page is narrower, and the notes below."""
        whole = _joined(self.rows).replace(r" (?=\[)|(?<=,) (?=\S+\])", "\u00a0", regex=True)
        rows = readable(whole).hide(axis="index").to_html()
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
        return f'<div style="overflow-x: auto">{rows}</div><ul>{notes}</ul>'

    def fitted(self, width: int) -> str:
        """Return the table in lines of at most `width` characters, but for paths.

        Columns of `LEAST` go, as far as they must, and are named; then the longest is wrapped.
        """
        rows, gone = _joined(self.rows), []
        for name in [name for name in LEAST if name in rows]:
            if _wide(rows, NARROW) > width:
                rows, gone = rows.drop(columns=name), [*gone, name]
        notes = [*self.notes, *([f"no room for {', '.join(gone)}: --all"] if gone else [])]
        how = {"initial_indent": "- ", "subsequent_indent": "  ", "break_on_hyphens": False}
        lines = [
            f"- {note}" if " /" in note.replace(" / ", "") else textwrap.fill(note, width, **how)
            for note in notes
        ]
        return "\n\n".join(filter(None, (_markdown(_wrapped(rows, width)), "\n".join(lines))))


def _joined(rows: pd.DataFrame) -> pd.DataFrame:
    """Columns "low, x" and "high, x" as one, of texts."""
    texts = rows.map(_text)
    for low in [name for name in rows if str(name).startswith("low, ")]:
        over = low.removeprefix("low, ")
        ends = "[" + texts[low] + ", " + texts.pop(f"high, {over}") + "]"
        texts[low] = ends.where(rows[low].notna(), DASH)
        texts = texts.rename(columns={low: f"over {over}"})
    return texts


def _wide(rows: pd.DataFrame, most: float = math.inf) -> int:
    """Characters of a row, with columns of `most` characters at most."""
    widths = [max(len(name), *map(len, rows[name])) for name in rows]
    return sum(min(width, most) + 3 for width in widths) + 1


def _wrapped(rows: pd.DataFrame, width: int) -> pd.DataFrame:
    """The rows with their longest column over several lines, if they are wider than `width`."""
    if (more := _wide(rows) - width) <= 0:
        return rows
    lengths = rows.map(len).max()
    longest, lines = lengths.idxmax(), []
    for row in rows.to_dict("records"):
        parts = textwrap.wrap(row[longest], max(lengths[longest] - more, 12)) or [""]
        lines.append({**row, longest: parts[0]})
        lines += [{**dict.fromkeys(row, " "), longest: part} for part in parts[1:]]
    return pd.DataFrame(lines)


def _markdown(rows: pd.DataFrame) -> str:
    if rows.empty:
        return ""
    lines = [list(rows.columns), *([_text(v) for v in row] for row in rows.values.tolist())]
    lines = [[" ".join(cell.splitlines()).replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if is_number(value) else DASH
    return str(value) or DASH


def make_table(runs: Runs) -> Table:
    """Return one row per group, method, preset and settings, with its seeds taken together.

    Several seeds: their mean with Student's 95 % interval. One seed: the run's own numbers, with the
    interval over its problems. Runs that did not finish give none; the notes name them.
    """
    frame = runs.runs
    if frame.empty:
        return Table(frame, ["no runs here yet"])
    keys, metrics, groups = _grouped(frame)
    rows = pd.DataFrame([_row(cells, keys, metrics) for cells in groups]).fillna(DASH)
    alike = [k for k in (*keys, "seeds") if k != "method" and k in rows and rows[k].nunique() == 1]
    said = [f"{k} {rows[k][0]}" for k in ("preset", "settings") if k in alike and rows[k][0]]
    rows = rows.drop(columns=alike)
    notes = [f"in every row: {', '.join(said)}"] if said else []
    notes += [note for cells in groups for note in _warnings(cells)]
    notes.append("mean over n seeds, Student's 95 % interval; n = 1: over problems, not over seeds")
    bare = frame[is_finished(frame) & frame[metrics].isna().all(axis=1)]
    notes += [f"finished, no metrics: {path}" for path in bare["path"]]
    return Table(rows, [*dict.fromkeys(notes), *source_notes(runs)])


def numbers(runs: Runs) -> pd.DataFrame:
    """Return the rows of `make_table` as numbers: of each metric the mean, `_low` and `_high`."""
    if runs.runs.empty:
        return runs.runs
    keys, metrics, groups = _grouped(runs.runs)
    ends = ("", "_low", "_high")
    return pd.DataFrame(
        {**cells.iloc[0][keys], "n": len(cells)}
        | {
            f"{name}{end}": value
            for name in metrics
            for end, value in zip(ends, interval_of(cells, name), strict=True)
        }
        for cells in groups
    )


def _grouped(frame: pd.DataFrame) -> tuple[list[str], list[str], list[pd.DataFrame]]:
    """What sets groups apart, the metrics that any run has, and the finished runs of each group."""
    metrics = [name for name in METRICS if name in frame and frame[name].notna().any()]
    measured = frame[is_finished(frame) & frame[metrics].notna().any(axis=1)]
    keyed = measured.assign(settings=[settings_of(p) for p in measured["parameters"]])
    keys = [k for k in ("group", "method", "preset", "settings") if k in keyed]
    return keys, metrics, [cells for _, cells in keyed.groupby(keys, sort=True, dropna=False)]


def _row(cells: pd.DataFrame, keys: list[str], metrics: list[str]) -> dict[str, str]:
    first = cells.iloc[0]
    row = {key: str(first[key]) for key in keys if pd.notna(first[key])}
    if "seed" in cells:
        row["seeds"] = " ".join(f"{seed:g}" for seed in sorted(cells["seed"].dropna()))
    row["n"] = str(len(cells))
    return {**row, **{METRICS[name][0]: _cell(cells, name) for name in metrics}}


def interval_of(cells: pd.DataFrame, name: str) -> Interval:
    """A metric over seeds with Student's interval; of one seed with the run's own, if it has one."""
    values = [v for v in cells.get(name, ()) if is_number(v)]
    if not values:
        return Interval(math.nan, math.nan, math.nan)
    found = student_interval(values)
    if name.startswith(SHARES):
        found = found.within(0, 1)
    if not found.is_known and f"{name}_low" in cells:
        found = Interval(found.mean, *cells[[f"{name}_low", f"{name}_high"]].iloc[0])
    return found


def _cell(cells: pd.DataFrame, name: str) -> str:
    values = [v for v in cells[name] if is_number(v)]
    if not values:
        return DASH
    found = interval_of(cells, name)
    shown = found if name.startswith("accuracy") else found.mean
    partial = f" (n={len(values)})" if len(values) < len(cells) else ""
    return f"{shown:.{METRICS[name][1]}f}{partial}"


def _warnings(cells: pd.DataFrame) -> list[str]:
    label = " ".join(str(cells.iloc[0].get(k, "")) for k in ("group", "method", "preset")).strip()
    found = {
        "a seed stands more than once, so the interval is too narrow": "seed" in cells
        and cells["seed"].duplicated().any(),
        "its runs come from different commits": cells["commit"].nunique(dropna=False) > 1,
        "run from code that was not committed": cells["dirty"].eq(True).any(),
    }
    return [f"{label}: {warning}" for warning, holds in found.items() if holds]


def source_notes(runs: Runs) -> list[str]:
    """Return which runs a table is made from, and a line for each that did not finish."""
    lines = []
    for _, run in runs.runs[~is_finished(runs.runs)].iterrows():
        reason = f": {run['error']}" if isinstance(run.get("error"), str) else ""
        lines.append(f"{run['status']}, not in the table: {run['path']}{reason}")
    more = [f"and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
    return [described(runs), *lines[:MOST_LINES], *more]


def paired_differences(runs: Runs, baseline: str = "grpo") -> Table:
    """Return accuracy after training minus the baseline's, on the same problems and seeds.

    A run is compared with the baseline's run of the same preset, seed and settings; where there is
    none, with that without its control, or else with that which sets its length alone. A row per
    method and settings: the mean difference, its 95 % interval over problems (a bootstrap) and
    seeds (Student's t; NaN for one), the smallest difference that so many seeds would find with 80
    % power, and the number of shared seeds. The notes name what has no partner. Raises ValueError
    without a finished run of `baseline`, or for runs that were judged on other problems.
    """
    done = runs.runs[is_finished(runs.runs)]
    if baseline not in set(done.get("method", ())):
        raise ValueError(f"no finished run of {baseline!r} to compare with")
    frame = with_arms(done)
    # A run that two suites share is one piece of evidence, not two seeds.
    again = frame.duplicated(["arm", "seed"])
    names = ", ".join("/".join(Path(path).parts[-2:]) for path in frame.loc[again, "path"])
    repeated = [f"left out, the same settings and seed as another run: {names}"] if names else []
    frame = frame[~again]
    rows_of_base = frame[frame["method"] == baseline]
    base = {_place(run, run["parameters"]): run for _, run in rows_of_base.iterrows()}
    rows, alone = [], []
    for arm, cells in frame.groupby("arm"):
        pairs = [(run, _partner(run, base)) for _, run in cells.iterrows()]
        pairs = [(run, other) for run, other in pairs if other is not None]
        if pairs:
            rows.append((arm, *_compared(pairs), len(pairs)))
        elif (cells["method"] != baseline).any():
            alone.append(f"no {baseline} run of the same preset, length and seed as {arm}")
    ends = [f"{end}, {over}" for over in ("problems", "seeds") for end in ("low", "high")]
    columns = ["method", f"accuracy - {baseline}", *ends, "detectable", "n seeds"]
    table = pd.DataFrame(rows, columns=columns).sort_values(columns[1], ascending=False)
    notes = [
        "intervals of 95 %: bootstrap over problems, Student's t over seeds; 0 inside settles nothing",
        "detectable: the smallest true difference that so many seeds would find in four cases of five",
    ]
    return Table(table, [*notes, *alone, *repeated, *source_notes(runs)])


def _partner(run: pd.Series, base: Mapping[tuple[Any, ...], pd.Series]) -> pd.Series | None:
    """The baseline's run that differs least: in the method, else the control, else all settings."""
    given = run["parameters"]
    # A peer's rollout in place of the reference is a control that is set as an override.
    own = {k: v for k, v in given.get("overrides", {}).items() if k != "peer_context"}
    uncontrolled = {**given, "overrides": own, "control": "none"}
    plain = {name: value for name, value in given.items() if name == "max_steps"}
    for parameters in (given, uncontrolled, plain):
        other = base.get(_place(run, parameters))
        if other is not None and other["path"] != run["path"]:
            return other
    return None


def _place(run: pd.Series, parameters: Mapping[str, Any]) -> tuple[Any, ...]:
    return run.get("preset"), run["seed"], settings_of(parameters)


def _compared(pairs: Sequence[tuple[pd.Series, pd.Series]]) -> tuple[float, ...]:
    """Mean difference of paired runs, four ends of intervals, and what could have been seen."""
    problems = {read_manifest(run["path"])["data"]["problems"] for pair in pairs for run in pair}
    if len(problems) > 1:
        names = " and ".join(sorted({run["name"] for pair in pairs for run in pair}))
        raise ValueError(f"{names} were not judged on the same problems")
    ours, theirs = ([_correct(run["path"]) for run in side] for side in zip(*pairs, strict=True))
    differences = np.subtract(ours, theirs)  # (seeds, problems)
    by_problem = bootstrap_interval(differences.mean(axis=0))
    by_seed = student_interval(differences.mean(axis=1)).within(-1, 1)
    seen = smallest_detectable(differences.mean(axis=1))
    return (*by_problem, by_seed.low, by_seed.high, seen)


def _correct(path: str) -> list[float]:
    """The share of correct completions, problem by problem."""
    return json.loads((Path(path) / "evaluation_after.json").read_text())["correct"]


def settings_of(parameters: Mapping[str, Any]) -> str:
    """Return what sets a run apart beside method, preset and seed, as one line."""
    flat = flat_settings(parameters)
    return ", ".join(f"{name}={flat[name]}" for name in sorted(flat))


def with_arms(frame: pd.DataFrame, but: Collection[str] = ()) -> pd.DataFrame:
    """Add a column `arm`: the method, and of its preset and settings what is not alike in all runs.

    `frame` is `Runs.runs`; runs without parameters have no arm. `but` names settings that do not
    tell arms apart.
    """
    known = frame[frame["parameters"].notna()]
    given = [{"preset": p.get("preset"), **flat_settings(p)} for p in known["parameters"]]
    names = {name for found in given for name in found} - set(but)
    apart = {n for n in names if len({repr(found.get(n)) for found in given}) > 1}
    labels = []
    for method, found in zip(known["method"], given, strict=True):
        parts = [found["preset"]] if "preset" in apart and found["preset"] else []
        parts += [f"{name}={found[name]}" for name in sorted(apart - {"preset"}) if name in found]
        labels.append(f"{method} ({', '.join(parts)})" if parts else method)
    return frame.assign(arm=pd.Series(labels, index=known.index, dtype=object))


def together(*folders: Runs) -> Runs:
    """Return several folders' runs as one, such as a suite's and those of its ablations."""
    runs, steps = zip(*folders, strict=True)
    return Runs(*(pd.concat(frames, ignore_index=True) for frames in (runs, steps)))


class Arms:
    """Finished plain runs of one preset, without override or control, by method and seed.

    Values are a series with an entry per seed, empty where there is no such run. `preset` is "" for
    that of most plain runs; `length` is the steps of most RLSD runs, else of most runs, else 0.
    """

    def __init__(self, runs: Runs, preset: str = "") -> None:
        self.runs = runs
        needed = pd.Index(["status", "parameters", "method", "preset", "steps", "seed", "path"])
        frame = runs.runs.reindex(columns=runs.runs.columns.union(needed, sort=False))
        frame = frame[is_finished(frame) & frame["steps"].notna()]
        frame = frame.loc[[settings(p).keys() <= {"max_steps"} for p in frame["parameters"]]]
        self.preset = preset or next(iter(frame["preset"].value_counts().index), "")
        self.frame = frame[frame["preset"] == self.preset]
        rlsd = self.frame[self.frame["method"] == "rlsd"]
        lengths = (self.frame if rlsd.empty else rlsd)["steps"].value_counts()
        self.length = int(next(iter(lengths.index), 0))

    def __str__(self) -> str:
        if not self.length:
            return "no runs"
        methods = sorted(self.frame.loc[self.frame["steps"] == self.length, "method"].unique())
        return f"preset {self.preset}, {self.length} steps; plain runs of {', '.join(methods)}"

    def final(self, method: str, column: str, *, steps: int | None = None) -> pd.Series:
        """Return a number of metrics.json, one per seed, from runs of `steps` (default: `length`)."""
        return self._of(method, steps).get(column, NO_VALUES).astype(float).dropna()

    def gain(self, method: str, *, steps: int | None = None) -> pd.Series:
        """Return accuracy after training minus before, one per seed."""
        before = self.final(method, "accuracy_before", steps=steps)
        return (self.final(method, "accuracy_after", steps=steps) - before).dropna()

    def curve(self, method: str, column: str) -> pd.DataFrame:
        """Return a logged column of runs of `length`: a row per step, a column per seed."""
        steps = self.runs.steps.reindex(columns=["path", "step", "seed", column])
        mine = steps[steps["path"].isin(self._of(method)["path"])]
        return mine.pivot_table(column, "step", "seed")

    def mean(self, method: str, column: str, first: int, last: int) -> pd.Series:
        """Return the mean of a logged column over steps `first` to `last`, one per seed."""
        return self.curve(method, column).loc[first:last].mean()

    def start(self, method: str, column: str) -> pd.Series:
        """Return the mean over the first steps, one per seed."""
        return self.mean(method, column, 1, FIRST)

    def end(self, method: str, column: str) -> pd.Series:
        """Return the mean over the last steps, one per seed."""
        return self.mean(method, column, self.length - LAST + 1, self.length)

    def _of(self, method: str, steps: int | None = None) -> pd.DataFrame:
        wanted = self.length if steps is None else steps
        chosen = self.frame[(self.frame["method"] == method) & (self.frame["steps"] == wanted)]
        return chosen.drop_duplicates("seed").set_index("seed").sort_index()


def readable(frame: pd.DataFrame) -> Styler:
    """Return a table for a notebook: `HEADINGS`, all left, text whole with its line ends, escaped."""
    frame = frame.rename(index=HEADINGS, columns=HEADINGS)
    look = {
        "selector": "*",
        "props": "text-align: left; vertical-align: top; white-space: pre-wrap",
    }
    table = frame.style.format(_digits, escape="html").format_index(escape="html", axis="columns")
    return table.set_table_styles([look])


def _digits(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    if not is_number(value):
        return "too large to tell" if value == math.inf else DASH
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def answer(text: str) -> HTML:
    """Return an exercise's answer, folded away until a reader opens it."""
    return HTML(f"<details><summary>the answer</summary><pre>{escape(text)}</pre></details>")
