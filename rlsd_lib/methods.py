"""The methods table: token credit, plus a distillation term for some. One row, one method."""

import inspect
from dataclasses import dataclass
from functools import partial

from rlsd_lib import credit
from rlsd_lib.credit import Credit, Evidence, silent, uniform
from rlsd_lib.divergence import Divergence

# What the teacher of a method is shown beside the student's prompt x.
PRIVILEGED = "privileged"  # the row's reference r
PROMPT = "prompt"  # nothing: x alone
PEER = "peer"  # a successful rollout of the same group


# What a credit function or a weight may ask for by name, and who gives it. Everything else that it
# needs is a setting with a default, or comes from `RLSDTrainer(signals=...)`.
SIGNALS = {
    "lam": "the configuration's schedule",
    "epsilon_w": "the configuration",
    "success": "the rewards and success_reward_threshold",
    "rewards": "the reward functions",
    "entropy": "the student",
    "group_success": "the rewards of the others of the group",
    "gate": "the student's entropy over the run",
    "total": "the processes of the run, which have to call it equally often",
    "wrong_gaps": "the teacher, shown wrong_references other rows' references",
    "reference_gap": "TRL's reference model, which beta > 0 makes",
    "teacher_entropy": "the teacher of a method with a distillation term",
    "contrast_kl": "the teacher of a method with a distillation term, shown another row's reference",
}
NEEDS_WRONG = {"wrong_gaps", "contrast_kl"}  # signals for which the teacher reads a wrong reference


# Credit that can have the other sign than A; all other rows give A a weight of 0 or more.
AGAINST_SIGN = (
    *(credit.sampled_distillation, credit.antisd, credit.sdar, credit.sdpg, credit.hindsight),
    *(credit.hindsight_gated, credit.privileged_baseline, credit.oracle_value),
)


