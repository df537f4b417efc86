"""The paper's Table 2 with our column beside it, and what the paper left open with our answer.

Our cells come from run directories that finished, never from anywhere else: a benchmark's from an
evaluation run (`benchmark_runs`), the held-out split's from a training run. Where none was run
there is a dash.
"""

import gc
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import torch

from rlsd_lib.measure.intervals import student_interval
from rlsd_lib.report.benchmarks.commands import BENCHMARKS, Protocol
from rlsd_lib.report.benchmarks.results import PREFIX, evaluate_benchmarks
from rlsd_lib.report.paper_numbers import AVERAGE, TABLE_2, table_2
from rlsd_lib.report.tables import DASH, settings_of
from rlsd_lib.runs.paths import run_name
from rlsd_lib.runs.records import Runs, is_number, state_of
from rlsd_lib.tasks.models import merged

if TYPE_CHECKING:
    from rlsd_lib.experiment.experiment import Experiment

BASE = "base"  # the row of the untrained model
HELD_OUT = "held out"  # the data's own test split, judged by the task's verifier
PAPER, OURS = "paper", "ours"
SETTINGS = ("overrides", "control", "max_steps")  # what makes two trainings of a method differ
# Overrides on which the accuracy before training depends: other ones leave the untrained model's be.
OF_BASE = (
    "model",
    "model_options",
    "task_options",
    "train_size",
    "test_size",
    "num_samples",
    "evaluation_batch_size",
    "max_prompt_length",
    "max_completion_length",
    "chat_template_kwargs",
    "bf16",
    "fp16",
    "use_cpu",
)
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
    (`limit`) are left out. The untrained model's held-out number is taken of every run that leaves
    model, task and sampling as the preset has them, once per seed. `own` is a run that has written its metrics and is not closed yet.
    """
    found = pd.DataFrame(
        [cell for _, run in runs.runs.iterrows() for cell in _cells(run, preset, own)],
        columns=COLUMNS,
    )
    known = found[found["column"].isin([*names, HELD_OUT])]
    # Runs with one seed have the same model before training: a repetition is no other sample.
    again = known.duplicated(["row", "column", "seed"])
    known = known[~(again & (known["row"] == BASE) & (known["column"] == HELD_OUT))]
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
    wanted += [(BASE, HELD_OUT, "accuracy_before")] if _tells_of_base(parameters) else []
    return [
        (line, column, *(run[key + end] for end in ("", "_low", "_high")), run["seed"], run["path"])
        for line, column, key in wanted
        if is_number(run.get(key))
    ]


def _tells_of_base(parameters: Mapping[str, Any]) -> bool:
    """Whether a run's accuracy before training is that of the preset's own model and problems."""
    changed = set(parameters.get("overrides", {})) & set(OF_BASE)
    return not changed and parameters.get("control", "none") == "none"


def judge(experiment: "Experiment", names: Sequence[str], runs_dir: str | Path) -> list[Path]:
    """Evaluate the model before and after training on benchmarks, in run directories of their own.

    The trained model's lies in its run directory, the untrained one's in `runs_dir`, where other
    methods with the same seed find it. The experiment's model leaves the GPU. Errors are those of
    `evaluate_benchmarks`, and FileNotFoundError where the preset does not save the model.
    """
    parameters, preset = experiment.run.manifest["parameters"], experiment.preset
    whole = merged(experiment.run.path / "model", sees_images=preset.sees_images)
    experiment.model.cpu()  # the tool needs the memory
    gc.collect()
    torch.cuda.empty_cache()
    on_gpu = torch.cuda.is_available()
    backend = "vllm" if on_gpu or preset.sees_images else "hf"
    options = {"devices": max(torch.cuda.device_count(), 1), "backend": backend}
    options["sampling_seed"] = parameters["seed"]
    other = {k: v for k, v in parameters["overrides"].items() if k.startswith("model")}
    base = {"method": BASE, "overrides": other, **{k: parameters[k] for k in ("preset", "seed")}}
    places = {
        Path(runs_dir) / run_name(base): (preset.model, base),
        experiment.run.path / "benchmarks": (whole, parameters),
    }
    for folder, (model, trained) in places.items():
        if state_of(folder) != "finished":
            how = {"trained": trained, "run_dir": folder, "if_exists": "overwrite", **options}
            evaluate_benchmarks(model, names, **how)
    return list(places)


def dropped(experiment: "Experiment") -> pd.DataFrame:
    """What became of the rows that the task read; written to the run directory as well.

    Files: data_report.json (counts) and dropped.jsonl (row by row). A task that makes its rows has
    nothing to drop.
    """
    task = experiment.task
    sides = {"train": len(task.train), "test": len(task.test)}
    if task.report is None:
        return pd.Series({"generated": sum(sides.values()), **sides}, name="rows").to_frame()
    task.report.write(experiment.run.path)
    found = {f"dropped: {fault}": count for fault, count in task.report.counts.items()}
    counts = {"read": task.report.rows, **found, "kept": task.report.kept, **sides}
    return pd.Series(counts, name="rows").to_frame()


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
    mean, low, high = student_interval(cells["value"])
    if math.isnan(low):
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
