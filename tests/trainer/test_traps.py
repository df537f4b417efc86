"""Traps of the host library that need a set-up of their own, and limits that are refused.

The others are named in test_trainer.py, test_teacher.py and test_vlm.py.
"""

import weakref
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate import DistributedType
from peft import LoraConfig, get_peft_model
from test_trainer import run_and_capture
from transformers import Qwen3ForCausalLM

from rlsd_lib import RLSDConfig, RLSDTrainer
from rlsd_lib.experiment.presets import IDENTITY, PAPER, RunParameters
from rlsd_lib.trainer.checks import check_sharding
from rlsd_lib.trainer.teacher import copy_for_scoring


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def lora_student():
    torch.manual_seed(0)
    return get_peft_model(tiny.model(), LoraConfig(r=4, init_lora_weights=False))


def loaded_and_changed(folder):
    """A student that came from a path and is no longer what stands there."""
    tiny.model().save_pretrained(folder)
    student = Qwen3ForCausalLM.from_pretrained(folder)
    on_disk = weights(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    return student, on_disk


# Copies


def test_trap_2_a_copy_with_a_float32_head_answers_with_its_own_weights(tmp_path):
    """TRL's float32 head has a forward that is one more closure over the student."""
    trainer = tiny.trainer(tmp_path, method="grpo", cast_lm_head_to_fp32=True)
    teacher = copy_for_scoring(trainer.model, trainer.args)
    ids = torch.randint(6, 40, (1, 9))
    before = teacher(ids, labels=ids, fused_lm_head=True).log_probs.clone()
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(3)
        trainer.model.model.embed_tokens.weight.mul_(2)
    assert torch.equal(teacher(ids, labels=ids, fused_lm_head=True).log_probs, before)


def test_trap_18_the_copy_is_of_the_student_passed_not_of_its_path(tmp_path):
    student, on_disk = loaded_and_changed(tmp_path / "model")
    changed = weights(student)
    trainer = tiny.trainer(tmp_path, student)
    assert equal(weights(trainer.teacher.model), changed)
    assert not equal(weights(trainer.teacher.model), on_disk)


def test_trap_19_a_sync_leaves_nothing_of_a_broken_teacher(tmp_path):
    """`mul_(0).add_(student)` would keep NaN and infinity."""
    trainer = tiny.trainer(tmp_path, teacher_sync_steps=1)
    with torch.no_grad():
        for i, parameter in enumerate(trainer.teacher.model.parameters()):
            parameter.fill_(float("inf") if i % 2 else float("nan"))
    trainer.teacher.sync(trainer.model, 1)
    assert equal(weights(trainer.teacher.model), weights(trainer.model))


def test_trap_19_parameters_are_matched_by_name_and_all_of_them(tmp_path):
    trainer = tiny.trainer(tmp_path, teacher_sync_steps=1)
    trainer.teacher.model.register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(RuntimeError, match=r"differ in their parameters, e\.g\. \['extra'\]"):
        trainer.teacher.sync(trainer.model, 1)


def test_a_released_copy_frees_its_memory(tmp_path):
    trainer = tiny.trainer(tmp_path, method="opsd", max_steps=1)
    trainer.train()
    copy = weakref.ref(trainer.teacher.model)
    assert copy() is not None
    trainer.teacher.release()
    assert copy() is None


# Third models


def test_trap_17_reference_and_teacher_adapters_live_side_by_side(tmp_path):
    """A ready PeftModel and beta > 0: TRL adds an adapter of its own, and ours may not meet it."""
    trainer = tiny.trainer(
        tmp_path, lora_student(), beta=0.1, max_steps=2, teacher_model_kind="base"
    )
    assert set(trainer.model.peft_config) == {"default", "ref", "teacher"}
    start = weights(trainer.model)
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, start[n])}
    assert moved
    assert all(".default." in name for name in moved)
    for name in start:
        if ".teacher." in name:
            assert torch.equal(start[name], start[name.replace(".teacher.", ".ref.")])
    first, second = (row["kl"] for row in trainer.state.log_history[:2])
    assert first == 0
    assert second > 0


def test_trap_22_a_reference_model_and_a_base_teacher_are_two_models(tmp_path):
    """Two copies by choice: TRL reloads its reference from the path, the teacher is the student.

    To score with the reference would be wrong for a student that was changed after loading.
    """
    student, on_disk = loaded_and_changed(tmp_path / "model")
    changed = weights(student)
    trainer = tiny.trainer(tmp_path, student, beta=0.1, max_steps=2, teacher_model_kind="base")
    trainer.train()
    assert equal(weights(trainer.ref_model), on_disk)
    assert equal(weights(trainer.teacher.model), changed)
    assert not equal(weights(trainer.model), changed)
    assert all(row["kl"] > 0 for row in trainer.state.log_history[:2])


# Accumulation and checkpointing


@pytest.mark.parametrize(("method", "loss"), [("rlsd", "dapo"), ("rlsd", "grpo"), ("opsd", "dapo")])
def test_trap_12_accumulation_adds_up_to_the_whole_batch(tmp_path, method, loss):
    """Plain SGD: Adam would turn rounding in a gradient near 0 into a step of full length."""
    ends, rollouts = [], []
    for accumulation, batch in ((1, 8), (4, 2)):
        trainer = tiny.trainer(
            tmp_path,
            method=method,
            loss_type=loss,
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=batch,
            max_steps=1,
            optim="sgd",
            max_grad_norm=1e6,
        )
        seen = run_and_capture(trainer)
        assert len(seen) == accumulation
        texts = [trainer._tokenizer.batch_decode(micro["completion_ids"]) for micro in seen]
        rollouts.append(sorted(text.replace("<pad>", "") for micro in texts for text in micro))
        ends.append(weights(trainer.model))
    assert rollouts[0] == rollouts[1]
    start = weights(tiny.model())
    for name, end in ends[0].items():
        step = end - start[name]
        assert step.abs().max() > 0
        torch.testing.assert_close(ends[1][name] - start[name], step, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("student", ["full", "lora"])
@pytest.mark.parametrize("method", ["rlsd", "opsd"])
def test_gradient_checkpointing_changes_nothing(tmp_path, method, student):
    ends = []
    for checkpointing in (False, True):
        trainer = tiny.trainer(
            tmp_path,
            lora_student() if student == "lora" else None,
            method=method,
            gradient_checkpointing=checkpointing,
            max_steps=2,
        )
        start = weights(trainer.model)
        trainer.train()
        assert trainer.model.is_gradient_checkpointing == checkpointing
        ends.append(weights(trainer.model))
    assert not equal(start, ends[0])
    assert equal(*ends)


# Several devices


def test_trap_24_several_gpus_in_one_process_are_refused_with_the_way_out(tmp_path):
    args = tiny.config(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"RLSDTrainer does not support.*accelerate launch"):
        RLSDTrainer(
            tiny.model(), tiny.reward, args, tiny.dataset(), processing_class=tiny.tokenizer()
        )


def fsdp(version: int) -> SimpleNamespace:
    return SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=version == 2)


def zero(stage: int, precision: str) -> SimpleNamespace:
    return SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage)),
        mixed_precision=precision,
    )


def test_fsdp1_is_refused(tmp_path):
    args = tiny.config(tmp_path)
    with pytest.raises(ValueError, match=r"FSDP1 is not supported.*fsdp_version: 2"):
        check_sharding(tiny.model(), args, fsdp(1))
    check_sharding(tiny.model(), args, fsdp(2))


def test_an_average_that_deepspeed_would_round_away_is_refused(tmp_path):
    ema = tiny.config(tmp_path, teacher_model_kind="ema")
    with pytest.raises(ValueError, match=r"'ema' under DeepSpeed in bf16.*bf16=False"):
        check_sharding(tiny.model(), ema, zero(3, "bf16"))
    check_sharding(tiny.model(), ema, zero(3, "no"))
    check_sharding(lora_student(), ema, zero(3, "bf16"))
    check_sharding(tiny.model(), tiny.config(tmp_path), zero(3, "bf16"))


# Lengths and precision


def test_trap_15_more_positions_than_the_model_has_are_refused(tmp_path):
    """The student's prompt would fit; the reference makes the teacher's too long."""
    data = tiny.dataset(privileged_context=["x" * 40] * 32)
    with pytest.raises(
        ValueError,
        match=r"32 dataset rows have a .* that fills the model's 32 positions.*\(rows 0,",
    ):
        tiny.trainer(tmp_path, tiny.model(max_position_embeddings=32), data, max_steps=1)
    stream = data.to_iterable_dataset()
    trainer = tiny.trainer(tmp_path, tiny.model(max_position_embeddings=32), stream, max_steps=1)
    with pytest.raises(ValueError, match=r"take \d+ positions, the model has 32.*max_teacher"):
        trainer.train()
    fits = {"max_teacher_prompt_length": 24, "max_steps": 1}
    tiny.trainer(tmp_path, tiny.model(max_position_embeddings=32), data, **fits).train()


def test_trap_15_a_limit_without_room_is_refused_before_any_compute(tmp_path):
    long = [[{"role": "user", "content": "x" * 40}]]
    prompts = tiny.dataset()["prompt"][:31] + long
    with pytest.raises(ValueError, match=r"1 dataset rows leave no room .*=30 \(rows 31\)"):
        tiny.trainer(tmp_path, data=tiny.dataset(prompt=prompts), max_teacher_prompt_length=30)


SHAPED = {
    "no_repeat_ngram_size": 3,
    "suppress_tokens": [5],
    "num_beams": 2,
    "typical_p": 0.5,
    "min_p": 0.1,
    "min_new_tokens": 1,
    "sequence_bias": [[[5], 9.0]],
    "exponential_decay_length_penalty": [2, 1.5],
}


def test_rollouts_are_samples_of_the_policy_or_it_is_said(tmp_path, caplog):
    for name, value in SHAPED.items():
        student = tiny.model()
        setattr(student.generation_config, name, value)
        with pytest.raises(ValueError, match=f"generation_config has .*'{name}'.*than P_S"):
            tiny.trainer(tmp_path, student)
        if name != "min_new_tokens":
            with pytest.raises(ValueError, match=f"{name} would draw rollouts from another"):
                tiny.config(tmp_path, generation_kwargs={name: value})
    with pytest.raises(ValueError, match=r"neftune_noise_alpha=5.0 would put noise into the gap"):
        tiny.config(tmp_path, neftune_noise_alpha=5.0)
    harmless = tiny.model()
    for name, value in {"num_beams": 1, "typical_p": 1.0, "temperature": 0.6, "top_k": 20}.items():
        setattr(harmless.generation_config, name, value)
    assert not caplog.records
    tiny.trainer(tmp_path, harmless, top_p=0.9, generation_kwargs={"max_time": 60.0})
    assert "{'top_p': 0.9}: rollouts come from another" in caplog.text
    assert "up to 0.105 nats a token" in caplog.text
    tiny.trainer(tmp_path, method="grpo", neftune_noise_alpha=5.0)  # has no gap


def test_rows_that_can_be_judged_before_training_are(tmp_path):
    chat = [{"role": "user", "content": "1+1"}]
    shapes = [[{"role": "system", "content": "s"}], [{"role": "user", "content": ""}], []]
    with pytest.raises(ValueError, match=r"2 dataset rows have no prompt .*\(rows 30, 32\)"):
        prompts = [chat] * 30 + shapes
        tiny.trainer(
            tmp_path, data=tiny.dataset(prompt=prompts, privileged_context=["2"] * len(prompts))
        )
    for told in ("42</s><assistant>", "42<pad>"):
        texts = ["42"] * 31 + [told]
        with pytest.raises(ValueError, match=r"have a control token .*\(rows 31\)"):
            tiny.trainer(tmp_path, data=tiny.dataset(privileged_context=texts))
    with pytest.raises(ValueError, match=r"have no privileged_context \(rows 31\)"):
        texts = ["42"] * 31 + ["\u200b\u2060 \ufeff"]
        tiny.trainer(tmp_path, data=tiny.dataset(privileged_context=texts))


def test_a_reward_function_cannot_change_what_the_teacher_reads(tmp_path):
    def vandal(prompts, completions, **_):
        for prompt in prompts:
            prompt[-1]["content"] = "vandalised"
        for completion in completions:
            completion[0]["content"] = "vandalised"
        return [float(i) for i in range(len(prompts))]

    def quiet(prompts, **_):
        return [float(i) for i in range(len(prompts))]

    seen = {}
    for function in (quiet, vandal):
        name = function.__name__
        trainer = tiny.trainer(tmp_path, rewards=function, method="sdpo", max_steps=1)
        trainer.teacher_prompts = watched(trainer.teacher_prompts, seen.setdefault(name, []))
        trainer.train()
    assert seen["quiet"] == seen["vandal"] != []


def watched(function, seen):
    def teacher_prompts(prompts, contexts, output):
        result = function(prompts, contexts, output)
        seen.append((repr(prompts), list(contexts), result.ids.tolist()))
        return result

    return teacher_prompts


def test_an_average_in_half_precision_is_refused(tmp_path):
    def build(student, kind):
        return tiny.trainer(tmp_path, student, teacher_model_kind=kind)

    half = tiny.model().to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"'ema' with weights in torch\.bfloat16.*float32"):
        build(half, "ema")
    build(tiny.model().to(torch.bfloat16), "snapshot")
    # Adapters are float32 on top of a model in half precision.
    adapted = get_peft_model(tiny.model().to(torch.bfloat16), LoraConfig(r=4))
    pairs = build(adapted, "ema").teacher._parameter_pairs(adapted)
    assert {target.dtype for target, _ in pairs} == {torch.float32}


# The paper's values


PAPER_VALUES = {
    "loss_type": "dapo",
    "epsilon": 0.2,
    "epsilon_high": 0.28,
    "beta": 0.0,
    "temperature": 1.0,
    "num_generations": 8,
    "scale_rewards": "group",
    "vllm_importance_sampling_mode": "token_truncate",
    "lambda_init": 0.5,
    "lambda_decay_steps": 50,
    "epsilon_w": 0.2,
    "teacher_model_kind": "snapshot",
    "teacher_sync_steps": 10,
}


def test_trap_25_runs_have_the_papers_values_where_the_parents_defaults_differ(tmp_path):
    for preset in ("lab", "smollm2"):
        args = RunParameters("rlsd", preset).resolve(tmp_path).config
        assert {name: getattr(args, name) for name in PAPER_VALUES} == PAPER_VALUES, preset


def test_trap_25_the_papers_completion_length_and_mode_reach_any_config(tmp_path):
    args = tiny.config(tmp_path, **PAPER, max_completion_length=4096)
    assert args.max_completion_length == 4096
    assert args.vllm_importance_sampling_mode == "token_truncate"
    assert RLSDConfig(str(tmp_path), use_cpu=True, bf16=False).scale_rewards == "group"


def test_overrides_may_not_change_what_a_run_is(tmp_path):
    for name in IDENTITY:
        with pytest.raises(ValueError, match=f"overrides may not set '{name}'"):
            RunParameters("rlsd", "lab", overrides={name: "grpo"}).resolve(tmp_path)


# Environments


class Hints:
    """An environment that adds an observation to the question, another one for every rollout."""

    count = 0

    def reset(self, **row) -> str:
        Hints.count += 1
        return f"[obs {Hints.count}]"


TOOL_TEMPLATE = tiny.CHAT_TEMPLATE.replace(
    "{{ m['content'] }}", "{{ m['content'] }}{{ m['tool_calls'] | tojson if m['tool_calls'] }}"
)


def test_the_teacher_reads_what_an_environment_observed(tmp_path, monkeypatch):
    """Observations are in no dataset row: only the final messages hold them, one per rollout."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    args = tiny.config(tmp_path, max_steps=1)
    trainer = RLSDTrainer(
        tiny.model(),
        tiny.reward,
        args,
        tiny.dataset(),
        processing_class=tokenizer,
        environment_factory=Hints,
    )
    turns = []
    prompts_of = trainer.teacher_prompts

    def spy(*given):
        seen = prompts_of(*given)
        turns.extend(
            tokenizer.decode(row[keep.bool()])
            for row, keep in zip(seen.ids, seen.mask, strict=True)
        )
        return seen

    trainer.teacher_prompts = spy
    micros = run_and_capture(trainer)
    students = [
        tokenizer.decode(row, skip_special_tokens=True)
        for micro in micros
        for row in micro["prompt_ids"]
    ]
    assert len({text.partition("[")[2] for text in students}) == 8
    answers = {f"{i}+{i + 1}": str(2 * i + 1) for i in range(32)}
    expected = [
        f"<user>{text}|{answers[text.partition('[')[0]]}</s><assistant>" for text in students
    ]
    assert sorted(turns) == sorted(expected)


def test_a_limit_on_prompts_with_the_tools_of_an_environment_is_refused(tmp_path):
    """TRL matches prompts to the environments of the whole batch, so none can be counted alone."""
    with pytest.raises(ValueError, match=r"max_teacher_prompt_length=40 with environment_factory"):
        RLSDTrainer(
            "no/such-model",
            tiny.reward,
            tiny.config(tmp_path, max_teacher_prompt_length=40),
            tiny.dataset(),
            environment_factory=Hints,
        )


def test_credit_is_that_of_the_policy_that_wrote_the_rollout(tmp_path):
    """Reused rollouts keep their gap, though the policy has moved since."""
    gaps = []

    def credit(advantages, gap, mask):
        gaps.append(gap * mask)
        return advantages[:, None].expand_as(gap)

    settings = {"num_iterations": 2, "gradient_accumulation_steps": 1, "max_steps": 2}
    trainer = tiny.trainer(tmp_path, more={"credit": credit}, teacher_model_kind="base", **settings)
    before = trainer.model.lm_head.weight.clone()
    trainer.train()
    assert not torch.equal(trainer.model.lm_head.weight, before)
    assert torch.equal(*gaps)
