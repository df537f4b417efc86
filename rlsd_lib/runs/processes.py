"""Ending processes: on ctrl-C or the SIGTERM of a cluster some time before it kills, or at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil


@contextmanager
def on_sigterm(
    action: Callable[[], None], number: signal.Signals = signal.SIGTERM
) -> Iterator[None]:
    """Do `action` on a SIGTERM, or the signal `number`, inside; in other threads do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, lambda *_: action())
    try:
        yield
    finally:
        signal.signal(number, before)


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
