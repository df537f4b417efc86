"""Each fault ends in an orderly stop that names it, and no good checkpoint is ever lost to one."""

import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import TrainerCallback

from rlsd_lib import RLSDTrainer
from rlsd_lib.trainer import checkpoints, faults
from rlsd_lib.trainer.checkpoints import CheckpointError
from rlsd_lib.trainer.faults import Stopped

EVERY_STEP = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}


class At(TrainerCallback):
    """Does something when the optimiser step after `step` finished ones begins."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


def weights(trainer: RLSDTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir())


# ---- checkpoints ------------------------------------------------------------------------------


def _checkpoint(folder: Path, text: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(text)
    return folder


def test_a_checkpoint_appears_whole_and_replaces_one_of_its_name(tmp_path: Path) -> None:
    _checkpoint(tmp_path / "checkpoint-3", "old")
    _checkpoint(checkpoints.staging(tmp_path) / "checkpoint-3", "new")
    target = checkpoints.publish(tmp_path, "checkpoint-3")
    assert (target / "trainer_state.json").read_text() == "new"
    # Another node that shares the disk finds nothing to do, and undoes nothing.
    assert checkpoints.publish(tmp_path, "checkpoint-3") == target
    assert (target / "trainer_state.json").read_text() == "new"
    checkpoints.clear(tmp_path)
    assert folders(tmp_path) == ["checkpoint-3"]


def test_incomplete_checkpoints_are_ignored_and_named(tmp_path: Path, caplog: Any) -> None:
    assert checkpoints.last_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match="no complete checkpoint to resume"):
        checkpoints.to_resume(tmp_path, True)
    whole = _checkpoint(tmp_path / "checkpoint-9")
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoints.last_checkpoint(tmp_path) == whole
    assert "checkpoint-10 has no trainer_state.json: incomplete, ignored" in caplog.text
    assert checkpoints.to_resume(tmp_path, True) == str(whole)
    assert checkpoints.to_resume(tmp_path, None) is None
    with pytest.raises(ValueError, match=r"last complete one .* is checkpoint-9"):
        checkpoints.to_resume(tmp_path, str(tmp_path / "checkpoint-10"))


def test_a_full_disk_costs_the_new_checkpoint_and_no_old_one(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = tiny.trainer(tmp_path, **EVERY_STEP, save_total_limit=1)
    # The system refuses to write any file beyond this length, as it does on a full disk.
    limit = At(1, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard)))
    trainer.add_callback(limit)
    try:
        with pytest.raises(CheckpointError) as caught:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "checkpoint-2 could not be written" in str(caught.value)
    assert f"{tmp_path / 'checkpoint-1'} is complete and untouched" in str(caught.value)
    assert folders(tmp_path) == ["checkpoint-1"]
    again = tiny.trainer(tmp_path, **EVERY_STEP)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


def test_a_kill_in_the_middle_of_a_save_leaves_the_last_good_one(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, **EVERY_STEP)
    write = trainer._save_rng_state

    def killed(folder: str) -> None:
        if trainer.state.global_step == 2:
            raise SystemExit  # what was written so far stays, as after a SIGKILL
        write(folder)

    trainer._save_rng_state = killed
    with pytest.raises(SystemExit):
        trainer.train()
    assert (checkpoints.staging(tmp_path) / "checkpoint-2" / "model.safetensors").exists()
    assert checkpoints.last_checkpoint(tmp_path).name == "checkpoint-1"
    again = tiny.trainer(tmp_path, **EVERY_STEP)
    begun: list[int] = []
    again.add_callback(At(1, lambda: begun.append(again.state.global_step)))
    again.train(resume_from_checkpoint=True)
    assert begun == [1]
    assert folders(tmp_path) == [f"checkpoint-{n}" for n in (1, 2, 3, 4)]


def test_the_best_checkpoint_is_named_by_its_final_place(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, **{**EVERY_STEP, "max_steps": 1})
    trainer.add_callback(At(0, lambda: setattr(trainer.state, "best_global_step", 1)))
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-1")


# ---- signals ----------------------------------------------------------------------------------


def test_sigterm_saves_stops_and_resumes_bit_identically(tmp_path: Path) -> None:
    whole = tiny.trainer(tmp_path / "whole", max_steps=4)
    whole.train()
    handler = signal.getsignal(signal.SIGTERM)
    stopped = tiny.trainer(tmp_path / "stopped", max_steps=4)  # save_strategy="no"
    stopped.add_callback(At(1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(Stopped, match=r"stopped by SIGTERM after step 2 of 4.*checkpoint-2"):
        stopped.train()
    assert signal.getsignal(signal.SIGTERM) == handler
    assert folders(tmp_path / "stopped") == ["checkpoint-2"]
    again = tiny.trainer(tmp_path / "stopped", max_steps=4)
    again.train(resume_from_checkpoint=True)
    expected = weights(whole)
    assert all(torch.equal(p, expected[name]) for name, p in weights(again).items())


# ---- rewards ----------------------------------------------------------------------------------


def with_rewards(folder: Path, *functions: Any) -> RLSDTrainer:
    return RLSDTrainer(
        tiny.model(),
        list(functions),
        tiny.config(folder, max_steps=1),
        tiny.dataset(),
        processing_class=tiny.tokenizer(),
    )


def picky(prompts: list, **_: Any) -> list[float]:
    texts = [prompt[0]["content"] for prompt in prompts]
    values = {text: position for position, text in enumerate(dict.fromkeys(texts))}
    if any(text == LAST[0] for text in texts):
        raise KeyError(f"no answer for {LAST[0]}")
    return [float(values[text]) for text in texts]


LAST = [""]


def test_a_reward_function_that_raises_is_named_with_its_row(tmp_path: Path) -> None:
    trainer = with_rewards(tmp_path, tiny.reward, picky)
    score = trainer._calculate_rewards

    def aimed(inputs: list, prompts: list, *rest: Any) -> torch.Tensor:
        LAST[0] = prompts[-1][0]["content"]
        row = next(i for i, p in enumerate(prompts) if p[0]["content"] == LAST[0])
        said = f"'picky' failed on row {row} at step 0, rank 0: KeyError: 'no answer for"
        with pytest.raises(RuntimeError, match=said):
            score(inputs, prompts, *rest)
        LAST[0] = ""
        return score(inputs, prompts, *rest)

    trainer._calculate_rewards = aimed
    trainer.train()


async def slow_judge(completions: list, **_: Any) -> list[float]:
    raise TimeoutError("the judge is away")


def test_a_coroutine_that_raises_is_named_and_not_asked_again(tmp_path: Path) -> None:
    said = "'slow_judge' failed on its batch of 8 rows .* TimeoutError: the judge is away"
    with pytest.raises(RuntimeError, match=said):
        with_rewards(tmp_path, tiny.reward, slow_judge).train()


def test_a_lost_rank_is_not_blamed_on_a_reward_function(tmp_path: Path, monkeypatch: Any) -> None:
    def lost(*_: Any, **__: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    trainer = with_rewards(tmp_path, tiny.reward)
    # What `gather` calls: the error comes out of accelerate, after the functions have answered.
    monkeypatch.setattr("accelerate.utils.operations.PartialState", lost)
    with pytest.raises(RuntimeError, match=r"^Connection closed by peer"):
        trainer._calculate_rewards(
            [{"prompt": "a"}], [[{"role": "user", "content": "a"}]], ["b"], [[1]]
        )


def test_a_row_without_a_reward_teaches_nothing_and_is_counted(tmp_path: Path) -> None:
    def only_some(completions: list, **_: Any) -> list[float | None]:
        return [None if i % 4 == 0 else float(i) for i in range(len(completions))]

    trainer = with_rewards(tmp_path, only_some)
    seen: list[torch.Tensor] = []
    score = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda rows: seen.append(score(rows)) or seen[-1]
    trainer.train()
    advantages = seen[0]["advantages"]
    assert advantages[::4].abs().max() == 0
    assert advantages.isfinite().all()
    assert advantages.abs().max() > 0
    assert trainer.state.log_history[0]["rewards/unscored_frac"] == 0.25


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "none of 8 rows got a reward: constant returned None"),
        (float("inf"), "'constant' gave inf for row 0 of all ranks' batch at step 0"),
    ],
)
def test_rewards_that_teach_nothing_or_break_the_mean_are_refused(
    tmp_path: Path, value: float | None, said: str
) -> None:
    def constant(completions: list, **_: Any) -> list[float | None]:
        return [value] * len(completions)

    with pytest.raises(FloatingPointError, match=said):
        with_rewards(tmp_path, constant).train()


def test_the_search_for_a_row_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "DIAGNOSIS_SECONDS", -1.0)
    assert faults._first_failing(lambda row: 1 / 0, 3) is None
