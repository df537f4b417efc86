"""Appendix A.3: how much the direction of an update says about r, for five methods.

The observer knows the rollout and sees the direction of the update in logit space. Two measures, 0
when it does not depend on r: `direction_spread`, how far the directions lie apart, up to 1, and
`direction_information`, how many values of r can be told apart, all of them by however faint a trace.
"""

from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rlsd_lib import credit

from .distillation import softmax_scores
from .evidence import evidence
from .worlds import SequenceWorld, entropy, prefix_indices, reach

CREDITS = {"grpo": credit.uniform, "rlsd": credit.rlsd, "rlsd_neutral": credit.rlsd_neutral}


def normalised_advantages(reward: Tensor, prob: Tensor) -> Tensor:
    """(R - mean) / std with exact mean and std: rewards (N,) and their probabilities (N,)."""
    centred = reward - (prob * reward).sum()
    return centred / (prob * centred.square()).sum().sqrt()


def full_pull(teacher: Tensor, student: Tensor) -> Tensor:
    """Full OPSD: minus the gradient of KL(P_T || P_S), P_T - P_S. (m, V), (V,) -> (m, V)."""
    return teacher - student


def teacher_top1_pull(teacher: Tensor, student: Tensor) -> Tensor:
    """Teacher's Top-1: grad log P_S of the teacher's favourite token. Shapes as `full_pull`."""
    return softmax_scores(student)[teacher.argmax(-1)]


def student_top1_pull(teacher: Tensor, student: Tensor) -> Tensor:
    """Student's Top-1: P_T(v*) / P_S(v*) times grad log P_S(v*), v* the student's favourite."""
    best = student.argmax()
    return (teacher[:, best] / student[best]).unsqueeze(-1) * softmax_scores(student)[best]


PULLS = {"opsd": full_pull, "teacher_top1": teacher_top1_pull, "student_top1": student_top1_pull}


def token_credit(
    world: SequenceWorld, reward: Tensor, method: str, lam: float, epsilon_w: float
) -> Tensor:
    """A_hat_t of every r and completion: reward (V**T,) -> (m, V**T, T)."""
    gaps = evidence(world)
    count = gaps[-1].shape[-1]
    gap = torch.stack([g.repeat_interleave(count // g.shape[-1], dim=1) for g in gaps], dim=-1)
    advantages = normalised_advantages(reward, reach(world.student)[-1])
    rows = gap.flatten(0, 1)
    advantages = advantages.repeat(len(world.prior))
    hat = CREDITS[method](advantages, rows, torch.ones_like(rows), lam=lam, epsilon_w=epsilon_w)
    return hat.view_as(gap)


def updates(
    world: SequenceWorld, reward: Tensor, method: str, *, lam: float = 1.0, epsilon_w: float = 0.2
) -> Tensor:
    """Ascent direction of every (r, completion) in the logits of all prefixes: (m, V**T, D)."""
    vocab, length = world.student[0].shape[-1], len(world.student)
    starts = [sum(vocab ** (k + 1) for k in range(t)) for t in range(length + 1)]
    out = torch.zeros(len(world.prior), vocab**length, starts[-1], dtype=torch.float64)
    hat = token_credit(world, reward, method, lam, epsilon_w) if method in CREDITS else None
    for index, tokens in enumerate(product(range(vocab), repeat=length)):
        for t, row in enumerate(prefix_indices(tokens, vocab)):
            student, teacher = world.student[t][row], world.teacher[t][:, row]
            if hat is None:
                local = PULLS[method](teacher, student)
            else:
                local = hat[:, index, t].unsqueeze(-1) * softmax_scores(student)[tokens[t]]
            begin = starts[t] + row * vocab
            out[:, index, begin : begin + vocab] = local
    return out


def direction_spread(prior: Tensor, prob: Tensor, updates: Tensor) -> Tensor:
    """E_y[1 - ||E_r u / ||u|| ||]: prior (m,), prob (N,), updates (m, N, D) -> ()."""
    units = normalize(updates, dim=-1)
    # A zero update has no direction to tell: it counts as concentrated.
    length = torch.tensordot(prior, units, dims=1).norm(dim=-1)
    idle = (units == 0).all(dim=-1).all(dim=0)
    return (prob * torch.where(idle, 0.0, 1 - length)).sum()


def direction_information(prior: Tensor, prob: Tensor, updates: Tensor) -> Tensor:
    """I(R; direction | rollout) in nats: the entropy of r's partition by direction, averaged."""
    total = torch.zeros((), dtype=torch.float64)
    for y, p in enumerate(prob):
        # Nine decimals separate directions that differ from rounding alone; + 0.0 merges -0 and 0.
        keys = normalize(updates[:, y], dim=-1).round(decimals=9) + 0.0
        _, labels = keys.unique(dim=0, return_inverse=True)
        total = total + p * entropy(torch.zeros_like(prior).scatter_add(0, labels, prior))
    return total
