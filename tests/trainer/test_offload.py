"""A teacher kept in CPU memory. The device of these tests is a copy that is spoilt after use."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate import DistributedType
from peft import LoraConfig, get_peft_model

from rlsd_lib.trainer import teacher as offload
from rlsd_lib.trainer.checks import check_sharding


@pytest.fixture
def device(monkeypatch):
    """What was sent to the device and is still there."""
    sent = []

    def send(tensor, _):
        sent.append(tensor.clone())
        return sent[-1]

    monkeypatch.setattr(offload, "_sent", send)
    return sent


def spoil(sent: list[torch.Tensor]) -> None:
    for tensor in sent:
        tensor.fill_(float("nan"))
    sent.clear()


def run(trainer, sent) -> list[dict]:
    score = trainer.teacher_scores

    def scored(*args, **kwargs):
        result = score(*args, **kwargs)
        if trainer.teacher.offloaded:
            assert len(sent) == len(list(trainer.teacher.model.parameters()))
            spoil(sent)
        return result

    trainer.teacher_scores = scored
    trainer.train()
    timing = {"step_time", "epoch", "train_runtime", "total_flos"}
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return [{k: v for k, v in row.items() if k not in timing} for row in rows]


def test_where_a_teacher_lives_changes_nothing(tmp_path, device):
    settings = {"teacher_model_kind": "ema", "teacher_sync_steps": 1, "max_steps": 3}
    here = run(tiny.trainer(tmp_path, **settings), device)
    away = tiny.trainer(tmp_path, teacher_offload=True, **settings)
    assert run(away, device) == here
    assert all(
        p.isfinite().all() and p.device.type == "cpu" for p in away.teacher.model.parameters()
    )


def test_an_offloaded_teacher_is_saved_and_restored_in_place(tmp_path):
    settings = {"teacher_model_kind": "ema", "teacher_offload": True, "teacher_sync_steps": 1}
    trained = tiny.trainer(tmp_path, max_steps=2, **settings)
    trained.train()
    trained.teacher.save(tmp_path, 2)
    fresh = tiny.trainer(tmp_path, **settings)
    homes = [p.data_ptr() for p in fresh.teacher.model.parameters()]
    fresh.teacher.load(tmp_path, fresh.model)
    pairs = list(
        zip(fresh.teacher.model.parameters(), trained.teacher.model.parameters(), strict=True)
    )
    assert all(torch.equal(left, right) for left, right in pairs)
    assert any(
        not torch.equal(left, right)
        for left, right in zip(
            fresh.model.parameters(), fresh.teacher.model.parameters(), strict=True
        )
    )
    assert [p.data_ptr() for p in fresh.teacher.model.parameters()] == homes


def test_a_failed_pass_brings_the_teacher_home(device):
    model = tiny.model()
    homes = [p.data_ptr() for p in model.parameters()]
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        offload.on_device(model, torch.device("cpu")),
    ):
        assert [p.data_ptr() for p in model.parameters()] != homes
        raise RuntimeError("out of memory")
    assert [p.data_ptr() for p in model.parameters()] == homes


def test_offloading_is_refused_where_there_is_no_full_copy(tmp_path):
    said = r"teacher_offload=True means nothing with .*'live'.* one of 'base', 'ema', 'snapshot'"
    with pytest.raises(ValueError, match=said):
        tiny.config(tmp_path, teacher_offload=True, teacher_model_kind="live")
    adapted = get_peft_model(tiny.model(), LoraConfig(r=4))
    with pytest.raises(ValueError, match="teacher_offload=True: the teacher of a PEFT student"):
        tiny.trainer(tmp_path, adapted, teacher_offload=True)
    sharded = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True)
    with pytest.raises(ValueError, match=r"teacher_offload=True under .*FSDP"):
        check_sharding(tiny.model(), tiny.config(tmp_path, teacher_offload=True), sharded)
