"""Divergences between the teacher's and the student's next-token distribution, per token.

The distillation terms of arXiv 2604.03128 (Eq. 6, A.3), in the paper's order D(P_T, P_S). To look,
plot and prove: functions of log-probabilities `(..., V)`, and `Divergence`, which names one with
its options. To train: `divergence`, from hidden states and LM heads, a chunk of tokens at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlsd_lib.names import look_up

# Logits per chunk and model. 16 MiB in float32 on a CPU: larger blocks go back to the system at
# every release, which doubled the time. On a GPU larger products fill the device.
CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**24}

# --- divergences of log-probabilities ------------------------------------------------------------


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_v p log(p / q), `(..., V), (..., V) -> (...)`, with 0 log 0 = 0."""
    p = log_p.exp()
    # The choice is made on the gap, not on the product: a gradient of 0 * nan would be nan.
    gap = torch.where(p > 0, log_p - log_q, 0.0)
    return (p * gap).sum(-1)


def forward_kl(log_p_t: Tensor, log_p_s: Tensor) -> Tensor:
    """KL(P_T || P_S), the L_OPSD of Theorem 1. `(..., V), (..., V) -> (...)`.

    Gradient: -sum_v P_T(v) grad log P_S(v), the g(r) of Proposition 1.
    """
    return kl(log_p_t, log_p_s)


def reverse_kl(log_p_t: Tensor, log_p_s: Tensor) -> Tensor:
    """KL(P_S || P_T). `(..., V), (..., V) -> (...)`.

    Gradient: -E_{v ~ P_S}[Delta(v) grad log P_S(v)], Delta = log P_T - log P_S: the row
    "reverse-KL self-distillation" of Eq. 17, with the expectation taken instead of sampled.
    """
    return kl(log_p_s, log_p_t)


def generalised_jsd(log_p_t: Tensor, log_p_s: Tensor, alpha: float = 0.5) -> Tensor:
    """alpha KL(P_T || M) + (1 - alpha) KL(P_S || M), M = alpha P_T + (1 - alpha) P_S.

    `(..., V), (..., V) -> (...)`. `alpha` is TRL's `distillation_alpha`: 0 means the forward KL,
    1 the reverse KL. Those two are set, not reached: the formula vanishes at both ends.
    """
    if alpha in (0.0, 1.0):
        return reverse_kl(log_p_t, log_p_s) if alpha else forward_kl(log_p_t, log_p_s)
    log_m = torch.logaddexp(log_p_t + math.log(alpha), log_p_s + math.log1p(-alpha))
    return alpha * kl(log_p_t, log_m) + (1 - alpha) * kl(log_p_s, log_m)


def teacher_top1(log_p_t: Tensor, log_p_s: Tensor) -> Tensor:
    """Teacher's Top-1 (A.3): -log P_S(v_T*), v_T* = argmax P_T. `(..., V), (..., V) -> (...)`.

    Gradient: -grad log P_S(v_T*), the forward KL with the teacher rounded to its favourite token.
    A loss and not a divergence: at P_S = P_T it is -log max P_S, and still sharpens the student.
    """
    return -_pick(log_p_s, log_p_t.argmax(-1))


def student_top1(log_p_t: Tensor, log_p_s: Tensor) -> Tensor:
    """Student's Top-1 (A.3): P_T(v_S*) / P_S(v_S*), v_S* = argmax P_S. `(..., V) x 2 -> (...)`.

    The gradient has the paper's weight, without a stop-gradient: -w grad log P_S(v_S*), w = P_T(v_S*)
    / P_S(v_S*) <= V. The other reading of A.3, w on grad P_S(v_S*), is the v_S* term of the forward
    KL: the same direction, shorter by P_S(v_S*). A loss and not a divergence: 1 at P_S = P_T.
    """
    top = log_p_s.argmax(-1)
    return (_pick(log_p_t, top) - _pick(log_p_s, top)).exp()


def on_support(log_p: Tensor, ids: Tensor, add_tail: bool) -> Tensor:
    """`log_p` `(..., V)` on the tokens `ids` `(..., K)`: `(..., K)`, or `(..., K + 1)` with a tail.

    Without a tail the K probabilities are rescaled to sum to 1 (TRL's choice): what is outside is
    not seen at all. With it, one more bucket holds the rest of the mass, so a divergence of the
    result is a lower bound of the full one (data processing), and the full one at K = V.
    """
    kept = log_p.gather(-1, ids)
    if not add_tail:
        return kept.log_softmax(-1)
    if ids.shape[-1] == log_p.shape[-1]:
        return kept
    # Summed over the tail itself: 1 - sum(kept) has no correct digit left when the tail is small.
    tail = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([kept, tail], -1)


def _pick(log_p: Tensor, ids: Tensor) -> Tensor:
    """log_p[..., ids]: `(..., V), (...) -> (...)`."""
    return log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": generalised_jsd,
    "teacher_top1": teacher_top1,
    "student_top1": student_top1,
}


