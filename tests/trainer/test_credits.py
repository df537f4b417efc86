"""Every row of the table: it trains, with its signals, at its cost."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import tiny
import tiny_vlm
import torch
from peft import LoraConfig, get_peft_model

from rlsd_lib.credit import leave_one_out, oracle, permuted
from rlsd_lib.methods import METHODS, NEEDS_WRONG, PUBLISHED, keywords
from rlsd_lib.trainer import states
from rlsd_lib.trainer.trainer import GATE_STEPS

# Passes of the teacher over each rollout, where not one.
PASSES = {"cepo": 2, "rlsd_contrast": 2, "rlcsd": 2, "opsd_contrast": 2, "opsd_value_contrast": 2}
PASSES |= {"grpo": 0, "raft": 0, "oracle": 0, "oracle_value": 0, "hindsight_gated": 2}
# One row for each thing that a forward is made for: the gap, a wrong reference, TRL's reference
# model, the states of the teacher under both references.
KINDS = ["rlsd", "cepo", "sdpg", "opsd_value_contrast"]


def make(folder, method: str, student: Any = None, kind: Any = tiny, **changes: Any):
    """A trainer of `method` on the tiny model of the module `kind`; `more` are its arguments."""
    more = tiny.from_outside(method, partial(kind.model, seed=1)) | changes.pop("more", {})
    settings = {"method": method, "success_reward_threshold": 0.5, "max_steps": 2}
    settings |= {**tiny.NEEDS.get(method, {}), **changes}
    if student is None and settings.get("beta"):  # TRL loads the reference model from its folder
        student = str(folder / "student")
        kind.model().save_pretrained(student)
    if kind is tiny_vlm:  # rows with several images, one and none
        return kind.trainer(
            folder, kind.dataset([1, 0, 2, 0, 3, 1, 0, 1]), student, more=more, **settings
        )
    return kind.trainer(folder, student, more=more, **settings)


def lora_of(model: Any) -> Any:
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules="all-linear")
    return get_peft_model(model, config)


def count_rows(trainer) -> dict[str, int]:
    """Counts rows that are generated, that the teacher scores, and that other models score."""
    counted = {"rollouts": 0, "teacher": 0, "others": 0}
    scores, generate = trainer.teacher_scores, trainer._generate
    logps = trainer._get_per_token_logps_and_entropies

    def scored(prompts, contexts, output):
        others, found = counted["others"], scores(prompts, contexts, output)
        counted["teacher"] += len(prompts)
        counted["others"] = others
        return found

    def generated(prompts):
        counted["rollouts"] += len(prompts)
        return generate(prompts)

    def forward(model, ids, *args, **kwargs):
        counted["others"] += len(ids)
        return logps(model, ids, *args, **kwargs)

    trainer.teacher_scores, trainer._generate = scored, generated
    trainer._get_per_token_logps_and_entropies = forward
    return counted


def check_run(name: str, trainer: Any) -> None:
    """Two steps: something learns, every number is finite, models score as often as the row says."""
    start = {k: p.detach().clone() for k, p in trainer.model.named_parameters() if p.requires_grad}
    counted = count_rows(trainer)
    trainer.train()
    moved = [k for k, p in trainer.model.named_parameters() if k in start and not p.equal(start[k])]
    assert moved, f"{name} learned nothing"
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logs) == 2, name
    for log in logs:
        own = {k: v for k, v in log.items() if k.startswith("rlsd/") or k in ("loss", "grad_norm")}
        assert all(v is not None and abs(v) < 1e6 for v in own.values()), (name, own)
        assert ("rlsd/intervention" in log) == trainer.args.has_token_credit, (name, log)
        assert ("rlsd/distillation_weight" in log) == (METHODS[name].weight is not None), (
            name,
            log,
        )
    passes = PASSES.get(name, 1) + trainer.args.wrong_references - 1
    # Rollouts serve one step: the student's forward is the loss's own, and beta > 0 adds TRL's.
    others = 1 + (trainer.args.beta > 0)
    expected = {"rollouts": 16, "teacher": 16 * passes, "others": 16 * others}
    assert counted == expected, (name, counted)


def check_rows(folder, names: Iterable[str], student: str) -> None:
    kind = tiny_vlm if "images" in student else tiny
    for name in names:
        lora = lora_of(kind.model()) if "LoRA" in student else None
        several = {"wrong_references": 2} if lora and "wrong_gaps" in METHODS[name].asks else {}
        check_run(name, make(folder, name, lora, kind, **several))


def test_every_row_trains_on_text(tmp_path):
    check_rows(tmp_path, METHODS, "text")


beyond_text = pytest.mark.parametrize("student", ["text, LoRA", "images", "images, LoRA"])


@beyond_text
def test_a_row_of_each_kind_trains_on_images_and_with_lora(tmp_path, student):
    check_rows(tmp_path, KINDS, student)


@pytest.mark.slow
@beyond_text
def test_every_row_trains_on_images_and_with_lora(tmp_path, student):
    check_rows(tmp_path, METHODS, student)


# --- signals -------------------------------------------------------------------------------------

ASKED = ("success", "group_success", "wrong_gaps", "reference_gap", "first_error", "decisions")


def test_every_signal_is_that_of_its_own_rollout(tmp_path):
    """Through TRL's shuffle and split, on rollouts that are used twice, against a recomputation."""
    calls, batches = [], []

    def credit(advantages, gap, mask, *, success, group_success, wrong_gaps, reference_gap,
               first_error, decisions, thought=None, tau=2.0):  # fmt: skip
        given = (success, group_success, wrong_gaps, reference_gap, first_error, decisions)
        calls.append({**dict(zip(ASKED, given, strict=True)), "gap": gap})
        assert thought is not None and tau == 2.0
        return advantages[:, None] + 0 * gap

    settings = {"method": "rlsd", "num_iterations": 2, "max_steps": 3, "wrong_references": 2}
    more = {"credit": credit, "signals": tiny.signals}
    trainer = make(tmp_path, teacher_pass="plain", beta=0.01, more=more, **settings)
    score, assign, micros = trainer._generate_and_score_completions, trainer._token_advantages, []
    scores = trainer.teacher_scores

    def scored(prompts, contexts, output):
        found = scores(prompts, contexts, output)
        batches[-1]["wrong"].append((list(contexts), found.logps))
        return found

    def generated(rows):
        batches.append({"wrong": []})
        output = score(rows)
        batches[-1] |= {"rows": rows, "rewards": trainer._rewards, "ids": output["completion_ids"]}
        output["place"] = torch.arange(len(rows))
        return output

    def assigned(inputs, logps):
        micros.append((batches[-1], inputs))
        return assign(inputs, logps)

    trainer.teacher_scores, trainer._generate_and_score_completions = scored, generated
    trainer._token_advantages = assigned
    trainer.train()
    assert len(calls) == len(micros) == 6
    for call, (batch, micro) in zip(calls, micros, strict=True):
        place, right = micro["place"], batch["rewards"] >= 0.5
        assert torch.equal(call["success"], right[place])
        assert torch.equal(call["group_success"], leave_one_out(right, 4)[place])
        (own, _), *wrong = batch["wrong"]
        assert call["wrong_gaps"].shape == (2, *call["gap"].shape)
        for k, (texts, logps) in enumerate(wrong):
            expected = logps[place] - micro["old_per_token_logps"]
            assert torch.equal(call["wrong_gaps"][k], expected)
            assert all(text not in (other, "") for text, other in zip(texts, own, strict=True))
        assert all(one != two for one, two in zip(wrong[0][0], wrong[1][0], strict=True))
        reference = micro["ref_per_token_logps"] - micro["old_per_token_logps"]
        assert torch.equal(call["reference_gap"], reference)
        ids = batch["ids"][place]
        assert torch.equal(call["first_error"], ids[:, 0] % 3)
        assert torch.equal(call["decisions"], ids % 2 == 0)
    assert {True, False} == set(torch.cat([call["success"] for call in calls]).tolist())


