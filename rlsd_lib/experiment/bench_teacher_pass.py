"""The teacher pass by itself: plain beside shared, and `rlsd bench --profile`, where its time goes."""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from trl.kernels import ChunkedLogProbFunction

from rlsd_lib.experiment.bench import machine_speeds, now
from rlsd_lib.experiment.bench_trainers import SPECIAL, Sizes
from rlsd_lib.experiment.shapes import ModelShape, shape_of
from rlsd_lib.trainer import shared_prompts


def scoring(sizes: Sizes, folder: Path) -> tuple[Any, Callable[[str], Tensor]]:
    """A trainer, and its teacher pass over one group: "plain" or "shared" -> log P_T (N, T)."""
    trainer: Any = sizes.build("RLSD", folder, 1)
    row, count = trainer.train_dataset[0], sizes.generations
    prompts, contexts = [row["prompt"]] * count, [row["privileged_context"]] * count
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(len(SPECIAL), sizes.words, (count, sizes.completion), generator=random).to(
        trainer.accelerator.device
    )
    output = {
        "prompt_ids": ids.new_zeros(count, sizes.prompt),
        "completion_ids": ids,
        "completion_mask": torch.ones_like(ids),
    }

    def score(kind: str) -> Tensor:
        trainer.args.teacher_pass = kind
        with trainer.completion_head.applied(True):  # in both, as in a training step
            return trainer.teacher_scores(prompts, contexts, output).logps

    return trainer, score


def compare_passes(sizes: Sizes, rounds: int = 3) -> pd.Series:
    """The teacher pass, plain and shared in turn on the same rollouts, and its floor."""
    seconds: dict[str, list[float]] = {"plain": [], "shared": []}
    logps = {}
    with tempfile.TemporaryDirectory() as folder:
        trainer, score = scoring(sizes, Path(folder))
    for _ in range(rounds + 1):
        for kind, found in seconds.items():
            begun = now()
            logps[kind] = score(kind)
            found.append(now() - begun)
    plain, shared = (statistics.median(found[1:]) for found in seconds.values())
    teacher = trainer.teacher.model
    # What the passes compute in: bfloat16 under autocast, whatever the weights are kept in.
    dtype = torch.bfloat16 if trainer.args.bf16 else teacher.dtype
    rate, _ = machine_speeds(trainer.accelerator.device, dtype)
    least = floor_flops(shape_of(teacher.config), sizes, shared=True) / rate
    return pd.Series(
        {
            "plain pass, s": plain,
            "shared pass, s": shared,
            "plain / shared": plain / shared,
            "largest difference of log-probabilities": float(
                (logps["plain"] - logps["shared"]).abs().max()
            ),
            "floor of the shared pass on this machine, s": least,
            "shared / floor": shared / least,
        },
        name="teacher pass",
    )


def floor_flops(shape: ModelShape, sizes: Sizes, *, shared: bool) -> float:
    """The least FLOPs that score one group: every distinct position and visible pair once."""
    prompt, new, count = sizes.prompt + sizes.reference - 1, sizes.completion, sizes.generations
    # A position sees itself and those before: half of the others on average.
    prompts = (1 if shared else count) * shape.layer_flops(prompt, (prompt + 1) / 2)
    completions = shape.layer_flops(new, prompt + (new + 1) / 2) + shape.head_flops(new)
    return prompts + count * completions


def profile_shared_pass(sizes: Sizes, trace: Path) -> Iterator[str]:
    """Text: seconds of one shared pass by phase, under the profiler, and its operators.

    The cache copy and the head are parts of the completion pass. `trace` receives the pass for
    chrome://tracing or ui.perfetto.dev.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer, score = scoring(sizes, Path(folder))
    whole = "teacher pass"
    phases = (
        (trainer, "teacher_scores", whole),
        (trainer, "teacher_prompts", "tokenise"),
        (shared_prompts, "_read_prompts", "prompt pass"),
        (trainer.teacher.model, "forward", "completion pass"),
        (shared_prompts._SharedLayer, "update", "cache copy"),
        (ChunkedLogProbFunction, "forward", "head"),
    )
    score("shared")  # to warm up
    device, activities = "cpu", [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        device, activities = "device", [*activities, ProfilerActivity.CUDA]
    with ExitStack() as patched:
        for owner, name, phase in phases:
            named = record_function(phase)(getattr(owner, name))
            patched.enter_context(patch.object(owner, name, named))
        with profile(activities=activities) as found:
            score("shared")
    averages = found.key_averages()
    total = {row.key: getattr(row, f"{device}_time_total") / 1e6 for row in averages}
    seconds = pd.Series({phase: total[phase] for *_, phase in phases})
    table = pd.DataFrame({"seconds": seconds, "share": seconds / seconds[whole]})
    yield f"{sizes}\n{table.to_string(float_format='{:.3g}'.format)}\n"
    trace.parent.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(trace))
    yield averages.table(
        sort_by=f"self_{device}_time_total", row_limit=12, max_name_column_width=40
    )
    yield f"trace: {trace}"
