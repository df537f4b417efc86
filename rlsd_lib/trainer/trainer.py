"""`RLSDTrainer`: what changes against `trl.GRPOTrainer`, and nothing else.

Rollouts, rewards, group advantages, losses, clipping, KL, entropy and vLLM are TRL's. `TeacherPass`
lets a teacher score the sampled tokens, `Resumable` keeps checkpoints. Here, in the loss, the
advantage (N,) becomes a token advantage (N, T) by the method's credit function, and some methods add
a divergence between teacher and student.
"""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from rlsd_lib import credit as credits
from rlsd_lib.credit import Credit, Sums
from rlsd_lib.divergence import divergence
from rlsd_lib.names import Named
from rlsd_lib.trainer import checkpoints, checks, states, upstream
from rlsd_lib.trainer.checkpoints import Resumable
from rlsd_lib.trainer.config import SAMPLED, RLSDConfig
from rlsd_lib.trainer.teacher_pass import Signals, TeacherPass

# AntiSD is off while the last step's entropy is below this share of the mean of the first steps.
GATE_SHARE, GATE_STEPS = 0.93, 10


class RLSDTrainer(Resumable, TeacherPass, Named):
    """GRPO whose token advantages are shaped by a teacher that sees privileged information.

    A drop-in for [`~trl.GRPOTrainer`] with one more dataset column (str), `privileged_context` or
    the one that `privileged_column` names. With `method="grpo"`, or while lambda is 0, every step
    is bit-identical to the parent's, unless `completion_head=True`. Evaluation runs no teacher: its
    loss is GRPO's for every method.

    Args: GRPOTrainer's, and
        teacher_model: for `method="opd"`, the model to distil from, or its path.
        credit: a credit function in place of the method's, for methods whose teacher sees the
            reference. Called as `credit(advantages (N,), gap (N, T), mask (N, T), **asked)` for
            token advantages (N, T), detached. Each further parameter is filled by its name, from
            `methods.SIGNALS` or from what `signals` returns; `**kwargs` receives `lam` and
            `epsilon_w`. A function that does not take `lam` is called at every step: the schedule
            is ignored, and the teacher is never released.
        signals: gives what only the caller knows of a rollout, such as where it went wrong. Called
            once per generation batch on each rank, as `signals(rows, completion_ids (N, T), mask
            (N, T))` with TRL's rows, for a mapping of names to tensors (N,) or (N, T), which credit
            functions and weights may ask for by name.

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
        signals: Signals | None = None,
    ) -> None:
        args = RLSDConfig() if args is None else args
        if not isinstance(args, RLSDConfig):
            raise TypeError(f"args must be an RLSDConfig, got {type(args).__name__}.")
        checks.check_arguments(
            reward_funcs, args, train_dataset, teacher_model, rollout_func, environment_factory
        )
        self.credit, self.signals = credit, signals
        if credit is not None:
            self._asked = checks.check_credit(credit, args, signals)
        else:
            self._asked = checks.check_asked("credit", args.credit, args, signals)
        self._weight_asked: tuple[str, ...] = ()
        if args.weight is not None:
            self._weight_asked = checks.check_asked("weight", args.weight, args, signals)
        self.asked = (*self._asked, *self._weight_asked)
        checks.check_signals_are_asked(signals, self.asked)
        self.distinct = checks.check_wrong_references(train_dataset, self.asked, args)
        self._has_lambda = args.row.has_lambda if credit is None else "lam" in self._asked
        if credit is not None and not self._has_lambda:
            args = copy.copy(args)  # the caller's stay as they are
            args.lambda_warmup_steps = args.lambda_decay_steps = 0
        self._pending: dict[str, Any] | None = None
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

    @property
    def functions(self) -> list[Credit]:
        """The credit function of this run, and the weight of its distillation term if it has one."""
        return [self.credit or self.args.credit, *filter(None, [self.args.weight])]

    # Loss

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        is_taught = self.model.training and self.teacher is not None
        if is_taught and self._has_lambda:
            lam = self.args.lambda_at(self.state.global_step)
            self._metrics["train"]["rlsd/lambda"].append(lam)
        advantages = inputs["advantages"]
        if "rewards" not in inputs:  # an evaluation, or a step that needs no teacher: GRPO's
            self._show_credit(inputs, advantages)
            if is_taught:
                self._metrics["train"]["rlsd/intervention"].append(0.0)
            return super()._compute_loss(model, inputs)
        # A copy, because TRL hands the same dictionary out again when rollouts are reused.
        self._pending = inputs = dict(inputs)
        with states.hidden_states(model, "teacher_hidden" in inputs) as hidden:
            loss = super()._compute_loss(model, inputs)
        if self._pending is not None:
            raise RuntimeError("TRL's loss never asked for log-probabilities: credit not applied.")
        self._show_credit(inputs, advantages)
        if hidden:
            loss = loss + self._distillation_loss(model, hidden[0], inputs)
        return loss

    def _show_credit(self, inputs: dict[str, Any], advantages: Tensor) -> None:
        if self.model.training:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, CreditCallback):
                    callback.on_credit(self, inputs, advantages)

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
        advantages, mask = inputs["advantages"], states.credit_mask(inputs)
        if advantages.dim() != 1:
            raise RuntimeError(f"Advantages were reweighted already: {tuple(advantages.shape)}.")
        # P_S is the policy that wrote the rollout: credit belongs to the rollout, as A does.
        student = inputs.get("old_per_token_logps", logps)
        teacher = inputs.get("teacher_per_token_logps", student)  # no teacher, no gap
        gap = teacher - student
        known = self._known_signals(inputs, student)
        if self.credit is not None:
            # Before the function sees them, so that it is not blamed for them.
            self._check_finite(gap, inputs["prompt_ids"], "teacher or student")
        shuffle = self._permutation() if self.args.permute_credit else lambda function: function
        credited, sums = self._credited(advantages, gap, mask, known, shuffle)
        if (weight := self.args.weight) is not None:
            asked = {name: known[name] for name in self._weight_asked if name in known}
            inputs["weight"] = shuffle(weight)(advantages, gap, mask, **asked)
            sums["distillation_weight"] = ((inputs["weight"] * mask).sum(), mask.sum())
        broken = (~(teacher + logps).isfinite()).sum()
        if self.log_means(credits.gap_sums(gap, mask) | sums, broken):
            self._check_finite(teacher, inputs["prompt_ids"], "teacher")
            self._check_finite(logps, inputs["prompt_ids"], "student")
        age = None if self.teacher is None else self.teacher.age(self.state.global_step)
        if age is not None:
            self._metrics["train"]["rlsd/teacher_age"].append(age)
        return credited

    def _credited(
        self,
        advantages: Tensor,
        gap: Tensor,
        mask: Tensor,
        known: dict[str, Any],
        shuffle: Callable[[Credit], Credit],
    ) -> tuple[Tensor, Sums]:
        """Token advantages (N, T) by the run's credit function, and what is logged of them."""
        args, function = self.args, self.functions[0]
        asked = {name: known[name] for name in self._asked if name in known}

        def assign(verdicts: Tensor) -> Tensor:
            # Copies: a function that writes into them would change what is logged, and A itself.
            copies = (verdicts.clone(), gap.clone(), mask.clone())
            more = {k: v.clone() if isinstance(v, Tensor) else v for k, v in asked.items()}
            return shuffle(function)(*copies, **more)

        credited = assign(advantages)
        if self.credit is not None or self.signals is not None:  # something of it is the caller's
            checks.check_credited(credited, gap.shape, function)
        if self.credit is not None:
            return credited, credits.intervention_sums(credited, advantages, mask)
        if not args.has_token_credit or args.distillation_mode == SAMPLED:
            return credited, {}
        sums = credits.intervention_sums(credited, advantages, mask)
        if self.teacher is not None and "success" not in asked:
            sums |= credits.drift_sums(credited, assign(-advantages), advantages, gap, mask)
        if args.row.evidence is None:
            return credited, sums
        log_weight = args.row.evidence(advantages, gap)
        log_clip = args.weight_clip == "log"
        weights = credits.weight_sums(log_weight, mask, args.epsilon_w, log_clip=log_clip)
        return credited, weights | sums

    def _known_signals(self, inputs: dict[str, Any], student: Tensor) -> dict[str, Any]:
        """Everything that a credit function or a weight may be given, by name."""
        carried = {k: v for k, v in inputs.items() if k.startswith(states.SIGNAL)}
        known = {name.removeprefix(states.SIGNAL): value for name, value in carried.items()}
        known |= {
            "lam": self.args.lambda_at(self.state.global_step),
            "epsilon_w": self.args.epsilon_w,
            "success": inputs["rewards"] >= self.args.success_reward_threshold,
            "rewards": inputs["rewards"],
            "entropy": inputs["entropy"],
            "total": self.accelerator.reduce,
        }
        if "wrong_logps" in inputs:
            known["wrong_gaps"] = inputs["wrong_logps"].transpose(0, 1) - student
        if "ref_per_token_logps" in inputs:
            known["reference_gap"] = inputs["ref_per_token_logps"] - student
        if "gate" in self.asked:
            known["gate"] = self._gate()
            self._metrics["train"]["rlsd/gate"].append(known["gate"])
        return known

    def _gate(self) -> float:
        """0 while the last step's mean entropy lies below `GATE_SHARE` of the first steps', else 1."""
        *first, last = self.teacher.memory or [0.0]
        return float(len(first) < GATE_STEPS or last >= GATE_SHARE * sum(first) / len(first))

    def remember_entropy(self) -> None:
        """Keep the step's mean entropy: of each of the first steps, and of the last."""
        of_step = self._metrics["train"]["entropy"][-self.current_gradient_accumulation_steps :]
        mean = sum(of_step) / len(of_step)
        self.teacher.memory = [*self.teacher.memory[:GATE_STEPS], mean]

    def _permutation(self) -> Callable[[Credit], Credit]:
        """A shuffle of token credit that is one for all calls of this micro-step, and no other's."""
        micro_step = self._step % self.current_gradient_accumulation_steps
        where = self.args.seed, self.state.global_step, micro_step, self.accelerator.process_index
        seed = random.Random(str(where)).getrandbits(63)

        return lambda function: credits.permuted(function, torch.Generator().manual_seed(seed))

    def _distillation_loss(
        self, model: nn.Module, hidden: Tensor, inputs: dict[str, Any]
    ) -> Tensor:
        """The weighted mean over tokens of D(P_T, P_S), with the gradient through P_S only."""
        mask = states.credit_mask(inputs)
        (ours, our_bias), (theirs, their_bias) = states.head_of(model), self._teacher_head
        models = states.predicting(hidden, mask.size(1)), ours, inputs["teacher_hidden"], theirs
        how = {
            "student_bias": our_bias,
            "teacher_bias": their_bias,
            "temperature": self.temperature,
        }
        per_token = divergence(self.args.divergence, *models, mask.bool(), **how)
        loss = states.token_mean(
            per_token * inputs["weight"] if "weight" in inputs else per_token,
            states.loss_mask(inputs),
            self.args,
            num_items=inputs["num_items_in_batch"],
            num_processes=self.accelerator.num_processes,
            accumulation=self.current_gradient_accumulation_steps,
        )
        self.log_means({"divergence": (per_token.detach().sum(), mask.sum())})
        return (self.args.distillation_weight or self.args.row.distillation_weight) * loss

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            upstream.complete_card(Path(self.args.output_dir, "README.md"))


