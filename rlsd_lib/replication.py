"""The paper's Table 2 with our column beside it, and what the paper left open with our answer.

Our cells come from run directories that finished, never from anywhere else: a benchmark's from an
evaluation run (`benchmark_runs`), the held-out split's from a training run. Where none was run
there is a dash.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from rlsd_lib.benchmark_runs import PREFIX
from rlsd_lib.benchmarks import BENCHMARKS, Protocol
from rlsd_lib.paper_numbers import AVERAGE, TABLE_2, table_2
from rlsd_lib.records import Runs, is_number
from rlsd_lib.tables import DASH, estimate, settings_of

HELD_OUT = "held out"  # the data's own test split, judged by the task's verifier
PAPER, OURS = "paper", "ours"
SETTINGS = ("overrides", "control", "max_steps")  # what makes two trainings of a method differ
COLUMNS = ["row", "column", "value", "low", "high", "seed", "run"]


class Comparison(NamedTuple):
    """Per cent, as text: a row per method, the paper's and our column per benchmark; our sources."""

    table: pd.DataFrame
    sources: pd.DataFrame  # COLUMNS, one row for each run and number that stands in the table


def compare(runs: Runs, names: Sequence[str], preset: str, own: Path | None = None) -> Comparison:
    """Table 2 for the benchmarks `names`, their average and the held-out split.

    Runs of one preset are taken; one whose settings differ from it (overrides, control, number of
    steps) has a row of its own. A cell is the mean over seeds with its 95 % Student interval, or
    one seed's share with its interval over questions. Evaluations on a part of the questions
    (`limit`) are left out. `own` is a run that has written its metrics and is not closed yet.
    """
    found = pd.DataFrame(
        [cell for _, run in runs.runs.iterrows() for cell in _cells(run, preset, own)],
        columns=COLUMNS,
    )
    known = found[found["column"].isin([*names, HELD_OUT])]
    rows = list(dict.fromkeys([*TABLE_2, *sorted(known["row"])]))
    table = {}
    for name in (*names, AVERAGE, HELD_OUT):
        table[name, PAPER] = [_printed(row, name) for row in rows]
        table[name, OURS] = [_ours(known, row, name, names) for row in rows]
    return Comparison(pd.DataFrame(table, index=rows), known.reset_index(drop=True))


def _cells(run: pd.Series, preset: str, own: Path | None) -> list[tuple]:
    """The numbers that a run contributes, each with the row and column where it belongs."""
    done = run["status"] == "finished" or (own is not None and Path(run["path"]) == own.resolve())
    parameters = run.get("parameters")
    if not done or not isinstance(parameters, dict) or parameters.get("preset") != preset:
        return []
    settings = settings_of({name: parameters[name] for name in SETTINGS if name in parameters})
    row = f"{parameters['method']} ({settings})" if settings else parameters["method"]
    judged = [] if parameters.get("limit") else list(BENCHMARKS)
    wanted = [(row, name, PREFIX + name) for name in judged]
    wanted += [(row, HELD_OUT, "accuracy_after")]
    wanted += [] if settings else [("base", HELD_OUT, "accuracy_before")]
    return [
        (line, column, *(run[key + end] for end in ("", "_low", "_high")), run["seed"], run["path"])
        for line, column, key in wanted
        if is_number(run.get(key))
    ]


def _printed(row: str, name: str) -> str:
    """The paper's number, or a dash where it has none."""
    paper = table_2()
    return f"{paper.loc[row, name]:.2f}" if row in paper.index and name in paper else DASH


def _ours(found: pd.DataFrame, row: str, name: str, names: Sequence[str]) -> str:
    """Our number with its interval, or a dash; an average only of all benchmarks."""
    mine = found[found["row"] == row]
    if name == AVERAGE:
        means = mine[mine["column"].isin(names)].groupby("column")["value"].mean()
        return f"{100 * means.mean():.2f}" if len(means) == len(names) else DASH
    cells = mine[mine["column"] == name]
    if cells.empty:
        return DASH
    mean, low, high = estimate(list(cells["value"]))
    if low is None:
        low, high = cells["low"].iloc[0], cells["high"].iloc[0]
    ends = f" [{100 * low:.1f}, {100 * high:.1f}]" if is_number(low) else ""
    return f"{100 * mean:.2f}{ends}" + (f" (n={len(cells)})" if len(cells) > 1 else "")


def open_items(manifest: Mapping[str, Any], protocol: Protocol) -> pd.DataFrame:
    """What the paper does not report, and what this run used instead, read from its manifest."""
    config, packages, preset = (manifest[name] for name in ("config", "packages", "preset"))
    own, rows = manifest["evaluation"], manifest["data"]
    versions = ("python", "torch", "transformers", "trl", "vllm")
    sampling = ", ".join(f"{name} {value}" for name, value in protocol.sampling.items())
    low, high = protocol.image_area or (0, 0)
    items = {
        "code": (
            "released later, untested",
            f"this repository, commit {manifest['git']['commit']}",
        ),
        "data": (
            "name only; link with the code",
            f"task {preset['task']}, {preset['task_options']}",
        ),
        "splits": (
            "not reported",
            "held out by a hash of the question; "
            + ", ".join(f"{side} {digest[:12]}" for side, digest in rows.items()),
        ),
        "prompts": ("not reported", config["privileged_template"] or "the trainer's own template"),
        "length of training": ("200 steps in the appendix", f"{config['max_steps']} steps"),
        "choice of checkpoint": ("not reported", "the last one, always"),
        "seeds": ("not reported", f"{manifest['seeds']}; the table takes any number of them"),
        "versions": ("not reported", ", ".join(f"{n} {packages[n]}" for n in versions)),
        "evaluation tool": ("not reported", f"{protocol.package} {protocol.version}"),
        "evaluation prompts": ("not reported", protocol.prompt),
        "evaluation sampling": ("not reported; the script's validation", sampling),
        "images": ("not reported", f"{low:,} to {high:,} pixels" if high else "none"),
        "graders": ("not reported", protocol.grader),
        "held-out sampling": ("not reported", f"{own}"),
        "intervals": ("none", "95 %: over questions for one seed, over seeds for several"),
        "what r is": ("only said to be available", "the final answer, in training alone"),
    }
    return pd.DataFrame.from_dict(items, orient="index", columns=["the paper", "this run"])
