"""The theory's quantities on a model: gradients of sums over tokens, from plain tensors.

Shapes: student logits (B, T, V) with their graph, teacher logits (B, T, V), sampled tokens (B, T),
mask (B, T) of the positions that count. Gradients come back flat, (P,).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlsd_lib import credit
from rlsd_lib.divergence import reverse_kl


def sampled_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log P(y_t) of the sampled tokens: (B, T, V), (B, T) -> (B, T)."""
    return torch.log_softmax(logits, -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def gradient(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Gradient of a scalar, flattened over all parameters; the graph is kept. () -> (P,)."""
    grads = torch.autograd.grad(value, list(parameters), retain_graph=True)
    return torch.cat([g.flatten() for g in grads])


def credit_gradient(
    student: Tensor, tokens: Tensor, credit: Tensor, mask: Tensor, parameters: Sequence[Tensor]
) -> Tensor:
    """sum_t A_hat_t grad log P_S(y_t), the template of Eq. 17: credit (B, T) -> (P,)."""
    return gradient((sampled_log_probs(student, tokens) * credit * mask).sum(), parameters)


def reverse_kl_gradient(
    student: Tensor, teacher: Tensor, weight: Tensor, mask: Tensor, parameters: Sequence[Tensor]
) -> Tensor:
    """-grad of sum_t weight KL(P_S || P_T) at the visited prefixes, all tokens summed: -> (P,).

    `weight` (B,) scales each rollout; the teacher is held fixed.
    """
    divergence = reverse_kl(teacher.log_softmax(-1).detach(), student.log_softmax(-1))
    return -gradient((divergence * weight.unsqueeze(-1) * mask).sum(), parameters)


def update_gradients(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    advantages: Tensor,
    mask: Tensor,
    parameters: Sequence[Tensor],
    *,
    lam: float,
    epsilon_w: float,
) -> dict[str, Tensor]:
    """GRPO's gradient, what RLSD and sign-free credit add to it, and -grad |A| KL(P_S || P_T).

    Advantages are (B,); the gap is taken from the two sets of logits. Every entry is (P,).
    """
    gap = (sampled_log_probs(teacher, tokens) - sampled_log_probs(student, tokens)).detach()
    plain = advantages.unsqueeze(-1).expand_as(gap)
    credits = {"grpo": plain}
    for name, rule in {"rlsd": credit.rlsd, "sign-free": credit.rlsd_neutral}.items():
        credits[name] = rule(advantages, gap, mask, lam=lam, epsilon_w=epsilon_w) - plain
    found = {
        name: credit_gradient(student, tokens, value, mask, parameters)
        for name, value in credits.items()
    }
    found["reverse KL"] = reverse_kl_gradient(student, teacher, advantages.abs(), mask, parameters)
    return found


def token_gradient_norms(
    student: Tensor, tokens: Tensor, positions: Tensor, parameters: Sequence[Tensor]
) -> Tensor:
    """||grad log P_S(y_t)|| at chosen positions (K, 2) of (rollout, token): -> (K,)."""
    logps = sampled_log_probs(student, tokens)
    return torch.stack([gradient(logps[i, t], parameters).norm() for i, t in positions.tolist()])
