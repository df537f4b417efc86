"""How runs stand, a line each, while other processes make them."""

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from tqdm import tqdm

from rlsd_lib.runs.records import manifest_or_none, read_lines

TICK_SECONDS = 1.0
SPARSE_SECONDS = 60.0  # between two lines of a run in a log file, unless its phase changes
RECENT = 10  # steps over which pace and reward are averaged


class Standing(NamedTuple):
    """What a run is at, and how many of how many optimiser steps are done."""

    phase: str
    step: int
    steps: int
    words: str


def standing(folder: Path, since: str = "") -> Standing | None:
    """How the run in `folder` stands; None if it trains nothing, ended, or began before `since`."""
    manifest = manifest_or_none(folder) or {}
    phase = manifest.get("phase")
    if not phase or manifest["status"] != "running" or manifest["started"] < since:
        return None
    steps = (manifest["config"] or {}).get("max_steps", 0)
    rows = read_lines(folder / "metrics.jsonl", torn=True) if phase == "training" else []
    if not rows:
        return Standing(phase, 0, steps, phase)
    step, recent = rows[-1]["step"], rows[-RECENT:]
    pace = fmean(row["step_time"] for row in recent)
    left = timedelta(seconds=round(pace * (steps - step)))
    reward = fmean(row["reward"] for row in recent)
    words = f"step {step}/{steps}, {pace:.2f} s/step, {left} left, reward {reward:.2f}"
    return Standing(phase, step, steps, words)


@contextmanager
def followed(folders: Sequence[Path]) -> Iterator[None]:
    """Show on stderr how the runs in `folders` stand that begin inside.

    A terminal gets a bar for each run at work; a file gets a line of a run when its phase changes
    and every `SPARSE_SECONDS`. Where there are several, a line begins with the run's name.
    """
    since, ended = datetime.now(UTC).isoformat(timespec="milliseconds"), threading.Event()
    names = {folder: f"{folder.name}: " if len(folders) > 1 else "" for folder in folders}
    show, shown = (_show_bar if sys.stderr.isatty() else _show_line), {}

    def follow() -> None:
        while not ended.wait(TICK_SECONDS):
            for folder, name in names.items():
                show(shown, name, standing(folder, since))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for name in names.values():
            show(shown, name, None)


def _show_bar(bars: dict[str, tqdm], name: str, now: Standing | None) -> None:
    """Draw a bar in place for a run at work, or take it away."""
    if now is None:
        if name in bars:  # a bar without steps is false
            bars.pop(name).close()
        return
    if name not in bars:
        # Two columns are left to the ^C that a terminal writes behind the bar.
        bars[name] = tqdm(bar_format="{desc} {bar:-2}", leave=False, dynamic_ncols=True)
    bars[name].total, bars[name].n = now.steps, now.step
    bars[name].set_description_str(name + now.words)


def _show_line(last: dict[str, tuple], name: str, now: Standing | None) -> None:
    """Write a line if one is due; `last` has the phase, whether a step was done, and when."""
    *known, when = last.get(name, ("", False, 0.0))
    if now and (known != [now.phase, now.step > 0] or time.monotonic() > when + SPARSE_SECONDS):
        last[name] = now.phase, now.step > 0, time.monotonic()
        sys.stderr.write(name + now.words + "\n")
        sys.stderr.flush()
