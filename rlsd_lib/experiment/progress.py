"""What a training run shows while it runs, and what it writes down at every step."""

import time
from collections.abc import Mapping
from numbers import Real
from typing import Any

import pandas as pd
from IPython import get_ipython
from IPython.display import display
from transformers import TrainerCallback

from rlsd_lib.report import plots
from rlsd_lib.runs.run import Run

REFRESH_SECONDS = 3.0


class LiveCurve:
    """A line of text and the curve of the training reward; nothing outside an IPython kernel.

    Both displays are updated in place, which keeps a run under papermill to a single output. The
    rows come from a `Recorder` in this process or from the metrics.jsonl of launched ones.
    """

    def __init__(self, method: str, max_steps: int) -> None:
        self.method, self.max_steps = method, max_steps
        self.rows: list[Mapping[str, Any]] = []
        self.handles: list[Any] = []

    def begin(self, step: int = 0) -> None:
        """Open the two displays, after optimiser step `step`."""
        self.first, self.begun, self.drawn = step, time.monotonic(), 0.0
        if get_ipython() is not None:
            texts = [{"text/plain": text} for text in ("starting", "")]
            self.handles = [display(text, raw=True, display_id=True) for text in texts]

    def show(self, row: Mapping[str, Any]) -> None:
        """Add a logged step; the displays are refreshed at most every `REFRESH_SECONDS`."""
        self.rows.append({**row, "path": "this run", "method": self.method})
        if time.monotonic() - self.drawn > REFRESH_SECONDS:
            self.draw()

    def draw(self) -> None:
        """Draw text and curve as they stand."""
        self.drawn = time.monotonic()
        if not (self.handles and self.rows):
            return
        step = self.rows[-1]["step"]
        pace = (self.drawn - self.begun) / max(step - self.first, 1)
        left = pace * (self.max_steps - step)
        line = f"step {step}/{self.max_steps}  {pace:.2f} s/step  {left:.0f} s left"
        self.handles[0].update({"text/plain": line}, raw=True)
        self.handles[1].update(plots.training_curve(pd.DataFrame(self.rows), "reward", window=5))


class Recorder(TrainerCallback):
    """Writes every logged step into the run directory; on a resume, from the checkpoint on."""

    def __init__(self, run: Run, curve: LiveCurve) -> None:
        self.run, self.curve = run, curve

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop lines that the resumed steps will write again."""
        if state.is_world_process_zero:
            self.run.rewind(state.global_step)
            self.curve.begin(state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Append the numbers of this step; the summary line at the end of training is left out."""
        if state.is_world_process_zero and "loss" in logs:
            numbers = {k: v for k, v in logs.items() if isinstance(v, Real) or v is None}
            self.run.log(state.global_step, numbers)
            self.curve.show({"step": state.global_step, **numbers})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the last state."""
        if state.is_world_process_zero:
            self.curve.draw()
