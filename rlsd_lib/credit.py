"""Token credit: how one advantage per rollout becomes one advantage per token.

Every method of the GRPO family in this project is one function of this file. All share a signature:

    advantages (N,), gap (N, T), mask (N, T)  ->  token advantages (N, T)

where N counts rollouts and T completion positions. The gap is the privileged information gain
Delta_t = log P_T(y_t) - log P_S(y_t) of the sampled tokens (Eq. 13 of arXiv 2604.03128), in nats.
The mask is 1 on tokens that the policy wrote and that enter the loss. At masked positions the
advantage is returned unchanged, since some losses branch on its sign there.

Only torch is imported here.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Evidence = Callable[[Tensor, Tensor], Tensor]
Credit = Callable[..., Tensor]


def uniform(
    advantages: Tensor, gap: Tensor, mask: Tensor, *, lam: float = 0.0, epsilon_w: float = 0.0
) -> Tensor:
    """GRPO: every token of a rollout receives the rollout's advantage (Eq. 2). (N,) -> (N, T)."""
    _check_shapes(advantages, gap, mask)
    return advantages[:, None].expand_as(gap)


def silent(
    advantages: Tensor, gap: Tensor, mask: Tensor, *, lam: float = 0.0, epsilon_w: float = 0.0
) -> Tensor:
    """No credit at all: pure distillation, where the reward is logged and not used. Zeros (N, T)."""
    _check_shapes(advantages, gap, mask)
    return torch.zeros_like(gap)


def rlsd(
    advantages: Tensor,
    gap: Tensor,
    mask: Tensor,
    *,
    lam: float,
    epsilon_w: float,
    log_clip: bool = False,
    conserve: bool = False,
) -> Tensor:
    """RLSD: A * ((1 - lam) + lam * clip(exp(sign(A) * Delta), 1 - eps, 1 + eps)) (Eq. 15).

    Args: advantages (N,), gap (N, T) in nats, mask (N, T); `lam` in [0, 1], `epsilon_w` >= 0. Not
    in the paper: `log_clip` moves the lower end of the clip to 1 / (1 + eps), as far as the upper
    one in the logarithm; `conserve` divides the clipped weights of a rollout by their mean, so that
    credit moves between its tokens and the rollout as a whole keeps its A.
    Returns (N, T), detached, with the sign of A everywhere and 0 where A = 0.
    """
    return _reweight(signed_evidence, advantages, gap, mask, lam, epsilon_w, log_clip, conserve)


def rlsd_neutral(
    advantages: Tensor,
    gap: Tensor,
    mask: Tensor,
    *,
    lam: float,
    epsilon_w: float,
    log_clip: bool = False,
    conserve: bool = False,
) -> Tensor:
    """RLSD with a weight that is blind to the sign of A: exp(abs(Delta)), clipped alike.

    At a token where A has mean zero and is uncorrelated with the weight, E[A w] = 0 and the token
    is not moved; under `rlsd` the same token drifts towards the teacher by E|A| sinh(Delta)
    (unclipped, lam = 1). Group normalisation gives mean zero over a group and not at each prefix,
    so on real rollouts lam * Cov(A, w) remains. Shapes and options as in `rlsd`.
    """
    return _reweight(neutral_evidence, advantages, gap, mask, lam, epsilon_w, log_clip, conserve)


def sampled_distillation(
    advantages: Tensor, gap: Tensor, mask: Tensor, *, lam: float = 1.0, epsilon_w: float = 0.0
) -> Tensor:
    """Sampled-token self-distillation: A_t = Delta_t, the score-function form of reverse KL (Eq. 17).

    The reward does not enter. Masked positions get 0. Shapes as in `rlsd`.
    """
    _check_shapes(advantages, gap, mask)
    return gap.detach() * mask


def signed_evidence(advantages: Tensor, gap: Tensor) -> Tensor:
    """Log of RLSD's weight before clipping, sign(A) * Delta (Eq. 14). (N,), (N, T) -> (N, T)."""
    return advantages.sign()[:, None] * gap


def neutral_evidence(advantages: Tensor, gap: Tensor) -> Tensor:
    """Log of the sign-free weight, abs(Delta); 0 where A = 0. (N,), (N, T) -> (N, T)."""
    return advantages.sign().abs()[:, None] * gap.abs()


def clip_ends(epsilon_w: float, *, log_clip: bool = False) -> tuple[float, float]:
    """Lowest and highest weight: 1 -+ eps (never below 0), or 1 / (1 + eps) and 1 + eps."""
    return (1.0 / (1.0 + epsilon_w) if log_clip else max(1.0 - epsilon_w, 0.0)), 1.0 + epsilon_w


