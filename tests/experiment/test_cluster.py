"""Suites through submitit's local executor: the same runs, kept, listed and gone on with."""

import json
import time
from pathlib import Path
from threading import Thread

import pytest
from conftest import START, NotebookMaker

from rlsd_lib.__main__ import main
from rlsd_lib.experiment import cluster
from rlsd_lib.experiment.cluster import ClusterRun
from rlsd_lib.runs import suites
from rlsd_lib.runs.records import state_of
from rlsd_lib.runs.suites import Job, Outcome, Suite, settle

DONE = 'run.finish({"accuracy_after": 0.5})'


def test_a_suite_runs_through_submitit_unchanged(
    make_notebook: NotebookMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = make_notebook(cells=(START, "assert seed != 1, 'seed 1 fails'", DONE))
    grid = {"method": ("grpo",), "seed": (0, 1), "notebook": (str(source),)}
    monkeypatch.setitem(suites.SUITES, "tiny", Suite("for a test", [grid]))
    words = ["suite", "tiny", "--submitit", "local", "--submitit-options", "timeout_min=5"]

    assert main([*words, "--jobs", "2"]) == 1
    said = capsys.readouterr()
    assert said.out.count(": done in") == 1
    assert "seed 1 fails" in said.err
    folder = tmp_path / "outputs" / "tiny"
    states = {p.name.split("-")[1]: state_of(p) for p in folder.iterdir() if p.is_dir()}
    assert states == {"s0": "finished", "s1": "failed"}
    # The same folders as without a cluster: nothing that is finished is made again.
    assert [job.run_dir.parent for job in suites.jobs_of("tiny")] == [folder, folder]
    kept = suites.jobs_of("tiny")[:1]
    assert settle(kept, retry_failed=True) == ([Outcome(kept[0], "kept")], [])


def test_a_job_that_is_pre_empted_goes_on_where_it_was(
    make_notebook: NotebookMaker, tmp_path: Path
) -> None:
    wait = "import time\nfor _ in range(600 * (not run.manifest['resumed'])):\n    time.sleep(0.1)"
    source = make_notebook(cells=(START, "run.log(1, {'reward': 0.5})", wait, DONE))
    job = Job(str(source), {"seed": 3}, tmp_path / "a")
    first, outcomes = ClusterRun(), []
    thread = Thread(target=lambda: outcomes.append(first(job, "skip")))
    thread.start()
    while not (job.run_dir / "metrics.jsonl").exists():
        assert thread.is_alive(), outcomes
        time.sleep(0.1)
    again = first.checkpoint(job, "skip")
    thread.join()
    assert outcomes[0].status == "failed"
    reason = json.loads((job.run_dir / "manifest.json").read_text())["error"]
    assert reason.startswith("Stopped: SIGTERM outside of training (")
    assert job.state() == "interrupted", "nothing is wrong with a run that a cluster stopped"
    assert again.args == (job, "resume")
    assert again.function(*again.args).status == "done"
    manifest = json.loads((job.run_dir / "manifest.json").read_text())
    assert (manifest["status"], manifest["attempt"], manifest["resumed"]) == ("finished", 2, True)


def test_a_job_that_is_killed_is_seen_to_have_failed_from_anywhere(
    make_notebook: NotebookMaker, tmp_path: Path
) -> None:
    """As by a kernel that runs out of memory: another host cannot tell whether the owner lives."""
    die = "import os\nfor pid in (os.getppid(), os.getpid()):\n    os.kill(pid, 9)"
    job = Job(str(make_notebook(cells=(START, die, DONE))), {}, tmp_path / "a")
    assert ClusterRun()(job, "skip").status == "failed"
    assert state_of(job.run_dir) == "failed"
    assert json.loads((job.run_dir / "manifest.json").read_text())["error"].startswith("killed")


def test_wrong_options_cost_a_line_and_no_job(
    make_notebook: NotebookMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job(str(make_notebook()), {}, tmp_path / "a")
    with pytest.raises(ValueError, match=r"--submitit-options: .*gpu_per_node"):
        cluster.run_submitted([job], 1, "local", {"gpu_per_node": 1})
    assert main(["suite", "demo", "--jobs", "0", "--submitit", "local"]) == 2
    assert "--jobs 0: expected 1 or more" in capsys.readouterr().err
    assert main(["suite", "demo", "--submitit-options", "timeout_min=5"]) == 2
    assert "only with --submitit" in capsys.readouterr().err
    assert not job.run_dir.exists()
