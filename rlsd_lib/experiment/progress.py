"""What a training run shows while it runs, and what it writes down at every step."""

import time
from numbers import Real
from typing import Any

import pandas as pd
from IPython import get_ipython
from IPython.display import display
from transformers import TrainerCallback

from rlsd_lib.report import plots
from rlsd_lib.runs.records import read_lines
from rlsd_lib.runs.run import Run
from rlsd_lib.trainer.config import RLSDConfig

REFRESH_SECONDS = 3.0


class LiveCurve:
    """The curve of the training reward, drawn in place; nothing outside an IPython kernel.

    A single display keeps a run under papermill to a single output. The rows are those of the run's
    metrics.jsonl, whichever process writes it.
    """

    def __init__(self, run: Run, config: RLSDConfig) -> None:
        self.run, self.config = run, config
        self.handle, self.drawn = None, 0.0

    def draw(self, *, at_once: bool = False) -> None:
        """Draw the curve as it stands; unless `at_once`, at most every `REFRESH_SECONDS`."""
        is_due = at_once or time.monotonic() > self.drawn + REFRESH_SECONDS
        if get_ipython() is None or not is_due:
            return
        self.drawn = time.monotonic()
        if not (rows := read_lines(self.run.path / "metrics.jsonl", torn=True)):
            return
        title = f"mean reward, step {rows[-1]['step']} of {self.config.max_steps}"
        frame = pd.DataFrame(rows).assign(path="this run", method=self.config.method)
        figure = plots.training_curve(frame, "reward", window=5, title=title)
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)


class Recorder(TrainerCallback):
    """Writes every logged step into the run directory; on a resume, from the checkpoint on."""

    def __init__(self, run: Run, curve: LiveCurve) -> None:
        self.run, self.curve = run, curve

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
            self.curve.draw()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the last state."""
        if state.is_world_process_zero:
            self.curve.draw(at_once=True)