def test_wrong_references_are_drawn_by_the_rows_own_alone(tmp_path):
    """The same for a reference in every step and on every rank, and among the training set's."""
    shown = []
    for seed in (1, 2):
        trainer, seen = make(tmp_path, "cepo", seed=seed, wrong_references=1), {}
        find = trainer._wrong_contexts

        def spy(rows, find=find, seen=seen):
            drawn = list(find(rows))
            seen.update(zip([row["privileged_context"] for row in rows], drawn[0], strict=True))
            return iter(drawn)

        trainer._wrong_contexts = spy
        trainer.train()
        shown.append(seen)
    column = set(tiny.dataset()["privileged_context"])
    common = shown[0].keys() & shown[1].keys()
    assert all(shown[0][own] == shown[1][own] for own in common)
    assert all(wrong in column and wrong != own for own, wrong in shown[0].items())


def test_an_unscored_rollout_is_left_out_of_the_others_success(tmp_path):
    seen = []

    def credit(advantages, gap, mask, *, group_success, rewards):
        seen.extend(zip(rewards.tolist(), group_success.tolist(), strict=True))
        return advantages[:, None] + 0 * gap

    def reward(completions, **_):
        return [None, 1.0, 1.0, 0.0] * (len(completions) // 4)

    trainer = make(tmp_path, "rlsd", rewards=reward, max_steps=1, more={"credit": credit})
    trainer.train()
    shares = {str(score): share for score, share in seen}
    assert len(seen) == 8
    assert shares == pytest.approx({"nan": 2 / 3, "1.0": 0.5, "0.0": 1.0})


def test_the_weight_multiplies_the_divergence_of_each_token(tmp_path):
    """A weight of 1 is OPSD, one of 0 beside policy_weight GRPO's update; SDPG has a factor."""
    ends = {}
    for name, method, settings in (
        ("opsd", "opsd", {}),
        ("all", "opsd_contrast", {"credit_settings": {"tau": 0.0}}),
        ("none", "opsd_contrast", {"credit_settings": {"tau": 1e30}, "policy_weight": 1.0}),
        ("grpo", "grpo", {"completion_head": True}),
        ("half", "opsd_contrast", {}),
        ("sdpg", "sdpg", {}),
        ("published", "sdpg", {"distillation_weight": 1e-3}),
        ("strong", "sdpg", {"distillation_weight": 1.0}),
    ):
        trainer = make(tmp_path, method, max_steps=1, more={"signals": None}, **settings)
        trainer.train()
        ends[name] = trainer.model.lm_head.weight.detach()
    torch.testing.assert_close(ends["all"], ends["opsd"])
    torch.testing.assert_close(ends["none"], ends["grpo"], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(ends["half"], ends["opsd"], atol=1e-4)
    assert torch.equal(ends["sdpg"], ends["published"])
    assert not torch.allclose(ends["sdpg"], ends["strong"], atol=1e-4)


# --- AntiSD's gate, and the permuted control -----------------------------------------------------


def test_the_gate_shuts_with_the_entropy_and_a_resume_is_bit_by_bit(tmp_path):
    settings = {"max_steps": 16, "save_strategy": "steps", "save_steps": 13, "learning_rate": 0.1}
    settings |= {"gradient_accumulation_steps": 1, "max_completion_length": 4}
    whole, resumed = (make(tmp_path / name, "antisd", **settings) for name in ("whole", "resumed"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-13"))
    logs = [row for row in whole.state.log_history if "loss" in row]
    again = [row for row in resumed.state.log_history if "loss" in row]
    entropies, gates = ([row[k] for row in logs] for k in ("entropy", "rlsd/gate"))
    first = sum(entropies[:GATE_STEPS]) / GATE_STEPS
    assert gates[: GATE_STEPS + 1] == [1.0] * (GATE_STEPS + 1)
    expected = [float(e >= 0.93 * first) for e in entropies[GATE_STEPS:-1]]
    assert gates[GATE_STEPS + 1 :] == expected
    assert gates == [row["rlsd/gate"] for row in again]
    left, right = (trainer.model.state_dict() for trainer in (whole, resumed))
    assert all(torch.equal(left[k], right[k]) for k in left)
    whole.train()  # begins anew
    assert whole.state.log_history[0]["rlsd/gate"] == 1.0


@pytest.mark.parametrize("method", ["rlsd", "opsd_contrast"])
def test_permuted_credit_or_weight_keeps_its_amount_and_draws_once(tmp_path, method):
    runs = {}
    for shuffled in (False, True):
        trainer, kept = make(tmp_path, method, permute_credit=shuffled, max_steps=1), []
        assign = trainer._token_advantages

        def spy(inputs, logps, assign=assign, kept=kept):
            credited = assign(inputs, logps)
            kept.append((inputs.get("weight", credited), states.credit_mask(inputs).bool()))
            return credited

        trainer._token_advantages = spy
        trainer.train()
        runs[shuffled] = kept, trainer.state.log_history[0].get("rlsd/drift")
    for (plain, mask), (mixed, _) in zip(runs[False][0], runs[True][0], strict=True):
        assert not torch.equal(plain, mixed)
        for row in range(len(mask)):
            kept = mask[row]
            assert torch.equal(plain[row][kept].sort().values, mixed[row][kept].sort().values)
    assert (runs[False][1] != runs[True][1]) == (method == "rlsd")  # the other has no drift
    once = permuted(oracle, torch.Generator().manual_seed(1)).__name__
    assert once == "oracle"


# --- what is refused -----------------------------------------------------------------------------


def asks_kl(advantages, gap, mask, *, contrast_kl):
    return gap


def asks_wrong(advantages, gap, mask, *, wrong_gaps):
    return gap


def asks_reference(advantages, gap, mask, *, reference_gap):
    return gap


def test_what_nobody_gives_is_refused_before_the_model_loads(tmp_path):
    few = tiny.dataset(4, privileged_context=["7", "8", "7", "8"])
    equal = {"data": tiny.dataset(4, privileged_context=["7"] * 4)}
    none_else = "wrong_references=1 needs 2 different.*has 1"
    stream = tiny.dataset().to_iterable_dataset()
    none = {"more": {"signals": None}}
    cases = [
        ("oracle", none, "credit=oracle.*'first_error'.*RLSDTrainer\\(signals=fn\\) gives"),
        ("rlsd_thought_only", none, "'thought'"),
        (
            "cepo",
            {"data": few, "wrong_references": 2},
            "wrong_references=2 needs 3 different.*has 2",
        ),
        *((name, equal, none_else) for name, row in METHODS.items() if row.asks & NEEDS_WRONG),
        ("cepo", {"data": tiny.dataset(1)}, none_else),
        ("rlsd", {**equal, "more": {"credit": asks_wrong}}, none_else),
        ("opsd_contrast", {"data": stream}, "contrast_kl need wrong references.*streaming"),
        ("rlsd", {"wrong_references": 2}, "wrong_references=2 means nothing where no credit asks"),
        ("grpo", {"wrong_references": 2}, "wrong_references=2 means nothing"),
        ("cepo", {"wrong_references": 0}, "wrong_references=0: expected a count >= 1"),
        ("rlsd", {"more": {"credit": asks_kl}}, "asks_kl asks for contrast_kl, which nobody gives"),
        ("rlsd", {"more": {"credit": asks_reference}}, "reference_gap.*beta > 0 makes"),
        ("rlsd", {"more": {"credit": asks_wrong}, "data": stream}, "streaming"),
        ("sdar", {"credit_settings": {"bta": 1.0}}, "'bta' is no setting.*beta, coefficient"),
        ("sdar", {"credit_settings": {"beta": "5"}}, "beta='5': expected a number"),
        ("rlsd", {"credit_settings": {"lam": 0.1}}, "'lam' is no setting of method='rlsd'.*none"),
        ("sdpg", {"beta": 0.0, "credit_settings": {"alpha": 1.0}}, "'alpha' is no setting"),
        ("sdar", {"credit_settings": {"beta": 1.0}, "more": {"credit": asks_wrong}}, "functools"),
        ("rlsd", {"policy_weight": 1.0}, "policy_weight=1.0 means nothing"),
        ("opsd", {"permute_credit": True}, "permute_credit=True means nothing"),
        ("opsd_contrast", {"distillation_mode": "sampled_token"}, "weights a divergence"),
        ("hindsight", {"importance_sampling_level": "sequence"}, "averages the token credit"),
        ("cepo", {"peer_context": True}, "peer_context=True means nothing.*with another row's"),
        ("opsd_value_contrast", {"peer_context": True}, "peer_context=True means nothing"),
        ("rlsd", {"peer_context": True, "more": {"credit": asks_wrong}}, "asks for wrong_gaps"),
    ]
    for method, settings, said in cases:
        with pytest.raises(ValueError, match=f"(?s){said}"):
            make(tmp_path, method, "no/such-model", **settings)


def test_published_settings_are_those_of_the_functions_and_are_used_only_if_asked_for(tmp_path):
    for method, published in PUBLISHED.items():
        config = tiny.config(tmp_path, method=method, **published)
        assert {name: getattr(config, name) for name in published} == published
        options = keywords(METHODS[method].credit)
        for name, option in (("lambda_init", "lam"), ("epsilon_w", "epsilon_w")):
            assert name not in published or published[name] == options[option].default, method
        default = tiny.config(tmp_path, method=method)
        names = ("lambda_init", "lambda_decay_steps", "epsilon_w")
        assert [getattr(default, name) for name in names] == [0.5, 50, 0.2]


def test_what_signals_returns_is_checked(tmp_path):
    for given, said in (
        (None, "signals returned NoneType"),
        ({"first_error": torch.zeros(3)}, "'first_error' as \\(3,\\), expected a tensor"),
        ({"success": torch.zeros(8)}, "'success', which comes from the rewards"),
        ({"decisions": 1}, "'decisions' as int"),
        ({}, "oracle asks for decisions, first_error, which signals did not return"),
    ):
        trainer = make(tmp_path, "oracle", more={"signals": lambda *_, given=given: given})
        with pytest.raises(ValueError, match=said):
            trainer.train()


def test_a_signal_that_makes_the_credit_nan_stops_the_run(tmp_path):
    def broken(rows, ids, mask):
        return tiny.signals(rows, ids, mask) | {"success_before": torch.full((8,), torch.nan)}

    trainer = make(tmp_path, "oracle_value", more={"signals": broken})
    with pytest.raises(ValueError, match="credit=oracle_value returned NaN or infinity in rows"):
        trainer.train()
