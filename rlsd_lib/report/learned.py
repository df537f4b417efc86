"""What runs have shown, for somebody who has just made them: a table and sentences."""

from pathlib import Path

import pandas as pd

from rlsd_lib.measure.intervals import Interval
from rlsd_lib.report.tables import DASH, WORDS, Table, interval_of, paired_differences, with_arms
from rlsd_lib.runs.records import Runs, is_finished, left_out, read_manifest

MOVED = "rlsd/intervention"
LEAKS = 0.05  # share of completions from which on the sentences speak of leaking


def course(steps: pd.DataFrame, metric: str) -> str:
    """Return a sentence on a metric's way through one run, for under its curve.

    `steps` has a row per step. The sentence compares the mean over the first and the last tenth of
    the steps that have a value (there is none without a teacher), and names the largest.
    """
    values = steps.set_index("step")[metric].dropna()
    tenth = max(1, len(values) // 10)
    first, last = values.head(tenth).mean(), values.tail(tenth).mean()
    known = f"{len(values)} steps{' that log it' if len(values) < len(steps) else ''}"
    return (
        f"{WORDS.get(metric, metric)}: {first:.3g} in the first {f'{tenth} ' * (tenth > 1)}of {known}, "
        f"{last:.3g} in the last; the largest {values.max():.3g}, at step {values.idxmax()}."
    )


def learned(runs: Runs, baseline: str = "grpo") -> Table:
    """Return a row per method with its accuracy, its difference to `baseline` and its leak rate.

    The notes are sentences. Differences are paired by problem and seed; their intervals are over
    seeds where there are several, else over problems. Raises ValueError without a finished run of
    `baseline`.
    """
    arms = with_arms(runs.runs[is_finished(runs.runs)])
    differences = paired_differences(runs, baseline).rows.set_index("method")
    gaps = {arm: _difference(row) for arm, row in differences.iterrows()}
    groups = dict(list(arms.groupby("arm")))
    rows = [
        {
            "method": arm,
            "before": f"{interval_of(cells, 'accuracy_before').mean:.3f}",
            "after": f"{interval_of(cells, 'accuracy_after'):.3f}",
            f"after - {baseline}": f"{gaps[arm]:+.3f}" if arm in gaps else DASH,
            "leak": f"{interval_of(cells, 'leak_rate_after').mean:.3f}",
        }
        for arm, cells in groups.items()
    ]
    sizes = {arm: interval_of(cells, MOVED).mean for arm, cells in groups.items()}
    moved = ", ".join(f"{arm} {size:.3f}" for arm, size in sizes.items() if size > 0)
    moved = moved and f"Intervention, the {WORDS[MOVED]} (0 is GRPO's): {moved}."
    sentences = [*_seen(gaps, baseline), moved, _leak(groups), _rates(groups), _trust(arms)]
    return Table(pd.DataFrame(rows), [*filter(None, [*sentences, left_out(runs.runs)])])


def _difference(row: pd.Series) -> Interval:
    over = "seeds" if row["n seeds"] > 1 else "problems"
    return Interval(row.iloc[0], row[f"low, {over}"], row[f"high, {over}"])


def _seen(gaps: dict[str, Interval], baseline: str) -> list[str]:
    """A sentence on the differences whose interval leaves out 0, and one on the others."""
    clear = {arm: gap for arm, gap in gaps.items() if not gap.low <= 0 <= gap.high}
    seen = ", ".join(f"{arm} {gap:+.3f}" for arm, gap in clear.items())
    open_ = ", ".join(f"{arm} {gap:+.3f}" for arm, gap in gaps.items() if arm not in clear)
    return [
        f"Seen, accuracy minus {baseline}'s: {seen}." if seen else "No difference was seen.",
        f"Not seen: {open_}. With 0 in the interval, better, worse and as good are all possible."
        if open_
        else "Every difference was seen.",
    ]


def _leak(groups: dict[str, pd.DataFrame]) -> str:
    """What became of the method that speaks most of a reference which it was not shown."""
    rates = {arm: interval_of(cells, "leak_rate_after").mean for arm, cells in groups.items()}
    arm = max(rates, key=lambda name: (rates[name] == rates[name], rates[name]))
    if not rates[arm] >= LEAKS:
        return f"No method speaks of a reference in {LEAKS:.0%} of its completions."
    before, after = (interval_of(groups[arm], f"accuracy_{w}").mean for w in ("before", "after"))
    made = groups[arm]["preset"].str.startswith("lab").any()
    return (
        f"{arm} speaks of a reference that it was not shown in {rates[arm]:.0%} of its completions, "
        f"and its accuracy went from {before:.3f} to {after:.3f}"
        f"{'; the lab is a model organism, whose teacher was made to quote' if made else ''}."
    )


def _rates(groups: dict[str, pd.DataFrame]) -> str:
    """What the methods' learning rates are, where they are not all the same."""
    paths = {arm: cells["path"].iloc[0] for arm, cells in groups.items()}
    rates = {arm: read_manifest(path)["config"]["learning_rate"] for arm, path in paths.items()}
    if len(set(rates.values())) == 1:
        return ""
    told = ", ".join(f"{arm} {rate:g}" for arm, rate in rates.items())
    return f"Learning rates differ, and with them more than the method: {told}."


def _trust(arms: pd.DataFrame) -> str:
    count = arms["seed"].nunique()
    if count > 1:
        return f"The intervals are over {count} seeds: what another training run may change is in them."
    return "One seed settles nothing: the intervals are over problems, and not over training runs."


def to_open(runs: Runs) -> list[Path]:
    """Return at most three files of the first run of RLSD, or of all: its notebook and heat maps."""
    done = runs.runs[is_finished(runs.runs)]
    best = done.sort_values("method", key=lambda names: names != "rlsd", kind="stable").iloc[0]
    folder = Path(best["path"])
    files = [*folder.glob("*.ipynb"), *sorted(folder.glob("figures/gap_*.png"))]
    return files[:3] or [folder]
