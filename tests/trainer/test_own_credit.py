"""`RLSDTrainer(credit=fn)`: a credit function that is not in the table."""

from functools import partial

import pytest
import tiny
import torch

from rlsd_lib import RLSDTrainer
from rlsd_lib.credit import rlsd


def trained(folder, credit, **settings):
    trainer = tiny.trainer(folder, more={"credit": credit}, **{"max_steps": 2, **settings})
    trainer.train()
    return trainer


def test_the_tables_function_from_outside_gives_the_tables_run(tmp_path):
    """Also its logged numbers, without those of a weight that nobody declared."""
    table = tiny.trainer(tmp_path, max_steps=2, conserve_credit=False)
    table.train()
    own = trained(tmp_path, rlsd)
    for ours, theirs in zip(own.model.parameters(), table.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    left, right = own.state.log_history[0], table.state.log_history[0]
    gone = {"rlsd/weight_mean", "rlsd/clip_low_frac", "rlsd/clip_high_frac", "rlsd/drift"}
    assert set(right) - set(left) == gone
    assert all(left[k] == right[k] for k in left if k.startswith("rlsd/"))
    conserved = trained(tmp_path, partial(rlsd, conserve=True))
    assert not torch.equal(conserved.model.lm_head.weight, own.model.lm_head.weight)


def test_what_a_partial_binds_stays_as_it_was_bound(tmp_path):
    """The configuration's epsilon_w is 0.2 and its lambda falls; neither replaces a bound one."""
    seen = []

    def spy(*args, lam, epsilon_w):
        seen.append((lam, epsilon_w))
        return rlsd(*args, lam=lam, epsilon_w=epsilon_w)

    def mine(advantages, gap, mask, *, lam, epsilon_w):
        return spy(advantages, gap, mask, lam=lam, epsilon_w=epsilon_w)

    bound = trained(tmp_path, partial(mine, epsilon_w=9.0))
    assert seen == [(0.5, 9.0)] * 2 + [(0.49, 9.0)] * 2
    wide = tiny.trainer(tmp_path, max_steps=2, epsilon_w=9.0)
    wide.train()
    assert torch.equal(bound.model.lm_head.weight, wide.model.lm_head.weight)
    seen.clear()
    constant = trained(tmp_path, partial(mine, lam=1.0))
    assert seen == [(1.0, 0.2)] * 4
    assert "rlsd/lambda" not in constant.state.log_history[0]


def test_everything_that_may_be_asked_for_follows_its_rollout(tmp_path):
    """Rewards and success through TRL's shuffle and split; entropy at the rollout's own tokens."""
    seen = []

    def credit(advantages, gap, mask, *, lam, epsilon_w, success, rewards, entropy):
        seen.append((advantages, gap, mask, lam, epsilon_w, success, rewards, entropy))
        return advantages[:, None] + 0 * gap

    settings = {"success_reward_threshold": 0.5, "num_iterations": 2, "max_steps": 3}
    trainer = tiny.trainer(tmp_path, more={"credit": credit}, **settings)
    micros = []
    assign = trainer._token_advantages
    trainer._token_advantages = lambda inputs, logps: micros.append(inputs) or assign(inputs, logps)
    trainer.train()
    assert len(seen) == len(micros) == 6
    for micro, call in zip(micros, seen, strict=True):
        advantages, gap, mask, _, epsilon_w, success, rewards, entropy = call
        texts = trainer.processing_class.batch_decode(
            micro["completion_ids"], skip_special_tokens=True
        )
        expected = torch.tensor(tiny.reward(texts))
        torch.testing.assert_close(rewards, expected)
        assert torch.equal(success, expected >= 0.5)
        assert advantages.dim() == 1
        assert gap.shape == mask.shape == entropy.shape
        written = micro["old_per_token_logps"]  # by the policy of the rollout
        assert torch.equal(gap, micro["teacher_per_token_logps"] - written)
        assert gap.abs().sum() > 0
        assert (entropy[mask.bool()] > 0).all()
        assert not (gap.requires_grad or entropy.requires_grad)
        assert epsilon_w == 0.2
    assert [call[3] for call in seen[::2]] == [0.5, 0.49, 0.48]
    assert {True, False} == set(torch.cat([call[5] for call in seen]).tolist())


def test_a_function_without_lam_has_no_schedule(tmp_path):
    calls = []

    def credit(advantages, gap, mask):
        calls.append(gap)
        return advantages[:, None] + 0 * gap

    trainer = trained(tmp_path, credit, lambda_decay_steps=1, max_steps=3)
    assert len(calls) == 6, "two micro-batches in each of three steps"
    assert trainer.teacher.model is not None
    assert "rlsd/lambda" not in trainer.state.log_history[0]
    assert trainer.state.log_history[0]["rlsd/intervention"] == 0.0

    def with_more(advantages, gap, mask, **kwargs):
        calls.append(set(kwargs))
        return advantages[:, None] + 0 * gap

    trained(tmp_path, with_more, max_steps=1)
    assert calls[-1] == {"lam", "epsilon_w"}


def test_the_callers_arguments_stay_as_they_are(tmp_path):
    args = tiny.config(tmp_path, lambda_warmup_steps=3, lambda_decay_steps=7)
    rows, tokens = tiny.dataset(), tiny.tokenizer()
    RLSDTrainer(tiny.model(), tiny.reward, args, rows, processing_class=tokens, credit=good)
    assert (args.lambda_warmup_steps, args.lambda_decay_steps) == (3, 7)


def misspelt(advantages, gap, mask, *, sucess):
    return gap


def nearly(advantages, gap, mask, *, lamb=0.5, strength=2.0):
    return lamb * gap


def by_name(*, advantages, gap, mask):
    return gap


def too_few(advantages, gap):
    return gap


def by_place(advantages, gap, mask, lam, /):
    return gap


def good(advantages, gap, mask):
    return gap


def fading(advantages, gap, mask, lam):
    return gap


SEQUENCE = {"importance_sampling_level": "sequence"}


def test_what_cannot_be_called_is_refused_before_any_compute(tmp_path):
    cases = [
        (
            misspelt,
            {},
            r"misspelt\(.*missing a required.*'sucess'.*any of lam, epsilon_w, success, rewards, entropy",
        ),
        (by_name, {}, r"by_name\(.*Expected by_name\(advantages \(N,\), gap \(N, T\), mask"),
        (nearly, {}, r"credit=nearly has 'lamb', which is no signal: did you mean 'lam'\?"),
        (too_few, {}, r"too_few\(advantages, gap\) cannot be called: too many positional"),
        (
            lambda advantages, mask, gap: gap,
            {},
            r"cannot be called: its first arguments are advantages, mask, gap, in another order",
        ),
        (by_place, {}, r"by_place\(.* cannot be called: .*'lam'"),
        (good, {"method": "opsd", **SEQUENCE}, "averages the token credit of credit=good away"),
        (good, {"method": "grpo"}, "good would never be called: method='grpo' .* no teacher"),
        (good, {"method": "sdpo"}, "good would never be called: method='sdpo'"),
        (good, {"lambda_init": 0.0}, "lambda_init=0.0"),
        (good, {"conserve_credit": True}, "conserve_credit=True is of the method's own credit"),
        (
            good,
            {"method": "opsd", "policy_weight": 1.0},
            "policy_weight=1.0 is of the method's own",
        ),
        (
            good,
            {"method": "opsd", "distillation_mode": "sampled_token"},
            "='sampled_token' is of the",
        ),
        (fading, {"method": "hindsight"}, "takes lam, and method='hindsight' has no schedule"),
        (good, {"loss_type": "vespo"}, "by the sign of its advantage.* credit=good need not have"),
    ]
    for credit, settings, said in cases:
        with pytest.raises(ValueError, match=said):
            tiny.trainer(tmp_path, "no/such-model", more={"credit": credit}, **settings)


def test_a_function_that_writes_into_what_it_gets_changes_nothing_else(tmp_path):
    def writes(advantages, gap, mask):
        found = advantages[:, None] * gap
        for each in (advantages, gap, mask):
            each.zero_()
        return found

    def reads(advantages, gap, mask):
        return advantages[:, None] * gap

    one, other = (trained(tmp_path / f.__name__, f, max_steps=2) for f in (writes, reads))
    names = ("loss", "rlsd/gap_abs_mean", "rlsd/intervention")
    for step, same in zip(one.state.log_history[:2], other.state.log_history[:2], strict=True):
        assert [step[name] for name in names] == [same[name] for name in names]


def test_lambda_that_no_schedule_gives_stays_the_functions_own(tmp_path):
    """Of a row without one a default, or what a partial binds, is kept, and **kwargs gets none."""
    seen = []

    def default(advantages, gap, mask, lam=0.7):
        seen.append(lam)
        return advantages[:, None] + 0 * gap

    def rest(advantages, gap, mask, **others):
        seen.append(sorted(others))
        return advantages[:, None] + 0 * gap

    for function in (default, rest, partial(rest, lam=1.0)):
        trained(tmp_path, function, method="hindsight", max_steps=1)
    assert seen == [0.7] * 2 + [["epsilon_w"]] * 2 + [["epsilon_w", "lam"]] * 2


def test_signals_that_nothing_takes_are_refused(tmp_path):
    for method in ("grpo", "rlsd"):
        with pytest.raises(ValueError, match="signals=signals would give what nothing takes"):
            tiny.trainer(tmp_path, "no/such-model", more={"signals": tiny.signals}, method=method)


def test_a_bad_result_names_the_function(tmp_path):
    def mine(kind, advantages, gap, mask):
        weight = torch.ones_like(gap, requires_grad=True)
        return {
            "shape": advantages,
            "none": None,
            "bool": gap > 0,
            "nan": gap * float("nan"),
            "gradient": gap * weight,
        }[kind]

    for kind, said in {
        "shape": r"returned \(4,\), expected a tensor of shape \(N, T\) = \(4, ",
        "none": "returned NoneType, expected a tensor",
        "bool": r"returned a tensor of torch.bool, expected numbers",
        "nan": r"returned NaN or infinity in rows \[0, 1, 2, 3\]",
        "gradient": "returned a tensor with a gradient",
    }.items():

        def credit(advantages, gap, mask, kind=kind):
            return mine(kind, advantages, gap, mask)

        with pytest.raises(ValueError, match=f"credit=credit {said}"):
            trained(tmp_path, credit, max_steps=1)
