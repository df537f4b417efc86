"""Tables that stand beside the paper's, and what it left open.

Our cells come from run directories that finished and from nowhere else; where nothing was run
there is a dash. `beside_paper` is for any folder of runs (`20_compare`), the rest for the paper's
own recipe (`40_qwen3_vl`, `41_qwen3_text`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from rlsd_lib.measure.intervals import Interval, student_interval
from rlsd_lib.report.benchmarks import PREFIX, Protocol
from rlsd_lib.report.paper_numbers import AVERAGE, TABLE_2, table_2
from rlsd_lib.report.tables import (
    DASH,
    NO_VALUES,
    Arms,
    Table,
    settings_of,
    source_notes,
)
from rlsd_lib.runs.records import Runs, is_number, write_json
from rlsd_lib.tasks.task import Task

OTHER_MODEL = (
    "the paper: Qwen3-VL-8B-Instruct, average of five benchmarks, one run each, no interval; ours: "
    "another model on another task. Compare signs and order, never sizes"
)
BASE = "base"  # the row of the untrained model
HELD_OUT = "held out"  # the data's own test split, judged by the task's verifier
SETTINGS = ("overrides", "control", "max_steps")  # what makes two trainings of a method differ
# Overrides on which the accuracy before training depends; others leave the untrained model alone.
CHANGES_BASE = {
    *("model", "model_options", "task_options", "train_size", "test_size", "num_samples"),
    *("evaluation_batch_size", "max_prompt_length", "max_completion_length"),
    *("chat_template_kwargs", "bf16", "fp16", "use_cpu"),
}
COLUMNS = ["row", "column", "value", "low", "high", "seed", "run"]


def beside_paper(lab: Runs, real: Runs) -> Table:
    """Return the paper's Table 2 (average) and our accuracies in columns of their own, in per cent."""
    printed, sides = table_2()[AVERAGE], {"lab": Arms(lab), "real model": Arms(real)}
    methods = [*printed.index, *sorted(set(sides["lab"].methods()) - set(printed.index))]
    rows = pd.DataFrame(index=pd.Index(methods, name="method"))
    rows["paper: average"] = printed.map("{:.2f}".format)
    rows["paper: - base"] = (printed - printed[BASE]).map("{:+.2f}".format)
    for name, arms in sides.items():
        rows[f"{name}: accuracy"] = [_percent(_accuracy(arms, method)) for method in methods]
        rows[f"{name}: - base"] = [_percent(arms.gain(method)) for method in methods]
    notes = [OTHER_MODEL, "ours: mean over seeds with Student's 95 % interval, plain runs only"]
    rows = rows.fillna(DASH).reset_index()
    return Table(rows, [*notes, *source_notes(lab), *source_notes(real)])


def _accuracy(arms: Arms, method: str) -> pd.Series:
    """Accuracy after training; for "base" before it, of any method: they start alike."""
    if method != BASE:
        return arms.final(method, "accuracy_after")
    return arms.frame.drop_duplicates("seed").get("accuracy_before", NO_VALUES)


def _percent(shares: pd.Series) -> str:
    shares = shares.astype(float).dropna()
    return f"{student_interval(100 * shares):.1f}" if len(shares) else DASH


