"""Theorem 5 and Section 7: RLSD's token credit, its sum, and the self-distillation inside it.

Notation: Delta = log P_T(y) - log P_S(y), up = clip(exp(Delta)), down = clip(exp(-Delta)), clipped
to [1 - eps, 1 + eps]. A rewarded token (A > 0) carries the weight up, a punished one down.
"""

import math
from itertools import product

import torch
from torch import Tensor

from rlsd_lib.credit import clipped_weight


def added_credit(advantages: Tensor, gap: Tensor, *, lam: float, epsilon_w: float) -> Tensor:
    """What RLSD adds to GRPO, A_hat - A = lam |A| psi(Delta): (N,), (N, T) -> (N, T).

    psi(Delta) in [-eps, eps] is up - 1 where A > 0 and 1 - down where A < 0: both increase in Delta
    and vanish at 0 with slope 1. To first order RLSD is GRPO plus sampled-token reverse-KL
    self-distillation (Eq. 17) with coefficient lam |A|.
    """
    scale = advantages.unsqueeze(-1)
    up, down = clipped_weight(gap, epsilon_w), clipped_weight(-gap, epsilon_w)
    return lam * scale.abs() * torch.where(scale > 0, up - 1, 1 - down)


def expected_credit(
    gap: Tensor, mean: Tensor, mean_abs: Tensor, *, lam: float, epsilon_w: float
) -> Tensor:
    """E[A_hat | v] for any law of A: a ((1 - lam) + lam m) + lam c h, elementwise.

    a = E[A | v] is GRPO's own expected credit and c = E[|A| | v] / 2. Independence is not needed.
    m = (up + down) / 2 is even and h = up - down is odd, at most 2 eps: without the clip they are
    cosh(Delta) and 2 sinh(Delta). A saturated gap flips the sign where |a| < lam eps E[|A| | v].
    """
    up, down = clipped_weight(gap, epsilon_w), clipped_weight(-gap, epsilon_w)
    kept = (1 - lam) + lam * (up + down) / 2
    return mean * kept + lam * mean_abs / 2 * (up - down)


def expected_neutral_credit(gap: Tensor, mean: Tensor, *, lam: float, epsilon_w: float) -> Tensor:
    """E[A_hat | v] of the sign-free weight: a ((1 - lam) + lam clip(exp |Delta|)), a = E[A | v]."""
    return mean * ((1 - lam) + lam * clipped_weight(gap.abs(), epsilon_w))


def policy_step(student: Tensor, credit: Tensor) -> Tensor:
    """E_{v ~ P_S}[credit(v) grad log P_S(v)] in logits, P_S (credit - mean): (V,), (V,) -> (V,)."""
    return student * (credit - (student * credit).sum())


def reverse_kl_step(student: Tensor, teacher: Tensor) -> Tensor:
    """-grad KL(P_S || P_T) in the student's logits, teacher fixed: the policy step of Delta."""
    return policy_step(student, teacher.log() - student.log())


def group_advantages(rewards: Tensor) -> Tensor:
    """(R - mean) / std of the group, TRL's std (n - 1); 0 if uniform: (..., G) -> (..., G)."""
    centred = rewards - rewards.mean(-1, keepdim=True)
    return (centred / rewards.std(-1, keepdim=True)).nan_to_num(nan=0.0)


def group_mean_abs(p: float, group: int) -> float:
    """E|A| of one rollout, G a group, success rate p: sqrt(1 - 1/G) E[2 sqrt(q (1 - q))], q = k/G."""
    weights = [math.comb(group, k) * p**k * (1 - p) ** (group - k) for k in range(group + 1)]
    size = sum(w * 2 * math.sqrt(k * (group - k)) / group for k, w in enumerate(weights))
    return math.sqrt(1 - 1 / group) * size


def group_outcomes(success: list[float]) -> tuple[Tensor, Tensor]:
    """All reward vectors of a group whose rollout i succeeds with success[i]: (2**G, G), (2**G,)."""
    rewards = torch.tensor(list(product([0.0, 1.0], repeat=len(success))), dtype=torch.float64)
    chance = torch.tensor(success, dtype=torch.float64)
    return rewards, torch.where(rewards == 1, chance, 1 - chance).prod(-1)


def largest_share_moved(lams: list[float], mean_abs: list[float], epsilon_w: float) -> float:
    """Largest share of a run's summed |A| that RLSD can move: sum lam_k eps m_k / sum m_k.

    `lams` and `mean_abs` (steps,) are each step's lambda and mean |A|, logged or `group_mean_abs`.
    """
    moved = sum(lam * epsilon_w * size for lam, size in zip(lams, mean_abs, strict=True))
    return moved / sum(mean_abs)


def angle(u: Tensor, v: Tensor) -> Tensor:
    """Angle between two vectors in radians, accurate near 0 and near pi."""
    u, v = u / u.norm(), v / v.norm()
    return 2 * torch.atan2((u - v).norm(), (u + v).norm())


def cancellation(advantages: Tensor, scores: Tensor) -> Tensor:
    """kappa = sum |A_i| ||s_i|| / ||sum A_i s_i|| >= 1: (N,), (N, d) -> ()."""
    total = (advantages.unsqueeze(-1) * scores).sum(0)
    return (advantages.abs() * scores.norm(dim=-1)).sum() / total.norm()


def angle_bound(kappa: float, *, lam: float, epsilon_w: float) -> float:
    """Largest angle between the RLSD and GRPO sums: arcsin(lam eps kappa), pi once that is >= 1.

    For mutually orthogonal token gradients the bound of kappa = 1 holds, and is attained.
    """
    reach = lam * epsilon_w * kappa
    return math.asin(reach) if reach < 1 else math.pi
