"""Suites: named sets of runs, as data.

A suite is a list of grids, a grid is notebooks times parameter values.
"""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from rlsd_lib.names import look_up
from rlsd_lib.runs.jobs import Job
from rlsd_lib.runs.parameters import as_text, complete
from rlsd_lib.runs.paths import default_run_dir, find_notebook
from rlsd_lib.runs.records import PLAN, write_json


class Grid(NamedTuple):
    """Every notebook with every combination of the listed values, the first parameter outermost."""

    notebooks: Sequence[str]
    parameters: Mapping[str, Sequence[Any]]


class Suite(NamedTuple):
    """A named set of runs with one line that says what it is for."""

    purpose: str
    grids: Sequence[Grid]


def grid(*notebooks: str, **parameters: Sequence[Any]) -> Grid:
    """The grid of these notebooks and of these values, of which each parameter lists its own."""
    return Grid(notebooks, parameters)


LAB = {"preset": ("lab",)}
SEEDS = (0, 1, 2)
FIVE_SEEDS = (0, 1, 2, 3, 4)
BASELINES = ("10_grpo", "15_rlsd", "11_opd", "12_opsd", "13_sdpo", "14_grpo_opsd")
TOP1 = ("opsd_teacher_top1", "opsd_student_top1")
CONTROLS = ("none", "shuffled", "wrong", "noise", "empty")
# Where lambda decays to 0 a run is GRPO from step 50 on, and the constant ones show it by then.
SHORT = {"max_steps": (80,)}
# Credit at its strongest: what the paper's lambda and clip hold back.
STRONG = {"lambda_init": 1.0, "lambda_decay_steps": 0, "epsilon_w": 0.9}
# A successful rollout of the same group in place of the reference, as SDPO shows.
PEER = {**STRONG, "peer_context": True}
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
NEUTRALS = ("rlsd", "rlsd_neutral")
# The live teacher of Algorithm 1 and a constant lambda; clips that reach as far down as up.
LIVE = {"lambda_init": 1.0, "lambda_decay_steps": 0, "teacher_model_kind": "live"}
DRIFT = tuple({**LIVE, "weight_clip": "log", "epsilon_w": clip} for clip in (0.2, 1.0, 9.0))
WIDE = DRIFT[-1]
# Twice the lab's learning rate, where a first prototype saw RLSD collapse.
FAST = {**WIDE, "learning_rate": 1e-4}

SUITES: dict[str, Suite] = {
    "demo": Suite(
        purpose="GRPO, OPSD and RLSD on the lab from the same start: the main job, in minutes",
        grids=(grid("10_grpo", "15_rlsd", "12_opsd", **LAB, seed=(0,), max_steps=(100,)),),
    ),
    "paper": Suite(
        purpose="the paper's table on the lab: every method, five seeds, 200 steps, as printed",
        grids=(
            grid(*BASELINES, seed=FIVE_SEEDS, **LAB),
            grid("12_opsd", seed=FIVE_SEEDS, **LAB, method=TOP1),
            grid("10_grpo", seed=FIVE_SEEDS, **LAB, max_steps=(400,)),
        ),
    ),
    "ablations": Suite(
        purpose="lambda, its decay, the clip, the teacher's freshness, and what it is shown",
        grids=(
            grid("10_grpo", seed=SEEDS, **LAB, **SHORT),
            grid("15_rlsd", seed=SEEDS, **LAB, **SHORT, overrides=ABLATIONS),
            grid("15_rlsd", seed=SEEDS, preset=("lab-trace",), **SHORT, overrides=({}, STRONG)),
        ),
    ),
    "controls": Suite(
        purpose="what RLSD's teacher must not be able to do without: the true reference",
        grids=(
            # Strong, because the paper's numbers leave a control little to change.
            grid("15_rlsd", seed=SEEDS, **LAB, **SHORT, control=CONTROLS, overrides=(STRONG,)),
            grid("15_rlsd", seed=SEEDS, **LAB, **SHORT, overrides=(PEER,)),
            grid("15_rlsd", seed=SEEDS, **LAB, **SHORT, control=("none", "shuffled")),
            grid("12_opsd", seed=SEEDS, **LAB, **SHORT, control=("none", "shuffled")),
        ),
    ),
    "drift": Suite(
        purpose="RLSD and its sign-free twin at equal clips: who drifts to the teacher, and when",
        grids=(
            grid(
                "15_rlsd",
                seed=SEEDS,
                preset=("lab", "lab-bare"),
                **SHORT,
                overrides=DRIFT,
                method=NEUTRALS,
            ),
            grid(
                "15_rlsd",
                seed=SEEDS,
                **LAB,
                **SHORT,
                overrides=(FAST, {**FAST, "conserve_credit": True}),
                method=NEUTRALS,
            ),
            grid("15_rlsd", seed=FIVE_SEEDS, **LAB, overrides=(WIDE,), method=NEUTRALS),
        ),
    ),
    "smollm2": Suite(
        purpose="GRPO, RLSD, OPSD, and RLSD with a shuffled reference, on a real instruct model",
        grids=(
            grid("10_grpo", "15_rlsd", "12_opsd", seed=(0, 1), preset=("smollm2",)),
            grid("15_rlsd", seed=(0, 1), preset=("smollm2",), control=("shuffled",)),
        ),
    ),
}


def jobs_of(name: str, changes: Mapping[str, Any] | None = None) -> list[Job]:
    """The runs of a suite; `changes` replaces parameters in all of them.

    Raises:
        ValueError: an unknown suite or parameter, or two runs that would share a directory.
        TypeError: a value that does not fit its annotation.
        FileNotFoundError: a notebook of the suite does not exist.
    """
    suite = SUITES[look_up(name, SUITES, "suite")]
    found: dict[Path, Job] = {}
    for notebook, values in _cells(suite, changes or {}):
        run_dir = default_run_dir(name, complete(find_notebook(notebook), values))
        if other := found.get(run_dir):
            raise ValueError(f"{run_dir} is named by both {other.notebook} and {notebook}")
        found[run_dir] = Job(notebook, values, run_dir)
    return list(found.values())


def record_plan(name: str, changes: Mapping[str, Any], jobs: Sequence[Job]) -> None:
    """Write which runs a suite is to have, so that a table can name those that never started.

    The file lies beside the runs; the suite with other `changes` adds a plan of its own.
    """
    pairs = [f"-p {shlex.quote(f'{key}={as_text(value)}')}" for key, value in changes.items()]
    plan = {
        "command": " ".join(["rlsd suite", name, *pairs]),
        "runs": [job.run_dir.name for job in jobs],
    }
    file = jobs[0].run_dir.parent / PLAN
    known = json.loads(file.read_text())["plans"] if file.exists() else []
    others = [other for other in known if other["command"] != plan["command"]]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"plans": [*others, plan]})


def _cells(suite: Suite, changes: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for grid in suite.grids:
        # The first parameter outermost: with the seed there, an interrupted suite is still balanced.
        for *values, notebook in product(*grid.parameters.values(), grid.notebooks):
            yield notebook, {**dict(zip(grid.parameters, values, strict=True)), **changes}
