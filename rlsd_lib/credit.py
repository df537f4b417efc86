"""Token credit: how one advantage per rollout becomes one advantage per token.

Every method of the GRPO family in this project is one function of this file. All share a signature:

    advantages (N,), gap (N, T), mask (N, T)  ->  token advantages (N, T)

where N counts rollouts and T completion positions. The gap is the privileged information gain
Delta_t = log P_T(y_t) - log P_S(y_t) of the sampled tokens (Eq. 13 of arXiv 2604.03128), in nats.
The mask is 1 on tokens that the policy wrote and that the method may move. Where it is 0 the
advantage is returned unchanged: a rollout without a reference keeps GRPO's credit. (`silent` and
`sampled_distillation`, which use no reward, return 0 there, and `scaled` a multiple.) What else a
function needs it names as a keyword: `lam`, `epsilon_w`, what the trainer knows,

    success (N,)              whether the rollout was right, as bool; False where none could score it
    group_success (N,)        share of right rollouts among the others of its group: `leave_one_out`
    wrong_gaps (K, N, T)      the gap when the teacher is shown the k-th wrong reference r' in place
                              of r; NaN for one that the rollout lacks
    reference_gap (N, T)      log pi_ref(y_t) - log P_S(y_t), nats
    teacher_entropy (N, T), contrast_kl (N, T)   of the functions of `divergence`
    rewards (N,), entropy (N, T), gate (a number)   see `methods.SIGNALS`
    total (a function)        the sum over all processes of a number that each has of its own rollouts;
                              every process has to call it equally often

and what only the caller of the trainer can give, `RLSDTrainer(signals=...)`,

    thought (N, T)            1 on the tokens of the reasoning span
    first_error (N,)          place of the first wrong token, T for none
    decisions (N, T)          whether a token bears on the answer, as bool
    success_before (N,), success_after (N, T)   the policy's own V_0 and V_t

In this order: the paper; what others published after it; ours; weights of a distillation term;
controls; what is logged. No third-party package but torch is imported here.
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

Evidence = Callable[[Tensor, Tensor], Tensor]
Credit = Callable[..., Tensor]
Total = Callable[[Tensor], Tensor]


def alone(number: Tensor) -> Tensor:
    """The total of the only process."""
    return number


# --- the paper -----------------------------------------------------------------------------------


def uniform(
    advantages: Tensor, gap: Tensor, mask: Tensor, *, lam: float = 0.0, epsilon_w: float = 0.0
) -> Tensor:
    """GRPO: every token of a rollout receives the rollout's advantage (Eq. 2). (N,) -> (N, T)."""
    _check_shapes(advantages, gap, mask)
    return advantages[:, None].expand_as(gap)


def scaled(advantages: Tensor, gap: Tensor, mask: Tensor, *, policy_weight: float) -> Tensor:
    """`policy_weight` times GRPO's: the policy's part beside a distillation term. (N,) -> (N, T)."""
    return policy_weight * uniform(advantages, gap, mask)


def silent(advantages: Tensor, gap: Tensor, mask: Tensor) -> Tensor:
    """No credit at all: pure distillation, where the reward is logged and not used. Zeros (N, T)."""
    _check_shapes(advantages, gap, mask)
    return torch.zeros_like(gap)


