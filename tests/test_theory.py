"""Theorems 1 to 4, Proposition 1 and Appendix A.3 over random worlds: every identity to 1e-10."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsd_lib.theory import bandwidth, evidence, shared
from rlsd_lib.theory import distillation as di
from rlsd_lib.theory import worlds as wo
from rlsd_lib.theory.worlds import table

TIGHT = {"rtol": 0, "atol": 1e-10}
few = settings(deadline=None, max_examples=25, derandomize=True, database=None)
seeds = st.integers(0, 2**31 - 1)
sizes = st.integers(2, 4)


def same(actual, expected, **kwargs):
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    torch.testing.assert_close(actual, expected, **(TIGHT | kwargs))


def random_scores(seed, vocab, width=3):
    """grad log P_S of a log-linear student: feature minus mean feature."""
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(vocab, width, generator=generator, dtype=torch.float64)


@given(seeds, sizes, sizes)
@few
def test_information_is_the_mean_divergence_from_the_mean_teacher(seed, m, vocab):
    world = wo.random_world(seed, m, vocab)
    mean = wo.mean_teacher(world.prior, world.teacher)
    divergences = [wo.kl(row, mean) for row in world.teacher]
    direct = sum(p * d for p, d in zip(world.prior, divergences, strict=True))
    same(wo.mutual_information(world.prior, world.teacher), direct)


@given(seeds, st.integers(2, 3), st.integers(2, 3), st.integers(1, 3))
@few
def test_theorem_1_on_sequences(seed, m, vocab, length):
    world = wo.random_sequence_world(seed, m, vocab, length)
    matching, leak = di.opsd_terms(world)
    same(matching + leak, di.opsd_loss_enumerated(world))
    assert matching >= 0
    assert leak >= 0


def test_the_leak_moves_with_the_student_through_the_prefixes_alone():
    """First token a or b; after a the teacher copies r, after b it ignores r: I = P_S(a) log 2."""
    logits = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    half = table([[0.5, 0.5]])
    second = table([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]])
    student = (torch.softmax(logits, -1), table([[0.5, 0.5], [0.5, 0.5]]))
    world = wo.SequenceWorld(table([0.5, 0.5]), (half.repeat(2, 1, 1), second), student)
    _, leak = di.opsd_terms(world)
    same(leak.detach(), 0.5 * math.log(2))
    leak.backward()
    same(logits.grad, [[0.25 * math.log(2), -0.25 * math.log(2)]])


@given(seeds, sizes, sizes)
@few
def test_gradients_are_those_of_autograd(seed, m, vocab):
    world = wo.random_world(seed, m, vocab)
    logits = world.student.log().requires_grad_()
    student = torch.softmax(logits, -1)
    signal, deltas = di.gradient_split(world, di.softmax_scores(world.student))
    target = wo.mean_teacher(world.prior, world.teacher)
    (gradient,) = torch.autograd.grad(wo.kl(target, student), logits, retain_graph=True)
    same(signal, gradient)
    same(signal, world.student - target)
    for row, delta in zip(world.teacher, deltas, strict=True):
        (one,) = torch.autograd.grad(wo.kl(row, student), logits, retain_graph=True)
        same(signal + delta, one)
    same(world.prior @ deltas, torch.zeros(vocab))


@given(seeds, sizes, sizes)
@few
def test_noise_energy_needs_the_cross_terms(seed, m, vocab):
    world = wo.random_world(seed, m, vocab)
    scores = random_scores(seed, vocab)
    same(di.noise_energy(world, scores), di.noise_energy_enumerated(world, scores))
    softmax = di.softmax_scores(world.student)
    same(di.noise_energy_logits(world), di.noise_energy_enumerated(world, softmax))


@given(seeds, sizes, sizes)
@few
def test_printed_noise_energy_is_the_diagonal(seed, m, vocab):
    world = wo.random_world(seed, m, vocab)
    spread = (world.prior.unsqueeze(-1) * world.teacher.square()).sum(0)
    variances = spread - wo.mean_teacher(world.prior, world.teacher).square()
    scores = random_scores(seed, vocab)
    expected = (variances * scores.square().sum(-1)).sum()
    same(di.noise_energy_printed(world, scores), expected)
    p = world.student
    factor = 1 - 2 * p + p.square().sum()
    printed = di.noise_energy_printed(world, di.softmax_scores(p))
    same(printed, (variances * factor).sum())
    assert printed < 2 * di.noise_energy_logits(world)


@pytest.mark.parametrize(
    ("student", "printed"),
    [([0.5, 0.5], 0.25), ([0.1, 0.1, 0.8], 0.73), ([(3 - 3**0.5) / 6] * 2 + [3**0.5 / 3], 0.5)],
    ids=["too small", "too large", "exact"],
)
def test_printed_noise_energy_by_hand(student, printed):
    world = di.two_answers(student)
    scores = di.softmax_scores(world.student)
    same(di.noise_energy_enumerated(world, scores), 0.5)
    same(di.noise_energy_printed(world, scores), printed)


@given(seeds, sizes, sizes, st.floats(0.1, 6))
@few
def test_noise_energy_never_exceeds_information(seed, m, vocab, sharpness):
    world = wo.random_world(seed, m, vocab, sharpness)
    bound = wo.mutual_information(world.prior, world.teacher)
    assert di.noise_energy_logits(world) <= bound + 1e-12


@given(st.integers(2, 50), st.floats(0.01, 0.99))
@few
def test_rare_copy_has_the_stated_information_and_variance(k, eps):
    world = di.rare_copy(k, eps)
    same(wo.mutual_information(world.prior, world.teacher), eps * math.log(k))
    same(di.noise_energy_logits(world), eps**2 * (1 - 1 / k))


def test_more_information_with_less_variance():
    certain, rare = di.two_answers([0.5, 0.5]), di.rare_copy(4, 0.6)
    information = [float(wo.mutual_information(w.prior, w.teacher)) for w in (certain, rare)]
    same(information, [math.log(2), 0.6 * math.log(4)])
    same([di.noise_energy_logits(certain), di.noise_energy_logits(rare)], [0.5, 0.27])


@given(seeds, sizes, st.integers(1, 8))
@few
def test_noise_floor_solves_the_stationary_covariance(seed, vocab, batch):
    world, lr = wo.random_world(seed, 3, vocab), 0.1
    p = wo.mean_teacher(world.prior, world.teacher)
    fisher = torch.diag(p) - torch.outer(p, p)
    forcing = lr / batch * di.teacher_covariance(world.prior, world.teacher)
    eye = torch.eye(vocab, dtype=torch.float64)
    operator = torch.kron(fisher, eye) + torch.kron(eye, fisher)
    covariance = (torch.linalg.pinv(operator) @ forcing.flatten()).view(vocab, vocab)
    same(di.noise_floor(world, lr, batch), (fisher @ covariance).trace() / 2)


def test_descent_keeps_its_noise_and_loses_its_signal():
    world = wo.random_world(3)
    exact = di.descend(world, 2000, 0.5, batch=None, chains=1)
    assert exact["noise"].max() == 0
    same(exact["student"][-1], wo.mean_teacher(world.prior, world.teacher), atol=1e-6)
    student = exact["student"][0] - 0
    same(exact["signal"][0], (student - exact["student"][-1]).square().sum(), atol=1e-6)
    noisy = di.descend(world, 600, 0.2, batch=2, chains=400)
    same(noisy["noise"], (di.noise_energy_logits(world) / 2).expand(600))
    floor = di.noise_floor(world, 0.2, 2)
    same(noisy["gap"][300:].mean() / floor, 1.0, atol=0.15)


@given(seeds, st.integers(2, 3), st.integers(1, 2))
@few
def test_updates_are_gradients_of_the_method(seed, vocab, length):
    world = wo.random_sequence_world(seed, 2, vocab, length)
    generator = torch.Generator().manual_seed(seed)
    reward = torch.rand(vocab**length, generator=generator, dtype=torch.float64)
    logits = [step.log().requires_grad_() for step in world.student]
    live = [torch.log_softmax(x, -1) for x in logits]
    prob = wo.reach(world.student)[-1]
    hat = bandwidth.token_credit(world, reward, "rlsd", 0.7, 0.3)
    for r in range(2):
        loss = torch.zeros((), dtype=torch.float64)
        pull = torch.zeros((), dtype=torch.float64)
        for y, tokens in wo.sequences(vocab, length):
            for t, row in enumerate(wo.prefix_indices(tokens, vocab)):
                loss = loss + prob[y] * hat[r, y, t] * live[t][row, tokens[t]]
                pull = pull + prob[y] * (world.teacher[t][r, row] * live[t][row]).sum()
        for method, value in (("rlsd", loss), ("opsd", pull)):
            gradient = torch.autograd.grad(value, logits, retain_graph=True)
            expected = torch.cat([g.flatten() for g in gradient])
            table_ = bandwidth.updates(world, reward, method, lam=0.7, epsilon_w=0.3)
            same(prob @ table_[r], expected)


@given(seeds, sizes, sizes)
@few
def test_top1_pulls_are_weighted_scores(seed, m, vocab):
    world = wo.random_world(seed, m, vocab)
    scores = di.softmax_scores(world.student)
    best = int(world.student.argmax())
    teacher = bandwidth.teacher_top1_pull(world.teacher, world.student)
    same(teacher, scores[world.teacher.argmax(-1)])
    ratios = world.teacher[:, best] / world.student[best]
    student = bandwidth.student_top1_pull(world.teacher, world.student)
    same(student, torch.outer(ratios, scores[best]))


@given(seeds)
@few
def test_bandwidth_of_one_token_and_of_grpo(seed):
    """At one token a positive scalar cannot turn the update: RLSD and Student's Top-1 alike."""
    world = wo.random_sequence_world(seed, 3, 3, 1)
    prob = wo.reach(world.student)[-1]
    reward = table([1.0, 0.0, 0.0])
    for method in ("grpo", "rlsd", "student_top1", "opsd"):
        update = bandwidth.updates(world, reward, method)
        spread = bandwidth.direction_spread(world.prior, prob, update)
        told = bandwidth.direction_information(world.prior, prob, update)
        if method == "opsd":
            assert spread > 1e-6
            same(told, wo.entropy(world.prior))
        else:
            same([spread, told], [0.0, 0.0])


