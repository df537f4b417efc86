"""`RLSDConfig`: GRPO's configuration plus the method, its lambda schedule and its teacher.

Every value and combination that can be judged without a model is judged here, before any compute.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from trl import GRPOConfig

from rlsd_lib import methods
from rlsd_lib.credit import (
    Credit,
    lambda_schedule,
    raft,
    sampled_distillation,
    scaled,
    sdpg,
    silent,
    uniform,
)
from rlsd_lib.divergence import Divergence
from rlsd_lib.names import Named, look_up
from rlsd_lib.prompts import COLUMN, DEFAULT_TEMPLATE, check_template

TEACHER_KINDS = ("live", "base", "ema", "snapshot")
TEACHER_PASSES = AUTO, PLAIN, SHARED = "auto", "plain", "shared"
DISTILLATION_MODES = FULL, TOP_K, SAMPLED = "full_logits", "topk_logits", "sampled_token"
# Names that TRL refuses after the first rollouts only.
OF_TRL = {
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none"),
}
# Generation settings that leave the distribution of a rollout's tokens alone.
HARMLESS = {
    *("stop", "stop_strings", "stop_token_ids", "max_time", "use_cache", "cache_implementation"),
    *("cache_config", "compile_config", "disable_compile", "return_dict_in_generate"),
    *("eos_token_id", "pad_token_id", "bos_token_id", "seed", "include_stop_str_in_output"),
    *("skip_special_tokens", "detokenize", "logprobs", "renormalize_logits", "max_new_tokens"),
}
# What a field's value must be, and in words.
VALUES = {
    "num_generations": (lambda value: value is not None, "a count"),
    "lambda_init": (lambda value: 0 <= value <= 1, "a number in [0, 1]"),
    "lambda_warmup_steps": (lambda value: value >= 0, "a step count >= 0"),
    "lambda_decay_steps": (lambda value: value >= 0, "a step count >= 0"),
    "epsilon_w": (lambda value: value >= 0, "a number >= 0"),
    "teacher_sync_steps": (lambda value: value >= 1, "a step count >= 1"),
    "teacher_update_rate": (lambda value: 0 < value <= 1, "a number in (0, 1]"),
    "max_teacher_prompt_length": (lambda value: value is None or value >= 1, "None or >= 1"),
    "wrong_references": (lambda value: value >= 1, "a count >= 1"),
    "policy_weight": (lambda value: value >= 0, "a number >= 0"),
    "distillation_weight": (lambda value: value is None or value > 0, "None or a number > 0"),
    "distillation_token_clip": (lambda value: value is None or value > 0, "None or a number > 0"),
}


def _kinds(annotation: Any) -> list[Any]:
    union = get_origin(annotation) in (Union, UnionType)
    return [get_origin(t) or t for t in (get_args(annotation) if union else (annotation,))]


def is_number(annotation: Any) -> bool:
    return set(_kinds(annotation)) <= {bool, int, float, NoneType}


def check_type(name: str, value: Any, annotation: Any) -> None:
    """Refuse what a field cannot hold: comparing or counting it would fail with no name in sight.

    A whole number fits a float, a bool only bool, NaN nothing, and infinity `max_grad_norm` alone,
    which then clips nothing. Raises TypeError for a value of another type, ValueError for one that
    is not finite.
    """
    types = _kinds(annotation)
    if not set(types) <= {bool, int, float, str, list, dict, Mapping, NoneType}:
        return  # an enum or the like, which the field itself converts
    unclipped = name == "max_grad_norm" and value == math.inf
    if isinstance(value, Real) and not math.isfinite(value) and not unclipped:
        raise ValueError(f"{name}={value!r}: expected a finite number.")
    numbers = {int: Integral, float: Real}
    fitting = tuple(numbers.get(kind, kind) for kind in types)
    if not isinstance(value, fitting) or (isinstance(value, bool) and bool not in types):
        names = {Mapping: "dict", NoneType: "None"}
        wanted = " or ".join(names.get(kind, kind.__name__) for kind in types)
        raise TypeError(f"{name}={value!r} is {type(value).__name__}, expected {wanted}")


@dataclass
class RLSDConfig(GRPOConfig, Named):
    r"""
    Configuration class for the [`RLSDTrainer`].

    This class includes only the parameters that are specific to token credit and its teacher. For
    the full list of training arguments, refer to [`~trl.GRPOConfig`], whose defaults are unchanged
    but for `vllm_importance_sampling_mode`: `"token_truncate"` keeps token credit, where the
    parent's `"sequence_mask"` can drop whole completions.

    Args:
        method (`str`, *optional*, defaults to `"rlsd"`):
            How sequence advantages become token advantages: a key of `rlsd_lib.METHODS`.
        lambda_init (`float`, *optional*, defaults to `0.5`):
            Share of the evidence weight in the advantage at the start of the decay, in [0, 1].
        lambda_warmup_steps (`int`, *optional*, defaults to `0`):
            Optimiser steps over which lambda grows linearly from 0 to `lambda_init`.
        lambda_decay_steps (`int`, *optional*, defaults to `50`):
            Optimiser steps over which lambda then falls linearly to 0; `0` keeps it constant.
        epsilon_w (`float`, *optional*, defaults to `0.2`):
            The weight is clipped to [1 - epsilon_w, 1 + epsilon_w].
        weight_clip (`str`, *optional*, defaults to `"linear"`):
            `"linear"` is the paper's clip; `"log"` clips to [1 / (1 + epsilon_w), 1 + epsilon_w].
        conserve_credit (`bool`, *optional*, defaults to `False`):
            Rescales the clipped weights of each rollout to mean 1. Not in the paper.
        credit_settings (`dict`, *optional*, defaults to `{}`):
            Settings of the method's credit function and weight, such as `tau`, in place of their
            published defaults; lambda and epsilon_w are fields, see `methods.PUBLISHED`.
        permute_credit (`bool`, *optional*, defaults to `False`):
            A control: shuffles credit, or the distillation term's weight, over a rollout's tokens.
        wrong_references (`int`, *optional*, defaults to `1`):
            References of other rows that the teacher also scores by, for methods that ask for
            `wrong_gaps`; one more pass of the teacher each.
        teacher_model_kind (`str`, *optional*, defaults to `"snapshot"`):
            `"live"` (the current policy), `"base"` (the initial policy), `"ema"` (an exponential
            moving average) or `"snapshot"` (a copy renewed every `teacher_sync_steps`).
        teacher_sync_steps (`int`, *optional*, defaults to `10`):
            Optimiser steps between two updates of an `"ema"` or `"snapshot"` teacher.
        teacher_update_rate (`float`, *optional*, defaults to `0.05`):
            Weight of the student in one `"ema"` update, in (0, 1].
        teacher_pass (`str`, *optional*, defaults to `"auto"`):
            `"plain"` computes the teacher's prompt for each rollout, `"shared"` once for all
            rollouts that have it or raises, with the same result up to rounding. `"auto"` shares
            where that is known to be exact and saves a quarter of the token positions.
        completion_head (`bool`, *optional*):
            On a CPU, sends only completion positions through the LM head, equal up to rounding.
            `None`: in rollouts all of whose steps ask the teacher, so that other steps stay TRL's
            to the bit; `True`: in every training step; `False`: never.
        privileged_column (`str`, *optional*, defaults to `"privileged_context"`):
            The dataset column (str) that the teacher may read and the student may not.
        privileged_template (`str`, *optional*):
            The teacher's user turn, with `{prompt}` and `{privileged_context}` in it.
        peer_context (`bool`, *optional*, defaults to `False`):
            Shows the teacher a successful rollout of the same group instead of the reference, as
            `sdpo` always does. A rollout without one keeps GRPO's credit.
        max_teacher_prompt_length (`int`, *optional*):
            Tokens allowed for the teacher's prompt: the privileged text of a longer one is shortened.
        distillation_mode (`str`, *optional*):
            `"full_logits"`, `"topk_logits"` or `"sampled_token"`, for methods with a distillation
            term. Like every field below, `None` takes the method's own, see `rlsd_lib.METHODS`.
        distillation_alpha (`float`, *optional*):
            Uses the generalised Jensen-Shannon divergence: 0 is the forward KL, 1 the reverse KL.
        distillation_topk (`int`, *optional*):
            Tokens compared with `distillation_mode="topk_logits"`, the student's likeliest.
        distillation_add_tail (`bool`, *optional*):
            Adds one bucket for the mass outside of the top k.
        distillation_token_clip (`float`, *optional*):
            Largest divergence of one token; a token above it gets no gradient.
        distillation_weight (`float`, *optional*):
            Factor of the distillation term. Required for `grpo_opsd`, whose paper gives none.
        policy_weight (`float`, *optional*, defaults to `0.0`):
            Factor of GRPO's own term beside a method that is pure distillation.
        success_reward_threshold (`float`, *optional*, defaults to `1.0`):
            The reward from which a rollout counts as right, as demonstration and as `success`.
    """

    vllm_importance_sampling_mode: str = "token_truncate"
    method: str = "rlsd"
    lambda_init: float = 0.5
    lambda_warmup_steps: int = 0
    lambda_decay_steps: int = 50
    epsilon_w: float = 0.2
    weight_clip: str = "linear"
    conserve_credit: bool = False
    credit_settings: dict = dataclasses.field(default_factory=dict)
    permute_credit: bool = False
    wrong_references: int = 1
    teacher_model_kind: str = "snapshot"
    teacher_sync_steps: int = 10
    teacher_update_rate: float = 0.05
    teacher_pass: str = AUTO
    completion_head: bool | None = None
    privileged_column: str = COLUMN
    privileged_template: str = DEFAULT_TEMPLATE
    peer_context: bool = False
    max_teacher_prompt_length: int | None = None
    distillation_mode: str | None = None
    distillation_alpha: float | None = None
    distillation_topk: int | None = None
    distillation_add_tail: bool | None = None
    distillation_token_clip: float | None = None
    distillation_weight: float | None = None
    policy_weight: float = 0.0
    success_reward_threshold: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            # A command line's parser strips `| None` from annotations; text that TRL turns into an
            # object of its own is its business.
            absent = value is None and field.default is None
            if not absent and (field.name in RLSDConfig.__annotations__ or is_number(field.type)):
                check_type(field.name, value, field.type)
        self._check_values()
        self._check_options()
        super().__post_init__()
        for name, valid in OF_TRL.items():
            look_up(getattr(self, name), valid, name)
        self._check_settings()
        if self.uses_teacher or self.has_token_credit:
            self._check_against_grpo()

    @property
    def row(self) -> methods.Method:
        """The method's row in `METHODS`, with what its teacher sees in this run."""
        row = methods.METHODS[self.method]
        return replace(row, teacher_sees=methods.PEER) if self.peer_context else row

    @property
    def divergence(self) -> Divergence | None:
        """The distillation term that enters the loss as a divergence, None for none."""
        spec = self.row.divergence
        if spec is None or self.distillation_mode == SAMPLED:
            return None
        if self.distillation_alpha is not None:
            spec = replace(spec, kind="jsd", alpha=self.distillation_alpha)
        if self.distillation_mode == FULL:
            spec = replace(spec, top_k=None, add_tail=False)
        given = {
            "top_k": self.distillation_topk,
            "add_tail": self.distillation_add_tail,
            "token_clip": self.distillation_token_clip,
        }
        return replace(spec, **{name: value for name, value in given.items() if value is not None})

    @property
    def credit(self) -> Credit:
        """The credit function with its settings, or what stands in its place in this run."""
        row = self.row
        if self.distillation_mode == SAMPLED:
            return sampled_distillation
        if self.policy_weight:
            return partial(scaled, policy_weight=self.policy_weight)
        if row.credit is sdpg and self.beta == 0:
            return uniform  # without a reference model there is no pull to it
        if row.evidence is not None:
            log_clip = self.weight_clip == "log"
            return partial(row.credit, log_clip=log_clip, conserve=self.conserve_credit)
        return self._with_settings(row.credit)

    @property
    def weight(self) -> Credit | None:
        """The weight of the distillation term per token with its settings, None for 1."""
        return None if self.row.weight is None else self._with_settings(self.row.weight)

    @property
    def has_token_credit(self) -> bool:
        """Whether tokens of one rollout can differ in their advantage."""
        return getattr(self.credit, "func", self.credit) not in (uniform, silent, scaled)

    @property
    def uses_teacher(self) -> bool:
        """Whether any step of the run can need a teacher."""
        return self.row.teacher_sees is not None and not self.teacher_is_over(0)

    def lambda_at(self, step: int) -> float:
        """lambda after `step` finished optimiser steps."""
        schedule = self.lambda_init, self.lambda_warmup_steps, self.lambda_decay_steps
        return lambda_schedule(step, *schedule)

    def needs_teacher_at(self, step: int) -> bool:
        """Whether the update after `step` finished steps needs the teacher's scores."""
        row = self.row
        return row.teacher_sees is not None and (not row.has_lambda or self.lambda_at(step) > 0)

    def has_credit_at(self, step: int) -> bool:
        """Whether that update is other than GRPO's: with a teacher, or by a credit without one."""
        row = self.row
        return self.has_token_credit if row.teacher_sees is None else self.needs_teacher_at(step)

    def teacher_is_over(self, step: int) -> bool:
        """Whether no update from `step` on needs the teacher."""
        if not self.row.has_lambda:
            return False
        end = self.lambda_warmup_steps + self.lambda_decay_steps
        return self.lambda_init == 0 or (self.lambda_decay_steps > 0 and step >= end)

    def check_keeps_token_credit(self, whose: str, *, keeps_sign: bool = False) -> None:
        """Raise ValueError if TRL's loss averages the token credit of `whose` over a sequence.

        Or if it takes decisions for whole rollouts by the sign of A, which credit has per token.
        """
        by_sign = {
            "off_policy_mask_threshold": self.off_policy_mask_threshold is not None,
            "loss_type": self.loss_type == "vespo",
        }
        for name in (name for name, is_set in by_sign.items() if is_set and not keeps_sign):
            raise ValueError(
                f"{name}={getattr(self, name)!r} treats a rollout by the sign of its advantage, "
                f"which the token credit of {whose} need not have. Leave it out."
            )
        if self.importance_sampling_level != "token" and self.loss_type not in ("cispo", "vespo"):
            raise ValueError(
                f"importance_sampling_level='sequence' with loss_type={self.loss_type!r} averages "
                f"the token credit of {whose} away. Use 'token', or the cispo loss."
            )

    def _check_values(self) -> None:
        look_up(self.method, methods.METHODS, "method")
        look_up(self.teacher_model_kind, TEACHER_KINDS, "teacher_model_kind")
        look_up(self.teacher_pass, TEACHER_PASSES, "teacher_pass")
        look_up(self.weight_clip, ("linear", "log"), "weight_clip")
        if self.distillation_mode is not None:
            look_up(self.distillation_mode, DISTILLATION_MODES, "distillation_mode")
        for name, (holds, expected) in VALUES.items():
            if not holds(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected {expected}.")
        check_template(self.privileged_template)

    def _check_options(self) -> None:
        """Refuse options that mean nothing for the method, or too little."""
        for field in fields(RLSDConfig):
            value = getattr(self, field.name)
            if value != field.default and (why := self._why_void(field.name)):
                raise ValueError(f"{field.name}={value!r} means nothing {why}")
        if self.row.needs_weight and self.distillation_weight is None:
            raise ValueError(
                f"method={self.method!r} needs distillation_weight, the factor of its "
                "term: the paper reports none. Try 0.1."
            )
        spec = self.divergence  # built here, so that its own checks come now
        if self.distillation_mode == TOP_K and spec.top_k is None:
            raise ValueError("distillation_mode='topk_logits' needs distillation_topk, e.g. 100.")

    def _with_settings(self, function: Credit) -> Credit:
        """The function with those of `credit_settings` that it takes."""
        taken = {k: v for k, v in self.credit_settings.items() if k in methods.keywords(function)}
        return partial(function, **taken) if taken else function

    def _check_settings(self) -> None:
        """Refuse `credit_settings` that no function of the method takes, or that is no number."""
        credit = getattr(self.credit, "func", self.credit)
        known = {**methods.keywords(credit), **methods.keywords(self.row.weight)}
        settings = (k for k, option in known.items() if isinstance(option.default, float))
        found = set(settings) - set(methods.SIGNALS)
        for name, value in self.credit_settings.items():
            if name not in found:
                raise ValueError(
                    f"credit_settings: {name!r} is no setting of method={self.method!r} in this "
                    f"run, which has {', '.join(sorted(found)) or 'none'}. Settings of a credit "
                    "function of your own are bound by functools.partial."
                )
            if type(value) not in (int, float) or not math.isfinite(value):
                raise ValueError(f"credit_settings: {name}={value!r}: expected a number.")

    def _why_void(self, name: str) -> str | None:
        """Why an option that is set would change nothing, and what to do; None if it does."""
        row, sees, mode = self.row, self.row.teacher_sees, self.distillation_mode
        reads = methods.METHODS[self.method].teacher_sees == methods.PRIVILEGED
        alike = row.weight is None and (row.credit in (uniform, silent, raft) or mode == SAMPLED)
        mixed = row.needs_weight or row.weight is not None or row.credit is not silent
        one_token = row.divergence is not None and row.divergence.kind.endswith("_top1")
        method = f"for method={self.method!r}"
        match name:
            case "peer_context" if not reads:
                return f"{method}: there is no privileged_context that a peer could replace."
            case "peer_context" if row.asks & methods.NEEDS_WRONG:
                return f"{method}, which compares the reference with another row's. Leave it alone."
            case "weight_clip" | "conserve_credit" if row.evidence is None:
                return f"{method}, which has no weight. Leave it alone."
            case "permute_credit" if alike:
                return f"{method}, which treats all tokens alike. Leave it at False."
            case "wrong_references" if not reads:
                return f"{method}, whose teacher sees no reference. Leave it at 1."
            case "policy_weight" if row.credit is not silent or mode == SAMPLED:
                return f"{method}, which is no pure divergence. Leave it at 0."
            case "teacher_model_kind" | "teacher_sync_steps" | "teacher_update_rate" if (
                sees == methods.PROMPT
            ):
                return f"{method}, whose teacher_model never changes. Leave it at its default."
            case _ if name.startswith("distillation_") and row.divergence is None:
                return f"{method}, which has no distillation term. Leave it at None."
            case "distillation_topk" | "distillation_add_tail" if mode in (FULL, SAMPLED):
                return f"with distillation_mode={mode!r}. Use 'topk_logits'."
            case "distillation_mode" if mode == SAMPLED and mixed:
                return f"{method}, which adds or weights a divergence. Use full or top-k logits."
            case "distillation_mode" if mode == FULL:
                return None
            case "distillation_mode" | "distillation_alpha" if one_token:
                return f"{method}, which looks at one token. Use method='opsd' with it."
            case _ if (
                name.startswith("distillation_") and name != "distillation_mode" and mode == SAMPLED
            ):
                return f"with {mode!r}, whose credit is log P_T - log P_S. Leave it at None."
        return None

    def _check_against_grpo(self) -> None:
        """Refuse options of the parent that would void the method."""
        if self.has_token_credit:
            signed = getattr(self.credit, "func", self.credit) not in methods.AGAINST_SIGN
            self.check_keeps_token_credit(f"method={self.method!r}", keeps_sign=signed)
        if self.neftune_noise_alpha is not None:
            alpha = self.neftune_noise_alpha
            raise ValueError(f"neftune_noise_alpha={alpha} would put noise into the gap. Drop it.")
        # A least length forbids the end token alone, and whoever measures at one length asks for it.
        if shaping := sorted({*(self.generation_kwargs or {})} - HARMLESS - {"min_new_tokens"}):
            raise ValueError(
                f"generation_kwargs={self.generation_kwargs}: {', '.join(shaping)} would draw "
                "rollouts from another distribution than P_S. Leave it out."
            )
        if self.remove_unused_columns and self.row.teacher_sees not in (None, methods.PROMPT):
            column = self.privileged_column
            raise ValueError(f"remove_unused_columns=True would drop {column}. Set it to False.")
        if self.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel=True is not supported: student and teacher would run different "
                "kernels. Set it to False."
            )
