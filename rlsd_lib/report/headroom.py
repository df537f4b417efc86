"""How fast runs learn, and whether a bench could see better credit: arms against one, lab by lab.

Where every method ends at the same accuracy, the difference is in how many rollouts it took. The
headroom of a bench is what `oracle` gains on it over `grpo`: where that is nothing, no credit function
can show anything.
"""

import math

import numpy as np
import pandas as pd

from rlsd_lib.measure.intervals import Interval, decide, dunnett_intervals
from rlsd_lib.report.tables import DASH, Table, source_notes, with_arms
from rlsd_lib.runs.records import Runs, is_finished, read_manifest

THRESHOLD = 0.7  # of the training reward
RESAMPLES = 100
NOISE = 0.005  # of the mean reward of one run
WINDOW = 200  # rollouts over which the reward is averaged before it is compared with it
# Column: what it is called, and the difference that does not matter (of logs, for the rollouts).
MEASURES = {
    "final": ("success after training", 0.02, "0.02"),
    "mean": ("mean reward over training", 0.02, "0.02"),
    "rollouts": (f"rollouts to {THRESHOLD}", math.log(1.1), "10 %"),
}


def efficiency(runs: Runs) -> pd.DataFrame:
    """Return a row per finished run: arm, seed, learning rate, `final`, `mean` and `rollouts`.

    `final` is the probability of a right chain after training where the task knows its chains, else
    the held-out accuracy. `mean` is the training reward over all steps. `rollouts` is their number
    when the mean reward of the last `WINDOW` first reached `THRESHOLD`; all of the run's where it
    never did, which `reached` tells apart.
    """
    frame = with_arms(runs.runs[is_finished(runs.runs)])
    rewards = {path: steps["reward"].to_numpy() for path, steps in runs.steps.groupby("path")}
    rows = []
    for _, run in frame.iterrows():
        config, reward = read_manifest(run["path"])["config"], rewards[run["path"]]
        per_step = config["generation_batch_size"]
        steps = rollouts_to(reward, max(1, WINDOW // per_step))
        right = run.get("right_chain_after", math.nan)
        rows.append(
            {
                "arm": run["arm"],
                "method": run["method"],
                "preset": run["preset"],
                "seed": run["seed"],
                "rate": config["learning_rate"],
                "final": run["accuracy_after"] if math.isnan(right) else right,
                "mean": float(reward.mean()),
                "rollouts": per_step * (steps or len(reward)),
                "reached": steps is not None,
            }
        )
    return pd.DataFrame(rows)


def rollouts_to(reward: np.ndarray, window: int, threshold: float = THRESHOLD) -> int | None:
    """Return the step at which the mean of the last `window` steps first reached `threshold`."""
    means = np.convolve(reward, np.ones(window) / window, "valid")
    reached = np.flatnonzero(means >= threshold)
    return int(reached[0]) + window if len(reached) else None


def compared(runs: Runs, against: str = "grpo") -> Table:
    """Return each arm beside `against`, with simultaneous 95 % intervals over labs (Dunnett).

    A row per arm and measure: its mean, the difference (for rollouts the ratio of geometric means),
    its interval, and the verdict of `measure.intervals.decide`. Arms that lack a lab which `against`
    has stand without an interval.

    Raises:
        ValueError: no finished run of the arm `against`.
    """
    found = efficiency(runs)
    if against not in set(found.get("arm", ())):
        names = ", ".join(sorted(set(found.get("arm", ())))) or "none"
        raise ValueError(f"no finished run of {against!r} to compare with; arms are: {names}")
    rates = found.groupby("arm")["rate"].unique()
    rows = []
    for measure, (name, *margin) in MEASURES.items():
        is_ratio = measure == "rollouts"
        values = found.pivot_table(measure, "seed", "arm")
        values = values.loc[values[against].dropna().index]
        values = np.log(values) if is_ratio else values
        whole = values.loc[:, values.notna().all()]
        intervals = dunnett_intervals(whole, against) if whole.shape[1] > 1 else {}
        for arm in sorted(values, key=lambda arm: (arm != against, arm)):
            difference, mean = intervals.get(arm, Interval(math.nan)), values[arm].mean()
            rows.append(
                {
                    "measure": name,
                    "arm": arm,
                    "rate": " ".join(f"{rate:g}" for rate in sorted(rates[arm])),
                    "n labs": str(values[arm].notna().sum()),
                    "mean": f"{math.exp(mean):.0f}" if is_ratio else f"{mean:.3f}",
                    f"against {against}": _shown(difference, is_ratio) if arm != against else DASH,
                    "verdict": decide(difference, *margin) if arm != against else DASH,
                    "found again": found_again(whole, arm, against) if arm in intervals else DASH,
                }
            )
    table = pd.DataFrame(rows)
    never = found[~found["reached"]].groupby("arm").size()
    notes = [
        f"intervals are of 95 % over labs, all arms of a measure together (Dunnett, against {against})",
        f"rollouts: until the mean reward of the last {WINDOW} reached {THRESHOLD}",
        f"found again: in how many of {RESAMPLES} resamplings of the labs the two are told apart",
        *(
            f"{arm}: {count} runs never reached it, and count all their rollouts"
            for arm, count in never.items()
        ),
    ]
    return Table(table, [*notes, *source_notes(runs)])


def found_again(values: pd.DataFrame, arm: str, against: str) -> str:
    """Return in how many of `RESAMPLES` resamplings of the labs the interval of `arm` excludes 0.

    `values` as in `dunnett_intervals`. Labs are drawn with replacement, so that it says how much the
    verdict hangs on the labs at hand.
    """
    random, hits = np.random.default_rng(0), 0
    for _ in range(RESAMPLES):
        drawn = values.iloc[random.integers(len(values), size=len(values))]
        difference = dunnett_intervals(drawn.reset_index(drop=True), against)[arm]
        hits += difference.low > 0 or difference.high < 0
    return f"{hits} of {RESAMPLES}"


def _shown(difference: Interval, is_ratio: bool) -> str:
    """A difference, or the ratio whose logarithm it is; no ratio of positive numbers is below 0."""
    if is_ratio:
        return "x " + f"{Interval(*(math.exp(end) for end in difference)):.2f}"
    mean, low, high = difference
    return f"{Interval(mean, max(low, -1.0), min(high, 1.0)):+.3f}"


def best_rates(runs: Runs) -> pd.DataFrame:
    """Return the best learning rate of each preset and method, with `mean` and `rollouts` there.

    Of the rates whose mean reward over training is within `NOISE` of the highest, the one that
    needed the fewest rollouts to the threshold.
    """
    keys = ["preset", "method"]
    found = efficiency(runs).groupby([*keys, "rate"])[["mean", "rollouts"]].mean().reset_index()
    good = found[found["mean"] >= found.groupby(keys)["mean"].transform("max") - NOISE]
    return good.loc[good.groupby(keys)["rollouts"].idxmin()].reset_index(drop=True)
