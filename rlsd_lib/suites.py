"""Suites: named sets of runs, as data, and the loop that works through one.

A suite is a list of grids, a grid is notebooks times parameter values. Everything that is finished
already is kept, so a suite that was interrupted is continued by the same command. A run that failed
by an error of its own would fail again: it is listed, and made again on demand.
"""

import heapq
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from rlsd_lib.execute import check_parameters, read_parameters
from rlsd_lib.provenance import default_run_dir, find_notebook, nearest
from rlsd_lib.records import read_manifest, state_of


@dataclass(frozen=True)
class Grid:
    """Every notebook with every combination of the listed values, the first parameter outermost."""

    notebooks: Sequence[str]
    parameters: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """A named set of runs with one line that says what it is for."""

    purpose: str
    grids: Sequence[Grid]


LAB = {"preset": ("lab",)}
SEEDS = (0, 1, 2)
FIVE_SEEDS = (0, 1, 2, 3, 4)
BASELINES = ("10_grpo", "15_rlsd", "11_opd", "12_opsd", "13_sdpo", "14_grpo_opsd")
TOP1 = ("opsd_teacher_top1", "opsd_student_top1")
# Where lambda decays to 0 a run is GRPO from step 50 on, and the constant ones show it by then.
SHORT = {"max_steps": (80,)}
# Credit at its strongest: what the paper's lambda and clip hold back.
STRONG = {"lambda_init": 1.0, "lambda_decay_steps": 0, "epsilon_w": 0.9}
ABLATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"lambda_init": 1.0, "lambda_decay_steps": 0},
    STRONG,
    {**STRONG, "epsilon_w": 9.0},
    {**STRONG, "epsilon_w": 9.0, "weight_clip": "log"},
    {**STRONG, "epsilon_w": 9.0, "weight_clip": "log", "conserve_credit": True},
    {**STRONG, "teacher_model_kind": "live"},
    {**STRONG, "teacher_model_kind": "base"},
)
# The live teacher of Algorithm 1 and a constant lambda; clips that reach as far down as up.
DRIFT = {
    "lambda_init": 1.0,
    "lambda_decay_steps": 0,
    "teacher_model_kind": "live",
    "weight_clip": "log",
}
NEUTRALS = ("rlsd", "rlsd_neutral")
CLIPS = (0.2, 1.0, 9.0)

SUITES: dict[str, Suite] = {
    "demo": Suite(
        purpose="GRPO, OPSD and RLSD on the lab from the same start: the main job, in minutes",
        grids=(
            Grid(
                ("10_grpo", "15_rlsd", "12_opsd"),
                {**LAB, "seed": (0,), "max_steps": (100,)},
            ),
        ),
    ),
    "paper": Suite(
        purpose="the paper's table on the lab: every method, five seeds, 200 steps, as printed",
        grids=(
            Grid(BASELINES, {"seed": FIVE_SEEDS, **LAB}),
            Grid(("12_opsd",), {"seed": FIVE_SEEDS, **LAB, "method": TOP1}),
            Grid(("10_grpo",), {"seed": FIVE_SEEDS, **LAB, "max_steps": (400,)}),
        ),
    ),
    "ablations": Suite(
        purpose="lambda, its decay, the clip, the teacher's freshness, and what it is shown",
        grids=(
            Grid(("10_grpo",), {"seed": SEEDS, **LAB, **SHORT}),
            Grid(("15_rlsd",), {"seed": SEEDS, **LAB, **SHORT, "overrides": ABLATIONS}),
            Grid(
                ("15_rlsd",),
                {"seed": SEEDS, "preset": ("lab-trace",), **SHORT, "overrides": ({}, STRONG)},
            ),
        ),
    ),
    "controls": Suite(
        purpose="what RLSD's teacher must not be able to do without: the true reference",
        grids=(
            Grid(
                ("15_rlsd",),
                {
                    "seed": SEEDS,
                    **LAB,
                    **SHORT,
                    "control": ("none", "shuffled", "wrong", "noise", "empty"),
                    # Strong, because the paper's numbers leave a control little to change.
                    "overrides": (STRONG,),
                },
            ),
            Grid(("15_rlsd",), {"seed": SEEDS, **LAB, **SHORT, "control": ("none", "shuffled")}),
            Grid(("12_opsd",), {"seed": SEEDS, **LAB, **SHORT, "control": ("none", "shuffled")}),
        ),
    ),
    "drift": Suite(
        purpose="RLSD and its sign-free twin at equal clips: who drifts to the teacher, and when",
        grids=(
            Grid(
                ("15_rlsd",),
                {
                    "seed": SEEDS,
                    "preset": ("lab", "lab-bare"),
                    **SHORT,
                    "overrides": [{**DRIFT, "epsilon_w": clip} for clip in CLIPS],
                    "method": NEUTRALS,
                },
            ),
            Grid(
                ("15_rlsd",),
                {
                    "seed": FIVE_SEEDS,
                    **LAB,
                    "overrides": [{**DRIFT, "epsilon_w": CLIPS[-1]}],
                    "method": NEUTRALS,
                },
            ),
        ),
    ),
    "smollm2": Suite(
        purpose="GRPO, RLSD, OPSD, and RLSD with a shuffled reference, on a real instruct model",
        grids=(
            Grid(("10_grpo", "15_rlsd", "12_opsd"), {"seed": (0, 1), "preset": ("smollm2",)}),
            Grid(("15_rlsd",), {"seed": (0, 1), "preset": ("smollm2",), "control": ("shuffled",)}),
        ),
    ),
}