def keywords(function: Credit | None) -> dict[str, inspect.Parameter]:
    """What a credit function takes after (advantages, gap, mask) that no partial binds, by name.

    `**options` count as an optional `lam` and `epsilon_w`; `*more` is never filled.
    """
    if function is None:
        return {}
    bound = function.keywords if isinstance(function, partial) else {}
    found = {}
    for name, parameter in list(inspect.signature(function).parameters.items())[3:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            option = parameter.replace(kind=parameter.KEYWORD_ONLY, default=None)
            found |= {key: option for key in ("lam", "epsilon_w") if key not in found}
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            found[name] = parameter
    return {name: parameter for name, parameter in found.items() if name not in bound}


def from_caller(function: Credit | None) -> set[str]:
    """Names without which a credit function cannot run and that only `signals` can give."""
    return {k for k, p in keywords(function).items() if p.default is p.empty} - set(SIGNALS)


@dataclass(frozen=True)
class Method:
    """One row of the methods table.

    The teacher scores a rollout once, and once more for each of `wrong_references` where credit or
    weight ask for `wrong_gaps`, or once more where they ask for `contrast_kl` alone.
    """

    summary: str
    credit: Credit = uniform  # spreads the advantage over tokens
    evidence: Evidence | None = None  # log of a weight of RLSD's form before clipping
    teacher_sees: str | None = None  # None: no teacher
    divergence: Divergence | None = None  # the distillation term D(P_T, P_S)
    needs_weight: bool = False  # the two terms have no published ratio
    weight: Credit | None = None  # of the divergence per token, called like a credit; None for 1
    distillation_weight: float = 1.0  # its factor

    @property
    def asks(self) -> set[str]:
        """Names of the keywords of credit and weight: signals and settings."""
        return {*keywords(self.credit), *keywords(self.weight)}

    @property
    def has_lambda(self) -> bool:
        """Whether lambda, and with it the need of a teacher, follows the schedule."""
        alone = self.teacher_sees is not None and self.divergence is None
        return alone and "lam" in keywords(self.credit)


def _rule(summary: str, rule: Credit) -> Method:
    """A row that is a credit function of a teacher that reads the reference."""
    return Method(summary, credit=rule, teacher_sees=PRIVILEGED)


def _weighted(summary: str, weight: Credit) -> Method:
    """A row that is OPSD with a weight per token."""
    term = Divergence("forward_kl")
    return Method(summary, silent, teacher_sees=PRIVILEGED, divergence=term, weight=weight)


METHODS: dict[str, Method] = {
    "grpo": Method("one advantage per rollout, the same on every token"),
    "rlsd": Method(
        "advantage times the clipped evidence ratio (P_T / P_S)^sign(A)",
        credit=credit.rlsd,
        evidence=credit.signed_evidence,
        teacher_sees=PRIVILEGED,
    ),
    "rlsd_neutral": Method(
        "advantage times a clipped weight exp(abs(log P_T / P_S)) that does not see the sign of A",
        credit=credit.rlsd_neutral,
        evidence=credit.neutral_evidence,
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
    # Published after it. What each leaves out is in the docstring of its function.
    "cepo": _rule(
        "CEPO (2605.19436): RLSD with the gap under another row's reference subtracted; published "
        "with a failed rollout of the group in its place",
        credit.cepo,
    ),
    "rlsd_contrast": _rule(
        "RLCSD's code (2606.11709): RLSD with the gap less that under wrong references",
        credit.rlsd_contrast,
    ),
    "rlcsd": _rule(
        "RLCSD (2606.11709): A + rho on the tokens that only the right reference explains",
        credit.rlcsd,
    ),
    "rlrt": _rule(
        "RLRT (2605.10781): RLSD with the teacher reversed, on right rollouts only", credit.rlrt
    ),
    "antisd": _rule(
        "AntiSD (2605.11609): A less lambda (softplus(gap) - log 2) / 2, while entropy is high",
        credit.antisd,
    ),
    "sdar": _rule("SDAR (2605.15155): A + c sigmoid(beta gap) on every token", credit.sdar),
    "amr_sd": _rule(
        "AMR-SD (2605.18529): A times 1 + the part of the gap that agrees with A", credit.amr_sd
    ),
    "srpo": Method(
        "SRPO (2604.02288): GRPO where A > 0, a weighted Jensen-Shannon divergence elsewhere",
        credit=credit.srpo,
        teacher_sees=PRIVILEGED,
        divergence=Divergence("jsd", alpha=0.5, top_k=100, add_tail=True),
        weight=credit.srpo_weight,
    ),
    "sdpg": Method(
        "SDPG (2606.04036): reverse KL beside A; beta > 0 adds its pull to pi_ref and TRL's own KL",
        credit=credit.sdpg,
        teacher_sees=PRIVILEGED,
        divergence=Divergence("reverse_kl"),
        distillation_weight=1e-3,
    ),
    "rlsd_negative_only": _rule(
        "RLSD where A < 0, GRPO elsewhere (ms-swift)", credit.rlsd_negative_only
    ),
    "rlsd_thought_only": _rule(
        "RLSD on the reasoning span that `signals` names (the paper's released code)",
        credit.rlsd_thought_only,
    ),
    # Ours.
    "privileged_baseline": _rule(
        "reward less the teacher's value of the prefix (ours)", credit.privileged_baseline
    ),
    "hindsight": _rule("what a token changes in the teacher's value (ours)", credit.hindsight),
    "hindsight_gated": _rule(
        "hindsight, of tokens that only the right reference explains (ours)", credit.hindsight_gated
    ),
    "posterior_blame": _rule(
        "GRPO where A > 0; elsewhere blame in proportion to the drop of the value (ours)",
        credit.posterior_blame,
    ),
    "opsd_value": _weighted(
        "OPSD, each token weighted by the value of its prefix (ours)", credit.opsd_value
    ),
    "opsd_contrast": _weighted(
        "OPSD, each token weighted by what only the right reference says (RLCSD's `opsd_ectr`)",
        credit.opsd_contrast,
    ),
    "opsd_value_contrast": _weighted("OPSD with both weights (ours)", credit.opsd_value_contrast),
    # Controls without a teacher: the gap is 0.
    "raft": Method(
        "right rollouts imitated, wrong ones left out (RAFT, 2304.06767)", credit=credit.raft
    ),
    "oracle": Method(
        "all blame on the first error, which `signals` names, all praise on the decisive tokens",
        credit=credit.oracle,
    ),
    "oracle_value": Method(
        "the true advantage of each token, where `signals` gives the policy's own value",
        credit=credit.oracle_value,
    ),
}

# What authors published for fields of `RLSDConfig` that every method shares. Nothing applies these
# but whoever asks for them: RLSDConfig(method=m, **PUBLISHED.get(m, {})).
PUBLISHED: dict[str, dict[str, float]] = {
    "amr_sd": {"lambda_init": 0.2, "lambda_decay_steps": 50},
    "antisd": {"lambda_init": 0.5, "lambda_decay_steps": 0},
    "cepo": {"lambda_init": 0.5, "lambda_decay_steps": 25, "epsilon_w": 0.2},
    "rlrt": {"lambda_init": 0.5, "epsilon_w": 1.0},
}
