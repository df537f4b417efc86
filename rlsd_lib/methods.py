"""The methods table: token credit, plus a distillation term for some. One row, one method."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
from rlsd_lib.runs.provenance import alike

if TYPE_CHECKING:
    from rlsd_lib.trainer.config import RLSDConfig

# What the teacher of a method is shown beside the student's prompt x.
PRIVILEGED = "privileged"  # the row's reference r
PROMPT = "prompt"  # nothing: x alone
PEER = "peer"  # a successful rollout of the same group


DISTILLATION_MODES = ("full_logits", "topk_logits", "sampled_token")
# Fields that mean something for methods with a distillation term only; None is the method's own.
DISTILLATION_FIELDS = (
    "distillation_mode",
    "distillation_alpha",
    "distillation_topk",
    "distillation_add_tail",
    "distillation_token_clip",
    "distillation_weight",
)
SHOWN = 40  # names that an error lists in full
PEER_FIELDS = ("include_failed_rollout", "include_environment_feedback")


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


def look_up(name: str, names: Iterable[str], what: str) -> str:
    """Return `name` if it is one of `names`.

    Raises:
        ValueError: naming the value, the nearest valid name, and all valid names or, where they are
            many, a few more like it.
    """
    names = list(names)
    if name in names:
        return name
    near = alike(name, names, count=4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    if len(names) <= SHOWN:
        others = f" Valid: {', '.join(names)}."
    elif near:
        others = f" Also like it: {', '.join(near[1:])}." if near[1:] else ""
    else:
        others = f" None of the {len(names)} valid names is like it."
    raise ValueError(f"Unknown {what} {name!r}.{hint}{others}")


def check_peer(args: "RLSDConfig") -> None:
    """Refuse a peer's rollout as the reference where the method shows none.

    Raises:
        ValueError: naming the method.
    """
    if args.peer_context and METHODS[args.method].teacher_sees != PRIVILEGED:
        raise ValueError(
            f"peer_context=True means nothing for method={args.method!r}, whose teacher sees "
            "no privileged_context that a peer could replace. Leave it at False."
        )


def check_weight(args: "RLSDConfig") -> None:
    """Refuse options of the weight where the method has none.

    Raises:
        ValueError: naming both options and the method.
    """
    changed = args.weight_clip != "linear" or args.conserve_credit
    if changed and args.row.evidence is None:
        raise ValueError(
            f"weight_clip={args.weight_clip!r}, conserve_credit={args.conserve_credit!r} mean "
            f"nothing for method={args.method!r}, which has no weight. Leave them alone."
        )


def check_distillation(args: "RLSDConfig") -> None:
    """Refuse options of the distillation term that mean nothing for the method, or too little.

    Raises:
        ValueError: naming the option, its value and what to do.
    """
    given = [name for name in DISTILLATION_FIELDS if getattr(args, name) is not None]
    if given and args.row.divergence is None:
        raise ValueError(
            f"{given[0]}={getattr(args, given[0])!r} means nothing for "
            f"method={args.method!r}, which has no distillation term. Leave it at None."
        )
    foreign = [name for name in PEER_FIELDS if getattr(args, name)]
    if foreign and args.row.teacher_sees != PEER:
        raise ValueError(
            f"{foreign[0]}=True is an option of method='sdpo' and of peer_context=True, not of "
            f"method={args.method!r} with the row's own reference."
        )
    if args.row.needs_weight and args.distillation_weight is None:
        raise ValueError(
            f"method={args.method!r} needs distillation_weight, the factor of its "
            "distillation term: the paper does not report one. Try 0.1."
        )
    mode = args.distillation_mode
    if mode is not None:
        look_up(mode, DISTILLATION_MODES, "distillation_mode")
    if mode == "sampled_token" and args.row.needs_weight:
        raise ValueError("grpo_opsd mixes a loss with a divergence: use full or top-k logits.")
    topk = args.distillation_topk is not None or args.distillation_add_tail is not None
    if topk and mode in ("full_logits", "sampled_token"):
        raise ValueError(
            f"distillation_topk and distillation_add_tail mean nothing with "
            f"distillation_mode={mode!r}. Use 'topk_logits'."
        )
    if mode == "sampled_token" and given != ["distillation_mode"]:
        raise ValueError(
            f"{given[-1]}={getattr(args, given[-1])!r} means nothing with distillation_mode="
            "'sampled_token', whose token advantage is log P_T - log P_S. Leave it at None."
        )
    if args.row.divergence is not None and args.row.divergence.kind.endswith("_top1"):
        _check_top1(args)
    spec = args.divergence  # built here, so that its own checks come now
    if mode == "topk_logits" and spec.top_k is None:
        raise ValueError("distillation_mode='topk_logits' needs distillation_topk, e.g. 100.")


def _check_top1(args: "RLSDConfig") -> None:
    """The top-1 methods are one fixed function: another divergence would be another method."""
    for name in ("distillation_mode", "distillation_alpha"):
        value = getattr(args, name)
        if value not in (None, "full_logits"):
            raise ValueError(
                f"{name}={value!r} means nothing for method={args.method!r}, which looks at "
                "one token. Use method='opsd' with it."
            )
