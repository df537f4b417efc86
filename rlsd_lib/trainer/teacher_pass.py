"""`TeacherPass`: rollouts are scored by a teacher that may see more than the student.

The teacher's own prompt is followed by the completion ids as they were sampled: nothing is decoded
and encoded again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import pad

from rlsd_lib import prompts as texts
from rlsd_lib.credit import Credit, leave_one_out
from rlsd_lib.divergence import teacher_contrast, teacher_entropy
from rlsd_lib.methods import PEER, PRIVILEGED, PROMPT
from rlsd_lib.prompts import Prompt
from rlsd_lib.trainer import checkpoints, checks, shared_prompts, states, upstream
from rlsd_lib.trainer.config import SHARED, RLSDConfig
from rlsd_lib.trainer.shared_prompts import Prompts
from rlsd_lib.trainer.teacher import Teacher

MARGIN = 512  # tokens that a chat template may add
Contexts = Sequence[str | None]
Signals = Callable[[list[dict[str, Any]], Tensor, Tensor], Mapping[str, Tensor]]


class Scores(NamedTuple):
    """log P_T of the sampled tokens (N, T), the states (N, T, H) that predicted them, the head."""

    logps: Tensor
    hidden: Tensor | None
    head: tuple[Tensor, Tensor | None] | None
    shortened: int  # contexts that were cut to max_teacher_prompt_length


class TeacherPass(GRPOTrainer):
    """GRPO whose rollouts a teacher scores, once each, through TRL's own tokenisation and head.

    While a teacher is needed, TRL's dictionary of a generation batch gains
    `teacher_per_token_logps` (N, T) and `rewards` (N,), NaN where no function could score; for
    methods with a divergence `teacher_hidden` (N, T, H), whose head is `_teacher_head`; where peers
    are shown, `has_demonstration` (N,); for credits that ask for them `wrong_logps` (N, K, T) and,
    by `states.SIGNAL` and their names, `group_success` (N,), `teacher_entropy` and `contrast_kl`
    (N, T), and what `signals` returns. All are tensors, so that they follow their rollouts through
    TRL's shuffle.

    `functions` are the credit and the weight, `asked` the names that they may be given, `distinct`
    the references that wrong ones are drawn from. The subclass has them, and `signals`, before this
    constructor runs.
    """

    asked: Sequence[str] = ()
    distinct: Sequence[str] = ()
    functions: Sequence[Credit] = ()
    signals: Signals | None = None

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: RLSDConfig,
        train_dataset: Any,
        teacher_model: Any,
        **grpo: Any,
    ) -> None:
        self.teacher: Teacher | None = None
        self._served = range(1)  # optimiser steps of the current rollouts
        self._final_prompts: list[Prompt] = []
        self._completions: list = []
        self._rewards = torch.zeros(0)
        self._teacher_head: tuple[Tensor, Tensor | None] | None = None
        super().__init__(model, reward_funcs, args, train_dataset, **grpo)
        self.reward_funcs = list(map(checks.judged, self.reward_funcs))
        upstream.restorable_device(args)
        self.completion_head = upstream.CompletionHead(self.accelerator.device)
        if self.use_vllm:
            upstream.keep_base_exact(self.model, self.vllm_generation)
        if self._is_vlm:
            for each in filter(None, (self.model, self.ref_model)):
                upstream.drop_empty_images(each)
        if not args.uses_teacher:
            return
        config = self.model.config.get_text_config()
        added = self._tokenizer.added_tokens_decoder.values()
        self._control = {token.content for token in added if token.special}
        self._positions: int | None = getattr(config, "max_position_embeddings", None)
        checks.check_model(self.model, self.processing_class, args)
        checks.check_sharding(self.model, args, self.accelerator)
        if isinstance(train_dataset, Dataset):
            self._check_rows(train_dataset)
        self.teacher = Teacher(self.model, args, self.accelerator, teacher_model)
        if teacher_model is not None:
            external = self.teacher.model
            if self._is_vlm:  # a copy of the student has the student's hook
                upstream.drop_empty_images(external)
            checks.check_teacher(self.model, external, self._tokenizer, teacher_model, args)
        if args.teacher_pass == SHARED:
            reason = shared_prompts.why_not(self.teacher.model, self.accelerator)
            if reason is not None:
                raise ValueError(
                    f"teacher_pass='shared' cannot be used here: {reason}. Use 'auto'."
                )

    # Rollouts, and what TRL knows of them

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._buffered_inputs is None or self._step % self._micro_steps_served() == 0:
            # Old and teacher's log-probabilities are computed once for all of these steps.
            self._served = self._steps_served()
        wanted = self.args.completion_head
        if wanted is None:
            wanted = all(map(self.args.needs_teacher_at, self._served))
        with self.completion_head.applied(wanted):
            return super().training_step(*args, **kwargs)

    def _generate(self, prompts: list) -> tuple:
        if self._is_vlm:
            checks.check_images(prompts, self.accelerator)
        *generated, images, tool_images = super()._generate(prompts)
        return (*generated, upstream.for_processor(images), tool_images)

    def _calculate_rewards(
        self, inputs: list, prompts: list, completions: list, completion_ids_list: list
    ) -> Tensor:
        # The final messages, observations and images included: TRL does not return them.
        # Copies, for a reward function may change what it is given.
        self._final_prompts, self._completions = map(texts.copied, (prompts, completions))
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        mode, step = "train" if self.model.training else "eval", self.state.global_step
        names = self.reward_func_names
        share = checks.check_rewards(rewards, names, step, training=mode == "train")
        self._metrics[mode]["rewards/unscored_frac"].append(share)
        # Of all ranks: a group may lie across two. A sum would turn NaN, "not mine to judge", into 0.
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        self._rewards = total.masked_fill(rewards.isnan().all(dim=1), torch.nan)
        return rewards

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, ids: Tensor, mask: Tensor, kept: int, *args: Any, **kwargs: Any
    ) -> tuple:
        head = self.completion_head.wrap(model, kept)
        return super()._get_per_token_logps_and_entropies(head, ids, mask, kept, *args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.model.training:
            checkpoints.check_weights(self.model, self.state.global_step, self.accelerator)
        output = super()._generate_and_score_completions(inputs)
        if not (self.model.training and any(map(self.args.has_credit_at, self._served))):
            return output
        own = self._own_rows(len(inputs))
        output["rewards"] = self._rewards[own]
        if "group_success" in self.asked:
            success = (self._rewards >= self.args.success_reward_threshold).float()
            success = success.masked_fill(self._rewards.isnan(), torch.nan)
            share = leave_one_out(success, self.num_generations)[own]
            output[f"{states.SIGNAL}group_success"] = share
        output |= self._given_signals(inputs, output)
        if self.teacher is not None:
            self._add_scores(inputs, output)
        return output

    def _given_signals(self, inputs: list[dict], output: dict[str, Any]) -> dict[str, Tensor]:
        """What the caller's `signals` says of this rank's rollouts. Collective."""
        if self.signals is None:
            return {}
        with checks.on_every_rank():
            ids = output["completion_ids"]
            given = self.signals(inputs, ids, states.loss_mask(output))
            checks.check_signals(given, ids.shape, self.functions)
        return {f"{states.SIGNAL}{name}": value.to(ids.device) for name, value in given.items()}

    def _add_scores(self, inputs: list[dict[str, Any]], output: dict[str, Any]) -> None:
        """Let the teacher score the rollouts of TRL's dictionary, and add what it says."""
        contexts = self._contexts(inputs)
        scores = self.teacher_scores(self._final_prompts, contexts, output)
        if self.args.max_teacher_prompt_length is not None:
            self.log_means({"context_shortened_frac": (scores.shortened, len(contexts))})
        output["teacher_per_token_logps"] = scores.logps
        if scores.hidden is not None:
            output["teacher_hidden"] = scores.hidden
            # Reused rollouts outlive an optimiser step; the head must stay that of their states.
            kept = len(self._served) > 1
            self._teacher_head = tuple(
                t.clone() if kept and t is not None else t for t in scores.head
            )
        if self.args.row.teacher_sees == PEER:
            shown = [context is not None for context in contexts]
            output["has_demonstration"] = torch.tensor(shown, device=self.accelerator.device)
        self._add_contrast(inputs, scores, output)

    def _add_contrast(self, inputs: list[dict], scores: Scores, output: dict[str, Any]) -> None:
        """What the teacher says under wrong references, one more pass for each, and how sure it is."""
        asked, wrong = self.asked, []
        if self.distinct:
            drawn = self._wrong_contexts(inputs)
            wrong = [self.teacher_scores(self._final_prompts, each, output) for each in drawn]
        if "wrong_gaps" in asked:
            output["wrong_logps"] = torch.stack([each.logps for each in wrong], dim=1)
        if scores.hidden is None:
            return
        head, bias = scores.head
        how = {"bias": bias, "temperature": self.temperature}
        mask = states.loss_mask(output)
        if "teacher_entropy" in asked:
            entropy = teacher_entropy(scores.hidden, head, mask, **how)
            output[f"{states.SIGNAL}teacher_entropy"] = entropy
        if "contrast_kl" in asked:
            changed = teacher_contrast(scores.hidden, wrong[0].hidden, head, mask, **how)
            output[f"{states.SIGNAL}contrast_kl"] = changed

    def _own_rows(self, count: int) -> slice:
        """This rank's `count` rows among those of all ranks."""
        first = self.accelerator.process_index * count
        return slice(first, first + count)

    def _steps_served(self) -> range:
        """Optimiser steps that rollouts generated now take part in."""
        accumulation = self.args.gradient_accumulation_steps
        micro_steps = self._micro_steps_served()
        # An epoch's last step may be short, and `_step` then no longer tells how much of the current
        # one is done. It matters where neither number divides the other: then, the most there is.
        aligned = not (micro_steps % accumulation and accumulation % micro_steps)
        done = self._step % accumulation if aligned else accumulation - 1
        first = self.state.global_step
        return range(first, first - (-(done + micro_steps) // accumulation))

    def _micro_steps_served(self) -> int:
        return self.args.steps_per_generation * self.num_iterations

    # What the teacher is shown

    def _contexts(self, inputs: list[dict[str, Any]]) -> Contexts:
        """The text beside each prompt; None for nothing."""
        sees = self.args.row.teacher_sees
        if sees == PROMPT:
            return [None] * len(inputs)
        if sees == PEER:
            return self._peer_contexts(inputs)
        column = self.args.privileged_column
        contexts = [row.get(column) for row in inputs]
        with checks.on_every_rank():
            texts.check_contexts(contexts, self.args.privileged_template, column, self._control)
            found = texts.count_in_prompts(self._final_prompts, contexts, column)
        self.log_means({"reference_in_prompt_frac": (found, len(contexts))})
        return contexts

    def _wrong_contexts(self, inputs: list[dict[str, Any]]) -> Iterator[Contexts]:
        """For each of the wrong references, what the teacher reads instead."""
        count, column = self.args.wrong_references, self.args.privileged_column
        drawn = (texts.wrong_references(row[column], self.distinct, count) for row in inputs)
        return zip(*drawn, strict=True)

    def _peer_contexts(self, inputs: list[dict[str, Any]]) -> Contexts:
        shown = texts.demonstrations(
            gather_object(self._completions),
            self._rewards.tolist(),
            self._own_rows(len(inputs)),
            group_size=self.num_generations,
            threshold=self.args.success_reward_threshold,
        )
        # The tally is of all ranks already; a mean of equal ratios is that ratio.
        self.log_means({"demonstration_group_frac": (shown.groups_with_success, shown.groups)})
        return [texts.spelled(text, self._control) for text in shown.texts]

    def teacher_prompts(
        self, prompts: Sequence[Prompt], contexts: Contexts, output: dict[str, Any]
    ) -> Prompts:
        """What the teacher reads before each completion, tokenised as TRL does the student's.

        For N final prompts, contexts (None leaves a prompt as it is) and TRL's dictionary of them;
        ids and mask (N, P) are padded on the left. Raises ValueError where the model's positions end.
        """
        fitted = list(map(self._fitted, prompts, contexts))
        cut = sum(text != context for text, context in zip(fitted, contexts, strict=True))
        read, _, fields = self._tokenize_prompts(list(map(self._seen, prompts, fitted)))
        length = max(map(len, read)) + output["completion_ids"].size(1)
        if self._positions is not None and length > self._positions:
            raise ValueError(
                f"The teacher's prompt and completion take {length} positions, the model has "
                f"{self._positions}. Lower max_teacher_prompt_length or max_completion_length."
            )
        types = {
            name: states.type_ids(self._pad_left(fields[name], 0), output, name)
            for name in states.TYPE_ID_FIELDS
            if name in fields
        }
        mask = [[1] * len(ids) for ids in read]
        pad_id = self._tokenizer.pad_token_id
        return Prompts(read, self._pad_left(read, pad_id), self._pad_left(mask, 0), types, cut)

    def _seen(self, prompt: Prompt, context: str | None) -> Prompt:
        return texts.teacher_prompt(prompt, context, self.args.privileged_template)

    def _pad_left(self, rows: list[list[int]], value: int) -> Tensor:
        how = {"padding_side": "left", "pad_to_multiple_of": self.pad_to_multiple_of}
        return pad(list(map(torch.as_tensor, rows)), value, **how).to(self.accelerator.device)

    # The length of it

    def _fitted(self, prompt: Prompt, context: str | None) -> str | None:
        """The context, shortened to `max_teacher_prompt_length`."""
        limit, template = self.args.max_teacher_prompt_length, self.args.privileged_template
        if limit is None or context is None or self._count(self._seen(prompt, context)) <= limit:
            return context
        return texts.shorten_to_fit(prompt, context, template, limit, self._tokenizer, self._count)

    def _count(self, prompt: Prompt) -> int:
        return len(self._tokenize_prompts([prompt])[0][0])

    def _check_rows(self, dataset: Dataset) -> None:
        """Refuse references with control tokens, and rows without room; images count later."""
        args, limit = self.args, self.args.max_teacher_prompt_length
        prompts = dataset["prompt"][:]
        told = contexts = [""] * len(prompts)
        what = f"leave no room for the privileged text in max_teacher_prompt_length={limit}"
        if args.row.teacher_sees == PRIVILEGED:
            column = args.privileged_column
            told = dataset[column][:]
            texts.check_contexts(told, args.privileged_template, column, self._control)
        if limit is None and (positions := self._positions) and not self.environment_factories:
            limit, contexts = positions, told  # a peer's is not known yet
            what = f"have a teacher's prompt that fills the model's {positions} positions, with no limit"
        if limit is None or args.row.teacher_sees == PROMPT:
            return
        most = limit - len(args.privileged_template.encode()) - MARGIN
        pairs = zip((texts.with_images(prompt, []) for prompt in prompts), contexts, strict=True)
        rows = [
            row
            for row, (prompt, context) in enumerate(pairs)
            # A token is a byte or more, so that most rows need no tokeniser.
            if len(f"{prompt}{context}".encode()) > most
            and self._count(self._seen(prompt, context)) >= limit
        ]
        texts.refuse(rows, what, "Raise the limit, shorten the references, or drop the rows.")

    # The pass

    @torch.no_grad()
    def teacher_scores(
        self, prompts: Sequence[Prompt], contexts: Contexts, output: dict[str, Any]
    ) -> Scores:
        """Score the completions of TRL's dictionary by the teacher; arguments as `teacher_prompts`.

        Hidden states and head are None for methods without a divergence. Collective: every rank
        calls it, and raises ValueError where one of them raises. Nothing is logged.
        """
        with checks.on_every_rank():
            seen = self.teacher_prompts(prompts, contexts, output)
        with (
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            self.teacher.active(self.model) as teacher,
        ):
            shared = shared_prompts.try_score(teacher, seen, output, self.args, self.accelerator)
            logps, hidden = shared or self._plain_pass(teacher, seen, output)
            # Inside the block, where an adapter's own layers and head are the active ones.
            head = None if self.args.divergence is None else states.head_of(teacher)
        if head is not None:
            head = tuple(None if part is None else part.detach() for part in head)
        return Scores(logps, hidden, head, seen.shortened)

    def _plain_pass(
        self, teacher: nn.Module, seen: Prompts, output: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Every rollout behind its own copy of the prompt, by TRL's own function."""
        ids, mask = output["completion_ids"], output["completion_mask"]
        with states.hidden_states(teacher, self.args.divergence is not None) as hidden:
            logps, _, _ = self._get_per_token_logps_and_entropies(
                teacher,
                torch.cat([seen.ids, ids], dim=1),
                torch.cat([seen.mask, mask], dim=1),
                ids.size(1),
                batch_size=self.args.per_device_train_batch_size,
                **{name: output[name] for name in states.IMAGE_FIELDS if name in output},
                **seen.type_ids,
            )
        kept = [states.predicting(found, ids.size(1)) for found in hidden]
        return logps, torch.cat(kept) if kept else None

    # Numbers of all ranks

    def log_means(self, sums: dict[str, tuple[Any, Any]], count: Any = 0) -> float:
        """Log ratios of sums over ranks under rlsd/; returns that of `count`. Collective."""
        flat = [count, *(value for pair in sums.values() for value in pair)]
        device = self.accelerator.device
        values = torch.stack([torch.as_tensor(value, device=device).float() for value in flat])
        counted, *totals = self.accelerator.reduce(values, reduction="sum").tolist()
        for name, total, number in zip(sums, totals[::2], totals[1::2], strict=True):
            # NaN where there was nothing to average: the column stays, and TRL's means skip it.
            mean = total / number if number else float("nan")
            self._metrics["train"][f"rlsd/{name}"].append(mean)
        return counted

    def _check_finite(self, logps: Tensor, prompt_ids: Tensor, whose: str) -> None:
        """Stop on every rank when any rank has a log-probability that is NaN or infinite."""
        bad = (~logps.isfinite()).any(dim=1).nonzero().flatten().tolist()
        decode, rank = self._tokenizer.decode, self.accelerator.process_index
        shown = [decode(prompt_ids[row], skip_special_tokens=True)[-200:] for row in bad[:3]]
        # Gathered before anyone raises: a rank that stopped alone would leave the others waiting.
        if found := gather_object([(rank, text) for text in shown]):
            raise FloatingPointError(
                f"Non-finite {whose} log-probabilities at step {self.state.global_step}, in samples "
                f"(rank, prompt) {found}. Checkpoints under {self.args.output_dir} are intact."
            )