def clipped_weight(log_weight: Tensor, epsilon_w: float, *, log_clip: bool = False) -> Tensor:
    """clip(exp(log_weight), *clip_ends), finite for every finite input. (N, T) -> (N, T).

    With eps > 1 the lower side of the paper's clip is open, because a weight is never negative.
    """
    # The cap in log space keeps exp finite; the clamp after it makes the bounds exact.
    cap = torch.log1p(torch.tensor(epsilon_w, dtype=torch.float64)).item() + 1.0
    return log_weight.clamp(max=cap).exp().clamp(*clip_ends(epsilon_w, log_clip=log_clip))


def lambda_schedule(step: int, init: float, warmup_steps: int, decay_steps: int) -> float:
    """lambda_k: linear from 0 to `init` over the warm-up, then linear to 0 over the decay.

    `step` counts finished optimiser steps, so the first update uses step 0. `decay_steps=0` keeps
    lambda at `init` after the warm-up.
    """
    if step < warmup_steps:
        return init * step / warmup_steps
    if decay_steps == 0:
        return init
    return init * max(1.0 - (step - warmup_steps) / decay_steps, 0.0)


Sums = dict[str, tuple[Tensor, Tensor]]


def gap_sums(gap: Tensor, mask: Tensor) -> Sums:
    """Numerators and denominators of the gap's means over the mask, for ranks to add up."""
    gap, tokens = torch.where(mask.bool(), gap.detach(), 0.0), mask.sum()
    return {"gap_mean": (gap.sum(), tokens), "gap_abs_mean": (gap.abs().sum(), tokens)}


def weight_sums(
    log_weight: Tensor, mask: Tensor, epsilon_w: float, *, log_clip: bool = False
) -> Sums:
    """Numerators and denominators of the weight's mean and clipped shares over the mask."""
    tokens = mask.sum()
    log_weight = torch.where(mask.bool(), log_weight.detach(), 0.0)
    weight = log_weight.clamp(max=80.0).exp()
    low, high = clip_ends(epsilon_w, log_clip=log_clip)
    return {
        "weight_mean": ((weight.clamp(low, high) * mask).sum(), tokens),
        "clip_low_frac": (((weight < low) * mask).sum(), tokens),
        "clip_high_frac": (((weight > high) * mask).sum(), tokens),
    }


def intervention_sums(credited: Tensor, advantages: Tensor, mask: Tensor) -> Sums:
    """Numerator and denominator of mean abs(A_hat / A - 1) over masked-in tokens with A != 0."""
    scored = mask * (advantages != 0)[:, None]
    safe = torch.where(advantages == 0, torch.ones_like(advantages), advantages)[:, None]
    moved = (credited / safe - 1.0).abs() * scored
    return {"intervention": (moved.sum(), scored.sum())}


def drift_sums(
    credited: Tensor, reversed_credit: Tensor, advantages: Tensor, gap: Tensor, mask: Tensor
) -> Sums:
    """Numerator and denominator of `drift`: the pull to the teacher that no verdict caused.

    `credited` is the credit of A and `reversed_credit` that of -A, both (N, T). Their mean is what
    a token receives when the verdict is a coin flip: 0 for GRPO and for a weight that ignores the
    sign of A, lam * abs(A) * sinh(Delta) for RLSD before clipping. Its sum along the gap, over
    sum abs(A) * abs(Delta), is 1 for reverse-KL self-distillation with the coefficient abs(A).
    """
    gap = torch.where(mask.bool(), gap.detach(), 0.0)
    unjudged = 0.5 * (credited + reversed_credit) * mask
    return {"drift": ((unjudged * gap).sum(), (advantages.abs()[:, None] * gap.abs()).sum())}


def _reweight(
    evidence: Evidence,
    advantages: Tensor,
    gap: Tensor,
    mask: Tensor,
    lam: float,
    epsilon_w: float,
    log_clip: bool,
    conserve: bool,
) -> Tensor:
    _check_shapes(advantages, gap, mask)
    with torch.no_grad():
        keep = mask.bool()
        gap = torch.where(keep, gap, torch.zeros_like(gap))
        weight = clipped_weight(evidence(advantages, gap), epsilon_w, log_clip=log_clip)
        if conserve:
            total = torch.where(keep, weight, 0.0).sum(dim=1, keepdim=True)
            # All weights of a rollout may be 0 with an open lower side: then there is no ratio.
            mean = total / keep.sum(dim=1, keepdim=True).clamp(min=1)
            weight = torch.where(mean > 0, weight / mean, 1.0)
        multiplier = torch.where(keep, (1.0 - lam) + lam * weight, 1.0)
        return advantages[:, None] * multiplier


def _check_shapes(advantages: Tensor, gap: Tensor, mask: Tensor) -> None:
    if advantages.dim() != 1 or gap.shape != mask.shape or gap.shape[:1] != advantages.shape:
        raise ValueError(
            "credit needs advantages (N,), gap (N, T) and mask (N, T); got "
            f"{tuple(advantages.shape)}, {tuple(gap.shape)} and {tuple(mask.shape)}."
        )
