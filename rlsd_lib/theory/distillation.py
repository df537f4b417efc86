"""Theorem 1, Proposition 1 and the two phases: what matching P_T(. | r) per sample does.

Gradients are taken of the loss, with respect to logits unless `scores` says otherwise; row v of
`scores` (V, d) is grad log P_S(v).
"""

from itertools import product

import torch
from torch import Tensor

from .worlds import (
    SequenceWorld,
    World,
    kl,
    mean_teacher,
    mutual_information,
    prefix_indices,
    reach,
    table,
)


def opsd_terms(world: SequenceWorld) -> tuple[Tensor, Tensor]:
    """Theorem 1, right side: sum over t of E KL(P_bar || P_S) and of I(Y_t; R | Y_<t).

    Prefixes follow the student, so they are independent of r and P_bar averages over the prior.
    """
    matching, leak = torch.zeros(2, dtype=torch.float64)
    probs = reach(world.student)
    for prob, teacher, student in zip(probs, world.teacher, world.student, strict=False):
        matching = matching + (prob * kl(mean_teacher(world.prior, teacher), student)).sum()
        leak = leak + (prob * mutual_information(world.prior, teacher)).sum()
    return matching, leak


def opsd_loss_enumerated(world: SequenceWorld) -> float:
    """Theorem 1, left side, term by term over every r, completion, position and token."""
    vocab, length = world.student[0].shape[-1], len(world.student)
    total = 0.0
    for r, tokens in product(range(len(world.prior)), product(range(vocab), repeat=length)):
        rows = prefix_indices(tokens, vocab)
        prob = float(world.prior[r])
        for t, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            prob *= float(world.student[t][row, token])
        for t, row in enumerate(rows):
            pairs = zip(world.teacher[t][r, row], world.student[t][row], strict=True)
            total += prob * sum(float(p * (p / q).log()) for p, q in pairs)
    return total


def softmax_scores(student: Tensor) -> Tensor:
    """grad log P_S(v) with respect to the logits, e_v - P_S: (V,) -> (V, V)."""
    return torch.eye(len(student), dtype=student.dtype) - student


def gradient_split(world: World, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Proposition 1 (i): g* (d,), the gradient of KL(P_bar || P_S), and delta(r) (m, d).

    Their sum is g(r) = -sum_v P_T(v | r) grad log P_S(v), in logits P_S - P_T(. | r).
    """
    signal = -mean_teacher(world.prior, world.teacher) @ scores
    return signal, -world.teacher @ scores - signal


def teacher_covariance(prior: Tensor, teacher: Tensor) -> Tensor:
    """Cov_r[P_T(v | r), P_T(v' | r)]: (m,), (m, V) -> (V, V)."""
    centred = teacher - mean_teacher(prior, teacher)
    return centred.T @ (prior.unsqueeze(-1) * centred)


def noise_energy(world: World, scores: Tensor) -> Tensor:
    """E||delta||^2 corrected: sum over v, v' of Cov_r(v, v') <grad_v, grad_v'>."""
    return (teacher_covariance(world.prior, world.teacher) * (scores @ scores.T)).sum()


def noise_energy_printed(world: World, scores: Tensor) -> Tensor:
    """Proposition 1 (ii) as printed: the diagonal v = v' alone."""
    variances = teacher_covariance(world.prior, world.teacher).diagonal()
    return (variances * scores.square().sum(-1)).sum()


def noise_energy_enumerated(world: World, scores: Tensor) -> Tensor:
    """E||delta||^2 from the definition, one r at a time."""
    _, deltas = gradient_split(world, scores)
    return sum(p * delta @ delta for p, delta in zip(world.prior, deltas, strict=True))


def noise_energy_logits(world: World) -> Tensor:
    """E||delta||^2 for logits: sum_v Var_r P_T(v | r), whatever the student is."""
    return teacher_covariance(world.prior, world.teacher).diagonal().sum()


def two_answers(student: list[float]) -> World:
    """Two equally likely r; the teacher names token 0 or token 1 with certainty."""
    rows = [[1.0, 0.0] + [0.0] * (len(student) - 2), [0.0, 1.0] + [0.0] * (len(student) - 2)]
    return World(table([0.5, 0.5]), table(rows), table(student))


def rare_copy(k: int, eps: float) -> World:
    """k equally likely r; the teacher writes r with probability eps, else a neutral token.

    I = eps log k and sum_v Var = eps^2 (1 - 1/k): information without much variance.
    """
    identity = torch.eye(k, dtype=torch.float64)
    rows = torch.cat([torch.full((k, 1), 1 - eps, dtype=torch.float64), eps * identity], dim=1)
    uniform = torch.full((k + 1,), 1 / (k + 1), dtype=torch.float64)
    return World(torch.full((k,), 1 / k, dtype=torch.float64), rows, uniform)


def noise_floor(world: World, lr: float, batch: int = 1) -> Tensor:
    """Mean of KL(P_bar || P_S) at stationarity under SGD on logits, to first order in lr.

    Around P_bar the Hessian is the Fisher matrix F and the noise covariance C / batch, so the
    logits' covariance S solves F S + S F = lr C / batch, and half of tr(F S) is lr tr(C) / 4 batch.
    """
    return lr * noise_energy_logits(world) / (4 * batch)


def descend(
    world: World, steps: int, lr: float, batch: int | None = 1, chains: int = 64, seed: int = 0
) -> dict[str, Tensor]:
    """Gradient descent of a tabular student on sampled r; `batch=None` takes the mean over r.

    Returns per step, averaged over `chains` independent students: `signal` ||g*||^2, `noise`
    E||delta||^2 / batch, `gap` KL(P_bar || P_S), and the mean student (steps, V).
    """
    generator = torch.Generator().manual_seed(seed)
    target = mean_teacher(world.prior, world.teacher)
    logits = world.student.log().repeat(chains, 1)
    noise = torch.zeros((), dtype=torch.float64)
    if batch is not None:
        noise = noise_energy_logits(world) / batch
    rows = []
    for _ in range(steps):
        student = torch.softmax(logits, -1)
        gap = kl(target.expand_as(student), student)
        rows.append(((student - target).square().sum(-1).mean(), gap.mean(), student.mean(0)))
        pull = target
        if batch is not None:
            draws = torch.multinomial(world.prior, chains * batch, True, generator=generator)
            pull = world.teacher[draws].view(chains, batch, -1).mean(1)
        logits = logits - lr * (student - pull)
    signal, gaps, students = (torch.stack(column) for column in zip(*rows, strict=True))
    return {"signal": signal, "noise": noise.expand(steps), "gap": gaps, "student": students}
