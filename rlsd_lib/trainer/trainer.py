"""`RLSDTrainer`: what changes against `trl.GRPOTrainer`, and nothing else.

Rollouts, rewards, group advantages, losses, clipping, KL, entropy and vLLM are TRL's. Two things
are added. After the rollouts, a teacher that may see more than the student scores the sampled
tokens. In the loss, the advantage (N,) becomes a token advantage (N, T) by the method's credit
function, and some methods add a divergence between teacher and student.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlsd_lib import prompts as privileged
from rlsd_lib.credit import drift_sums, gap_sums, weight_sums
from rlsd_lib.divergence import divergence
from rlsd_lib.methods import PEER, PROMPT
from rlsd_lib.prompts import demonstrations
from rlsd_lib.trainer import checks, sharded
from rlsd_lib.trainer import states as distillation
from rlsd_lib.trainer.checkpoints import checkpoint_name
from rlsd_lib.trainer.completion_head import CompletionHead
from rlsd_lib.trainer.config import RLSDConfig
from rlsd_lib.trainer.steady import SteadyTrainer
from rlsd_lib.trainer.teacher import Teacher, TeacherCallback
from rlsd_lib.trainer.teacher_pass import Scorer
from rlsd_lib.trainer.vllm_sync import keep_base_exact


class RLSDTrainer(SteadyTrainer):
    """GRPO whose token advantages are shaped by a teacher that sees privileged information.

    Evaluation runs no teacher: the evaluation loss is GRPO's for every method.

    A drop-in for [`~trl.GRPOTrainer`] with one more dataset column, `privileged_context` (str).
    With `method="grpo"`, or while lambda is 0, every step is bit-identical to the parent's, unless
    `completion_head=True`.

    Raises:
        ValueError: for settings or rows that would make the gap meaningless; see `RLSDConfig`.
    """

    _tag_names = ("trl", "grpo", "rlsd")
    _name = "RLSD"

    def __init__(
        self,
        model: "str | PreTrainedModel",
        reward_funcs: Any = None,
        args: RLSDConfig | None = None,
        train_dataset: Any = None,
        *others: Any,
        teacher_model: "str | PreTrainedModel | None" = None,
        **kwargs: Any,
    ) -> None:
        args = RLSDConfig() if args is None else args
        if not isinstance(args, RLSDConfig):
            raise TypeError(f"args must be an RLSDConfig, got {type(args).__name__}.")
        self.teacher: Teacher | None = None
        self.scorer = Scorer(self)
        self._pending: dict[str, Any] | None = None
        self._final_prompts: list[privileged.Prompt] = []
        self._completions: list = []
        self._rewards: list[float] = []
        self._teacher_head: tuple[Tensor, Tensor | None] | None = None
        checks.check_arguments(reward_funcs, args, train_dataset, teacher_model, kwargs)
        super().__init__(model, reward_funcs, args, train_dataset, *others, **kwargs)
        self.completion_head = CompletionHead(self.accelerator.device)
        self._cuts_head = False
        if self.use_vllm:
            keep_base_exact(self.model, self.vllm_generation)
        if self._is_vlm:
            self.model.register_forward_pre_hook(checks.drop_empty_images, with_kwargs=True)
        if args.uses_teacher:
            checks.check_model(self.model, self.processing_class, args)
            checks.check_sharding(self.model, args, self.accelerator)
            if isinstance(train_dataset, Dataset) and self.environment_factories is None:
                self.scorer.check_lengths(train_dataset["prompt"][:])
            self.teacher = Teacher(self.model, args, self.accelerator, teacher_model)
            if teacher_model is not None:
                external = self.teacher.model
                if self._is_vlm:  # a copy of the student has the student's hook
                    external.register_forward_pre_hook(checks.drop_empty_images, with_kwargs=True)
                checks.check_teacher(self.model, external, self._tokenizer, teacher_model, args)
            self.scorer.check_pass()
            self.add_callback(TeacherCallback(self))

    # Rollouts

    def _generate(self, prompts: list) -> tuple:
        # The final messages: observations appended, images in place. TRL does not hand them back.
        self._final_prompts = prompts
        if self._is_vlm:
            checks.check_images(prompts, self.accelerator)
        generated = super()._generate(prompts)
        if generated[6] is not None:
            # A row without an image is None to TRL and an empty list to the processor TRL asks.
            generated = (*generated[:6], [found or [] for found in generated[6]], generated[7])
        self._completions = generated[3]
        return generated

    def _calculate_rewards(self, inputs: list, *args: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, *args)
        # Of all ranks: the peers of a rollout may have been generated elsewhere. What no function
        # could score stays NaN, as in TRL's advantages: a sum would turn it into a 0.
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        self._rewards = total.masked_fill(rewards.isnan().all(dim=1), torch.nan).tolist()
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if not (self.model.training and self._teacher_is_needed()):
            return output
        contexts = self._contexts(inputs)
        dense = self.args.divergence is not None
        scores = self.scorer.score(self._final_prompts, contexts, output, want_hidden=dense)
        self._check_finite(scores.logps, output["prompt_ids"], "teacher")
        output["teacher_per_token_logps"] = scores.logps
        if dense:
            output["teacher_hidden"] = scores.hidden
            # Reused rollouts outlive an optimiser step; the head must stay that of their states.
            keep = len(self._steps_served()) > 1
            self._teacher_head = tuple(
                t.clone() if keep and t is not None else t for t in scores.head
            )
        if self.args.row.teacher_sees == PEER:
            shown = [context is not None for context in contexts]
            output["has_demonstration"] = torch.tensor(shown, device=self.accelerator.device)
        return output

    def _teacher_is_needed(self) -> bool:
        """Whether any optimiser step that this generation batch serves asks the teacher."""
        return self.teacher is not None and any(
            map(self.args.needs_teacher_at, self._steps_served())
        )

    def _contexts(self, inputs: list[dict[str, Any]]) -> list[str | None]:
        """What the teacher is shown beside each prompt; None for nothing."""
        sees = self.args.row.teacher_sees
        if sees == PROMPT:
            return [None] * len(inputs)
        if sees == PEER:
            return self._peer_contexts(inputs)
        contexts = [row.get(privileged.COLUMN) for row in inputs]
        privileged.check_contexts(contexts, self.args.privileged_template)
        held = privileged.count_in_prompts(self._final_prompts, contexts)
        self.log_means({"reference_in_prompt_frac": (held, len(contexts))})
        return contexts

    def _peer_contexts(self, inputs: list[dict[str, Any]]) -> list[str | None]:
        feedback = [
            row.get(privileged.COLUMN) if self.args.include_environment_feedback else None
            for row in inputs
        ]
        first = self.accelerator.process_index * len(inputs)
        shown = demonstrations(
            gather_object(self._completions),
            self._rewards,
            gather_object(feedback),
            slice(first, first + len(inputs)),
            group_size=self.num_generations,
            threshold=self.args.success_reward_threshold,
            with_failed=self.args.include_failed_rollout,
        )
        # The tally is of all ranks already; a mean of equal ratios is that ratio.
        self.log_means({"demonstration_group_frac": (shown.groups_with_success, shown.groups)})
        return shown.texts

    # Loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._buffered_inputs is None or self._step % self._micro_steps_served() == 0:
            # Old and teacher's log-probabilities are made now, for all of these steps or none.
            self._cuts_head = all(map(self.args.cuts_head_at, self._steps_served()))
        with self.completion_head.applied(self._cuts_head):
            return super().training_step(*args, **kwargs)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        training = self.model.training and self.teacher is not None
        if training and self.args.row.evidence is not None:
            self._metrics["train"]["rlsd/lambda"].append(
                self.args.lambda_at(self.state.global_step)
            )
        if "teacher_per_token_logps" not in inputs:
            if training:
                self._metrics["train"]["rlsd/intervention"].append(0.0)
            return super()._compute_loss(model, inputs)
        # A copy, because TRL hands the same dictionary out again when rollouts are reused.
        self._pending = inputs = dict(inputs)
        collect = (lambda states: states) if "teacher_hidden" in inputs else None
        with distillation.hidden_states(model, collect) as hidden:
            loss = super()._compute_loss(model, inputs)
        if self._pending is not None:
            raise RuntimeError("TRL's loss never asked for log-probabilities: credit not applied.")
        return loss + self._distillation_loss(model, hidden[0], loss, inputs) if hidden else loss

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple:
        head = self.completion_head.wrap(model, logits_to_keep)
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(
            head, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        # TRL reads inputs["advantages"] after this first forward of the loss, so the student's
        # log-probabilities cost nothing extra.
        if self._pending is not None:
            inputs, self._pending = self._pending, None
            self._check_finite(logps, inputs["prompt_ids"], "student")
            inputs["advantages"] = self._token_advantages(inputs, logps.detach())
        return logps, entropies, aux_loss

    def _token_advantages(self, inputs: dict[str, Any], logps: Tensor) -> Tensor:
        """A (N,) -> A_hat (N, T) by the method's credit function, and the metrics of it."""
        advantages, mask = inputs["advantages"], distillation.loss_mask(inputs)
        if advantages.dim() != 1:
            raise RuntimeError(f"Advantages were reweighted already: {tuple(advantages.shape)}.")
        # P_S is the policy that wrote the rollout: credit belongs to the rollout, as A does.
        gap = inputs["teacher_per_token_logps"] - inputs.get("old_per_token_logps", logps)
        args, lam = self.args, self.args.lambda_at(self.state.global_step)
        assign = partial(args.credit, gap=gap, mask=mask, lam=lam, epsilon_w=args.epsilon_w)
        credited, sums = assign(advantages), gap_sums(gap, mask)
        if args.row.evidence is not None:
            clip = {"epsilon_w": args.epsilon_w, "log_clip": args.log_clip}
            log_weight = args.row.evidence(advantages, gap)
            sums |= weight_sums(credited, log_weight, advantages, mask, **clip)
            sums |= drift_sums(credited, assign(-advantages), advantages, gap, mask)
        self.log_means(sums)
        if (age := self.teacher.age(self.state.global_step)) is not None:
            self._metrics["train"]["rlsd/teacher_age"].append(age)
        return credited

    def _distillation_loss(
        self, model: nn.Module, hidden: Tensor, policy_loss: Tensor, inputs: dict[str, Any]
    ) -> Tensor:
        """The weighted mean over tokens of D(P_T, P_S), with the gradient through P_S only."""
        mask = distillation.loss_mask(inputs)
        student, teacher = distillation.head_of(model), self._teacher_head
        per_token = divergence(
            self.args.divergence,
            distillation.predicting(hidden, mask.size(1)),
            student[0],
            inputs["teacher_hidden"],
            teacher[0],
            mask.bool(),
            student_bias=student[1],
            teacher_bias=teacher[1],
            temperature=self.temperature,
        )
        loss = distillation.token_mean(
            per_token,
            distillation.policy_mask(inputs),
            self.args,
            num_items=inputs["num_items_in_batch"],
            num_processes=self.accelerator.num_processes,
            accumulation=self.current_gradient_accumulation_steps,
        )
        loss = (self.args.distillation_weight or 1.0) * loss
        self.log_means({"divergence": (per_token.detach().sum(), mask.sum())})
        # Costs two backward passes of the head, so only where the step is logged; and DeepSpeed
        # would take them for the backward pass of the step.
        logged = (self.state.global_step + 1) % max(int(self.state.logging_steps or 1), 1) == 0
        if self.args.row.needs_weight and logged and not self.is_deepspeed_enabled:
            terms = {"policy": policy_loss, "distillation": loss}
            norms = distillation.gradient_norms(model, terms, hidden)
            share = (norms["distillation"], norms["policy"] + norms["distillation"])
            self.log_means({"distillation_gradient_frac": share})
        return loss

    # Checkpoints

    def _write_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._write_checkpoint(model, trial)
        if self.teacher is not None:
            step = self.state.global_step
            folder = Path(self._get_output_dir(trial)) / checkpoint_name(step)
            self.teacher.save(folder, step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        whole = sharded.sharding_of(self.accelerator) is None
        if self.teacher is not None and self.teacher.adapter is not None and whole:
            # With an adapter in a sub-folder (the teacher's), transformers 5.17 restores only that
            # one and leaves the trained adapter at its initial weights.
            student = self.accelerator.unwrap_model(self.model)
            student.load_adapter(resume_from_checkpoint, "default", is_trainable=True)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.teacher is not None and checkpoint is not None:
            self.teacher.load(Path(checkpoint), self.model)