def compare(
    runs: Runs, names: Sequence[str], preset: str, own: Path | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return Table 2 for the benchmarks `names`, their average and the held-out split; its sources.

    The table is per cent, as text: a row per method, the paper's and our column per benchmark. The
    sources have `COLUMNS`, a row for each run and number in the table. Runs of one preset are
    taken; one whose settings differ from it has a row of its own. A cell is the mean over seeds
    with its 95 % Student interval, or one seed's share with its interval over questions. The
    untrained model's held-out number is taken of every run that leaves model, task and sampling as
    the preset has them, once per seed. `own` is a run with metrics that is not closed yet.
    """
    wanted = {**{name: PREFIX + name for name in names}, HELD_OUT: "accuracy_after"}
    cells = []
    for _, run in runs.runs.iterrows():
        parameters, mine = run["parameters"], own and run["path"] == str(own.resolve())
        if not (run["status"] == "finished" or mine) or parameters.get("preset") != preset:
            continue
        settings = settings_of({name: parameters[name] for name in SETTINGS if name in parameters})
        row = parameters["method"] + (f" ({settings})" if settings else "")
        cells += [_source(run, row, column, key) for column, key in wanted.items()]
        changed = CHANGES_BASE & set(parameters.get("overrides", {}))
        if not changed and parameters.get("control", "none") == "none":
            cells.append(_source(run, BASE, HELD_OUT, "accuracy_before"))
    found = pd.DataFrame([cell for cell in cells if is_number(cell[2])], columns=COLUMNS)
    # Runs with one seed have the same model before training: a repetition is no other sample.
    before = (found["row"] == BASE) & (found["column"] == HELD_OUT)
    found = found[~(before & found.duplicated(["row", "column", "seed"]))]
    rows, paper = list(dict.fromkeys([*TABLE_2, *sorted(found["row"])])), table_2()
    table = {}
    for name in (*names, AVERAGE, HELD_OUT):
        printed = paper.get(name, NO_VALUES).map("{:.2f}".format)
        table[name, "paper"] = [printed.get(row, DASH) for row in rows]
        table[name, "ours"] = [_ours(found[found["row"] == row], name, names) for row in rows]
    return pd.DataFrame(table, index=rows), found.reset_index(drop=True)


def _source(run: pd.Series, row: str, column: str, key: str) -> tuple[Any, ...]:
    values = [run.get(key + end) for end in ("", "_low", "_high")]
    return (row, column, *values, run["seed"], run["path"])


def _ours(found: pd.DataFrame, name: str, names: Sequence[str]) -> str:
    """A method's number with its interval, or a dash; an average only of all benchmarks."""
    if name == AVERAGE:
        means = found[found["column"].isin(names)].groupby("column")["value"].mean()
        return f"{100 * means.mean():.2f}" if len(means) == len(names) > 0 else DASH
    cells = 100 * found.loc[found["column"] == name, ["value", "low", "high"]].astype(float)
    if cells.empty:
        return DASH
    if len(cells) == 1:
        return f"{Interval(*cells.iloc[0]):.2f}"
    return f"{student_interval(cells['value']):.2f} (n={len(cells)})"


def dropped(task: Task, folder: Path) -> pd.DataFrame:
    """Return what became of the rows that a task read, written to data_report.json in `folder` too.

    A task that makes its rows has nothing to drop.
    """
    sides = {"train": len(task.train), "test": len(task.test)}
    counts = task.report or {"generated": sum(sides.values())}
    if task.report is not None:
        write_json(folder / "data_report.json", counts)
    return pd.Series({**counts, **sides}, name="rows").to_frame()


def open_items(manifest: Mapping[str, Any], protocol: Protocol | None) -> pd.DataFrame:
    """Return what the paper does not report, and what a run used instead, from its manifest.

    `protocol` is that of the benchmarks that judge the run; None where there are none.
    """
    config, packages, preset = (manifest[name] for name in ("config", "packages", "preset"))
    versions = ("python", "torch", "transformers", "trl", "vllm")
    splits = ", ".join(f"{side} {digest[:12]}" for side, digest in manifest["data"].items())
    unknown = "not reported"
    items = {
        "code": (
            "released later, untested",
            f"this repository, commit {manifest['git']['commit']}",
        ),
        "data": ("name only; link with the code", f"{preset['task']}, {preset['task_options']}"),
        "splits": (unknown, f"held out by a hash of the question; {splits}"),
        "prompts": (unknown, config["privileged_template"] or "the trainer's own template"),
        "length of training": ("200 steps in the appendix", f"{config['max_steps']} steps"),
        "choice of checkpoint": (unknown, "the last one, always"),
        "seeds": (
            unknown,
            f"seed {manifest['parameters']['seed']}; the table takes any number of them",
        ),
        "versions": (unknown, ", ".join(f"{name} {packages[name]}" for name in versions)),
        "held-out sampling": (unknown, str(manifest["evaluation"])),
        "intervals": ("none", "95 %: over questions for one seed, over seeds for several"),
        "what r is": ("only said to be available", "the final answer, in training alone"),
    }
    if protocol:
        sampling = ", ".join(f"{name} {value}" for name, value in protocol.sampling.items())
        low, high = protocol.image_area or (0, 0)
        items |= {
            "evaluation tool": (unknown, f"{protocol.package} {protocol.version}"),
            "evaluation prompts": (unknown, protocol.prompt),
            "evaluation sampling": ("not reported; the script's validation", sampling),
            "images": (unknown, f"{low:,} to {high:,} pixels" if high else "none"),
            "graders": (unknown, protocol.grader),
        }
    return pd.DataFrame.from_dict(items, orient="index", columns=["the paper", "this run"])
