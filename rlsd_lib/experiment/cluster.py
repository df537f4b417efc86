"""The runs of a suite as jobs of a cluster, through submitit: SLURM, or its stand-in on one machine.

A job is the same command line that `rlsd suite` runs by itself. Shortly before its time is up, or
when it is pre-empted, the run saves, stops, and is queued again to go on from there.
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import submitit

from rlsd_lib.runs.paths import outputs_root
from rlsd_lib.runs.processes import kill_tree
from rlsd_lib.runs.records import manifest_or_none, state_of
from rlsd_lib.runs.run import Run
from rlsd_lib.runs.suites import Job, Outcome

TIMEOUT_MIN = 24 * 60  # of a job that names none; submitit's own is five minutes
TICK_SECONDS = 0.5


class ClusterRun:
    """One run, as submitit calls it on a node."""

    process: subprocess.Popen | None = None

    def __call__(self, job: Job, if_exists: str) -> Outcome:
        """Make the run in a process of its own, which is not left behind."""
        begun = time.monotonic()
        with tempfile.TemporaryFile("w+") as errors:
            # A session of its own: submitit's signal to this process must not end the run.
            command = job.command(if_exists)
            self.process = subprocess.Popen(command, stderr=errors, start_new_session=True)
            try:
                status = self.process.wait()
            finally:
                kill_tree(self.process.pid)
            errors.seek(0)
            said = errors.read().strip()[-2000:] or "no error output"
        seconds = time.monotonic() - begun
        if status == 0:
            return Outcome(job, "done", seconds)
        # Only on this host can be seen that the process of the run was killed.
        if state_of(job.run_dir) == "running/killed" and manifest_or_none(job.run_dir):
            Run.attach(job.run_dir).fail(f"killed, exit status {status}")
        return Outcome(job, "failed", seconds, said)

    def checkpoint(self, job: Job, if_exists: str) -> submitit.helpers.DelayedSubmission:
        """Called by submitit in a signal handler: let the run save, and queue what is left of it."""
        if self.process is not None:
            self.process.terminate()
            # `Popen.wait` would want the lock that the interrupted `wait` holds.
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(ClusterRun(), job, "resume")


def run_submitted(
    jobs: Sequence[Job],
    workers: int,
    cluster: str,
    options: Mapping[str, Any],
    if_exists: str = "skip",
) -> Iterator[Outcome]:
    """Submit `jobs`, `workers` at a time; outcomes come as they end, failures among them.

    `cluster` is "slurm", or "local" for processes of this machine; `options` are submitit's. Raises
    ValueError for an option that submitit does not know.
    """
    executor = submitit.AutoExecutor(outputs_root() / "submitit", cluster=cluster)
    try:
        executor.update_parameters(**{"timeout_min": TIMEOUT_MIN, "name": "rlsd", **options})
    except (NameError, TypeError) as error:  # how submitit says that it does not know a name
        raise ValueError(f"--submitit-options: {error}") from error
    return _work(executor, jobs, workers, if_exists)


def _work(
    executor: submitit.AutoExecutor, waiting: Sequence[Job], limit: int, if_exists: str
) -> Iterator[Outcome]:
    """Keep up to `limit` jobs submitted until all have ended; whoever leaves early cancels them."""
    running: list[tuple[Job, submitit.Job]] = []
    try:
        while waiting or running:
            free = limit - len(running)
            wave, waiting = waiting[:free], waiting[free:]
            if wave:
                with executor.batch():  # one array job on SLURM
                    sent = [executor.submit(ClusterRun(), job, if_exists) for job in wave]
                running += zip(wave, sent, strict=True)
            for done in [pair for pair in running if pair[1].done()]:
                running.remove(done)
                job, submitted = done
                try:
                    outcome = submitted.result()
                except Exception as error:  # the job's own traceback, or that it never ended
                    said = f"{type(error).__name__}: {str(error)[-2000:]}"
                    outcome = Outcome(job, "failed", error=said)
                yield outcome
            time.sleep(TICK_SECONDS)
    finally:
        for _, submitted in running:
            submitted.cancel()
