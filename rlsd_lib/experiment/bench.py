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
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import psutil
import seaborn as sns
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback
from trl import GRPOTrainer

from rlsd_lib.experiment.bench_trainers import BASE, Sizes, contenders
from rlsd_lib.experiment.plan import MEASURED, RESERVED, Plan
from rlsd_lib.experiment.shapes import shape_of
from rlsd_lib.trainer.trainer import RLSDTrainer

# A contender, a folder, a number of steps -> its trainer.
Build = Callable[[str, Path, int], Trainer]
GENERATION, REST, TEACHER = "generation, s", "without generation, s", "teacher pass, s"
PEAK = "peak MiB"
# What each factor of a sweep becomes while the others stay as they are.
FACTORS = {
    "prompt": (0.5, 1, 2, 4),
    "completion": (0.5, 1, 2),
    "generations": (0.5, 1, 2),
    "vocabulary": (0.25, 1, 4),
}
TRAINERS = (BASE, "RLSD", "RLSD, plain pass", "OPSD", "TRL SDPO")
MODELS = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-8B")
ON_GPU = [Sizes(prompt=1024, completion=1024, rows=2, model=model) for model in MODELS]
RATIOS = (f"without generation / {BASE}", f"{PEAK} / {BASE}")  # measured, and planned


# Time and memory


class Clock(TrainerCallback):
    """Seconds of each optimiser step without its generation, of generation and of the teacher pass.

    Rollouts that are in `rollouts` already, under the number of the call, are used again.
    """

    def __init__(self, trainer: Any, rollouts: dict[int, list]) -> None:
        self.steps: list[dict[str, float]] = []
        self.rollouts, self.calls = rollouts, itertools.count()
        # The narrowest function of TRL's that returns completions: of one turn, and of SDPO's.
        if isinstance(trainer, GRPOTrainer):
            turn = trainer._generate_single_turn
            trainer._generate_single_turn = lambda *a: (self._rollouts(lambda: turn(*a)[0]), None)
        else:
            made = trainer._generate
            trainer._generate = lambda ids: (ids, self._rollouts(lambda: made(ids)[1]))
        if isinstance(trainer, RLSDTrainer):
            score = trainer.teacher_scores
            trainer.teacher_scores = lambda *a, **k: self._teacher_pass(lambda: score(*a, **k))

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.steps.append(defaultdict(float, {REST: -now()}))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps[-1][REST] += now()

    def _teacher_pass(self, score: Callable[[], Any]) -> Any:
        begun = now()
        scores = score()
        self.steps[-1][TEACHER] += now() - begun
        return scores

    def _rollouts(self, generate: Callable[[], list]) -> list:
        call, begun = next(self.calls), now()
        if call not in self.rollouts:
            torch.manual_seed(call)
            self.rollouts[call] = generate()
            self.steps[-1][GENERATION] += now() - begun
        completions = copy.deepcopy(self.rollouts[call])
        self.steps[-1][REST] -= now() - begun
        return completions


def train(
    build: Build, name: str, steps: int, rollouts: dict[int, list]
) -> tuple[list[dict[str, float]], float]:
    """Train one step to warm up and `steps` more: their seconds by part, see `Clock`; peak MiB.

    The peak is the device's, or without a GPU the most that this process was ever resident.
    """
    if torch.cuda.is_available():
        gc.collect()  # a trainer and its model refer to each other
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(name, Path(folder), steps + 1)
        clock = Clock(trainer, rollouts)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(clock)
        trainer.train()
    return clock.steps[1:], _peak_bytes() / 2**20


def now() -> float:
    """Seconds: of the clock on the wall, or of the processor where one thread does all the work.

    A single thread's own seconds are what other programs on the machine lengthen least.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def peak_mib(build: Build, name: str) -> float:
    """Resident MiB, beyond the imports, at the peak of two steps in a process of their own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_mib, build, name).result()


def _peak_mib(build: Build, name: str) -> float:
    contenders()  # the imports
    before = psutil.Process().memory_info().rss / 2**20
    return train(build, name, 1, {})[1] - before


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage, whose peak includes that of the process that started this one.
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    # Bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def machine_speeds(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
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


