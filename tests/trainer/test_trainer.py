"""The traps of the host library and the errors that must come before any compute.

Each test names the trap it guards against.
"""

import re

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import TrainerCallback

from rlsd_lib import RLSDConfig, RLSDTrainer


def run_and_capture(trainer: RLSDTrainer) -> list[dict]:
    """Train, and return the loss inputs of every micro-step after credit was applied."""
    seen = []
    token_advantages = trainer._token_advantages

    def spy(inputs, logps):
        credited = token_advantages(inputs, logps)
        student = inputs.get("old_per_token_logps", logps)
        seen.append({**inputs, "credited": credited, "student": student})
        return credited

    trainer._token_advantages = spy
    trainer.train()
    return seen


# Values


def test_bad_values_are_refused(tmp_path):
    for field, value, expected in [
        ("lambda_init", 1.5, "lambda_init=1.5: expected a number in [0, 1]"),
        ("lambda_init", -0.1, "lambda_init=-0.1"),
        ("epsilon_w", -0.2, "epsilon_w=-0.2: expected a number >= 0"),
        ("lambda_decay_steps", -1, "lambda_decay_steps=-1: expected a step count >= 0"),
        ("lambda_warmup_steps", -1, "lambda_warmup_steps=-1"),
        ("teacher_sync_steps", 0, "teacher_sync_steps=0: expected a step count >= 1"),
        ("teacher_update_rate", 0.0, "teacher_update_rate=0.0"),
        ("max_teacher_prompt_length", 0, "max_teacher_prompt_length=0"),
        ("method", "rsld", "Unknown method 'rsld'. Did you mean 'rlsd'?"),
        (
            "teacher_model_kind",
            "snap",
            "Unknown teacher_model_kind 'snap'. Did you mean 'snapshot'",
        ),
        ("privileged_template", "{prompt}", "has no {privileged_context}"),
        ("privileged_template", "see {privileged_context}", "has no {prompt}"),
        ("remove_unused_columns", True, "remove_unused_columns=True would drop"),
        ("use_liger_kernel", True, "use_liger_kernel=True is not supported"),
        ("weight_clip", "logarithmic", "weight_clip 'logarithmic'. Valid: linear, log"),
    ]:
        with pytest.raises(ValueError) as error:
            tiny.config(tmp_path, **{field: value})
        assert expected in str(error.value)


def test_values_that_no_number_is_are_refused_by_name(tmp_path):
    """In the Python API as in the command, for the parent's fields as for ours."""
    floats, whole = ("epsilon_w", "lambda_init", "learning_rate", "beta"), ("max_steps",)
    whole = (*whole, "lambda_decay_steps", "teacher_sync_steps", "wrong_references")
    for field in (*floats, *whole):
        for value in ("1", None, True, [1], float("nan"), float("inf"), -float("inf")):
            said = rf"{field}={re.escape(repr(value))}( is \w+, |: )expected"
            with pytest.raises((TypeError, ValueError), match=said):
                tiny.config(tmp_path, **{field: value})
    for field in whole:
        with pytest.raises(TypeError, match=rf"{field}=1.5 is float, expected int"):
            tiny.config(tmp_path, **{field: 1.5})
    with pytest.raises(TypeError, match="conserve_credit=1 is int, expected bool"):
        tiny.config(tmp_path, conserve_credit=1)
    with pytest.raises(ValueError, match="num_generations=None: expected a count"):
        tiny.config(tmp_path, num_generations=None)
    assert tiny.config(tmp_path, epsilon_w=np.float32(0.5), learning_rate=1).epsilon_w == 0.5
    assert tiny.config(tmp_path, max_grad_norm=float("inf")).max_grad_norm == float("inf")


def test_credit_against_the_sign_of_a_is_refused_where_trl_decides_by_it(tmp_path):
    """TRL's off-policy mask and VESPO's weight are a rollout's; by token signs they fall apart."""
    for setting in ({"off_policy_mask_threshold": 0.1}, {"loss_type": "vespo"}):
        for method in ("grpo", "rlsd", "opsd", "cepo", "rlcsd", "posterior_blame", "oracle"):
            tiny.config(tmp_path, method=method, **setting)
        for method in ("hindsight", "antisd", "privileged_baseline", "oracle_value", "sdar"):
            with pytest.raises(ValueError, match=r"by the sign of its advantage.* Leave it out"):
                tiny.config(tmp_path, method=method, **setting)


