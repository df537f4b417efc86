"""Run directories as one table: a row per method, seeds taken together, nothing left out."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from rlsd_lib.measure.intervals import (
    Interval,
    paired_interval,
    smallest_detectable,
    student_interval,
)
from rlsd_lib.runs.paths import flat_settings
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


class Table(NamedTuple):
    """The rows of the table, and what a reader must be told beside them."""

    rows: pd.DataFrame
    notes: list[str]

    def markdown(self) -> str:
        """The table and its notes as aligned Markdown."""
        notes = "\n".join(f"- {note}" for note in self.notes)
        return "\n\n".join(part for part in (_markdown(self.rows), notes) if part)

    def csv(self) -> str:
        """The rows as CSV, and a comment line (#) where runs are left out of them."""
        notes = [f"\n# {note}" for note in self.notes if "INCOMPLETE" in note]
        return self.rows.to_csv(index=False).rstrip() + "".join(notes)

    def _repr_markdown_(self) -> str:
        """What a notebook shows: the table is never seen without its notes."""
        return self.markdown()


def make_table(runs: Runs) -> Table:
    """One row per group, method and settings, with its seeds taken together.

    Several seeds: mean over seeds, with the Student 95 % interval of that mean. One seed: the
    run's own numbers, with the interval over its evaluation problems. Runs that did not finish
    give no numbers; they stand in the notes.
    """
    frame = runs.runs
    if frame.empty:
        return Table(frame, ["no runs here yet"])
    finished = frame[frame["status"] == "finished"]
    metrics = [name for name in METRICS if name in frame and frame[name].notna().any()]
    measured = finished[finished[metrics].notna().any(axis=1)] if metrics else finished.iloc[:0]
    keyed = measured.assign(settings=[settings_of(p) for p in measured["parameters"]])
    keys = [k for k in ("group", "method", "preset", "settings") if k in keyed]
    groups = [cells for _, cells in keyed.groupby(keys, sort=True, dropna=False)]
    rows = pd.DataFrame([_row(cells, keys, metrics) for cells in groups])
    notes = [note for cells in groups for note in _warnings(cells)]
    notes += _interval_note(groups)
    notes += [f"finished, no metrics: {p}" for p in finished.drop(measured.index)["path"]]
    return Table(_drop_constant(rows), [*dict.fromkeys(notes), *source_notes(runs)])


def source_notes(runs: Runs) -> list[str]:
    """Which runs a table is made from, and a line for each that gave it nothing.

    Runs did so that failed, still run, were killed, or were planned and never started.
    """
    missing = runs.runs[~is_finished(runs.runs)]
    lines = [_incomplete(run) for _, run in missing.iterrows()]
    more = [f"and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
    return [described(runs), *lines[:MOST_LINES], *more]


def paired_differences(runs: Runs, baseline: str = "grpo") -> Table:
    """Accuracy after training minus the baseline's, on the same problems and the same seeds.

    A run is compared with the baseline's run of the same preset, seed and settings; where there is
    no other, with that without its control, or else with that which sets its length alone. A row per
    method and settings: the mean difference, its 95 % interval over problems (a bootstrap) and over
    seeds (Student's t; NaN for one seed), the smallest difference that so many seeds would find with
    80 % power, and the number of shared seeds. What has no partner stands in the notes.

    Raises:
        ValueError: no finished run of `baseline`, or runs that were judged on other problems.
    """
    frame, repeated = each_once(with_arms(runs.runs[runs.runs["status"] == "finished"]))
    rows_of_base = frame[frame["method"] == baseline]
    base = {_place(run, run["parameters"]): run for _, run in rows_of_base.iterrows()}
    if not base:
        raise ValueError(f"no finished run of {baseline!r} to compare with")
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
        "intervals are of 95 %: over problems a bootstrap, over seeds Student's t; one that holds 0 "
        "settles nothing",
        "detectable: the smallest true difference that a repetition with so many seeds would find "
        "in four cases of five, from the spread between these seeds",
    ]
    return Table(table, [*notes, *alone, *repeated, *source_notes(runs)])


def each_once(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows of `with_arms`, one for each arm and seed, and a note on what was left out.

    A run that two suites share is one piece of evidence, not two seeds.
    """
    again = frame["arm"].notna() & frame.duplicated(["arm", "seed"])
    names = ", ".join(frame.loc[again, "path"].map(lambda path: "/".join(Path(path).parts[-2:])))
    notes = [f"left out, the same settings and seed as another run: {names}"] if names else []
    return frame[~again], notes


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
    return (run.get("preset"), run["seed"], settings_of(parameters))


def _compared(pairs: Sequence[tuple[pd.Series, pd.Series]]) -> tuple[float, ...]:
    """Mean difference of paired runs, four ends of intervals, and what could have been seen."""
    ours, theirs = ([_evaluation(run) for run in side] for side in zip(*pairs, strict=True))
    if len({one.problems for one in (*ours, *theirs)}) > 1:
        names = " and ".join(sorted({run["name"] for pair in pairs for run in pair}))
        raise ValueError(f"{names} were not judged on the same problems")
    scores = [one.correct for one in theirs], [one.correct for one in ours]
    problems, seeds = (paired_interval(*scores, over=over) for over in ("problems", "seeds"))
    seen = smallest_detectable(np.subtract(scores[1], scores[0]).mean(axis=1))
    return (problems.mean, *problems[1:], *seeds[1:], seen)


class _Evaluation(NamedTuple):
    problems: str  # fingerprint of the test rows, references apart
    correct: list[float]  # share correct, problem by problem


def _evaluation(run: pd.Series) -> _Evaluation:
    shares = json.loads((Path(run["path"]) / "evaluation_after.json").read_text())["correct"]
    return _Evaluation(read_manifest(run["path"])["data"]["problems"], shares)


def settings_of(parameters: Mapping[str, Any]) -> str:
    """What sets a run apart beside method, preset and seed, as one line."""
    flat = flat_settings(parameters)
    return ", ".join(f"{name}={flat[name]}" for name in sorted(flat))


def with_arms(frame: pd.DataFrame) -> pd.DataFrame:
    """Add a column `arm`: the method, and of its preset and settings what is not alike in all runs.

    `frame` is `Runs.runs`; runs without parameters (killed at once, never started) have no arm.
    """
    known = frame[frame["parameters"].notna()]
    given = [{"preset": p.get("preset"), **flat_settings(p)} for p in known["parameters"]]
    names = {name for settings in given for name in settings}
    apart = {n for n in names if len({repr(settings.get(n)) for settings in given}) > 1}
    labels = []
    for method, found in zip(known["method"], given, strict=True):
        told = [found["preset"]] if "preset" in apart else []
        told += [f"{name}={found[name]}" for name in sorted(apart - {"preset"}) if name in found]
        labels.append(f"{method} ({', '.join(told)})" if told else method)
    return frame.assign(arm=pd.Series(labels, index=known.index, dtype=object))


def _row(cells: pd.DataFrame, keys: list[str], metrics: list[str]) -> dict[str, str]:
    first = cells.iloc[0]
    row = {key: str(first[key]) for key in keys if pd.notna(first[key])}
    if "seed" in cells:
        row["seeds"] = " ".join(f"{seed:g}" for seed in sorted(cells["seed"].dropna()))
    row["n"] = str(len(cells))
    return {**row, **{METRICS[name][0]: _cell(cells, name) for name in metrics}}


def _cell(cells: pd.DataFrame, name: str) -> str:
    values = [v for v in cells[name] if is_number(v)]
    if not values:
        return DASH
    digits, found = METRICS[name][1], student_interval(values)
    if not found.is_known and f"{name}_low" in cells:
        found = Interval(found.mean, cells[f"{name}_low"].iloc[0], cells[f"{name}_high"].iloc[0])
    partial = f" (n={len(values)})" if len(values) < len(cells) else ""
    shown = found if name.startswith("accuracy") else found.mean
    return f"{shown:.{digits}f}{partial}"


def _warnings(cells: pd.DataFrame) -> list[str]:
    label = " ".join(str(cells.iloc[0].get(k, "")) for k in ("group", "method", "preset")).strip()
    notes = []
    if "seed" in cells and cells["seed"].duplicated().any():
        notes.append(f"{label}: a seed stands more than once, so the interval is too narrow")
    if cells["commit"].nunique(dropna=False) > 1:
        notes.append(f"{label}: its runs come from different commits")
    if (cells["dirty"] == True).any():  # noqa: E712  the column also holds None
        notes.append(f"{label}: run from code that was not committed")
    return notes


def _interval_note(groups: list[pd.DataFrame]) -> list[str]:
    kinds = {len(cells) > 1 for cells in groups}
    said = {
        True: "n > 1: mean over seeds, 95 % Student interval of the mean",
        False: "n = 1: one seed; its interval is over problems and says nothing about other seeds",
    }
    return [said[kind] for kind in sorted(kinds, reverse=True)]


def _incomplete(run: pd.Series) -> str:
    error = run.get("error")
    reason = f": {error}" if isinstance(error, str) else ""
    return f"{run['status']}, not in the table: {run['path']}{reason}"


def _drop_constant(rows: pd.DataFrame) -> pd.DataFrame:
    """Leave out the columns that say the same everywhere and nothing in themselves."""
    plain = [k for k in ("settings",) if k in rows and (rows[k] == "").all()]
    same = [k for k in ("group",) if k in rows and rows[k].nunique() == 1]
    return rows.drop(columns=plain + same).fillna(DASH)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if is_number(value) else DASH
    return str(value) or DASH


def _markdown(rows: pd.DataFrame) -> str:
    if rows.empty:
        return ""
    lines = [list(rows.columns), *([_text(v) for v in row] for row in rows.values.tolist())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines]
    rule = ["-" * width for width in widths]
    return "\n".join("| " + " | ".join(line) + " |" for line in [padded[0], rule, *padded[1:]])
