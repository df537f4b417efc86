"""Theorems 2 to 4 over random worlds: shared weights, and what the ratio says about r."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_theory import few, same, seeds, sizes

from rlsd_lib.theory import evidence, shared
from rlsd_lib.theory import worlds as wo
from rlsd_lib.theory.worlds import table


@given(seeds, sizes, sizes)
@few
def test_loss_change_splits_into_student_and_teacher(seed, m, vocab):
    world = wo.random_world(seed, m, vocab)
    boost = world.teacher * 10
    new = wo.mean_teacher(world.prior, shared.tilt(world.student, boost))
    student, teacher = shared.loss_split(world.prior, boost, world.student, new)
    losses = [
        sum(p * wo.kl(row, q) for p, row in zip(world.prior, shared.tilt(q, boost), strict=True))
        for q in (world.student, new)
    ]
    same(student + teacher, losses[1] - losses[0])
    same(student, -wo.kl(new, world.student))


def test_a_perfect_step_of_the_student_raises_the_loss():
    prior, boost = table([0.5, 0.5]), table([[1.0, 8.0, 1.0], [1.0, 1.0, 8.0]])
    old, new = table([0.8, 0.1, 0.1]), table([8.0, 4.5, 4.5]) / 17
    same(wo.mean_teacher(prior, shared.tilt(old, boost)), new)
    student, teacher = shared.loss_split(prior, boost, old, new)
    same([student, teacher], [-0.26564801782, 0.31286808951])


def test_an_infinitesimal_gradient_step_raises_it_too():
    prior, boost = table([0.5, 0.5]), table([[1.0, 8.0, 1.0], [1.0, 1.0, 8.0]])
    old = table([0.8, 0.1, 0.1])
    pull = table([8.0, 4.5, 4.5]) / 17 - old
    new = torch.softmax(old.log() + 1e-6 * pull, -1)
    student, teacher = (float(x) / 1e-6 for x in shared.loss_split(prior, boost, old, new))
    same(student, -pull.square().sum(), atol=1e-5)
    same([student, teacher], [-0.1628, 0.2275], atol=1e-4)


quote_worlds = st.builds(
    shared.QuoteWorld,
    answers=st.integers(2, 4),
    cite=st.floats(0.5, 5),
    help=st.floats(0.5, 5),
    quote=st.floats(1, 30),
    p_sound=st.floats(0.6, 1),
    p_faulty=st.floats(0, 0.5),
)


@given(quote_worlds, seeds)
@few
def test_quote_world_steps_are_gradients(world, seed):
    generator = torch.Generator().manual_seed(seed)
    theta, anchor = torch.randn(2, 4 + world.answers, generator=generator, dtype=torch.float64)
    theta.requires_grad_()
    style, reasoning = shared.tables(theta)
    teachers = shared.teacher_tables(world, anchor)
    loss = sum(
        (world.prior * wo.kl(t, s.expand_as(t))).sum()
        for t, s in zip(teachers, (style, reasoning), strict=True)
    )
    same(shared.distillation_loss(world, theta, anchor).detach(), loss.detach())
    (gradient,) = torch.autograd.grad(loss, theta)
    same(shared.distillation_step(world, theta.detach(), anchor), -gradient)
    reward = shared.expected_reward(world, theta)
    by_hand = world.p_sound * reasoning[0] + world.p_faulty * reasoning[1]
    by_hand = by_hand + reasoning[2:].sum() / world.answers
    same(reward.detach(), by_hand.detach())
    (gradient,) = torch.autograd.grad(reward, theta)
    sigma = (reward * (1 - reward)).sqrt().detach()
    step = shared.reward_step(world, theta.detach(), anchor, "grpo", 1.0, 0.2)
    same(step, gradient / sigma)


@given(quote_worlds, seeds)
@few
def test_rlsd_step_of_the_quote_world_is_a_gradient(world, seed):
    """Plain loops over r, style, reasoning and reward, with RLSD's formula written out."""
    generator = torch.Generator().manual_seed(seed)
    theta, anchor = torch.randn(2, 4 + world.answers, generator=generator, dtype=torch.float64)
    theta.requires_grad_()
    live = shared.tables(theta)
    fixed = [p.detach() for p in live]
    teachers = shared.teacher_tables(world, anchor)
    mean = float(shared.expected_reward(world, theta.detach()))
    value = 0.0
    for r, s, v, won in product(
        range(world.answers), range(2), range(2 + world.answers), (False, True)
    ):
        chance = float(world.success[r, v])
        prob = float(fixed[0][s] * fixed[1][v]) / world.answers * (chance if won else 1 - chance)
        advantage = (won - mean) / math.sqrt(mean * (1 - mean))
        for part, token in ((0, s), (1, v)):
            ratio = float(teachers[part][r, token] / fixed[part][token])
            weight = min(max(ratio if won else 1 / ratio, 0.7), 1.3)
            value += prob * advantage * (0.4 + 0.6 * weight) * live[part][token].log()
    (gradient,) = torch.autograd.grad(value, theta)
    same(shared.reward_step(world, theta.detach(), anchor, "rlsd", 0.6, 0.3), gradient)


def test_boosts_of_the_quote_world():
    style, reasoning = shared.QuoteWorld(answers=2, cite=3.0, help=2.0, quote=20.0).boosts
    assert style.tolist() == [[1, 3], [1, 3]]
    assert reasoning.tolist() == [[2, 1, 20, 1], [2, 1, 1, 20]]


