"""Ending processes: on SIGTERM, which clusters send some time before they kill, or at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil


@contextmanager
def on_sigterm(action: Callable[[], None]) -> Iterator[None]:
    """Do `action` on a SIGTERM that comes inside; outside of the main thread, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def terminate_children() -> None:
    """Send a SIGTERM to every process that this one has started."""
    for child in psutil.Process().children():
        child.terminate()


def kill_tree(pid: int) -> None:
    """Kill a process and all that it started; nothing happens where it is gone."""
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in (*parent.children(recursive=True), parent):
            with suppress(psutil.NoSuchProcess):
                process.kill()
