"""Training on several processes: start them with accelerate, follow them, end them.

    accelerate launch ... -m rlsd_lib.experiment.launch RUN_DIR

is one of them (`main`): it attaches to the run that a notebook has begun, rebuilds the experiment
from the manifest, and trains. Rank 0 writes the metrics; the notebook reads the trained weights from
the run directory.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from rlsd_lib.experiment.workbook_trainer import Stopped
from rlsd_lib.names import nearest
from rlsd_lib.runs.paths import outputs_root
from rlsd_lib.runs.processes import kill_tree, on_sigterm
from rlsd_lib.runs.records import append_lines, read_lines, write_json
from rlsd_lib.runs.run import HANDED_ON, Run

CONFIG = "RLSD_ACCELERATE"  # environment variable: name of a shipped config, or path of one
LAUNCHER = "RLSD_LAUNCHER"  # environment variable: id of the process that no worker may outlive
CONFIGS = Path(__file__).parent / "accelerate"
LOG, ERRORS, RESULT = "workers.log", "worker_errors.jsonl", "training.json"
GRACE_SECONDS = 3600  # for the last step and its checkpoint, once a SIGTERM has come
TICK_SECONDS = 0.5
# Of a process that a signal ended first, in the report of torch's launcher.
ROOT_CAUSE = re.compile(r"rank\s*:\s*(\d+).*?exitcode\s*:\s*-(\d+)\s*\(pid:\s*(\d+)\)", re.DOTALL)


def accelerate_config(preset: str = "") -> Path:
    """The accelerate config that RLSD_ACCELERATE names, else `preset`, else one by the hardware.

    Raises FileNotFoundError if there is neither a shipped config nor a file of that name.
    """
    by_hardware = "multi_gpu" if torch.cuda.is_available() else "multi_cpu"
    name = os.environ.get(CONFIG) or preset or by_hardware
    for path in (CONFIGS / f"{name}.yaml", Path(name).expanduser()):
        if path.is_file():
            return path.resolve()
    known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    raise FileNotFoundError(f"no accelerate config {name!r}{nearest(name, known)}, nor such a file")


def launch_command(config: Path, num_processes: int, run_dir: Path) -> list[str]:
    """The command line that trains the run in `run_dir` on `num_processes` processes."""
    alone = (yaml.safe_load(config.read_text()).get("num_machines") or 1) == 1
    # Any free port, so that runs side by side do not meet; several machines must agree on one.
    port = ["--main_process_port", "0"] if alone else []
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    count = ["--num_processes", str(num_processes)]
    return [*launcher, *count, *port, "-m", "rlsd_lib.experiment.launch", str(run_dir)]


def run_workers(run: Run, num_processes: int, on_tick: Callable[[], None]) -> dict[str, Any]:
    """Train the open run on `num_processes` of all machines; returns what the workers wrote of it.

    `on_tick` is called every `TICK_SECONDS`. A SIGTERM is passed on, and no worker outlives this
    call. Raises RuntimeError with the reason or the end of the log if a process failed; Stopped
    after a SIGTERM and their checkpoint.
    """
    config = accelerate_config(run.manifest["preset"]["accelerate"])
    command = launch_command(config, num_processes, run.path)
    run.record(launch={"command": command, "config": yaml.safe_load(config.read_text())})
    for name in (ERRORS, RESULT):
        (run.path / name).unlink(missing_ok=True)
    with (run.path / LOG).open("w") as log, _running(command, log, run.path) as process:
        while process.poll() is None:
            time.sleep(TICK_SECONDS)
            on_tick()
    if process.returncode != 0 or not (run.path / RESULT).exists():
        raise failure(run.path, process.returncode)
    return json.loads((run.path / RESULT).read_text())


@contextmanager
def _running(command: list[str], log: Any, folder: Path) -> Iterator[subprocess.Popen]:
    """The launcher in a session of its own, so that ctrl-C reaches this process alone."""
    environment = {name: value for name, value in os.environ.items() if name != HANDED_ON}
    environment |= {
        LAUNCHER: str(os.getpid()),
        "RLSD_OUTPUTS": str(outputs_root()),
        "MPLBACKEND": "agg",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(GRACE_SECONDS),
    }
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    process = subprocess.Popen(
        command, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True
    )
    try:
        with on_sigterm(process.terminate):
            yield process
    finally:
        kill_tree(process.pid)
        process.wait()


def failure(folder: Path, code: int) -> RuntimeError:
    """The error for a launch that ended with `code`: the first process that failed, and why."""
    log = (folder / LOG).read_text(errors="replace")
    errors = read_lines(folder / ERRORS, torn=True)
    if stopped := next((e for e in errors if e["kind"] == Stopped.__name__), None):
        return Stopped(stopped["message"])
    if killed := ROOT_CAUSE.search(log.rpartition("Root Cause")[2]):
        rank, number, pid = killed.groups()
        name = signal.Signals(int(number)).name
        said = f"rank {rank} (process {pid}) was ended by {name}; the others were stopped"
    elif errors:
        first = errors[0]
        said = f"rank {first['rank']} failed: {first['kind']}: {first['message']}"
    else:
        said = f"accelerate ended with code {code}: ...{log[-1500:]}"
    return RuntimeError(f"{said}. See {folder / LOG}")


def main(run_dir: str) -> None:
    """Train the run in `run_dir` as one of several processes; on failure, say why in its folder."""
    from rlsd_lib import Experiment  # only here: the experiment imports this module

    if LAUNCHER in os.environ:  # not on other machines, where a shell starts and ends accelerate
        family = os.getppid(), int(os.environ[LAUNCHER])
        threading.Thread(target=_end_with, args=family, daemon=True).start()
    folder, rank = Path(run_dir).resolve(), int(os.environ.get("RANK", 0))
    try:
        trained = Experiment.attach(folder).train_here(save=True)
    except Exception as error:
        line = {"rank": rank, "kind": type(error).__name__, "message": str(error)}
        append_lines(folder / ERRORS, [line])
        raise
    if rank == 0:
        del trained["steps"]  # metrics.jsonl has them
        write_json(folder / RESULT, trained)


def _end_with(parent: int, launcher: int) -> None:
    """Kill this process once `parent` or its parent `launcher` is gone: orphans get another one."""
    with suppress(psutil.NoSuchProcess):
        while os.getppid() == parent and psutil.Process(parent).ppid() == launcher:
            time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
