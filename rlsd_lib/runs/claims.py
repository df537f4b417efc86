"""Who owns a run folder: one owner at a time, without locks that outlive their holder.

Every attempt at a run has a number and a file `.claim-<number>` that its owner creates
exclusively. A next attempt may only be made once the latest one is over, and two processes that
judge so at the same moment reach for the same next number, which only one of them can create.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil


class Claim(NamedTuple):
    """The owner of one attempt: process, host and when the process began."""

    attempt: int
    pid: int
    host: str
    process_started: float  # see `process_start`

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def is_mine(self) -> bool:
        """Whether this very process made the claim."""
        return self.pid == os.getpid() and self.is_local() and self.is_alive()

    def is_local(self) -> bool:
        """Whether the owner lives on this host, so that it can be looked up."""
        return self.host == socket.gethostname()

    def is_alive(self) -> bool:
        """Whether the owner still runs. An owner on another host counts as alive."""
        if not self.is_local():
            return True
        try:
            # A number may be given out again: the same process also began at the same time.
            began = process_start(self.pid) == self.process_started
            return began and psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def owned(folder: Path, owner: Claim) -> str:
    """Who writes in `folder`, and what to do should that process be gone."""
    return (
        f"{folder} is being written by {owner}. Wait for it or choose another run_dir; if you know "
        f"that process to be gone, delete {claim_path(folder, owner.attempt)}"
    )


def process_start(pid: int) -> float:
    """When a process began, as a number that does not change while it lives.

    Raises:
        psutil.NoSuchProcess: there is no such process.
    """
    if sys.platform != "linux":
        return psutil.Process(pid).create_time()
    # In ticks since boot: a time of day would move when the clock is set, and the owner look dead.
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    return float(stat.rpartition(")")[2].split()[19])


def claim_path(folder: Path, attempt: int) -> Path:
    """The file that says who owns attempt number `attempt`."""
    return folder / f".claim-{attempt}"


def latest_claim(folder: Path) -> Claim | None:
    """The claim with the highest number, or None.

    Raises:
        RuntimeError: the claim file stays empty, so its owner died within the act of claiming.
    """
    found = [int(p.name.removeprefix(".claim-")) for p in folder.glob(".claim-*")]
    return _read(folder, max(found)) if found else None


def _read(folder: Path, attempt: int) -> Claim:
    path = claim_path(folder, attempt)
    for _ in range(20):  # the file is created first and filled a moment later
        text = path.read_text()
        if text:
            return Claim(attempt, **json.loads(text))
        time.sleep(0.05)
    raise RuntimeError(f"{path} is empty: its owner died while claiming. Delete it and start again")


def make_claim(folder: Path, attempt: int) -> Claim:
    """Claim attempt number `attempt` of a run for this process.

    Raises:
        FileExistsError: another process was faster; the message names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = claim_path(folder, attempt)
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        owner = _read(folder, attempt)
        raise FileExistsError(f"{folder} was claimed a moment ago by {owner}") from None
    owner: dict[str, Any] = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "process_started": process_start(os.getpid()),
    }
    with os.fdopen(handle, "w") as file:
        file.write(json.dumps(owner))
    return Claim(attempt, **owner)
