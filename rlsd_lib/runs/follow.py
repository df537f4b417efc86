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
    """How the run in `folder` stands; None if it does not run, or began before `since` (ISO time).

    A run says its phase in the manifest. One that trains nothing has none, and gives None.
    """
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
    show = Bars().show if sys.stderr.isatty() else Lines().show

    def follow() -> None:
        while not ended.wait(TICK_SECONDS):
            for folder in folders:
                show(folder if len(folders) > 1 else None, standing(folder, since))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        for folder in folders:
            show(folder if len(folders) > 1 else None, None)


class Bars:
    """A bar in place for each run at work."""

    def __init__(self) -> None:
        self.bars: dict[Path | None, tqdm] = {}

    def show(self, folder: Path | None, now: Standing | None) -> None:
        """Draw how the run in `folder` stands, or take its bar away; None is the only run."""
        if now is None:  # a bar without steps is false
            if folder in self.bars:
                self.bars.pop(folder).close()
        else:
            if folder not in self.bars:
                how = {"bar_format": "{desc} {bar}", "leave": False, "dynamic_ncols": True}
                self.bars[folder] = tqdm(**how)
            bar = self.bars[folder]
            bar.total, bar.n = now.steps, now.step
            bar.set_description_str(_named(folder, now.words))


class Lines:
    """Plain lines, sparse enough for a log file."""

    def __init__(self) -> None:
        # Of the last line: phase, whether a step was done, and when.
        self.last: dict[Path | None, tuple[str, bool, float]] = {}

    def show(self, folder: Path | None, now: Standing | None) -> None:
        """Write a line if one is due."""
        *known, when = self.last.get(folder, ("", False, 0.0))
        if now and (known != [now.phase, now.step > 0] or time.monotonic() > when + SPARSE_SECONDS):
            self.last[folder] = now.phase, now.step > 0, time.monotonic()
            sys.stderr.write(_named(folder, now.words) + "\n")
            sys.stderr.flush()


def _named(folder: Path | None, words: str) -> str:
    return f"{folder.name}: {words}" if folder else words
