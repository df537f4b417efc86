"""Several processes: the shipped configs, failures, and (slow) what ends one of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from peft import LoraConfig, get_peft_model

from rlsd_lib import Experiment
from rlsd_lib.experiment import launch as launcher
from rlsd_lib.experiment.experiment import take_weights
from rlsd_lib.experiment.launch import accelerate_config, failure, launch_command
from rlsd_lib.experiment.presets import PRESETS
from rlsd_lib.experiment.workbook_trainer import Stopped
from rlsd_lib.runs.records import append_lines, read_lines, state_of


def test_an_experiment_is_refused_before_it_claims_a_directory(tmp_path, monkeypatch) -> None:
    given = {"method": "rlsd", "preset": "smoke", "run_dir": str(tmp_path / "a")}
    with pytest.raises(ValueError, match="num_processes=3 does not divide"):
        Experiment(**given, num_processes=3)
    monkeypatch.setenv(launcher.CONFIG, "zero-3")
    with pytest.raises(FileNotFoundError, match=r"'zero-3' \(did you mean 'zero3'\?\)"):
        Experiment(**given, num_processes=2)
    assert not (tmp_path / "a").exists()


def test_the_shipped_configs_are_what_their_names_say(tmp_path, monkeypatch) -> None:
    kinds = {}
    for path in launcher.CONFIGS.glob("*.yaml"):
        monkeypatch.setenv(launcher.CONFIG, path.stem)
        assert accelerate_config() == path.resolve()
        kinds[path.stem] = load_config_from_file(str(path)).distributed_type.value
    expected = {"multi_cpu": "MULTI_GPU", "multi_gpu": "MULTI_GPU"}
    assert kinds == {**expected, "fsdp2": "FSDP", "zero3": "DEEPSPEED"}
    monkeypatch.delenv(launcher.CONFIG)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert accelerate_config().stem == "multi_cpu"
    # What the paper's preset was planned with is what it is launched with.
    assert accelerate_config(PRESETS["qwen3-vl-8b"].accelerate).stem == "fsdp2"

    own = tmp_path / "two_nodes.yaml"
    shipped = yaml.safe_load((launcher.CONFIGS / "multi_gpu.yaml").read_text())
    own.write_text(yaml.safe_dump({**shipped, "num_machines": 2}))
    monkeypatch.setenv(launcher.CONFIG, str(own))
    assert accelerate_config() == own
    # Machines must agree on a port; runs on one machine must not.
    assert "--main_process_port" not in launch_command(own, 16, tmp_path)
    assert "--main_process_port" in launch_command(launcher.CONFIGS / "multi_gpu.yaml", 2, tmp_path)


REPORT = """
Root Cause (first observed failure):
[0]:
  time      : 2026-01-01_00:00:00
  host      : here
  rank      : 1 (local_rank: 1)
  exitcode  : {code} (pid: 4711)
