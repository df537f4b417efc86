"""Public benchmarks: which tool judges what, how, on which questions; and a run that does so.

The tools (lmms-eval for images, lm-eval for text) pin packages that this one does not bear, so
`RLSD_EVAL_PYTHON` names the Python of their own environment. An evaluation is a run, whose
directory keeps the tool's files with every judged question (`tool/`, `tool.log`).
"""

import gc
import json
import math
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name
from scipy.stats import binomtest

from rlsd_lib.names import look_up
from rlsd_lib.runs.paths import run_name
from rlsd_lib.runs.records import state_of
from rlsd_lib.runs.run import Run
from rlsd_lib.tasks.models import merged

TASKS = Path(__file__).resolve().parent / "benchmark_tasks"  # those that a tool lacks
MAX_NEW_TOKENS = 4096  # the length of a response in training
PYTHON = "RLSD_EVAL_PYTHON"  # environment variable: the interpreter of the tools' environment
PREFIX = "benchmark/"  # of the metrics' names
# No paid model may judge: lmms-eval's MathVista asks for a key on import, and gets one that opens
# nothing. A notebook's plotting backend is not in the tools' environment.
CHILD = {"USE_LLM_JUDGE": "False", "OPENAI_API_KEY": "unused", "MPLBACKEND": "agg"}


class BenchmarkError(RuntimeError):
    """The tool failed, or its results are not those of the protocol."""


