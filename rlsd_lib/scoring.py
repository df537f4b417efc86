"""The teacher pass: what the teacher says of the tokens that the student sampled.

One forward per rollout, on the teacher's own prompt followed by the completion ids as they were
sampled: nothing is decoded and encoded again.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import pad

from rlsd_lib import privileged
from rlsd_lib.distillation import hidden_states, predicting

if TYPE_CHECKING:
    from rlsd_lib.trainer import RLSDTrainer

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


class TeacherPrompts(NamedTuple):
    """Left-padded prompts (N, P) of the teacher, and type ids over prompt + completion."""

    ids: Tensor
    mask: Tensor
    type_ids: dict[str, Tensor]


class Scores(NamedTuple):
    """log P_T of the sampled tokens (N, T), and the states (N, T, H) that predicted them."""

    logps: Tensor
    hidden: Tensor | None


class Scorer:
    """Scores rollouts with the trainer's teacher, through the trainer's own tokenisation."""

    def __init__(self, trainer: "RLSDTrainer") -> None:
        self.trainer = trainer

    @torch.no_grad()
    def score(
        self,
        prompts: Sequence[privileged.Prompt],
        contexts: Sequence[str | None],
        output: dict[str, Any],
        *,
        want_hidden: bool,
    ) -> Scores:
        """Score the completions in TRL's `output`; a context of None leaves the prompt as it is."""
        trainer, args = self.trainer, self.trainer.args
        completion_ids, completion_mask = output["completion_ids"], output["completion_mask"]
        length = completion_ids.size(1)
        seen = self.prompts(prompts, contexts, completion_ids)
        images = {name: output[name] for name in IMAGE_FIELDS if name in output}

        def keep(states: Tensor) -> Tensor:
            return predicting(states, length)

        with (
            disable_gradient_checkpointing(trainer.model, args.gradient_checkpointing_kwargs),
            trainer.teacher.active(trainer.model) as teacher,
            hidden_states(teacher, keep if want_hidden else None) as hidden,
        ):
            logps, _, _ = trainer._get_per_token_logps_and_entropies(
                teacher,
                torch.cat([seen.ids, completion_ids], dim=1),
                torch.cat([seen.mask, completion_mask], dim=1),
                length,
                batch_size=args.per_device_train_batch_size,
                **images,
                **seen.type_ids,
            )
        return Scores(logps, torch.cat(hidden) if hidden else None)

    def prompts(
        self,
        prompts: Sequence[privileged.Prompt],
        contexts: Sequence[str | None],
        completion_ids: Tensor,
    ) -> TeacherPrompts:
        """What the teacher reads before each completion, tokenised as TRL does the student's."""
        template = self.trainer.args.privileged_template
        seen = [
            prompt if context is None else privileged.teacher_prompt(prompt, context, template)
            for prompt, context in zip(prompts, self._fit(prompts, contexts), strict=True)
        ]
        ids, _, fields = self.trainer._tokenize_prompts(seen)
        type_ids = {
            name: torch.cat(
                [self._pad_left(fields[name], 0), torch.zeros_like(completion_ids)], dim=1
            )
            for name in TYPE_ID_FIELDS
            if name in fields
        }
        mask = [[1] * len(row) for row in ids]
        pad_id = self.trainer._tokenizer.pad_token_id
        return TeacherPrompts(self._pad_left(ids, pad_id), self._pad_left(mask, 0), type_ids)

    def _fit(
        self, prompts: Sequence[privileged.Prompt], contexts: Sequence[str | None]
    ) -> Sequence[str | None]:
        """Shorten contexts to `max_teacher_prompt_length`, and log the share shortened."""
        trainer, args = self.trainer, self.trainer.args
        limit, template = args.max_teacher_prompt_length, args.privileged_template
        if limit is None:
            return contexts

        def count_tokens(prompt: privileged.Prompt) -> int:
            return len(trainer._tokenize_prompts([prompt])[0][0])

        fitted = [
            context
            if context is None
            or count_tokens(privileged.teacher_prompt(prompt, context, template)) <= limit
            else privileged.shorten_to_fit(
                prompt, context, template, limit, trainer._tokenizer, count_tokens
            )
            for prompt, context in zip(prompts, contexts, strict=True)
        ]
        cut = sum(new != old for new, old in zip(fitted, contexts, strict=True))
        trainer.log_means({"context_shortened_frac": (cut, len(fitted))})
        return fitted

    def _pad_left(self, rows: list[list[int]], value: int) -> Tensor:
        return pad(
            [torch.as_tensor(row) for row in rows],
            padding_value=value,
            padding_side="left",
            pad_to_multiple_of=self.trainer.pad_to_multiple_of,
        ).to(self.trainer.accelerator.device)
