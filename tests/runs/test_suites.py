"""Suites: what is left to do; a killed suite goes on where it stood."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import START, NotebookMaker

from rlsd_lib.__main__ import main
from rlsd_lib.report.tables import make_table
from rlsd_lib.runs import suites
from rlsd_lib.runs.records import read_manifest, read_runs, runs_folder, state_of
from rlsd_lib.runs.run import Run
from rlsd_lib.runs.suites import Job, Suite, jobs_of, run_jobs, settle


def test_what_was_interrupted_is_to_run_and_what_failed_is_not(tmp_path: Path):
    job = Job("15_rlsd", {"preset": "lab"}, tmp_path / "a")
    assert job.state() == "to run"
    run = Run.start(job.run_dir, parameters={})
    assert job.state() == "running"
    [outcome], _ = settle([job], retry_failed=True)
    assert (outcome.status, str(job.run_dir) in outcome.error) == ("busy", True)
    run.fail("KeyboardInterrupt")
    assert job.state() == "interrupted"
    assert settle([job], retry_failed=False) == ([], [job])
    run.fail("ValueError: no")
    [outcome], _ = settle([job], retry_failed=False)
    assert (outcome.status, outcome.error) == ("failed before", "ValueError: no")
    assert settle([job], retry_failed=True) == ([], [job])


# ---- killed half-way --------------------------------------------------------------------------

WAIT = """
import time
from pathlib import Path
while seed >= 1 and not Path(gate).exists():
    time.sleep(0.02)
"""
FINISH = 'run.log(1, {"reward": seed / 4})\nrun.finish({"accuracy_after": 0.5 + seed / 10})'
BEGIN = """
import sys
from rlsd_lib.runs import suites
from rlsd_lib.__main__ import main
grid = {"gate": (sys.argv[2],), "seed": (0, 1, 2), "notebook": (sys.argv[1],)}
suites.SUITES["tiny"] = suites.Suite("for a test", [grid])
sys.exit(main(["suite", "tiny"]))
"""


def _files(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def _wait_until(true, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "the suite did not come that far"
        time.sleep(0.05)


def test_a_killed_suite_redoes_nothing_and_ends_in_the_same_table(
    make_notebook: NotebookMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = tmp_path / "gate"
    parameters = ("seed: int = 0", 'gate: str = ""', 'run_dir: str = ""')
    start = START.replace("method=method, seed=seed, rate=rate, overrides=overrides", "seed=seed")
    source = make_notebook(cells=(start, WAIT, FINISH), parameters=parameters)
    grid = {"gate": (str(gate),), "seed": (0, 1, 2), "notebook": (str(source),)}
    monkeypatch.setitem(suites.SUITES, "tiny", Suite("for a test", [grid]))
    folders = [job.run_dir for job in jobs_of("tiny")]

    def finish(folder: Path, seed: int) -> None:  # as the notebook does
        run = Run.start(folder, parameters={"seed": seed, "gate": str(gate)}, notebook=source)
        run.log(1, {"reward": seed / 4})
        run.finish({"accuracy_after": 0.5 + seed / 10})

    finish(folders[0], 0)
    words = [sys.executable, "-c", BEGIN, str(source), str(gate)]
    suite = subprocess.Popen(words, start_new_session=True, stdout=subprocess.DEVNULL)
    expected = ["finished", "running", None]
    _wait_until(lambda: [state_of(folder) for folder in folders] == expected)
    os.killpg(suite.pid, signal.SIGKILL)
    suite.wait()
    _wait_until(lambda: state_of(folders[1]) == "running/killed")
    before = _files(folders[0])
    half = make_table(read_runs(tmp_path / "outputs"))
    left = [note for note in half.notes if "not in the table" in note]
    assert sorted(note.split(",")[0] for note in left) == ["not started", "running/killed"]

    gate.touch()
    assert main(["suite", "tiny", "--jobs", "2"]) == 0
    assert _files(folders[0]) == before
    assert [read_manifest(folder)["attempt"] for folder in folders] == [1, 2, 1]

    never_killed = tmp_path / "never-killed" / "tiny"
    for seed, folder in enumerate(folders):
        finish(never_killed / folder.name, seed)
    tables = [make_table(read_runs(tmp_path / name)) for name in ("outputs", "never-killed")]
    assert tables[0].markdown() == tables[1].markdown()


def test_the_manual_lists_every_suite_with_its_number_of_runs() -> None:
    manual = (Path(__file__).parents[2] / "notebooks" / "README.md").read_text()
    rows = re.findall(
        r"^\| `([\w-]+)` \| .* \| (\d+) \| [\d.]+ (?:min|h) \|$", manual, re.MULTILINE
    )
    assert {name: int(runs) for name, runs in rows} == {n: len(jobs_of(n)) for n in suites.SUITES}


def test_a_folder_of_runs_is_found_by_its_name_or_as_the_suite_that_finished_last(tmp_path):
    outputs = tmp_path / "outputs"  # where the fixture of every test says that they are
    for when, (suite, ends) in enumerate({"demo": True, "paper": True, "rates": False}.items()):
        for name in ("a", "b"):
            run = Run.start(outputs / suite / name, parameters={})
            if ends or name == "a":
                run.finish({})
            os.utime(outputs / suite / name / "manifest.json", (when, when))
        plans = [{"runs": ["a", "b"]}]
        (outputs / suite / "suite.json").write_text(json.dumps({"plans": plans}))
    assert runs_folder() == outputs / "paper"  # the newest, rates, has not finished
    assert runs_folder("demo") == runs_folder(outputs / "demo") == outputs / "demo"
    assert runs_folder("outputs").name == "outputs"  # of the repository
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder here.*rlsd suite demo"):
        runs_folder("nowhere")
    shutil.rmtree(outputs)
    with pytest.raises(FileNotFoundError, match="no suite has finished"):
        runs_folder()


def test_a_run_that_another_suite_has_just_begun_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job("15_rlsd", {"seed": 0}, tmp_path / "a")
    Run.start(job.run_dir, parameters={"seed": 0})  # after the suite has looked at what is to do
    refused = SimpleNamespace(returncode=2, stderr="rlsd: is being written")
    monkeypatch.setattr(suites.subprocess, "run", lambda *_, **__: refused)
    (outcome,) = run_jobs([job], 1)
    assert (outcome.status, f"process {os.getpid()} on" in outcome.error) == ("busy", True)
