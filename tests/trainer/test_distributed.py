"""Two processes against one: the same weights and metrics on the same global batch, and no hang.

Both worlds train on scripted rollouts, a function of the prompt and the place in the global batch.
All runs of the two processes share one start-up.
"""

import os
import random
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import dense
import pytest
import tiny
import torch
from filelock import FileLock
from forked import Forked
from transformers import TrainerCallback

from rlsd_lib.experiment.presets import shared_batch
from rlsd_lib.experiment.workbook_trainer import Stopped, WorkbookTrainer
from rlsd_lib.methods import METHODS

TIMEOUT = 240  # seconds for all runs of two processes; a hang would last for gloo's half hour
SUCCESS, FAILURE = 90, 91  # ids of letters that the reward reads

# Rewarded rows of each step. Six rows a rank make three groups of four, and the second lies across
# the ranks: mixed; in the first group only, so that rank 1 has neither success nor advantage; the
# only success of the shared group on rank 1; nowhere.
GOOD = [{0, 3, 5, 10, 11}, {1, 2}, {7}, set()]

# Of the later rows one with wrong references, one with a weight of the divergence, two by the
# success of the group's others, of which some are on the other rank, and two that count tokens of
# both ranks.
LATER = ("cepo", "opsd_value_contrast", "hindsight", "posterior_blame", "rlcsd", "srpo")
NAMES = (*tiny.FIRST, *LATER)
ROWS = {name: {"method": name, **tiny.NEEDS.get(name, {})} for name in METHODS}
RUNS: dict[str, dict[str, Any]] = {name: ROWS[name] for name in NAMES}
OTHERS_STUDENT = "RLSD_TEST_STUDENT"  # a saved tiny.model(), where processes train `OTHERS`
OTHERS = {name: row for name, row in ROWS.items() if name not in NAMES}
RUNS |= {
    "sdpo sampled": {"method": "sdpo", "distillation_mode": "sampled_token"},
    "sdpo grpo": {"method": "sdpo", "loss_type": "grpo"},
    "grpo_opsd grpo": {**RUNS["grpo_opsd"], "loss_type": "grpo", "teacher_sync_steps": 1},
    "grpo_opsd accumulated": {**RUNS["grpo_opsd"], "gradient_accumulation_steps": 2},
    # Three rows cannot be shared by two: the processes share the micro-batches instead.
    "rlsd accumulated": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
}


def marked_ids(prompt_ids: list[int], index: int, call: int) -> list[int]:
    """A scripted completion whose first letter says whether it is rewarded."""
    good = index % 12 in GOOD[call % len(GOOD)]
    draw = random.Random(f"{prompt_ids} {index} {call}")
    letters = [draw.randrange(dense.FIRST_LETTER, 60) for _ in range(draw.randint(2, 6))]
    return [SUCCESS if good else FAILURE, *letters, dense.EOS]


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(ids[0] == SUCCESS) for ids in completion_ids]


def train(folder: Path, world: int, settings: dict[str, Any]) -> dict[str, Any]:
    """One run, and what must not depend on the number of processes."""
    config = {
        "per_device_train_batch_size": 12,
        "gradient_accumulation_steps": 1,
        "max_steps": len(GOOD),
        # Adam would turn a rounding error of a vanishing gradient into a step of full size.
        "optim": "sgd",
        "learning_rate": 0.5,
    }
    method, student = settings.get("method", "rlsd"), None
    config |= settings if method == "opd" else {"teacher_sync_steps": 2, **settings}
    if settings.get("beta"):  # TRL loads the reference model from the student's folder
        student = os.environ.get(OTHERS_STUDENT, str(folder / "student"))
        if world == 1:
            tiny.model().save_pretrained(student)
    more = tiny.from_outside(method, partial(tiny.model, 1))
    config |= shared_batch(config, world)
    trainer = tiny.trainer(folder, student, rewards=reward, more=more, **config)
    assert trainer.accelerator.num_processes == world
    dense.script(trainer, marked_ids)
    contexts: list[list[str | None]] = []
    find = trainer._contexts

    def spy(rows: list[dict[str, Any]]) -> list[str | None]:
        contexts.append(find(rows))
        return contexts[-1]

    trainer._contexts = spy
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    names = ("rlsd/", "loss", "reward", "grad_norm")
    return {
        "weights": {k: v.clone() for k, v in trainer.model.state_dict().items()},
        "metrics": [{k: v for k, v in row.items() if k.startswith(names)} for row in logs],
        "contexts": contexts,
    }


