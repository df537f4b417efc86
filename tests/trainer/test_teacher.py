"""The teacher's life: refresh, release, checkpoints, and resuming after a kill."""

import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from trl import GRPOTrainer

from rlsd_lib.trainer.checkpoints import MARK
from rlsd_lib.trainer.teacher import (
    STATE_FILE,
    WEIGHTS_FILE,
    Teacher,
    adapter_pairs,
    copy_for_scoring,
)


def lora_student(seed: int = 0):
    torch.manual_seed(seed)
    return get_peft_model(tiny.model(), LoraConfig(r=4, init_lora_weights=False))


def student_for(variant: str):
    return lora_student() if variant.endswith("lora") else tiny.model()


def teacher_weights(trainer) -> dict[str, torch.Tensor]:
    pairs = trainer.teacher._parameter_pairs(trainer.model)
    return {str(i): teacher.detach().clone() for i, (teacher, _) in enumerate(pairs)}


def student_weights(trainer) -> dict[str, torch.Tensor]:
    pairs = trainer.teacher._parameter_pairs(trainer.model)
    return {str(i): student.detach().clone() for i, (_, student) in enumerate(pairs)}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("variant", ["full", "lora"])
def test_snapshot_is_the_student_of_the_last_sync(tmp_path, variant):
    trainer = tiny.trainer(tmp_path, student_for(variant), max_steps=5, teacher_sync_steps=2)
    history = {0: student_weights(trainer)}
    # Registered after the teacher's own callback, so it sees the state after the sync.
    trainer.callback_handler.callbacks[-1].on_step_begin = lambda args, state, control, **_: (
        history.update({state.global_step: student_weights(trainer)})
    )
    trainer.train()
    assert same(teacher_weights(trainer), history[4])
    assert not same(teacher_weights(trainer), student_weights(trainer))
    ages = [row["rlsd/teacher_age"] for row in trainer.state.log_history if "loss" in row]
    assert ages == [0, 1, 0, 1, 0]


def test_base_never_moves_and_ema_moves_by_its_rate(tmp_path):
    base = tiny.trainer(tmp_path, max_steps=2, teacher_model_kind="base")
    start = student_weights(base)
    base.train()
    assert same(teacher_weights(base), start)
    ema = tiny.trainer(
        tmp_path,
        max_steps=1,
        teacher_model_kind="ema",
        teacher_sync_steps=1,
        teacher_update_rate=0.25,
    )
    ema.train()
    end, averaged = student_weights(ema), teacher_weights(ema)
    for name in start:
        torch.testing.assert_close(averaged[name], 0.75 * start[name] + 0.25 * end[name])


def test_trap_2_a_full_copy_answers_with_its_own_weights(tmp_path):
    """A plain deep copy of the patched model would answer with the live student's."""
    trainer = tiny.trainer(tmp_path, method="grpo")
    teacher = copy_for_scoring(trainer.model, trainer.args)
    ids = torch.randint(6, 40, (1, 9))
    before = teacher(ids, labels=ids, fused_lm_head=True).log_probs.clone()
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(3)
    assert torch.equal(teacher(ids, labels=ids, fused_lm_head=True).log_probs, before)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training


def test_trap_17_the_teacher_adapter_is_frozen_and_never_the_active_one(tmp_path):
    trainer = tiny.trainer(
        tmp_path, lora_student(), max_steps=3, save_strategy="steps", save_steps=1
    )
    start = teacher_weights(trainer)
    seen = []
    trainer.callback_handler.callbacks[-1].on_pre_optimizer_step = lambda *_, **__: seen.append(
        (trainer.model.active_adapter, [t.grad is None for t, _ in adapter_pairs(trainer.model)])
    )
    trainer.callback_handler.callbacks[-1].on_save = lambda *_, **__: seen.append(
        (trainer.model.active_adapter, [True])
    )
    trainer.train()
    assert len(seen) == 6
    assert all(active == "default" and all(no_grad) for active, no_grad in seen)
    assert same(teacher_weights(trainer), start), "no sync was due within three steps"
    trained = [p for g in trainer.optimizer.param_groups for p in g["params"]]
    assert not any(t is p for t, _ in adapter_pairs(trainer.model) for p in trained)


def held() -> int:
    """Bytes of every tensor alive, each storage once."""
    gc.collect()
    alive = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
    return sum(storages.values())


@pytest.mark.parametrize("variant", ["full", "lora"])
def test_an_adapter_teacher_costs_adapter_weights_only(tmp_path, variant):
    args = tiny.config(tmp_path)
    trainer = tiny.trainer(tmp_path, student_for(variant), method="grpo")
    trained = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    before = held()
    teacher = Teacher(trainer.model, args, trainer.accelerator)
    added = held() - before
    assert trained <= added <= trained + 1024  # and a few buffers, as large as positions are wide
    assert (teacher.model is trainer.model) == (variant == "lora")


RESUME = {
    "snapshot": {"teacher_model_kind": "snapshot", "teacher_sync_steps": 2},
    "snapshot at its sync": {"teacher_model_kind": "snapshot", "teacher_sync_steps": 3},
    "ema lora": {
        "teacher_model_kind": "ema",
        "teacher_sync_steps": 1,
        "teacher_update_rate": 0.3,
    },
}


def resumable(folder: Path, variant: str):
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, **RESUME[variant]}
    return tiny.trainer(folder, student_for(variant), **settings)


