"""What a terminal and a log file show of runs at work."""

import re
import sys
import time
from pathlib import Path

import pytest

from rlsd_lib.runs import follow
from rlsd_lib.runs.follow import followed, standing
from rlsd_lib.runs.run import Run


def _training(folder: Path, steps: int) -> Run:
    run = Run.start(folder, parameters={})
    run.record(phase="training", config={"max_steps": 10})
    for step in range(1, steps + 1):
        run.log(step, {"step_time": 1.5, "reward": step / 10})
    return run


def test_a_run_at_work_says_its_step_its_pace_the_time_left_and_the_reward(tmp_path: Path) -> None:
    assert standing(tmp_path / "absent") is None
    run = _training(tmp_path / "a", 2)
    now = standing(run.path)
    assert (now.step, now.steps) == (2, 10)
    assert now.words == "step 2/10, 1.50 s/step, 0:00:12 left, reward 0.15"
    assert standing(run.path, since="9999") is None  # what a killed process has left
    run.record(phase="evaluating after")
    assert standing(run.path).words == "evaluating after"
    run.finish()
    assert standing(run.path) is None


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_terminal_gets_a_bar_and_a_file_a_line_for_each_phase(
    is_terminal: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(follow, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    # What tqdm reads on a terminal of 80 columns.
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda _: (79, 24))
    with followed([tmp_path / "a", tmp_path / "b"]):
        run = _training(tmp_path / "a", 0)
        time.sleep(0.3)
        for step in (1, 2, 3):
            run.log(step, {"step_time": 1.5, "reward": 0.5})
        time.sleep(0.5)
        run.record(phase="evaluating after")
        time.sleep(0.5)
    said = [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if line.strip()]
    assert any(re.search(r"a: step [123]/10, 1.50 s/step", line) for line in said)
    assert any("a: evaluating after" in line for line in said)
    assert is_terminal or (said[0] == "a: training" and len(said) == 3)  # sparse
    assert not any("b:" in line for line in said)
    assert max(map(len, said)) <= 78, "no room for a terminal's ^C"
