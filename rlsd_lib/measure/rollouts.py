"""Rollouts under the lens: one group of rollouts with gap, weight and credit of every token.

What a training step computes in passing is computed here for a handful of rollouts and kept, from
the trainer's own `RLSDConfig`. The teacher is the model itself (a `live` teacher), or another one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from rlsd_lib.credit import leave_one_out
from rlsd_lib.measure.evaluate import sample
from rlsd_lib.measure.logps import log_probabilities, of_tokens
from rlsd_lib.measure.oracle import oracle_signals
from rlsd_lib.methods import PEER, PROMPT, keywords
from rlsd_lib.prompts import (
    COLUMN,
    Prompt,
    demonstrations,
    teacher_prompt,
    without_pixels,
)
from rlsd_lib.tasks import Row, Task
from rlsd_lib.tasks.encode import Processing, messages_of, tokenizer_of
from rlsd_lib.trainer.config import RLSDConfig

# What shapes the trainer's rollouts beside `generation_kwargs`, as arguments of `sample`.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "chat_template_kwargs")


@dataclass(frozen=True)
class Rollout:
    """One completion, token by token. The lists have one entry per token, end token included."""

    problem: dict[str, Any]  # the task's row, without its images
    teacher_prompt: Prompt
    completion: str
    tokens: list[str]
    reward: float
    advantage: float
    gap: list[float]  # Delta_t = log P_T(y_t) - log P_S(y_t), nats
    weight: list[float]  # after clipping; 1 for a method without a weight
    credit: list[float]  # the token advantage A_hat_t
    divergence: list[float]  # D(P_T, P_S) at each token; empty without a distillation term

    @property
    def signal(self) -> list[float]:
        """What moves each token: the divergence of a pure distillation method, else the credit."""
        return self.credit if any(self.credit) or not self.divergence else self.divergence

    @property
    def reference(self) -> str:
        """The row's privileged text."""
        return self.problem[COLUMN]


def look(
    model: PreTrainedModel,
    processing: Processing,
    task: Task,
    row: int,
    config: RLSDConfig,
    *,
    teacher: PreTrainedModel | None = None,
    num_generations: int | None = None,
    seed: int = 0,
    **changes: Any,
) -> list[Rollout]:
    """Sample one group for test problem `row` and give every token its credit, as in training.

    Method, prompts, sampling, rewards, credit and divergence are those that `RLSDTrainer` takes
    from `config`, with lambda at `lambda_init`; `changes` are fields of it for this look alone.
    The group stands for the whole batch where `scale_rewards` is "batch", and the teacher reads a
    long reference whole, whatever `max_teacher_prompt_length` is. `processing` is a processor where
    the model sees images. torch's random state is left as it was.

    Args:
        teacher: another model than `model` itself, as `opd` needs.
        num_generations: rollouts in the group, the config's by default.

    Raises:
        ValueError: `changes` that make no valid config; a TypeError where one is no field of it.
    """
    if changes:
        # TRL derives generation_batch_size from steps_per_generation, and refuses it beside that.
        config = replace(config, generation_batch_size=None, **changes)
    problem = task.test[row]
    prompt, count = messages_of(problem), num_generations or config.num_generations
    sampling = {name: getattr(config, name) for name in SAMPLING}
    sampling |= {"max_new_tokens": config.max_completion_length, **(config.generation_kwargs or {})}
    completions = sample(model, processing, [prompt] * count, seed=seed, **sampling)
    texts = processing.batch_decode(completions, skip_special_tokens=True)
    columns = {name: [value] * count for name, value in problem.items()}
    pairs = zip(config.reward_weights or [1.0], (task.reward, task.leak), strict=False)
    rewards = sum(weight * torch.tensor(reward(texts, **columns)) for weight, reward in pairs)
    contexts = _contexts(config, problem, texts, rewards.tolist())
    seen = [
        prompt if text is None else teacher_prompt(prompt, text, config.privileged_template)
        for text in contexts
    ]
    compared = [
        _compare(config, processing, ((model, prompt), (teacher or model, told)), ids)
        for told, ids in zip(seen, completions, strict=True)
    ]
    gaps, divergences = zip(*compared, strict=True)
    # A peer's rollout that no other demonstrates is neither reweighted nor distilled.
    moved = [config.row.teacher_sees != PEER or context is not None for context in contexts]
    advantages = rewards - rewards.mean()
    if config.scale_rewards != "none":
        advantages /= rewards.std() + 1e-4  # Eq. 1, with TRL's sample deviation
    gap = pad_sequence(gaps, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in gaps], batch_first=True)
    success = rewards >= config.success_reward_threshold
    signals = {"success": success, "rewards": rewards, "epsilon_w": config.epsilon_w}
    if count > 1:
        signals["group_success"] = leave_one_out(success, count)
    if "wrong_gaps" in config.row.asks:
        other = task.test[(row + 1) % len(task.test)][COLUMN]
        readers = (
            (model, prompt),
            (
                teacher or model,
                teacher_prompt(prompt, other, config.privileged_template),
            ),
        )
        wrong = [_compare(config, processing, readers, ids)[0] for ids in completions]
        signals["wrong_gaps"] = pad_sequence(wrong, batch_first=True)[None]
    if task.first_error is not None:
        signals |= oracle_signals(task, [problem] * count, texts, gap.size(1))
    mask *= torch.tensor(moved)[:, None]
    weights, credits = _weights_and_credits(config, advantages, gap, mask, signals)
    return [
        Rollout(
            problem={name: value for name, value in problem.items() if name != "images"},
            teacher_prompt=without_pixels(seen[i]),
            completion=texts[i],
            tokens=[tokenizer_of(processing).decode([token]) for token in ids],
            reward=rewards[i].item(),
            advantage=advantages[i].item(),
            gap=gaps[i].tolist(),
            weight=weights[i, : len(ids)].tolist(),
            credit=credits[i, : len(ids)].tolist(),
            divergence=(divergences[i] * moved[i]).tolist(),
        )
        for i, ids in enumerate(completions)
    ]


