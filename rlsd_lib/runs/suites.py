"""Suites: named sets of runs, as data.

A suite is a list of grids. A grid lists the values of each parameter, and the notebooks; each of
their combinations is a run. The name that stands first varies slowest: with the seed there, an
interrupted suite is still balanced.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from rlsd_lib.names import look_up
from rlsd_lib.runs.jobs import Job
from rlsd_lib.runs.parameters import as_text, complete
from rlsd_lib.runs.paths import default_run_dir, find_notebook
from rlsd_lib.runs.records import PLAN, write_json


class Suite(NamedTuple):
    """A named set of runs with one line that says what it is for."""

    purpose: str
    grids: Sequence[Mapping[str, Sequence[Any]]]


FIVE_SEEDS = (0, 1, 2, 3, 4)
# Where lambda decays to 0 a run is GRPO from step 50 on, and the constant ones show it by then.
SHORT = {"seed": (0, 1, 2), "max_steps": (80,)}
LAB = {"preset": ("lab",)}
SMOLLM2 = {"seed": (0, 1), "preset": ("smollm2",)}
GRPO, RLSD, OPSD = ({"notebook": (name,)} for name in ("10_grpo", "15_rlsd", "12_opsd"))
BASELINES = ("10_grpo", "15_rlsd", "11_opd", "12_opsd", "13_sdpo", "14_grpo_opsd")
TOP1 = ("opsd_teacher_top1", "opsd_student_top1")
CONTROLS = ("none", "shuffled", "wrong", "noise", "empty")
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
# The live teacher of Algorithm 1 and a constant lambda; clips that reach as far down as up.
LIVE = {"lambda_init": 1.0, "lambda_decay_steps": 0, "teacher_model_kind": "live"}
DRIFT = tuple({**LIVE, "weight_clip": "log", "epsilon_w": clip} for clip in (0.2, 1.0, 9.0))
WIDE = DRIFT[-1]
# Twice the lab's learning rate, where a first prototype saw RLSD collapse.
FAST = {**WIDE, "learning_rate": 1e-4}
CONSERVED = {**FAST, "conserve_credit": True}
TWINS = {"method": ("rlsd", "rlsd_neutral")}

SUITES: dict[str, Suite] = {
    "demo": Suite(
        "GRPO, OPSD and RLSD on the lab from the same start: the main job, in minutes",
        [{**LAB, "seed": (0,), "max_steps": (100,), "notebook": ("10_grpo", "15_rlsd", "12_opsd")}],
    ),
    "paper": Suite(
        "the paper's table on the lab: every method, five seeds, 200 steps, as printed",
        [
            {"seed": FIVE_SEEDS, **LAB, "notebook": BASELINES},
            {"seed": FIVE_SEEDS, **LAB, **OPSD, "method": TOP1},
            {"seed": FIVE_SEEDS, **LAB, **GRPO, "max_steps": (400,)},
        ],
    ),
    "ablations": Suite(
        "lambda, its decay, the clip, the teacher's freshness, and what it is shown",
        [
            {**SHORT, **LAB, **GRPO},
            {**SHORT, **LAB, **RLSD, "overrides": ABLATIONS},
            {**SHORT, "preset": ("lab-trace",), **RLSD, "overrides": ({}, STRONG)},
        ],
    ),
    "controls": Suite(
        "what RLSD's teacher must not be able to do without: the true reference",
        [
            # Strong, because the paper's numbers leave a control little to change.
            {**SHORT, **LAB, **RLSD, "control": CONTROLS, "overrides": (STRONG,)},
            {**SHORT, **LAB, **RLSD, "overrides": (PEER,)},
            {**SHORT, **LAB, **RLSD, "control": ("none", "shuffled")},
            {**SHORT, **LAB, **OPSD, "control": ("none", "shuffled")},
        ],
    ),
    "drift": Suite(
        "RLSD and its sign-free twin at equal clips: who drifts to the teacher, and when",
        [
            {**SHORT, "preset": ("lab", "lab-bare"), **RLSD, "overrides": DRIFT, **TWINS},
            {**SHORT, **LAB, **RLSD, "overrides": (FAST, CONSERVED), **TWINS},
            {"seed": FIVE_SEEDS, **LAB, **RLSD, "overrides": (WIDE,), **TWINS},
        ],
    ),
    "smollm2": Suite(
        "GRPO, RLSD, OPSD, and RLSD with a shuffled reference, on a real instruct model",
        [
            {**SMOLLM2, "notebook": ("10_grpo", "15_rlsd", "12_opsd")},
            {**SMOLLM2, **RLSD, "control": ("shuffled",)},
        ],
    ),
}


def jobs_of(name: str, changes: Mapping[str, Any] = {}) -> list[Job]:
    """The runs of a suite; `changes` replaces parameters in all of them.

    Raises:
        ValueError: an unknown suite or parameter, or two runs that would share a directory.
        TypeError: a value that does not fit its annotation.
        FileNotFoundError: a notebook of the suite does not exist.
    """
    found: dict[Path, Job] = {}
    for grid in SUITES[look_up(name, SUITES, "suite")].grids:
        for values in product(*grid.values()):
            parameters = dict(zip(grid, values, strict=True))
            notebook = parameters.pop("notebook")
            parameters |= changes
            run_dir = default_run_dir(name, complete(find_notebook(notebook), parameters))
            if other := found.get(run_dir):
                raise ValueError(f"{run_dir} is named by both {other.notebook} and {notebook}")
            found[run_dir] = Job(notebook, parameters, run_dir)
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