def test_direction_measures_by_hand():
    prior, prob = table([0.5, 0.5]), table([0.25, 0.75])
    right, up, zero = [2.0, 0.0], [0.0, 3.0], [0.0, 0.0]
    update = table([[right, right], [up, [5.0, 0.0]]])
    same(bandwidth.direction_spread(prior, prob, update), 0.25 * (1 - 0.5**0.5))
    same(bandwidth.direction_information(prior, prob, update), 0.25 * math.log(2))
    idle = table([[zero, right], [zero, right]])
    same(bandwidth.direction_spread(prior, prob, idle), 0.0)
    mean = table([[right, right], [[-2.0, 0.0], right]])
    same(bandwidth.mean_update_spread(prior, prob, mean), 0.0)
    same(bandwidth.mean_update_spread(prior, table([0.75, 0.25]), mean), 1.0)


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
    same(shared.log_odds_of_citing(table([0.2, 0.8])), math.log(4))


def test_balance_of_quoting_and_reasoning():
    for boost, wins in ((4.9, False), (5.1, True)):
        assert shared.quoting_wins(shared.QuoteWorld(quote=boost)) is wins
    assert shared.copy_odds_for_balance(shared.QuoteWorld()) == 5.0
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
    noisy = shared.simulate(world, "distil", sync_every=0, steps=30, batch=4000)
    same(noisy["reward"], frozen["reward"], atol=0.01)
    assert not torch.equal(noisy["reward"], frozen["reward"])
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
    same(evidence.format_cost(world), cost)


@given(seeds, st.integers(2, 3), st.integers(1, 3))
@few
def test_theorem_4_with_a_joint_by_bayes(seed, vocab, length):
    world = evidence.joint_world(wo.random_sequence_world(seed, 2, vocab, length))
    for y, tokens in wo.sequences(vocab, length):
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
    same(evidence.format_cost(ends[0]), 0.0)
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
