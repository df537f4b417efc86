"""`RLSDTrainer`: what changes against `trl.GRPOTrainer`, and nothing else.

Rollouts, rewards, group advantages, losses, clipping, KL, entropy and vLLM are TRL's. Two things
are added: after the rollouts, a teacher that sees (x, r) scores the sampled tokens; in the loss,
the advantage (N,) becomes a token advantage (N, T) through the method's credit function.
"""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import pad

from . import privileged
from .config import METHODS, RLSDConfig
from .credit import credit_sums
from .teacher import Teacher, TeacherCallback

# What TRL's output dictionary holds of the images; the teacher sees the very same tensors.
IMAGE_FIELDS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "image_position_ids",
)
TYPE_ID_FIELDS = ("token_type_ids", "mm_token_type_ids")


class RLSDTrainer(GRPOTrainer):
    """GRPO whose token advantages are shaped by a teacher that sees privileged information.

    A drop-in for [`~trl.GRPOTrainer`] with one more dataset column, `privileged_context` (str).
    With `method="grpo"`, or while lambda is 0, every step is bit-identical to the parent's.

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
        **kwargs: Any,
    ) -> None:
        args = RLSDConfig() if args is None else args
        if not isinstance(args, RLSDConfig):
            raise TypeError(f"args must be an RLSDConfig, got {type(args).__name__}.")
        self.teacher: Teacher | None = None
        self._method = METHODS[args.method]
        self._pending: dict[str, Any] | None = None
        self._final_prompts: list[privileged.Prompt] = []
        if args.uses_teacher:
            _check_rows(train_dataset, args)
            if kwargs.get("rollout_func") is not None:
                raise ValueError(
                    "rollout_func builds its own prompt ids, which the teacher's prompt cannot be "
                    "matched to. Use tools or environment_factory instead."
                )
        super().__init__(model, reward_funcs, args, train_dataset, **kwargs)
        if args.uses_teacher:
            _check_model(self.model, self.processing_class)
            self.teacher = Teacher(self.model, args, self.accelerator)
            self.add_callback(TeacherCallback(self))

    # Rollouts

    def _generate(self, prompts: list) -> tuple:
        # The final messages: observations appended, images in place. TRL does not hand them back.
        self._final_prompts = prompts
        return super()._generate(prompts)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if self.model.training and self._lambda_ahead() > 0:
            contexts = [row.get(privileged.COLUMN) for row in inputs]
            privileged.check_contexts(contexts, self.args.privileged_template)
            in_prompt = privileged.count_in_prompts(self._final_prompts, contexts)
            rows = torch.tensor([in_prompt, len(contexts)])
            self._log_means({"reference_in_prompt_frac": (rows[0], rows[1])})
            output["teacher_per_token_logps"] = self._score_with_teacher(contexts, output)
        return output

    def _lambda_ahead(self) -> float:
        """The largest lambda of the optimiser steps that this generation batch will serve."""
        if self.teacher is None:
            return 0.0
        accumulation = self.args.gradient_accumulation_steps
        micro_steps = self.args.steps_per_generation * self.num_iterations
        steps = -(-(self._step % accumulation + micro_steps) // accumulation)
        first = self.state.global_step
        return max(self.args.lambda_at(step) for step in range(first, first + steps))

    @torch.no_grad()
    def _score_with_teacher(self, contexts: list[str], output: dict[str, Any]) -> Tensor:
        """log P_T of the sampled tokens, (N, T): one teacher forward per rollout."""
        completion_ids, completion_mask = output["completion_ids"], output["completion_mask"]
        prompt_ids, prompt_mask, type_ids = self._teacher_prompts(contexts, completion_ids)
        images = {name: output[name] for name in IMAGE_FIELDS if name in output}
        with (
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            self.teacher.active(self.model) as teacher,
        ):
            logps, _, _ = self._get_per_token_logps_and_entropies(
                teacher,
                torch.cat([prompt_ids, completion_ids], dim=1),
                torch.cat([prompt_mask, completion_mask], dim=1),
                completion_ids.size(1),
                batch_size=self.args.per_device_train_batch_size,
                **images,
                **type_ids,
            )
        self._check_finite(logps, "teacher")
        return logps

    def _teacher_prompts(
        self, contexts: list[str], completion_ids: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Left-padded teacher prompts (N, P), their mask, and type ids over prompt + completion."""
        contexts = self._fit_contexts(contexts)
        template = self.args.privileged_template
        pairs = zip(self._final_prompts, contexts, strict=True)
        prompts = [privileged.teacher_prompt(*pair, template) for pair in pairs]
        ids, _, fields = self._tokenize_prompts(prompts)
        type_ids = {
            name: torch.cat(
                [self._pad_left(fields[name], 0), torch.zeros_like(completion_ids)], dim=1
            )
            for name in TYPE_ID_FIELDS
            if name in fields
        }
        mask = [[1] * len(row) for row in ids]
        pad_id = self._tokenizer.pad_token_id
        return self._pad_left(ids, pad_id), self._pad_left(mask, 0), type_ids

    def _fit_contexts(self, contexts: list[str]) -> list[str]:
        """Shorten privileged texts to `max_teacher_prompt_length`, and log the share shortened."""
        limit = self.args.max_teacher_prompt_length
        if limit is None:
            return contexts
        template = self.args.privileged_template

        def count_tokens(prompt: privileged.Prompt) -> int:
            return len(self._tokenize_prompts([prompt])[0][0])

        fitted = []
        for prompt, context in zip(self._final_prompts, contexts, strict=True):
            if count_tokens(privileged.teacher_prompt(prompt, context, template)) > limit:
                context = privileged.shorten_to_fit(
                    prompt, context, template, limit, self._tokenizer, count_tokens
                )
            fitted.append(context)
        cut = sum(new != old for new, old in zip(fitted, contexts, strict=True))
        self._log_means({"context_shortened_frac": (torch.tensor(cut), torch.tensor(len(fitted)))})
        return fitted

    def _pad_left(self, rows: list[list[int]], value: int) -> Tensor:
        return pad(
            [torch.as_tensor(row) for row in rows],
            padding_value=value,
            padding_side="left",
            pad_to_multiple_of=self.pad_to_multiple_of,
        ).to(self.accelerator.device)

    # Loss

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if self.model.training and self.teacher is not None:
            self._metrics["train"]["rlsd/lambda"].append(self.args.lambda_at(self.state.global_step))
        if "teacher_per_token_logps" not in inputs:
            if self.model.training and self.teacher is not None:
                self._metrics["train"]["rlsd/intervention"].append(0.0)
            return super()._compute_loss(model, inputs)
        # A copy, because TRL hands the same dictionary out again when rollouts are reused.
        self._pending = inputs = dict(inputs)
        loss = super()._compute_loss(model, inputs)
        if self._pending is not None:
            raise RuntimeError("TRL's loss never asked for log-probabilities: credit not applied.")
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple:
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        # TRL reads inputs["advantages"] after this first forward of the loss, so the student's
        # log-probabilities cost nothing extra.
        if self._pending is not None:
            inputs, self._pending = self._pending, None
            self._check_finite(logps, "student")
            inputs["advantages"] = self._token_advantages(inputs, logps.detach())
        return logps, entropies, aux_loss

    def _token_advantages(self, inputs: dict[str, Any], logps: Tensor) -> Tensor:
        """A (N,) -> A_hat (N, T) by the method's credit function, and the metrics of it."""
        advantages, mask = inputs["advantages"], inputs["completion_mask"]
        if advantages.dim() != 1:
            raise RuntimeError(f"Advantages were reweighted already: {tuple(advantages.shape)}.")
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        # P_S is the policy that wrote the rollout: credit belongs to the rollout, as A does.
        student = inputs.get("old_per_token_logps", logps)
        gap = inputs["teacher_per_token_logps"] - student
        lam, epsilon_w = self.args.lambda_at(self.state.global_step), self.args.epsilon_w
        credited = self._method.credit(advantages, gap, mask, lam=lam, epsilon_w=epsilon_w)
        log_weight = self._method.evidence(advantages, gap)
        self._log_means(credit_sums(credited, log_weight, advantages, gap, mask, epsilon_w))
        age = self.teacher.age(self.state.global_step)
        self._metrics["train"]["rlsd/teacher_age"].append(age)
        return credited

    def _log_means(self, sums: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Log numerator / denominator under rlsd/, both summed over all ranks."""
        stacked = torch.stack([torch.stack(pair).float() for pair in sums.values()])
        totals = self.accelerator.reduce(stacked.to(self.accelerator.device), reduction="sum")
        for name, (total, count) in zip(sums, totals.tolist(), strict=True):
            if count:
                self._metrics["train"][f"rlsd/{name}"].append(total / count)

    def _check_finite(self, logps: Tensor, whose: str) -> None:
        bad = (~logps.isfinite()).any(dim=1).nonzero().flatten().tolist()
        if bad:
            raise FloatingPointError(
                f"Non-finite {whose} log-probabilities at step {self.state.global_step}, in samples "
                f"{bad[:10]} of the batch on rank {self.accelerator.process_index}. Training stops "
                f"here; checkpoints under {self.args.output_dir} are intact."
            )

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.teacher is not None:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            folder = Path(self._get_output_dir(trial=trial)) / name
            self.teacher.save(folder, self.state.global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.teacher is not None and self.teacher.adapter is not None:
            # With an adapter in a sub-folder (the teacher's), transformers 5.17 restores only that
            # one and leaves the trained adapter at its initial weights.
            student = self.accelerator.unwrap_model(self.model)
            student.load_adapter(resume_from_checkpoint, "default", is_trainable=True)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.teacher is not None and checkpoint is not None:
            self.teacher.load(Path(checkpoint), self.model)


def _check_rows(dataset: Any, args: RLSDConfig) -> None:
    """Check every row of a map-style dataset; a streamed one is checked batch by batch."""
    columns = getattr(dataset, "column_names", None)
    if columns is not None and privileged.COLUMN not in columns:
        raise ValueError(
            f"method={args.method!r} needs a {privileged.COLUMN!r} column (str: what the teacher "
            f"may see and the student may not). The dataset has {columns}."
        )
    if isinstance(dataset, Dataset):
        contexts = dataset[privileged.COLUMN][:]
        privileged.check_contexts(contexts, args.privileged_template)
        privileged.count_in_prompts(dataset["prompt"][:], contexts)


def _check_model(model: nn.Module, processing_class: Any) -> None:
    """Refuse dropout, which would put noise into the gap, and processors that pad right."""
    noisy = [name for name, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0]
    text = model.config.get_text_config()
    noisy += [f"config.{k}" for k in ("attention_dropout",) if getattr(text, k, 0) > 0]
    if noisy:
        raise ValueError(
            f"Dropout is active in {noisy[:3]} ({len(noisy)} places) and would put noise into the "
            "gap. Set disable_dropout=True, lora_dropout=0, and attention_dropout=0 in the config."
        )
    if isinstance(processing_class, ProcessorMixin):
        side = processing_class.tokenizer.padding_side
        if side != "left":
            raise ValueError(
                f"The processor pads {side!r}; prompts must be padded on the left. Load it with "
                "padding_side='left'."
            )