def test_rewards_that_are_no_list_of_numbers_are_refused(tmp_path):
    for given, said in {
        "column": r"Tensor \(4, 1\): expected a list of 4 numbers",
        "dict": r"dict \(4,\): expected a list",
        "text": "str",
        "short": r"list \(3,\)",
    }.items():

        def graded(completions, given=given, **_):
            scores = torch.arange(len(completions)).float()
            by_name = dict(enumerate(scores.tolist()))
            forms = {"column": scores[:, None], "dict": by_name, "text": "1111", "short": [1.0] * 3}
            return forms[given]

        with pytest.raises(ValueError, match=f"Reward function 'graded' returned {said}"):
            tiny.trainer(
                tmp_path, rewards=graded, max_steps=1, gradient_accumulation_steps=1
            ).train()


def test_trap_1_sequence_level_sampling_would_erase_the_credit(tmp_path):
    for loss in ("grpo", "dapo", "dr_grpo", "bnpo", "sapo", "luspo"):
        sequence = {"importance_sampling_level": "sequence", "loss_type": loss}
        with pytest.raises(ValueError, match="averages the token credit"):
            tiny.config(tmp_path, **sequence)
        tiny.config(tmp_path, **sequence, method="grpo")


@pytest.mark.parametrize("loss", ["cispo", "vespo"])
def test_trap_1_losses_that_keep_token_credit_are_allowed(tmp_path, loss):
    trainer = tiny.trainer(
        tmp_path,
        importance_sampling_level="sequence",
        loss_type=loss,
        max_steps=1,
        epsilon_high=5.0,
    )
    assert run_and_capture(trainer)


def test_options_of_the_weight_are_judged(tmp_path):
    for changes in (
        {"method": "grpo", "weight_clip": "log"},
        {"method": "opsd", "conserve_credit": True},
    ):
        with pytest.raises(ValueError, match="has no weight"):
            tiny.config(tmp_path, **changes)


def test_options_of_an_own_teacher_mean_nothing_for_an_external_one(tmp_path):
    for changes in (
        {"teacher_model_kind": "ema"},
        {"teacher_sync_steps": 5},
        {"teacher_update_rate": 0.5},
    ):
        with pytest.raises(
            ValueError, match=r"means nothing for method='opd', whose teacher_model"
        ):
            tiny.config(tmp_path, method="opd", **changes)
    tiny.config(tmp_path, method="opd", teacher_model_kind="snapshot", teacher_sync_steps=10)


def test_wide_epsilon_w_is_allowed(tmp_path):
    assert tiny.config(tmp_path, epsilon_w=9.0).epsilon_w == 9.0


# Rows


@pytest.mark.parametrize(
    ("contexts", "message"),
    [
        (["3"] * 30 + [None, ""], r"2 dataset rows have no privileged_context \(rows 30, 31\)"),
        ([str(i) for i in range(31)] + ["<|image_pad|>"], "image placeholder"),
    ],
)
def test_bad_rows_stop_before_the_model_is_touched(tmp_path, contexts, message):
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, "no/such-model", tiny.dataset(privileged_context=contexts))


def test_non_strings_and_missing_columns_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not a string"):
        tiny.trainer(tmp_path, data=tiny.dataset(privileged_context=list(range(32))))
    with pytest.raises(ValueError, match=r"needs a 'privileged_context' column.*\['prompt'\]"):
        tiny.trainer(tmp_path, data=tiny.dataset().remove_columns("privileged_context"))
    tiny.trainer(tmp_path, data=tiny.dataset().remove_columns("privileged_context"), method="grpo")


