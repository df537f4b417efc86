"""Theorem 1, Proposition 1 and Appendix A.3 over random worlds: every identity to 1e-10."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsd_lib.theory import bandwidth
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
        for y, tokens in enumerate(product(range(vocab), repeat=length)):
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
    world = wo.random_sequence_world(seed, m, vocab, 1)
    teacher, student = world.teacher[0][:, 0], world.student[0][0]
    scores, best = di.softmax_scores(student), int(student.argmax())
    pulls = {
        "opsd": teacher - student,
        "teacher_top1": scores[teacher.argmax(-1)],
        "student_top1": torch.outer(teacher[:, best] / student[best], scores[best]),
    }
    for method, pull in pulls.items():  # whatever the one token was
        found = bandwidth.updates(world, torch.arange(vocab, dtype=torch.float64), method)
        same(found, pull[:, None].expand_as(found))


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