@dataclass(frozen=True)
class Job:
    """One run of a suite."""

    notebook: str
    parameters: dict[str, Any]
    run_dir: Path

    def command(self) -> list[str]:
        """The command line that makes this run."""
        pairs = [f"{name}={_text(value)}" for name, value in self.parameters.items()]
        flags = [word for pair in pairs for word in ("-p", pair)]
        place = ["--run-dir", str(self.run_dir), "--if-exists", "skip"]
        return [sys.executable, "-m", "rlsd_lib", "run", self.notebook, *flags, *place]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What runs of about the same length have in common."""
        return (self.notebook, *(self.parameters.get(name) for name in ("preset", "max_steps")))

    def state(self) -> str:
        """finished, failed, running (by another process), or to run.

        A run that was killed or interrupted from the keyboard is to run: nothing is wrong with it.
        """
        found = state_of(self.run_dir)
        if found == "failed" and read_manifest(self.run_dir)["error"] == "KeyboardInterrupt":
            return "to run"
        return found if found in ("finished", "failed", "running") else "to run"


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    `status` is "done", "kept" (it was finished), "failed" (now), "failed before" (and was not asked
    for again) or "busy" (another process writes it). `error` says why it failed; `left` is the
    estimate of the time that the rest will take, None before any run has ended.
    """

    job: Job
    status: str
    seconds: float = 0.0
    error: str | None = None
    left: float | None = None


