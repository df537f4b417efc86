"""The methods table: token credit, plus a distillation term for some. One row, one method."""

from dataclasses import dataclass

from rlsd_lib.credit import (
    Credit,
    Evidence,
    neutral_evidence,
    rlsd,
    rlsd_neutral,
    signed_evidence,
    silent,
    uniform,
)
from rlsd_lib.divergence import Divergence

# What the teacher of a method is shown beside the student's prompt x.
PRIVILEGED = "privileged"  # the row's reference r
PROMPT = "prompt"  # nothing: x alone
PEER = "peer"  # a successful rollout of the same group


@dataclass(frozen=True)
class Method:
    """One row of the methods table.

    `credit` spreads the advantage over tokens, and `evidence` is the log of its weight before
    clipping (None where the method has no weight). `divergence` is the distillation term
    D(P_T, P_S), None for none. `teacher_sees` is None for methods without a teacher.
    `needs_weight` marks methods whose two terms have no published ratio.
    """

    summary: str
    credit: Credit = uniform
    evidence: Evidence | None = None
    teacher_sees: str | None = None
    divergence: Divergence | None = None
    needs_weight: bool = False


METHODS: dict[str, Method] = {
    "grpo": Method("one advantage per rollout, the same on every token"),
    "rlsd": Method(
        "advantage times the clipped evidence ratio (P_T / P_S)^sign(A)",
        credit=rlsd,
        evidence=signed_evidence,
        teacher_sees=PRIVILEGED,
    ),
    "rlsd_neutral": Method(
        "advantage times a clipped weight exp(abs(log P_T / P_S)) that does not see the sign of A",
        credit=rlsd_neutral,
        evidence=neutral_evidence,
        teacher_sees=PRIVILEGED,
    ),
    "opd": Method(
        "reverse KL to another model on the same prompt",
        credit=silent,
        teacher_sees=PROMPT,
        divergence=Divergence("reverse_kl"),
    ),
    "opsd": Method(
        "forward KL to the same model that sees the reference",
        credit=silent,
        teacher_sees=PRIVILEGED,
        divergence=Divergence("forward_kl"),
    ),
    "opsd_teacher_top1": Method(
        "OPSD with the teacher rounded to its likeliest token",
        credit=silent,
        teacher_sees=PRIVILEGED,
        divergence=Divergence("teacher_top1"),
    ),
    "opsd_student_top1": Method(
        "OPSD on the student's likeliest token only",
        credit=silent,
        teacher_sees=PRIVILEGED,
        divergence=Divergence("student_top1"),
    ),
    "sdpo": Method(
        "Jensen-Shannon divergence to the same model that sees a successful rollout of the group",
        credit=silent,
        teacher_sees=PEER,
        divergence=Divergence("jsd", alpha=0.5, top_k=100, add_tail=True),
    ),
    "grpo_opsd": Method(
        "the GRPO loss plus a weighted OPSD loss",
        teacher_sees=PRIVILEGED,
        divergence=Divergence("forward_kl"),
        needs_weight=True,
    ),
}
