"""Runs judged before anything exists, in a process of its own.

The command that starts a kernel then keeps no torch in memory, and no GPU from the kernel.
"""

import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any


def judged(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """As `preflight.check`, which takes seconds to import; runs that train nothing are left out."""
    if not (runs := [full for full in runs if {"method", "preset"} <= full.keys()]):
        return []
    deaf = signal.signal, (signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for the process that asks
    with ProcessPoolExecutor(1, get_context("spawn"), *deaf) as pool:
        return pool.submit(_judge, runs).result()


def _judge(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    from rlsd_lib.experiment.preflight import check

    return check(runs)