"""


def test_a_failed_launch_names_the_first_process_and_its_reason(tmp_path) -> None:
    log = tmp_path / launcher.LOG
    log.write_text("no such option: --speed")
    assert "code 2: ...no such option: --speed" in str(failure(tmp_path, 2))
    lines = [
        {"rank": 1, "kind": "ValueError", "message": "bad row"},
        {"rank": 0, "kind": "RuntimeError", "message": "Connection closed by peer"},
    ]
    append_lines(tmp_path / launcher.ERRORS, lines)
    log.write_text(REPORT.format(code=1))
    assert str(failure(tmp_path, 1)).startswith("rank 1 failed: ValueError: bad row. See ")
    log.write_text(REPORT.format(code=-9))
    error = failure(tmp_path, 1)
    assert not isinstance(error, Stopped)
    assert str(error).startswith("rank 1 (process 4711) was ended by SIGKILL; ")
    append_lines(tmp_path / launcher.ERRORS, [{"rank": 0, "kind": "Stopped", "message": "after 3"}])
    assert isinstance(failure(tmp_path, 1), Stopped)


# ---- the whole path, with real processes --------------------------------------------------------


def start(folder: Path, outputs: Path, *words: str) -> subprocess.Popen:
    overrides = 'overrides={"save_steps": 1, "save_total_limit": 2}'
    given = ["-p", "preset=smoke", "-p", overrides, "-p", "max_steps=12", "--num-processes", "2"]
    command = [sys.executable, "-m", "rlsd_lib", "run", "15_rlsd", "--run-dir", str(folder)]
    return subprocess.Popen(
        [*command, *given, *words],
        env={**os.environ, "RLSD_OUTPUTS": str(outputs)},
        stderr=subprocess.PIPE,
        text=True,
    )


def workers(folder: Path) -> dict[int, psutil.Process]:
    """The processes that train the run in `folder`, by rank."""
    found = {}
    for process in psutil.process_iter():
        try:
            if process.cmdline()[-2:] == ["rlsd_lib.experiment.launch", str(folder)]:
                found[int(process.environ()["RANK"])] = process
        except (psutil.Error, KeyError):
            continue
    return found


def once_training(folder: Path, run: subprocess.Popen) -> dict[int, psutil.Process]:
    """The workers, once they have logged two steps."""
    file = folder / "metrics.jsonl"
    while not file.exists() or len(read_lines(file, torn=True)) < 2:
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.1)
    return workers(folder)


def gone(folder: Path) -> bool:
    end = time.monotonic() + 60
    while workers(folder) and time.monotonic() < end:
        time.sleep(0.2)
    return not workers(folder)


@pytest.mark.parametrize("adapter", [False, True])
def test_trained_weights_are_taken_from_the_workers_folder(tmp_path, adapter) -> None:
    """What launched workers leave: a whole model, or with PEFT an adapter of it."""
    model, trained = tiny.model(), tiny.model()
    if adapter:
        trained = get_peft_model(trained, LoraConfig(target_modules="all-linear"))
    with torch.no_grad():
        for weight in trained.parameters():
            weight += torch.randn_like(weight) * 0.1 * weight.requires_grad
    trained.save_pretrained(tmp_path)
    ids = torch.arange(5)[None]
    before = model(ids).logits
    take_weights(model, tmp_path)
    assert torch.equal(model(ids).logits, trained.eval()(ids).logits)
    assert not torch.equal(model(ids).logits, before)


@pytest.mark.slow
def test_a_killed_rank_fails_the_run_which_resumes(tmp_path, shared_outputs) -> None:
    folder = tmp_path / "run"
    run = start(folder, shared_outputs)
    once_training(folder, run)[1].kill()
    assert run.wait() == 1
    assert "rank 1" in (said := run.stderr.read())
    assert "SIGKILL" in said
    assert state_of(folder) == "failed"
    assert gone(folder)

    again = start(folder, shared_outputs, "--if-exists", "resume")
    assert again.wait() == 0, again.stderr.read()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["status"], manifest["attempt"]) == ("finished", 2)
    assert manifest["launch"]["config"]["use_cpu"] is True
    assert [row["step"] for row in read_lines(folder / "metrics.jsonl")] == list(range(1, 13))
    assert json.loads((folder / "metrics.json").read_text())["steps"] == 12
    assert (folder / "model").exists() == PRESETS["smoke"].save_model


@pytest.mark.slow
def test_sigterm_to_the_command_saves_on_every_rank(tmp_path, shared_outputs) -> None:
    folder = tmp_path / "run"
    run = start(folder, shared_outputs)
    once_training(folder, run)
    run.send_signal(signal.SIGTERM)
    assert run.wait() == 130
    assert "interrupted: stopped by SIGTERM after step" in run.stderr.read()
    assert state_of(folder) == "interrupted"
    last = max(row["step"] for row in read_lines(folder / "metrics.jsonl"))
    saved = folder / "checkpoints" / f"checkpoint-{last}"
    assert {"trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"} <= {
        path.name for path in saved.iterdir()
    }
    assert gone(folder)


@pytest.mark.slow
def test_no_worker_outlives_a_kernel_that_is_killed(tmp_path, shared_outputs) -> None:
    folder = tmp_path / "run"
    run = start(folder, shared_outputs)
    ranks = once_training(folder, run)
    kernel = ranks[0].parent().parent()
    assert "ipykernel_launcher" in " ".join(kernel.cmdline())
    kernel.kill()
    assert run.wait() == 1
    assert gone(folder)
    assert state_of(folder) == "failed"