@pytest.mark.parametrize("every", [1, 4])
def test_simulation_refreshes_the_teacher(every):
    world = shared.QuoteWorld()
    theta = anchor = world.start()
    for k in range(9):
        anchor = theta if k % every == 0 else anchor
        theta = theta + 0.5 * shared.distillation_step(world, theta, anchor)
    run = shared.simulate(world, "distil", sync_every=every, steps=9)
    same(run["cite"][-1], shared.tables(theta)[0][1])
    same(run["reward"][-1], shared.expected_reward(world, theta))


@given(quote_worlds, st.integers(1, 6))
@few
def test_matched_snapshots_compound(world, rounds):
    theta = world.start()
    for _ in range(rounds):
        pairs = shared.teacher_tables(world, theta)
        theta = torch.cat([wo.mean_teacher(world.prior, t) for t in pairs]).log()
    for closed, reached in zip(
        shared.matched_rounds(world, world.start(), rounds), shared.tables(theta), strict=True
    ):
        same(closed, reached)


@given(quote_worlds)
@few
def test_invasion_is_the_first_round_and_take_over_the_last(world):
    first, second, last = (
        shared.matched_rounds(world, world.start(), n)[1][2:].sum() for n in (0, 1, 10**6)
    )
    gain = wo.mean_teacher(world.prior, world.boosts[1])
    mean = shared.tables(world.start())[1] @ gain
    if abs(gain[2] - mean) > 1e-6:
        assert (second > first) == shared.quoting_invades(world, world.start())
    if abs(gain[2] - max(world.help, 1.0)) > 1e-3:
        assert (last > 0.99) == shared.quoting_wins(world)


def test_balance_of_quoting_and_reasoning():
    for boost, wins in ((4.9, False), (5.1, True)):
        assert shared.quoting_wins(shared.QuoteWorld(quote=boost)) is wins
    assert shared.quoting_wins(shared.QuoteWorld(quote=1.1, help=0.5))
    assert not shared.quoting_wins(shared.QuoteWorld(quote=0.5, help=0.5))


def test_simulation_holds_the_teacher_as_told():
    world = shared.QuoteWorld()
    frozen = shared.simulate(world, "distil", sync_every=0, steps=30)
    snapshot = shared.simulate(world, "distil", sync_every=10, steps=30)
    assert frozen["target_shift"].max() == 0
    assert snapshot["target_shift"].nonzero().flatten().tolist() == [10, 20, 30]
    same(frozen["information"], frozen["information"][:1].expand(31))
    decayed = shared.simulate(world, "rlsd", sync_every=1, steps=30, decay_steps=10)
    same(decayed["target_shift"][10:], torch.zeros(21))
    assert decayed["target_shift"][5] > 0
    still = shared.simulate(world, "grpo", sync_every=1, steps=30)
    same(still["cite"], still["cite"][:1].expand(31))
    assert still["reward"][-1] > frozen["reward"].max()


@given(seeds, st.integers(2, 3), st.integers(2, 3), st.integers(1, 3))
@few
def test_evidence_is_belief_plus_format(seed, m, vocab, length):
    world = wo.random_sequence_world(seed, m, vocab, length)
    gaps = evidence.evidence(world)
    parts = zip(gaps, evidence.belief_change(world), evidence.format_term(world), strict=True)
    for gap, belief, format_ in parts:
        same(gap, belief + format_)
    probs = wo.reach(world.student)[-1]
    posterior = evidence.posteriors(world)[-1]
    total = evidence.sequence_sum(gaps)
    ratio = posterior.log() - world.prior.log().unsqueeze(-1)
    same(total - ratio, evidence.sequence_sum(evidence.format_term(world)).expand_as(total))
    same(total[0] - total[1], ratio[0] - ratio[1])
    cost = -(probs * evidence.sequence_sum(evidence.format_term(world))).sum()
    same(wo.kl(probs, wo.reach(evidence.predictive(world))[-1]), cost)


@given(seeds, st.integers(2, 3), st.integers(1, 3))
@few
def test_theorem_4_with_a_joint_by_bayes(seed, vocab, length):
    world = evidence.leave_joint(wo.random_sequence_world(seed, 2, vocab, length), 0.0)
    for y, tokens in enumerate(product(range(vocab), repeat=length)):
        rows = wo.prefix_indices(tokens, vocab)
        joint = world.prior.clone()
        for t, row in enumerate(rows):
            before = joint / joint.sum()
            joint = joint * world.teacher[t][:, row, tokens[t]]
            gap = evidence.evidence(world)[t][:, row * vocab + tokens[t]]
            same(gap.exp(), joint / joint.sum() / before)
        total = evidence.sequence_sum(evidence.evidence(world))[:, y]
        same(total.exp(), joint / joint.sum() / world.prior)


@given(seeds)
@few
def test_leaving_the_joint(seed):
    world = wo.random_sequence_world(seed)
    ends = [evidence.leave_joint(world, alpha) for alpha in (0.0, 1.0)]
    for t in range(2):
        same(ends[0].student[t], evidence.predictive(world)[t])
        same(ends[1].student[t], world.student[t])
    belief, format_ = evidence.evidence_shares(ends[0])
    same(format_, 0.0)
    direct, fmt = 0.0, 0.0
    for t, prob in enumerate(wo.reach(world.student)[1:]):
        direct += float(
            (world.prior[:, None] * prob * evidence.belief_change(world)[t] ** 2).sum() / 2
        )
        fmt += float((prob * evidence.format_term(world)[t] ** 2).sum() / 2)
    same(list(evidence.evidence_shares(world)), [direct, fmt])
    assert belief > 0
