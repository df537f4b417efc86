"""The runs behind a claim: per method the plain runs of one preset and one length, one per seed.

Plain means as the preset has it: no override and no control. Values come as a series with one entry
per seed, so that two methods are compared seed by seed.
"""

from typing import NamedTuple

import pandas as pd

from rlsd_lib.runs.paths import settings
from rlsd_lib.runs.records import Runs

FIRST, LAST = 3, 10  # steps averaged at the start, at the end
UNNAMED = pd.Series(dtype=float)


class Window(NamedTuple):
    """Steps `first` to `last` of a run, both included and counted from 1."""

    first: int
    last: int


def together(*folders: Runs) -> Runs:
    """Several folders' runs as one, such as a suite's and those of its ablations."""
    runs, steps = zip(*folders, strict=True)
    return Runs(*(pd.concat(frames, ignore_index=True) for frames in (runs, steps)))


def is_plain(parameters: dict | float) -> bool:
    """Whether a run is its preset, whatever its length."""
    return isinstance(parameters, dict) and not settings(parameters).keys() - {"max_steps"}


class Arms:
    """Finished plain runs of one preset, by method and seed.

    Args:
        runs: what `read_runs` returns; runs that did not finish are left out.
        preset: which preset; "" for the one that most of the plain runs have.

    Attributes:
        length: the number of steps that the method RLSD was trained for (most of its runs, else
            most of all runs); None where there is no plain run.
    """

    def __init__(self, runs: Runs, preset: str = "") -> None:
        self.runs = runs
        frame = runs.runs
        if not {"method", "steps"} <= set(frame):
            frame = pd.DataFrame(columns=["method", "preset", "steps", "seed", "path"])
        else:
            plain = frame["parameters"].map(is_plain)
            frame = frame[(frame["status"] == "finished") & plain & frame["steps"].notna()]
        self.preset = preset or _most_common(frame["preset"]) or ""
        self.frame = frame[frame["preset"] == self.preset]
        rlsd = self.frame.loc[self.frame["method"] == "rlsd", "steps"]
        length = _most_common(rlsd if len(rlsd) else self.frame["steps"])
        self.length = None if length is None else int(length)

    def of_preset(self, preset: str) -> "Arms":
        """The arms of another preset among the same runs."""
        return Arms(self.runs, preset)

    def methods(self) -> list[str]:
        """The methods that have a run of this length."""
        return sorted(self.frame.loc[self.frame["steps"] == self.length, "method"].unique())

    def final(self, method: str, column: str, *, steps: int | None = None) -> pd.Series:
        """A number of metrics.json, one per seed; empty where there is no such run.

        `steps` asks for runs of another length than `length`.
        """
        chosen = self._of(method, steps)
        if column not in chosen:
            return UNNAMED
        return chosen[column].astype(float).dropna()

    def gain(self, method: str, *, steps: int | None = None) -> pd.Series:
        """Accuracy after training minus before, one per seed."""
        after, before = (
            self.final(method, f"accuracy_{when}", steps=steps) for when in ("after", "before")
        )
        return (after - before).dropna()

    def mean(self, method: str, column: str, window: Window) -> pd.Series:
        """The mean of a logged column over a window of steps, one per seed."""
        steps = self.runs.steps
        if column not in steps:
            return UNNAMED
        seeds = self._of(method, None).reset_index().set_index("path")["seed"]
        lines = steps[steps["path"].isin(seeds.index)]
        lines = lines[lines["step"].between(*window) & lines[column].notna()]
        return lines.groupby(lines["path"].map(seeds))[column].mean().astype(float)

    def start(self, method: str, column: str) -> pd.Series:
        """The mean over the first steps, one per seed."""
        return self.mean(method, column, Window(1, FIRST))

    def end(self, method: str, column: str) -> pd.Series:
        """The mean over the last steps, one per seed."""
        length = self.length or 0
        return self.mean(method, column, Window(length - LAST + 1, length))

    def last_above_zero(self, method: str, column: str) -> int:
        """The last step at which a logged column is above 0 in any seed's run; 0 for none."""
        steps = self.runs.steps
        if column not in steps:
            return 0
        mine = steps["path"].isin(self._of(method, None)["path"])
        found = steps.loc[mine & (steps[column] > 0), "step"]
        return int(found.max()) if len(found) else 0

    def doubled(self) -> tuple[str, int, list[pd.Series]]:
        """What was measured, N, and a series each: RLSD at N steps, GRPO at N, GRPO at 2N.

        The held-out accuracy where GRPO was run for 2N steps. Else one length of run has to do:
        N is half of it, and the training reward is compared.
        """
        n = self.length or 0
        longer = self.final("grpo", "accuracy_after", steps=2 * n)
        if len(longer):
            at_n = [self.final(method, "accuracy_after") for method in ("rlsd", "grpo")]
            return "held-out accuracy", n, [*at_n, longer]
        half = n // 2
        window = Window(half - LAST + 1, half)
        at_n = [self.mean(method, "reward", window) for method in ("rlsd", "grpo")]
        return "training reward", half, [*at_n, self.end("grpo", "reward")]

    def _of(self, method: str, steps: int | None) -> pd.DataFrame:
        frame = self.frame
        wanted = self.length if steps is None else steps
        chosen = frame[(frame["method"] == method) & (frame["steps"] == wanted)]
        return chosen.drop_duplicates("seed").set_index("seed").sort_index()


def _most_common(values: pd.Series) -> object | None:
    return values.value_counts().index[0] if len(values) else None
