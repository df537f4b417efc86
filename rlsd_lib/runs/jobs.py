"""The jobs of a suite: how each stands, how long the rest takes, and the loop that runs them.

Finished runs are kept, so the same command continues a suite that was stopped. A run that failed by
an error of its own would fail again: it is listed, and made again on demand.
"""

import heapq
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from rlsd_lib.runs.parameters import as_text
from rlsd_lib.runs.records import manifest_or_none, owned, read_manifest, state_of

INTERRUPTED = ("KeyboardInterrupt", "Stopped: ")  # how the reasons begin


@dataclass(frozen=True)
class Job:
    """One run of a suite."""

    notebook: str
    parameters: dict[str, Any]
    run_dir: Path

    def command(self, if_exists: str = "skip") -> list[str]:
        """The command line that makes this run, or with "resume" goes on with an unfinished one."""
        words = [sys.executable, "-m", "rlsd_lib", "run", self.notebook]
        for name, value in self.parameters.items():
            words += ["-p", f"{name}={as_text(value)}"]
        return [*words, "--run-dir", str(self.run_dir), "--if-exists", if_exists]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What runs of about the same length have in common."""
        return (self.notebook, *(self.parameters.get(name) for name in ("preset", "max_steps")))

    def state(self) -> str:
        """finished, failed, running (by another process), or to run.

        A run that was killed, or interrupted by the keyboard or a cluster, is to run: nothing is
        wrong with it.
        """
        found = state_of(self.run_dir)
        if found == "failed" and read_manifest(self.run_dir)["error"].startswith(INTERRUPTED):
            return "to run"
        return found if found in ("finished", "failed", "running") else "to run"


@dataclass(frozen=True)
class Outcome:
    """What became of a job, after `seconds` of work.

    `status` is "done", "kept" (it was finished), "failed" (now), "failed before" (and not made
    again) or "busy" (another process writes it); `error` says why there is no result.
    """

    job: Job
    status: str
    seconds: float = 0.0
    error: str | None = None


def settle(jobs: Sequence[Job], retry_failed: bool) -> tuple[list[Outcome], list[Job]]:
    """The outcomes of the jobs that need no run, and the other jobs."""
    settled, rest = [], []
    for job in jobs:
        state = job.state()
        if state == "finished":
            settled.append(Outcome(job, "kept"))
        elif state == "running":
            settled.append(Outcome(job, "busy", error=owned(job.run_dir)))
        elif state == "failed" and not retry_failed:
            reason = read_manifest(job.run_dir)["error"]
            settled.append(Outcome(job, "failed before", error=reason))
        else:
            rest.append(job)
    return settled, rest


def run_jobs(jobs: Sequence[Job], workers: int, if_exists: str = "skip") -> Iterator[Outcome]:
    """Make the runs of `jobs`, at most `workers` at a time; outcomes come as they end.

    Of what is there, "skip" begins again, "resume" goes on from the last checkpoint.
    """
    with ThreadPoolExecutor(workers) as pool:
        sent = [pool.submit(_run_job, job, workers, if_exists) for job in jobs]
        try:
            yield from (done.result() for done in as_completed(sent))
        finally:
            pool.shutdown(cancel_futures=True)


def _run_job(job: Job, workers: int, if_exists: str) -> Outcome:
    begun = time.monotonic()
    # Side by side, processes that each take all cores slow one another down.
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    done = subprocess.run(job.command(if_exists), env=environment, capture_output=True, text=True)
    seconds = time.monotonic() - begun
    if done.returncode == 0:
        return Outcome(job, "done", seconds)
    return Outcome(job, "failed", seconds, done.stderr.strip()[-2000:] or "no error output")


def seconds_taken(
    jobs: Sequence[Job],
) -> tuple[dict[tuple[Any, ...], list[float]], dict[Path, float]]:
    """Seconds that finished runs took, by kind, and those at work so far, by run directory."""
    took, so_far = defaultdict(list), {}
    for job in jobs:
        state, manifest = job.state(), manifest_or_none(job.run_dir)
        if state == "finished":
            took[job.kind].append(manifest["seconds"])
        elif state == "running" and manifest:  # it may have only just begun
            begun = datetime.fromisoformat(manifest["started"])
            so_far[job.run_dir] = (datetime.now(UTC) - begun).total_seconds()
    return took, so_far


def time_left(
    jobs: Sequence[Job],
    took: Mapping[tuple[Any, ...], Sequence[float]],
    so_far: Mapping[Path, float],
    workers: int,
) -> float | None:
    """Seconds until all of `jobs` have ended, `workers` at a time, in their order.

    A job is expected to take the mean of its kind in `took`, or of everything where its kind has
    not been seen, less what it has taken `so_far`. None where nothing is known yet.
    """
    every = list(chain.from_iterable(took.values()))
    if not every:
        return None
    free = [0.0] * workers  # when each worker is free again
    for job in sorted(jobs, key=lambda job: job.run_dir not in so_far):
        expected = fmean(took.get(job.kind) or every)
        rest = max(expected - so_far.get(job.run_dir, 0.0), 0.0)
        heapq.heappush(free, heapq.heappop(free) + rest)
    return max(free)
