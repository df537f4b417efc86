"""A run is a directory: claimed by one process, filled, ended, gone on with."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlsd_lib.runs import paths, provenance
from rlsd_lib.runs import run as run_module
from rlsd_lib.runs.records import LOCK, read_lines, read_runs, state_of
from rlsd_lib.runs.run import Run

HOLD = """
import sys, time
from rlsd_lib.runs.run import Run
run = Run.start(sys.argv[1], parameters={"seed": 0})
run.log(1, {"reward": 0.0})
print("held", flush=True)
time.sleep(60)
"""
RACE = """
import pathlib, sys
from rlsd_lib.runs.run import Run
print("ready", flush=True)
while not pathlib.Path(sys.argv[2]).exists():
    pass
try:
    Run.start(sys.argv[1], parameters={"seed": 0}, if_exists="overwrite")
    print("won", flush=True)
    sys.stdin.readline()
except FileExistsError as error:
    print("lost:", error, flush=True)
"""


def _python(code: str, *words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose process was killed after its first step; tests work on copies."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    process = _python(HOLD, folder)
    try:
        assert process.stdout.readline() == "held\n"
        assert state_of(folder) == "running"
        for mode in ("raise", "overwrite", "resume"):
            with pytest.raises(FileExistsError, match=f"process {process.pid} on "):
                Run.start(folder, parameters={}, if_exists=mode)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    return folder


def test_a_finished_run_says_what_ran(tmp_path: Path) -> None:
    run = Run.start(tmp_path / "a", parameters={"method": "grpo", "seed": 3})
    run.record(config={"beta": 0.0}, data=provenance.fingerprint([{"prompt": "1+1"}]))
    run.log(1, {"reward": 0.25, "entropy": float("nan")})
    run.finish({"accuracy_after": 0.5})

    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["parameters"] == {"method": "grpo", "seed": 3}
    assert manifest["config"] == {"beta": 0.0}
    assert len(manifest["data"]) == 64
    assert manifest["packages"]["trl"] == "1.16.0"
    assert manifest["owner"]["pid"] == os.getpid()
    assert manifest["seconds"] >= 0
    assert {"cpu_cores", "gpus", "memory_gib"} <= set(manifest["hardware"])
    assert json.loads((tmp_path / "a" / "metrics.json").read_text()) == {"accuracy_after": 0.5}


def test_a_stopped_run_names_its_accelerators(tmp_path: Path, monkeypatch) -> None:
    """They are known once torch is loaded, which is after the run began and long before it ends."""
    monkeypatch.setitem(sys.modules, "torch", None)
    run = Run.start(tmp_path / "a", parameters={})
    cuda = SimpleNamespace(device_count=lambda: 1, get_device_name=lambda index: "H200")
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    run.record(phase="training")
    run.fail("stopped")
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["hardware"]["gpus"] == [
        "H200"
    ]


def test_a_finished_run_is_overwritten_only_when_told(tmp_path: Path) -> None:
    Run.start(tmp_path / "a", parameters={}).finish({"accuracy_after": 0.5})
    with pytest.raises(FileExistsError, match="already holds a run \\(finished\\)"):
        Run.start(tmp_path / "a", parameters={})
    with pytest.raises(FileExistsError, match="nothing to resume"):
        Run.start(tmp_path / "a", parameters={}, if_exists="resume")
    assert (tmp_path / "a" / "metrics.json").exists()

    again = Run.start(tmp_path / "a", parameters={}, if_exists="overwrite")
    assert again.attempt == 2
    assert not (tmp_path / "a" / "metrics.json").exists()


def test_files_that_are_no_run_are_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for mode in ("raise", "overwrite", "resume"):
        with pytest.raises(FileExistsError, match="holds files but no run"):
            Run.start(tmp_path, parameters={}, if_exists=mode)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_foreign_files_and_notes_are_never_deleted(tmp_path: Path) -> None:
    for name, manifest in {"web": '{"name": "app", "icons": []}', "text": "Dear diary"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(manifest)
        (tmp_path / name / "thesis.tex").write_text("years of work")
        for mode in ("raise", "overwrite", "resume"):
            with pytest.raises(FileExistsError, match="holds files but no run"):
                Run.start(tmp_path / name, parameters={}, if_exists=mode)
        assert (tmp_path / name / "thesis.tex").read_text() == "years of work"
    run = Run.start(tmp_path / "a", parameters={})
    (run.path / "table.csv").write_text("of a cell of the notebook")
    run.finish({})
    assert run.manifest["files"] == ["table.csv"]
    (run.path / "figures").mkdir()
    for note in (run.path / "notes.txt", run.path / "figures" / "figure.tex"):
        note.write_text("mine")
        with pytest.raises(FileExistsError, match=rf"holds .*{note.name}, which its run has not"):
            Run.start(run.path, parameters={}, if_exists="overwrite")
        note.unlink()
    Run.start(run.path, parameters={}, if_exists="overwrite")
    assert not (run.path / "table.csv").exists()


def test_other_peoples_manifests_and_damaged_ones_do_not_stop_a_reader(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done = Run.start(tmp_path / "done", parameters={"seed": 0})
    done.finish({"accuracy_after": 0.5})
    for name, manifest in {"app": '{"name": "app"}', "list": "[]", "cut": "{"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(manifest)
    damaged = Run.start(tmp_path / "hit", parameters={"seed": 1})
    damaged.finish({})
    (damaged.path / "manifest.json").write_text('{"status": ')
    statuses = read_runs(tmp_path).runs.set_index("name")["status"].to_dict()
    assert statuses == {"done": "finished", "hit": "damaged"}
    assert all(
        f"{tmp_path / name}/manifest.json is no run's" in caplog.text for name in ("app", "cut")
    )
    with pytest.raises(FileExistsError, match="is damaged: nobody knows what there is to resume"):
        Run.start(damaged.path, parameters={"seed": 1}, if_exists="resume")
    Run.start(damaged.path, parameters={"seed": 1}, if_exists="overwrite").finish({})
    assert (damaged.path / "manifest.json.damaged").read_text() == '{"status": '
    assert state_of(damaged.path) == "finished"


def test_a_run_is_resumed_with_its_own_parameters_or_not_at_all(
    killed: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(killed, tmp_path / "a"))
    before = json.loads((path / "manifest.json").read_text())
    with pytest.raises(ValueError, match="was begun with seed=0, and this call has 1"):
        Run.start(path, parameters={"seed": 1}, if_exists="resume")
    assert json.loads((path / "manifest.json").read_text()) == before
    run = Run.start(path, parameters={"seed": 0, "max_steps": 9}, if_exists="resume-older")
    kept = {name: before[name] for name in ("attempt", "started", "git")}
    assert run.manifest["earlier"] == [kept]
    assert run.manifest["if_exists"] == "resume-older"


def test_an_unknown_mode_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="if_exists='skip'"):
        Run.start(tmp_path / "a", parameters={}, if_exists="skip")
    assert not (tmp_path / "a").exists()


def test_a_killed_run_says_running_and_readers_say_killed(killed: Path) -> None:
    assert json.loads((killed / "manifest.json").read_text())["status"] == "running"
    assert state_of(killed) == "running/killed"
    assert read_runs(killed).runs["status"].tolist() == ["running/killed"]
    with pytest.raises(FileExistsError, match="running/killed"):
        Run.start(killed, parameters={})


def test_a_killed_run_is_resumed_with_its_lines(killed: Path, tmp_path: Path) -> None:
    shutil.copytree(killed, tmp_path / "a")
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')  # killed in the middle of a line

    run = Run.start(tmp_path / "a", parameters={"seed": 0}, if_exists="resume")
    run.log(2, {"reward": 1.0})
    run.finish({})
    assert read_lines(run.path / "metrics.jsonl") == [
        {"step": 1, "reward": 0.0},
        {"step": 2, "reward": 1.0},
    ]
    assert run.manifest["resumed"] is True
    assert run.manifest["attempt"] == 2


def test_rewind_drops_what_a_resumed_run_logs_again(tmp_path: Path) -> None:
    run = Run.start(tmp_path / "a", parameters={})
    for step in (1, 2, 3):
        run.log(step, {"reward": step})
    run.rewind(1)
    assert [row["step"] for row in read_lines(run.path / "metrics.jsonl")] == [1]


@pytest.mark.parametrize("killed_before", [False, True])
def test_of_runs_started_at_once_exactly_one_wins(
    killed: Path, tmp_path: Path, killed_before: bool
) -> None:
    folder, gate = tmp_path / "a", tmp_path / "gate"
    if killed_before:
        shutil.copytree(killed, folder)
    racers = [_python(RACE, folder, gate) for _ in range(3)]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    gate.touch()
    said = [racer.stdout.readline() for racer in racers]
    winner = racers[said.index("won\n")]
    assert state_of(folder) == "running"
    for racer in racers:
        racer.communicate()
    lost = [line for line in said if line.startswith("lost:")]
    assert len(lost) == 2
    assert all(f"process {winner.pid} on " in line for line in lost)
    assert json.loads((folder / "manifest.json").read_text())["owner"]["pid"] == winner.pid


def test_a_run_that_came_and_went_between_look_and_lock_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def beaten(*_: object, **__: object) -> None:
        monkeypatch.undo()
        Run.start(tmp_path / "a", parameters={}).finish({"accuracy_after": 0.5})

    monkeypatch.setattr(run_module, "_check_allowed", beaten)  # it looked, and saw nothing
    with pytest.raises(FileExistsError, match=f"a moment ago by process {os.getpid()} on "):
        Run.start(tmp_path / "a", parameters={}, if_exists="overwrite")
    assert state_of(tmp_path / "a") == "finished"
    assert (tmp_path / "a" / "metrics.json").exists()


def test_an_attempt_that_lost_its_directory_writes_nothing_into_it(tmp_path: Path) -> None:
    lost = Run.start(tmp_path / "a", parameters={})
    lost.fail("ValueError: first")
    taker = Run.start(tmp_path / "a", parameters={}, if_exists="overwrite")
    taker.log(1, {"reward": 1.0})
    before = {p.name: p.read_bytes() for p in taker.path.iterdir()}
    for write in (lambda: lost.log(2, {}), lost.finish, lambda: lost.record(config={})):
        with pytest.raises(RuntimeError, match="taken over by attempt 2"):
            write()
    # A mistake typed later into the kernel of the first attempt does not fail the second.
    lost._after_cell(SimpleNamespace(error_before_exec=None, error_in_exec=NameError("x")))
    assert {p.name: p.read_bytes() for p in taker.path.iterdir()} == before


def test_a_run_on_another_host_counts_as_alive_until_its_lock_file_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    run = Run.start(tmp_path / "a", parameters={})
    run._lock.release()  # as on a disk that does not carry it
    monkeypatch.undo()
    with pytest.raises(FileExistsError, match=rf"on elsewhere.*delete .*{LOCK}"):
        Run.start(run.path, parameters={}, if_exists="overwrite")
    (run.path / LOCK).unlink()
    assert state_of(run.path) == "running/killed"
    assert Run.start(run.path, parameters={}, if_exists="overwrite").attempt == 2


def test_a_run_that_was_killed_while_its_folder_was_emptied_is_not_resumed_in_part(
    tmp_path: Path,
) -> None:
    Run.start(tmp_path / "a", parameters={}).finish({})
    (tmp_path / "a" / "manifest.json").unlink()  # the first file that goes
    assert state_of(tmp_path / "a") == "running/killed"
    run = Run.start(tmp_path / "a", parameters={}, if_exists="resume")
    assert not (run.path / "metrics.json").exists()
    assert run.manifest["resumed"] is False


def test_metrics_must_be_numbers_and_the_manifest_keeps_its_names(tmp_path: Path) -> None:
    run = Run.start(tmp_path / "a", parameters={})
    with pytest.raises(TypeError, match="'weights' is list"):
        run.log(1, {"weights": [1.0, 2.0]})
    with pytest.raises(ValueError, match="status"):
        run.record(status="finished")


def test_an_exception_in_a_with_block_marks_the_run_failed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Run.start(tmp_path / "a", parameters={}):
        _ = 1 / 0
    assert read_runs(tmp_path).runs.loc[0, "error"] == "ZeroDivisionError: division by zero"


def test_no_run_is_dropped_when_a_folder_is_read(killed: Path, tmp_path: Path) -> None:
    done = Run.start(tmp_path / "g" / "done", parameters={"method": "grpo", "seed": 0})
    done.log(1, {"reward": 0.5})
    done.finish({"accuracy_after": 0.5})
    broken = Run.start(tmp_path / "g" / "broken", parameters={"method": "grpo", "seed": 1})
    broken.log(1, {"reward": 0.25})
    broken.fail("ValueError: no")
    shutil.copytree(killed, tmp_path / "g" / "killed")
    (tmp_path / "g" / "killed" / "manifest.json").unlink()  # killed before it could write one

    runs, steps = read_runs(tmp_path)
    by_name = runs.set_index("name")
    assert by_name["status"].to_dict() == {
        "broken": "failed",
        "done": "finished",
        "killed": "running/killed",
    }
    assert by_name.loc["done", "accuracy_after"] == 0.5
    assert by_name.loc["broken", "error"] == "ValueError: no"
    assert set(zip(steps["name"], steps["status"], strict=True)) == {
        ("broken", "failed"),
        ("done", "finished"),
        ("killed", "running/killed"),
    }
    assert set(runs["group"]) == {"g"}


def test_a_damaged_file_is_named_and_not_skipped(tmp_path: Path) -> None:
    run = Run.start(tmp_path / "a", parameters={})
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    run.finish({})
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_runs(tmp_path)


def test_the_default_directory_is_the_same_for_the_same_parameters(tmp_path: Path) -> None:
    base = {"method": "rlsd", "preset": "lab", "seed": 1, "overrides": {}, "max_steps": -1}
    name = paths.run_name
    assert paths.default_run_dir("demo", base) == tmp_path / "outputs/demo/rlsd-lab-s1"
    assert name({**base, "control": "none", "num_processes": 1}) == "rlsd-lab-s1"
    assert name({**base, "control": "shuffled"}) == "rlsd-lab-s1-shuffled"
    changed = [{"overrides": {"beta": 0.1}}, {"max_steps": 5}, {"overrides": {"beta": 0.2}}]
    names = [name({**base, **change}) for change in changed]
    assert len(set(names)) == 3
    assert all(n.startswith("rlsd-lab-s1-") for n in names)
    assert name({**base, "overrides": {"a": 1, "b": 2}}) == name(
        {**base, "overrides": {"b": 2, "a": 1}}
    )


def test_outputs_stand_in_the_clone_wherever_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RLSD_OUTPUTS")
    (tmp_path / "pyproject.toml").touch()  # of a project that is not the clone
    monkeypatch.chdir(tmp_path)
    assert paths.outputs_root() == paths.REPOSITORY / "outputs"
    monkeypatch.setattr(paths, "REPOSITORY", tmp_path / "site-packages")
    assert paths.outputs_root() == tmp_path / "outputs"


def test_a_run_that_ends_while_its_state_is_read_was_not_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.start(tmp_path / "a", parameters={})

    def ends(_: Path) -> bool:
        run.finish({})
        return False

    monkeypatch.setattr("rlsd_lib.runs.records._is_locked", ends)
    assert state_of(run.path) == "finished"
