"""`RLSDTrainer`: what changes against `trl.GRPOTrainer`, and nothing else.

Rollouts, rewards, group advantages, losses, clipping, KL, entropy and vLLM are TRL's. `TeacherPass`
lets a teacher score the sampled tokens. Here, in the loss, the advantage (N,) becomes a token
advantage (N, T) by the method's credit function, and some methods add a divergence between teacher
and student.
"""

import copy
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint

from rlsd_lib.credit import Credit, Sums, drift_sums, gap_sums, intervention_sums, weight_sums
from rlsd_lib.divergence import divergence
from rlsd_lib.trainer import checks, sharded, states
from rlsd_lib.trainer.config import RLSDConfig
from rlsd_lib.trainer.teacher_pass import TeacherPass
from rlsd_lib.trainer.upstream import load_trained_adapter


class RLSDTrainer(TeacherPass):
    """GRPO whose token advantages are shaped by a teacher that sees privileged information.

    A drop-in for [`~trl.GRPOTrainer`] with one more dataset column, `privileged_context` (str).
    With `method="grpo"`, or while lambda is 0, every step is bit-identical to the parent's, unless
    `completion_head=True`. Evaluation runs no teacher: its loss is GRPO's for every method.

    Args: GRPOTrainer's, and
        teacher_model: for `method="opd"`, the model to distil from, or its path.
        credit: a credit function in place of the method's, for methods whose teacher sees the
            reference. Called as `credit(advantages (N,), gap (N, T), mask (N, T), **asked)` for
            token advantages (N, T), detached; `asked` are those of `lam`, `epsilon_w`, `success`
            (N,), `rewards` (N,) and `entropy` (N, T) that its signature names, `lam` and
            `epsilon_w` for `**kwargs`. Without `lam` it has no schedule: lambda stays constant.

    Raises:
        ValueError: for settings or rows that would make the gap meaningless; see `RLSDConfig`.
    """

    _tag_names = ("trl", "grpo", "rlsd")
    _name = "RLSD"
    _paper = {  # noqa: RUF012 (as the parent has it)
        "title": "Self-Distilled RLVR",
        "id": "2604.03128",
        "citation": (
            "@article{yang2026self,\n"
            "    title  = {{Self-Distilled RLVR}},\n"
            "    author = {Yang and Qin and Si and others},\n"
            "    year   = 2026,\n"
            "    eprint = {arXiv:2604.03128},\n"
            "}"
        ),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Any = None,
        args: RLSDConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: list | None = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
        *,
        teacher_model: PreTrainedModel | str | None = None,
        credit: Credit | None = None,
    ) -> None:
        args = RLSDConfig() if args is None else args
        if not isinstance(args, RLSDConfig):
            raise TypeError(f"args must be an RLSDConfig, got {type(args).__name__}.")
        checks.check_arguments(
            reward_funcs, args, train_dataset, teacher_model, rollout_func, environment_factory
        )
        self.credit = credit
        self._asked = () if credit is None else checks.check_credit(credit, args)
        self._has_lambda = args.row.evidence is not None if credit is None else "lam" in self._asked
        if credit is not None and not self._has_lambda:
            args = copy.copy(args)  # the caller's stay as they are
            args.lambda_warmup_steps = args.lambda_decay_steps = 0
        self._pending: dict[str, Any] | None = None
        self._checkpoint: str | None = None
        self._saved: Path | None = None
        super().__init__(
            model,
            reward_funcs,
            args,
            train_dataset,
            teacher_model,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )
        if self.teacher is not None:
            self.add_callback(TeacherCallback(self))

    # Loss

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        training = self.model.training and self.teacher is not None
        if training and self._has_lambda:
            lam = self.args.lambda_at(self.state.global_step)
            self._metrics["train"]["rlsd/lambda"].append(lam)
        if "teacher_per_token_logps" not in inputs:
            if training:
                self._metrics["train"]["rlsd/intervention"].append(0.0)
            return super()._compute_loss(model, inputs)
        # A copy, because TRL hands the same dictionary out again when rollouts are reused.
        self._pending = inputs = dict(inputs)
        with states.hidden_states(model, "teacher_hidden" in inputs) as hidden:
            loss = super()._compute_loss(model, inputs)
        if self._pending is not None:
            raise RuntimeError("TRL's loss never asked for log-probabilities: credit not applied.")
        return loss + self._distillation_loss(model, hidden[0], inputs) if hidden else loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple:
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        # TRL reads inputs["advantages"] after this first forward of the loss, so the student's
        # log-probabilities cost nothing extra.
        if self._pending is not None:
            inputs, self._pending = self._pending, None
            inputs["entropy"] = entropies.detach()
            inputs["advantages"] = self._token_advantages(inputs, logps.detach())
        return logps, entropies, aux_loss

    def _token_advantages(self, inputs: dict[str, Any], logps: Tensor) -> Tensor:
        """A (N,) -> A_hat (N, T) by the credit function, and the metrics of it."""
        advantages, mask = inputs["advantages"], states.loss_mask(inputs)
        if advantages.dim() != 1:
            raise RuntimeError(f"Advantages were reweighted already: {tuple(advantages.shape)}.")
        teacher = inputs["teacher_per_token_logps"]
        # P_S is the policy that wrote the rollout: credit belongs to the rollout, as A does.
        gap = teacher - inputs.get("old_per_token_logps", logps)
        assign = self._own_credit if self.credit is not None else self._table_credit
        credited, sums = assign(advantages, gap, mask, inputs)
        broken = (~(teacher + logps).isfinite()).sum()
        if self.log_means(gap_sums(gap, mask) | sums, broken):
            self._check_finite(teacher, inputs["prompt_ids"], "teacher")
            self._check_finite(logps, inputs["prompt_ids"], "student")
        if (age := self.teacher.age(self.state.global_step)) is not None:
            self._metrics["train"]["rlsd/teacher_age"].append(age)
        return credited

    def _table_credit(
        self, advantages: Tensor, gap: Tensor, mask: Tensor, inputs: dict[str, Any]
    ) -> tuple[Tensor, Sums]:
        args, lam = self.args, self.args.lambda_at(self.state.global_step)
        assign = partial(args.credit, gap=gap, mask=mask, lam=lam, epsilon_w=args.epsilon_w)
        credited = assign(advantages)
        if args.row.evidence is None:
            return credited, {}
        log_weight = args.row.evidence(advantages, gap)
        sums = weight_sums(log_weight, mask, args.epsilon_w, log_clip=args.weight_clip == "log")
        sums |= intervention_sums(credited, advantages, mask)
        return credited, sums | drift_sums(credited, assign(-advantages), advantages, gap, mask)

    def _own_credit(
        self, advantages: Tensor, gap: Tensor, mask: Tensor, inputs: dict[str, Any]
    ) -> tuple[Tensor, Sums]:
        # Before the function sees them, so that it is not blamed for them.
        self._check_finite(gap, inputs["prompt_ids"], "teacher or student")
        known = {
            "lam": self.args.lambda_at(self.state.global_step),
            "epsilon_w": self.args.epsilon_w,
            "success": inputs["rewards"] >= self.args.success_reward_threshold,
            "rewards": inputs["rewards"],
            "entropy": inputs["entropy"],
        }
        asked = {name: known[name] for name in self._asked}
        credited = self.credit(advantages, gap, mask, **asked)
        checks.check_credited(credited, gap.shape, self.credit)
        return credited, intervention_sums(credited, advantages, mask)

    def _distillation_loss(
        self, model: nn.Module, hidden: Tensor, inputs: dict[str, Any]
    ) -> Tensor:
        """The weighted mean over tokens of D(P_T, P_S), with the gradient through P_S only."""
        mask = states.loss_mask(inputs)
        student, teacher = states.head_of(model), self._teacher_head
        per_token = divergence(
            self.args.divergence,
            states.predicting(hidden, mask.size(1)),
            student[0],
            inputs["teacher_hidden"],
            teacher[0],
            mask.bool(),
            student_bias=student[1],
            teacher_bias=teacher[1],
            temperature=self.temperature,
        )
        loss = states.token_mean(
            per_token,
            states.policy_mask(inputs),
            self.args,
            num_items=inputs["num_items_in_batch"],
            num_processes=self.accelerator.num_processes,
            accumulation=self.current_gradient_accumulation_steps,
        )
        self.log_means({"divergence": (per_token.detach().sum(), mask.sum())})
        return (self.args.distillation_weight or 1.0) * loss

    # Checkpoints

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """As the parent's; on a resume the teacher is restored as well.

        Another call without a checkpoint copies the student anew: steps and teacher age start at 0.
        Raises ValueError on every rank, if the checkpoint has no teacher state, or another's, or if
        an earlier call released a teacher that this one needs.
        """
        self._checkpoint = resume_from_checkpoint or None
        if resume_from_checkpoint is True:
            self._checkpoint = get_last_checkpoint(self.args.output_dir)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Before the parent, which deletes older checkpoints at its end.
        if self.teacher is not None:
            step = self.state.global_step
            self._saved = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            self.teacher.save(self._saved, step)
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if self.teacher is not None and self.teacher.adapter is not None and folder != self._saved:
            # PEFT writes every adapter; the trained model is the student alone.
            shutil.rmtree(folder / self.teacher.adapter, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        whole = not sharded.is_sharded(self.accelerator)
        if self.teacher is not None and self.teacher.adapter is not None and whole:
            load_trained_adapter(self.accelerator.unwrap_model(self.model), resume_from_checkpoint)


class TeacherCallback(TrainerCallback):
    """Restores the teacher on a resume, refreshes it after a step, releases it after the last use."""

    def __init__(self, trainer: RLSDTrainer) -> None:
        self.trainer = trainer
        self.has_begun = False

    def on_train_begin(self, args: RLSDConfig, state: Any, control: Any, **kwargs: Any) -> None:
        """Called on every rank, once the student has the checkpoint's weights."""
        teacher = self.trainer.teacher
        if teacher.model is None and not args.teacher_is_over(state.global_step):
            raise ValueError(
                f"train() at step {state.global_step} needs the teacher, which an earlier train() "
                f"released after lambda_decay_steps={args.lambda_decay_steps}. Make a new trainer."
            )
        if self.trainer._checkpoint is not None:
            teacher.load(Path(self.trainer._checkpoint), self.trainer.model)
        elif self.has_begun:
            teacher.take(self.trainer.model, state.global_step)
        self.has_begun = True

    def on_step_end(self, args: RLSDConfig, state: Any, control: Any, **kwargs: Any) -> None:
        """Called on every rank, before a checkpoint of the same step is written."""
        teacher = self.trainer.teacher
        if args.teacher_is_over(state.global_step) and teacher.model is not None:
            teacher.release()
        else:
            teacher.sync(self.trainer.model, state.global_step)