@dataclass(frozen=True)
class Protocol:
    """How a set of benchmarks is run. It goes into the manifest of an evaluation as it stands."""

    package: str  # on PyPI
    version: str  # exact: task files, prompts and graders are those of this release
    install: str  # makes the environment
    prompt: str
    grader: str
    sampling: Mapping[str, float]
    image_area: tuple[int, int] | None = None  # pixels, least and most
    system: str = ""  # a system prompt that we add; "" where the tasks bring their own


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: a task of the tool, its data and questions, and which metric counts."""

    protocol: Protocol
    task: str
    dataset: str
    split: str
    questions: int
    metric: str = "acc_score,none"  # a key of the tool's results: metric, filter


# Sampling and image bounds of the released script's validation (PAPER, section 2). The paper does not
# report its evaluation; its numbers tell that ZeroBench's sub-questions and WeMath's score were used.
VISION = Protocol(
    package="lmms-eval",
    version="0.7.3",
    install="pip install lmms-eval==0.7.3 Levenshtein vllm",
    prompt="system prompt of the release's reasoning tasks: <think> </think>, <answer> </answer>",
    grader="the release's compute_score: text of <answer>, option letter or math-verify, no judge",
    sampling={"temperature": 0.7, "top_p": 0.8, "top_k": 20, "presence_penalty": 1.5, "n": 1},
    image_area=(262_144, 1_048_576),
)
TEXT = Protocol(
    package="lm-eval",
    version="0.4.13",
    install='pip install "lm-eval[hf,math,vllm]==0.4.13"',
    prompt="the task's question without examples, in the model's chat template",
    grader="the task's own: last number (GSM8K), math-verify (MATH-500), boxed answer (AIME)",
    sampling={"temperature": 0.7, "top_p": 0.8, "top_k": 20},
    system="Reason step by step, and put your final answer within \\boxed{}.",
)
_vision, _text = partial(Benchmark, VISION), partial(Benchmark, TEXT)
BENCHMARKS = {
    "MMMU": _vision("mmmu_val_reasoning", "lmms-lab-encoder/MMMU", "validation", 900),
    "MathVista": _vision("mathvista_testmini_cot_reasoning", "AI4Math/MathVista", "testmini", 1000),
    "MathVision": _vision("mathvision_reason_test_reasoning", "MathLLMs/MathVision", "test", 3040),
    "ZeroBench": _vision(
        task="zerobench_subquestions_reasoning",
        dataset="jonathan-roberts1/zerobench",
        split="zerobench_subquestions",
        questions=334,
    ),
    "WeMath": _vision(
        "wemath_testmini_reasoning", "We-Math/We-Math", "testmini", 1740, "wemath_strict,none"
    ),
    "GSM8K": _text(
        "gsm8k_cot_zeroshot", "openai/gsm8k", "test", 1319, "exact_match,flexible-extract"
    ),
    "MATH-500": _text("minerva_math500", "HuggingFaceH4/MATH-500", "test", 500, "math_verify,none"),
    "AIME24": _text("aime24", "Maxwell-Jia/AIME_2024", "train", 30, "exact_match,none"),
    "AIME25": _text("aime25", "math-ai/aime25", "test", 30, "exact_match,none"),
}


def judge(run: Run, names: Sequence[str], runs_dir: str | Path) -> None:
    """Evaluate a run's model before and after training, in run directories of their own.

    The trained model's lies in the run directory, the untrained one's in `runs_dir`, where other
    methods with the same seed find it. Move your own model off the GPU first: the tool needs the
    memory. Raises as `evaluate_benchmarks`, and FileNotFoundError where the run saved no model.
    """
    parameters, preset = run.manifest["parameters"], run.manifest["preset"]
    changed = {k: v for k, v in parameters["overrides"].items() if k.startswith("model")}
    base = {"method": "base", "overrides": changed}
    base |= {name: parameters[name] for name in ("preset", "seed")}
    whole = merged(run.path / "model", sees_images=preset["sees_images"])
    gc.collect()
    torch.cuda.empty_cache()
    for folder, model, trained in (
        (Path(runs_dir) / run_name(base), preset["model"], base),
        (run.path / "benchmarks", whole, parameters),
    ):
        if state_of(folder) != "finished":
            how = {"run_dir": folder, "trained": trained, "if_exists": "overwrite"}
            evaluate_benchmarks(model, names, **how)


def evaluate_benchmarks(
    model: str | Path,
    names: Sequence[str],
    *,
    run_dir: str | Path,
    trained: Mapping[str, Any],
    if_exists: str = "raise",
) -> Path:
    """Judge a model on benchmarks, on every GPU, in a run directory of its own; returns that.

    `model` is a folder with the model and its tokenizer or processor, or a hub id; `names` are keys
    of `BENCHMARKS`, all of one tool. `trained` are the parameters of the run that trained the model
    (of the untrained one, the same with method="base"); their seed is that of the sampling.
    Everything that can be checked is checked before the directory is claimed.

    Raises:
        ValueError: as `command`, or no interpreter named.
        FileNotFoundError: the interpreter or the model's folder does not exist.
        BenchmarkError: the tool is missing or of another version, ended with an error, or its
            results lack a benchmark, are of another model or of another number of questions.
    """
    python = check_ready(names)
    name = str(Path(model).resolve() if Path(model).is_dir() else model)
    if Path(name).is_absolute() and not Path(name, "config.json").is_file():
        raise FileNotFoundError(f"{name} has no config.json: save it whole, merge an adapter")
    words = command(name, names, seed=trained["seed"], devices=torch.cuda.device_count())
    parameters = {**trained, "model": name, "benchmarks": list(names), "run_dir": str(run_dir)}
    with Run.start(run_dir, parameters=parameters, if_exists=if_exists) as run:
        words = [python, *words, "--output_path", str(run.path / "tool")]
        run.record(evaluation={"protocol": asdict(BENCHMARKS[names[0]].protocol), "command": words})
        results = _run_tool(words, run.path)
        scores = [score_of(results, each, name) for each in names]
        run.record(data={each: _identity(results, each) for each in names})
        run.finish({metric: value for score in scores for metric, value in score.items()})
    return run.path


def check_ready(names: Sequence[str]) -> str:
    """Check that these benchmarks could be run here, and return the interpreter that runs them.

    Call it before a training whose result they are to judge. Raises as `evaluate_benchmarks`.
    """
    protocol = check_benchmarks(names)
    how = f"python -m venv FOLDER; FOLDER/bin/{protocol.install}"
    if not (python := os.environ.get(PYTHON)):
        raise ValueError(f"{PYTHON} is not set: {how}; {PYTHON}=FOLDER/bin/python")
    ask = f"from importlib.metadata import version; print(version({protocol.package!r}))"
    done = subprocess.run([python, "-c", ask], capture_output=True, text=True)
    if (found := done.stdout.strip() or "missing") != protocol.version:
        raise BenchmarkError(f"{python}: {protocol.package} {found}, not {protocol.version}: {how}")
    return python


def check_benchmarks(names: Sequence[str]) -> Protocol:
    """Return the protocol that all of these benchmarks share.

    Raises:
        ValueError: no name, an unknown or repeated one, or names that need two tools.
    """
    if not names:
        raise ValueError(f"no benchmark named; choose from {', '.join(BENCHMARKS)}")
    rows = [BENCHMARKS[look_up(name, BENCHMARKS, "benchmark")] for name in names]
    if repeated := sorted({name for name in names if list(names).count(name) > 1}):
        raise ValueError(f"{', '.join(repeated)}: named more than once")
    if len(tools := {row.protocol.package for row in rows}) > 1:
        raise ValueError(f"{', '.join(names)} need {' and '.join(sorted(tools))}: one run for each")
    return rows[0].protocol


def command(model: str, names: Sequence[str], *, seed: int = 0, devices: int = 0) -> list[str]:
    """Return what the tool's Python runs to judge `model` on `names`, but for the output's place.

    vLLM splits the model over `devices` GPUs; without one, transformers judges text.

    Raises:
        ValueError: as `check_benchmarks`, or a model name that the tool would split.
    """
    protocol = check_benchmarks(names)
    if any(sign in model for sign in ",= "):
        raise ValueError(f"model={model!r}: the tool splits at commas, equal signs and spaces")
    if protocol is VISION:
        low, high = VISION.image_area
        # Always vLLM: transformers has no presence penalty.
        engine = ["--model", "vllm_chat", "--batch_size", "256"]
        settings = {
            "model": model,
            "tensor_parallel_size": max(devices, 1),
            "max_new_tokens": MAX_NEW_TOKENS,
            "max_model_len": 32_768,  # several images; the model's own 262,144 would not fit one GPU
            "mm_processor_kwargs": json.dumps({"min_pixels": low, "max_pixels": high}),
        }
        sampling = {"seed": seed, "max_new_tokens": MAX_NEW_TOKENS}
    else:
        engine = ["run", "--model", "vllm" if devices else "hf", "--batch_size", "auto"]
        engine += ["--apply_chat_template", "--system_instruction", TEXT.system]
        engine += ["--num_fewshot", "0"]
        settings = {"pretrained": model, "enable_thinking": False}
        settings |= {"tensor_parallel_size": devices, "seed": seed} if devices else {}
        sampling = {"do_sample": True, "max_gen_toks": MAX_NEW_TOKENS}
    settings, sampling = (
        ",".join(f"{name}={value}" for name, value in pairs.items())
        for pairs in (settings, {**protocol.sampling, **sampling})
    )
    tasks = ",".join(BENCHMARKS[name].task for name in names)
    seeds = ",".join([str(seed)] * 4)  # Python, numpy, torch, examples
    words = ["--model_args", settings, "--gen_kwargs", sampling, "--tasks", tasks, "--seed", seeds]
    words += ["--include_path", str(TASKS), "--log_samples"]
    return ["-m", protocol.package.replace("-", "_"), *engine, *words]


def _run_tool(words: Sequence[str], folder: Path) -> dict[str, Any]:
    """Start the tool and return the results that it wrote below `folder`/tool."""
    log = folder / "tool.log"
    with log.open("w") as stream:
        done = subprocess.run(words, stdout=stream, stderr=stream, env=os.environ | CHILD)
    files = [file for file in folder.rglob("tool/**/*.json") if "results" in file.name]
    # lmms-eval reports a failure on its log alone and still ends with status 0.
    if done.returncode != 0 or len(files) != 1:
        raise BenchmarkError(
            f"the tool ended with status {done.returncode} and {len(files)} results files, expected "
            f"one; {log} ends: {log.read_text(errors='replace').strip()[-600:] or '(empty)'}"
        )
    return json.loads(files[0].read_text())


def score_of(results: Mapping[str, Any], name: str, model: str) -> dict[str, float | None]:
    """Return the metrics of benchmark `name`: its share, Wilson's 95 % interval, its questions.

    The ends are None for a score that is no share of right answers.

    Raises:
        BenchmarkError: the results are of another model, lack the benchmark or its metric, give a
            value that is no share, or come from another number of questions than the protocol's.
    """
    row = BENCHMARKS[name]
    if results.get("model_name") != model:
        raise BenchmarkError(f"results of {results.get('model_name')!r}, asked for {model!r}")
    found = results["results"].get(row.task, {})
    if row.metric not in found:
        have = sorted(found or results["results"])
        raise BenchmarkError(f"{name}: no {row.task} with {row.metric}; there is {have}")
    share = _number(found[row.metric])
    if not 0 <= share <= 1:
        raise BenchmarkError(f"{name}: {row.metric} is {found[row.metric]!r}, not a share")
    judged = int(results["n-samples"][row.task]["effective"])
    if judged != row.questions:
        raise BenchmarkError(f"{name}: {judged} questions, the protocol has {row.questions}")
    low = high = None
    right, stderr = share * judged, _number(found.get(row.metric.replace(",", "_stderr,")))
    if math.isfinite(stderr) and abs(right - round(right)) < 1e-6 * judged:
        low, high = binomtest(round(right), judged).proportion_ci(0.95, method="wilson")
    key = PREFIX + name
    return {key: share, f"{key}_low": low, f"{key}_high": high, f"{key}_questions": judged}


def _number(value: Any) -> float:
    """A number, or NaN; the tools write "54.10%" for a share and "N/A" for what they cannot say."""
    percent = isinstance(value, str) and value.endswith("%")
    try:
        return float(value.rstrip("%")) / 100 if percent else float(value)
    except (TypeError, ValueError):
        return math.nan


def _identity(results: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Which rows were judged: their hash by the tool, and the revisions in the hub's cache."""
    row = BENCHMARKS[name]
    # No tool writes the revision that it read; where one snapshot lies in the cache, that is it.
    folder = Path(HF_HUB_CACHE, repo_folder_name(repo_id=row.dataset, repo_type="dataset"))
    return {
        "dataset": row.dataset,
        "split": row.split,
        "revisions_in_cache": sorted(p.name for p in folder.glob("snapshots/*")),
        "task_version": results.get("versions", {}).get(row.task),
        "rows_sha256": results.get("task_hashes", {}).get(row.task),
        "questions": results["n-samples"][row.task],
    }
