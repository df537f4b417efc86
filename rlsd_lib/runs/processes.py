"""SIGTERM, which clusters and schedulers send some time before they kill: who does what on it."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil


@contextmanager
def on_sigterm(action: Callable[[], None]) -> Iterator[None]:
    """Do `action` on a SIGTERM that comes inside; only a main thread can, elsewhere nothing is set."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def terminate_children() -> None:
    """Hand a SIGTERM on to every process that this one has started."""
    for child in psutil.Process().children():
        child.terminate()


def kill_tree(pid: int) -> None:
    """Kill a process and all that it started; nothing happens where it is gone."""
    try:
        parent = psutil.Process(pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