@dataclass(frozen=True)
class Divergence:
    """Which divergence, on which tokens. Call it on log-probabilities: `(..., V) x 2 -> (...)`.

    ```python
    Divergence("forward_kl")  # full OPSD
    Divergence("jsd", alpha=0.5, top_k=100, add_tail=True)  # SDPO's published setting
    ```
    """

    kind: str = "forward_kl"  # a key of KINDS
    alpha: float | None = None  # jsd only, default 0.5; 0 is the forward KL, 1 the reverse KL
    top_k: int | None = None  # compare on the student's k likeliest tokens only; None is all
    add_tail: bool = False  # with top_k: one bucket for the other tokens, instead of rescaling
    token_clip: float | None = None  # a token above it counts as this much and has no gradient

    def __post_init__(self) -> None:
        kind, alpha, k, clip = self.kind, self.alpha, self.top_k, self.token_clip
        look_up(kind, KINDS, "kind")
        jsd, top1 = kind == "jsd", kind.endswith("_top1")
        for valid, message in (
            (alpha is None or jsd, f"alpha={alpha} means nothing for {kind!r}: use kind='jsd'."),
            (0 <= (alpha or 0) <= 1, f"alpha={alpha}: expected 0 (forward KL) to 1 (reverse KL)."),
            (k is None or not top1, f"top_k={k} means nothing for {kind!r}: drop it, or use a KL."),
            (k is None or k >= 1, f"top_k={k}: expected at least 1, or None for all tokens."),
            (k or not self.add_tail, "add_tail means nothing without top_k: set top_k."),
            (clip is None or clip > 0, f"token_clip={clip}: expected above 0, or None for none."),
        ):
            _require(valid, message)

    def __call__(self, log_p_t: Tensor, log_p_s: Tensor) -> Tensor:
        """D(P_T, P_S) per token, `(..., V), (..., V) -> (...)`; no gradient for the teacher."""
        log_p_t = log_p_t.detach()
        if self.top_k is not None:
            k, vocab = self.top_k, log_p_s.shape[-1]
            _require(k <= vocab, f"top_k={k}: expected at most the vocabulary's {vocab}, or None.")
            ids = log_p_s.detach().topk(k, -1).indices
            log_p_t = on_support(log_p_t, ids, self.add_tail)
            log_p_s = on_support(log_p_s, ids, self.add_tail)
        options = {} if self.alpha is None else {"alpha": self.alpha}
        value = KINDS[self.kind](log_p_t, log_p_s, **options)
        return value if self.token_clip is None else value.clamp(max=self.token_clip)


# --- from hidden states, in chunks ---------------------------------------------------------------


