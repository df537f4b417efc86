"""Public benchmarks: the command that judges a checkpoint, and the scores that it leaves.

The tools (lmms-eval for images, lm-eval for text) pin packages that this one does not bear. Install
them in an environment of their own, and run the command there.
"""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import binomtest

from rlsd_lib.measure.intervals import Interval
from rlsd_lib.names import look_up

TASKS = Path(__file__).resolve().parent / "benchmark_tasks"  # those that a tool lacks
MAX_NEW_TOKENS = 4096  # the length of a response in training
# Exact versions: task files, prompts and graders are those of the release.
INSTALL = {
    "lmms-eval": "pip install lmms-eval==0.7.3 Levenshtein vllm",
    "lm-eval": 'pip install "lm-eval[hf,math,vllm]==0.4.13"',
}
# No paid model may judge: MathVista's task asks for a key on import, and gets one that opens nothing.
ENVIRONMENT = ("USE_LLM_JUDGE=False", "OPENAI_API_KEY=unused")
SYSTEM_PROMPT = "Reason step by step, and put your final answer within \\boxed{}."
# Of the released script's validation, as are the image bounds (PAPER, section 2): the paper does not
# report its evaluation.
SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}
IMAGE_AREA = {"min_pixels": 262_144, "max_pixels": 1_048_576}


class Benchmark(NamedTuple):
    """One benchmark: the tool and its task, how many questions it has, and which metric counts."""

    tool: str
    task: str
    questions: int
    metric: str = "acc_score,none"  # a key of the tool's results: metric, filter


# The paper's numbers tell that ZeroBench's sub-questions and WeMath's score were used.
_vision, _text = (partial(Benchmark, tool) for tool in INSTALL)
BENCHMARKS = {
    "MMMU": _vision("mmmu_val_reasoning", 900),
    "MathVista": _vision("mathvista_testmini_cot_reasoning", 1000),
    "MathVision": _vision("mathvision_reason_test_reasoning", 3040),
    "ZeroBench": _vision("zerobench_subquestions_reasoning", 334),
    "WeMath": _vision("wemath_testmini_reasoning", 1740, "wemath_strict,none"),
    "GSM8K": _text("gsm8k_cot_zeroshot", 1319, "exact_match,flexible-extract"),
    "MATH-500": _text("minerva_math500", 500, "math_verify,none"),
    "AIME24": _text("aime24", 30, "exact_match,none"),
    "AIME25": _text("aime25", 30, "exact_match,none"),
}


def check_benchmarks(names: Sequence[str]) -> str:
    """Return the tool of these benchmarks; ValueError for none, unknown, repeated or mixed ones."""
    if not names:
        raise ValueError(f"no benchmark named; choose from {', '.join(BENCHMARKS)}")
    tools = {BENCHMARKS[look_up(name, BENCHMARKS, "benchmark")].tool for name in names}
    if repeated := sorted({name for name in names if list(names).count(name) > 1}):
        raise ValueError(f"{', '.join(repeated)}: named more than once")
    if len(tools) > 1:
        raise ValueError(f"{', '.join(names)} need {' and '.join(sorted(tools))}: one run for each")
    return tools.pop()


def command(
    model: str | Path, names: Sequence[str], output: Path, *, seed: int = 0, devices: int = 0
) -> str:
    """Return the shell command that judges `model` on `names` and writes its results to `output`.

    `model` is a folder with a whole model and its tokenizer or processor, or a hub id. vLLM splits
    it over `devices` GPUs; without one, transformers judges text. Raises ValueError as
    `check_benchmarks`, or a model name that the tool would split.
    """
    tool, model = check_benchmarks(names), str(model)
    if any(sign in model for sign in ",= "):
        raise ValueError(f"model={model!r}: the tool splits at commas, equal signs and spaces")
    if tool == "lmms-eval":
        # Always vLLM: transformers has no presence penalty.
        engine = ["--model", "vllm_chat", "--batch_size", "256"]
        settings = {
            "model": model,
            "tensor_parallel_size": max(devices, 1),
            "max_new_tokens": MAX_NEW_TOKENS,
            "max_model_len": 32_768,  # several images; the model's own 262,144 would not fit one GPU
            "mm_processor_kwargs": json.dumps(IMAGE_AREA),
        }
        sampling = {"presence_penalty": 1.5, "n": 1, "seed": seed, "max_new_tokens": MAX_NEW_TOKENS}
    else:
        engine = ["run", "--model", "vllm" if devices else "hf", "--batch_size", "auto"]
        engine += ["--apply_chat_template", "--system_instruction", SYSTEM_PROMPT]
        engine += ["--num_fewshot", "0"]
        settings = {"pretrained": model, "enable_thinking": False}
        settings |= {"tensor_parallel_size": devices, "seed": seed} if devices else {}
        sampling = {"do_sample": True, "max_gen_toks": MAX_NEW_TOKENS}
    settings, sampling = (
        ",".join(f"{name}={value}" for name, value in pairs.items())
        for pairs in (settings, {**SAMPLING, **sampling})
    )
    tasks = ",".join(BENCHMARKS[name].task for name in names)
    seeds = ",".join([str(seed)] * 4)  # Python, numpy, torch, examples
    words = ["--model_args", settings, "--gen_kwargs", sampling, "--tasks", tasks, "--seed", seeds]
    words += ["--include_path", str(TASKS), "--log_samples", "--output_path", str(output)]
    module = tool.replace("-", "_")
    return shlex.join(["env", *ENVIRONMENT, "python", "-m", module, *engine, *words])


def read_scores(folder: Path, names: Sequence[str]) -> dict[str, Interval]:
    """Return what a tool wrote to `folder`: the share of each benchmark with Wilson's 95 % interval.

    Nothing without a results file; NaN ends for a score that is no share of right answers. Raises
    ValueError for several results files, or one that lacks a benchmark or its metric, gives a value
    that is no share, or comes from another number of questions than the benchmark's.
    """
    files = [file for file in sorted(folder.rglob("*.json")) if "results" in file.name]
    if len(files) > 1:
        raise ValueError(f"{folder}: {len(files)} results files, expected one: delete the others")
    return {name: _score(json.loads(file.read_text()), name) for file in files for name in names}


def _score(results: Mapping[str, Any], name: str) -> Interval:
    row = BENCHMARKS[name]
    found = results["results"].get(row.task, {})
    if row.metric not in found:
        have = sorted(found or results["results"])
        raise ValueError(f"{name}: no {row.task} with {row.metric}; there is {have}")
    share = _number(found[row.metric])
    if not 0 <= share <= 1:
        raise ValueError(f"{name}: {row.metric} is {found[row.metric]!r}, not a share")
    judged = int(results["n-samples"][row.task]["effective"])
    if judged != row.questions:
        raise ValueError(f"{name}: {judged} questions, the benchmark has {row.questions}")
    right, stderr = share * judged, _number(found.get(row.metric.replace(",", "_stderr,")))
    if not math.isfinite(stderr) or abs(right - round(right)) >= 1e-6 * judged:
        return Interval(share)
    return Interval(share, *binomtest(round(right), judged).proportion_ci(0.95, method="wilson"))


def _number(value: Any) -> float:
    """A number, or NaN; the tools write "54.10%" for a share and "N/A" for what they cannot say."""
    percent = isinstance(value, str) and value.endswith("%")
    try:
        return float(value.rstrip("%")) / 100 if percent else float(value)
    except (TypeError, ValueError):
        return math.nan