def train_all(folder: Path, world: int) -> None:
    """Entry of each process: every run, one file each."""
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", 0))
    others = OTHERS_STUDENT in os.environ
    for name, settings in (OTHERS if others else RUNS).items():
        torch.save(train(folder / "scratch", world, settings), folder / f"{name}-{rank}.pt")
    if others:
        return
    torch.save(stop_one(folder / "stopped", rank), folder / f"stopped-{rank}.pt")
    torch.save(refuse_one(folder / "refused", rank), folder / f"refused-{rank}.pt")


class Sigterm(TrainerCallback):
    """Sends this process a SIGTERM in the middle of the second optimiser step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def stop_one(folder: Path, rank: int) -> dict[str, Any]:
    """A run of which only rank 1 is told to stop, and which both then resume."""
    trainer = tiny.trainer(folder, kind=WorkbookTrainer, max_steps=4)
    if rank == 1:
        trainer.add_callback(Sigterm())
    try:
        trainer.train()
    except Stopped as error:
        said, step = str(error), trainer.state.global_step
        again = tiny.trainer(folder, kind=WorkbookTrainer, max_steps=4)
        again.train(resume_from_checkpoint=True)
        return {"said": said, "step": step, "end": again.state.global_step}
    return {"said": "", "step": trainer.state.global_step}


def refuse_one(folder: Path, rank: int) -> list[str]:
    """What this rank says of contexts that rank 1 alone cannot show to its teacher."""
    said = []
    for context in ("", "x" * 600):
        trainer = tiny.trainer(folder, max_steps=1)
        find, mine = trainer._contexts, {"privileged_context": context if rank == 1 else "1"}
        trainer._contexts = lambda rows, find=find, mine=mine: find([row | mine for row in rows])
        with pytest.raises(ValueError) as error:
            trainer.train()
        said.append(str(error.value))
    return said


# What `accelerate launch` sets for use_cpu: true, so that the ranks talk by gloo.
USE_CPU = {"ACCELERATE_USE_CPU": "true"}


def processes(folder: Path, world: int, module: str, settings: dict[str, str]) -> list[Forked]:
    """Start `module.train_all` on every rank, with the environment of a launcher."""
    port = str(_free_port())
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    shared |= {"OMP_NUM_THREADS": "1", **settings}
    return [
        Forked(
            train_rank,
            *(module, folder, world),
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            errors=folder / f"errors-{rank}.txt",
        )
        for rank in range(world)
    ]


def _free_port() -> int:
    """A port below those that the system hands out unasked, so nobody gets it before rank 0."""
    for port in random.SystemRandom().sample(range(20_000, 30_000), 20):
        with socket.socket() as here, suppress(OSError):
            here.bind(("127.0.0.1", port))
            return port
    raise OSError("20 ports between 20000 and 30000 are all taken")


def train_rank(module: str, folder: Path, world: int) -> None:
    import_module(module).train_all(folder, world)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the results of two processes."""
    return run_once(tmp_path_factory, "two", "test_distributed", USE_CPU)