# The race


def race(
    build: Build,
    names: Sequence[str],
    steps: int = 3,
    rounds: int = 1,
    memory: bool = True,
    until: float = math.inf,
) -> pd.DataFrame:
    """A row for each contender: medians over all steps, peak memory, and both over GRPO's.

    The contenders take turns within this process, `rounds` times. Device memory is that of the
    turns, where all but the first contender generate nothing; without a GPU it is the median of
    `rounds` processes. A row is NaN where device memory did not suffice, or where all turns would
    have begun after `until` (`time.monotonic`).
    """
    timed: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        rollouts: dict[int, list] = {}
        for name in names:
            if time.monotonic() > until:
                break
            with contextlib.suppress(torch.OutOfMemoryError):
                found, peak = train(build, name, steps, rollouts)
                timed[name] += [{**step, PEAK: peak} for step in found]
    parts = (GENERATION, REST, TEACHER, PEAK)
    medians = {name: pd.DataFrame(found, columns=parts).median() for name, found in timed.items()}
    table = pd.DataFrame(medians).T.astype(float)
    table[GENERATION] = table[GENERATION].median()  # made by one of them, for all
    table.insert(0, "step, s", table[GENERATION] + table[REST])
    if not memory:
        del table[PEAK]
    elif not torch.cuda.is_available():
        table[PEAK] = [median(peak_mib(build, name) for _ in range(rounds)) for name in names]
    for column in ("step, s", REST, PEAK):
        if column in table and BASE in table.index:
            table[f"{column.partition(',')[0]} / {BASE}"] = table[column] / table.loc[BASE, column]
    return table


def sweep(sizes: Sizes, names: Sequence[str], outputs: Path, steps: int) -> pd.DataFrame:
    """One factor at a time, around `sizes`: `tables/bench.csv` and `figures/bench_scaling.png`."""
    raced: dict[Sizes, pd.DataFrame] = {}
    rows = []
    for factor, scales in FACTORS.items():
        for scale in scales:
            changed = replace(sizes, **{factor: max(round(getattr(sizes, factor) * scale), 1)})
            if changed not in raced:
                raced[changed] = race(changed.build, names, steps, memory=False)
            row = raced[changed].rename_axis("trainer").reset_index()
            rows.append(row.assign(factor=factor, value=getattr(changed, factor)))
    table = pd.concat(rows, ignore_index=True).round(4)
    grid = sns.relplot(
        table[table["trainer"] != BASE],
        x="value",
        y=f"step / {BASE}",
        hue="trainer",
        col="factor",
        kind="line",
        marker="o",
        palette="colorblind",
        height=3,
        facet_kws={"sharex": False},
    )
    grid.refline(y=1).set_titles("")
    for factor, axes in grid.axes_dict.items():
        values = sorted(table.loc[table["factor"] == factor, "value"].unique())
        axes.set_xscale("log", base=2)
        axes.set(xlabel=factor, xticks=values, xticklabels=values)
    _write(outputs, table, "bench", grid, "bench_scaling")
    return table


def _write(outputs: Path, table: pd.DataFrame, name: str, grid: sns.FacetGrid, figure: str) -> None:
    for folder in ("tables", "figures"):
        (outputs / folder).mkdir(parents=True, exist_ok=True)
    table.to_csv(outputs / "tables" / f"{name}.csv", index=False)
    grid.savefig(outputs / "figures" / f"{figure}.png", dpi=120)
    plt.close(grid.figure)


# Models of real size


def plan_for(sizes: Sizes) -> Plan:
    """The plan of RLSD's step at these sizes on one GPU."""
    return Plan(
        shape_of(sizes.config()),
        gpus=1,
        prompt_length=sizes.prompt,
        max_completion_length=sizes.completion,
        rollouts=sizes.generations,
        num_generations=sizes.generations,
        per_device_train_batch_size=min(sizes.rows, sizes.generations),
        privileged_length=sizes.reference,
        dtype=str(sizes.dtype).removeprefix("torch."),
        gradient_checkpointing=bool(sizes.model),
    )


