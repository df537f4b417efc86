"""One of the processes that train a run together.

    accelerate launch ... -m rlsd_lib.experiment.worker RUN_DIR

It attaches to a run that a notebook has begun, rebuilds the experiment from the manifest, trains,
and leaves the trained weights in the run directory, from where the notebook reads them.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil

from rlsd_lib.experiment.experiment import Experiment
from rlsd_lib.experiment.launch import ERRORS, LAUNCHER, RESULT
from rlsd_lib.experiment.training import MODEL, train_here
from rlsd_lib.runs.records import append_lines, write_json


def main(run_dir: str) -> None:
    """Train the run in `run_dir` as one of several processes; on failure, say why in its folder."""
    _end_with_launcher()
    folder = Path(run_dir).resolve()
    try:
        trained = train_here(Experiment.attach(folder), folder / MODEL)
    except Exception as error:
        rank = int(os.environ.get("RANK", 0))
        line = {"rank": rank, "kind": type(error).__name__, "message": str(error)}
        append_lines(folder / ERRORS, [line])
        raise
    if int(os.environ.get("RANK", 0)) == 0:
        del trained["steps"]  # metrics.jsonl holds them
        write_json(folder / RESULT, trained)


def _end_with_launcher() -> None:
    """End this process when the one that launched it is gone, however that one was killed."""
    launcher = os.environ.get(LAUNCHER)
    # Another machine's processes cannot be looked up; their launcher ends them.
    if launcher and int(os.environ.get("GROUP_RANK", 0)) == 0:
        threading.Thread(target=_watch, args=(int(launcher), os.getppid()), daemon=True).start()


def _watch(launcher: int, parent: int) -> None:
    process = psutil.Process(launcher) if psutil.pid_exists(launcher) else None
    while process and process.is_running() and os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
