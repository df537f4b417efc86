"""Suites: named sets of runs, as data, and the loop that makes the runs.

A suite is a list of grids. A grid lists the values of each parameter, and the notebooks; each of
their combinations is a run. The name that stands first varies slowest: with the seed there, an
interrupted suite is still balanced.

Finished runs are kept, so the same command continues a suite that was stopped. A run that failed by
an error of its own would fail again: it is listed, and made again on demand.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from rlsd_lib.names import look_up
from rlsd_lib.runs.parameters import as_text, complete
from rlsd_lib.runs.paths import default_run_dir, find_notebook
from rlsd_lib.runs.records import PLAN, owned, read_manifest, state_of, write_json


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

# The bench for credit: a seed is a lab, and rates are chosen on one that no comparison uses.
CREDIT = {"preset": ("lab-credit",)}
LABS = {"seed": FIVE_SEEDS, **CREDIT}
# Labs 7 and 10 start below 0.05 right chains: their pretraining failed.
NEW_LABS = {"seed": (5, 6, 8, 9, 11), **CREDIT}
RATES = (2.5e-5, 5e-5, 1e-4, 2e-4)
LOWER = (6e-6, 1.25e-5)  # where SDPO does not collapse


def _credit(*methods: str) -> dict[str, Sequence[Any]]:
    """Any methods of the table, by the notebook that runs them all."""
    return {"notebook": ("16_credits",), "method": methods}


ORACLE, TRUE_VALUE = _credit("oracle"), _credit("oracle_value")
HINDSIGHT, GATED, POSTERIOR = map(_credit, ("hindsight", "hindsight_gated", "posterior_blame"))
BASELINE, RAFT = _credit("privileged_baseline"), _credit("raft")
TOLD = _credit("opsd_value_contrast")  # distillation that is told where to look, beside GRPO
# Lambda stays: what a credit function can do, and not how soon it is switched off.
WIDEST = {"lambda_init": 1.0, "lambda_decay_steps": 0, "epsilon_w": 9.0}
# With an empty reference this is GRPO to the bit.
EMPTY = {**WIDEST, "teacher_model_kind": "live"}
# The same lab with other rollouts: how far apart two runs of one method are.
REDRAWN = {"redraw": 1}
FROZEN, FRESH, EMA = ({"teacher_model_kind": kind} for kind in ("base", "live", "ema"))
# The paper does not report its weight of the distillation term: three, each at its best rate.
WEIGHTS = (
    {},
    {"distillation_weight": 0.1, "learning_rate": 5e-5},
    {"distillation_weight": 0.3, "learning_rate": 2.5e-5},
)
PERMUTED = {"permute_credit": True}
BESIDE = {**FROZEN, "policy_weight": 1.0}
# The first lab at the rates at which a review found it learning best, with a lab for each seed.
AT_ITS_RATE = {"learning_rate": 2e-4, "lab_per_seed": True}
FIRST_LAB = {"seed": FIVE_SEEDS, **LAB, "max_steps": (80,), "overrides": (AT_ITS_RATE,)}
SLOWEST, SLOWER, _, FASTER = ({"learning_rate": rate} for rate in RATES)
# As their authors set them; but lambda stays, for the reason above. Two collapse at GRPO's rate.
STAYS = {"lambda_decay_steps": 0}
COLLAPSING = ("antisd", "srpo")
SUCCESSORS: dict[str, dict[str, Any]] = {
    "cepo": STAYS,
    "rlcsd": STAYS,
    "antisd": {**STAYS, **SLOWEST},
    "rlrt": {**STAYS, "epsilon_w": 1.0},
    "amr_sd": {**STAYS, "lambda_init": 0.2},
    "sdar": {},
    "srpo": SLOWEST,
    "sdpg": {},
}
# OPSD, and what mends each of its two faults; `lab` gives these the answer as their reference.
MENDED = _credit("opsd_value", "opsd_contrast", "opsd_value_contrast")


def _sweep(
    arm: Mapping[str, Sequence[Any]], rates: Sequence[float] = RATES, **settings: Any
) -> dict[str, Sequence[Any]]:
    """Learning rates of one arm on the validation lab."""
    overrides = tuple({**settings, "learning_rate": rate} for rate in rates)
    return {"seed": (100,), **CREDIT, **arm, "overrides": overrides}


def _controlled(arm: Mapping[str, Sequence[Any]], **settings: Any) -> list[dict[str, Any]]:
    """One arm on the labs, with its credit shuffled over the tokens, and with other references."""
    shuffled = {"overrides": (settings,), "control": ("shuffled",)}
    return [_permuted(arm, **settings), {**LABS, **arm, **shuffled}]


def _permuted(arm: Mapping[str, Sequence[Any]], **settings: Any) -> dict[str, Any]:
    return {**LABS, **arm, "overrides": (settings, {**settings, **PERMUTED})}


SUITES: dict[str, Suite] = {
    "demo": Suite(
        "GRPO, OPSD and RLSD on the lab from the same start: the main job, in minutes",
        [{**LAB, "seed": (0,), "max_steps": (100,), "notebook": ("10_grpo", "15_rlsd", "12_opsd")}],
    ),
    "paper": Suite(
        "the paper's table on the bench for credit, between the oracle above and GRPO's own noise",
        [
            {**LABS, **GRPO, "overrides": ({}, REDRAWN)},
            {**LABS, **ORACLE},
            {**LABS, **TRUE_VALUE},
            {**LABS, **RAFT},
            {**LABS, **RLSD, "overrides": ({}, WIDEST, {**WIDEST, **SLOWER})},
            {**LABS, **RLSD, "overrides": (WIDEST,), "control": ("shuffled",)},
            {**LABS, **RLSD, "overrides": (EMPTY,), "control": ("empty",)},
            {**LABS, "notebook": ("11_opd", "12_opsd", "13_sdpo")},
            {**LABS, "notebook": ("14_grpo_opsd",), "overrides": WEIGHTS},
            # At the frozen teacher's rate: ema's best of four is not told from it, and a live
            # teacher ends at 0 at each of four.
            {**LABS, **OPSD, "overrides": (FRESH, EMA)},
        ],
    ),
    "first-lab": Suite(
        "the paper's table on the first lab: every method, five seeds, 200 steps, as printed",
        [
            {"seed": FIVE_SEEDS, **LAB, "notebook": BASELINES},
            {"seed": FIVE_SEEDS, **LAB, **OPSD, "method": TOP1},
            {"seed": FIVE_SEEDS, **LAB, **GRPO, "max_steps": (400,)},
        ],
    ),
    "rates": Suite(
        "the learning rate of each method on the bench for credit, on a validation lab",
        [
            *map(_sweep, (GRPO, ORACLE, TRUE_VALUE, RLSD, {"notebook": ("11_opd",)}, OPSD)),
            _sweep(RLSD, **WIDEST),
            *(_sweep(OPSD, **kind) for kind in (FRESH, EMA)),
            _sweep({"notebook": ("13_sdpo",)}, (*LOWER, *RATES)),
            *(
                _sweep({"notebook": ("14_grpo_opsd",)}, distillation_weight=w)
                for w in (0.03, 0.1, 0.3)
            ),
            *(_sweep(arm, **FROZEN) for arm in (HINDSIGHT, GATED, POSTERIOR)),
            # Both learn from pairs that agree, and bear a higher rate than GRPO.
            _sweep(BASELINE, (*RATES, 4e-4), **FROZEN),
            _sweep(RAFT, (*RATES[1:], 4e-4)),
            *(_sweep(_credit(name), **WIDEST) for name in ("rlsd_negative_only", "rlsd_contrast")),
            _sweep(TOLD, **BESIDE),
            *(
                _sweep(_credit(name), RATES[:3] if name in COLLAPSING else RATES[1:], **s)
                for name, s in SUCCESSORS.items()
            ),
            # The paper trains OPSD at ten times the rate of GRPO.
            _sweep(OPSD, (1e-3,)),
        ],
    ),
    "headroom": Suite(
        "what knowing the first error, or the teacher's value, gains on the first lab",
        [
            {**FIRST_LAB, **GRPO},
            {**FIRST_LAB, **ORACLE},
            {**FIRST_LAB, **BASELINE, "overrides": ({**AT_ITS_RATE, **FROZEN},)},
        ],
    ),
    "credits": Suite(
        "RLSD's successors and our own credit beside `paper`, with their controls, over labs",
        [
            {**LABS, **_credit("rlsd_negative_only", "rlsd_contrast"), "overrides": (WIDEST,)},
            _permuted(POSTERIOR, **FROZEN),
            *_controlled(HINDSIGHT, **FROZEN),
            # These two also at half of GRPO's rate, their best on the validation lab.
            {**LABS, **HINDSIGHT, "overrides": ({**FROZEN, **SLOWER},)},
            {**LABS, **_credit("rlsd_negative_only"), "overrides": ({**WIDEST, **SLOWER},)},
            *_controlled(TOLD, **BESIDE),
            *(
                # Two labs say enough of what ends at 0 at each of its rates.
                {**LABS, **_credit(name), "overrides": (s,)}
                | ({"seed": (0, 1)} if name == "antisd" else {})
                for name, s in SUCCESSORS.items()
            ),
            *({**LABS, **arm, "overrides": (FROZEN,)} for arm in (GATED, BASELINE)),
            # Its teacher says nothing: what its baseline of the group does alone.
            {**LABS, **BASELINE, "overrides": (FRESH,), "control": ("empty",)},
        ],
    ),
    "confirm": Suite(
        "what `credits` suggested, on five labs that no choice has seen: the privileged baseline",
        [
            {**NEW_LABS, **GRPO},
            # At GRPO's best rate, and at the baseline's, twice as high.
            {**NEW_LABS, **RAFT, "overrides": ({}, FASTER)},
            *(
                arm | NEW_LABS
                for rate in ({}, FASTER)
                for arm in _controlled(BASELINE, **FROZEN, **rate)
            ),
        ],
    ),
    "faults": Suite(
        "OPSD's two faults mended apart and together, beside `headroom`: three teachers, two references",
        [
            {**FIRST_LAB, **arm, "preset": preset, "overrides": overrides}
            for arm in (OPSD, MENDED)
            for preset, overrides in (
                (("lab",), tuple({**AT_ITS_RATE, **kind} for kind in (FROZEN, FRESH, EMA))),
                (("lab-trace",), ({**AT_ITS_RATE, **FROZEN},)),
            )
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
        "GRPO, RLSD, the privileged baseline, OPSD, and shuffled references, on a real instruct model",
        [
            {**SMOLLM2, "notebook": ("10_grpo", "15_rlsd")},
            {**SMOLLM2, **BASELINE, "overrides": (FROZEN,), "control": ("none", "shuffled")},
            {**SMOLLM2, **RLSD, "control": ("shuffled",)},
            {**SMOLLM2, **OPSD},
        ],
    ),
}


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

    def state(self) -> str:
        """finished, failed, interrupted, running (by another process), or, killed too, to run."""
        found = state_of(self.run_dir)
        return found if found in ("finished", "failed", "interrupted", "running") else "to run"


@dataclass(frozen=True)
class Outcome:
    """What became of a job."""

    job: Job
    status: str  # done, kept (finished already), failed, failed before, busy (another writes it)
    seconds: float = 0.0  # of work
    error: str | None = None  # why there is no result


def jobs_of(name: str, changes: Mapping[str, Any] = {}) -> list[Job]:
    """The runs of a suite; `changes` replaces parameters in all of them.

    Raises ValueError for an unknown suite or parameter, or two runs that would share a directory;
    TypeError for a value that does not fit its annotation; FileNotFoundError if a notebook of the
    suite does not exist.
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
    # All grids of a seed before those of the next: an interrupted suite compares what it has.
    return sorted(found.values(), key=lambda job: job.parameters.get("seed", 0))


def record_plan(name: str, changes: Mapping[str, Any], jobs: Sequence[Job]) -> None:
    """Write beside the runs which of them a suite with these `changes` is to have."""
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
    """Make the runs of `jobs`, at most `workers` at a time; outcomes come as they end."""
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
    if job.state() == "running":  # another suite was faster
        return Outcome(job, "busy", seconds, owned(job.run_dir))
    return Outcome(job, "failed", seconds, done.stderr.strip()[-2000:] or "no error output")
