"""Theorem 5 and the self-distillation term inside RLSD, over random worlds, to 1e-10."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_theory import same, seeds

from rlsd_lib import credit
from rlsd_lib.measure.rollouts import group_advantages
from rlsd_lib.theory import direction as di
from rlsd_lib.theory import worlds as wo
from rlsd_lib.theory.worlds import table

few = settings(deadline=None, max_examples=40, derandomize=True, database=None)
lams = st.floats(0, 1)
epsilons = st.floats(0.01, 3)


def normal(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def neighbours(seed, vocab=5, size=0.1):
    """A student and a teacher whose gaps are of the given size."""
    student = wo.random_simplex(torch.Generator().manual_seed(seed), vocab)
    return student, torch.softmax(student.log() + size * normal(seed + 1, vocab), -1)


@given(seeds, lams, epsilons)
@few
def test_rlsd_is_grpo_plus_a_push_towards_the_teacher(seed, lam, epsilon_w):
    advantages, gap = normal(seed, 6), 0.5 * normal(seed + 1, 6, 7)
    advantages[0] = 0.0
    hat = credit.rlsd(advantages, gap, torch.ones_like(gap), lam=lam, epsilon_w=epsilon_w)
    added = di.added_credit(advantages, gap, lam=lam, epsilon_w=epsilon_w)
    same(hat, advantages[:, None] + added)
    assert (added * gap >= 0).all()
    assert (added.abs() <= lam * epsilon_w * advantages.abs()[:, None] + 1e-12).all()
    if epsilon_w <= 1:
        assert (hat * advantages[:, None] >= 0).all()


def test_the_push_is_the_gap_to_first_order():
    gap = table([[1e-5, -1e-5]])
    for advantage in (2.0, -2.0):
        added = di.added_credit(table([advantage]), gap, lam=0.5, epsilon_w=0.2)
        same(added, gap, atol=1e-9)


@given(seeds, lams, epsilons)
@few
def test_expected_credit_for_any_law_of_the_advantage(seed, lam, epsilon_w):
    values, gap = normal(seed, 5), 0.5 * normal(seed + 1, 4)
    prob = wo.random_simplex(torch.Generator().manual_seed(seed), 4, 5)
    rows = gap.expand(5, 4).contiguous()
    hat = credit.rlsd(values, rows, torch.ones_like(rows), lam=lam, epsilon_w=epsilon_w)
    enumerated = (prob.T * hat).sum(0)
    closed = di.expected_credit(
        gap, prob @ values, prob @ values.abs(), lam=lam, epsilon_w=epsilon_w
    )
    same(closed, enumerated)
    neutral = credit.rlsd_neutral(values, rows, torch.ones_like(rows), lam=lam, epsilon_w=epsilon_w)
    closed = di.expected_neutral_credit(gap, prob @ values, lam=lam, epsilon_w=epsilon_w)
    same(closed, (prob.T * neutral).sum(0))


@given(st.floats(-1, 1))
@few
def test_without_clip_the_drift_is_sinh(gap):
    gap = table([gap])
    kept = di.expected_credit(gap, table([1.0]), table([0.0]), lam=1.0, epsilon_w=10.0)
    same(kept, gap.cosh())
    drift = di.expected_credit(gap, table([0.0]), table([0.8]), lam=1.0, epsilon_w=10.0)
    same(drift, 0.8 * gap.sinh())


@given(seeds)
@few
def test_steps_are_those_of_autograd(seed):
    student, teacher = neighbours(seed, size=1.0)
    logits = student.log().requires_grad_()
    live = torch.softmax(logits, -1)
    (gradient,) = torch.autograd.grad(wo.kl(live, teacher), logits, retain_graph=True)
    same(di.reverse_kl_step(student, teacher), -gradient)
    values = normal(seed, 5)
    (gradient,) = torch.autograd.grad((student * values * live.log()).sum(), logits)
    same(di.policy_step(student, values), gradient)


@given(seeds)
@few
def test_drift_is_reverse_kl_distillation_up_to_third_order(seed):
    student, teacher = neighbours(seed, size=0.01)
    gap = teacher.log() - student.log()
    zero, scale = torch.zeros(5).double(), torch.full((5,), 0.6, dtype=torch.float64)
    credit_ = di.expected_credit(gap, zero, scale, lam=0.5, epsilon_w=0.2)
    drift = di.policy_step(student, credit_)
    same(drift, 0.5 * 0.6 * di.reverse_kl_step(student, teacher), atol=gap.abs().max() ** 3)


@given(seeds)
@few
def test_drift_free_exactly_when_the_weights_differ_by_a_constant(seed):
    student, _ = neighbours(seed)
    down = normal(seed, 5).exp()
    for up in (down, down + 0.7):
        same(di.policy_step(student, 0.5 * (up - down)), torch.zeros(5))
    up = down + 0.1 * normal(seed + 2, 5)
    assert di.policy_step(student, 0.5 * (up - down)).norm() > 1e-9


@given(st.floats(0.05, 0.95), st.integers(2, 8))
@few
def test_group_advantages_have_mean_zero_and_the_stated_size(p, group):
    rewards, prob = di.group_outcomes([p] * group)
    advantages = di.group_advantages(rewards)
    same(prob.sum(), 1.0)
    same(prob @ advantages, torch.zeros(group))
    same(prob @ advantages.abs(), [di.group_mean_abs(p, group)] * group)
    mixed = (rewards.sum(-1) > 0) & (rewards.sum(-1) < group)
    same(advantages[mixed].var(-1), torch.ones(int(mixed.sum())))
    assert (advantages[~mixed] == 0).all()
    of_the_trainer = group_advantages(
        rewards.flatten(), group, SimpleNamespace(scale_rewards="group")
    )
    same(advantages, of_the_trainer.view_as(rewards), atol=1e-4 * group)


def test_the_share_moved_weighs_steps_by_their_advantages():
    assert di.largest_share_moved([0.5, 0.0], [1.0, 1.0], 0.2) == 0.05
    assert di.largest_share_moved([0.5, 0.0], [3.0, 1.0], 0.2) == pytest.approx(0.075)
    assert di.largest_share_moved([0.5, 0.5], [3.0, 0.0], 0.2) == pytest.approx(0.1)


def test_group_outcomes_by_hand():
    rewards, prob = di.group_outcomes([0.9, 0.2])
    assert rewards.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    same(prob, [0.08, 0.02, 0.72, 0.18])


@given(seeds, st.floats(0.01, 1), st.floats(0.01, 0.5))
@few
def test_angle_between_the_sums_is_bounded(seed, lam, epsilon_w):
    advantages, scores = normal(seed, 12), normal(seed + 1, 12, 6)
    gap = normal(seed + 2, 12, 1)
    hat = credit.rlsd(advantages, gap, torch.ones_like(gap), lam=lam, epsilon_w=epsilon_w)
    grpo, rlsd = advantages @ scores, hat[:, 0] @ scores
    kappa = float(di.cancellation(advantages, scores))
    sizes = [abs(a) * float(s.norm()) for a, s in zip(advantages.tolist(), scores, strict=True)]
    same(kappa * grpo.norm(), sum(sizes))
    measured = float(di.angle(grpo, rlsd))
    assert measured <= di.angle_bound(kappa, lam=lam, epsilon_w=epsilon_w) + 1e-12
    cosine = float(grpo @ rlsd / grpo.norm() / rlsd.norm())
    same(math.cos(measured), cosine)


def test_angle_bounds_by_hand():
    same(di.angle_bound(2.0, lam=0.5, epsilon_w=0.2), math.asin(0.2))
    assert di.angle_bound(10.0, lam=0.5, epsilon_w=0.2) == math.pi
    same(di.angle(table([1.0, 0.0]), table([-1.0, 0.0])), math.pi)


@given(st.floats(0.01, 1), st.floats(0.01, 0.9))
@few
def test_orthogonal_bound_is_attained(lam, epsilon_w):
    """Weights 1 + a and 1 - a on energies in the ratio of the *other* weight."""
    a = lam * epsilon_w
    grpo = table([math.sqrt(1 - a), math.sqrt(1 + a)])
    rlsd = grpo * table([1 + a, 1 - a])
    same(di.angle(grpo, rlsd), di.angle_bound(1.0, lam=lam, epsilon_w=epsilon_w))


def test_the_sum_can_turn_round():
    """Nine rewarded and ten punished rollouts choose a token that the teacher favours."""
    advantages = table([1.0] * 9 + [-1.0] * 10)
    gap = torch.full((19, 1), 0.25, dtype=torch.float64)
    hat = credit.rlsd(advantages, gap, torch.ones_like(gap), lam=0.5, epsilon_w=0.2)
    same([advantages.sum(), hat.sum()], [-1.0, 0.9])
    mean, size = advantages.mean(), advantages.abs().mean()
    assert mean.abs() < 0.5 * 0.2 * size
    saturated = table([0.25])
    for a, sign in ((-0.059, 1), (-0.061, -1)):
        value = di.expected_credit(saturated, table([a]), table([0.6]), lam=0.5, epsilon_w=0.2)
        assert value.sign() == sign


def test_the_direction_of_a_cancelled_sum_is_the_reference():
    """One rewarded and one punished rollout share a token: GRPO is 0, RLSD is +-2 lam eps."""
    for gap, total in ((0.25, 0.4), (-0.25, -0.4)):
        rows = table([[gap], [gap]])
        hat = credit.rlsd(table([1.0, -1.0]), rows, torch.ones_like(rows), lam=1.0, epsilon_w=0.2)
        same(hat.sum(), total)
