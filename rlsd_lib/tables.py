"""Run directories as one table: a row per method, seeds taken together, nothing left out."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from scipy import stats

from rlsd_lib.evaluate import paired_interval
from rlsd_lib.provenance import settings
from rlsd_lib.records import Runs, is_number, read_manifest

DASH = "-"
# Column of metrics.json -> heading, digits. An interval stands beside accuracy alone.
METRICS = {
    "accuracy_before": ("accuracy before", 3),
    "accuracy_after": ("accuracy after", 3),
    "reward": ("reward", 3),
    "entropy": ("entropy", 3),
    "rlsd/clip_low_frac": ("clip low", 4),
    "rlsd/clip_high_frac": ("clip high", 4),
    "rlsd/intervention": ("intervention", 4),
    "leak_rate_before": ("leak before", 3),
    "leak_rate_after": ("leak after", 3),
    "seconds_per_step": ("s / step", 2),
}


class Estimate(NamedTuple):
    """A mean with its 95 % interval; the ends are None where there is no interval."""

    mean: float
    low: float | None
    high: float | None


class Table(NamedTuple):
    """The rows of the table, and what a reader must be told beside them."""

    rows: pd.DataFrame
    notes: list[str]

    def markdown(self) -> str:
        """The table and its notes as aligned Markdown."""
        notes = "\n".join(f"- {note}" for note in self.notes)
        return "\n\n".join(part for part in (_markdown(self.rows), notes) if part)


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
    notes += [_incomplete(run) for _, run in frame[frame["status"] != "finished"].iterrows()]
    return Table(_drop_constant(rows), notes)


def paired_differences(runs: Runs, baseline: str = "grpo") -> pd.DataFrame:
    """Accuracy after training minus the baseline's, on the same problems and the same seeds.

    A row per method and settings: the mean difference, its 95 % interval over problems (a bootstrap)
    and over seeds (Student's t; NaN for one seed), and the number of shared seeds.

    Raises:
        ValueError: no finished run of `baseline`, or runs that were judged on other problems.
    """
    frame = runs.runs[runs.runs["status"] == "finished"]
    marks = frame.assign(settings=[settings_of(p) for p in frame["parameters"]])
    base = {
        run["seed"]: _evaluation(run) for _, run in marks[marks["method"] == baseline].iterrows()
    }
    if not base:
        raise ValueError(f"no finished run of {baseline!r} to compare with")
    rows = []
    for (method, changes), cells in marks.groupby(["method", "settings"]):
        shared = [run for _, run in cells.iterrows() if run["seed"] in base]
        if method == baseline or not shared:
            continue
        ours, theirs = [_evaluation(run) for run in shared], [base[run["seed"]] for run in shared]
        if len({one.problems for one in (*ours, *theirs)}) > 1:
            raise ValueError(f"{method} and {baseline} were not judged on the same problems")
        pair = [one.correct for one in theirs], [one.correct for one in ours]
        problems, seeds = (paired_interval(*pair, over=over) for over in ("problems", "seeds"))
        rows.append((method, changes, problems.mean, *problems[1:], *seeds[1:], len(shared)))
    ends = [f"{end}, {over}" for over in ("problems", "seeds") for end in ("low", "high")]
    columns = ["method", "settings", f"accuracy - {baseline}", *ends, "n seeds"]
    return pd.DataFrame(rows, columns=columns).sort_values(columns[2], ascending=False)


class _Evaluation(NamedTuple):
    problems: str  # fingerprint of the test rows, references apart
    correct: list[float]  # share correct, problem by problem


def _evaluation(run: pd.Series) -> _Evaluation:
    shares = json.loads((Path(run["path"]) / "evaluation_after.json").read_text())["correct"]
    return _Evaluation(read_manifest(run["path"])["data"]["problems"], shares)


def settings_of(parameters: Mapping[str, Any]) -> str:
    """What sets a run apart beside method, preset and seed, as one line."""
    rest = settings(parameters)
    flat = {**rest.pop("overrides", {}), **rest}
    return ", ".join(f"{name}={flat[name]}" for name in sorted(flat))


def estimate(values: Sequence[float], level: float = 0.95) -> Estimate:
    """Mean and Student interval of values that are independent, such as one per seed."""
    mean = float(pd.Series(values).mean())
    if len(values) < 2:
        return Estimate(mean, None, None)
    half = float(stats.sem(values) * stats.t.ppf((1 + level) / 2, len(values) - 1))
    return Estimate(mean, mean - half, mean + half)


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
    digits, found = METRICS[name][1], estimate(values)
    if found.low is None and f"{name}_low" in cells:
        found = Estimate(found.mean, cells[f"{name}_low"].iloc[0], cells[f"{name}_high"].iloc[0])
    shown = f"{found.mean:.{digits}f}"
    partial = f" (n={len(values)})" if len(values) < len(cells) else ""
    if not name.startswith("accuracy") or not is_number(found.low):
        return shown + partial
    return f"{shown} [{found.low:.{digits}f}, {found.high:.{digits}f}]{partial}"


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


def _markdown(rows: pd.DataFrame) -> str:
    if rows.empty:
        return ""
    lines = [list(rows.columns), *rows.astype(str).replace("", DASH).values.tolist()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [[cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines]
    rule = ["-" * width for width in widths]
    return "\n".join("| " + " | ".join(line) + " |" for line in [padded[0], rule, *padded[1:]])