def test_the_privileged_column_may_have_another_name(tmp_path):
    """The same run, bit by bit, also where wrong references are drawn; rewards see the name."""
    data, names = tiny.dataset(), []

    def reward(completions, **columns):
        names.extend(columns)
        return tiny.reward(completions)

    renamed = data.rename_column("privileged_context", "solution")
    for method in ("rlsd", "cepo"):
        heads = []
        for given in (
            {"data": data},
            {"data": renamed, "rewards": reward, "privileged_column": "solution"},
        ):
            trainer = tiny.trainer(tmp_path, method=method, **given)
            trainer.train()
            heads.append(trainer.model.lm_head.weight)
        assert torch.equal(*heads), method
    assert "solution" in names and "privileged_context" not in names
    with pytest.raises(ValueError, match=r"needs a 'solution' column.*set privileged_column"):
        tiny.trainer(tmp_path, data=data, privileged_column="solution")
    typed = data.rename_column("prompt", "promt")
    with pytest.raises(ValueError, match=r"did you mean 'promt'"):
        tiny.trainer(tmp_path, data=typed)
    with pytest.raises(ValueError, match=r"did you mean 'solution'"):
        tiny.trainer(tmp_path, data=renamed, privileged_column="solutoin")
    empty = tiny.dataset(solution=[""] * 32)
    with pytest.raises(ValueError, match="32 dataset rows have no solution"):
        tiny.trainer(tmp_path, data=empty, privileged_column="solution")


def test_trap_23_a_reference_in_the_students_prompt_is_refused(tmp_path):
    prompts = [[{"role": "user", "content": "add: the sum is three hundred"}]] * 8
    data = Dataset.from_dict(
        {"prompt": prompts, "privileged_context": ["the sum is three hundred"] * 8}
    )
    with pytest.raises(ValueError, match=r"own prompt \(rows 0, 1, 2, 3, 4, 5, 6, 7\)"):
        tiny.trainer(tmp_path, data=data)


