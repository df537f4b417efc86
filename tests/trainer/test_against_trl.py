"""The self-distillation losses against TRL 1.16.0's own trainers, and where the two differ.

SDFTTrainer is OPSD and SDPOTrainer is SDPO: same model, same prompts, same scripted rollouts.
Both are references only; the tests at the end say why they are not the baselines.
"""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from dense import script, scripted_ids
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from rlsd_lib import RLSDTrainer

SHARED: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_generations": 4,
    "max_completion_length": 8,
    "max_steps": 3,
    "learning_rate": 0.3,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "seed": 7,
    "teacher_model_kind": "live",
}
# TRL writes templates with str.format, and puts the pieces of SDPO's together itself.
SDFT: dict[str, Any] = {
    "teacher_prompt_template": "{prompt}|{privileged_context}",
    "distillation_is_clip": None,
}
SDPO: dict[str, Any] = {
    "reprompt_template": "{prompt}|{solution}",
    "solution_template": "{successful_previous_attempt}",
    "success_reward_threshold": 0.5,
    "distillation_is_clip": None,
}
Weights = dict[str, torch.Tensor]


def theirs(folder: Path, method: str, model: Any = None, **settings: Any) -> Any:
    """TRL's trainer of `method`, on scripted rollouts."""
    sdpo = method == "sdpo"
    args = {"output_dir": str(folder), **SHARED, **(SDPO if sdpo else SDFT), **settings}
    rows, common = tiny.dataset(), {"processing_class": tiny.tokenizer()}
    model = tiny.model() if model is None else model
    if sdpo:
        trainer = SDPOTrainer(model, tiny.reward, SDPOConfig(**args), train_dataset=rows, **common)
    else:
        trainer = SDFTTrainer(model, SDFTConfig(**args), train_dataset=rows, **common)
    calls = iter(range(10**6))

    def generate(prompt_ids: list[list[int]]) -> tuple[list, list]:
        call = next(calls)
        return prompt_ids, [scripted_ids(row, i, call) for i, row in enumerate(prompt_ids)]

    trainer._generate = generate
    return trainer


def ours(folder: Path, method: str, **settings: Any) -> RLSDTrainer:
    """Ours, with the mean that TRL's trainers always take: over tokens, then over rollouts."""
    threshold = {"success_reward_threshold": 0.5} if method == "sdpo" else {}
    settings = {**SHARED, "loss_type": "grpo", **threshold, **settings}
    return script(tiny.trainer(folder, method=method, **settings))


def weights(trainer: Any) -> Weights:
    trainer.train()
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def distance(left: Weights, right: Weights) -> float:
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


# --- where the definitions coincide --------------------------------------------------------------

