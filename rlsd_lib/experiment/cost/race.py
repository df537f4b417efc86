"""`rlsd bench` on synthetic rollouts: every trainer on the same tokens, and how cost grows."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import seaborn as sns
import torch
from matplotlib.figure import Figure
from transformers import PrinterCallback, Trainer

from rlsd_lib.experiment.cost.bench import Clock, now, peak_bytes
from rlsd_lib.experiment.cost.contenders import Setting, build, contenders
from rlsd_lib.experiment.cost.floor import measure_machine, teacher_pass
from rlsd_lib.report.heatmap import new_figure
from rlsd_lib.trainer.trainer import RLSDTrainer

BASE = "GRPO"
# What each factor becomes while the others stay as they are.
FACTORS = {
    "prompt": (0.5, 1, 2, 4),
    "completion": (0.5, 1, 2),
    "generations": (0.5, 1, 2),
    "vocabulary": (0.25, 1, 4),
}


class FixedRollouts(Clock):
    """Draws the rollouts of step i with seed i, and remembers them."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(warm_up=1)
        self.rollouts: list[int] = []
        generate = trainer._generate

        def seeded(*args: Any) -> Any:
            torch.manual_seed(len(self.rollouts))
            generated = generate(*args)
            self.rollouts.append(hash(tuple(map(tuple, generated[1]))))
            return generated

        trainer._generate = self.watch(seeded, "generations")
        if isinstance(trainer, RLSDTrainer):
            trainer.teacher_scores = self.watch(trainer.teacher_scores, "passes")


def race(
    setting: Setting, names: Sequence[str], steps: int = 3, rounds: int = 1, memory: bool = True
) -> pd.DataFrame:
    """A row for each contender: medians over all steps, peak memory, and both over GRPO's.

    The contenders take turns within this process, `rounds` times; memory is the median of as many
    processes each.

    Raises:
        RuntimeError: if two contenders did not see the same rollouts.
    """
    clocks: dict[str, list[FixedRollouts]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, runs in clocks.items():
            runs.append(_timed(name, setting, steps))
    _check_rollouts(clocks)
    rows = {name: _medians(runs) for name, runs in clocks.items()}
    if memory:
        for name, row in rows.items():
            row["peak MiB"] = statistics.median(peak_memory(name, setting) for _ in range(rounds))
    table = pd.DataFrame(rows).T
    for column in ("step, s", "peak MiB"):
        if column in table and BASE in table.index:
            table[f"{column.partition(',')[0]} / {BASE}"] = table[column] / table.loc[BASE, column]
    return table


def _timed(name: str, setting: Setting, steps: int) -> FixedRollouts:
    with tempfile.TemporaryDirectory() as folder:
        return _train(build(name, setting, Path(folder), steps + 1))


def _train(trainer: Trainer) -> FixedRollouts:
    """Train, and return the times of all steps but the first."""
    clock = FixedRollouts(trainer)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)
    trainer.train()
    return clock


def _medians(runs: list[FixedRollouts]) -> dict[str, float]:
    def median(name: str) -> float:
        values = [seconds for clock in runs for seconds in clock.timed(name)]
        return statistics.median(values) if values else float("nan")

    return {
        "step, s": median("steps"),
        "generation, s": median("generations"),
        "teacher pass, s": median("passes"),
    }


def _check_rollouts(clocks: Mapping[str, list[FixedRollouts]]) -> None:
    seen = {name: runs[0].rollouts for name, runs in clocks.items()}
    first = next(iter(seen))
    differ = [name for name in seen if seen[name] != seen[first]]
    if differ:
        raise RuntimeError(f"{differ} did not see the rollouts of {first!r}: no comparison.")


