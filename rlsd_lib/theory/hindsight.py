"""The policy gradient as distillation: worlds in which the value V of a prefix is an exact sum.

V(y_<t) is the student's success probability from a prefix, Q(y_<t, v) that after one token more, and
the hindsight teacher h_t(v) = P_S(v | y_<t, success), so that h_t / P_S = Q / V.
"""

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from rlsd_lib import credit
from rlsd_lib.divergence import forward_kl

from .worlds import prefix_indices, random_simplex, reach, table


class Tree(NamedTuple):
    """All N = V**T completions of a student, each right with a probability."""

    student: tuple[Tensor, ...]  # of position t: (V**t, V)
    right: Tensor  # (N,), probability of success

    @property
    def prob(self) -> Tensor:
        """Probability of every completion: (N,)."""
        return reach(self.student)[-1]

    @property
    def tokens(self) -> Tensor:
        """The completions in lexicographic order: (N, T)."""
        vocab, length = self.student[0].shape[-1], len(self.student)
        return torch.tensor(list(product(range(vocab), repeat=length)))

    @property
    def rows(self) -> Tensor:
        """The prefix of each token as a row of its position's table: (N, T)."""
        vocab = self.student[0].shape[-1]
        return torch.tensor([prefix_indices(y, vocab) for y in self.tokens.tolist()])

    @property
    def values(self) -> list[Tensor]:
        """V of every prefix by backward sums, (V**t,) for t = 0 .. T."""
        values = [self.right]
        for step in reversed(self.student):
            values.insert(0, (step * values[0].view_as(step)).sum(-1))
        return values

    @property
    def teacher(self) -> list[Tensor]:
        """h_t by Bayes' rule from the joint law of completion and success, (V**t, V) each.

        1/2 for every token after a prefix that is lost, where no law is defined.
        """
        joint, teacher = self.prob * self.right, []
        for step in self.student:
            mass = joint.view(*step.shape, -1).sum(-1)
            teacher.append((mass / mass.sum(-1, keepdim=True)).nan_to_num(nan=0.5))
        return teacher

    @property
    def group_success(self) -> Tensor:
        """The exact V_0, as each rollout would learn it from a large group: (N,)."""
        return self.values[0].expand(len(self.right))

    @property
    def sigma(self) -> Tensor:
        """Standard deviation of the reward: (1,)."""
        return (self.values[0] * (1 - self.values[0])).sqrt()

    def gap(self, teacher: list[Tensor]) -> Tensor:
        """log P_T - log P_S of the tokens that each completion takes, -1e3 for -inf: (N, T)."""
        rows, tokens = self.rows, self.tokens
        columns = [
            (tables[rows[:, t], tokens[:, t]] / step[rows[:, t], tokens[:, t]]).log()
            for t, (tables, step) in enumerate(zip(teacher, self.student, strict=True))
        ]
        return torch.stack(columns, dim=1).clamp(min=-1e3)


def random_tree(seed: int, vocab: int = 3, length: int = 3, *, certain: bool = False) -> Tree:
    """Random student; success is a random probability, or if `certain` 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    student = tuple(random_simplex(generator, vocab**t, vocab) for t in range(length))
    right = torch.rand(vocab**length, generator=generator, dtype=torch.float64)
    return Tree(student, (right < 0.5).double() if certain else right)


def loud_tree() -> Tree:
    """A coin decides between a prefix of V = 0.08 and one of 0.92: an unlikely token is loud."""
    student = (table([[0.5, 0.5]]), table([[0.92, 0.08], [0.08, 0.92]]))
    return Tree(student, table([0, 1, 0, 1]))


def policy_gradient(world: Tree) -> Tensor:
    """grad J of J = E[R] in the student's logits, by autograd: (D,)."""
    logits = [step.log().requires_grad_() for step in world.student]
    prob = reach(tuple(x.softmax(-1) for x in logits))[-1]
    grads = torch.autograd.grad((prob * world.right).sum(), logits)
    return torch.cat([x.flatten() for x in grads])


def distillation_gradient(world: Tree, *, by_value: bool = True) -> Tensor:
    """-E_{y ~ P_S} sum_t V(y_<t) grad KL(h_t || P_S), the gradient through P_S alone: (D,).

    Without `by_value` each prefix has the weight 1, as full-vocabulary OPSD from this teacher.
    """
    logits = [step.log().requires_grad_() for step in world.student]
    loss = torch.zeros((), dtype=torch.float64)
    tables = zip(reach(world.student), world.values, world.teacher, logits, strict=False)
    for prob, value, teacher, x in tables:
        weight = prob * value if by_value else prob
        loss = loss + (weight * forward_kl(teacher.log(), x.log_softmax(-1))).sum()
    return -torch.cat([x.flatten() for x in torch.autograd.grad(loss, logits)])


def moments(world: Tree, credited: Tensor) -> tuple[Tensor, Tensor]:
    """E[g] (D,) and E||g||^2 () of g = sum_t credit_t grad log P_S(y_t), in logits: (N, T)."""
    mean, square = [], torch.zeros((), dtype=torch.float64)
    rows, tokens = world.rows, world.tokens
    for t, step in enumerate(world.student):
        score = torch.eye(step.shape[-1]).double()[tokens[:, t]] - step[rows[:, t]]
        pull = credited[:, t, None] * score
        square = square + (world.prob[:, None] * pull.square()).sum()
        total = torch.zeros_like(step)
        mean.append(total.index_add(0, rows[:, t], world.prob[:, None] * pull).flatten())
    return torch.cat(mean), square


def credits_of(world: Tree, gap: Tensor) -> dict[str, Tensor]:
    """GRPO's credit and those made of V, (N, T) each, of a world of certain success."""
    advantages = (world.right - world.group_success) / world.sigma
    known, ones = {"group_success": world.group_success}, torch.ones_like(gap)
    baseline = credit.privileged_baseline(advantages, gap, ones, success=world.right, **known)
    return {
        "grpo": credit.uniform(advantages, gap, ones),
        "privileged_baseline": baseline,
        "hindsight": credit.hindsight(advantages, gap, ones, **known),
        "posterior_blame": credit.posterior_blame(advantages, gap, ones, **known),
    }
