"""Public benchmarks: which tool judges what, how, and on which questions, written down as data.

No benchmark is implemented here. The tools (lmms-eval for images, lm-eval for text) pin packages
that this one does not bear (antlr4, torchvision), so they live in an environment of their own whose
Python is named by `RLSD_EVAL_PYTHON`. `rlsd_lib.report.benchmarks.results` starts them and reads what
they write.

The paper does not report its evaluation. Two things follow from its numbers, see `paper_numbers`:
ZeroBench's sub-questions were used, not its main questions, and WeMath's score, not the share of
right answers. Where nothing follows, the release's reasoning tasks are taken: one prompt and one
rule-based grader for all, and no model as a judge.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlsd_lib.names import nearest

TASKS = Path(__file__).resolve().parent / "tasks"
MAX_NEW_TOKENS = 4096  # the length of a response in training


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

    @property
    def module(self) -> str:
        """What `python -m` runs."""
        return self.package.replace("-", "_")


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: a task of the tool, which of its metrics counts, and on how many questions."""

    protocol: Protocol
    task: str
    metric: str  # a key of the tool's results
    dataset: str
    split: str
    questions: int


# Sampling and image bounds of the released script's validation (PAPER, section 2).
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

BENCHMARKS = {
    "MMMU": Benchmark(
        VISION, "mmmu_val_reasoning", "acc_score,none", "lmms-lab-encoder/MMMU", "validation", 900
    ),
    "MathVista": Benchmark(
        VISION,
        "mathvista_testmini_cot_reasoning",
        "acc_score,none",
        "AI4Math/MathVista",
        "testmini",
        1000,
    ),
    "MathVision": Benchmark(
        VISION,
        "mathvision_reason_test_reasoning",
        "acc_score,none",
        "MathLLMs/MathVision",
        "test",
        3040,
    ),
    "ZeroBench": Benchmark(
        VISION,
        "zerobench_subquestions_reasoning",
        "acc_score,none",
        "jonathan-roberts1/zerobench",
        "zerobench_subquestions",
        334,
    ),
    "WeMath": Benchmark(
        VISION,
        "wemath_testmini_reasoning",
        "wemath_strict,none",
        "We-Math/We-Math",
        "testmini",
        1740,
    ),
    "GSM8K": Benchmark(
        TEXT,
        "gsm8k_cot_zeroshot",
        "exact_match,flexible-extract",
        "openai/gsm8k",
        "test",
        1319,
    ),
    "MATH-500": Benchmark(
        TEXT, "minerva_math500", "math_verify,none", "HuggingFaceH4/MATH-500", "test", 500
    ),
    "AIME24": Benchmark(TEXT, "aime24", "exact_match,none", "Maxwell-Jia/AIME_2024", "train", 30),
    "AIME25": Benchmark(TEXT, "aime25", "exact_match,none", "math-ai/aime25", "test", 30),
}


def check_benchmarks(names: Sequence[str]) -> Protocol:
    """The protocol that all of these benchmarks share.

    Raises:
        ValueError: no name, an unknown or repeated one, or names that need two tools.
    """
    if not names:
        raise ValueError(f"no benchmark named; choose from {', '.join(BENCHMARKS)}")
    for name in names:
        if name not in BENCHMARKS:
            raise ValueError(f"no benchmark {name!r}{nearest(name, BENCHMARKS)}")
    if repeated := sorted({name for name in names if list(names).count(name) > 1}):
        raise ValueError(f"{', '.join(repeated)}: named more than once")
    tools = {BENCHMARKS[name].protocol.package for name in names}
    if len(tools) > 1:
        raise ValueError(f"{', '.join(names)} need {' and '.join(sorted(tools))}: one run for each")
    return BENCHMARKS[names[0]].protocol


def command(
    python: str,
    model: str,
    names: Sequence[str],
    output: Path,
    *,
    backend: str = "vllm",
    seed: int = 0,
    limit: int = 0,
    devices: int = 1,
) -> list[str]:
    """The command line that judges `model` on `names` and writes its results below `output`.

    Args:
        python: the interpreter of the tool's environment.
        model: a folder or a hub id.
        backend: "vllm", or "hf" (transformers) for text.
        seed: of the sampling.
        limit: questions per benchmark; 0 for all.
        devices: GPUs over which vLLM splits the model.

    Raises:
        ValueError: as `check_benchmarks`; a model name that the tool would split; an unknown
            backend, or "hf" for images (transformers has no presence penalty).
    """
    protocol = check_benchmarks(names)
    if any(sign in model for sign in ",= "):
        raise ValueError(f"model={model!r}: the tool splits at commas, equal signs and spaces")
    if backend not in ("vllm", "hf") or (backend == "hf" and protocol.image_area):
        raise ValueError(f"backend={backend!r}: expected vllm, or hf for text benchmarks")
    tool = (
        _vision(model, devices, seed)
        if protocol.image_area
        else _text(model, backend, devices, seed)
    )
    tasks = ",".join(BENCHMARKS[name].task for name in names)
    seeds = ",".join([str(seed)] * 4)  # Python, numpy, torch, examples
    shared = ["--tasks", tasks, "--include_path", str(TASKS), "--seed", seeds]
    shared += ["--output_path", str(output), "--log_samples"]
    limited = ["--limit", str(limit)] if limit else []
    return [python, "-m", protocol.module, *tool, *shared, *limited]


def _vision(model: str, devices: int, seed: int) -> list[str]:
    low, high = VISION.image_area
    settings = {
        "model": model,
        "tensor_parallel_size": devices,
        "max_new_tokens": MAX_NEW_TOKENS,
        "max_model_len": 32_768,  # several images; the model's own 262,144 would not fit one GPU
        "mm_processor_kwargs": json.dumps({"min_pixels": low, "max_pixels": high}),
    }
    sampling = {**VISION.sampling, "seed": seed, "max_new_tokens": MAX_NEW_TOKENS}
    arguments = ["--model", "vllm_chat", "--model_args", _pairs(settings), "--batch_size", "256"]
    return [*arguments, "--gen_kwargs", _pairs(sampling)]


def _text(model: str, backend: str, devices: int, seed: int) -> list[str]:
    own = {"tensor_parallel_size": devices, "seed": seed} if backend == "vllm" else {}
    settings = {"pretrained": model, "enable_thinking": False, **own}
    sampling = {**TEXT.sampling, "do_sample": True, "max_gen_toks": MAX_NEW_TOKENS}
    chat = ["--apply_chat_template", "--system_instruction", TEXT.system, "--num_fewshot", "0"]
    arguments = ["--model", backend, "--model_args", _pairs(settings), "--batch_size", "auto"]
    return ["run", *arguments, "--gen_kwargs", _pairs(sampling), *chat]


def _pairs(values: Mapping[str, object]) -> str:
    return ",".join(f"{name}={value}" for name, value in values.items())