def peak_memory(name: str, setting: Setting) -> float:
    """Peak MiB of two steps in a process of their own, beyond what the imports take."""
    code = (
        "from rlsd_lib.experiment.cost import race; from rlsd_lib.experiment.cost.contenders import Setting; "
        f"race._report_peak({name!r}, {setting!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: the process for its memory failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])["mib"]


def _report_peak(name: str, setting: Setting) -> None:
    contenders()  # the imports
    before = 0 if torch.cuda.is_available() else psutil.Process().memory_info().rss
    _timed(name, setting, 1)
    sys.stdout.write("\n" + json.dumps({"mib": (peak_bytes() - before) / 2**20}) + "\n")


def passes(setting: Setting, rounds: int = 3) -> pd.Series:
    """The teacher pass by itself, plain and shared in turn on the same rollouts, and its floor."""
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any = build("RLSD", setting, Path(folder), 1)
    row = trainer.train_dataset[0]
    count, device = setting.generations, trainer.accelerator.device
    random = torch.Generator().manual_seed(1)
    sampled = torch.randint(3, setting.vocabulary, (count, setting.completion), generator=random)
    output = {
        "prompt_ids": torch.zeros(count, setting.prompt, dtype=torch.long, device=device),
        "completion_ids": sampled.to(device),
        "completion_mask": torch.ones_like(sampled).to(device),
    }
    prompts, contexts = [row["prompt"]] * count, [row["privileged_context"]] * count
    times: dict[str, list[float]] = {"plain": [], "shared": []}
    scores = {}
    for _ in range(rounds + 1):
        for name, seconds in times.items():
            trainer.args.teacher_pass = name
            with trainer.completion_head.applied(True):  # in both, as in a training step
                begun = now()
                found = trainer.teacher_scores(prompts, contexts, output)
                seconds.append(now() - begun)
            scores[name] = found.logps
    plain, shared = (statistics.median(seconds[1:]) for seconds in times.values())
    teacher = trainer.teacher.model
    # What the passes compute in: bfloat16 under autocast, whatever the weights are kept in.
    dtype = torch.bfloat16 if trainer.args.bf16 else teacher.dtype
    work, all_work = (teacher_pass(teacher, setting, shared=which) for which in (True, False))
    floor = measure_machine(device, dtype, now).seconds(work)
    return pd.Series(
        {
            "plain pass, s": plain,
            "shared pass, s": shared,
            "plain / shared": plain / shared,
            "largest difference of log-probabilities": float(
                (scores["plain"] - scores["shared"]).abs().max()
            ),
            "plain pass, GFLOP": all_work.flops / 1e9,
            "shared pass, GFLOP": work.flops / 1e9,
            "shared pass, MB moved": work.bytes / 1e6,
            "floor of the shared pass on this machine, s": floor,
            "shared / floor": shared / floor,
        },
        name="teacher pass",
    )


def report(setting: Setting, names: Sequence[str], steps: int, rounds: int) -> Iterator[str]:
    """The teacher pass by itself, then the race, as text: each part once it has been measured."""
    clock = "processor" if torch.get_num_threads() == 1 else "wall clock"
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {clock}"
    yield f"{setting}\n{where}\n"
    yield passes(setting, rounds).map("{:.5g}".format).to_string() + "\n"
    yield race(setting, names, steps, rounds).map("{:.3f}".format).to_string()


def sweep(setting: Setting, names: Sequence[str], outputs: Path, steps: int) -> pd.DataFrame:
    """One factor at a time, around `setting`: `tables/bench.csv` and `figures/bench_scaling.png`."""
    raced: dict[Setting, pd.DataFrame] = {}
    rows = []
    for factor, scales in FACTORS.items():
        for scale in scales:
            sizes = replace(setting, **{factor: max(round(getattr(setting, factor) * scale), 1)})
            if sizes not in raced:
                raced[sizes] = race(sizes, names, steps, memory=False)
            row = raced[sizes].rename_axis("trainer").reset_index()
            rows.append(row.assign(factor=factor, value=getattr(sizes, factor)))
    table = pd.concat(rows, ignore_index=True).round(4)
    for folder in ("tables", "figures"):
        (outputs / folder).mkdir(parents=True, exist_ok=True)
    table.to_csv(outputs / "tables" / "bench.csv", index=False)
    draw(table).savefig(outputs / "figures" / "bench_scaling.png", dpi=120)
    return table


def draw(table: pd.DataFrame) -> Figure:
    """Step time over GRPO's against each factor, a panel each, from the tables of `sweep`."""
    factors = list(dict.fromkeys(table["factor"]))
    figure = new_figure((2.6 * len(factors), 3.0))
    shown = table[table["trainer"] != BASE]
    panels = figure.subplots(1, len(factors), sharey=True, squeeze=False)[0]
    for axes, factor in zip(panels, factors, strict=True):
        sns.lineplot(
            shown[shown["factor"] == factor],
            x="value",
            y=f"step / {BASE}",
            hue="trainer",
            marker="o",
            palette="colorblind",
            legend=factor == factors[0],
            ax=axes,
        )
        axes.axhline(1.0, color="0.6", linewidth=1)
        axes.set_xscale("log", base=2)
        values = sorted(shown.loc[shown["factor"] == factor, "value"].unique())
        axes.set(xlabel=factor, xticks=values, xticklabels=values)
    panels[0].set_ylabel(f"step time / {BASE}'s")
    # Above the panels, where it hides no line.
    handles, labels = panels[0].get_legend_handles_labels()
    panels[0].get_legend().remove()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure
