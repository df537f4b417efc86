"""An evaluation on public benchmarks is a run: the tool is started, and what it wrote is read back.

    evaluate_benchmarks(folder, ["MMMU", "WeMath"], trained=experiment.run.manifest["parameters"], ...)

A run directory of its own holds the tool's files (`tool/`, `tool.log`), metrics.json with
`benchmark/<name>` as a share in [0, 1] and its interval, every judged question in samples.jsonl,
and a manifest with the protocol, the command, and the data as the tool identified them.
"""

import json
import math
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name
from scipy.stats import binomtest

from rlsd_lib.report.benchmarks.commands import BENCHMARKS, check_benchmarks, command
from rlsd_lib.runs.records import read_lines
from rlsd_lib.runs.run import Run

PYTHON = "RLSD_EVAL_PYTHON"  # environment variable: the interpreter of the tools' environment
PREFIX = "benchmark/"  # of the metrics' names
# No paid model may judge: lmms-eval's MathVista asks for a key on import, and gets one that opens
# nothing. A notebook's plotting backend is not in the tools' environment.
CHILD = {"USE_LLM_JUDGE": "False", "OPENAI_API_KEY": "unused", "MPLBACKEND": "agg"}


class BenchmarkError(RuntimeError):
    """The tool failed, or what it wrote is not what was asked for."""


class Score(NamedTuple):
    """One benchmark's result; `stderr` and the interval are None where the tool gives none."""

    share: float
    stderr: float | None
    low: float | None
    high: float | None
    questions: int


def evaluate_benchmarks(
    model: str | Path,
    names: Sequence[str],
    *,
    run_dir: str | Path,
    trained: Mapping[str, Any],
    sampling_seed: int = 0,
    python: str = "",
    backend: str = "vllm",
    limit: int = 0,
    devices: int = 1,
    if_exists: str = "raise",
) -> Path:
    """Judge a model on benchmarks, in a run directory of its own; returns that directory.

    Everything that can be checked is checked before the directory is claimed.

    Args:
        model: a folder with the model and its tokenizer or processor, or a hub id.
        names: keys of `BENCHMARKS`, all of one tool.
        run_dir: the run directory.
        trained: the parameters of the run that trained the model; of the untrained one, the same
            with method="base".
        sampling_seed: of the completions.
        python: the interpreter of the tool's environment; "" for $RLSD_EVAL_PYTHON.
        backend: "vllm", or "hf" for text.
        limit: questions per benchmark, 0 for all; a limited run never enters Table 2.
        devices: GPUs over which vLLM splits the model.
        if_exists: as in `Run.start`.

    Raises:
        ValueError: unknown benchmarks, or no interpreter named.
        FileNotFoundError: the interpreter or the model's folder does not exist.
        BenchmarkError: the tool is missing or of another version, ended with an error, or its
            results lack a benchmark, are of another model or of another number of questions.
    """
    python = check_ready(names, python)
    name = str(Path(model).resolve() if Path(model).is_dir() else model)
    _check_model(name)
    options = {"backend": backend, "limit": limit, "devices": devices}
    command(python, name, names, Path("tool"), seed=sampling_seed, **options)
    facts = {"model": name, "benchmarks": list(names), "sampling_seed": sampling_seed}
    parameters = {**trained, **facts, **options, "run_dir": str(run_dir)}
    run = Run.start(run_dir, parameters=parameters, if_exists=if_exists)
    with run:
        words = command(python, name, names, run.path / "tool", seed=sampling_seed, **options)
        protocol = asdict(BENCHMARKS[names[0]].protocol)
        run.record(evaluation={"protocol": protocol, "command": words})
        _start(words, run.path / "tool.log")
        results = read_results(run.path / "tool", run.path / "tool.log")
        scores = {n: score_of(results, n, name, limit) for n in names}
        run.record(data={n: _identity(results, n) for n in names})
        for n in names:
            run.add_samples(_samples(run.path / "tool", n))
        run.finish({k: v for n, score in scores.items() for k, v in _metrics(n, score).items()})
    return run.path


def check_ready(names: Sequence[str], python: str = "") -> str:
    """Check that these benchmarks could be run here, and return the interpreter that runs them.

    To be called before a training whose result they are to judge. `python` is as in
    `evaluate_benchmarks`, and so are the errors: ValueError, FileNotFoundError, BenchmarkError.
    """
    protocol = check_benchmarks(names)
    python = python or os.environ.get(PYTHON, "")
    how = f"python -m venv FOLDER; FOLDER/bin/{protocol.install}"
    if not python:
        raise ValueError(
            f"no interpreter for {protocol.package}: {how}; {PYTHON}=FOLDER/bin/python"
        )
    ask = f"from importlib.metadata import version; print(version({protocol.package!r}))"
    done = subprocess.run([python, "-c", ask], capture_output=True, text=True)
    if done.returncode != 0:
        raise BenchmarkError(f"{python} has no {protocol.package}: {how}")
    if (found := done.stdout.strip()) != protocol.version:
        raise BenchmarkError(
            f"{protocol.package} {found}, the protocol is of {protocol.version}: {protocol.install}"
        )
    return python


