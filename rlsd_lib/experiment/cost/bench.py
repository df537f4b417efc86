"""What RLSD costs beside GRPO: step time, teacher pass and peak memory, side by side in one run.

Ratios are of steps measured in turn within one process, so that a machine that speeds up or slows
down does so for both. `race` does the same for all trainers, TRL's included.
"""

import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import PrinterCallback, TrainerCallback

from rlsd_lib.experiment.presets import PRESETS, RunParameters
from rlsd_lib.names import look_up
from rlsd_lib.runs import paths
from rlsd_lib.tasks import load_task
from rlsd_lib.tasks.models import load_model
from rlsd_lib.trainer.trainer import RLSDTrainer

WARM_UP = 2


class Clock(TrainerCallback):
    """Seconds per optimiser step, of each teacher pass and of each generation, warm-up included."""

    def __init__(self, warm_up: int = WARM_UP) -> None:
        self.warm_up = warm_up
        self.seconds: dict[str, list[float]] = {"steps": [], "passes": [], "generations": []}
        self.begun = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun = now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds["steps"].append(now() - self.begun)

    def watch(self, call: Callable, name: str) -> Callable:
        """`call`, with its seconds kept under `name`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = now()
            result = call(*args, **kwargs)
            self.seconds[name].append(now() - begun)
            return result

        return timed

    def timed(self, name: str) -> list[float]:
        """The seconds kept under `name`, without those of the warm-up steps."""
        return self.seconds[name][self.warm_up :]


def measure(method: str, preset: str, steps: int, **overrides: Any) -> Clock:
    """Train `steps` + 2 steps from the preset's start and return the times of the last `steps`."""
    chosen = PRESETS[look_up(preset, PRESETS, "preset")]
    model, tokenizer = load_model(
        chosen.model, paths.outputs_root() / "cache", **chosen.model_options
    )
    task = load_task(
        chosen.task,
        train_size=chosen.train_size,
        test_size=1,
        seed=chosen.data_seed,
        **chosen.task_options,
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        overrides = {**overrides, "lambda_decay_steps": 0, "save_strategy": "no"}
        run = RunParameters(method, preset, max_steps=steps + WARM_UP, overrides=overrides)
        config = run.resolve(folder, template=task.privileged_template).config
        trainer = RLSDTrainer(
            model, [task.reward, task.leak], config, task.train, processing_class=tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)
        trainer.scorer.score = clock.watch(trainer.scorer.score, "passes")
        trainer.train()
    return clock


def compare(preset: str, steps: int = 10, rounds: int = 3) -> pd.Series:
    """GRPO against RLSD in turn, `rounds` times; medians over all steps, and peak memory of each.

    The teacher is a full copy (`snapshot`) and lambda is constant, so that every step pays.
    """
    clocks: dict[str, list[Clock]] = {"grpo": [], "rlsd": []}
    for _ in range(rounds):
        for method, runs in clocks.items():
            runs.append(measure(method, preset, steps))
    grpo, rlsd = (
        statistics.median(s for clock in clocks[method] for s in clock.timed("steps"))
        for method in clocks
    )
    teacher = statistics.median(s for clock in clocks["rlsd"] for s in clock.timed("passes"))
    memory = {method: peak_memory(method, preset) for method in clocks}
    return pd.Series(
        {
            "GRPO, seconds per step": grpo,
            "RLSD, seconds per step": rlsd,
            "RLSD / GRPO": rlsd / grpo,
            "teacher pass, seconds": teacher,
            "teacher pass / RLSD step": teacher / rlsd,
            "(RLSD - GRPO) / teacher pass": (rlsd - grpo) / teacher,
            "GRPO, peak MiB": memory["grpo"],
            "RLSD, peak MiB": memory["rlsd"],
            "RLSD / GRPO, peak memory": memory["rlsd"] / memory["grpo"],
        },
        name=preset,
    )


def peak_memory(method: str, preset: str, steps: int = 2) -> float:
    """Peak memory of a training process of its own, in MiB: device memory on a GPU, else resident."""
    code = f"from rlsd_lib.experiment.cost import bench; bench._report_peak({method!r}, {preset!r}, {steps})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])["mib"]


def _report_peak(method: str, preset: str, steps: int) -> None:
    measure(method, preset, steps)
    sys.stdout.write(json.dumps({"mib": peak_bytes() / 2**20}) + "\n")


def peak_bytes() -> int:
    """The most memory that this process ever held: device memory on a GPU, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage, whose peak includes that of the process that started this one.
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    # Bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def now() -> float:
    """Seconds: of the clock on the wall, or of the processor where one thread does all the work.

    A single thread's own seconds are what other programs on the machine lengthen least.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()
