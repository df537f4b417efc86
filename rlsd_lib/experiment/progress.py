"""What a training run shows while it runs, and what it writes down at every step."""

import time
from collections.abc import Mapping
from numbers import Real
from typing import Any

import pandas as pd
from IPython import get_ipython
from IPython.display import display
from transformers import TrainerCallback, TrainerState

from rlsd_lib.report import plots
from rlsd_lib.runs.run import Run

REFRESH_SECONDS = 3.0


class Recorder(TrainerCallback):
    """Writes every logged step into the run directory; on a resume, from the checkpoint on."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop lines that the resumed steps will write again."""
        if state.is_world_process_zero:
            self.run.rewind(state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Append the numbers of this step; the summary line at the end of training is left out."""
        if state.is_world_process_zero and "loss" in logs:
            numbers = {k: v for k, v in logs.items() if isinstance(v, Real) or v is None}
            self.run.log(state.global_step, numbers)


class LiveCurve(TrainerCallback):
    """One line of text and one training curve, updated in place.

    Updating a display instead of printing keeps a run under papermill to a single output. Only for
    an IPython kernel: elsewhere there is nothing to update.
    """

    def __init__(self, metric: str, method: str) -> None:
        self.metric, self.method = metric, method
        self.rows: list[dict[str, Any]] = []
        self.handles: tuple[Any, Any] | None = None
        self.drawn = self.begun = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the two displays."""
        self.begun, self.first = time.monotonic(), state.global_step
        if state.is_world_process_zero:
            text = display({"text/plain": "starting"}, raw=True, display_id=True)
            self.handles = (text, display({"text/plain": ""}, raw=True, display_id=True))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Refresh both displays, at most every `REFRESH_SECONDS`."""
        if self.metric in logs:
            row = {"step": state.global_step, "path": "this run", "method": self.method}
            self.rows.append({**row, self.metric: logs[self.metric]})
        if self.handles and time.monotonic() - self.drawn > REFRESH_SECONDS:
            self.refresh(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the last state."""
        if self.handles:
            self.refresh(state)

    def refresh(self, state: Any) -> None:
        """Draw text and curve as they stand."""
        self.drawn = time.monotonic()
        done = max(state.global_step - self.first, 1)
        pace = (self.drawn - self.begun) / done
        left = pace * (state.max_steps - state.global_step)
        line = f"step {state.global_step}/{state.max_steps}  {pace:.2f} s/step  {left:.0f} s left"
        self.handles[0].update({"text/plain": line}, raw=True)
        if self.rows:
            figure = plots.training_curve(pd.DataFrame(self.rows), self.metric, window=5)
            self.handles[1].update(figure)


class Followed:
    """The live curve of a training that runs in other processes, from the lines they log."""

    def __init__(self, max_steps: int, method: str) -> None:
        self.state = TrainerState(max_steps=max_steps)
        self.curve = LiveCurve("reward", method) if get_ipython() is not None else None
        if self.curve:
            self.curve.on_train_begin(None, self.state, None)

    def show(self, row: Mapping[str, Any]) -> None:
        """Show one line of metrics.jsonl."""
        self.state.global_step = row["step"]
        if self.curve:
            self.curve.on_log(None, self.state, None, dict(row))

    def end(self) -> None:
        """Draw the last state."""
        if self.curve:
            self.curve.on_train_end(None, self.state, None)
