"""Suites: named sets of runs, as data, and the loop that works through one.

A suite is a list of grids, a grid is notebooks times parameter values. Everything that is finished
already is kept, so a suite that was interrupted is continued by the same command.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from rlsd_lib.execute import check_parameters, read_parameters
from rlsd_lib.provenance import default_run_dir, find_notebook, nearest
from rlsd_lib.records import state_of


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
# A hundred steps: where lambda has decayed to 0 a run is GRPO, and the constant ones show it by then.
SHORT = {"max_steps": (100,)}
# Credit at its strongest: what the paper's lambda and clip hold back.
STRONG = {"lambda_init": 1.0, "lambda_decay_steps": 0, "epsilon_w": 0.9}
ABLATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"lambda_decay_steps": 0},
    {"lambda_init": 1.0, "lambda_decay_steps": 0},
    STRONG,
    {**STRONG, "epsilon_w": 9.0},
    {**STRONG, "epsilon_w": 9.0, "weight_clip": "log"},
    {**STRONG, "epsilon_w": 9.0, "weight_clip": "log", "conserve_credit": True},
    {**STRONG, "teacher_model_kind": "live"},
    {**STRONG, "teacher_model_kind": "base"},
    {**STRONG, "teacher_model_kind": "ema"},
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
                    "overrides": ({}, STRONG),
                },
            ),
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


@dataclass(frozen=True)
class Outcome:
    """How a job ended: its seconds, and the end of its error output when it failed."""

    job: Job
    seconds: float
    error: str | None


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


def run_jobs(jobs: Sequence[Job], workers: int = 1) -> Iterator[Outcome]:
    """Work through jobs with at most `workers` at a time; outcomes come as they end.

    Raises:
        ValueError: `workers` is below 1.
    """
    if workers < 1:
        raise ValueError(f"jobs={workers}: expected 1 or more")
    with ThreadPoolExecutor(workers) as pool:
        waiting = [pool.submit(_run_job, job, workers) for job in jobs]
        try:
            for done in as_completed(waiting):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _run_job(job: Job, workers: int) -> Outcome:
    begun = time.monotonic()
    if state_of(job.run_dir) == "finished":
        return Outcome(job, 0.0, None)
    # Side by side, processes that each take all cores slow one another down.
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    done = subprocess.run(job.command(), env=environment, capture_output=True, text=True)
    error = None if done.returncode == 0 else done.stderr.strip()[-2000:] or "no error output"
    return Outcome(job, time.monotonic() - begun, error)


def _text(value: Any) -> str:
    """A value as `parse_value` reads it back."""
    return value if isinstance(value, str) else str(value) if value is None else json.dumps(value)