def run_once(
    tmp_path_factory: pytest.TempPathFactory, name: str, module: str, settings: dict[str, str]
) -> Path:
    """Run two processes, once for all workers of pytest-xdist, and return their folder."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    verdict = folder / "verdict.txt"
    with FileLock(f"{folder}.lock"):
        if not verdict.exists():
            folder.mkdir()
            verdict.write_text(run_two(folder, module, settings))
    assert verdict.read_text() == "", verdict.read_text()
    return folder


def run_two(folder: Path, module: str, settings: dict[str, str]) -> str:
    """Run two processes to the end, and return what went wrong."""
    ranks = processes(folder, 2, module, settings)
    try:
        codes = [rank.wait(TIMEOUT) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if None in codes:
        return f"two processes hang; finished: {sorted(p.stem for p in folder.glob('*.pt'))}"
    errors = [(folder / f"errors-{rank}.txt").read_text()[-2000:] for rank in range(2)]
    return "" if codes == [0, 0] else f"exit codes {codes}\n" + "\n".join(errors)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Result of one process, by name of the run; each is trained once."""
    return cache(lambda name: train(tmp_path_factory.mktemp("one"), 1, (RUNS | OTHERS)[name]))


def of_ranks(folder: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(2)]


def test_two_processes_give_the_result_of_one(one, two):
    for name in RUNS:
        assert_same_result(name, one(name), of_ranks(two, name))


@pytest.mark.slow
def test_two_processes_give_the_result_of_one_for_every_other_row(one, tmp_path_factory):
    student = str(tmp_path_factory.mktemp("student"))
    tiny.model().save_pretrained(student)
    settings = {**USE_CPU, OTHERS_STUDENT: student}
    two = run_once(tmp_path_factory, "others", "test_distributed", settings)
    for name in OTHERS:
        assert_same_result(name, one(name), of_ranks(two, name))


def assert_same_result(name: str, whole: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    start = tiny.model().state_dict()
    for key, value in whole["weights"].items():
        assert torch.equal(ranks[0]["weights"][key], ranks[1]["weights"][key]), (name, key)
        assert (ranks[0]["weights"][key] - value).abs().max() <= 1e-5, (name, key)
        assert (value - start[key]).abs().max() > 1e-3, f"{name} learned nothing"
    # A micro-step of an accumulated run holds other rows, and its means are averaged unweighted.
    if "accumulated" not in name:
        for ours, theirs in zip(ranks[0]["metrics"], whole["metrics"], strict=True):
            # None where a step had nothing to average, such as no advantage to be a ratio to.
            empty = [{k for k, v in logged.items() if v is None} for logged in (ours, theirs)]
            assert empty[0] == empty[1]
            numbers = [{k: v for k, v in m.items() if v is not None} for m in (ours, theirs)]
            assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-5), name


def test_a_sigterm_to_one_rank_stops_both_after_the_same_step_and_both_resume(two):
    for rank in of_ranks(two, "stopped"):
        assert rank["step"] == 2
        assert "stopped by SIGTERM after step 2 of 4, resumable" in rank["said"]
        assert rank["end"] == 4, "not resumed on two processes"
    saved = {path.name for path in (two / "stopped" / "checkpoint-2").iterdir()}
    assert {"trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"} <= saved


def test_a_row_that_one_rank_refuses_stops_both(two):
    ours, theirs = of_ranks(two, "refused")
    assert ours == theirs
    assert "have no privileged_context" in ours[0]
    assert "positions, the model has 512" in ours[1]


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("sdpo")])
def test_no_wrong_peer(one, two, name):
    """Every demonstration, by the reward's own script: the first other success of the group."""
    local = (rank["contexts"] for rank in of_ranks(two, name))
    shown = [ours + theirs for ours, theirs in zip(*local, strict=True)]
    assert shown == one(name)["contexts"]
    tokenizer = tiny.tokenizer()
    marks = {tokenizer.decode([SUCCESS]): True, tokenizer.decode([FAILURE]): False}
    for good, texts in zip(GOOD, shown, strict=True):
        for row, text in enumerate(texts):
            group = range(row - row % 4, row - row % 4 + 4)
            expected = any(peer in good for peer in group if peer != row)
            assert (text is not None) == expected, (row, good)
            if expected:
                assert marks[text[0]]