def read_results(folder: Path, log: Path) -> dict[str, Any]:
    """What the tool wrote below `folder`.

    Raises:
        BenchmarkError: there is not exactly one results file. (lmms-eval reports a failure on its
            log alone and still ends with status 0.)
    """
    files = [file for file in folder.rglob("*.json") if "results" in file.name]
    if len(files) != 1:
        raise BenchmarkError(f"{len(files)} results files, expected one; {_tail(log)}")
    return json.loads(files[0].read_text())


def score_of(results: dict[str, Any], name: str, model: str, limit: int = 0) -> Score:
    """The score of benchmark `name` in a tool's results.

    Raises:
        BenchmarkError: the results are of another model, lack the benchmark or its metric, hold a
            value that is no share, or come from another number of questions than the protocol's.
    """
    row = BENCHMARKS[name]
    if results.get("model_name") != model:
        raise BenchmarkError(f"results of {results.get('model_name')!r}, asked for {model!r}")
    found = results["results"].get(row.task)
    if found is None or row.metric not in found:
        have = sorted(results["results"]) if found is None else sorted(found)
        raise BenchmarkError(f"{name}: no {row.task} with {row.metric}; there is {have}")
    share = _share(found[row.metric])
    if share is None:
        raise BenchmarkError(f"{name}: {row.metric} is {found[row.metric]!r}, not a share")
    judged = int(results["n-samples"][row.task]["effective"])
    expected = min(limit, row.questions) if limit else row.questions
    if judged != expected:
        raise BenchmarkError(f"{name}: {judged} questions, the protocol has {expected}")
    metric, filtered = row.metric.split(",")
    stderr = _number(found.get(f"{metric}_stderr,{filtered}"))
    right = share * judged
    if abs(right - round(right)) > 1e-6 * judged or stderr is None:  # not a share of right answers
        return Score(share, stderr, None, None, judged)
    ends = binomtest(round(right), judged).proportion_ci(0.95, method="wilson")
    return Score(share, stderr, float(ends.low), float(ends.high), judged)


def _check_model(name: str) -> None:
    """A path must exist; a local adapter is no model that the tools could load."""
    folder = Path(name)
    if folder.is_absolute() and not (folder / "config.json").is_file():
        hint = "merge the adapter first" if (folder / "adapter_config.json").is_file() else "save"
        raise FileNotFoundError(f"{name} holds no model (no config.json): {hint}")


def _start(words: Sequence[str], log: Path) -> None:
    with log.open("w") as handle:
        done = subprocess.run(
            words, stdout=handle, stderr=subprocess.STDOUT, env={**os.environ, **CHILD}
        )
    if done.returncode != 0:
        raise BenchmarkError(f"the tool ended with status {done.returncode}; {_tail(log)}")


def _tail(log: Path, length: int = 600) -> str:
    text = log.read_text(errors="replace").strip() if log.exists() else ""
    return f"{log} ends: {text[-length:] or '(empty)'}"


def _share(value: Any) -> float | None:
    """A share in [0, 1] from a number, or from a text such as "54.10%"."""
    percent = isinstance(value, str) and value.endswith("%")
    number = _number(value.rstrip("%") if percent else value)
    share = number / 100 if number is not None and percent else number
    return share if share is not None and 0 <= share <= 1 else None


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):  # the tools write "N/A" for what they cannot say
        return None
    return number if math.isfinite(number) else None


def _metrics(name: str, score: Score) -> dict[str, float | int | None]:
    key = PREFIX + name
    rest = {f"{key}_{part}": getattr(score, part) for part in score._fields[1:]}
    return {key: score.share, **rest}


def _identity(results: dict[str, Any], name: str) -> dict[str, Any]:
    """Which rows were judged: their hash by the tool, and the revisions in the hub's cache."""
    row = BENCHMARKS[name]
    folder = repo_folder_name(repo_id=row.dataset, repo_type="dataset")
    # No tool writes the revision that it read; where one snapshot lies in the cache, that is it.
    cached = sorted(p.name for p in Path(HF_HUB_CACHE, folder, "snapshots").glob("*"))
    return {
        "dataset": row.dataset,
        "revisions_in_cache": cached,
        "split": row.split,
        "task": row.task,
        "task_version": results.get("versions", {}).get(row.task),
        "rows_sha256": results.get("task_hashes", {}).get(row.task),
        "questions": results["n-samples"][row.task],
    }


def _judged(value: Any) -> float | None:
    """A question's score; WeMath hands its score of groups the question's whole row."""
    return _number(value.get("acc_score") if isinstance(value, dict) else value)


def _samples(folder: Path, name: str) -> list[dict[str, Any]]:
    """Every judged question of a benchmark: answer, completion, and the metric that counts."""
    row = BENCHMARKS[name]
    metric, filtered = row.metric.split(",")
    files = [f for f in folder.rglob("*.jsonl") if f"samples_{row.task}" in f.name]
    return [
        {
            "benchmark": name,
            "question": line["doc_id"],
            "answer": line["target"],
            "completion": line.get("resps", line["filtered_resps"]),
            "score": _judged(line.get(metric)),
        }
        for file in files
        for line in read_lines(file)
        if line.get("filter", filtered) == filtered
    ]
