"""A run is a directory: claims, manifest, strict execution, reading back."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from conftest import FINISH, START, NotebookMaker
from datasets import Dataset, Image, List

from rlsd_lib.runs import claims, execute, paths, provenance
from rlsd_lib.runs.execute import NotebookError, execute_notebook
from rlsd_lib.runs.parameters import (
    Parameter,
    check_parameters,
    parse_value,
    read_parameters,
)
from rlsd_lib.runs.records import read_lines, state_of
from rlsd_lib.runs.run import Run, read_runs
from rlsd_lib.tasks import load_task

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
    Run.start(sys.argv[1], parameters={"seed": 0})
    print("won", flush=True)
    sys.stdin.readline()
except FileExistsError as error:
    print("lost:", error, flush=True)
"""


def _python(code: str, *words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _killed_run(folder: Path) -> None:
    process = _python(HOLD, folder)
    assert process.stdout.readline() == "held\n"
    assert state_of(folder) == "running"
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_finished_run_says_what_ran(tmp_path: Path) -> None:
    run = Run.start(tmp_path / "a", parameters={"method": "grpo", "seed": 3})
    run.record(config={"beta": 0.0}, data=provenance.fingerprint([{"prompt": "1+1"}]))
    run.log(1, {"reward": 0.25, "entropy": float("nan")})
    run.finish({"accuracy_after": 0.5})

    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["parameters"] == {"method": "grpo", "seed": 3}
    assert manifest["seeds"] == {"seed": 3}
    assert manifest["config"] == {"beta": 0.0}
    assert len(manifest["data"]) == 64
    assert manifest["packages"]["trl"] == "1.16.0"
    assert manifest["owner"]["pid"] == os.getpid()
    assert manifest["seconds"] >= 0
    assert {"cpu_cores", "gpus", "memory_gib"} <= set(manifest["hardware"])
    assert json.loads((tmp_path / "a" / "metrics.json").read_text()) == {"accuracy_after": 0.5}


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


def test_an_unknown_mode_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="if_exists='skip'"):
        Run.start(tmp_path / "a", parameters={}, if_exists="skip")
    assert not (tmp_path / "a").exists()