@torch.no_grad()
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
    Returns (N, T), detached, nowhere against the sign of A, and 0 where A = 0.
    """
    keep, advantage, gap = _prepared(advantages, gap, mask)
    weight = clipped_weight(signed_evidence(advantages, gap), epsilon_w, log_clip=log_clip)
    if conserve:
        weight = _mean_one(weight, keep)
    return advantage * torch.where(keep, (1.0 - lam) + lam * weight, 1.0)


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
    # Signed, so that `rlsd` takes the sign away again.
    signed = advantages.sign()[:, None] * neutral_evidence(advantages, gap)
    how = {"log_clip": log_clip, "conserve": conserve}
    return rlsd(advantages, signed, mask, lam=lam, epsilon_w=epsilon_w, **how)


def sampled_distillation(advantages: Tensor, gap: Tensor, mask: Tensor) -> Tensor:
    """Sampled-token self-distillation: A_t = Delta_t, the score-function form of reverse KL (Eq. 17).

    The reward does not enter. Masked positions get 0. Shapes as in `rlsd`.
    """
    _check_shapes(advantages, gap, mask)
    return torch.where(mask.bool(), gap.detach(), 0.0)


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


# --- published after it --------------------------------------------------------------------------


@torch.no_grad()
def contrast(gap: Tensor, wrong_gaps: Tensor) -> Tensor:
    """log P_T(y_t | r) - log mean_k P_T(y_t | r'_k): what only the right reference says, in nats.

    (N, T), (K, N, T) -> (N, T). Equals Delta - log mean_k exp(Delta'_k), because P_S cancels. The
    mean is over the wrong references that exist; 0 where none does. Raises ValueError on shapes.
    """
    if wrong_gaps.shape[1:] != gap.shape:
        raise ValueError(
            f"wrong_gaps is {tuple(wrong_gaps.shape)}: expected (K, N, T), gap being (N, T) = "
            f"{tuple(gap.shape)}."
        )
    known = ~wrong_gaps.isnan()
    wrong = torch.where(known, wrong_gaps, -math.inf).logsumexp(0)
    wrong = wrong - known.sum(0, dtype=wrong.dtype).log()
    return torch.where(known.any(0), gap - wrong, 0.0)


def cepo(
    advantages: Tensor,
    gap: Tensor,
    mask: Tensor,
    *,
    wrong_gaps: Tensor,
    lam: float = 0.5,
    epsilon_w: float = 0.2,
) -> Tensor:
    """CEPO: `rlsd` with Delta - Delta' in place of Delta, from one wrong answer (2605.19436).

    The wrong answer is the first of `wrong_gaps` (K, N, T); a rollout without one keeps A. Shapes
    as in `rlsd`. Published with lambda from 0.5 to 0 in 25 steps, a live teacher, and epsilon_w 0.2
    (released script) or 0.5 (its README). Keeps the sign of A, and 0 where A = 0; a token that both
    answers explain alike has weight 1. Left out: the script's own learning rate.
    """
    evidence = contrast(gap, wrong_gaps[:1])
    return rlsd(advantages, evidence, mask, lam=lam, epsilon_w=epsilon_w)


def rlsd_contrast(
    advantages: Tensor,
    gap: Tensor,
    mask: Tensor,
    *,
    wrong_gaps: Tensor,
    lam: float = 0.5,
    epsilon_w: float = 0.2,
) -> Tensor:
    """`rlsd` with Delta - log mean_k exp(Delta'_k) in place of Delta (2606.11709, `rlsd_ectr`).

    `wrong_gaps` (K, N, T), other shapes and the settings as in `rlsd`; with K = 1 it is `cepo`.
    Keeps the sign of A, and 0 where A = 0. Left out: the released clamp of the exponent to +-60,
    which the clip of the weight makes idle.
    """
    return rlsd(advantages, contrast(gap, wrong_gaps), mask, lam=lam, epsilon_w=epsilon_w)


@torch.no_grad()
def rlcsd(
    advantages: Tensor,
    gap: Tensor,
    mask: Tensor,
    *,
    wrong_gaps: Tensor,
    total: Total = alone,
    lam: float = 0.5,
    beta: float = 0.2,
    tau: float = 0.03,
    delta: float = 0.02,
    eta: float = 1.0,
    clip: float = 0.5,
) -> Tensor:
    """RLCSD: A + rho on the tokens where the contrast e is large, A on the others (2606.11709).

    rho = beta lam tanh(e / tau), within +-`clip`; a token is selected if abs(rho) > `delta`, and
    A + rho stops at 0, so that the sign of A stays and 0 where A = 0. The published loss is the
    mean over the others plus `eta` times the mean over the selected, each by its own number of
    tokens in the batch; here the credit is scaled by those counts, so that one mean over all tokens
    (`loss_type` "dapo", on one process "bnpo" too) gives that loss. Rows of one call therefore
    depend on each other, and a few selected tokens get large credit. A deviation: the counts are of
    one call, a micro-batch of all processes, so that accumulation changes the credit. Defaults are
    the released code's; its scripts have tau 0.02, beta 1, clip 2. Needs `wrong_gaps` (K, N, T),
    K <= 4; other shapes as in `rlsd`.
    """
    keep, advantage, evidence = _prepared(advantages, contrast(gap, wrong_gaps), mask)
    rho = (beta * lam * (evidence / tau).tanh()).clamp(-clip, clip)
    selected = rho.abs() > delta  # never outside the mask, where the evidence is 0
    moved = advantage.sign() * (advantage.abs() + advantage.sign() * rho).clamp(min=0.0)
    tokens, chosen = (total(found.sum(dtype=rho.dtype)) for found in (keep, selected))
    others = tokens / (tokens - chosen) * advantage
    return torch.where(
        keep, torch.where(selected, eta * tokens / chosen * moved, others), advantage
    )


def rlrt(
    advantages: Tensor, gap: Tensor, mask: Tensor, *, lam: float = 0.5, epsilon_w: float = 1.0
) -> Tensor:
    """RLRT: `rlsd` with the teacher reversed, -Delta, where A > 0; A elsewhere (2605.10781).

    It credits what a right rollout did against the teacher. Shapes as in `rlsd`. Published with
    lambda 0.5, epsilon_w 1, 0.5 or 0.2 by model, and an own right rollout as the reference (peer).
    Keeps the sign of A, and 0 where A = 0.
    """
    reversed_rlsd = rlsd(advantages, -gap, mask, lam=lam, epsilon_w=epsilon_w)
    return torch.where((advantages > 0)[:, None], reversed_rlsd, advantages[:, None])


@torch.no_grad()
def antisd(
    advantages: Tensor, gap: Tensor, mask: Tensor, *, lam: float = 0.5, gate: float = 1.0
) -> Tensor:
    """AntiSD: A - lam gate (softplus(Delta) - log 2) / 2, Delta within +-5 (2605.11609).

    The added term ascends a Jensen-Shannon divergence to the teacher; it lies within
    lam [-2.16, 0.34], lowers what the teacher favours, and acts where A = 0 too: the sign of A may
    turn. `gate` is 0 while the mean entropy lies below 0.93 of its value in the warm-up, else 1;
    whoever calls keeps that memory. Published with lambda 0.5. Shapes as in `rlsd`.
    """
    keep, advantage, gap = _prepared(advantages, gap, mask)
    pull = (softplus(gap.clamp(-5.0, 5.0)) - math.log(2)) / 2
    return torch.where(keep, advantage - lam * gate * pull, advantage)


@torch.no_grad()
def sdar(
    advantages: Tensor,
    gap: Tensor,
    mask: Tensor,
    *,
    coefficient: float = 0.1,
    beta: float = 5.0,
) -> Tensor:
    """SDAR: A + c sigmoid(beta Delta) (2605.15155).

    The paper adds the loss c mean(sg[sigmoid(beta Delta)] Delta); this is its gradient as credit,
    equal to it while P_S is the policy that wrote the rollout. Every token is lifted, by 0 to c, and
    the teacher only gates: the sign of A may turn, and A = 0 gets credit. At c = 0 it is GRPO.
    Published with c = 0.1, beta = 5. Shapes as in `rlsd`.
    """
    keep, advantage, gap = _prepared(advantages, gap, mask)
    return torch.where(keep, advantage + coefficient * (beta * gap).sigmoid(), advantage)


@torch.no_grad()
def amr_sd(
    advantages: Tensor,
    gap: Tensor,
    mask: Tensor,
    *,
    lam: float = 0.2,
    gamma_over_lam: float = 0.5,
    tau: float = 0.0,
) -> Tensor:
    """AMR-SD: A (1 + D), D from the side of I = clip(Delta, +-5) that agrees with A (2605.18529).

    D = lam max(0, I - tau) for A >= 0, gamma max(0, -I - tau) for A < 0. Keeps the sign of A, and 0
    where A = 0; never takes credit away. Published with lambda 0.2, gamma 0.1, both to 0 in 50
    steps, hence gamma = `gamma_over_lam` lam; we found no published `tau`, and 0 keeps every token.
    Left out: the reflection that the paper writes between reference and teacher. Shapes as in
    `rlsd`.
    """
    keep, advantage, gap = _prepared(advantages, gap, mask)
    information = gap.clamp(-5.0, 5.0)
    praise = lam * (information - tau).clamp(min=0.0)
    blame = gamma_over_lam * lam * (-information - tau).clamp(min=0.0)
    return torch.where(keep, advantage * (1 + torch.where(advantage < 0, blame, praise)), advantage)


@torch.no_grad()
def srpo(advantages: Tensor, gap: Tensor, mask: Tensor) -> Tensor:
    """SRPO's policy part: A where A > 0, 0 elsewhere (2604.02288).

    The other rollouts, A = 0 among them, are distilled instead: JSD(0.5) on the top 100 and a tail,
    each token weighted by `srpo_weight`, an ema teacher at 0.95. Shapes as in `rlsd`; the gap is
    not used. Left out: the importance ratio on the distillation term, 1 for rollouts used once.
    """
    keep, advantage, _ = _prepared(advantages, gap, mask)
    return torch.where(keep, advantage.clamp(min=0.0), advantage)


@torch.no_grad()
def sdpg(
    advantages: Tensor, gap: Tensor, mask: Tensor, *, reference_gap: Tensor, alpha: float = 1e-3
) -> Tensor:
    """SDPG's policy part: A + alpha log(pi_ref / P_S) (2606.04036).

    The second term is minus the gradient of (alpha / 2) log(P_S / pi_ref)^2 as credit, equal to it
    while P_S is the policy that wrote the rollout; the sign of A may turn, and A = 0 gets credit.
    Published with alpha 1e-3, beside 1e-3 times KL(P_S || P_T), optionally where A > 0 only.
    Needs `reference_gap` (N, T); other shapes as in `rlsd`; the gap is not used. pi_ref is
    TRL's reference model: with `beta = 0` there is none and the trainer's credit is plain A; with
    `beta > 0` TRL's own beta KL(P_S || pi_ref) comes on top of this pull.
    """
    keep, advantage, reference_gap = _prepared(advantages, reference_gap, mask)
    return torch.where(keep, advantage + alpha * reference_gap, advantage)


def rlsd_negative_only(
    advantages: Tensor, gap: Tensor, mask: Tensor, *, lam: float = 0.5, epsilon_w: float = 0.2
) -> Tensor:
    """`rlsd` where A < 0, A elsewhere (ms-swift's `rlsd_negative_only`). Shapes as in `rlsd`."""
    weighted = rlsd(advantages, gap, mask, lam=lam, epsilon_w=epsilon_w)
    return torch.where((advantages < 0)[:, None], weighted, advantages[:, None])


def rlsd_thought_only(
    advantages: Tensor,
    gap: Tensor,
    mask: Tensor,
    *,
    thought: Tensor,
    lam: float = 0.5,
    epsilon_w: float = 0.2,
) -> Tensor:
    """`rlsd` on the reasoning span `thought` (N, T), A elsewhere (the paper's released code)."""
    return rlsd(advantages, gap, mask * thought, lam=lam, epsilon_w=epsilon_w)


# --- ours ----------------------------------------------------------------------------------------


def leave_one_out(success: Tensor, group_size: int) -> Tensor:
    """Share of right rollouts among the others of each group: (N,) in groups of neighbours -> (N,).

    It does not depend on the rollout's own outcome. `success` is bool, or a number that is NaN for
    a rollout that nobody scored: that one is no one's other, and where it leaves nobody the share
    is 1/2. Raises ValueError for groups of one.
    """
    if group_size < 2:
        raise ValueError(f"group_size={group_size}: expected at least 2, to leave one out.")
    groups = success.float().view(-1, group_size)
    scored, right = ~groups.isnan(), groups.nan_to_num(nan=0.0)
    others = scored.sum(1, keepdim=True) - scored.long()
    shares = (right.sum(1, keepdim=True) - right) / others.clamp(min=1)
    return torch.where(others > 0, shares, 0.5).flatten()


@torch.no_grad()
def value(group_success: Tensor, gap: Tensor, mask: Tensor, *, floor: float = 1 / 16) -> Tensor:
    """V_t, the success probability after t tokens as the teacher sees it: (N, T + 1), V_0 first.

    V_0 is `group_success` (N,) within [floor, 1 - floor], V_t = min(V_0 exp(sum_{s <= t} Delta_s),
    1). Exact for the hindsight teacher P_T(v) = P_S(v | success), whose ratio P_T / P_S is
    Q(y_<t, v) / V(y_<t) by Bayes' rule. Masked tokens change nothing. In groups of G the success of
    the others has G values: at G = 2 it is one bit, V_0 is `floor` or 1 - `floor`, and after the
    latter the bound at 1 cuts nearly all that a token could add.
    """
    log_prior = group_success.to(gap.dtype).clamp(floor, 1 - floor).log()[:, None]
    evidence = torch.where(mask.bool(), gap, 0.0).cumsum(1)
    return torch.cat([log_prior, log_prior + evidence], dim=1).clamp(max=0.0).exp()


@torch.no_grad()
def privileged_baseline(
    advantages: Tensor, gap: Tensor, mask: Tensor, *, success: Tensor, group_success: Tensor
) -> Tensor:
    """(R - V_{t-1}) / sigma: the teacher's value of the prefix as a baseline. Ours.

    R is `success` (N,), sigma^2 = V_0 (1 - V_0), `value` gives V. The baseline depends on y_<t, x
    and r alone, so for every teacher the gradient is unbiased up to sigma, which the group's other
    rollouts set: no drift. The other end of the same GAE is `hindsight`. Positive for right rollouts
    and negative for wrong ones; a group without spread (A = 0) has credit, because V_0 is never 0
    or 1. Shapes as in `rlsd`.
    """
    keep, advantage, gap = _prepared(advantages, gap, mask)
    values = value(group_success, gap, mask)
    surprise = success[:, None].to(gap.dtype) - values[:, :-1]
    return torch.where(keep, surprise / _deviation(values), advantage)


@torch.no_grad()
def hindsight(advantages: Tensor, gap: Tensor, mask: Tensor, *, group_success: Tensor) -> Tensor:
    """(V_t - V_{t-1}) / sigma: what token t changed in the teacher's value. Ours.

    V and sigma as in `privileged_baseline`, of which it is at each token the conditional mean given
    y_<=t if P_T is the hindsight teacher: the same gradient, with less variance where prefixes share
    no parameters and mostly also where they do. With another teacher it is biased. 0 on tokens where
    teacher and student agree; sums to (V_T - V_0) / sigma. The rollout's own reward and A do not
    enter, so a silent teacher teaches nothing, the sign of A does not stay, and A = 0 gets credit.
    Shapes as in `rlsd`.
    """
    keep, advantage, gap = _prepared(advantages, gap, mask)
    values = value(group_success, gap, mask)
    return torch.where(keep, values.diff(dim=1) / _deviation(values), advantage)


def hindsight_gated(
    advantages: Tensor,
    gap: Tensor,
    mask: Tensor,
    *,
    group_success: Tensor,
    wrong_gaps: Tensor,
    tau: float = 1.0,
) -> Tensor:
    """`hindsight` with g_t Delta_t in place of Delta_t, g_t = abs(e_t) / (abs(e_t) + tau). Ours.

    e = Delta - log mean_k exp(Delta'_k) is what the right reference says and wrong ones do not: a
    token that the teacher likes whatever it reads, such as the beginning of a quotation, is no
    evidence of success. A rollout without a wrong reference has no credit. Biased also where P_T is
    the hindsight teacher. `wrong_gaps` (K, N, T), tau in nats; the rest as in `hindsight`.
    """
    size = contrast(gap, wrong_gaps).abs()
    return hindsight(advantages, size / (size + tau) * gap, mask, group_success=group_success)


@torch.no_grad()
def posterior_blame(
    advantages: Tensor, gap: Tensor, mask: Tensor, *, group_success: Tensor
) -> Tensor:
    """A where A >= 0; A n q_t where A < 0, q_t in proportion to max(V_{t-1} - V_t, 0). Ours.

    q sums to 1 over the rollout's n tokens, so that its total stays A n: q is a posterior over the
    token that went wrong, and moving all blame by it is the least-squares weight. Blame in one
    place has a larger square than blame spread out: more variance than GRPO, and more signal to it.
    Uniform if no token lowers V. Keeps the sign of A (or 0), and 0 where A = 0. Biased. Shapes as
    in `rlsd`.
    """
    keep, advantage, gap = _prepared(advantages, gap, mask)
    drop = -value(group_success, gap, mask).diff(dim=1)
    return torch.where(advantage < 0, advantage * _mean_one(drop.clamp(min=0.0), keep), advantage)


# --- weights of a distillation term: the same arguments, weights (N, T) of D(P_T, P_S) -----------


@torch.no_grad()
def srpo_weight(
    advantages: Tensor,
    gap: Tensor,
    mask: Tensor,
    *,
    teacher_entropy: Tensor,
    total: Total = alone,
    beta: float = 1.0,
) -> Tensor:
    """SRPO: exp(-beta H_T) on rollouts with A <= 0, of mean 1 over their tokens (2604.02288).

    `teacher_entropy` (N, T) in nats, beta 1 as published. A deviation: the mean is over the batch of
    the call, a micro-batch of all processes, so that accumulation changes the weight. 0 on the other
    rollouts and outside the mask. -> (N, T).
    """
    keep, advantage, entropy = _prepared(advantages, teacher_entropy, mask)
    routed = keep & (advantage <= 0)
    weight = torch.where(routed, (-beta * entropy).exp(), 0.0)
    mean = total(weight.sum()) / total(routed.sum(dtype=weight.dtype))
    return torch.where(routed, weight / mean.clamp(min=torch.finfo(mean.dtype).tiny), 0.0)


@torch.no_grad()
def opsd_value(advantages: Tensor, gap: Tensor, mask: Tensor) -> Tensor:
    """min(exp(sum_{s < t} Delta_s), 1): a lost prefix teaches nothing. Ours. -> (N, T) in [0, 1].

    With h the hindsight teacher, grad J = -E_{y ~ P_S} sum_t V(y_<t) grad KL(h_t || P_S): forward-KL
    OPSD is the all-action policy gradient, if P_T = h and each prefix has the weight V. The weight
    here is min(V_{t-1} / V_0, 1), whatever V_0 is: the identity holds per prompt up to the factor
    V_0, so that a prompt that is rarely solved is taught as much as another. The bound 1 keeps
    OPSD's scale and leaves the identity on prefixes that are better than the start. 0 outside the
    mask.
    """
    keep, _, gap = _prepared(advantages, gap, mask)
    before = pad(gap[:, :-1].cumsum(1), (1, 0))
    return torch.where(keep, before.clamp(max=0.0).exp(), 0.0)


@torch.no_grad()
def opsd_contrast(
    advantages: Tensor, gap: Tensor, mask: Tensor, *, contrast_kl: Tensor, tau: float = 1.0
) -> Tensor:
    """K_t / (K_t + tau), K_t = KL(P_T(. | r) || P_T(. | r')) (RLCSD's `opsd_ectr`, 2606.11709).

    What the teacher says under any reference is format; only what the right one changes is taught.
    `contrast_kl` (N, T) in nats is `divergence.teacher_contrast`; tau 1 as released. Left out: the
    target that the released code moves away from r' (its alpha 0.5), and its top-k. In [0, 1]; 0
    where r' says the same as r, for every tau, and outside the mask. -> (N, T).
    """
    _, _, contrast_kl = _prepared(advantages, contrast_kl, mask)
    # Written so that an infinite K gives 1; outside the mask K is 0.
    return torch.where(contrast_kl <= 0, 0.0, 1 / (1 + tau / contrast_kl))


def opsd_value_contrast(
    advantages: Tensor,
    gap: Tensor,
    mask: Tensor,
    *,
    contrast_kl: Tensor,
    tau: float = 1.0,
) -> Tensor:
    """The product of `opsd_value` and `opsd_contrast`: both faults of OPSD mended. Ours."""
    by_value = opsd_value(advantages, gap, mask)
    return by_value * opsd_contrast(advantages, gap, mask, contrast_kl=contrast_kl, tau=tau)


# --- controls ------------------------------------------------------------------------------------


@torch.no_grad()
def raft(advantages: Tensor, gap: Tensor, mask: Tensor, *, success: Tensor) -> Tensor:
    """R on every token: right rollouts are imitated, wrong ones left out (RAFT, 2304.06767).

    What a credit gains over GRPO because right rollouts of groups without contrast count, whatever
    it says of tokens. R is `success` (N,); the gap is not used. Other shapes as in `rlsd`.
    """
    keep, advantage, gap = _prepared(advantages, gap, mask)
    return torch.where(keep, success[:, None].to(gap.dtype), advantage)


@torch.no_grad()
def oracle(
    advantages: Tensor, gap: Tensor, mask: Tensor, *, first_error: Tensor, decisions: Tensor
) -> Tensor:
    """A moved to where a rollout went wrong, on tasks that know it: the most that reweighting can find.

    Where A < 0 all blame is on the first wrong token, `first_error` (N,) long, T for none; where
    A > 0 all credit is shared by the tokens that bear on the answer, `decisions` (N, T) bool. The
    total of a rollout stays A times its length, and the sign of A stays (or 0). Uniform where the
    rollout has no such token. Shapes as in `rlsd`; the gap is not used.
    """
    keep, advantage, gap = _prepared(advantages, gap, mask)
    positions = torch.arange(gap.size(1), device=gap.device)
    chosen = torch.where(advantage < 0, positions == first_error[:, None], decisions.bool())
    return advantage * _mean_one(chosen.to(gap.dtype), keep)


@torch.no_grad()
def oracle_value(
    advantages: Tensor,
    gap: Tensor,
    mask: Tensor,
    *,
    success_before: Tensor,
    success_after: Tensor,
    floor: float = 1 / 16,
) -> Tensor:
    """(V_t - V_{t-1}) / sigma with the policy's true V: the advantage function itself.

    What `hindsight` estimates, and the credit of least variance among the unbiased ones. V_0 is
    `success_before` (N,), V_t `success_after` (N, T), sigma^2 = V_0 (1 - V_0) with V_0 within
    [floor, 1 - floor]. 0 on tokens that decide nothing; sums to (R - V_0) / sigma. As in `hindsight`,
    rollouts of a group that agree have credit, and A does not enter. Shapes as in `rlsd`.
    """
    keep, advantage, gap = _prepared(advantages, gap, mask)
    values = torch.cat([success_before[:, None], success_after], dim=1).to(gap.dtype)
    # Behind a token outside the mask V is what it was after the last one inside.
    place = torch.arange(1, gap.size(1) + 1, device=gap.device) * keep
    values = values.gather(1, pad(place, (1, 0)).cummax(dim=1).values)
    sigma = _deviation(values[:, :1].clamp(floor, 1 - floor))
    return torch.where(keep, values.diff(dim=1) / sigma, advantage)


def permuted(credit: Credit, generator: torch.Generator) -> Credit:
    """`credit` with its token advantages shuffled over each rollout's own tokens.

    The multiset of each rollout, and so its scale and sum, stay; what is lost is where the credit
    was put. Asks for the keywords that `credit` asks for. Every call draws another permutation.
    """

    @wraps(credit)
    def shuffled(advantages: Tensor, gap: Tensor, mask: Tensor, **signals: Any) -> Tensor:
        credited, outside = credit(advantages, gap, mask, **signals), ~mask.bool()
        noise = torch.rand(mask.shape, generator=generator, device=generator.device)
        # Both list a rollout's own tokens first and then the others, the others in one order.
        source = noise.to(mask.device).masked_fill(outside, 2.0).argsort(dim=1, stable=True)
        target = outside.long().argsort(dim=1, stable=True)
        return credited.scatter(1, target, credited.gather(1, source))

    return shuffled


# --- what is logged ------------------------------------------------------------------------------

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
    sum abs(A) * Delta^2, is 1 for reverse-KL self-distillation with the coefficient abs(A), whose
    credit is abs(A) * Delta, and close to lam for RLSD while gaps are small and not clipped.
    """
    gap = torch.where(mask.bool(), gap.detach(), 0.0)
    unjudged = 0.5 * (credited + reversed_credit) * mask
    return {"drift": ((unjudged * gap).sum(), (advantages.abs()[:, None] * gap.square()).sum())}


# --- shared by the functions above ---------------------------------------------------------------


def _prepared(advantages: Tensor, gap: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mask as bool (N, T), A (N, 1), and the gap (N, T) with 0 outside the mask."""
    _check_shapes(advantages, gap, mask)
    keep = mask.bool()
    return keep, advantages[:, None], torch.where(keep, gap, 0.0)


def _mean_one(weight: Tensor, keep: Tensor) -> Tensor:
    """Weights >= 0 over their mean in each rollout's own tokens; 1 outside, and if all are 0."""
    weight = torch.where(keep, weight, 0.0)
    mean = weight.sum(dim=1, keepdim=True) / keep.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.where(keep & (mean > 0), weight / mean, 1.0)


def _deviation(values: Tensor) -> Tensor:
    """sigma = sqrt(V_0 (1 - V_0)): (N, T + 1) -> (N, 1)."""
    return (values[:, :1] * (1 - values[:, :1])).sqrt()


def _check_shapes(advantages: Tensor, gap: Tensor, mask: Tensor) -> None:
    if advantages.dim() != 1 or gap.shape != mask.shape or gap.shape[:1] != advantages.shape:
        raise ValueError(
            "credit needs advantages (N,), gap (N, T) and mask (N, T); got "
            f"{tuple(advantages.shape)}, {tuple(gap.shape)} and {tuple(mask.shape)}."
        )
