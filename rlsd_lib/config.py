"""What a run is built from: `RLSDConfig` and the table of methods.

A method is a credit function plus, for some, a distillation term. `METHODS` says which, and what
the teacher of the method is shown. Presets (model, task, sizes) live in `presets.py`.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field

from trl import GRPOConfig

from .credit import (
    Credit,
    Evidence,
    lambda_schedule,
    neutral_evidence,
    rlsd,
    rlsd_neutral,
    signed_evidence,
    uniform,
)

TEACHER_KINDS = ("live", "base", "ema", "snapshot")

DEFAULT_TEMPLATE = (
    "{prompt}\n\n"
    "For this problem a reference solution is known:\n{privileged_context}\n\n"
    "Use it to check yourself, but solve the problem in your own way and state the final answer "
    "in the format that was asked for."
)


@dataclass(frozen=True)
class Method:
    """One row of the methods table.

    `credit` spreads the advantage over tokens; `evidence` is the log of its weight before clipping
    (None where the method has no weight); `teacher_sees` is "privileged" for (x, r) and None for
    methods without a teacher.
    """

    summary: str
    credit: Credit = uniform
    evidence: Evidence | None = None
    teacher_sees: str | None = None


METHODS: dict[str, Method] = {
    "grpo": Method("one advantage per rollout, the same on every token"),
    "rlsd": Method(
        "advantage times the clipped evidence ratio (P_T / P_S)^sign(A)",
        credit=rlsd,
        evidence=signed_evidence,
        teacher_sees="privileged",
    ),
    "rlsd_neutral": Method(
        "advantage times a clipped weight exp(abs(log P_T / P_S)) that does not see the sign of A",
        credit=rlsd_neutral,
        evidence=neutral_evidence,
        teacher_sees="privileged",
    ),
}


def look_up(name: str, names: Iterable[str], what: str) -> str:
    """Return `name` if it is one of `names`.

    Raises:
        ValueError: naming the value, the nearest valid name and all valid names.
    """
    names = list(names)
    if name in names:
        return name
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"Unknown {what} {name!r}.{hint} Valid: {', '.join(names)}.")


@dataclass
class RLSDConfig(GRPOConfig):
    r"""
    Configuration class for the [`RLSDTrainer`].

    This class includes only the parameters that are specific to token credit and its teacher. For
    the full list of training arguments, refer to [`~trl.GRPOConfig`], whose defaults are unchanged
    but for `vllm_importance_sampling_mode`.

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
        teacher_model_kind (`str`, *optional*, defaults to `"snapshot"`):
            `"live"` (the current policy), `"base"` (the initial policy), `"ema"` (an exponential
            moving average) or `"snapshot"` (a copy renewed every `teacher_sync_steps`).
        teacher_sync_steps (`int`, *optional*, defaults to `10`):
            Optimiser steps between two updates of an `"ema"` or `"snapshot"` teacher.
        teacher_update_rate (`float`, *optional*, defaults to `0.05`):
            Weight of the student in one `"ema"` update, in (0, 1].
        privileged_template (`str`, *optional*):
            The teacher's user turn. Must contain `{prompt}` and `{privileged_context}`; other
            braces are left alone.
        max_teacher_prompt_length (`int`, *optional*):
            Tokens allowed for the teacher's prompt. A longer one has its privileged text shortened,
            never its question; the share of shortened rows is logged. `None` sets no limit.
    """

    vllm_importance_sampling_mode: str = field(
        default="token_truncate",
        metadata={
            "help": "As in GRPOConfig. Truncating per token keeps token credit; the parent's "
            "'sequence_mask' can drop whole completions."
        },
    )
    method: str = field(
        default="rlsd", metadata={"help": "How sequence advantages become token advantages."}
    )
    lambda_init: float = field(
        default=0.5, metadata={"help": "Share of the evidence weight at the start, in [0, 1]."}
    )
    lambda_warmup_steps: int = field(
        default=0, metadata={"help": "Optimiser steps of linear growth from 0 to lambda_init."}
    )
    lambda_decay_steps: int = field(
        default=50, metadata={"help": "Optimiser steps of linear decay to 0; 0 = constant."}
    )
    epsilon_w: float = field(
        default=0.2, metadata={"help": "The weight is clipped to 1 - epsilon_w .. 1 + epsilon_w."}
    )
    teacher_model_kind: str = field(
        default="snapshot", metadata={"help": "'live', 'base', 'ema' or 'snapshot'."}
    )
    teacher_sync_steps: int = field(
        default=10, metadata={"help": "Optimiser steps between updates of the teacher."}
    )
    teacher_update_rate: float = field(
        default=0.05, metadata={"help": "Weight of the student in one 'ema' update, in (0, 1]."}
    )
    privileged_template: str = field(
        default=DEFAULT_TEMPLATE,
        metadata={"help": "Teacher's user turn, with {prompt} and {privileged_context}."},
    )
    max_teacher_prompt_length: int | None = field(
        default=None, metadata={"help": "Token limit of the teacher's prompt; None = no limit."}
    )

    def __post_init__(self) -> None:
        self._check_values()
        super().__post_init__()
        self._check_combinations()

    @property
    def uses_teacher(self) -> bool:
        """Whether any step of the run can need a teacher."""
        return METHODS[self.method].teacher_sees is not None and self.lambda_init > 0

    def lambda_at(self, step: int) -> float:
        """lambda after `step` finished optimiser steps."""
        return lambda_schedule(
            step, self.lambda_init, self.lambda_warmup_steps, self.lambda_decay_steps
        )

    def lambda_is_over(self, step: int) -> bool:
        """Whether lambda is 0 at `step` and at every later one."""
        end = self.lambda_warmup_steps + self.lambda_decay_steps
        return self.lambda_init == 0 or (self.lambda_decay_steps > 0 and step >= end)

    def _check_values(self) -> None:
        look_up(self.method, METHODS, "method")
        look_up(self.teacher_model_kind, TEACHER_KINDS, "teacher_model_kind")
        _require(0 <= self.lambda_init <= 1, "lambda_init", self.lambda_init, "a number in [0, 1]")
        _require(self.epsilon_w >= 0, "epsilon_w", self.epsilon_w, "a number >= 0")
        rate = self.teacher_update_rate
        _require(0 < rate <= 1, "teacher_update_rate", rate, "a number in (0, 1]")
        for name in ("lambda_warmup_steps", "lambda_decay_steps"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "a step count >= 0")
        sync = self.teacher_sync_steps
        _require(sync >= 1, "teacher_sync_steps", sync, "a step count >= 1")
        limit = self.max_teacher_prompt_length
        _require(limit is None or limit >= 1, "max_teacher_prompt_length", limit, "None or >= 1")
        for placeholder in ("{prompt}", "{privileged_context}"):
            if placeholder not in self.privileged_template:
                raise ValueError(
                    f"privileged_template has no {placeholder}: {self.privileged_template!r}. "
                    "The teacher's turn must hold both {prompt} and {privileged_context}."
                )

    def _check_combinations(self) -> None:
        if not self.uses_teacher:
            return
        if self.importance_sampling_level == "sequence" and self.loss_type not in (
            "cispo",
            "vespo",
        ):
            raise ValueError(
                f"importance_sampling_level='sequence' with loss_type={self.loss_type!r} averages "
                f"the token credit of method={self.method!r} away: only the mean weight of a "
                "sequence would reach the gradient. Use 'token', or the cispo or vespo loss."
            )
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns=True would drop the privileged_context column before the "
                "teacher sees it. Set remove_unused_columns=False."
            )
        if self.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel=True is not supported: student and teacher would run different "
                "kernels and the gap would measure their difference. Set it to False."
            )


def _require(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r}: expected {expected}.")
