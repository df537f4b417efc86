"""Shared teacher prompts against the plain pass: the same numbers, fewer token positions."""

from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import tiny
import tiny_vlm
import torch
from accelerate import DistributedType
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from test_trainer import run_and_capture
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.integrations import sdpa_attention
from trl.trainer.utils import add_fused_lm_head

from rlsd_lib import RLSDTrainer
from rlsd_lib.trainer import shared_prompts as prefix
from rlsd_lib.trainer.shared_prompts import Prompts, Rollouts

ALONE = SimpleNamespace(distributed_type=DistributedType.NO)
TOKENS = 64


# Against a plain forward of the model itself


def rollouts(groups: list[int], prompts: list[int], completions: list[int], extra=0) -> Rollouts:
    """Row i asks question groups[i], of prompts[groups[i]] tokens, and has completions[i] tokens."""
    random = torch.Generator().manual_seed(1)
    width, longest = max(prompts) + extra, max(max(completions), 1)
    ids, mask = (torch.zeros(len(groups), width, dtype=torch.long) for _ in range(2))
    texts = [torch.randint(3, TOKENS, (n,), generator=random) for n in prompts]
    for row, group in enumerate(groups):
        ids[row, width - prompts[group] :] = texts[group]
        mask[row, width - prompts[group] :] = 1
    sampled = torch.randint(3, TOKENS, (len(groups), longest), generator=random)
    kept = (torch.arange(longest) < torch.tensor(completions)[:, None]).long()
    rows = [texts[group].tolist() for group in groups]
    return Rollouts(Prompts(rows, ids, mask, {}), sampled, kept)


def plain(model, work: Rollouts) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_get_per_token_logps_and_entropies` calls the model: padded, every prompt by itself."""
    ids = torch.cat([work.prompts.ids, work.ids], dim=1)
    mask = torch.cat([work.prompts.mask, work.mask], dim=1)
    length = work.ids.size(1)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-length] = -100
    with torch.no_grad():
        logps = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        states = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    return logps.log_probs[:, -length:], states.last_hidden_state[:, -length - 1 : -1]


def shared(model, work: Rollouts, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    chunks = prefix.plan(work, batch_size)
    return prefix.score(model, work, chunks, autocast=nullcontext, want_hidden=True)


def assert_same(model, work: Rollouts, batch_size: int) -> None:
    logps, hidden = shared(model, work, batch_size)
    wanted, states = plain(model, work)
    torch.testing.assert_close(logps, wanted, rtol=1e-4, atol=1e-4)
    kept = work.mask.bool()
    if kept.any():
        torch.testing.assert_close(hidden[kept], states[kept], rtol=1e-4, atol=1e-4)


def fused(model, temperature: float = 0.7):
    """Wide weights, so that a wrong position, mask or prompt shows."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    add_fused_lm_head(model, temperature=temperature)
    return model.eval()


def family(name: str, **overrides):
    sizes = {
        "vocab_size": TOKENS,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "sliding_window": None,
    }
    config = CONFIG_MAPPING[name](**{**sizes, **overrides})
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = True
    return fused(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"))


RAGGED = rollouts([0, 1, 0, 2, 1, 0, 2, 0], [7, 3, 9], [5, 2, 6, 0, 1, 4, 3, 6], extra=2)


def test_every_family_that_is_let_in_is_exact():
    for name in prefix.FAMILIES:
        model = family(name)
        assert prefix.why_not(model, ALONE) is None, name
        assert_same(model, RAGGED, 3)


QWEN3 = family("qwen3")
# (group, completion length) of each row, groups in any order.
ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=10)


@settings(deadline=None, max_examples=40)
@given(
    rows=ROWS,
    prompts=st.lists(st.integers(2, 7), min_size=4, max_size=4),
    batch_size=st.integers(1, 6),
    extra=st.integers(0, 3),
)
def test_any_batch_scores_as_the_plain_pass(rows, prompts, batch_size, extra):
    groups, completions = map(list, zip(*rows, strict=True))
    work = rollouts(groups, prompts, completions, extra)
    assert_same(QWEN3, work, batch_size)
    chunks = prefix.plan(work, batch_size)
    scored = [row for chunk in chunks for batch in chunk.batches for row in batch.rows]
    assert sorted(scored) == [row for row, length in enumerate(completions) if length]
    # Each prompt that has a completion is computed exactly once.
    firsts = [groups[row] for chunk in chunks for row in chunk.rows]
    assert sorted(firsts) == sorted({groups[row] for row in scored})


def test_eager_attention_and_half_precision():
    eager = fused(AutoModelForCausalLM.from_config(QWEN3.config, attn_implementation="eager"))
    assert_same(eager, RAGGED, 3)
    half = family("qwen3").to(torch.bfloat16)
    errors = [
        (logps - plain(QWEN3, RAGGED)[0]).abs().max()
        for logps in (shared(half, RAGGED, 3)[0], plain(half, RAGGED)[0].float())
    ]
    # bfloat16 itself is off by far more than the two passes may differ in being off.
    assert errors[0] < 1.5 * errors[1]


# What is refused


@pytest.mark.parametrize(
    ("name", "overrides", "reason"),
    [
        ("gpt2", {}, "has not been shown exact for model_type='gpt2'"),
        ("mistral", {"sliding_window": 8}, r"the cache has \['DynamicSlidingWindowLayer'\]"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rope_type='dynamic'",
        ),
    ],
)
def test_models_that_would_be_inexact_are_named(tmp_path, name, overrides, reason):
    student = family(name, vocab_size=len(tiny.tokenizer()), **overrides)
    del student.forward
    with pytest.raises(ValueError, match=f"teacher_pass='shared' cannot be used here.*{reason}"):
        tiny.trainer(tmp_path, student, teacher_pass="shared", **NO_DROPOUT)
    assert plan_of(tiny.trainer(tmp_path, student, **NO_DROPOUT)) == []


def test_wrappers_that_a_direct_call_would_bypass_are_named():
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        assert "gathered" in prefix.why_not(QWEN3, SimpleNamespace(distributed_type=kind))
    adapted = get_peft_model(tiny.model(), PrefixTuningConfig("CAUSAL_LM", num_virtual_tokens=2))
    assert "PREFIX_TUNING" in prefix.why_not(adapted, ALONE)


def test_images_are_scored_plainly(tmp_path):
    """A Qwen-VL model counts its positions from the images; its prompts are not shared."""
    trainer = tiny_vlm.trainer(tmp_path, tiny_vlm.dataset([1, 2] * 4), max_steps=1)
    assert plan_of(trainer) == []
    with pytest.raises(ValueError, match="not been shown exact for model_type='qwen3_vl'"):
        tiny_vlm.trainer(tmp_path, tiny_vlm.dataset([1] * 8), teacher_pass="shared")


def test_a_prompt_of_one_token_is_scored_plainly(tmp_path, monkeypatch):
    trainer = tiny.trainer(tmp_path, max_steps=1, teacher_pass="shared")
    prompts_of = trainer.teacher_prompts

    def one_token(*args):
        seen = prompts_of(*args)
        texts = [[text[-1]] for text in seen.texts]
        return seen._replace(texts=texts, ids=seen.ids[:, -1:], mask=seen.mask[:, -1:])

    monkeypatch.setattr(trainer, "teacher_prompts", one_token)
    assert plan_of(trainer) == []


# In the trainer


NO_DROPOUT = {"disable_dropout": True, "max_steps": 1}


def plan_of(trainer: RLSDTrainer) -> list:
    """Train, and return the plans of all shared passes."""
    plans = []
    score = prefix.score

    def spy(model, work, chunks, **kwargs):
        plans.append(chunks)
        return score(model, work, chunks, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "score", spy)
        trainer.train()
    return plans


def compare_passes(trainer: RLSDTrainer) -> int:
    """Train; score every batch by both passes and compare. Returns the number of batches."""
    score, compared = trainer.teacher_scores, []

    def both(*args, **kwargs):
        trainer.args.teacher_pass = "plain"
        wanted = score(*args, **kwargs)
        trainer.args.teacher_pass = "shared"
        found = score(*args, **kwargs)
        torch.testing.assert_close(found.logps, wanted.logps, rtol=1e-4, atol=1e-4)
        if wanted.hidden is not None:
            kept = args[2]["completion_mask"].bool()
            torch.testing.assert_close(
                found.hidden[kept], wanted.hidden[kept], rtol=1e-4, atol=1e-4
            )
            assert torch.equal(found.head[0], wanted.head[0])
        # A batch that is masked throughout has nothing to share.
        compared.extend([found.logps] if args[2]["completion_mask"].any() else [])
        return found

    trainer.teacher_scores = both
    assert len(plan_of(trainer)) == len(compared)
    return len(compared)


def lora_student():
    torch.manual_seed(0)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")
    return get_peft_model(tiny.model(), config)


CASES = {
    "snapshot": {"teacher_sync_steps": 2},
    "live": {"teacher_model_kind": "live"},
    "gradient checkpointing": {"teacher_model_kind": "live", "gradient_checkpointing": True},
    "lora": {"teacher_sync_steps": 2},
    "lora, gradient checkpointing": {"teacher_sync_steps": 2, "gradient_checkpointing": True},
    "padded widths": {"pad_to_multiple_of": 8},
    "no groups": {"num_generations": 2, "per_device_train_batch_size": 2, "temperature": 0.6},
    "many micro-batches": {"steps_per_generation": 4},
    "masked truncation": {"mask_truncated_completions": True},
    "several groups a micro-batch": {"per_device_train_batch_size": 16, "num_generations": 4},
    "full vocabulary": {"method": "opsd"},
    "demonstrations": {"method": "sdpo", "success_reward_threshold": 0.5},
}


@pytest.mark.parametrize("case", CASES)
def test_both_passes_agree_at_every_step(tmp_path, case):
    contexts = ["x" * (i % 5) + str(i) for i in range(32)]
    student = lora_student() if case.startswith("lora") else None
    trainer = tiny.trainer(
        tmp_path,
        student,
        tiny.dataset(privileged_context=contexts),
        **{"max_completion_length": 12, **CASES[case]},
    )
    assert compare_passes(trainer) >= 1


def test_both_passes_agree_under_autocast(tmp_path):
    """In float32 the two differ by 1e-6; under autocast by what bfloat16 resolves."""
    trainer = tiny.trainer(tmp_path, bf16=True, max_steps=1, teacher_pass="shared")
    score, differences = trainer.teacher_scores, []

    def both(*args, **kwargs):
        found = score(*args, **kwargs)
        trainer.args.teacher_pass = "plain"
        wanted = score(*args, **kwargs)
        trainer.args.teacher_pass = "shared"
        differences.append((found.logps - wanted.logps).abs().max())
        return found

    trainer.teacher_scores = both
    assert len(plan_of(trainer)) == 1
    assert 1e-6 < differences[0] < 0.2


def test_a_prompt_is_computed_once_and_its_last_layer_only_to_the_keys(tmp_path):
    data = tiny.dataset(privileged_context=["a long reference " * 4] * 32)
    trainer = tiny.trainer(tmp_path, data=data, max_steps=1, teacher_model_kind="base")
    read, last = [], []
    backbone = trainer.teacher.model.model
    for layer, seen in ((backbone.embed_tokens, read), (backbone.layers[-1].mlp, last)):
        layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].shape[:2]))
    (chunks,) = plan_of(trainer)
    # Eight rollouts of two questions: each prompt once, without its last token.
    assert [len(chunk.rows) for chunk in chunks] == [1, 1]
    assert sum(rows * width for rows, width in read) == prefix.positions_of(chunks)
    # Of a prompt the completions need keys and values; of the head only what they wrote.
    completions = [batch.width for chunk in chunks for batch in chunk.batches]
    assert read[1::2] == last == [(4, width) for width in completions]


def test_grouped_keys_are_read_in_place_on_a_cpu_and_give_the_same_bits(tmp_path, monkeypatch):
    """transformers copies them for every query head where there is a mask, as there always is."""
    trainer = tiny.trainer(tmp_path, max_steps=1, teacher_pass="shared")
    copied = Mock(wraps=sdpa_attention.repeat_kv)
    monkeypatch.setattr(sdpa_attention, "repeat_kv", copied)
    score, compared = trainer.teacher_scores, []

    def both(*args, **kwargs):
        copied.reset_mock()
        found = score(*args, **kwargs)
        assert not copied.called
        with monkeypatch.context() as as_it_is:
            as_it_is.setattr(prefix.upstream, "grouped_attention", nullcontext)
            compared.append(torch.equal(score(*args, **kwargs).logps, found.logps))
        assert copied.called
        return found

    trainer.teacher_scores = both
    trainer.train()
    assert compared == [True]


def test_auto_shares_only_where_it_saves_a_quarter(tmp_path):
    short = {"max_completion_length": 64, "num_generations": 2, "max_steps": 1}
    assert plan_of(tiny.trainer(tmp_path, **short, generation_kwargs={"min_new_tokens": 64})) == []
    data = tiny.dataset(privileged_context=["a long reference " * 4] * 32)
    assert len(plan_of(tiny.trainer(tmp_path, data=data, max_steps=1))) == 1
    assert plan_of(tiny.trainer(tmp_path, data=data, max_steps=1, teacher_pass="plain")) == []


@pytest.mark.parametrize("kind", ["live", "snapshot"])
def test_a_teacher_that_sees_no_more_is_scored_plainly(tmp_path, kind):
    """Only the same computation gives a gap of exactly 0, also where sharing was asked for."""
    data = tiny.dataset(privileged_context=[""] * 32)
    trainer = tiny.trainer(
        tmp_path,
        data=data,
        teacher_pass="shared",
        teacher_model_kind=kind,
        privileged_template="{prompt}{privileged_context}",
        max_steps=1,
    )
    seen = []
    assert plan_of(SimpleNamespace(train=lambda: seen.extend(run_and_capture(trainer)))) == []
    assert len(seen) == 2
    assert all(torch.equal(m["teacher_per_token_logps"], m["student"]) for m in seen)


@pytest.mark.parametrize("chosen", ["auto", "shared"])
def test_a_batch_whose_rollouts_are_all_masked_is_scored_plainly(tmp_path, chosen):
    """A rank may draw one early in training, while the others wait for it."""
    masked = {"mask_truncated_completions": True, "max_completion_length": 4}
    never = {"generation_kwargs": {"min_new_tokens": 4}}  # no end token: all are truncated
    trainer = tiny.trainer(tmp_path, method="opsd", teacher_pass=chosen, **masked, **never)
    trainer.train()
    assert trainer.state.log_history[0]["completions/clipped_ratio"] == 1.0