def bench_gpu(outputs: Path) -> pd.DataFrame:
    """Measure `ON_GPU`; writes `tables/bench_gpu.csv`, which plans read, and a figure beside it.

    Raises:
        ValueError: without a GPU, or where it holds none of the models.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            "--gpu needs an NVIDIA GPU that torch can see, of 40 GB or more for the two smaller "
            "models. Without one: --against, on synthetic rollouts, or `rlsd plan`, by arithmetic."
        )
    table = measure(ON_GPU, torch.cuda.get_device_properties(0).total_memory / 2**30)
    write_gpu(outputs, table)
    return table


def write_gpu(outputs: Path, table: pd.DataFrame) -> None:
    """Write the table of `measure`, and its ratios as a figure, planned ones beside measured ones."""
    plans = [f"plan, {column}" for column in RATIOS]
    shown = table.melt(["model", "trainer"], [*RATIOS, *plans], var_name="what", value_name="ratio")
    shown["by"] = shown["what"].str.startswith("plan").map({True: "plan", False: "measurement"})
    shown["what"] = shown["what"].str.removeprefix("plan, ")
    points = {"x": "ratio", "y": "model", "hue": "trainer", "style": "by", "col": "what"}
    grid = sns.relplot(shown, **points, palette="colorblind", height=3, s=60)
    grid.refline(x=1).set_titles("{col_name}").set_axis_labels("", "")
    _write(outputs, table, "bench_gpu", grid, "bench_gpu")


def measure(models: Sequence[Sizes], memory: float, seconds: float = 200) -> pd.DataFrame:
    """A row for each model and trainer; NaN where it was not measured, see `race`.

    Models that by their plan do not fit into `memory` GiB are left out, and no trainer begins after
    `seconds`, so that all ends within four minutes. What a plan takes from the table (`MEASURED` in
    plan.py) stands in the rows of GRPO.
    """
    until = time.monotonic() + seconds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate, bandwidth = machine_speeds(device, models[0].dtype)
    tables = []
    for sizes in models:
        plan = replace(plan_for(sizes), tflops=rate / 1e12, bandwidth=bandwidth / 1e12)
        if plan.peak() <= memory:
            raced = race(sizes.build, TRAINERS, steps=1, until=until)
            tables.append(_beside_plan(raced, plan).assign(model=sizes.model or "tiny"))
    if not tables:
        raise ValueError(f"{memory:.0f} GiB of device memory hold none of the models by their plan")
    return pd.concat(tables).rename_axis("trainer").reset_index()


def _beside_plan(table: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    plain = replace(plan, teacher_pass="plain")
    plans = {BASE: plan.grpo, "RLSD": plan, "RLSD, plain pass": plain}
    work = {name: sum(p.flops().values()) - p.flops()["generation"] for name, p in plans.items()}
    # What torch allocates is no part of the reserve.
    peaks = pd.Series({name: (p.peak() - RESERVED) * 1024 for name, p in plans.items()})
    table[f"plan, {PEAK}"] = peaks
    for column, planned in zip(RATIOS, (pd.Series(work), peaks), strict=True):
        table[f"plan, {column}"] = planned / planned[BASE]
    base, kept = table.loc[BASE], plan.grpo.memory()["update"]["activations"]
    more = (base[PEAK] - peaks[BASE]) / 1024
    mfu = work[BASE] / base[REST] / plan.tflops / 1e12
    found = (plan.tflops, plan.bandwidth, mfu, max(1 + more / kept, 0.1))
    return table.join(pd.DataFrame([found], [BASE], MEASURED))


# Records


def in_words(table: pd.DataFrame) -> str:
    """Every trainer's step time over GRPO's, from a table of `rlsd bench`."""
    if f"step / {BASE}" not in table:
        return f"no {BASE} beside it"
    ratios = table[f"step / {BASE}"].dropna()
    if "trainer" in table:  # several models
        ratios.index = (table["model"] + ", " + table["trainer"])[ratios.index]
    told = [f"{name} {ratio:.3f}" for name, ratio in ratios.items() if not name.endswith(BASE)]
    return f"of {BASE}'s step: {'; '.join(told)}"
