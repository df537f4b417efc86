"""Small worlds in which every expectation is a finite sum (float64).

One position: `prior` (m,) over the privileged information r, `teacher` (m, V) with rows
P_T(. | r), `student` (V,) = P_S. Sequences: the table of position t has one row per prefix, in
lexicographic order, so prefix p followed by token v is prefix p * V + v of position t + 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.special import xlogy  # p * log q with 0 log 0 = 0


class World(NamedTuple):
    """One position: prior (m,), teacher (m, V), student (V,)."""

    prior: Tensor
    teacher: Tensor
    student: Tensor


class SequenceWorld(NamedTuple):
    """T positions: prior (m,), teacher[t] (m, V**t, V), student[t] (V**t, V)."""

    prior: Tensor
    teacher: tuple[Tensor, ...]
    student: tuple[Tensor, ...]


def table(rows: list) -> Tensor:
    """A float64 tensor from nested lists: the worlds that are small enough to print."""
    return torch.tensor(rows, dtype=torch.float64)


def random_simplex(generator: torch.Generator, *shape: int, sharpness: float = 1.0) -> Tensor:
    """Softmax of Gaussian logits along the last axis of `shape`, strictly positive."""
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return torch.softmax(sharpness * noise, dim=-1)


def random_world(seed: int, m: int = 3, vocab: int = 4, sharpness: float = 1.0) -> World:
    """A one-position world with m values of r; student and teachers are unrelated."""
    world = random_sequence_world(seed, m, vocab, 1, sharpness)
    return World(world.prior, world.teacher[0][:, 0], world.student[0][0])


def random_sequence_world(
    seed: int, m: int = 2, vocab: int = 3, length: int = 2, sharpness: float = 1.0
) -> SequenceWorld:
    """A tree of positions; student and teachers are unrelated, so no joint ties them."""
    generator = torch.Generator().manual_seed(seed)
    prior = random_simplex(generator, m)
    sizes = [vocab**t for t in range(length)]
    teacher = [random_simplex(generator, m, n, vocab, sharpness=sharpness) for n in sizes]
    student = [random_simplex(generator, n, vocab, sharpness=sharpness) for n in sizes]
    return SequenceWorld(prior, tuple(teacher), tuple(student))


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) along the last axis, in nats."""
    return (xlogy(p, p) - xlogy(p, q)).sum(-1)


def entropy(p: Tensor) -> Tensor:
    """Entropy along the last axis, in nats."""
    return -xlogy(p, p).sum(-1)


def mean_teacher(prior: Tensor, teacher: Tensor) -> Tensor:
    """P_bar = E_r P_T(. | r): (m,), (m, ..., V) -> (..., V)."""
    return torch.tensordot(prior, teacher, dims=1)


def mutual_information(prior: Tensor, teacher: Tensor) -> Tensor:
    """I(Y; R) of one position, H(P_bar) - E_r H(P_T): (m,), (m, ..., V) -> (...)."""
    return entropy(mean_teacher(prior, teacher)) - torch.tensordot(prior, entropy(teacher), dims=1)


def reach(student: tuple[Tensor, ...]) -> list[Tensor]:
    """Probability of every prefix under the student: entry t has shape (V**t,)."""
    probs = [torch.ones(1, dtype=torch.float64)]
    for step in student:
        probs.append((probs[-1].unsqueeze(-1) * step).reshape(-1))
    return probs


def prefix_indices(tokens: tuple[int, ...], vocab: int) -> list[int]:
    """Row of the table at each position of a completion: the prefix read in base V."""
    rows = [0]
    for token in tokens[:-1]:
        rows.append(rows[-1] * vocab + token)
    return rows