def run_until_killed(folder: Path) -> None:
    """Child process: forks for each variant one that kills itself after optimiser step 5."""
    for variant in RESUME:
        if (child := os.fork()) == 0:
            trainer = resumable(folder / variant, variant)

            def kill(args, state, control, **_):
                if state.global_step == 5:
                    os.kill(os.getpid(), signal.SIGKILL)

            trainer.callback_handler.callbacks[-1].on_step_begin = kill
            trainer.train()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_trap_20_a_killed_run_resumes_bit_identically(tmp_path):
    code = (
        f"import sys; sys.path[:0] = {[str(p) for p in Path(__file__).parents[:2]]!r}\n"
        f"from pathlib import Path; import test_teacher\n"
        f"test_teacher.run_until_killed(Path({str(tmp_path)!r}))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert child.returncode == 0, child.stderr.decode()[-2000:]
    for variant in RESUME:
        whole = resumable(tmp_path / "whole" / variant, variant)
        whole.train()
        killed = tmp_path / variant
        assert sorted(p.name for p in killed.glob("checkpoint-*")) == ["checkpoint-3"]
        resumed = resumable(killed, variant)
        resumed.train(resume_from_checkpoint=True)
        assert same(student_weights(resumed), student_weights(whole)), variant
        assert same(teacher_weights(resumed), teacher_weights(whole)), variant
        timing = {"step_time", "epoch", "train_runtime"}
        for ours, theirs in zip(resumed.state.log_history, whole.state.log_history, strict=True):
            if "loss" in ours:
                assert {k: v for k, v in ours.items() if k not in timing} == {
                    k: v for k, v in theirs.items() if k not in timing
                }


def test_resuming_without_teacher_state_is_refused(tmp_path):
    args = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = tiny.trainer(tmp_path, **args)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-1"
    state = json.loads((checkpoint / STATE_FILE).read_text())
    assert state == {
        "kind": "snapshot",
        "last_sync_step": 0,
        "weights": WEIGHTS_FILE,
        "released": False,
    }
    with pytest.raises(ValueError, match="teacher_model_kind='snapshot', this run has 'ema'"):
        tiny.trainer(tmp_path, teacher_model_kind="ema", **args).train(
            resume_from_checkpoint=str(checkpoint)
        )
    for file in (checkpoint / STATE_FILE, checkpoint / MARK, *checkpoint.glob("rlsd_*")):
        file.unlink(missing_ok=True)  # what is left could be of TRL's own trainer
    with pytest.raises(ValueError, match="holds no teacher state"):
        tiny.trainer(tmp_path, **args).train(resume_from_checkpoint=str(checkpoint))


def test_a_released_teacher_stays_released_on_resume(tmp_path):
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lambda_decay_steps": 1}
    tiny.trainer(tmp_path, **args).train()
    assert not (tmp_path / "checkpoint-2" / WEIGHTS_FILE).exists()
    resumed = tiny.trainer(tmp_path, **args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.teacher.model is None


def test_another_train_starts_the_teacher_anew(tmp_path):
    """Its steps are counted from 0, and so is the teacher's age; a copy is of the student of now."""
    for kind, variant in [("snapshot", "full"), ("snapshot", "lora"), ("base", "full")]:
        settings = {"max_steps": 3, "teacher_sync_steps": 2, "teacher_model_kind": kind}
        trainer = tiny.trainer(tmp_path, student_for(variant), **settings)
        trainer.train()
        middle, begun = student_weights(trainer), []
        assert not same(teacher_weights(trainer), middle), (kind, variant)
        trainer.callback_handler.callbacks[-1].on_step_begin = (
            lambda *_, trainer=trainer, begun=begun, **__: begun.append(teacher_weights(trainer))
        )
        trainer.train()
        assert same(begun[0], middle), (kind, variant)
        ages = [row["rlsd/teacher_age"] for row in trainer.state.log_history if "loss" in row]
        assert ages == [0, 1, 0 if kind == "snapshot" else 2], (kind, variant)


def test_another_train_that_needs_a_released_teacher_is_refused(tmp_path):
    trainer = tiny.trainer(tmp_path, max_steps=2, lambda_decay_steps=1)
    trainer.train()
    with pytest.raises(ValueError, match=r"step 0 needs .* lambda_decay_steps=1\. Make a new tr"):
        trainer.train()


def test_a_grpo_checkpoint_can_be_continued_with_a_live_teacher(tmp_path):
    args = tiny.config(tmp_path, method="grpo", max_steps=2, save_strategy="steps", save_steps=1)
    GRPOTrainer(
        tiny.model(), tiny.reward, args, tiny.dataset(), processing_class=tiny.tokenizer()
    ).train()
    live = tiny.trainer(tmp_path, teacher_model_kind="live", max_steps=2)
    live.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert live.state.global_step == 2


def test_a_saved_adapter_model_holds_no_teacher_and_a_checkpoint_does(tmp_path):
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    run = tmp_path / "checkpoints"  # a name like those of its checkpoints
    trainer = tiny.trainer(run, lora_student(), **settings)
    trainer.train()
    assert (run / "checkpoint-1" / "teacher").is_dir()
    for folder in (tmp_path / "model", run):
        trainer.save_model(str(folder))
        files = {path.name for path in folder.iterdir()}
        assert "adapter_model.safetensors" in files
        assert "teacher" not in files
    assert set(trainer.model.peft_config) == {"default", "teacher"}


def test_a_model_card_cites_the_paper_of_the_method_and_no_name_that_nobody_gave(tmp_path):
    trainer = tiny.trainer(tmp_path)
    trainer.create_model_card("tiny")
    card = (tmp_path / "README.md").read_text()
    assert "Model Card for tiny\n\nThis model is fine-tuned." in card
    trainer.create_model_card()
    assert "None" not in card + (tmp_path / "README.md").read_text()
    assert "2604.03128" in card
    assert "Self-Distilled RLVR" in card
    assert "DeepSeekMath" not in card
