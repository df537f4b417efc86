"""A resumed run is the same run, bit by bit, or it is refused with the file or the value."""

import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import kills
import pytest
import tiny
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from trl import GRPOTrainer

from rlsd_lib import RLSDTrainer
from rlsd_lib.trainer import checkpoints
from rlsd_lib.trainer.checkpoints import MARK, last_checkpoint

EVERY_STEP = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with checkpoints of three steps; tests that damage them use copies."""
    folder = tmp_path_factory.mktemp("trained")
    tiny.trainer(folder, **EVERY_STEP).train()
    return folder


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "is missing": Path.unlink,
    "is damaged: its hash differs": flip,
    "is damaged": lambda file: file.write_bytes(file.read_bytes()[:-1]),
}


def test_no_damaged_file_is_resumed_from(copied: Path, trained: Path) -> None:
    whole = copied / "checkpoint-3"
    files = [p.relative_to(whole) for p in whole.rglob("*") if p.is_file() and p.name != MARK]
    names = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "rlsd_teacher.json"}
    assert names <= {str(file) for file in files}
    for file in files:
        for said, damage in DAMAGES.items():
            damage(whole / file)
            with pytest.raises(ValueError, match=said) as caught:
                checkpoints.check(whole)
            assert str(whole / file) in str(caught.value)
            assert f"older checkpoint is {copied / 'checkpoint-2'}: " in str(caught.value)
            shutil.copy(trained / "checkpoint-3" / file, whole / file)
    assert checkpoints.check(whole)["changes"] == []


def test_a_damaged_checkpoint_is_refused_and_the_next_older_one_is_offered(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flip(copied / "checkpoint-3" / "optimizer.pt")
    assert last_checkpoint(copied) == copied / "checkpoint-3"
    again = tiny.trainer(copied, **EVERY_STEP)
    with pytest.raises(ValueError, match=r"checkpoint-3/optimizer\.pt is damaged.*resume-older"):
        again.train(resume_from_checkpoint=True)
    assert last_checkpoint(copied, whole=True) == copied / "checkpoint-2"
    assert "passed over: " in caplog.text
    for folder in copied.glob("checkpoint-[12]"):
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"no older checkpoint: begin anew"):
        checkpoints.check(copied / "checkpoint-3")


def test_a_list_that_is_cut_off_or_gone_makes_no_checkpoint_whole(copied: Path) -> None:
    mark = copied / "checkpoint-3" / MARK
    for text in (mark.read_text()[:-9], "[]", "null", '{"files": 1}', ""):
        mark.write_text(text)
        with pytest.raises(ValueError, match=rf"{MARK} is damaged"):
            checkpoints.check(mark.parent)
    mark.unlink()
    with pytest.raises(ValueError, match=rf"{MARK} is missing: it was not written whole"):
        checkpoints.check(mark.parent)
    only = {**EVERY_STEP, "max_steps": 1, "save_only_model": True}
    tiny.trainer(copied / "only", method="grpo", **only).train()
    with pytest.raises(ValueError, match="holds weights alone"):
        checkpoints.check(copied / "only" / "checkpoint-1")


def test_checkpoints_of_earlier_versions_and_of_other_writers_are_known(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied / "checkpoint-3"
    (folder / "checkpoint-is-incomplete.txt").write_text("")  # transformers', while it saves
    assert checkpoints.check(folder) is not None
    (folder / MARK).write_text('{"step": 3}')
    assert checkpoints.check(folder) is None
    assert "of an earlier version" in caplog.text
    (folder / MARK).unlink()
    for file in folder.glob("rlsd_rollouts_*"):
        file.unlink()
    (folder / "optimizer.pt").unlink()
    assert checkpoints.check(folder, sharded_state=True) is None
    with pytest.raises(ValueError, match=r"checkpoint-20: there is no such checkpoint"):
        checkpoints.check(copied / "checkpoint-20")


def test_what_a_new_version_adds_is_recorded_and_free_settings_are_free(tmp_path: Path) -> None:
    before = {"seed": 1, "resume_from_checkpoint": None, "do_train": False}
    now = {
        "seed": 1,
        "resume_from_checkpoint": "checkpoint-2",
        "do_train": True,
        "use_cache": False,
    }
    found = checkpoints.changed(tmp_path, before, now)
    assert found.pop("use_cache") == [None, False]
    assert set(found) == {"resume_from_checkpoint", "do_train"}


def test_the_hub_gets_whole_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = []
    monkeypatch.setattr(
        GRPOTrainer,
        "_push_from_checkpoint",
        lambda self, folder: pushed.append((Path(folder).name, (Path(folder) / MARK).exists())),
    )
    trainer = tiny.trainer(tmp_path, **{**EVERY_STEP, "max_steps": 2})
    trainer.args.push_to_hub = True
    monkeypatch.setattr(trainer, "init_hf_repo", lambda *_, **__: None)
    monkeypatch.setattr(trainer, "_finish_current_push", lambda: None)
    trainer.train()
    assert pushed == [("checkpoint-1", True), ("checkpoint-2", True)]


def test_a_reference_model_that_moves_is_in_no_checkpoint(copied: Path) -> None:
    again = tiny.trainer(copied, **EVERY_STEP)
    again.args.sync_ref_model = True
    with pytest.raises(ValueError, match=r"sync_ref_model=True: the reference model has moved"):
        again.train(resume_from_checkpoint=True)


def test_frozen_weights_may_hold_any_bytes() -> None:
    model, accelerator = tiny.model(), Accelerator(cpu=True)
    packed = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        packed.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="NaN, infinite or beyond 1e19 after step 3"):
        checkpoints.check_weights(model, 3, accelerator)
    packed.requires_grad_(False)
    checkpoints.check_weights(model, 3, accelerator)


OTHERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "seed=7, this run has 8": (None, None, {"seed": 8}),
    "method='rlsd', this run has 'grpo'": (None, None, {"method": "grpo"}),
    "learning_rate=0.01, this run has 0.02": (None, None, {"learning_rate": 0.02}),
    r"max_steps=3, this run has 2 \(it may only grow\)": (None, None, {"max_steps": 2}),
    r"model='.* of 25440 param.*', this run has '.* of 12752 ": ({"hidden_size": 16}, None, {}),
    r"model='.*float32', this run has '.*float64'": ({"dtype": torch.float64}, None, {}),
    r"rows='32, SHA-256 \w+', this run has '31, ": (None, 31, {}),
}


@pytest.mark.parametrize("said", OTHERS)
def test_another_run_is_not_continued(trained: Path, said: str) -> None:
    student, rows, settings = OTHERS[said]
    if student is not None:
        dtype = student.pop("dtype", torch.float32)
        student = tiny.model(**student).to(dtype)
    data = tiny.dataset(rows) if rows else None
    other = tiny.trainer(trained, student, data, **{**EVERY_STEP, **settings})
    with pytest.raises(ValueError, match=f"checkpoint-2 was written with .*{said}"):
        other.train(resume_from_checkpoint=str(trained / "checkpoint-2"))


def test_another_adapter_is_not_continued(tmp_path: Path) -> None:
    def trainer(alpha: int) -> RLSDTrainer:
        lora = LoraConfig(r=2, lora_alpha=alpha, target_modules={"q_proj", "k_proj", "v_proj"})
        return tiny.trainer(tmp_path, get_peft_model(tiny.model(), lora), **EVERY_STEP)

    trainer(4).train()
    with pytest.raises(ValueError, match=r"adapter={.*'lora_alpha': '4'.*this run has .*: '8'"):
        trainer(8).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trainer(4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def tempered(advantages, gap, mask, tau):
    return advantages[:, None] * (gap / tau).tanh()


def test_another_setting_of_a_credit_is_not_continued(tmp_path: Path) -> None:
    def trainer(tau: float) -> RLSDTrainer:
        return tiny.trainer(tmp_path, more={"credit": partial(tempered, tau=tau)}, **EVERY_STEP)

    trainer(1.0).train()
    said = r"credit function=\"tempered with {'tau': 1.0}\", this run has .*'tau': 50.0"
    with pytest.raises(ValueError, match=said):
        trainer(50.0).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_another_body_of_a_credit_is_not_continued(tmp_path: Path) -> None:
    def trainer(credit: Any) -> RLSDTrainer:
        return tiny.trainer(tmp_path, more={"credit": credit}, **EVERY_STEP)

    def mine(advantages: Any, gap: Any, mask: Any) -> Any:
        return advantages[:, None] * gap

    first = mine

    def mine(advantages: Any, gap: Any, mask: Any) -> Any:
        return advantages[:, None] * -gap

    trainer(first).train()
    with pytest.raises(ValueError, match=r"credit code, Python 3.\d+='\w+', this run has '\w+'"):
        trainer(mine).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_print_of_a_function_is_of_its_code_and_the_same_in_every_process() -> None:
    text = (
        "def f(advantages, gap, mask):\n    return gap if mask in {'a', 'b', 'c', 'd'} else 2 * gap"
    )
    show = "from rlsd_lib.trainer.checkpoints import _code_of; print(_code_of(f))"
    found = set()
    for seed, source in (("1", text), ("2", text.replace("\n", "  # why\n\n"))):
        words = [sys.executable, "-c", f"{source}\n{show}"]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
        found.add(done.stdout)
    assert len(found) == 1 and "None" not in found.pop()


@pytest.mark.parametrize("what", ["base", "external", "reference", "base of the adapter"])
def test_weights_that_no_checkpoint_holds_must_be_the_same(tmp_path: Path, what: str) -> None:
    """A resume from a trained model, say, would put it in the place of the teacher or of pi_ref."""

    def trainer(seed: int) -> RLSDTrainer:
        model, other = tiny.model(), tiny.model()
        with torch.no_grad():
            for each in (model, other):
                next(each.parameters())[0, 0] += seed
        if what == "external":
            how = {"method": "opd", "more": {"teacher_model": other}}
            return tiny.trainer(tmp_path, **how, **EVERY_STEP)
        if what == "base of the adapter":
            lora = LoraConfig(r=2, target_modules={"q_proj"})
            return tiny.trainer(tmp_path, get_peft_model(model, lora), **EVERY_STEP)
        kind = "base" if what == "base" else "live"
        made = tiny.trainer(tmp_path, model, teacher_model_kind=kind, **EVERY_STEP)
        if what == "reference":
            made.ref_model = other
            made.fixed_weights = checkpoints.print_of_fixed(made)
        return made

    trainer(0).train()
    with pytest.raises(ValueError, match=r"fixed weights='\w+', this run has '\w+'"):
        trainer(1).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trainer(0).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_what_decides_nothing_is_not_compared(tmp_path: Path) -> None:
    """TRL's frozen copy of an adapter that begins at random, and weights that a run takes itself."""

    def adapted(seed: int) -> RLSDTrainer:
        model = tiny.model()
        torch.manual_seed(seed)
        student = get_peft_model(model, LoraConfig(r=2, target_modules={"q_proj"}))
        return tiny.trainer(tmp_path / "lora", student, beta=0.1, **EVERY_STEP)

    adapted(0).train()
    adapted(1).train(resume_from_checkpoint=str(tmp_path / "lora" / "checkpoint-2"))

    def based() -> RLSDTrainer:
        return tiny.trainer(tmp_path / "full", teacher_model_kind="base", **EVERY_STEP)

    twice = based()
    twice.train()
    twice.train()  # whose teacher is the model that the first has trained
    with pytest.raises(ValueError, match="fixed weights="):
        based().train(resume_from_checkpoint=str(tmp_path / "full" / "checkpoint-2"))
    released = tiny.trainer(
        tmp_path / "over", teacher_model_kind="base", lambda_decay_steps=1, **EVERY_STEP
    )
    released.train()
    released.args.max_steps = 4
    released.train(resume_from_checkpoint=str(tmp_path / "over" / "checkpoint-3"))
    assert released.state.global_step == 4


