"""Kill a tiny run at a phase of a step, resume it, and compare it with one that nobody killed.

    python tests/kills.py FOLDER [COUNT]

tries COUNT cases, drawn at random (default: all), each in forked processes, and prints those whose
weights, teacher or logged numbers differ in a bit.
"""

import gc
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import tiny
import torch
from peft import LoraConfig, get_peft_model

from rlsd_lib import RLSDTrainer
from rlsd_lib.trainer import checkpoints

# What is about to be called when the process is killed: methods, and `FUNCTIONS` of the module.
PHASES = (
    "_generate",
    "_calculate_rewards",
    "teacher_scores",
    "_compute_loss",
    "_get_grad_norm",
    "log",
    "_save_checkpoint",
    "_save_rollouts",
    "save_model",
    "_save_optimizer_and_scheduler",
    "_save_rng_state",
    "seal",
    "rotate_checkpoints",
)
FUNCTIONS = ("seal", "rotate_checkpoints")
KINDS: dict[str, dict[str, Any]] = {
    "grpo": {"method": "grpo"},
    "snapshot": {"teacher_sync_steps": 2},
    "ema lora": {"teacher_model_kind": "ema", "teacher_sync_steps": 1},
    "opsd": {"method": "opsd", "teacher_model_kind": "live"},
    "sdpo": {"method": "sdpo", "distillation_mode": "full_logits", "success_reward_threshold": 0.5},
}
# Rows, and settings: an odd number of micro-batches makes the last step of an epoch a short one.
SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    "one epoch": (32, {}),
    "three epochs": (6, {}),
    "odd rows": (3, {"steps_per_generation": 1}),
    "two iterations": (6, {"num_iterations": 2}),
    "four steps a rollout": (10, {"steps_per_generation": 4}),
}
STEPS = 7
CASES = list(product(PHASES, KINDS, SHAPES))
CLOCKS = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")


def made(folder: Path, kind: str, shape: str) -> RLSDTrainer:
    """The trainer of a case."""
    rows, settings = SHAPES[shape]
    student = tiny.model()
    if kind.endswith("lora"):
        torch.manual_seed(0)
        student = get_peft_model(student, LoraConfig(r=4, init_lora_weights=False))
    every = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 1}
    return tiny.trainer(folder, student, tiny.dataset(rows), **every, **KINDS[kind], **settings)


def outcome(trainer: RLSDTrainer) -> dict[str, Any]:
    """What must not depend on a kill: every weight to the bit, and every number that was logged."""
    modules = {"student": trainer.model}
    if trainer.teacher is not None and trainer.teacher.model is not None:
        modules["teacher"] = trainer.teacher.model
    weights = {
        f"{name} {key}": p.detach().flatten().view(torch.int32).sum().item()
        for name, model in modules.items()
        for key, p in model.named_parameters()
    }
    logged = [
        {key: repr(value) for key, value in row.items() if key not in CLOCKS}
        for row in trainer.state.log_history
        if "loss" in row
    ]
    return {"weights": weights, "logged": logged}


def train(folder: Path, kind: str, shape: str, killed_at: tuple[str, int] | None = None) -> Any:
    """Train in a forked process, resuming where there is a checkpoint; its outcome, None if killed."""
    file = folder / "outcome.json"
    if (child := os.fork()) == 0:
        gc.freeze()  # as in conftest.py
        try:
            trainer = made(folder, kind, shape)
            if killed_at is not None:
                kill_before(trainer, *killed_at)
            last = checkpoints.last_checkpoint(folder)
            trainer.train(resume_from_checkpoint=str(last) if last else None)
            file.write_text(json.dumps(outcome(trainer)))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGKILL:
        return None
    assert code == 0, f"{kind}, {shape}: the run failed"
    return json.loads(file.read_text())


def before(trainer: RLSDTrainer, name: str, action: Callable[[], object]) -> None:
    """Do something whenever `name` of `PHASES` is about to be called."""
    home = checkpoints if name in FUNCTIONS else trainer
    wrapped = getattr(home, name)

    def called(*args: Any, **kwargs: Any) -> Any:
        action()
        return wrapped(*args, **kwargs)

    setattr(home, name, called)


def kill_before(trainer: RLSDTrainer, name: str, step: int) -> None:
    """Kill this process when `name` is called after `step` finished steps or later."""

    def kill() -> None:
        if trainer.state.global_step >= step:
            os.kill(os.getpid(), signal.SIGKILL)

    before(trainer, name, kill)


def differing(folder: Path, cases: list[tuple[str, str, str]], seed: int) -> list[str]:
    """The cases that were not resumed bit by bit."""
    made(folder, "grpo", "one epoch")  # what is imported here, no fork imports again
    whole: dict[tuple[str, str], Any] = {}
    found = []
    for number, (phase, kind, shape) in enumerate(cases):
        if (kind, shape) not in whole:
            whole[kind, shape] = train(folder / f"{kind} {shape}", kind, shape)
        step = random.Random(f"{seed} {phase} {kind} {shape}").randrange(1, STEPS + 1)
        place = folder / str(number)
        train(place, kind, shape, (phase, step))
        if train(place, kind, shape) != whole[kind, shape]:
            found.append(f"{kind}, {shape}: killed before {phase} after step {step}")
    return found


if __name__ == "__main__":
    seed = random.randrange(10**6)
    count = int(sys.argv[2]) if len(sys.argv) > 2 else len(CASES)
    cases = random.Random(seed).sample(CASES, count)
    wrong = differing(Path(sys.argv[1]), cases, seed)
    print(f"seed {seed}: {count - len(wrong)} of {count} resumed bit by bit")  # noqa: T201
    print(*wrong, sep="\n")  # noqa: T201
    sys.exit(bool(wrong))