def get_suite(name: str) -> Suite:
    """The suite called `name`.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    if name not in SUITES:
        raise ValueError(f"no suite {name!r}{nearest(name, SUITES)}")
    return SUITES[name]


def jobs_of(name: str, changes: Mapping[str, Any] | None = None) -> list[Job]:
    """The runs of a suite; `changes` replaces parameters in all of them.

    Raises:
        ValueError: an unknown suite or parameter, or two runs that would share a directory.
        TypeError: a value that does not fit its annotation.
        FileNotFoundError: a notebook of the suite does not exist.
    """
    jobs = [_job(name, notebook, p) for notebook, p in _cells(get_suite(name), changes or {})]
    seen: dict[Path, Job] = {}
    for job in jobs:
        if other := seen.get(job.run_dir):
            raise ValueError(f"{job.run_dir} is named by both {other.notebook} and {job.notebook}")
        seen[job.run_dir] = job
    return jobs


def _cells(suite: Suite, changes: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for grid in suite.grids:
        # The first parameter outermost: with the seed there, an interrupted suite is still balanced.
        for *values, notebook in product(*grid.parameters.values(), grid.notebooks):
            yield notebook, {**dict(zip(grid.parameters, values, strict=True)), **changes}


def _job(suite: str, notebook: str, parameters: dict[str, Any]) -> Job:
    source = find_notebook(notebook)
    declared = read_parameters(source)
    check_parameters(source, declared, parameters)
    full = {**{p.name: p.default for p in declared.values()}, **parameters}
    return Job(notebook, parameters, default_run_dir(suite, full))


def run_jobs(
    jobs: Sequence[Job], workers: int = 1, *, retry_failed: bool = False
) -> Iterator[Outcome]:
    """Work through jobs with at most `workers` at a time; outcomes come as they end.

    Finished runs are kept, and failed ones too unless `retry_failed`.

    Raises:
        ValueError: `workers` is below 1.
    """
    if workers < 1:
        raise ValueError(f"jobs={workers}: expected 1 or more")
    settled = [_settled(job, retry_failed) for job in jobs]
    yield from (outcome for outcome in settled if outcome)
    rest = [job for job, outcome in zip(jobs, settled, strict=True) if outcome is None]
    begun: dict[Path, float] = {}
    took = seconds_taken(jobs)
    with ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(_run_job, job, workers, begun): job for job in rest}
        try:
            for done in as_completed(list(waiting)):
                ended = waiting.pop(done)
                outcome = done.result()
                took[ended.kind].append(outcome.seconds)
                left = time_left(list(waiting.values()), took, workers, _elapsed(begun))
                yield replace(outcome, left=left)
        finally:
            pool.shutdown(cancel_futures=True)


def seconds_taken(jobs: Sequence[Job]) -> defaultdict[tuple[Any, ...], list[float]]:
    """How long the finished runs among `jobs` took, by kind."""
    took = defaultdict(list)
    for job in jobs:
        if job.state() == "finished":
            took[job.kind].append(read_manifest(job.run_dir)["seconds"])
    return took


def time_left(
    jobs: Sequence[Job],
    took: Mapping[tuple[Any, ...], Sequence[float]],
    workers: int,
    elapsed: Mapping[Path, float] | None = None,
) -> float | None:
    """Seconds until all of `jobs` have ended, `workers` at a time, in their order.

    A job is expected to take the mean of its kind in `took`, or of everything where its kind has
    not been seen; `elapsed` holds the seconds that running jobs have used, by run directory. None
    where nothing is known yet.
    """
    every = [seconds for values in took.values() for seconds in values]
    if not every:
        return None
    free = [0.0] * workers  # when each worker is free again
    for job in sorted(jobs, key=lambda job: job.run_dir not in (elapsed or {})):
        expected = fmean(took.get(job.kind) or every)
        rest = max(expected - (elapsed or {}).get(job.run_dir, 0.0), 0.0)
        heapq.heappush(free, heapq.heappop(free) + rest)
    return max(free)


def _elapsed(begun: Mapping[Path, float]) -> dict[Path, float]:
    return {path: time.monotonic() - since for path, since in list(begun.items())}


def _settled(job: Job, retry_failed: bool) -> Outcome | None:
    """The outcome of a job that needs no run, or None."""
    state = job.state()
    if state == "finished":
        return Outcome(job, "kept")
    if state == "running":
        return Outcome(job, "busy")
    if state == "failed" and not retry_failed:
        return Outcome(job, "failed before", error=read_manifest(job.run_dir)["error"])
    return None


def _run_job(job: Job, workers: int, begun: dict[Path, float]) -> Outcome:
    begun[job.run_dir] = time.monotonic()
    # Side by side, processes that each take all cores slow one another down.
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    done = subprocess.run(job.command(), env=environment, capture_output=True, text=True)
    seconds = time.monotonic() - begun[job.run_dir]
    if done.returncode == 0:
        return Outcome(job, "done", seconds)
    return Outcome(job, "failed", seconds, done.stderr.strip()[-2000:] or "no error output")


def _text(value: Any) -> str:
    """A value as `parse_value` reads it back."""
    return value if isinstance(value, str) else str(value) if value is None else json.dumps(value)