def test_a_base_teachers_adapter_is_restored(tmp_path: Path) -> None:
    """Adapters begin at random: a new trainer's would be another teacher."""

    def trainer(seed: int) -> RLSDTrainer:
        lora = LoraConfig(r=2, target_modules={"q_proj"}, init_lora_weights=False)
        model = tiny.model()
        torch.manual_seed(seed)
        student = get_peft_model(model, lora)
        return tiny.trainer(tmp_path, student, teacher_model_kind="base", **EVERY_STEP)

    def adapter(made: RLSDTrainer) -> dict[str, torch.Tensor]:
        return {k: p.clone() for k, p in made.model.named_parameters() if ".teacher." in k}

    first = trainer(0)
    wanted = adapter(first)
    first.train()
    again = trainer(1)
    assert any((p != wanted[name]).any() for name, p in adapter(again).items())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(p, wanted[name]) for name, p in adapter(again).items())


def test_what_may_change_is_recorded_with_its_step(copied: Path, trained: Path) -> None:
    longer = {**EVERY_STEP, "max_steps": 4, "logging_steps": 2}
    again = tiny.trainer(copied, **longer)
    again.train(resume_from_checkpoint=True)
    changed = {"max_steps": [3, 4], "logging_steps": [1, 2]}
    expected = [{"step": 3, **changed, "output_dir": [str(trained), str(copied)]}]
    assert again.changes == expected
    last = tiny.trainer(copied, **longer)
    last.train(resume_from_checkpoint=True)
    assert last.state.global_step == 4, "a run that was stopped after its last step makes no other"
    assert last.changes == json.loads((copied / "checkpoint-4" / MARK).read_text())["changes"]
    assert last.changes == expected
    pairs = zip(again.model.parameters(), last.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_step_goes_through_every_phase_of_the_kill_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in kills.FUNCTIONS:  # put back at the end
        monkeypatch.setattr(kills.checkpoints, name, getattr(kills.checkpoints, name))
    trainer = kills.made(tmp_path, "snapshot", "one epoch")
    called: set[str] = set()
    for phase in kills.PHASES:
        kills.before(trainer, phase, lambda phase=phase: called.add(phase))
    trainer.train()
    assert called == set(kills.PHASES)


def tried(folder: Path, *count: object) -> None:
    command = [sys.executable, kills.__file__, str(folder), *map(str, count)]
    ours = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=ours)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_a_sample_of_killed_runs_is_resumed_bit_by_bit(tmp_path: Path) -> None:
    tried(tmp_path, 2)


@pytest.mark.slow
def test_runs_killed_anywhere_are_resumed_bit_by_bit(tmp_path: Path) -> None:
    tried(tmp_path)
