"""`rlsd bench`: what a step of each trainer costs beside GRPO's, measured.

Trainers take turns within one process, so that a machine that speeds up or slows down does so for
all, and train on the very same rollouts: those of each step are generated once, with a fixed seed.
Generation is timed by itself and counts the same for every trainer.
"""

import contextlib
import copy
import gc
import itertools
import math
import re
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOTrainer

from rlsd_lib.experiment.racers import BASE, SPECIAL, PresetTrainers, Sizes, contenders
from rlsd_lib.experiment.shapes import ModelShape, shape_of
from rlsd_lib.report.heatmap import new_figure
from rlsd_lib.trainer.trainer import RLSDTrainer

# What each factor of a sweep becomes while the others stay as they are.
FACTORS = {
    "prompt": (0.5, 1, 2, 4),
    "completion": (0.5, 1, 2),
    "generations": (0.5, 1, 2),
    "vocabulary": (0.25, 1, 4),
}


# Time and memory


class Clock(TrainerCallback):
    """Seconds of each optimiser step, and in it of generation and of the teacher pass.

    Rollouts that are in `rollouts` already, under the number of the call modulo `distinct`, are used
    again, and their seconds are those of a "replay" in place of a "generation".
    """

    def __init__(self, trainer: Any, rollouts: dict[int, list], distinct: int) -> None:
        self.steps: list[dict[str, float]] = []
        self.rollouts, self.distinct, self.calls = rollouts, distinct, 0
        # The narrowest function of TRL's that returns completions: of one turn, and of SDPO's.
        if isinstance(trainer, GRPOTrainer):
            turn = trainer._generate_single_turn
            trainer._generate_single_turn = lambda *a: (self._rollouts(lambda: turn(*a)[0]), None)
        else:
            made = trainer._generate
            trainer._generate = lambda ids: (ids, self._rollouts(lambda: made(ids)[1]))
        if isinstance(trainer, RLSDTrainer):
            trainer.scorer.score = self._timed(trainer.scorer.score, "teacher pass")

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.steps.append(defaultdict(float, step=-now()))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps[-1]["step"] += now()

    def _timed(self, call: Callable, name: str) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = now()
            result = call(*args, **kwargs)
            self.steps[-1][name] += now() - begun
            return result

        return timed

    def _rollouts(self, generate: Callable[[], list]) -> list:
        call, self.calls = self.calls % self.distinct, self.calls + 1
        begun, part = now(), "replay"
        if call not in self.rollouts:
            torch.manual_seed(call)
            self.rollouts[call], part = generate(), "generation"
        completions = copy.deepcopy(self.rollouts[call])
        self.steps[-1][part] += now() - begun
        return completions


def train(
    what: Sizes | PresetTrainers,
    name: str,
    steps: int,
    rollouts: dict[int, list],
    distinct: int = 10**9,
) -> tuple[list[dict[str, float]], float]:
    """Train one step to warm up and `steps` more: their seconds by part, see `Clock`; peak MiB.

    The peak is the device's, or without a GPU the most that this process was ever resident.
    """
    if torch.cuda.is_available():
        gc.collect()  # a trainer and its model refer to each other
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        trainer = what.build(name, Path(folder), steps + 1)
        clock = Clock(trainer, rollouts, distinct)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)
        trainer.train()
    return clock.steps[1:], peak_bytes() / 2**20


def now() -> float:
    """Seconds: of the clock on the wall, or of the processor where one thread does all the work.

    A single thread's own seconds are what other programs on the machine lengthen least.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def clock_in_words() -> str:
    """What `now` reads here."""
    if torch.cuda.is_available():
        return f"seconds of the wall clock, {torch.cuda.get_device_name()}"
    threads = torch.get_num_threads()
    return "processor seconds" if threads == 1 else f"seconds of the wall clock, {threads} threads"


def peak_mib(what: Sizes | PresetTrainers, name: str) -> float:
    """Resident MiB, beyond the imports, at the peak of two steps in a process of their own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_mib, what, name).result()


def _peak_mib(what: Sizes | PresetTrainers, name: str) -> float:
    contenders()  # the imports
    before = psutil.Process().memory_info().rss / 2**20
    return train(what, name, 1, {})[1] - before


