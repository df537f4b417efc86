"""Every method of the table on the one rollout path: same rollouts, the right loss, one forward."""

from functools import partial
from pathlib import Path
from typing import Any

import dense
import pytest
import tiny
import torch
from dense import DIVERGENCES, LOSSES, Generation, Reference, record, script
from peft import LoraConfig, get_peft_model

from rlsd_lib import RLSDTrainer
from rlsd_lib.methods import METHODS

EXTRA: dict[str, dict[str, Any]] = {
    "grpo_opsd": {"distillation_weight": 0.3},
    "sdpo": {"success_reward_threshold": 0.5},
}
TAUGHT = [name for name, method in METHODS.items() if method.teacher_sees]
every = pytest.mark.parametrize("method", METHODS)


def make(folder: Path, method: str, student: Any = None, **overrides: Any) -> RLSDTrainer:
    """A trainer of `method` on the tiny model; opd learns from the tiny model of seed 1."""
    teacher = {"teacher_model": tiny.model(1)} if method == "opd" else {}
    return RLSDTrainer(
        tiny.model() if student is None else student,
        overrides.pop("reward", tiny.reward),
        tiny.config(folder, method=method, **{**EXTRA.get(method, {}), **overrides}),
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
        seen[-1]["rewards"] = torch.tensor(trainer._rewards)
        return output

    trainer._generate_and_score_completions = spy
    trainer.train()
    return seen


def test_the_first_generation_batch_is_the_same_for_all_methods(tmp_path):
    runs = {name: rollouts(make(tmp_path, name, max_steps=2)) for name in METHODS}
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


@pytest.mark.parametrize("method", TAUGHT)
def test_one_teacher_forward_per_rollout(tmp_path, method):
    rows: dict[str, int] = {"rollouts": 0, "teacher": 0, "student": 0}
    trainer = make(tmp_path, method, max_steps=4, teacher_model_kind="base", num_iterations=2)
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


def peer_turns(generation: Generation, threshold: float = 0.5) -> list[tuple[str, bool]]:
    """The first other success of the group of four, written behind the question."""
    texts = [
        tiny.tokenizer().decode(ids, skip_special_tokens=True) for ids in generation.completion_ids
    ]
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
    weight = EXTRA.get(method, {}).get("distillation_weight", 1.0)
    return Reference(
        method,
        partial(teacher_turns, method),
        **{"divergence": DIVERGENCES.get(method), "weight": weight, **settings},
    )


@every
def test_loss_and_gradient_equal_the_dense_reference(tmp_path, method):
    trainer = script(make(tmp_path, method, max_steps=2, teacher_model_kind="base"))
    steps = record(trainer, LOSSES)
    assert len(steps) == 4
    for step in steps:
        dense.assert_equal(step.losses, reference(method).losses(step, LOSSES))


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


CASES = [(m, layout) for m in ("sdpo", "grpo_opsd") for layout in LAYOUTS]
CASES += [("opsd", layout) for layout in ("temperature", "num_iterations", "lora")]
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