def token_frame(rollouts: Sequence[Rollout]) -> pd.DataFrame:
    """A row per token of all rollouts: rollout, position, token, advantage, gap, weight, credit."""
    frames = []
    for number, rollout in enumerate(rollouts):
        where = {"rollout": number, "position": range(len(rollout.tokens))}
        what = {name: getattr(rollout, name) for name in ("advantage", "gap", "weight", "credit")}
        frames.append(pd.DataFrame({**where, "token": rollout.tokens, **what}))
    return pd.concat(frames, ignore_index=True)


def _contexts(
    config: RLSDConfig, problem: Row, texts: list[str], rewards: list[float]
) -> list[str | None]:
    """What the teacher reads beside the prompt of each rollout; None for nothing."""
    nothing, reference = [None] * len(texts), [problem[COLUMN]] * len(texts)
    if config.row.teacher_sees == PROMPT:
        return nothing
    if config.row.teacher_sees != PEER:
        return reference
    return demonstrations(
        texts,
        rewards,
        reference if config.include_environment_feedback else nothing,
        slice(None),
        group_size=len(texts),
        threshold=config.success_reward_threshold,
        with_failed=config.include_failed_rollout,
    ).texts


def _compare(
    config: RLSDConfig,
    processing: Processing,
    readers: Sequence[tuple[PreTrainedModel, Prompt]],
    ids: list[int],
) -> tuple[Tensor, Tensor]:
    """Gap and divergence of one completion, (T,) each; (0,) without a distillation term.

    `readers` are student and teacher. Of a whole group (N, T, V) would not always fit into memory.
    """
    how = {"temperature": config.temperature, "chat_template_kwargs": config.chat_template_kwargs}
    log_p_s, log_p_t = (
        log_probabilities(model, processing, [prompt], [ids], **how).cpu()
        for model, prompt in readers
    )
    (ours,), (theirs,) = (of_tokens(log_p, [ids]) for log_p in (log_p_s, log_p_t))
    distance = config.divergence(log_p_t, log_p_s)[0] if config.divergence else torch.empty(0)
    return theirs - ours, distance


def _weights_and_credits(
    config: RLSDConfig, advantages: Tensor, gap: Tensor, mask: Tensor, signals: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The clipped weight, 1 where the method has none or A = 0, and the credit: both (N, T)."""
    asked = {name: value for name, value in signals.items() if name in keywords(config.credit)}
    assign = partial(config.credit, gap=gap, mask=mask, **asked)
    if "lam" in keywords(config.credit):
        assign = partial(assign, lam=config.lambda_init)
    weight, sign = torch.ones_like(gap), advantages.sign()[:, None]
    if config.row.evidence is not None:
        weight = torch.where(sign == 0, weight, assign(advantages.sign(), lam=1.0) * sign)
    return weight, assign(advantages)
