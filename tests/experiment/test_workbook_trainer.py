"""Each fault ends in an orderly stop that names it, and no good checkpoint is ever lost to one."""

import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import TrainerCallback

from rlsd_lib.experiment import workbook_trainer
from rlsd_lib.experiment.workbook_trainer import Stopped, WorkbookTrainer
from rlsd_lib.trainer.checkpoints import MARK, last_checkpoint

EVERY_STEP = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}


class At(TrainerCallback):
    """Does something when the optimiser step after `step` finished ones begins."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


def made(folder: Path, *functions: Any, **settings: Any) -> WorkbookTrainer:
    rewards = list(functions) or tiny.reward
    return tiny.trainer(folder, kind=WorkbookTrainer, rewards=rewards, **settings)


def weights(trainer: WorkbookTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def resume(trainer: WorkbookTrainer) -> None:
    last = last_checkpoint(trainer.args.output_dir)
    trainer.train(resume_from_checkpoint=str(last))


def folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.is_dir())


# ---- checkpoints ------------------------------------------------------------------------------


def test_incomplete_checkpoints_are_ignored_and_named(tmp_path: Path, caplog: Any) -> None:
    assert last_checkpoint(tmp_path) is None
    whole = tmp_path / "checkpoint-9"
    for folder in (whole, tmp_path / "checkpoint-10", tmp_path / "checkpoint-best"):
        folder.mkdir()
        (folder / "trainer_state.json").touch()
    (whole / MARK).touch()
    assert last_checkpoint(tmp_path) == whole
    assert f"checkpoint-10 has no {MARK}: incomplete, ignored" in caplog.text


def test_a_full_disk_costs_the_new_checkpoint_and_no_old_one(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = made(tmp_path, **EVERY_STEP, save_total_limit=1)
    # The system refuses to write any file beyond this length, as it does on a full disk.
    limit = At(1, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard)))
    trainer.add_callback(limit)
    try:
        with pytest.raises(RuntimeError) as caught:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "checkpoint-2 could not be written" in str(caught.value)
    assert f"{tmp_path / 'checkpoint-1'} is complete and untouched" in str(caught.value)
    assert folders(tmp_path) == ["checkpoint-1"]
    again = made(tmp_path, **EVERY_STEP)
    resume(again)
    assert again.state.global_step == 4


def test_a_kill_in_the_middle_of_a_save_leaves_the_last_good_one(tmp_path: Path) -> None:
    """Killed when all but the mark is written, with a limit of one checkpoint."""
    trainer = made(tmp_path, **EVERY_STEP, save_total_limit=1)
    wait = trainer.accelerator.wait_for_everyone

    def killed() -> None:
        if (tmp_path / "checkpoint-2" / "trainer_state.json").exists():
            raise SystemExit  # what was written so far stays, as after a SIGKILL
        wait()

    trainer.accelerator.wait_for_everyone = killed
    with pytest.raises(SystemExit):
        trainer.train()
    assert folders(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    assert last_checkpoint(tmp_path).name == "checkpoint-1"
    again = made(tmp_path, **EVERY_STEP, save_total_limit=2)
    begun: list[int] = []
    again.add_callback(At(1, lambda: begun.append(again.state.global_step)))
    resume(again)
    assert begun == [1]
    assert folders(tmp_path) == ["checkpoint-3", "checkpoint-4"]
    assert again.args.save_total_limit == 2


def test_a_checkpoint_written_again_is_incomplete_until_it_is_whole(tmp_path: Path) -> None:
    made(tmp_path, **{**EVERY_STEP, "max_steps": 1}).train()
    again = made(tmp_path, **{**EVERY_STEP, "max_steps": 1})
    save = again.save_model

    def watched(*args: Any, **kwargs: Any) -> None:
        assert last_checkpoint(tmp_path) is None
        save(*args, **kwargs)

    again.save_model = watched
    again.args.save_total_limit = 1
    again.train()
    last = last_checkpoint(tmp_path)
    assert last.name == "checkpoint-1"
    saved = torch.load(last / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == 1, "a checkpoint holds the settings of its run"


# ---- NaN and infinity --------------------------------------------------------------------------


def spoil(trainer: WorkbookTrainer, what: str) -> None:
    parameter = next(trainer.model.parameters())
    if what == "gradient":
        parameter.register_hook(lambda gradient: gradient * float("nan"))
    elif what == "learning rate":
        trainer.optimizer.param_groups[0]["lr"] = 1e38  # finite weights, which no forward survives
        trainer.lr_scheduler.step = lambda: None
    else:
        with torch.no_grad():
            parameter.view(-1)[0] = float(what)


@pytest.mark.parametrize("step", [0, 2, 3])
@pytest.mark.parametrize("what", ["gradient", "learning rate", "nan", "inf"])
def test_a_step_that_destroys_the_run_costs_no_good_checkpoint(
    tmp_path: Path, what: str, step: int
) -> None:
    """In the first step, one in the middle and the last one."""
    broken = made(tmp_path, **EVERY_STEP, save_total_limit=1)
    broken.add_callback(At(step, lambda: spoil(broken, what)))
    at = step + 1 if what == "learning rate" else step
    said = "gradient's norm is nan at" if what == "gradient" else "weights are NaN.* after"
    with pytest.raises(FloatingPointError, match=f"{said} step {at}"):
        broken.train()
    assert folders(tmp_path) == ([f"checkpoint-{step}"] if step else [])
    again = made(tmp_path, **EVERY_STEP)
    again.train(resume_from_checkpoint=True if step else None)
    assert again.state.global_step == 4
    assert all(p.isfinite().all() for p in again.model.parameters())


OTHERS = {
    "teacher": "Non-finite teacher log-probabilities at|The teacher's weights are NaN.* after step",
    "nan": "none of 8 rows got a reward",
    "inf": "gave inf for row 0",
}


@pytest.mark.parametrize("step", [0, 2, 3])
@pytest.mark.parametrize("what", OTHERS)
def test_a_teacher_or_a_reward_that_breaks_costs_no_good_checkpoint(
    tmp_path: Path, what: str, step: int
) -> None:
    broken = made(tmp_path, **EVERY_STEP, save_total_limit=1)

    def spoil_others() -> None:
        if what == "teacher":
            with torch.no_grad():
                next(broken.teacher.model.parameters()).view(-1)[0] = float("nan")
        else:
            broken.reward_funcs = [lambda completions, **_: [float(what)] * len(completions)]

    broken.add_callback(At(step, spoil_others))
    with pytest.raises(FloatingPointError, match=OTHERS[what]):
        broken.train()
    # A teacher is heard of when it next scores: rollouts here serve two steps.
    assert folders(tmp_path) == ([f"checkpoint-{step}"] if step else [])
    again = made(tmp_path, **EVERY_STEP)
    again.train(resume_from_checkpoint=True if step else None)
    assert again.state.global_step == 4
    assert all(p.isfinite().all() for p in again.model.parameters())


def test_a_last_step_without_a_checkpoint_is_looked_at_too(tmp_path: Path) -> None:
    trainer = made(tmp_path, max_steps=1)  # save_strategy="no"
    trainer.add_callback(At(0, lambda: spoil(trainer, "learning rate")))
    with pytest.raises(FloatingPointError, match=r"weights are NaN.* after step 1"):
        trainer.train()


# ---- signals ----------------------------------------------------------------------------------


def test_sigterm_saves_stops_and_resumes_bit_identically(tmp_path: Path) -> None:
    whole = made(tmp_path / "whole", max_steps=4)
    whole.train()
    handler = signal.getsignal(signal.SIGTERM)
    stopped = made(tmp_path / "stopped", max_steps=4)  # save_strategy="no"
    stopped.add_callback(At(1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(Stopped, match=r"stopped by SIGTERM after step 2 of 4.*checkpoint-2"):
        stopped.train()
    assert signal.getsignal(signal.SIGTERM) == handler
    assert folders(tmp_path / "stopped") == ["checkpoint-2"]
    again = made(tmp_path / "stopped", max_steps=4)
    resume(again)
    expected = weights(whole)
    assert all(torch.equal(p, expected[name]) for name, p in weights(again).items())


# ---- rewards ----------------------------------------------------------------------------------


def picky(prompts: list, **_: Any) -> list[float]:
    texts = [prompt[0]["content"] for prompt in prompts]
    values = {text: position for position, text in enumerate(dict.fromkeys(texts))}
    if any(text == LAST[0] for text in texts):
        raise KeyError(f"no answer for {LAST[0]}")
    return [float(values[text]) for text in texts]


LAST = [""]


def test_a_reward_function_that_raises_is_named_with_its_row(tmp_path: Path) -> None:
    trainer = made(tmp_path, tiny.reward, picky, max_steps=1)
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


def test_coroutines_and_models_are_left_as_they_are(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)
    for untouched in (slow_judge, model):
        assert workbook_trainer.named(untouched, "judge") is untouched
    with pytest.raises(TimeoutError, match="the judge is away"):
        made(tmp_path, tiny.reward, slow_judge, max_steps=1).train()


def test_names_that_trl_logs_are_the_functions(tmp_path: Path) -> None:
    class Grader:
        def __call__(self, completions: list, **_: Any) -> list[float]:
            return [0.0] * len(completions)

    names = made(tmp_path, tiny.reward, picky, Grader()).reward_func_names
    assert names == ["reward", "picky", "Grader"]


@pytest.mark.parametrize("value", ["good", [1.0]])
def test_a_reward_that_is_no_number_is_named_with_its_row(tmp_path: Path, value: Any) -> None:
    def graded(completions: list, **_: Any) -> list:
        return [0.5] * (len(completions) - 1) + [value]

    with pytest.raises(RuntimeError, match=r"'graded' failed on row 0 at step 0, rank 0: \w+Error"):
        made(tmp_path, graded, max_steps=1).train()


def test_the_search_for_a_row_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workbook_trainer, "DIAGNOSIS_SECONDS", -1.0)
    assert workbook_trainer._first_failing(lambda **_: 1 / 0, {"prompts": [1, 2, 3]}) is None
