"""Run directories that look like trained ones, written in milliseconds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlsd_lib.runs.records import append_lines
from rlsd_lib.runs.run import Run

STEPS = 60
Curve = Callable[[int], float]


def flat(value: float) -> Curve:
    return lambda step: value


def ramp(first: float, last: float, steps: int = STEPS) -> Curve:
    return lambda step: first + (last - first) * (step - 1) / (steps - 1)


# As the paper has it: every one of `CLAIMS` is reproduced on these.
PAPER: dict[str, dict[str, Any]] = {
    "grpo": {"after": 0.8, "reward": ramp(0.5, 0.8), "entropy": ramp(0.42, 0.25)},
    "rlsd": {
        "after": 0.9,
        "reward": lambda step: 0.9 - 0.4 * 0.9**step,
        "entropy": flat(0.42),
        "rlsd/lambda": lambda step: max(0.5 * (1 - step / 50), 0.0),
        "rlsd/clip_high_frac": flat(0.04),
        "rlsd/clip_low_frac": flat(0.025),
        "step_time": lambda step: 1.05 if step < 50 else 1.0,
    },
    "opd": {"after": 0.85, "rlsd/divergence": ramp(0.07, 0.018)},
    "opsd": {
        "after": 0.6,
        "reward": lambda step: 0.5 + 0.01 * min(step, 12) - 0.003 * max(step - 20, 0),
        "rlsd/divergence": flat(0.012),
        "rewards/leak/mean": ramp(0.0, 0.5),
    },
    "opsd_teacher_top1": {"after": 0.6, "rewards/leak/mean": ramp(0.0, 0.3)},
    "opsd_student_top1": {"after": 0.6, "rewards/leak/mean": ramp(0.0, 0.1)},
    "sdpo": {"after": 0.7},
    "grpo_opsd": {"after": 0.75},
}
DEFAULT = {
    "reward": flat(0.5),
    "entropy": flat(0.4),
    "rewards/leak/mean": flat(0.0),
    "step_time": flat(1.0),
}


def write_run(
    path: Path,
    method: str,
    seed: int,
    *,
    steps: int = STEPS,
    status: str = "finished",
    parameters: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    **look: Any,
) -> Path:
    """One run of `method`; `look` replaces what `PAPER` says of it."""
    given = {"method": method, "preset": "lab", "seed": seed, "max_steps": -1, "overrides": {}}
    given |= {"control": "none", **(parameters or {})}
    run = Run.start(path, parameters=given)
    run.record(data={"problems": "the same"}, config={"learning_rate": 1e-4, **(config or {})})
    seen = {"after": 0.7, "leak_after": 0.0, "seconds": 1.0, **DEFAULT, **PAPER[method], **look}
    shift = 0.002 * (seed - 1)  # seeds differ
    curves = {name: curve for name, curve in seen.items() if callable(curve)}
    lines = [{name: f(step) + shift for name, f in curves.items()} for step in range(1, steps + 1)]
    for number, line in enumerate(lines, 1):
        if "rlsd/lambda" in line:
            line["rlsd/lambda"] -= shift
        line["step"] = number
    append_lines(run.path / "metrics.jsonl", lines)
    run.add_evaluation("after", correct=[seen["after"] + shift, 0.5, 0.5])
    metrics = {"steps": steps, "seconds_per_step": seen["seconds"] + shift, "reward": 0.5}
    values = {"accuracy_before": 0.5, "accuracy_after": seen["after"] + shift}
    for name, value in {**values, "leak_rate_after": seen["leak_after"] + shift + 0.002}.items():
        metrics |= {name: value, f"{name}_low": value - 0.01, f"{name}_high": value + 0.01}
    for name in ("rlsd/clip_high_frac", "rlsd/clip_low_frac"):
        if name in curves:
            metrics[name] = curves[name](1) + shift / 10
    run.finish(metrics) if status == "finished" else run.fail("ValueError: gap is not finite")
    return path


def write_folder(folder: Path, methods: list[str], seeds: int = 3, **looks: dict[str, Any]) -> Path:
    """Runs of several methods; `looks` holds changes by method."""
    for method in methods:
        for seed in range(seeds):
            write_run(folder / f"{method}-s{seed}", method, seed, **looks.get(method, {}))
    return folder
