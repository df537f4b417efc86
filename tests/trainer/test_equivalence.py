"""What must be equal bit for bit: GRPO inside RLSD, and a teacher that sees what the student sees."""

from dataclasses import fields

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from trl import GRPOConfig, GRPOTrainer

from rlsd_lib import RLSDTrainer

LAYOUTS = {
    "aligned": {},
    "num_iterations": {"num_iterations": 2},
    "steps_per_generation": {"steps_per_generation": 4},
    "mask_truncated": {"mask_truncated_completions": True},
    "pad_to_multiple": {"pad_to_multiple_of": 8},
}
LOSSES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo")
# Every loss once with every layout would be 50 runs; each loss meets every layout over the table.
CASES = [(loss, layout) for i, loss in enumerate(LOSSES) for layout in list(LAYOUTS)[i % 2 :: 2]]
CASES += [("dapo", "num_iterations"), ("grpo", "num_iterations"), ("cispo", "steps_per_generation")]


def weights_after_five_steps(trainer: GRPOTrainer) -> dict[str, torch.Tensor]:
    trainer.train()
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def grpo_weights(folder, **overrides) -> dict[str, torch.Tensor]:
    """The same arguments, handed to TRL's own trainer."""
    ours = tiny.config(folder, **overrides)
    # Derived from steps_per_generation, and refused beside it.
    names = [f.name for f in fields(GRPOConfig) if f.init and f.name != "generation_batch_size"]
    args = GRPOConfig(**{name: getattr(ours, name) for name in names})
    trainer = GRPOTrainer(
        tiny.model(), tiny.reward, args, tiny.dataset(), processing_class=tiny.tokenizer()
    )
    return weights_after_five_steps(trainer)


@pytest.mark.parametrize(("loss", "layout"), sorted(set(CASES)))
def test_grpo_is_bit_identical(tmp_path, loss, layout):
    settings = {"max_steps": 5, "loss_type": loss, **LAYOUTS[layout]}
    reference = grpo_weights(tmp_path, method="grpo", **settings)
    start = tiny.model().state_dict()
    assert any(not torch.equal(reference[name], start[name]) for name in start), "nothing learned"
    for overrides in ({"method": "grpo"}, {"method": "rlsd", "lambda_init": 0.0}):
        ours = weights_after_five_steps(tiny.trainer(tmp_path, **settings, **overrides))
        assert ours.keys() == reference.keys()
        assert all(torch.equal(ours[name], reference[name]) for name in reference), overrides


def test_rlsd_differs_from_grpo(tmp_path):
    grpo = weights_after_five_steps(tiny.trainer(tmp_path, method="grpo"))
    rlsd = weights_after_five_steps(tiny.trainer(tmp_path, method="rlsd"))
    assert any(not torch.equal(grpo[name], rlsd[name]) for name in grpo)


def lora_student():
    return get_peft_model(tiny.model(), LoraConfig(r=4, init_lora_weights=False))


# Every kind of teacher and student, every layout, and the layouts in turn over the rest.
PAIRS = [(k, s) for k in ("snapshot", "live", "base", "ema") for s in ("full", "lora")]
NULLS = {(*pair, list(LAYOUTS)[i % len(LAYOUTS)]) for i, pair in enumerate(PAIRS)}
NULLS |= {("snapshot", "full", layout) for layout in LAYOUTS}


@pytest.mark.parametrize(("kind", "student", "layout"), sorted(NULLS))
def test_null_gap_is_exactly_zero(tmp_path, kind, student, layout):
    """Trap-catcher: template, padding, temperature, dtype, patching and adapter mistakes all show.

    Checked at the first rollout batch, where all kinds hold the student's weights.
    """
    trainer = tiny.trainer(
        tmp_path,
        lora_student() if student == "lora" else None,
        tiny.dataset(privileged_context=[""] * 32),
        privileged_template="{prompt}{privileged_context}",
        teacher_model_kind=kind,
        temperature=0.7,
        max_steps=1,
        **LAYOUTS[layout],
    )
    gaps = []
    credit = trainer._token_advantages

    def spy(inputs, logps):
        mask = inputs["completion_mask"].bool()
        gaps.append(
            (inputs["teacher_per_token_logps"] - inputs.get("old_per_token_logps", logps))[mask]
        )
        return credit(inputs, logps)

    trainer._token_advantages = spy
    trainer.train()
    assert sum(gap.numel() for gap in gaps) > 0 or layout == "mask_truncated"
    assert all((gap == 0).all() for gap in gaps)
    assert trainer.state.log_history[0].get("rlsd/intervention", 0.0) == 0.0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_teacher_forward_per_rollout_and_no_extra_student_forward(tmp_path, layout):
    """Rows forwarded through the log-probability hook, outside of generation, over four steps."""
    rows = {}
    for method in ("grpo", "rlsd"):
        settings = {"max_steps": 4, "logging_steps": 4, "teacher_pass": "plain", **LAYOUTS[layout]}
        trainer = tiny.trainer(tmp_path, method=method, **settings)
        rows[method] = count_rows(trainer)
        trainer.train()
    rollouts = rows["rlsd"].pop("rollouts")
    assert rows["grpo"].pop("rollouts") == rollouts
    assert rows["rlsd"].pop("teacher") == rollouts
    assert rows["rlsd"] == rows["grpo"]


def count_rows(trainer: RLSDTrainer) -> dict[str, int]:
    counts: dict[str, int] = {"rollouts": 0}
    teacher = trainer.teacher.model if trainer.teacher else None
    score, generate = trainer._get_per_token_logps_and_entropies, trainer._generate

    def counted_score(model, input_ids, *args, **kwargs):
        whose = "teacher" if teacher is not None and model is teacher else "student"
        counts[whose] = counts.get(whose, 0) + len(input_ids)
        return score(model, input_ids, *args, **kwargs)

    def counted_generate(prompts):
        counts["rollouts"] += len(prompts)
        return generate(prompts)

    trainer._get_per_token_logps_and_entropies = counted_score
    trainer._generate = counted_generate
    return counts


def test_no_teacher_forward_while_lambda_is_zero_and_memory_is_released(tmp_path):
    trainer = tiny.trainer(
        tmp_path, max_steps=6, lambda_warmup_steps=2, lambda_decay_steps=2, teacher_pass="plain"
    )
    counts = count_rows(trainer)
    per_step = []

    def after_step(args, state, control, **kwargs):
        per_step.append(counts.get("teacher", 0))

    trainer.callback_handler.callbacks[-1].on_step_begin = after_step
    trainer.train()
    # lambda at steps 0..5: 0, .25, .5, .25, 0, 0; eight rollouts a step.
    assert per_step == [0, 0, 8, 16, 24, 24]
    assert trainer.teacher.model is None


def test_evaluation_runs_no_teacher_and_needs_no_privileged_column(tmp_path):
    trainer = tiny.trainer(tmp_path, max_steps=1, per_device_eval_batch_size=4)
    trainer.train()
    trainer.teacher_scores = None
    metrics = trainer.evaluate(tiny.dataset(4).remove_columns("privileged_context"))
    assert "eval_reward" in metrics


def test_peft_config_route(tmp_path):
    """`peft_config=` as in any TRL script: the teacher adapter appears beside TRL's own."""
    trainer = RLSDTrainer(
        tiny.model(),
        tiny.reward,
        tiny.config(tmp_path, max_steps=2),
        tiny.dataset(),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=4),
    )
    trainer.train()
    assert set(trainer.model.peft_config) == {"default", "teacher"}
    assert trainer.model.active_adapter == "default"