def test_trap_23_a_short_answer_in_the_question_is_counted(tmp_path):
    prompts = [[{"role": "user", "content": f"is {i} odd?"}] for i in range(8)]
    data = Dataset.from_dict({"prompt": prompts, "privileged_context": [str(i) for i in range(8)]})
    trainer = tiny.trainer(tmp_path, data=data, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["rlsd/reference_in_prompt_frac"] == 1.0


def test_streamed_rows_are_checked_batch_by_batch(tmp_path):
    def rows(last):
        yield from ({"prompt": "1+1", "privileged_context": "2"} for _ in range(6))
        yield from ({"prompt": "1+1", "privileged_context": last} for _ in range(6))

    good = IterableDataset.from_generator(rows, gen_kwargs={"last": "2"})
    tiny.trainer(tmp_path, data=good, max_steps=2, shuffle_dataset=False).train()
    bad = IterableDataset.from_generator(rows, gen_kwargs={"last": ""})
    with pytest.raises(ValueError, match="no privileged_context"):
        tiny.trainer(tmp_path, data=bad, max_steps=6, shuffle_dataset=False).train()


# Models and processors


def test_trap_11_dropout_would_be_noise_in_the_gap(tmp_path):
    with pytest.raises(ValueError, match="attention_dropout"):
        tiny.trainer(tmp_path, tiny.model(attention_dropout=0.1))

    def lora(**overrides):
        return RLSDTrainer(
            tiny.model(),
            tiny.reward,
            tiny.config(tmp_path, max_steps=1, **overrides),
            tiny.dataset(),
            processing_class=tiny.tokenizer(),
            peft_config=LoraConfig(r=4, lora_dropout=0.1),
        )

    with pytest.raises(ValueError, match=r"Dropout is active in .*lora_dropout"):
        lora()
    lora(disable_dropout=True).train()


def test_rollout_func_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rollout_func builds its own prompt ids"):
        RLSDTrainer(
            tiny.model(),
            tiny.reward,
            tiny.config(tmp_path),
            tiny.dataset(),
            processing_class=tiny.tokenizer(),
            rollout_func=lambda prompts, trainer: {},
        )


def test_args_of_the_wrong_class_are_refused(tmp_path):
    from trl import GRPOConfig

    with pytest.raises(TypeError, match="RLSDConfig, got GRPOConfig"):
        RLSDTrainer(tiny.model(), tiny.reward, GRPOConfig(str(tmp_path), use_cpu=True, bf16=False))


# Credit inside the loss


def test_every_parameter_moves(tmp_path):
    trainer = tiny.trainer(tmp_path, learning_rate=0.1)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert all(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


def test_trap_7_teacher_scores_stay_with_their_rollouts_after_the_shuffle(tmp_path):
    """Scored again one row at a time, from the ids in the loss, every row must match."""
    trainer = tiny.trainer(tmp_path, max_steps=1, teacher_model_kind="base")
    contexts = dict(zip(map(str, range(32)), map(str, range(1, 65, 2)), strict=False))
    tokenizer = trainer.processing_class
    for micro in run_and_capture(trainer):
        for row in range(len(micro["prompt_ids"])):
            prompt = tokenizer.decode(micro["prompt_ids"][row], skip_special_tokens=True)
            length = int(micro["completion_mask"][row].sum())
            completion = micro["completion_ids"][row, :length]
            turn = f"<user>{prompt}|{contexts[prompt.split('+')[0]]}</s><assistant>"
            ids = torch.cat([torch.tensor(tokenizer.encode(turn)), completion])[None]
            labels = ids.clone()
            with torch.no_grad():
                scored = trainer.teacher.model(ids, labels=labels, fused_lm_head=True).log_probs
            torch.testing.assert_close(
                scored[0, -length:], micro["teacher_per_token_logps"][row, :length]
            )


@pytest.mark.parametrize("reuse", [{"num_iterations": 3}, {"steps_per_generation": 4}])
def test_trap_8_reused_rollouts_are_never_reweighted_twice(tmp_path, reuse):
    for micro in run_and_capture(tiny.trainer(tmp_path, max_steps=4, **reuse)):
        assert micro["advantages"].dim() == 1
        ratio = micro["credited"] / micro["advantages"][:, None]
        assert (ratio[micro["advantages"] != 0] >= 0.9 - 1e-6).all()
        assert (ratio[micro["advantages"] != 0] <= 1.1 + 1e-6).all()


def test_traps_3_and_4_the_student_side_is_old_when_there_is_one(tmp_path):
    aligned = run_and_capture(tiny.trainer(tmp_path, max_steps=1))
    assert all("old_per_token_logps" not in micro for micro in aligned)
    reused = run_and_capture(tiny.trainer(tmp_path, max_steps=2, num_iterations=2))
    assert all(micro["student"] is micro["old_per_token_logps"] for micro in reused)


def test_trap_5_and_10_masked_positions_keep_the_advantage(tmp_path):
    seen = run_and_capture(tiny.trainer(tmp_path, mask_truncated_completions=True))
    for micro in seen:
        outside = micro["completion_mask"] == 0
        plain = micro["advantages"][:, None].expand_as(micro["credited"])
        assert torch.equal(micro["credited"][outside], plain[outside])


def test_trap_6_tool_tokens_get_no_credit(tmp_path):
    trainer = tiny.trainer(tmp_path)
    tool_mask = torch.tensor([[1, 0, 1]])
    inputs = {
        "advantages": torch.tensor([1.0]),
        "completion_mask": torch.ones(1, 3, dtype=torch.long),
        "tool_mask": tool_mask,
        "teacher_per_token_logps": torch.zeros(1, 3),
        "rewards": torch.ones(1),
        "entropy": torch.ones(1, 3),
    }
    credited = trainer._token_advantages(inputs, torch.full((1, 3), -5.0))
    torch.testing.assert_close(credited, torch.tensor([[1.1, 1.0, 1.1]]))


def test_trap_9_zero_advantages_do_not_skip_the_teacher(tmp_path):
    trainer = tiny.trainer(tmp_path, max_steps=1)
    trainer.reward_funcs = [lambda completions, **_: [1.0] * len(completions)]
    seen = run_and_capture(trainer)
    assert all((micro["credited"] == 0).all() for micro in seen)
    assert all("teacher_per_token_logps" in micro for micro in seen)
    # A ratio to A = 0 does not exist: nothing is logged, and no number stands for it.
    assert trainer.state.log_history[0]["rlsd/intervention"] is None


def test_trap_14_system_prompt_template_and_arguments_are_the_students(tmp_path):
    """The teacher's prompt differs from the student's in the last user turn only."""
    prompts = [
        [{"role": "system", "content": "sys"}, {"role": "user", "content": f"{i}?"}]
        for i in range(8)
    ]
    rows = Dataset.from_dict({"prompt": prompts, "privileged_context": ["9"] * 8})
    marked = [{**row, "chat_template_kwargs": {}} for row in rows]
    trainer = tiny.trainer(tmp_path, data=Dataset.from_list(marked), max_steps=1)
    trainer.chat_template_kwargs = {"think": True}
    tokenizer = trainer.processing_class
    tokenizer.chat_template = tokenizer.chat_template + "{% if think %}#{% endif %}"
    turns = []
    prompts_of = trainer.teacher_prompts

    def spy(*args):
        seen = prompts_of(*args)
        rows = zip(seen.ids, seen.mask, strict=True)
        turns.extend(tokenizer.decode(row[keep.bool()]) for row, keep in rows)
        return seen

    trainer.teacher_prompts = spy
    trainer.train()
    assert len(turns) == 8
    for turn in turns:
        question = turn.removeprefix("<system>sys</s><user>")[0]
        assert turn == f"<system>sys</s><user>{question}?|9</s><assistant>#"


def test_trap_15_a_long_reference_is_shortened_and_counted(tmp_path):
    data = tiny.dataset(privileged_context=["x" * 60] * 16 + ["y"] * 16)
    trainer = tiny.trainer(tmp_path, data=data, max_steps=4, max_teacher_prompt_length=30)
    widths = []
    prompts_of, score = trainer.teacher_prompts, trainer.teacher_scores

    def spy(*args):
        seen = prompts_of(*args)
        widths.append(seen.ids.shape[1])
        return seen

    def quiet(*args):
        before = {name: list(values) for name, values in trainer._metrics["train"].items()}
        scores = score(*args)
        assert trainer._metrics["train"] == before, "scoring logs nothing"
        return scores

    trainer.teacher_prompts, trainer.teacher_scores = spy, quiet
    trainer.train()
    assert max(widths) == 30
    shares = [row["rlsd/context_shortened_frac"] for row in trainer.state.log_history[:-1]]
    assert 0 < sum(shares) / len(shares) < 1


def test_trap_21_metrics_are_those_of_the_contract(tmp_path):
    trainer = tiny.trainer(tmp_path, max_steps=1)
    trainer.train()
    names = {"lambda", "gap_mean", "gap_abs_mean", "weight_mean", "clip_low_frac"}
    names |= {"clip_high_frac", "intervention", "teacher_age"}
    assert {f"rlsd/{name}" for name in names} <= set(trainer.state.log_history[0])


def test_a_row_without_a_reward_teaches_nothing_and_is_counted(tmp_path):
    def only_some(completions, **_):
        return [None if i % 4 == 0 else float(i) for i in range(len(completions))]

    trainer = tiny.trainer(tmp_path, rewards=only_some, max_steps=1)
    seen = []
    score = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda rows: seen.append(score(rows)) or seen[-1]
    trainer.train()
    advantages = seen[0]["advantages"]
    assert advantages[::4].abs().max() == 0
    assert advantages.isfinite().all()
    assert advantages.abs().max() > 0
    assert trainer.state.log_history[0]["rewards/unscored_frac"] == 0.25


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "none of 8 rows got a reward: constant returned None"),
        (float("inf"), "'constant' gave inf for row 0 of all ranks' batch at step 0"),
    ],
)
def test_rewards_that_teach_nothing_or_break_the_mean_are_refused(tmp_path, value, said):
    def constant(completions, **_):
        return [value] * len(completions)

    with pytest.raises(FloatingPointError, match=said):
        tiny.trainer(tmp_path, rewards=constant, max_steps=1).train()


class Break(TrainerCallback):
    """Puts a NaN into a model before a step."""

    def __init__(self, model, step):
        self.model, self.step = model, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                self.model.lm_head.weight[7] = float("nan")


@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_non_finite_log_probabilities_stop_the_run_and_keep_checkpoints(tmp_path, whose):
    trainer = tiny.trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=1)
    if whose == "teacher":
        trainer.add_callback(Break(trainer.teacher.model, 2))
    else:
        hook = trainer._compute_loss

        def broken(model, inputs):
            if trainer.state.global_step == 2:
                with torch.no_grad():
                    model.lm_head.weight[7] = float("nan")
            return hook(model, inputs)

        trainer._compute_loss = broken
    with pytest.raises(FloatingPointError, match=f"Non-finite {whose} .* step 2, in samples"):
        trainer.train()
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists()


def test_the_config_reads_like_its_parent():
    assert "lambda_init (`float`, *optional*, defaults to `0.5`)" in RLSDConfig.__doc__