def test_a_killed_run_says_running_and_readers_say_killed(tmp_path: Path) -> None:
    _killed_run(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["status"] == "running"
    assert read_runs(tmp_path).runs["status"].tolist() == ["running/killed"]
    with pytest.raises(FileExistsError, match="running/killed"):
        Run.start(tmp_path / "a", parameters={})


def test_a_killed_run_is_resumed_with_its_lines_and_its_history(tmp_path: Path) -> None:
    _killed_run(tmp_path / "a")
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
    assert [(p["attempt"], p["status"]) for p in run.manifest["previous"]] == [(1, "running")]


def test_rewind_drops_what_a_resumed_run_logs_again(tmp_path: Path) -> None:
    run = Run.start(tmp_path / "a", parameters={})
    for step in (1, 2, 3):
        run.log(step, {"reward": step})
    run.rewind(1)
    assert [row["step"] for row in read_lines(run.path / "metrics.jsonl")] == [1]


def test_a_living_run_is_not_taken_over_in_any_mode(tmp_path: Path) -> None:
    process = _python(HOLD, tmp_path / "a")
    assert process.stdout.readline() == "held\n"
    try:
        for mode in ("raise", "overwrite", "resume"):
            with pytest.raises(FileExistsError, match=f"process {process.pid} on "):
                Run.start(tmp_path / "a", parameters={}, if_exists=mode)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("killed_before", [False, True])
def test_of_runs_started_at_once_exactly_one_wins(tmp_path: Path, killed_before: bool) -> None:
    folder = tmp_path / "a"
    code = RACE
    if killed_before:
        _killed_run(folder)
        code = RACE.replace('{"seed": 0}', '{"seed": 0}, if_exists="overwrite"')
    gate = tmp_path / "gate"
    racers = [_python(code, folder, gate) for _ in range(4)]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    gate.touch()
    said = [racer.stdout.readline() for racer in racers]
    winner = racers[said.index("won\n")]
    for racer in racers:
        racer.communicate()
    lost = [line for line in said if line.startswith("lost:")]
    assert len(lost) == 3
    assert all(f"process {winner.pid} on " in line for line in lost)
    assert json.loads((folder / "manifest.json").read_text())["owner"]["pid"] == winner.pid


def test_a_claim_made_between_two_looks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = [None]  # the first look finds nobody, and then somebody claims

    def late(folder: Path) -> claims.Claim | None:
        return first.pop() if first else claims.latest_claim(folder)

    claims.make_claim(tmp_path / "a", 1)
    monkeypatch.setattr("rlsd_lib.runs.run.latest_claim", late)
    with pytest.raises(FileExistsError, match=f"is being written by process {os.getpid()} on "):
        Run.start(tmp_path / "a", parameters={})


def test_a_claim_made_between_look_and_grasp_is_respected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def beaten(folder: Path, attempt: int) -> claims.Claim:
        claims.make_claim(folder, attempt)  # another process, a moment earlier
        return claims.make_claim(folder, attempt)

    monkeypatch.setattr("rlsd_lib.runs.run.make_claim", beaten)
    with pytest.raises(FileExistsError, match=f"a moment ago by process {os.getpid()} on "):
        Run.start(tmp_path / "a", parameters={})


def test_a_process_number_that_was_given_out_again_is_not_the_owner(tmp_path: Path) -> None:
    owner = claims.make_claim(tmp_path, 1)
    assert owner.is_alive()
    assert not owner._replace(process_started=owner.process_started + 1).is_alive()
    assert not owner._replace(pid=2**22 + 1).is_alive()


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


def test_a_run_on_another_host_counts_as_alive_until_its_claim_is_deleted(tmp_path: Path) -> None:
    run = Run.start(tmp_path / "a", parameters={})
    claim = run.path / ".claim-1"
    claim.write_text(json.dumps({**json.loads(claim.read_text()), "host": "elsewhere"}))
    with pytest.raises(FileExistsError, match=r"on elsewhere.*delete .*\.claim-1"):
        Run.start(run.path, parameters={}, if_exists="overwrite")
    claim.unlink()
    assert Run.start(run.path, parameters={}, if_exists="overwrite").attempt == 1


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


def test_no_run_is_dropped_when_a_folder_is_read(tmp_path: Path) -> None:
    done = Run.start(tmp_path / "g" / "done", parameters={"method": "grpo", "seed": 0})
    done.log(1, {"reward": 0.5})
    done.finish({"accuracy_after": 0.5})
    broken = Run.start(tmp_path / "g" / "broken", parameters={"method": "grpo", "seed": 1})
    broken.log(1, {"reward": 0.25})
    broken.fail("ValueError: no")
    _killed_run(tmp_path / "g" / "killed")
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


def test_a_field_that_is_given_as_a_parameter_is_told_where_it_goes() -> None:
    source = paths.find_notebook("15_rlsd")
    declared = read_parameters(source)
    for name, owner in {"epsilon_w": "RLSDConfig", "train_size": "the preset"}.items():
        told = rf"no parameter '{name}': it is a field of {owner}.*overrides=.\"{name}\": 0.5"
        with pytest.raises(ValueError, match=told):
            check_parameters(source, declared, {name: 0.5})


def test_rows_with_images_have_one_fingerprint_in_every_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = "import sys; from rlsd_lib.runs.provenance import fingerprint\n"
    code += "from rlsd_lib.tasks import load_task\n"
    code += "rows = load_task('colours', train_size=12, test_size=2, seed=0).train\n"
    code += "sys.stdout.write(fingerprint(rows))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(Image, "decode_example", refuse)
    sizes = {"train_size": 12, "test_size": 2}
    rows, others = (load_task("colours", **sizes, seed=seed).train for seed in (0, 1))
    assert provenance.fingerprint(rows) == done.stdout != provenance.fingerprint(others)
    with pytest.raises(ValueError, match="'images' holds images, and there is no column 'key'"):
        provenance.fingerprint(rows.remove_columns("key"))
    # Rows of text count as ever, and so does an image column with nothing in it.
    texts = {"prompt": ["1+1?"], "images": [[]], "key": ["k"]}
    empty = Dataset.from_dict(texts).cast_column("images", List(Image()))
    assert provenance.fingerprint(empty) == provenance.fingerprint(Dataset.from_dict(texts))


def test_outputs_stand_in_the_project_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RLSD_OUTPUTS")
    inner = tmp_path / "project" / "notebooks"
    inner.mkdir(parents=True)
    (tmp_path / "project" / "pyproject.toml").touch()
    monkeypatch.chdir(inner)
    assert paths.outputs_root() == tmp_path / "project" / "outputs"


def test_git_state_says_dirty_for_a_new_module(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    assert provenance.git_state(tmp_path) == {"commit": None, "dirty": None}
    (tmp_path / "pyproject.toml").write_text("")
    git("init")
    git("add", "pyproject.toml")
    git("commit", "-m", "one")
    assert provenance.git_state(tmp_path)["dirty"] is False
    (tmp_path / "rlsd_lib").mkdir()
    (tmp_path / "rlsd_lib" / "new.py").write_text("x = 1")
    assert provenance.git_state(tmp_path)["dirty"] is True


def test_reading_the_git_state_takes_no_lock(tmp_path: Path) -> None:
    """A run killed while it holds the index lock would block its user's next commit."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=b", "-C", str(tmp_path)]
    (tmp_path / "rlsd_lib").mkdir()
    for name in ("pyproject.toml", "rlsd_lib/a.py"):
        (tmp_path / name).write_text("x")
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "a"], check=True)
    os.utime(
        tmp_path / "rlsd_lib" / "a.py", (1, 1)
    )  # the same content: a status would refresh the index
    index = (tmp_path / ".git" / "index").read_bytes()
    assert provenance.git_state(tmp_path)["dirty"] is False
    assert (tmp_path / ".git" / "index").read_bytes() == index


# ---- strict execution -------------------------------------------------------------------------


def test_a_notebook_runs_from_a_foreign_folder_inside_its_run_directory(
    make_notebook: NotebookMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = (
        "import os, sys\nfrom pathlib import Path\n"
        "assert Path.cwd() == run.path\n"
        "run.finish({'here': str(Path.cwd()), 'python': sys.executable})"
    )
    source = make_notebook(cells=(START, look))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    monkeypatch.chdir(foreign)
    folder = execute_notebook(source, {"seed": 7, "overrides": {"a": [1, None]}})

    assert list(foreign.iterdir()) == []
    assert folder.parent == tmp_path / "outputs" / "tiny"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == {"here": str(folder), "python": sys.executable}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["notebook_sha256"] == provenance.file_sha256(source)
    assert manifest["parameters"]["seed"] == 7
    assert manifest["parameters"]["overrides"] == {"a": [1, None]}
    assert (folder / "tiny.ipynb").exists()
    assert execute.HANDED_ON not in os.environ


def test_a_failed_notebook_is_marked_and_its_executed_copy_kept(
    make_notebook: NotebookMaker, tmp_path: Path
) -> None:
    source = make_notebook(cells=(START, FINISH, "assert 1 > 2, 'the figure claims it'"))
    with pytest.raises(NotebookError, match="AssertionError: the figure claims it"):
        execute_notebook(source, run_dir=tmp_path / "a")
    frame = read_runs(tmp_path / "a").runs
    assert frame.loc[0, "status"] == "failed"  # although the notebook had called run.finish
    assert "the figure claims it" in frame.loc[0, "error"]
    executed = nbformat.read(tmp_path / "a" / "tiny.ipynb", as_version=4)
    assert any(cell.get("outputs") for cell in executed.cells)
    with pytest.raises(FileExistsError, match="failed"):
        execute_notebook(source, run_dir=tmp_path / "a")


def test_a_kernel_that_dies_leaves_a_failed_run(
    make_notebook: NotebookMaker, tmp_path: Path
) -> None:
    source = make_notebook(cells=(START, "import os\nos.kill(os.getpid(), 9)", FINISH))
    with pytest.raises(NotebookError, match="died"):
        execute_notebook(source, run_dir=tmp_path / "a")
    assert state_of(tmp_path / "a") == "failed"


def test_a_run_that_is_begun_must_be_finished(make_notebook: NotebookMaker, tmp_path: Path) -> None:
    with pytest.raises(NotebookError, match=r"without run\.finish"):
        execute_notebook(make_notebook(cells=(START,)), run_dir=tmp_path / "a")
    assert state_of(tmp_path / "a") == "failed"


def test_a_notebook_without_a_run_may_be_executed_too(
    make_notebook: NotebookMaker, tmp_path: Path
) -> None:
    execute_notebook(make_notebook(cells=("1 + 1",)), run_dir=tmp_path / "a")
    assert state_of(tmp_path / "a") == "finished"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"sedd": 4}, ValueError, r"no parameter 'sedd' \(did you mean 'seed'\?\)"),
        ({"seed": "4"}, TypeError, "seed='4' is str, expected int"),
        ({"seed": True}, TypeError, "seed=True is bool, expected int"),
        ({"seed": 4.0}, TypeError, "seed=4.0 is float, expected int"),
        ({"overrides": [1]}, TypeError, "overrides=.* is list, expected dict"),
    ],
)
def test_a_wrong_parameter_is_refused_before_anything_is_written(
    make_notebook: NotebookMaker, tmp_path: Path, given: dict, error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        execute_notebook(make_notebook(), given, run_dir=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_int_fits_a_float_and_none_fits_where_declared(make_notebook: NotebookMaker) -> None:
    source = make_notebook(parameters=("rate: float = 0.5", "limit: int | None = None"))
    declared = read_parameters(source)
    check_parameters(source, declared, {"rate": 1, "limit": None})
    with pytest.raises(TypeError, match="expected int or NoneType"):
        check_parameters(source, declared, {"limit": "x"})


@pytest.mark.parametrize("line", ["seed = 0", "seed: int = 1 + 1", "seed: tensor = 0", "import os"])
def test_a_parameters_cell_holds_annotated_literals_only(
    make_notebook: NotebookMaker, line: str
) -> None:
    with pytest.raises(ValueError, match="is not `name: type = literal`"):
        read_parameters(make_notebook(parameters=(line,)))


def test_a_notebook_without_parameters_cell_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bare.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]), path)
    with pytest.raises(ValueError, match='0 cells tagged "parameters"'):
        execute_notebook(path)


def test_a_misspelt_notebook_names_the_nearest(
    make_notebook: NotebookMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    (project / "notebooks").mkdir(parents=True)
    (project / "pyproject.toml").touch()
    make_notebook("15_rlsd").rename(project / "notebooks" / "15_rlsd.ipynb")
    monkeypatch.chdir(project)
    assert paths.find_notebook("15_rlsd").name == "15_rlsd.ipynb"
    with pytest.raises(FileNotFoundError, match="did you mean '15_rlsd'"):
        paths.find_notebook("15_rsld")


def test_braces_in_a_path_stay_braces(make_notebook: NotebookMaker, tmp_path: Path) -> None:
    folder = execute_notebook(make_notebook(), run_dir=tmp_path / "a{seed}")
    assert folder.name == "a{seed}"
    assert (folder / "tiny.ipynb").exists()


def test_plain_papermill_claims_and_fails_by_itself(
    make_notebook: NotebookMaker, tmp_path: Path
) -> None:
    import papermill

    for name, last, expected in (("good", FINISH, "finished"), ("bad", "1 / 0", "failed")):
        source = make_notebook(name, cells=(START, last))
        parameters = {"run_dir": str(tmp_path / name)}
        target = tmp_path / f"{name}-out.ipynb"
        try:
            papermill.execute_notebook(str(source), str(target), parameters, progress_bar=False)
        except papermill.PapermillExecutionError:
            assert expected == "failed"
        assert state_of(tmp_path / name) == expected
    assert read_runs(tmp_path / "bad").runs.loc[0, "error"].startswith("ZeroDivisionError")


def test_the_start_cell_may_be_run_again_in_the_same_kernel(
    make_notebook: NotebookMaker, tmp_path: Path
) -> None:
    import papermill

    source = make_notebook(cells=(START, 'run.log(1, {"reward": 0.0})', START, FINISH))
    out = tmp_path / "out.ipynb"
    where = {"run_dir": str(tmp_path / "a")}
    papermill.execute_notebook(str(source), str(out), where, progress_bar=False)
    assert [row["reward"] for row in read_lines(tmp_path / "a" / "metrics.jsonl")] == [0.5]
    with pytest.raises(papermill.PapermillExecutionError, match="FileExistsError"):
        papermill.execute_notebook(str(source), str(out), where, progress_bar=False)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-5", 1e-5),
        ("True", True),
        ("false", False),
        ("None", None),
        ("none", "none"),
        ("no", "no"),
        ("lab", "lab"),
        ("{}", {}),
        ("{learning_rate: 1e-5, beta: 0}", {"learning_rate": 1e-5, "beta": 0}),
        ('{"a": [1, null, "x"]}', {"a": [1, None, "x"]}),
    ],
)
def test_command_line_values(text: str, value: object) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_text_stays_text_where_text_is_declared_and_bad_yaml_is_named() -> None:
    assert parse_value("007", Parameter("run_dir", (str,), "")) == "007"
    with pytest.raises(ValueError, match="not valid YAML"):
        parse_value("{a: [1}")
