"""The LM head on completions only: TRL's numbers, fewer positions, and nowhere it was not asked for."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import tiny_vlm
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from trl.kernels import chunked_logprob
from trl.trainer import utils

from rlsd_lib import RLSDTrainer
from rlsd_lib.completion_head import TILE, CompletionHead
from rlsd_lib.distillation import causal_lm

LENGTH = 8
CPU = torch.device("cpu")


def tile() -> int:
    """Tokens in one logits tile of TRL's head."""
    return chunked_logprob.TOKEN_CHUNK_SIZE


def lora() -> nn.Module:
    return get_peft_model(tiny.model(), LoraConfig(r=4, init_lora_weights=False))


def prompt_tuning() -> nn.Module:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return get_peft_model(tiny.model(), config)


def head_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the positions of every call of TRL's head, from here on."""
    rows: list[int] = []
    apply = utils._ChunkedLogProbFunction.apply

    def counted(hidden: torch.Tensor, *args: Any) -> Any:
        rows.append(len(hidden))
        return apply(hidden, *args)

    monkeypatch.setattr(utils._ChunkedLogProbFunction, "apply", counted)
    return rows


def scored(trainer: RLSDTrainer, wanted: bool) -> dict[str, torch.Tensor]:
    """Log-probabilities and entropies of random completions, and the gradients of their sum."""
    torch.manual_seed(0)
    # More tokens than a tile holds, and padding on both sides.
    ids = torch.randint(4, 40, (TILE // LENGTH + 2, 20 + LENGTH))
    mask = torch.ones_like(ids)
    mask[1, :5] = mask[2, -3:] = 0
    trainer.model.zero_grad()
    with trainer.head.cutting(wanted, CPU):
        logps, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, LENGTH, compute_entropy=True
        )
        (logps.sum() + 0.1 * entropies.sum()).backward()
    named = trainer.model.named_parameters()
    gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
    return {"logps": logps.detach(), "entropies": entropies.detach(), **gradients}


@pytest.mark.parametrize("student", [tiny.model, lora, prompt_tuning])
def test_the_numbers_are_trls(tmp_path, monkeypatch, student: Callable[[], nn.Module]):
    trainer = tiny.trainer(tmp_path, student(), method="grpo")
    rows = head_rows(monkeypatch)
    plain, cut = scored(trainer, False), scored(trainer, True)
    assert plain.keys() == cut.keys()
    assert len(plain) > 2
    for name, value in plain.items():
        assert value.abs().max() > 0
        torch.testing.assert_close(cut[name], value, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cut["logps"], plain["logps"], rtol=0, atol=1e-5)
    batch = len(plain["logps"])
    virtual = 3 if student is prompt_tuning else 0
    every = batch * (20 + LENGTH - 1 + virtual)
    assert rows == [every, every if virtual else batch * LENGTH]


@pytest.mark.parametrize("family", tiny_vlm.FAMILIES)
def test_a_step_with_images_is_the_same(tmp_path, family):
    """Also the gap: student and teacher go through the same head."""
    logs = []
    for wanted in (False, True):
        data = tiny_vlm.dataset([1, 2, 1, 1, 2, 1, 1, 2])
        trainer = tiny_vlm.trainer(
            tmp_path, data, family=family, completion_head=wanted, max_steps=1
        )
        trainer.train()
        logs.append(trainer.state.log_history[0])
    plain, cut = logs
    for name in ("loss", "grad_norm", "entropy", "rlsd/gap_abs_mean", "rlsd/intervention"):
        assert cut[name] == pytest.approx(plain[name], rel=1e-3, abs=1e-5)
    assert plain["rlsd/gap_abs_mean"] > 0


@pytest.mark.parametrize("method", ["rlsd", "opsd"])
@pytest.mark.parametrize("teacher_pass", ["plain", "auto"])
def test_training_ends_where_it_does_with_trls_head(tmp_path, method, teacher_pass):
    """A small learning rate, so that rounding does not grow into other rollouts."""
    ends = []
    for wanted in (False, None):
        settings = {"method": method, "teacher_pass": teacher_pass, "num_iterations": 2}
        trainer = tiny.trainer(
            tmp_path, completion_head=wanted, learning_rate=1e-3, optim="sgd", **settings
        )
        trainer.train()
        ends.append(trainer.model.state_dict())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-5)


def positions_by_step(
    monkeypatch: pytest.MonkeyPatch, trainer: RLSDTrainer
) -> list[tuple[bool, set[bool]]]:
    """For each optimiser step: did the head cut, and was it given completions alone?"""
    seen: list[tuple[bool, set[bool]]] = []
    score, rows = trainer._get_per_token_logps_and_entropies, head_rows(monkeypatch)

    def watched(model: nn.Module, ids: torch.Tensor, mask: Any, length: int, *args, **kwargs):
        del rows[:]
        result = score(model, ids, mask, length, *args, **kwargs)
        batch = kwargs.get("batch_size") or len(ids)
        alone = {count == min(batch, len(ids)) * length for count in rows}
        step = trainer.state.global_step
        while len(seen) <= step:
            seen.append((trainer.head.cuts, set()))
        seen[step][1].update(alone)
        assert tile() == (TILE if trainer.head.cuts else 4096)
        return result

    trainer._get_per_token_logps_and_entropies = watched
    return seen


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # lambda at steps 0..4: 0, .25, .5, .25, 0.
        ({}, [False, True, True, True, False]),
        ({"completion_head": False}, [False] * 5),
        ({"completion_head": True}, [True] * 5),
        ({"method": "grpo"}, [False] * 5),
        ({"method": "grpo", "completion_head": True}, [True] * 5),
    ],
)
def test_by_default_only_steps_that_ask_the_teacher_cut(tmp_path, monkeypatch, settings, expected):
    schedule = {"lambda_warmup_steps": 2, "lambda_decay_steps": 2, "teacher_pass": "plain"}
    trainer = tiny.trainer(tmp_path, max_steps=5, **schedule, **settings)
    seen = positions_by_step(monkeypatch, trainer)
    trainer.train()
    assert seen == [(cuts, {cuts}) for cuts in expected]


def test_evaluation_is_trls(tmp_path, monkeypatch):
    trainer = tiny.trainer(tmp_path, max_steps=1, completion_head=True)
    trainer.eval_dataset = tiny.dataset(8)
    seen = positions_by_step(monkeypatch, trainer)
    trainer.evaluate()
    assert seen == [(False, {False})]


@pytest.mark.parametrize(("device", "cuts"), [("cpu", True), ("mps", True), ("cuda", False)])
def test_it_is_for_devices_without_triton(device, cuts):
    with CompletionHead().cutting(True, torch.device(device)):
        assert (tile() == TILE) == cuts


def test_an_error_inside_leaves_trls_head_as_it_was(tmp_path):
    head, trainer = CompletionHead(), tiny.trainer(tmp_path)
    hooks = dict(causal_lm(trainer.model).base_model._forward_hooks)
    ids = torch.full((1, 2 * LENGTH), 5)
    with pytest.raises(IndexError), head.cutting(True, CPU):
        head.of(trainer.model, LENGTH)(input_ids=ids + 10_000, labels=ids, fused_lm_head=True)
    assert tile() == 4096
    assert not head.cuts
    assert causal_lm(trainer.model).base_model._forward_hooks == hooks
