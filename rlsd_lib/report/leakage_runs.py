"""Leakage of finished runs, measured on the models that they saved; computed once, then read."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from rlsd_lib.measure import leakage
from rlsd_lib.runs.paths import digest, outputs_root
from rlsd_lib.runs.records import read_manifest, write_json
from rlsd_lib.tasks import load_task
from rlsd_lib.tasks.encode import within
from rlsd_lib.tasks.models import load_model

# Runs whose presets agree on these fields began with one model, which is judged once.
ORIGIN = ("model", "model_options", "task", "train_size", "test_size", "data_seed")
IDENTITY = ("path", "group", "name", "method", "preset", "seed", "control", "arm")


def report_runs(
    runs: pd.DataFrame, cache: Path, *, num_problems: int | None = None
) -> pd.DataFrame:
    """Return the frame of `leakage.summarise` for every finished run that saved its model.

    `runs` is a frame of `read_runs`; its columns `IDENTITY` come along. Whatever a control showed
    the teacher, the task's own references and template are measured with. `cache` keeps one file
    per run, which is only read the next time. `not_measured` names the runs that are left out.

    Raises:
        ValueError: no run has a saved model.
    """
    chosen = runs.drop(not_measured(runs).index)
    if chosen.empty:
        raise ValueError("no finished run with a saved model: nothing to measure")
    cache.mkdir(parents=True, exist_ok=True)
    bases: dict[str, Any] = {}
    parts = []
    for _, run in chosen.iterrows():
        key = digest([run["path"], run["started"], num_problems])[:10]
        file = cache / f"{run['group']}-{run['name']}-{key}.json"
        if not file.exists():
            found = _measure(Path(run["path"]), bases, num_problems)
            write_json(file, {"rows": found.to_dict("records")})
        frame = pd.DataFrame(json.loads(file.read_text())["rows"])
        parts.append(frame.assign(**{name: run[name] for name in IDENTITY if name in run}))
    return pd.concat(parts, ignore_index=True)


def not_measured(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of runs that did not finish or saved no model."""
    saved = [(Path(path) / "model").is_dir() for path in runs["path"]]
    return runs[(runs["status"] != "finished") | ~pd.Series(saved, index=runs.index, dtype=bool)]


def accuracies(runs: pd.DataFrame) -> pd.DataFrame:
    """Return held-out accuracy in the columns of `report_runs`: after training, and `base` before."""
    finished, parts = runs[runs["status"] == "finished"], []
    for of, when in {"model": "after", "base": "before"}.items():
        found = finished[[f"accuracy_{when}{end}" for end in ("", "_low", "_high")]]
        found = found.set_axis(["mean", "low", "high"], axis=1)
        parts.append(found.assign(measure="accuracy", of=of, null=float("nan")))
    return pd.concat(parts).join(runs[[name for name in IDENTITY if name in runs]])


def _measure(path: Path, bases: dict[str, Any], num_problems: int | None) -> pd.DataFrame:
    """Measure one run; `bases` keeps the models that runs began with, and how they were judged."""
    manifest, cache = read_manifest(path), outputs_root() / "cache"
    preset, config = manifest["preset"], manifest["config"]
    sampling = {"max_new_tokens": config["max_completion_length"], "num_problems": num_problems}
    # A model that was trained under, say, enable_thinking=False is measured under it as well.
    sampling |= {"chat_template_kwargs": config["chat_template_kwargs"]}
    method, limit = manifest["parameters"]["method"], preset["max_prompt_length"]
    options = {**preset["task_options"], **preset["task_by_method"].get(method, {})}
    key = digest([[preset[name] for name in ORIGIN], options, limit, sampling])
    if key not in bases:
        base, tokenizer = load_model(preset["model"], cache, **preset["model_options"])
        base.to("cuda" if torch.cuda.is_available() else "cpu")
        settings = {name: preset[name] for name in ("train_size", "test_size")}
        task = load_task(preset["task"], seed=preset["data_seed"], **settings, **options)
        if limit:
            how = {"chat_template_kwargs": config["chat_template_kwargs"]}
            task, _ = within(task, tokenizer, limit, **how)
        judged = leakage.measure(base, tokenizer, task, base_model=base, **sampling)
        bases[key] = base, tokenizer, task, judged
    base, tokenizer, task, judged_base = bases[key]
    model, _ = load_model(str(path / "model"), cache)
    model.to(base.device)
    judged = leakage.measure(model, tokenizer, task, base_model=base, **sampling)
    return leakage.summarise(judged, judged_base)