class CreditCallback(TrainerCallback):
    """A callback that also sees the rollouts of every training micro-step with their credit."""

    def on_credit(self, trainer: RLSDTrainer, inputs: dict[str, Any], advantages: Tensor) -> None:
        """Called on every rank, once for each micro-step.

        `inputs` is TRL's dictionary, whose `advantages` are the token advantages (N, T), or (N,)
        in a step of plain GRPO; `advantages` (N,) are those of the rollouts. Neither may be changed.
        """


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
                f"step {state.global_step} needs the teacher, which an earlier train() released after "
                f"lambda_decay_steps={args.lambda_decay_steps}. Make a new trainer."
            )
        if self.trainer._checkpoint is not None:
            teacher.load(Path(self.trainer._checkpoint), self.trainer.model)
        elif self.has_begun:
            teacher.take(self.trainer.model, state.global_step)
            teacher.memory = []
            if teacher.fixed_weights():  # a base teacher, which is another one now
                found = checkpoints.print_of_fixed(self.trainer)
                self.trainer.fixed_weights = self.trainer._settings["fixed weights"] = found
        self.has_begun = True

    def on_step_end(self, args: RLSDConfig, state: Any, control: Any, **kwargs: Any) -> None:
        """Called on every rank, before a checkpoint of the same step is written."""
        teacher = self.trainer.teacher
        if "gate" in self.trainer.asked:
            self.trainer.remember_entropy()
        if args.teacher_is_over(state.global_step) and teacher.model is not None:
            teacher.release()
        else:
            teacher.sync(self.trainer.model, state.global_step)