FULL = {"distillation_mode": "full_logits"}
SAME: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "OPSD, forward KL": ("opsd", {}, {**FULL, "distillation_alpha": 0.0}),
    "OPSD, generalised JSD": (
        "opsd",
        {"distillation_alpha": 0.3},
        {**FULL, "distillation_alpha": 0.3},
    ),
    "OPSD, temperature": (
        "opsd",
        {"temperature": 0.7},
        {**FULL, "distillation_alpha": 0.0, "temperature": 0.7},
    ),
    "OPSD, top 10 rescaled": (
        "opsd",
        {"distillation_mode": "topk_logits", "distillation_topk": 10},
        {"distillation_mode": "topk_logits", "distillation_topk": 10, "distillation_alpha": 0.0},
    ),
    "SDPO as published": (
        "sdpo",
        {},
        {
            "distillation_mode": "topk_logits",
            "distillation_topk": 100,
            "distillation_alpha": 0.5,
            "distillation_add_tail": True,
        },
    ),
    "SDPO, sampled token": (
        "sdpo",
        {"distillation_mode": "sampled_token"},
        {"distillation_mode": "sampled_token", "distillation_alpha": 1.0},
    ),
    "SDPO, accumulated": (
        "sdpo",
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {
            "distillation_mode": "topk_logits",
            "distillation_topk": 100,
            "distillation_alpha": 0.5,
            "distillation_add_tail": True,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 4,
        },
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_whole_training_agrees_with_trl(tmp_path, case):
    """Three steps of each trainer on the same rollouts: same teacher prompts, loss and update."""
    method, mine, other = SAME[case]
    left, right = ours(tmp_path, method, **mine), theirs(tmp_path, method, **other)
    found, expected = weights(left), weights(right)
    assert distance(expected, tiny.model().state_dict()) > 1e-3, "nothing learned"
    assert distance(found, expected) <= 1e-5
    if mine.get("distillation_mode") != "sampled_token":  # the surrogate's value differs
        logs = [[r["loss"] for r in t.state.log_history if "loss" in r] for t in (left, right)]
        assert logs[0] == pytest.approx(logs[1], rel=1e-5)


# --- where they differ, by name ------------------------------------------------------------------

PUBLISHED = SAME["SDPO as published"][2]


def test_difference_dapo_is_a_mean_over_all_tokens_here_and_per_rollout_there(tmp_path):
    """TRL's trainers accept loss_type and never look at it for the distillation term."""
    sequence = weights(theirs(tmp_path, "sdpo", **PUBLISHED, loss_type="grpo"))
    assert distance(sequence, weights(theirs(tmp_path, "sdpo", **PUBLISHED, loss_type="dapo"))) == 0
    assert distance(sequence, weights(ours(tmp_path, "sdpo", loss_type="dapo"))) > 1e-4


def test_difference_beta_is_ignored_there_and_pulls_to_the_reference_here(tmp_path):
    without = weights(theirs(tmp_path, "sdpo", **PUBLISHED))
    assert distance(without, weights(theirs(tmp_path, "sdpo", **PUBLISHED, beta=100.0))) == 0

    def mine(beta: float) -> Weights:
        # GRPO's reference model is read from disk again; the first two steps need it.
        tiny.model().save_pretrained(tmp_path / "model")
        return weights(ours(tmp_path, "sdpo", student=str(tmp_path / "model"), beta=beta))

    assert distance(mine(0.0), mine(1.0)) > 1e-4


def test_difference_the_question_is_truncated_there(tmp_path):
    """SDFT cuts the teacher's prompt on the left to max_prompt_length: the question goes first."""
    long = weights(theirs(tmp_path, "opsd", **SAME["OPSD, forward KL"][2], max_prompt_length=None))
    cut = weights(theirs(tmp_path, "opsd", **SAME["OPSD, forward KL"][2], max_prompt_length=7))
    assert distance(long, cut) > 1e-4
    with pytest.raises(ValueError, match="leave no room for the privileged text"):
        ours(tmp_path, "opsd", max_teacher_prompt_length=4).train()


def test_difference_reused_rollouts_keep_their_teacher_here(tmp_path):
    """TRL asks the teacher again in each iteration; a live one has moved with the student."""
    assert (
        distance(
            weights(ours(tmp_path, "opsd", num_iterations=2)),
            weights(theirs(tmp_path, "opsd", **SAME["OPSD, forward KL"][2], num_iterations=2)),
        )
        > 1e-4
    )


def test_difference_a_base_teacher_is_the_model_that_was_passed_here(tmp_path):
    """TRL reads it again from the student's path, so changes made since then are lost."""
    tiny.model().save_pretrained(tmp_path / "hub")
    changed = type(tiny.model()).from_pretrained(tmp_path / "hub")
    with torch.no_grad():
        changed.lm_head.weight.mul_(2)
    head = changed.lm_head.weight.clone()
    there = theirs(tmp_path, "sdpo", changed, **PUBLISHED, teacher_model_kind="base")
    here = ours(tmp_path, "sdpo", student=changed, teacher_model_kind="base")
    assert torch.equal(here.teacher.model.lm_head.weight, head)
    assert not torch.equal(there.teacher_model.lm_head.weight, head)


def test_difference_policy_and_distillation_are_a_sum_here_and_a_convex_mix_there(tmp_path):
    """(1 - w) policy + w distillation is our policy + w / (1 - w) distillation, times 1 - w."""
    mix = {**FULL, "distillation_alpha": 0.0, "distillation_weight": 0.25, "loss_type": "grpo"}
    shown = {"use_successful_as_teacher": False, "include_environment_feedback": True}
    shown |= {"reprompt_template": "{prompt}|{feedback}", "feedback_template": "{feedback_raw}"}
    plain = {"max_grad_norm": 0.0}  # a clipped gradient would hide a factor
    there = theirs(tmp_path, "sdpo", **mix, **shown, **plain, learning_rate=0.04)
    here = ours(tmp_path, "grpo_opsd", distillation_weight=1 / 3, **plain, learning_rate=0.03)
    assert distance(weights(here), weights(there)) <= 1e-5


def test_difference_no_images_reach_the_teacher_there(tmp_path):
    """Their batch has no field for pixels; ours hands the student's to the teacher."""
    from rlsd_lib.trainer.states import IMAGE_FIELDS

    seen: set[str] = set()
    trainer = theirs(tmp_path, "sdpo", **PUBLISHED, max_steps=1)
    compute = trainer.compute_loss

    def spy(model, inputs, *args, **kwargs):
        seen.update(inputs)
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = spy
    trainer.train()
    assert "teacher_input_ids" in seen
    assert seen.isdisjoint(IMAGE_FIELDS)
