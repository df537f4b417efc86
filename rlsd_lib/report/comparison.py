"""Tables of `20_compare`: our runs beside the paper's tables, the cost of a point, and the runs."""

import json
import shlex
from pathlib import Path

import pandas as pd

from rlsd_lib.measure.intervals import student_interval
from rlsd_lib.report.arms import Arms
from rlsd_lib.report.paper_numbers import AVERAGE, table_1, table_2
from rlsd_lib.report.tables import DASH, Table, each_once, settings_of, source_notes, with_arms
from rlsd_lib.runs.parameters import as_text
from rlsd_lib.runs.paths import NEUTRAL
from rlsd_lib.runs.records import PLAN, Runs

OTHER_MODEL = (
    "the paper: Qwen3-VL-8B-Instruct, average of five benchmarks, one run each, no interval; ours: "
    "another model on another task. Compare signs and order, never sizes"
)


def paradigms(lab: Runs) -> Table:
    """The paper's Table 1 in words, and beside it what the lab's plain runs measured."""
    arms = Arms(lab)
    table = table_1()
    measured = {
        "lab: gain, points": lambda method: _shown(100 * arms.gain(method), 1),
        "lab: leak rate after": lambda method: _shown(arms.final(method, "leak_rate_after"), 3),
        "lab: s / step, times GRPO's": lambda method: _shown(
            (arms.final(method, "seconds_per_step") / arms.final("grpo", "seconds_per_step")), 2
        ),
    }
    for heading, measure in measured.items():
        table[heading] = [measure(method) for method in table.index]
    notes = ["lab columns: mean over seeds with Student's 95 % interval; SFT is not run here"]
    rows = table.rename_axis("paradigm").reset_index()
    return Table(rows, [*notes, *source_notes(lab)])


def beside_paper(lab: Runs, real: Runs) -> Table:
    """The paper's Table 2 (average) and our accuracies in columns of their own, in per cent."""
    printed = table_2()[AVERAGE]
    sides = {"lab": Arms(lab), "real model": Arms(real)}
    methods = [*printed.index, *sorted(set(sides["lab"].methods()) - set(printed.index))]
    rows = pd.DataFrame({"method": methods})
    rows["paper: average"] = [f"{printed[m]:.2f}" if m in printed else DASH for m in methods]
    change = printed - printed["base"]
    rows["paper: - base"] = [f"{change[m]:+.2f}" if m in printed else DASH for m in methods]
    for name, arms in sides.items():
        rows[f"{name}: accuracy"] = [_shown(100 * _accuracy(arms, m), 1) for m in methods]
        rows[f"{name}: - base"] = [_shown(100 * arms.gain(m), 1) for m in methods]
    notes = [OTHER_MODEL, "ours: mean over seeds with Student's 95 % interval, plain runs only"]
    return Table(rows, [*notes, *source_notes(lab), *source_notes(real)])


def cost_of_a_point(runs: Runs) -> Table:
    """Seconds of training per point of held-out accuracy gained, by method and settings.

    Where the interval of the gain over seeds reaches 0 there is no price, and a dash stands.
    """
    frame, repeated = each_once(with_arms(runs.runs))
    needed = ["accuracy_before", "accuracy_after", "seconds_per_step", "steps"]
    frame = frame[frame["status"] == "finished"].reindex(columns=["arm", *needed]).dropna()
    rows = []
    for arm, cells in frame.groupby("arm"):
        seconds = cells["seconds_per_step"] * cells["steps"]
        gain = 100 * (cells["accuracy_after"] - cells["accuracy_before"])
        found = student_interval(gain)
        sure = found.low > 0
        price = f"{seconds.mean() / found.mean:.1f}" if sure else DASH
        rows.append((arm, f"{seconds.mean():.0f}", _shown(gain, 1), price, str(len(cells))))
    columns = ["method", "training, s", "gain, points", "s per point", "n"]
    notes = ["seconds depend on the machine and on what else it does: compare runs side by side"]
    return Table(pd.DataFrame(rows, columns=columns), [*notes, *repeated, *source_notes(runs)])


def run_list(runs: Runs) -> Table:
    """Every run with its settings, status, commit and length; a star marks uncommitted code."""
    rows = []
    for _, run in runs.runs.sort_values(["group", "name"]).iterrows():
        parameters = run["parameters"] if isinstance(run["parameters"], dict) else {}
        commit = str(run.get("commit") or DASH)[:7] + ("*" if run.get("dirty") is True else "")
        seconds = run.get("seconds")
        rows.append(
            {
                "run": f"{run['group']}/{run['name']}",
                "settings": settings_of(parameters),
                "seed": str(parameters.get("seed", DASH)),
                "status": run["status"],
                "commit": commit if parameters else DASH,
                "seconds": f"{seconds:.0f}" if pd.notna(seconds) else DASH,
            }
        )
    return Table(pd.DataFrame(rows), [] if rows else ["no runs here yet"])


def commands(folder: str | Path, runs: Runs) -> list[str]:
    """What to type to repeat the runs of `folder`: its suites, else a line per run."""
    plans = sorted(Path(folder).rglob(PLAN))
    if plans:
        return [plan["command"] for file in plans for plan in json.loads(file.read_text())["plans"]]
    made = runs.runs[runs.runs["notebook"].notna()] if "notebook" in runs.runs else runs.runs[:0]
    return [_command(run) for _, run in made.iterrows()]


def _command(run: pd.Series) -> str:
    given = {k: v for k, v in run["parameters"].items() if k != "run_dir"}
    pairs = {k: v for k, v in given.items() if k not in NEUTRAL or v != NEUTRAL[k]}
    words = [shlex.quote(f"{name}={as_text(value)}") for name, value in pairs.items()]
    return " -p ".join([f"rlsd run {Path(run['notebook']).stem}", *words])


def _accuracy(arms: Arms, method: str) -> pd.Series:
    """Accuracy after training; for "base" before it, of any method: they start alike."""
    if method != "base":
        return arms.final(method, "accuracy_after")
    starts = arms.frame.dropna(subset=["accuracy_before"]) if len(arms.frame) else arms.frame
    return starts.drop_duplicates("seed").get("accuracy_before", pd.Series(dtype=float))


def _shown(values: pd.Series, digits: int) -> str:
    values = values.dropna()
    if values.empty:
        return DASH
    return f"{student_interval(values):.{digits}f}"
