"""`rlsd bench --profile`: where the teacher pass with shared prompts spends its time."""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from trl.kernels import ChunkedLogProbFunction

from rlsd_lib.experiment.bench import now, scoring
from rlsd_lib.experiment.racers import Sizes
from rlsd_lib.trainer import shared_prompts

REST = "all else"


class Phases:
    """Seconds of calls by phase; what a phase calls of another one counts there alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.inner = [0.0]

    def timed(self, name: str, call: Callable) -> Callable:
        """`call`, with its seconds counted under `name` and named so in the trace."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = now()
            self.inner.append(0.0)
            with record_function(name):
                result = call(*args, **kwargs)
            spent = now() - begun
            self.seconds[name] += spent - self.inner.pop()
            self.inner[-1] += spent
            return result

        return timed


def profile_teacher_pass(sizes: Sizes, trace: Path, rounds: int = 3) -> Iterator[str]:
    """Text: seconds and share by phase, means of `rounds` passes, then the operators of one pass.

    `trace` receives that pass for chrome://tracing or ui.perfetto.dev. Phases are timed without the
    profiler, which slows small operators down more than large ones.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer, score = scoring(sizes, Path(folder))
    phases = Phases()
    parts = (
        (trainer.scorer, "prompts", "tokenise"),
        (shared_prompts, "_read_prompts", "prompt pass"),
        (shared_prompts._SharedLayer, "update", "cache copy"),
        (trainer.teacher.model, "forward", "completion pass"),
        (ChunkedLogProbFunction, "forward", "head"),
    )
    score("shared")  # to warm up
    with ExitStack() as patched:
        for owner, name, phase in parts:
            timed = phases.timed(phase, getattr(owner, name))
            patched.enter_context(patch.object(owner, name, timed))
        for _ in range(rounds):
            phases.timed(REST, score)("shared")
        seconds = pd.Series(phases.seconds) / rounds
        on_gpu = torch.cuda.is_available()
        device = [ProfilerActivity.CUDA] if on_gpu else []
        with profile(activities=[ProfilerActivity.CPU, *device]) as found:
            score("shared")
    table = pd.DataFrame({"seconds": seconds, "share": seconds / seconds.sum()})
    yield f"{sizes}\n" + table.map("{:.3g}".format).to_string() + "\n"
    trace.parent.mkdir(parents=True, exist_ok=True)
    found.export_chrome_trace(str(trace))
    order = f"self_{'device' if on_gpu else 'cpu'}_time_total"
    yield found.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=40)
    yield f"trace: {trace}"
