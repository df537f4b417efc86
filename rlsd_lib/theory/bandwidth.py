"""Appendix A.3: how much the direction of an update says about r, for five methods.

The observer knows the rollout and sees the direction of the update in logit space. Two measures, 0
when it does not depend on r: `direction_spread`, how far the directions lie apart, up to 1, and
`direction_information`, how many values of r can be told apart, all of them by however faint a trace.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rlsd_lib import credit
from rlsd_lib.divergence import forward_kl, student_top1, teacher_top1

from .evidence import evidence
from .worlds import SequenceWorld, entropy, reach

LOSSES = {"opsd": forward_kl, "teacher_top1": teacher_top1, "student_top1": student_top1}
CREDITS = {"grpo": credit.uniform, "rlsd": credit.rlsd, "rlsd_neutral": credit.rlsd_neutral}


def normalised_advantages(reward: Tensor, prob: Tensor) -> Tensor:
    """(R - mean) / std with exact mean and std: rewards (N,) and their probabilities (N,)."""
    centred = reward - (prob * reward).sum()
    return centred / (prob * centred.square()).sum().sqrt()


def token_credit(
    world: SequenceWorld, reward: Tensor, method: str, lam: float, epsilon_w: float
) -> Tensor:
    """A_hat_t of every r and completion: reward (V**T,) -> (m, V**T, T)."""
    gap = _along(evidence(world), len(reward))
    advantages = normalised_advantages(reward, reach(world.student)[-1])
    rows = gap.flatten(0, 1)
    advantages = advantages.repeat(len(world.prior))
    hat = CREDITS[method](advantages, rows, torch.ones_like(rows), lam=lam, epsilon_w=epsilon_w)
    return hat.view_as(gap)


def updates(
    world: SequenceWorld, reward: Tensor, method: str, *, lam: float = 1.0, epsilon_w: float = 0.2
) -> Tensor:
    """Ascent direction of every (r, completion) in the logits of all prefixes: (m, V**T, D)."""
    sizes = [step.numel() for step in world.student]
    hat = token_credit(world, reward, method, lam, epsilon_w) if method in CREDITS else None

    def objective(logits: Tensor) -> Tensor:
        parts = zip(logits.split(sizes), world.student, strict=True)
        log_ps = [part.view_as(step).log_softmax(-1) for part, step in parts]
        if hat is not None:
            return (hat * _along([log_p.flatten() for log_p in log_ps], len(reward))).sum(-1)
        pairs = zip(world.teacher, log_ps, strict=True)
        losses = [LOSSES[method](p.log(), log_p.expand_as(p)) for p, log_p in pairs]
        return -_along(losses, len(reward)).sum(-1)

    return torch.func.jacrev(objective)(torch.cat([step.log().flatten() for step in world.student]))


def _along(per_prefix: list[Tensor], count: int) -> Tensor:
    """Values of every prefix along each of `count` completions: (..., V**t) each -> (..., count, T)."""
    values = [x.repeat_interleave(count // x.shape[-1], dim=-1) for x in per_prefix]
    return torch.stack(values, dim=-1)


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
