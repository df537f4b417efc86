"""Processes forked from one that has imported what a training notebook imports.

A process that starts from nothing spends 7 processor seconds on torch, TRL and transformers before
its first line. Some tests still pay them, because a user does: `COLD` in test_training_notebooks.
"""

import atexit
import gc
import io
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from rlsd_lib.runs.execute import KERNEL

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["rlsd_lib.experiment.experiment"])


def process(target: Callable[..., Any], *args: Any) -> BaseProcess:
    """A process of the server's, not started; the server is, where there is none."""
    with pytest.MonkeyPatch.context() as patch:
        # Libraries read these when they are imported.
        for name, value in {**KERNEL, "DS_ACCELERATOR": "cpu"}.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return FORKS.Process(target=target, args=args)


class Forked:
    """`target(*args)` in a process group of its own, with what is used of `subprocess.Popen`."""

    stdout = stderr = None

    def __init__(
        self, target: Callable[..., Any], *args: Any, env: Mapping[str, str], errors: Path | None
    ) -> None:
        ready, ours = FORKS.Pipe(duplex=False)
        self._process = process(_run, ours, dict(env), errors, target, *args)
        self._process.start()
        ours.close()
        ready.recv()  # before that a signal to its group would go to the group of the server
        self.pid, self.stdin = self._process.pid, io.BytesIO()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self.poll()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self._process.kill()


def _run(
    ready: Connection, env: dict[str, str], errors: Path | None, target: Callable, *args: Any
) -> None:
    gc.freeze()  # as in conftest.py
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    if errors:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    ready.send(None)
    try:
        target(*args)
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


@contextmanager
def forked_kernels() -> Iterator[None]:
    """Inside of it every kernel that this process starts is a forked one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jupyter_client.launcher.Popen", _kernel)
        yield


def _kernel(command: list[str], *, env: dict[str, str], cwd: str | None, **_: Any) -> Forked:
    return Forked(_be, command, cwd or os.getcwd(), env=env, errors=None)


def _be(command: list[str], folder: str) -> None:
    """Run what `command`, an interpreter with "-m" and a module, would run in `folder`."""
    os.chdir(folder)
    _, _, module, *sys.argv[1:] = command
    runpy.run_module(module, run_name="__main__", alter_sys=True)
