"""`rlsd bench --gpu`: trainers on models of real size, random weights, beside what a plan says."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure

from rlsd_lib.experiment.bench import measure_machine, race
from rlsd_lib.experiment.plan import RESERVED, Plan
from rlsd_lib.experiment.racers import BASE, Sizes
from rlsd_lib.experiment.shapes import shape_of
from rlsd_lib.report.heatmap import new_figure

TRAINERS = (BASE, "RLSD", "RLSD, plain pass", "OPSD", "TRL SDPO")
MODELS = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-8B")
SIZES = [Sizes(prompt=1024, completion=1024, rows=2, model=model) for model in MODELS]
SECONDS = 200  # after which no trainer is begun, so that all ends within four minutes
REST = "without generation"


def plan_for(sizes: Sizes) -> Plan:
    """The plan of a benchmark's step on one GPU."""
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
    """Measure `SIZES`; writes `tables/bench_gpu.csv`, which plans read, and a figure beside it.

    Raises:
        ValueError: without a GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            "--gpu needs an NVIDIA GPU that torch can see, of 40 GB or more for the two smaller "
            "models. Without one: --against, on synthetic rollouts, or `rlsd plan`, by arithmetic."
        )
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    table = measure(SIZES, memory)
    for folder in ("tables", "figures"):
        (outputs / folder).mkdir(parents=True, exist_ok=True)
    table.to_csv(outputs / "tables" / "bench_gpu.csv", index=False)
    draw(table).savefig(outputs / "figures" / "bench_gpu.png", dpi=120)
    return table


def measure(
    models: Sequence[Sizes], memory: float, steps: int = 2, seconds: float = SECONDS
) -> pd.DataFrame:
    """A row for each model and trainer; NaN where it was not measured, see `race`.

    Models that by their plan do not fit into `memory` GiB are left out. What a plan takes from the
    table (`MEASURED` in plan.py) stands in the rows of GRPO.
    """
    until = time.monotonic() + seconds
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate, bandwidth = measure_machine(device, models[0].dtype)
    tables = []
    for sizes in models:
        plan = replace(plan_for(sizes), tflops=rate / 1e12, bandwidth=bandwidth / 1e12)
        if plan.peak() <= memory:
            raced = race(sizes, TRAINERS, steps, until=until, distinct=2)
            tables.append(_with_plan(raced, plan).assign(model=sizes.model or "tiny"))
    if not tables:
        raise ValueError(f"{memory:.0f} GiB of device memory hold none of the models by their plan")
    return pd.concat(tables).rename_axis("trainer").reset_index()


def _with_plan(table: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    """The table with the plan's ratios and peaks, and with what was measured for other plans."""
    table = table.copy()
    work = {
        BASE: (plan, False),
        "RLSD": (plan, True),
        "RLSD, plain pass": (replace(plan, teacher_pass="plain"), True),
    }
    flops = {
        name: sum(count for part, count in p.flops(teacher=t).items() if part != "generation")
        for name, (p, t) in work.items()
    }
    # What torch allocates is no part of the reserve.
    peaks = {name: (p.peak(teacher=t) - RESERVED) * 1024 for name, (p, t) in work.items()}
    table[f"plan, {REST} / {BASE}"] = pd.Series(flops) / flops[BASE]
    table["plan, peak MiB"] = pd.Series(peaks)
    base, phase = table.loc[BASE], plan.memory(teacher=False)["update"]
    more = (base["peak MiB"] - peaks[BASE]) / 1024
    table.loc[BASE, "tflops"] = plan.tflops
    table.loc[BASE, "bandwidth"] = plan.bandwidth
    table.loc[BASE, "mfu"] = flops[BASE] / base[f"{REST}, s"] / plan.tflops / 1e12
    table.loc[BASE, "activations"] = max(1 + more / phase["activations"], 0.1)
    return table


def draw(table: pd.DataFrame) -> Figure:
    """Time without generation and peak memory over GRPO's, measured as bars and planned as dots."""
    figure = new_figure((9.0, 3.2))
    planned = table["plan, peak MiB"] / table.groupby("model")["plan, peak MiB"].transform("first")
    shown = table.assign(**{f"plan, peak MiB / {BASE}": planned})
    style = {"x": "model", "hue": "trainer", "palette": "colorblind"}
    for axes, name in zip(figure.subplots(1, 2), (REST, "peak MiB"), strict=True):
        sns.barplot(shown, y=f"{name} / {BASE}", ax=axes, **style)
        dots = {"dodge": True, "jitter": False, "linewidth": 1, "edgecolor": "0.2", "legend": False}
        sns.stripplot(shown, y=f"plan, {name} / {BASE}", ax=axes, **dots, **style)
        axes.axhline(1.0, color="0.6", linewidth=1)
        axes.set(xlabel="", ylabel=f"{name.removesuffix(' MiB')} / {BASE}'s")
        handles, labels = axes.get_legend_handles_labels()
        axes.get_legend().remove()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure
