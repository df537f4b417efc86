"""Every method of the table on the one rollout path: same rollouts, the right loss, one forward."""

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import dense
import pytest
import tiny
import torch
from dense import DIVERGENCES, LOSSES, Generation, Reference, record, script
from peft import LoraConfig, get_peft_model
from tokenizers import models

from rlsd_lib import RLSDTrainer
from rlsd_lib.methods import METHODS
from rlsd_lib.prompts import demonstrations
from rlsd_lib.trainer.config import TEACHER_KINDS

TAUGHT = [name for name in tiny.FIRST if METHODS[name].teacher_sees]
every = pytest.mark.parametrize("method", tiny.FIRST)  # the others: trainer/test_credits.py


def make(folder: Path, method: str, student: Any = None, **overrides: Any) -> RLSDTrainer:
    """A trainer of `method` on the tiny model; opd learns from the tiny model of seed 1."""
    teacher = {"teacher_model": tiny.model(1)} if method == "opd" else {}
    for name in ("teacher_model_kind", "teacher_sync_steps", "teacher_update_rate"):
        if method == "opd":  # its teacher is another model
            overrides.pop(name, None)
    return RLSDTrainer(
        tiny.model() if student is None else student,
        overrides.pop("reward", tiny.reward),
        tiny.config(folder, method=method, **{**tiny.NEEDS.get(method, {}), **overrides}),
        tiny.dataset(),
        processing_class=tiny.tokenizer(),
        **teacher,
    )


# --- the same rollouts ---------------------------------------------------------------------------


def rollouts(trainer: RLSDTrainer) -> list[dict[str, Any]]:
    """Train two steps, and return what was generated and how it was rewarded."""
    seen = []
    score = trainer._generate_and_score_completions

    def spy(rows):
        output = score(rows)
        seen.append({key: output[key] for key in ("prompt_ids", "completion_ids", "advantages")})
        seen[-1]["rewards"] = trainer._rewards
        return output

    trainer._generate_and_score_completions = spy
    trainer.train()
    return seen


def test_the_first_generation_batch_is_the_same_for_all_methods(tmp_path):
    runs = {name: rollouts(make(tmp_path, name, max_steps=2)) for name in tiny.FIRST}
    external = tiny.model(1)
    external.save_pretrained(tmp_path / "teacher")
    tiny.tokenizer().save_pretrained(tmp_path / "teacher")
    args = tiny.config(tmp_path, method="opd", max_steps=2)
    runs["opd from a folder"] = rollouts(
        RLSDTrainer(
            tiny.model(),
            tiny.reward,
            args,
            tiny.dataset(),
            processing_class=tiny.tokenizer(),
            teacher_model=str(tmp_path / "teacher"),
        )
    )
    first, second = runs["grpo"]
    assert first["rewards"].unique().numel() > 1
    for name, (batch, later) in runs.items():
        for key, value in first.items():
            assert torch.equal(batch[key], value), (name, key)
        # Later completions differ, since the policies do; the questions asked never do.
        assert torch.equal(later["prompt_ids"], second["prompt_ids"]), name


def test_a_teacher_adapter_does_not_change_the_rollouts(tmp_path):
    """PEFT draws random numbers for every new adapter."""
    runs = [
        rollouts(make(tmp_path, name, lora_student(), max_steps=1)) for name in ("grpo", "opsd")
    ]
    assert torch.equal(runs[0][0]["completion_ids"], runs[1][0]["completion_ids"])


@pytest.mark.parametrize("method", ["opd", "rlsd", "sdpo"])
def test_one_teacher_forward_per_rollout(tmp_path, method):
    rows: dict[str, int] = {"rollouts": 0, "teacher": 0, "student": 0}
    trainer = make(
        tmp_path,
        method,
        max_steps=4,
        teacher_model_kind="base",
        teacher_pass="plain",
        num_iterations=2,
    )
    score, generate = trainer._get_per_token_logps_and_entropies, trainer._generate

    def counted(model, input_ids, *args, **kwargs):
        rows["teacher" if model is trainer.teacher.model else "student"] += len(input_ids)
        return score(model, input_ids, *args, **kwargs)

    def generated(prompts):
        rows["rollouts"] += len(prompts)
        return generate(prompts)

    trainer._get_per_token_logps_and_entropies, trainer._generate = counted, generated
    trainer.train()
    # Four steps of eight rows on two generation batches; the student's own old log-probabilities.
    assert rows == {"rollouts": 16, "teacher": 16, "student": 32 + 16}


# --- the loss and its gradient -------------------------------------------------------------------


def decoded(generation: Generation) -> list[str]:
    decode = tiny.tokenizer().decode
    return [decode(ids, skip_special_tokens=True) for ids in generation.completion_ids]


def peer_turns(generation: Generation, threshold: float = 0.5) -> list[tuple[str, bool]]:
    """The first other success of the group of four, written behind the question."""
    texts = decoded(generation)
    good = [reward >= threshold for reward in tiny.reward(texts)]
    turns = []
    for i, row in enumerate(generation.rows):
        group = range(i - i % 4, i - i % 4 + 4)
        demo = next((texts[j] for j in group if j != i and good[j]), None)
        question = row["prompt"][-1]["content"]
        turns.append((question, False) if demo is None else (f"{question}|{demo}", True))
    return turns


def teacher_turns(method: str, generation: Generation) -> list[tuple[str, bool]]:
    if METHODS[method].teacher_sees == "peer":
        return peer_turns(generation)
    sees = METHODS[method].teacher_sees == "privileged"
    return [
        (row["prompt"][-1]["content"] + (f"|{row['privileged_context']}" if sees else ""), True)
        for row in generation.rows
    ]


def reference(method: str, **settings: Any) -> Reference:
    weight = tiny.NEEDS.get(method, {}).get("distillation_weight", 1.0)
    return Reference(
        method,
        settings.pop("turns", partial(teacher_turns, method)),
        **{"divergence": DIVERGENCES.get(method), "weight": weight, **settings},
    )


@every
def test_loss_and_gradient_equal_the_dense_reference(tmp_path, method):
    trainer = script(make(tmp_path, method, max_steps=2, teacher_model_kind="base"))
    steps = record(trainer, LOSSES)
    assert len(steps) == 4
    for step in steps:
        dense.assert_equal(step.losses, reference(method).losses(step, LOSSES))


@pytest.mark.parametrize("method", ["rlsd", "opsd"])
def test_a_peer_in_place_of_the_reference_equals_the_dense_reference(tmp_path, method):
    settings = {"peer_context": True, "success_reward_threshold": 0.5}
    trainer = script(make(tmp_path, method, max_steps=2, teacher_model_kind="base", **settings))
    steps = record(trainer, LOSSES)
    shown = [flag for step in steps for _, flag in peer_turns(step.generation)]
    assert {True, False} == set(shown), "some rollouts have no successful peer"
    by_hand = reference(method, turns=peer_turns)
    for step in steps:
        dense.assert_equal(step.losses, by_hand.losses(step, LOSSES))


def lora_student() -> Any:
    torch.manual_seed(5)
    return get_peft_model(tiny.model(), LoraConfig(r=4, lora_alpha=8, init_lora_weights=False))


# The teacher is live or renewed within the run, so its head must be that of the stored states.
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "temperature": ({"temperature": 0.7}, {"temperature": 0.7}),
    "mask_truncated": ({"mask_truncated_completions": True}, {}),
    "num_iterations": ({"num_iterations": 2, "teacher_model_kind": "live"}, {}),
    "steps_per_generation": (
        {"steps_per_generation": 4, "teacher_model_kind": "live"},
        {"steps_per_generation": 4},
    ),
    "snapshot": ({"num_iterations": 2, "teacher_sync_steps": 1}, {}),
    "accumulation": (
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
        {"accumulation": 4, "steps_per_generation": 4},
    ),
    "lora": ({"teacher_sync_steps": 1}, {}),
    "biased head": ({"num_iterations": 2, "teacher_model_kind": "live"}, {}),
}


CASES = [("sdpo", layout) for layout in LAYOUTS]
CASES += [("grpo_opsd", layout) for layout in ("num_iterations", "accumulation", "biased head")]
CASES += [("opsd", layout) for layout in ("temperature", "lora")]
CASES += [("rlsd", layout) for layout in ("temperature", "num_iterations", "lora")]


@pytest.mark.parametrize(("method", "layout"), CASES)
def test_loss_and_gradient_in_every_layout(tmp_path, method, layout):
    ours, theirs = LAYOUTS[layout]
    student = {"lora": lora_student, "biased head": lambda: dense.biased(tiny.model())}.get(layout)
    trainer = script(make(tmp_path, method, student and student(), max_steps=3, **ours))
    steps = record(trainer, ["dapo"])
    if "num_iterations" in ours or "steps_per_generation" in ours:
        assert any("old_per_token_logps" in step.inputs for step in steps)
    for step in steps[1:]:
        dense.assert_equal(step.losses, reference(method, **theirs).losses(step, ["dapo"]))


@pytest.mark.parametrize("method", ["opd", "opsd", "sdpo"])
def test_sampled_token_form_is_the_gap_as_advantage(tmp_path, method):
    """The score-function form of reverse KL (Eq. 17), also on reused rollouts."""
    ours = {"distillation_mode": "sampled_token", "num_iterations": 2}
    steps = record(script(make(tmp_path, method, max_steps=3, **ours)), LOSSES)
    by_hand = reference(method, divergence=None, credit=lambda name, a, gap, lam: gap)
    for step in steps:
        dense.assert_equal(step.losses, by_hand.losses(step, LOSSES))


# --- sdpo ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["topk_logits", "sampled_token"])
def test_without_a_success_nothing_moves(tmp_path, mode):
    trainer = make(
        tmp_path,
        "sdpo",
        reward=lambda completions, **_: [0.4] * len(completions),
        distillation_mode=mode,
        max_steps=2,
    )
    start = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert all(torch.equal(p, start[name]) for name, p in trainer.model.named_parameters())
    for row in trainer.state.log_history[:-1]:
        assert (row["loss"], row["grad_norm"]) == (0.0, 0.0)
        assert row["rlsd/demonstration_group_frac"] == 0.0


def show(rewards: list[float], **options: Any) -> list[str | None]:
    """Demonstrations of rollouts called 0, 1, 2, ... in groups of three."""
    names = [str(i) for i in range(len(rewards))]
    settings = {"group_size": 3, "threshold": 1.0, **options}
    return demonstrations(names, rewards, slice(None), **settings).texts


def test_a_rollout_is_never_its_own_demonstration():
    assert show([1, 0, 0, 1, 1, 0]) == [None, "0", "0", "4", "3", "3"]
    for rewards in product([0.0, 1.0], repeat=6):
        for i, text in enumerate(show(list(rewards))):
            peers = [j for j in range(i - i % 3, i - i % 3 + 3) if j != i and rewards[j]]
            assert text == (str(peers[0]) if peers else None)


def test_an_unscorable_rollout_is_neither_success_nor_failure(tmp_path):
    nan = float("nan")
    assert show([nan, nan, 0.5], threshold=0.0) == ["2", "2", None]
    assert show([1, nan, 1]) == ["2", "0", "0"]
    trainer = make(
        tmp_path,
        "sdpo",
        reward=lambda completions, **_: [None, 0.0, 0.0, 0.0] * (len(completions) // 4),
        success_reward_threshold=0.0,
        max_steps=1,
    )
    trainer.train()
    assert [reward != reward for reward in trainer._rewards] == [True, False, False, False] * 2


def test_groups_must_be_whole():
    with pytest.raises(ValueError, match="4 completions, 4 rewards: expected groups of 3"):
        show([1, 0, 0, 1])


# --- resuming ------------------------------------------------------------------------------------

# Every method, and every kind of teacher with the two kinds of term; killed runs: test_teacher.py.
RESUMED = [(m, "snapshot") for m in TAUGHT if m != "opd"]
RESUMED += [(m, k) for m in ("rlsd", "opsd") for k in TEACHER_KINDS if k != "snapshot"]
RESUMED += [("opd", "external"), ("grpo", "none"), ("rlsd", "base lora"), ("sdpo", "snapshot lora")]


@pytest.mark.parametrize(("method", "kind"), RESUMED)
def test_resume_is_bit_identical(tmp_path, method, kind):
    settings: dict[str, Any] = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 4,
        "teacher_sync_steps": 2,
        "teacher_update_rate": 0.3,
    }
    if kind.split()[0] in TEACHER_KINDS:
        settings["teacher_model_kind"] = kind.split()[0]

    def built(name: str) -> RLSDTrainer:
        student = lora_student() if "lora" in kind else None
        return make(tmp_path / name, method, student, **settings)

    whole, resumed = built("whole"), built("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    left, right = (trainer.model.state_dict() for trainer in (whole, resumed))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    ours, theirs = ([r for r in t.state.log_history if "loss" in r] for t in (resumed, whole))
    assert len(ours) == len(theirs) == 6
    for row, other in zip(ours, theirs, strict=True):
        assert {k: v for k, v in row.items() if k not in ("step_time", "epoch")} == {
            k: v for k, v in other.items() if k not in ("step_time", "epoch")
        }


# --- clear errors --------------------------------------------------------------------------------

SAMPLED = {"distillation_mode": "sampled_token"}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "grpo_opsd without weight": ("grpo_opsd", {}, "needs distillation_weight, the factor"),
    "weight of nothing": ("grpo_opsd", {"distillation_weight": 0.0}, "distillation_weight=0.0"),
    "no distillation term": ("rlsd", {"distillation_weight": 0.5}, "has no distillation term"),
    "no distillation mode": ("grpo", SAMPLED, "distillation_mode='sampled_token' means nothing"),
    "no tail": ("rlsd_neutral", {"distillation_add_tail": False}, "means nothing for"),
    "unknown mode": ("opsd", {"distillation_mode": "topk"}, "Did you mean 'topk_logits'"),
    "k of full logits": (
        "sdpo",
        {"distillation_mode": "full_logits", "distillation_topk": 5},
        "means nothing with distillation_mode='full_logits'. Use 'topk_logits'",
    ),
    "tail of one token": ("sdpo", {**SAMPLED, "distillation_add_tail": True}, "Use 'topk_logits'"),
    "alpha of one token": ("sdpo", {**SAMPLED, "distillation_alpha": 0.5}, "log P_T - log P_S"),
    "weight of one token": ("opsd", {**SAMPLED, "distillation_weight": 2.0}, "Leave it at None"),
    "clip of one token": ("opd", {**SAMPLED, "distillation_token_clip": 1.0}, "Leave it at None"),
    "no k": ("opsd", {"distillation_mode": "topk_logits"}, "needs distillation_topk, e.g. 100"),
    "tail without k": ("opsd", {"distillation_add_tail": True}, "set top_k"),
    "alpha out of range": ("opsd", {"distillation_alpha": 1.5}, "expected 0 (forward KL) to 1"),
    "alpha of a top-1": ("opsd_teacher_top1", {"distillation_alpha": 0.5}, "Use method='opsd'"),
    "sampled top-1": ("opsd_student_top1", SAMPLED, "Use method='opsd' with it"),
    "k of a top-1": ("opsd_student_top1", {"distillation_topk": 5}, "means nothing for"),
    "sampled mixture": ("grpo_opsd", {**SAMPLED, "distillation_weight": 1.0}, "full or top-k"),
}


def test_options_that_mean_nothing_are_refused(tmp_path):
    for case, (method, settings, message) in REFUSED.items():
        with pytest.raises(ValueError) as error:
            tiny.config(tmp_path, method=method, **settings)
        assert message in str(error.value), case


def build(folder: Path, method: str, **changes: Any) -> RLSDTrainer:
    """An RLSDTrainer with its arguments changed one by one."""
    given = {"model": tiny.model(), "reward_funcs": tiny.reward, "train_dataset": tiny.dataset()}
    args = tiny.config(
        folder, method=method, **{**tiny.NEEDS.get(method, {}), **changes.pop("args", {})}
    )
    return RLSDTrainer(args=args, processing_class=tiny.tokenizer(), **{**given, **changes})


def test_opd_needs_a_teacher_and_no_other_method_takes_one(tmp_path):
    with pytest.raises(ValueError, match="method='opd' needs teacher_model="):
        build(tmp_path, "opd")
    for method in set(METHODS) - {"opd"}:
        with pytest.raises(ValueError, match="teacher_model= is for method='opd' only"):
            build(tmp_path, method, teacher_model=tiny.model(1))


def test_opd_refuses_another_vocabulary(tmp_path):
    with pytest.raises(ValueError, match="vocabulary has 120 tokens and the student's 106"):
        build(tmp_path, "opd", teacher_model=tiny.model(1, vocab_size=120))


def test_opd_refuses_another_tokenizer_of_the_same_size(tmp_path):
    tiny.model(1).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="student's tokenizer, saved beside its weights"):
        build(tmp_path, "opd", teacher_model=str(tmp_path / "teacher"))
    other = tiny.tokenizer()
    vocabulary = other.get_vocab()
    vocabulary["7"], vocabulary["8"] = vocabulary["8"], vocabulary["7"]
    other.backend_tokenizer.model = models.WordLevel(vocabulary, unk_token="<unk>")
    other.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"gives '7' the id \d+, the student's \d+"):
        build(tmp_path, "opd", teacher_model=str(tmp_path / "teacher"))


def test_opd_learns_from_a_larger_model(tmp_path):
    larger = {"hidden_size": 48, "num_hidden_layers": 3}
    trainer = build(tmp_path, "opd", teacher_model=tiny.model(1, **larger), args={"max_steps": 2})
    plain = tiny.model(1, **larger).double().eval()
    for step in record(script(trainer), LOSSES):
        by_hand = reference("opd", teacher_model=plain)
        dense.assert_equal(step.losses, by_hand.losses(step, LOSSES))


def test_opd_leaves_the_callers_teacher_alone_and_asks_its_current_weights(tmp_path):
    """Also one that a trainer has patched, whose plain copy would answer with old weights."""
    taught = make(tmp_path, "rlsd", max_steps=1)
    taught.train()
    teacher = taught.model
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    own = teacher.forward, teacher.training
    trainer = script(build(tmp_path, "opd", teacher_model=teacher, args={"max_steps": 2}))
    steps = record(trainer, ["dapo"])
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())
    assert all(p.requires_grad for p in teacher.parameters())
    assert (teacher.forward, teacher.training) == own
    for step in steps:
        step.generation.teacher = {name: p.double() for name, p in before.items()}
        dense.assert_equal(step.losses, reference("opd").losses(step, ["dapo"]))


def test_sdpo_needs_rewards_and_no_reference(tmp_path):
    for rewards in (None, []):
        with pytest.raises(ValueError, match="'sdpo' needs reward_funcs: they decide which"):
            build(tmp_path, "sdpo", reward_funcs=rewards)
    bare = tiny.dataset().remove_columns("privileged_context")
    build(tmp_path, "sdpo", train_dataset=bare)


@pytest.mark.parametrize(
    ("field", "value"), [("final_logit_softcapping", 30.0), ("logit_scale", 0.5)]
)
def test_a_model_that_changes_its_logits_is_refused(tmp_path, field, value):
    """The divergence multiplies head and state; TRL's log-probabilities apply the change."""

    def changed() -> Any:
        model = tiny.model()
        setattr(model.config, field, value)
        return model

    for method in set(DIVERGENCES) - {"opd"}:
        with pytest.raises(ValueError, match=f"changes its logits by config.{field}={value}"):
            build(tmp_path, method, model=changed())
    with pytest.raises(ValueError, match=f"changes its logits by config.{field}={value}"):
        build(tmp_path, "opd", teacher_model=changed())
    build(tmp_path, "opsd", model=changed(), args=SAMPLED)
    build(tmp_path, "opd", teacher_model=changed(), args=SAMPLED)
    build(tmp_path, "rlsd", model=changed())