def peak_bytes() -> int:
    """The most memory that this process ever had: device memory on a GPU, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage, whose peak includes that of the process that started this one.
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    # Bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# The race


def race(
    what: Sizes | PresetTrainers,
    names: Sequence[str],
    steps: int = 3,
    rounds: int = 1,
    memory: bool = True,
    until: float = math.inf,
    distinct: int = 10**9,
) -> pd.DataFrame:
    """A row for each contender: medians over all steps, peak memory, and both over GRPO's.

    The contenders take turns within this process, `rounds` times. Of a turn's steps only `distinct`
    have rollouts of their own. Device memory is that of the turns, where all but the first contender
    generate nothing; without a GPU it is the median of `rounds` processes. A row is NaN where device
    memory did not suffice, or where all turns would have begun after `until` (`time.monotonic`).
    """
    timed: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    peaks: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        rollouts: dict[int, list] = {}
        for name in names:
            if time.monotonic() > until:
                break
            with contextlib.suppress(torch.OutOfMemoryError):
                found, peak = train(what, name, steps, rollouts, distinct)
                timed[name] += found
                peaks[name].append(peak)
    if memory and not torch.cuda.is_available():
        peaks = {name: [peak_mib(what, name) for _ in range(rounds)] for name in names}
    every = [step for found in timed.values() for step in found]
    generation = _median(step["generation"] for step in every if "generation" in step)
    rows = {name: _medians(found, generation) for name, found in timed.items()}
    table = pd.DataFrame(rows).T
    if memory:
        table["peak MiB"] = pd.Series({name: _median(found) for name, found in peaks.items()})
    for column in ("step, s", "without generation, s", "peak MiB"):
        if column in table and BASE in table.index:
            table[f"{column.partition(',')[0]} / {BASE}"] = table[column] / table.loc[BASE, column]
    return table


def _medians(steps: list[dict[str, float]], generation: float) -> dict[str, float]:
    rest = _median(s["step"] - s.get("generation", 0) - s.get("replay", 0) for s in steps)
    return {
        "step, s": generation + rest,
        "generation, s": generation,
        "without generation, s": rest,
        "teacher pass, s": _median(s["teacher pass"] for s in steps if "teacher pass" in s),
    }


def _median(values: Iterable[float]) -> float:
    return statistics.median([*values] or [math.nan])


# The teacher pass by itself


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
            return trainer.scorer.score(prompts, contexts, output, want_hidden=False).logps

    return trainer, score


def passes(sizes: Sizes, rounds: int = 3) -> pd.Series:
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
    rate, _ = measure_machine(trainer.accelerator.device, dtype)
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


def measure_machine(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOPs and bytes per second: the best of a few square matrix products, and of a few copies."""
    size, length = (8192, 2**28) if device.type == "cuda" else (1024, 2**24)
    square = torch.randn(size, size, device=device, dtype=dtype)
    line = torch.zeros(length, device=device, dtype=dtype)
    other = torch.empty_like(line)

    def best(call: Callable) -> float:
        begun = [now()]
        for _ in range(4):
            call()
            begun.append(now())
        return min(after - before for before, after in itertools.pairwise(begun))

    moved = 2 * line.numel() * line.element_size()
    return 2 * size**3 / best(lambda: square @ square), moved / best(lambda: other.copy_(line))


# How cost grows


def sweep(sizes: Sizes, names: Sequence[str], outputs: Path, steps: int) -> pd.DataFrame:
    """One factor at a time, around `sizes`: `tables/bench.csv` and `figures/bench_scaling.png`."""
    raced: dict[Sizes, pd.DataFrame] = {}
    rows = []
    for factor, scales in FACTORS.items():
        for scale in scales:
            changed = replace(sizes, **{factor: max(round(getattr(sizes, factor) * scale), 1)})
            if changed not in raced:
                raced[changed] = race(changed, names, steps, memory=False)
            row = raced[changed].rename_axis("trainer").reset_index()
            rows.append(row.assign(factor=factor, value=getattr(changed, factor)))
    table = pd.concat(rows, ignore_index=True).round(4)
    for folder in ("tables", "figures"):
        (outputs / folder).mkdir(parents=True, exist_ok=True)
    table.to_csv(outputs / "tables" / "bench.csv", index=False)
    draw(table).savefig(outputs / "figures" / "bench_scaling.png", dpi=120)
    return table


def draw(table: pd.DataFrame) -> Figure:
    """Step time over GRPO's against each factor, a panel each, from the table of `sweep`."""
    factors = list(dict.fromkeys(table["factor"]))
    figure = new_figure((2.6 * len(factors), 3.0))
    shown = table[table["trainer"] != BASE]
    panels = figure.subplots(1, len(factors), sharey=True, squeeze=False)[0]
    for axes, factor in zip(panels, factors, strict=True):
        rows = shown[shown["factor"] == factor]
        style = {"hue": "trainer", "marker": "o", "palette": "colorblind"}
        first = factor == factors[0]
        sns.lineplot(rows, x="value", y=f"step / {BASE}", legend=first, ax=axes, **style)
        axes.axhline(1.0, color="0.6", linewidth=1)
        axes.set_xscale("log", base=2)
        values = sorted(rows["value"].unique())
        axes.set(xlabel=factor, xticks=values, xticklabels=values)
    panels[0].set_ylabel(f"step time / {BASE}'s")
    # Above the panels, where it hides no line.
    handles, labels = panels[0].get_legend_handles_labels()
    panels[0].get_legend().remove()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure
