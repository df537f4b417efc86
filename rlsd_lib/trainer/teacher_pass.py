"""The teacher pass: what the teacher says of the tokens that the student sampled.

The teacher's own prompt is followed by the completion ids as they were sampled: nothing is decoded
and encoded again. Prompts that several rollouts have in common are computed once where that is
exact and saves enough, see `prefix`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import pad

from rlsd_lib import prompts as privileged
from rlsd_lib.methods import PROMPT
from rlsd_lib.prompts import without_images
from rlsd_lib.trainer import shared_prompts as prefix
from rlsd_lib.trainer.config import AUTO, PLAIN, SHARED
from rlsd_lib.trainer.shared_prompts import Prompts
from rlsd_lib.trainer.states import (
    IMAGE_FIELDS,
    TYPE_ID_FIELDS,
    causal_lm,
    head_of,
    hidden_states,
    predicting,
)

if TYPE_CHECKING:
    from rlsd_lib.trainer.trainer import RLSDTrainer


# Token positions of the shared pass over those of the plain one, up to which "auto" shares.
WORTH_IT = 0.75


class Scores(NamedTuple):
    """log P_T of the sampled tokens (N, T), the states (N, T, H) that predicted them, the head."""

    logps: Tensor
    hidden: Tensor | None
    head: tuple[Tensor, Tensor | None] | None


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
        seen = self.prompts(prompts, contexts, output)
        with (
            disable_gradient_checkpointing(trainer.model, args.gradient_checkpointing_kwargs),
            trainer.teacher.active(trainer.model) as teacher,
        ):
            # Inside the block, where an adapter's own layers and head are the active ones.
            logps, hidden = self._shared(teacher, seen, output, want_hidden) or self._plain(
                teacher, seen, output, want_hidden
            )
            head = head_of(teacher) if want_hidden else None
        if head is not None:
            head = tuple(None if part is None else part.detach() for part in head)
        return Scores(logps, hidden, head)

    def _plain(
        self, teacher: nn.Module, seen: Prompts, output: dict[str, Any], want_hidden: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Every rollout behind its own copy of the prompt, by TRL's own function."""
        ids, mask = output["completion_ids"], output["completion_mask"]
        length = ids.size(1)
        collect = (lambda states: predicting(states, length)) if want_hidden else None
        with hidden_states(teacher, collect) as hidden:
            logps, _, _ = self.trainer._get_per_token_logps_and_entropies(
                teacher,
                torch.cat([seen.ids, ids], dim=1),
                torch.cat([seen.mask, mask], dim=1),
                length,
                batch_size=self.trainer.args.per_device_train_batch_size,
                **_images(output),
                **seen.type_ids,
            )
        return logps, torch.cat(hidden) if hidden else None

    def _shared(
        self, teacher: nn.Module, seen: Prompts, output: dict[str, Any], want_hidden: bool
    ) -> tuple[Tensor, Tensor | None] | None:
        """Each distinct prompt once; None where the plain pass is to be taken."""
        accelerator, args = self.trainer.accelerator, self.trainer.args
        if args.teacher_pass == PLAIN:
            return None
        images = _images(output)
        reason = prefix.why_not(teacher, accelerator) or prefix.why_not_batch(seen, images)
        self._refuse_if_asked(reason)
        same = torch.equal(seen.ids, output["prompt_ids"])
        # The same prompts as the student's: only the same computation gives a gap of exactly 0.
        if reason is not None or (same and torch.equal(seen.mask, output["prompt_mask"])):
            return None
        ids, mask = output["completion_ids"], output["completion_mask"]
        rollouts = prefix.Rollouts(seen, ids, mask, prefix.pictures(images))
        chunks = prefix.plan(rollouts, args.per_device_train_batch_size)
        if not chunks:  # every rollout was truncated and masked: only the plain pass keeps shapes
            return None
        plain = len(ids) * (seen.ids.size(1) + ids.size(1))
        if args.teacher_pass == AUTO and prefix.positions_of(chunks) > WORTH_IT * plain:
            return None
        return prefix.score(
            accelerator.unwrap_model(teacher),
            rollouts,
            chunks,
            autocast=accelerator.autocast,
            want_hidden=want_hidden,
        )

    def check_pass(self) -> None:
        """Refuse `teacher_pass="shared"` where the teacher cannot do it, before any compute.

        Raises:
            ValueError: naming the reason.
        """
        accelerator = self.trainer.accelerator
        self._refuse_if_asked(prefix.why_not(self.trainer.teacher.model, accelerator))

    def _refuse_if_asked(self, reason: str | None) -> None:
        """Raise on every rank if sharing was asked for and one of them has a reason against it."""
        if self.trainer.args.teacher_pass != SHARED:
            return
        reasons = [text for text in gather_object([reason]) if text is not None]
        if reasons:
            raise ValueError(
                f"teacher_pass='shared' cannot be used here: {reasons[0]}. Use 'plain', or 'auto', "
                "which shares prompts where it can."
            )

    def prompts(
        self,
        prompts: Sequence[privileged.Prompt],
        contexts: Sequence[str | None],
        output: dict[str, Any],
    ) -> Prompts:
        """What the teacher reads before each completion, tokenised as TRL does the student's."""
        template = self.trainer.args.privileged_template
        seen = [
            prompt if context is None else privileged.teacher_prompt(prompt, context, template)
            for prompt, context in zip(prompts, self._fit(prompts, contexts), strict=True)
        ]
        ids, _, fields = self.trainer._tokenize_prompts(seen)
        self._check_positions(max(map(len, ids)) + output["completion_ids"].size(1))
        type_ids = {
            name: self._type_ids(name, fields[name], output)
            for name in TYPE_ID_FIELDS
            if name in fields
        }
        mask = [[1] * len(row) for row in ids]
        pad_id = self.trainer._tokenizer.pad_token_id
        return Prompts(self._pad_left(ids, pad_id), self._pad_left(mask, 0), type_ids)

    def _type_ids(self, name: str, rows: list[list[int]], output: dict[str, Any]) -> Tensor:
        """Type ids of the teacher's prompt, and those that TRL gave the completion."""
        prompt, completion = self._pad_left(rows, 0), torch.zeros_like(output["completion_ids"])
        if name in output:
            # Not all 0 where a tool answered with an image.
            completion = output[name][:, -completion.size(1) :]
            if "pixel_values" not in output:
                # TRL dropped the images of the batch, because a cut completion held part of one.
                prompt = torch.zeros_like(prompt)
        return torch.cat([prompt, completion], dim=1)

    def _check_positions(self, length: int) -> None:
        config = causal_lm(self.trainer.accelerator.unwrap_model(self.trainer.model)).config
        most = getattr(config.get_text_config(), "max_position_embeddings", None)
        if most is not None and length > most:
            raise ValueError(
                f"The teacher's prompt and completion take {length} positions, the model has "
                f"{most}. Set max_teacher_prompt_length (and max_completion_length) to fit."
            )

    def check_lengths(self, prompts: Sequence[privileged.Prompt]) -> None:
        """Refuse questions that leave `max_teacher_prompt_length` no room, before any compute.

        Images are not opened for this: their tokens are counted when the row comes up.

        Raises:
            ValueError: naming the rows.
        """
        limit = self.trainer.args.max_teacher_prompt_length
        if limit is None or self.trainer.args.row.teacher_sees == PROMPT:
            return
        template = self.trainer.args.privileged_template
        texts = map(without_images, prompts)
        bare = [privileged.teacher_prompt(prompt, "", template) for prompt in texts]
        rows = [i for i, prompt in enumerate(bare) if self._count(prompt) >= limit]
        if rows:
            raise ValueError(
                f"max_teacher_prompt_length={limit} leaves no room for the privileged text in "
                f"{len(rows)} dataset rows (rows {rows[:10]}): question and template alone fill "
                "it. Raise the limit or drop the rows."
            )

    def _fit(
        self, prompts: Sequence[privileged.Prompt], contexts: Sequence[str | None]
    ) -> Sequence[str | None]:
        """Shorten contexts to `max_teacher_prompt_length`, and log the share shortened."""
        if self.trainer.args.max_teacher_prompt_length is None:
            return contexts
        # Rollouts of a group ask the same thing; each question is measured once.
        known: dict[tuple[str, str | None], str | None] = {}
        for prompt, context in zip(prompts, contexts, strict=True):
            key = (repr(prompt), context)
            if key not in known:
                known[key] = context if context is None else self._shortened(prompt, context)
        fitted = [known[repr(p), context] for p, context in zip(prompts, contexts, strict=True)]
        cut = sum(new != old for new, old in zip(fitted, contexts, strict=True))
        self.trainer.log_means({"context_shortened_frac": (cut, len(fitted))})
        return fitted

    def _shortened(self, prompt: privileged.Prompt, context: str) -> str:
        args = self.trainer.args
        limit, template = args.max_teacher_prompt_length, args.privileged_template
        if self._count(privileged.teacher_prompt(prompt, context, template)) <= limit:
            return context
        return privileged.shorten_to_fit(
            prompt, context, template, limit, self.trainer._tokenizer, self._count
        )

    def _count(self, prompt: privileged.Prompt) -> int:
        return len(self.trainer._tokenize_prompts([prompt])[0][0])

    def _pad_left(self, rows: list[list[int]], value: int) -> Tensor:
        return pad(
            [torch.as_tensor(row) for row in rows],
            padding_value=value,
            padding_side="left",
            pad_to_multiple_of=self.trainer.pad_to_multiple_of,
        ).to(self.trainer.accelerator.device)


def _images(output: dict[str, Any]) -> dict[str, Any]:
    return {name: output[name] for name in IMAGE_FIELDS if name in output}
