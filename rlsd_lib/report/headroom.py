"""How fast runs learn, and whether a bench could see better credit: arms against one, lab by lab.

Where every method ends at the same accuracy, the difference is in how many rollouts it took. The
headroom of a bench is what perfect credit gains on it over `grpo`. `oracle` moves A to the first
error, `oracle_value` knows the true advantage of every token.
"""

import math
from collections.abc import Collection

import numpy as np
import pandas as pd

from rlsd_lib.measure.intervals import Interval, decide, simultaneous_intervals
from rlsd_lib.report.tables import DASH, Table, source_notes, with_arms
from rlsd_lib.runs.records import Runs, is_finished, read_manifest

THRESHOLD = 0.7  # of the training reward
WINDOW = 200  # rollouts over which the reward is averaged before it is compared with it
NOISE = 0.01  # standard error of the mean reward of 2,000 rollouts
RIGHT, ACCURACY = "right_chain_after", "accuracy_after"
# Column: what it is called, and the difference that does not matter (of logs, for the rollouts).
MEASURES = {
    "final": ("after training", 0.02, "0.02"),  # behind what `final` is
    "leak": ("completions that leak", 0.02, "0.02"),
    "mean": ("mean reward over training", 0.02, "0.02"),
    "rollouts": (f"rollouts to {THRESHOLD}", math.log(1.1), "10 %"),
}


def efficiency(runs: Runs, but: Collection[str] = ()) -> pd.DataFrame:
    """Return a row per finished run: arm, seed, learning rate, `final`, `mean` and `rollouts`.

    `final` is the probability of a right chain after training where every run has it, else the
    held-out accuracy, as `ended` says. `mean` is the training reward over all steps. `rollouts` is
    their number when the mean reward of the last `WINDOW` first reached `THRESHOLD`, all of the run's
    where it never did (`reached`). `unit` is what a seed is. `but` is as in `tables.with_arms`.
    """
    frame = with_arms(runs.runs[is_finished(runs.runs)], but)
    rewards = {path: steps["reward"].to_numpy() for path, steps in runs.steps.groupby("path")}
    final = RIGHT if RIGHT in frame and frame[RIGHT].notna().all() else ACCURACY
    rows = []
    for _, run in frame.iterrows():
        manifest, reward = read_manifest(run["path"]), rewards[run["path"]]
        per_step = manifest["config"]["generation_batch_size"]
        steps = steps_to(reward, max(1, WINDOW // per_step))
        rows.append(
            {
                **run[["arm", "method", "preset", "seed"]],
                "unit": "labs" if manifest.get("preset", {}).get("lab_per_seed") else "seeds",
                "rate": manifest["config"]["learning_rate"],
                "final": run[final],
                "ended": "right chains" if final == RIGHT else "accuracy",
                "leak": run.get("leak_rate_after", math.nan),
                "mean": float(reward.mean()),
                "rollouts": per_step * (steps or len(reward)),
                "reached": steps is not None,
            }
        )
    return pd.DataFrame(rows)


def steps_to(reward: np.ndarray, window: int, threshold: float = THRESHOLD) -> int | None:
    """Return the step at which the mean of the last `window` steps first reached `threshold`."""
    means = np.convolve(reward, np.ones(window) / window, "valid")
    reached = np.flatnonzero(means >= threshold)
    return int(reached[0]) + window if len(reached) else None


def compared(runs: Runs, against: str = "grpo") -> Table:
    """Return each arm beside `against`, with simultaneous 95 % intervals over labs.

    A row per arm and measure: its mean, the difference (for rollouts the ratio of geometric means),
    its interval, the verdict of `measure.intervals.decide`, and in how many sets with one lab left
    out the two are told apart. No interval has an arm that lacks a lab of `against`, or whose
    rollouts to the threshold are but a bound. Raises ValueError without a finished run of the arm
    `against`.
    """
    found = efficiency(runs)
    if against not in set(found.get("arm", ())):
        names = ", ".join(sorted(set(found.get("arm", ())))) or "none"
        raise ValueError(f"no finished run of {against!r} to compare with; arms are: {names}")
    rates, unit = found.groupby("arm")["rate"].unique(), found["unit"].iloc[0]
    missed = found[~found["reached"]].groupby("arm").size()
    rows = []
    for measure, (name, *margin) in MEASURES.items():
        is_ratio = measure == "rollouts"
        name = f"{found['ended'].iloc[0]} {name}" if measure == "final" else name
        values = found.pivot_table(measure, "seed", "arm")
        values = values.loc[values[against].dropna().index]
        values = np.log(values) if is_ratio else values
        bounds = set(missed.index) if is_ratio else set()
        whole = values.dropna(axis=1).drop(columns=bounds, errors="ignore")
        can = against in whole and whole.shape[1] > 1
        intervals = simultaneous_intervals(whole, against) if can else {}
        several = whole.index if can and len(whole) > 2 else []
        left_one = [simultaneous_intervals(whole.drop(lab), against) for lab in several]
        for arm in sorted(values, key=lambda arm: (arm != against, arm)):
            difference, mean = intervals.get(arm), values[arm].mean()
            shown = f"{math.exp(mean):.0f}" if is_ratio else f"{mean:.3f}"
            row = {
                "measure": name,
                "arm": arm,
                "rate": " ".join(f"{rate:g}" for rate in sorted(rates[arm])),
                f"n {unit}": str(values[arm].notna().sum()),
                "mean": f"over {shown}" if arm in bounds else shown,
                **dict.fromkeys((f"against {against}", "verdict", "without one"), DASH),
            }
            if difference is not None:
                row[f"against {against}"] = _shown(difference, is_ratio)
                row["verdict"] = decide(difference, *margin)
                apart = sum(one[arm].low > 0 or one[arm].high < 0 for one in left_one)
                row["without one"] = f"{apart} of {len(left_one)}" if left_one else DASH
            rows.append(row)
    notes = [
        f"intervals are of 95 % for all {unit} and arms of a measure together (Student, paired by "
        f"{unit[:-1]}, at Bonferroni's level); a {unit[:-1]}'s own level cancels",
        "right chains: the probability of one, not of a right answer, which leaking raises too",
        f"rollouts: until the mean reward of the last {WINDOW} reached {THRESHOLD}",
        f"without one: in how many of the sets with one of the {unit} left out the two differ",
        *(
            f"{arm}: {n} runs never reached it, so that only a bound is known"
            for arm, n in missed.items()
        ),
    ]
    return Table(pd.DataFrame(rows), [*notes, *source_notes(runs)])


def _shown(difference: Interval, is_ratio: bool) -> str:
    """A difference, or the ratio whose logarithm it is; no interval leaves the range of a share."""
    if is_ratio:
        return "x " + f"{Interval(*(math.exp(end) for end in difference)):.2f}"
    return f"{difference.within(-1, 1):+.3f}"


def best_rates(runs: Runs) -> pd.DataFrame:
    """Return the best learning rate of each arm of a sweep, and how it fared.

    Of the rates whose mean reward over training is within `NOISE` of the highest, the one that
    needed the fewest rollouts to the threshold. `is_edge`: no higher, or no lower, one was tried.
    """
    found = efficiency(runs, but=["learning_rate"])
    found = found.groupby(["arm", "rate"])[["final", "mean", "rollouts"]].mean().reset_index()
    by_arm = found.groupby("arm")
    ends = by_arm["rate"].transform("min"), by_arm["rate"].transform("max")
    found["is_edge"] = (found["rate"] == ends[0]) | (found["rate"] == ends[1])
    good = found[found["mean"] >= by_arm["mean"].transform("max") - NOISE]
    return good.loc[good.groupby("arm")["rollouts"].idxmin()].reset_index(drop=True)