def divergence(
    spec: Divergence,
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    mask: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Tensor:
    """D(P_T, P_S) per token, `(N, T)`, without the `(N, T, V)` logits of either model.

    Hidden states `(N, T, H)` and `(N, T, H')`, heads `(V, H)` and `(V, H')`, biases `(V,)`, mask
    `(N, T)`. P = softmax((hidden @ head.T + bias) / temperature); the value is not rescaled by the
    temperature. Computed in float32, or in float64 if any input is, under autocast too.

    The gradient goes to the student's hidden states, head and bias. Where `mask` is 0 the result
    is exactly 0, nothing is computed and no gradient flows, whatever stands there (NaN included);
    where it is 0 everywhere, the result stays attached, so that no rank drops out of a reduction.
    Memory and time depend on `chunk_size` tokens, the result does not. Gather sharded heads first.
    """
    student = _Model(student_hidden, student_head, student_bias)
    teacher = _Model(teacher_hidden, teacher_head, teacher_bias)
    _check(student, teacher, mask)
    _require(temperature > 0, f"temperature={temperature}: expected above 0 (1.0 for no change).")
    if chunk_size is None:
        chunk_size = max(1, CHUNK_LOGITS.get(mask.device.type, 2**22) // len(student_head))
    _require(chunk_size >= 1, f"chunk_size={chunk_size}: expected at least 1 token, or None.")
    dtypes = (x.dtype for x in student + teacher if x is not None)
    dtype, mask = reduce(torch.promote_types, dtypes, torch.float32), mask.bool()
    values = _ChunkedDivergence.apply(
        spec,
        chunk_size,
        *student.selected(mask, dtype, temperature),
        *(x if x is None else x.detach() for x in teacher.selected(mask, dtype, temperature)),
    )
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


@torch.no_grad()
def teacher_contrast(
    hidden: Tensor,
    wrong_hidden: Tensor,
    head: Tensor,
    mask: Tensor,
    *,
    bias: Any = None,
    **how: Any,
) -> Tensor:
    """K_t = KL(P_T(. | r) || P_T(. | r')) in nats: what the right reference r changes. `(N, T)`.

    `hidden` and `wrong_hidden` `(N, T, H)` are one teacher's states under r and under a wrong
    reference r'. `how` and masked positions as in `divergence`. No gradient.
    """
    states = wrong_hidden, head, hidden, head
    how |= {"student_bias": bias, "teacher_bias": bias}
    return divergence(Divergence("forward_kl"), *states, mask, **how)


@torch.no_grad()
def teacher_entropy(
    hidden: Tensor, head: Tensor, mask: Tensor, *, bias: Any = None, **how: Any
) -> Tensor:
    """H_t = log V - KL(P_T || uniform), the entropy of the teacher in nats. `(N, T)`.

    `hidden` `(N, T, H)`, `head` `(V, H)`; `how` and masked positions as in `divergence`. No gradient.
    """
    uniform = hidden.new_zeros(*mask.shape, 1), head.new_zeros(len(head), 1)
    models = *uniform, hidden, head
    below_uniform = divergence(Divergence("forward_kl"), *models, mask, teacher_bias=bias, **how)
    return torch.where(mask.bool(), math.log(len(head)) - below_uniform, 0.0)


class _Model(NamedTuple):
    hidden: Tensor  # (N, T, H), or (M, H) once selected
    head: Tensor  # (V, H)
    bias: Tensor | None  # (V,)

    def selected(self, mask: Tensor, dtype: torch.dtype, temperature: float) -> _Model:
        """The M tokens under the mask, the temperature moved from the logits to what is small."""
        bias = None if self.bias is None else self.bias.to(dtype) / temperature
        return _Model(self.hidden[mask].to(dtype) / temperature, self.head.to(dtype), bias)

    def logits(self, rows: slice) -> Tensor:
        # Autocast would round the logits to half precision, and the divergence with them.
        with torch.autocast(self.head.device.type, enabled=False):
            logits = self.hidden[rows] @ self.head.T
        return logits if self.bias is None else logits.add_(self.bias)


class _ChunkedDivergence(torch.autograd.Function):
    """Forward keeps no logits; backward makes each chunk's again and adds up gradients in place.

    `torch.utils.checkpoint` per chunk is shorter, but allocates a (V, H) gradient for each chunk.
    """

    @staticmethod
    def forward(ctx: Any, spec: Divergence, size: int, *tensors: Tensor | None) -> Tensor:
        ctx.spec, ctx.size = spec, size
        ctx.save_for_backward(*tensors)
        student, teacher = _Model(*tensors[:3]), _Model(*tensors[3:])
        values = student.hidden.new_empty(len(student.hidden))
        for rows in (slice(i, i + size) for i in range(0, len(values), size)):
            log_p_t = teacher.logits(rows).log_softmax(-1)
            values[rows] = spec(log_p_t, student.logits(rows).log_softmax(-1))
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher = _Model(*ctx.saved_tensors[:3]), _Model(*ctx.saved_tensors[3:])
        wanted = zip(student, ctx.needs_input_grad[2:5], strict=True)
        hidden, head, bias = (torch.zeros_like(x) if needed else None for x, needed in wanted)
        for rows in (slice(i, i + ctx.size) for i in range(0, len(grad), ctx.size)):
            g = _grad_logits(ctx.spec, student, teacher, rows, grad[rows])
            if hidden is not None:
                torch.mm(g, student.head, out=hidden[rows])
            if head is not None:
                head.addmm_(g.T, student.hidden[rows])
            if bias is not None:
                bias += g.sum(0)
        return None, None, hidden, head, bias, None, None, None


def _grad_logits(spec: Divergence, s: _Model, t: _Model, rows: slice, grad: Tensor) -> Tensor:
    """Gradient of sum(grad * D) in the student's logits, `(rows,) -> (rows, V)`."""
    log_p_t, logits = t.logits(rows).log_softmax(-1), s.logits(rows).requires_grad_()
    with torch.enable_grad():
        values = spec(log_p_t, logits.log_softmax(-1))
    return torch.autograd.grad(values, logits, grad)[0]


def _check(student: _Model, teacher: _Model, mask: Tensor) -> None:
    for who, (hidden, head, _) in (("student", student), ("teacher", teacher)):
        shapes, width = (*map(tuple, (hidden.shape, head.shape, mask.shape)),), hidden.shape[-1]
        _require(
            shapes[:2] == ((*mask.shape, width), (len(head), width)),
            f"{who}_hidden, {who}_head, mask are {shapes}: expected (N, T, H), (V, H), (N, T). "
            "Keep the positions that predict the completion's tokens; pass the Linear's `weight`.",
        )
    sizes = len(student.head), len(teacher.head)
    _require(
        sizes[0] == sizes[1],
        f"student_head and teacher_head have {sizes} tokens: expected one vocabulary. Use a "
        "teacher with the student's tokenizer; if only padding rows differ, cut both heads.",
    )


def _require(valid: bool, message: str) -> None:
    if not valid:
        raise ValueError(message)
