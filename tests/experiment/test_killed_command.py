"""`rlsd run`, killed at any moment and resumed, leaves the run that nobody killed."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlsd_lib.runs.records import read_lines

KILLS = 20
CLOCKS = ("step_time", "seconds_per_step")
RUN = '-m rlsd_lib run 15_rlsd -p preset=smoke -p max_steps=6 -p overrides={"save_steps":1}'


def start(folder: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, *RUN.split(), "--run-dir", str(folder), *words]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)


def outcome(folder: Path) -> tuple[Any, Any]:
    """What was logged and measured, but for the clock."""
    rows = read_lines(folder / "metrics.jsonl")
    metrics = json.loads((folder / "metrics.json").read_text())
    logged, (measured,) = (
        [{k: r[k] for k in r if k not in CLOCKS} for r in each] for each in (rows, [metrics])
    )
    return logged, measured


@pytest.mark.slow
def test_a_command_killed_at_any_moment_is_resumed_bit_by_bit(tmp_path: Path) -> None:
    assert start(tmp_path / "first").wait() == 0  # pretrains the lab
    whole = tmp_path / "whole"
    begun = os.times().elapsed
    assert start(whole).wait() == 0
    seconds = os.times().elapsed - begun
    for number in range(KILLS):
        folder = tmp_path / str(number)
        process = start(folder)
        try:
            process.wait(random.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if not (folder / "metrics.json").exists():
            again = start(folder, "--if-exists", "resume")
            said = again.communicate()[1]
            assert again.returncode == 0, said
        assert outcome(folder) == outcome(whole), number
