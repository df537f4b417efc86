"""The LM head on completions only: TRL's numbers, fewer positions, and nowhere it was not asked for."""

from collections.abc import Callable
from itertools import product
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
from rlsd_lib.trainer.states import causal_lm
from rlsd_lib.trainer.upstream import TILE, CompletionHead, can_cut, scored_and_tile

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
    with trainer.completion_head.applied(wanted):
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


class Wrapped(nn.Module):
    """What data-parallel wrappers look like from outside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_wrappers_are_looked_through():
    for student in (tiny.model, lora, prompt_tuning):
        model, cuts = student(), student is not prompt_tuning
        assert can_cut(model) == can_cut(Wrapped(Wrapped(model))) == cuts, student


def test_a_compiled_model_is_called_as_it_is():
    """Dynamo need not see a hook that is added after compilation."""
    compiled = torch.compile(tiny.model(), backend="eager")
    assert not can_cut(compiled)
    assert not can_cut(Wrapped(compiled))


def test_every_sequence_fills_whole_tiles_of_one_size():
    for length, prompt in product((1, 7, 127, 128, 129, 131, 257, 4095, 4096, 5000), (1, 5, 1000)):
        scored, size = scored_and_tile(length, prompt + length - 1)
        assert length <= scored <= prompt + length - 1, (length, prompt)
        assert scored % size == 0, (length, prompt)
        if prompt > length / TILE:
            assert size <= TILE, (length, prompt)
            assert scored - length <= length / TILE, (length, prompt)


@pytest.mark.parametrize("threads", [1, 2])
def test_what_a_sequence_scores_does_not_depend_on_its_place(tmp_path, threads):
    """The teacher's pass and the loss meet it in different places, and must agree to the bit."""
    trainer = tiny.trainer(tmp_path, tiny.model(hidden_size=64, intermediate_size=128))
    used = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch, length in [(2, 1), (3, 43), (6, 43), (3, 89), (3, 131), (5, 7), (9, 60)]:
            torch.manual_seed(length)
            ids = torch.randint(4, 40, (batch, 9 + length))
            turned = ids.roll(1, dims=0)
            with trainer.completion_head.applied(True), torch.no_grad():
                here, there = (
                    trainer._get_per_token_logps_and_entropies(
                        trainer.model, rows, torch.ones_like(rows), length
                    )[0]
                    for rows in (ids, turned)
                )
            assert torch.equal(here.roll(1, dims=0), there), (batch, length)
    finally:
        torch.set_num_threads(used)


@pytest.mark.parametrize("family", tiny_vlm.FAMILIES)
def test_a_step_with_images_is_the_same(tmp_path, monkeypatch, family):
    """Also the gap: student and teacher go through the same head."""
    logs, rows, counts = [], head_rows(monkeypatch), []
    for wanted in (False, True):
        data = tiny_vlm.dataset([1, 2, 1, 1, 2, 1, 1, 2])
        trainer = tiny_vlm.trainer(
            tmp_path,
            data,
            family=family,
            completion_head=wanted,
            teacher_pass="plain",
            max_steps=1,
        )
        trainer.train()
        logs.append(trainer.state.log_history[0])
        counts.append(sum(rows))
        rows.clear()
    plain, cut = logs
    assert counts[1] < counts[0] / 2
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
            seen.append((trainer.completion_head.applies, set()))
        seen[step][1].update(alone)
        assert tile() == (TILE if trainer.completion_head.applies else 4096)
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


def test_it_is_for_a_cpu():
    for device, cuts in (("cpu", True), ("cuda", False), ("mps", False)):
        head = CompletionHead(torch.device(device))
        with head.applied(True):
            assert head.applies == cuts, device
            assert tile() == (TILE if cuts else 4096), device
        with head.applied(False):
            assert not head.applies
            assert tile() == 4096


def test_the_backward_pass_has_small_tiles_too(tmp_path, monkeypatch):
    seen, backward = [], chunked_logprob.ChunkedLogProbFunction.backward

    def watched(*args: Any) -> Any:
        seen.append(tile())
        return backward(*args)

    monkeypatch.setattr(utils._ChunkedLogProbFunction, "backward", watched)
    tiny.trainer(tmp_path, max_steps=1).train()
    assert seen == [TILE, TILE]  # two micro-batches


@pytest.mark.parametrize("steps", [1, 2])
def test_rollouts_that_outlive_lambda_are_trls_in_every_step(tmp_path, steps):
    """Their old log-probabilities are part of the step at which lambda is 0."""
    seen = []
    trainer = tiny.trainer(
        tmp_path, max_steps=4, num_iterations=2, lambda_decay_steps=steps, lambda_init=0.5
    )
    loss = trainer._compute_loss

    def watched(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        if trainer.state.global_step not in [step for step, _ in seen]:
            seen.append((trainer.state.global_step, trainer.completion_head.applies))
        return loss(model, inputs)

    trainer._compute_loss = watched
    trainer.train()
    cut = steps == 2  # lambda is above 0 at both steps that the first rollouts serve
    assert seen == [(0, cut), (1, cut), (2, False), (3, False)]


def test_rollouts_that_fit_no_step_are_known_to_serve_more(tmp_path):
    """An epoch of three generations ends in a short step; what is kept must outlive the next one."""
    trainer = tiny.trainer(
        tmp_path,
        None,
        tiny.dataset(9),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        steps_per_generation=3,
        max_steps=8,
    )
    claimed, served = {}, {}
    generate, loss = trainer._generate_and_score_completions, trainer._compute_loss
    current: list[int] = []

    def generated(inputs: list) -> Any:
        current[:] = [len(claimed)]
        claimed[len(claimed)] = trainer._served
        return generate(inputs)

    def lost(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        served.setdefault(current[0], set()).add(trainer.state.global_step)
        return loss(model, inputs)

    trainer._generate_and_score_completions, trainer._compute_loss = generated, lost
    trainer.train()
    assert trainer.state.epoch > 1
    assert any(len(steps) > 1 for steps in served.values())
    for generation, steps in served.items():
        assert steps <= set(claimed[generation])


def test_an_error_inside_leaves_trls_head_as_it_was(tmp_path):
    head, trainer = CompletionHead(CPU), tiny.trainer(tmp_path)
    hooks = dict(causal_lm(trainer.model).base_model._forward_hooks)
    ids = torch.full((1, 2 * LENGTH), 5)
    with pytest.raises(IndexError), head.applied(True):
        head.wrap(trainer.model, LENGTH)(input_ids=ids + 10_000, labels=ids, fused_lm_head=True)
    assert tile() == 4096
    assert not head.applies
    assert causal_lm(trainer.model).base_model._forward_hooks == hooks
