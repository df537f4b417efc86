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

from rlsd_lib import prompts
from rlsd_lib.credit import alone, leave_one_out
from rlsd_lib.divergence import forward_kl
from rlsd_lib.measure.evaluate import sample
from rlsd_lib.measure.logps import log_probabilities, of_tokens
from rlsd_lib.measure.oracle import OF_ERRORS, OF_SUCCESS, error_signals, success_signals
from rlsd_lib.methods import NEEDS_WRONG, PEER, PROMPT, from_caller, keywords
from rlsd_lib.tasks import Row, Task
from rlsd_lib.tasks.encode import Processing, messages_of, tokenizer_of
from rlsd_lib.trainer.config import RLSDConfig
from rlsd_lib.trainer.teacher_pass import Signals

# What shapes the trainer's rollouts beside `generation_kwargs`, as arguments of `sample`.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "chat_template_kwargs")


@dataclass(frozen=True)
class Rollout:
    """One completion, token by token. The lists have one entry per token, end token included."""

    problem: dict[str, Any]  # the task's row, without its images
    teacher_prompt: prompts.Prompt
    completion: str
    tokens: list[str]
    reward: float
    advantage: float
    gap: list[float]  # Delta_t = log P_T(y_t) - log P_S(y_t), nats
    weight: list[float]  # after clipping; 1 for a method without a weight
    credit: list[float]  # the token advantage A_hat_t
    divergence: list[float]  # D(P_T, P_S) at each token; empty without a distillation term

    @property
    def question(self) -> str:
        """All text that the student reads."""
        return prompts.prompt_text(self.problem["prompt"])

    @property
    def reference(self) -> str:
        """The row's privileged text."""
        return self.problem[prompts.COLUMN]


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
    from `config`, with lambda at `lambda_init`; `changes` are fields of it for this look alone. The
    group is the batch, the teacher reads a long reference whole, AntiSD's gate is open, and what
    `signals` give comes from `task_signals`. `teacher` is another model than `model`, as `opd` needs.
    Raises ValueError for `changes` that make no valid config, or a method whose credit asks for what
    neither rollouts nor task can give; TypeError where a change is no field of the config.
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
    shown = partial(prompts.teacher_prompt, prompt, template=config.privileged_template)
    seen = list(map(shown, contexts))
    wrong = list(map(shown, _wrong_contexts(config, task, problem)))
    compared = [
        _compare(config, processing, (model, prompt), (teacher or model, [told, *wrong]), ids)
        for told, ids in zip(seen, completions, strict=True)
    ]
    # A peer's rollout that no other demonstrates is neither reweighted nor distilled.
    moved = [config.row.teacher_sees != PEER or context is not None for context in contexts]
    advantages = group_advantages(rewards, count, config)
    gap, mask = _padded(compared, "gap"), _padded(compared, "mask")
    mask *= torch.tensor(moved)[:, None]
    columns["prompt"] = [prompt] * count
    known = _known_signals(config, model, task, processing, compared, rewards, completions, columns)
    weights, credits = _weights_and_credits(config, advantages, gap, mask, known)
    divergences = [row["divergence"] * kept for row, kept in zip(compared, moved, strict=True)]
    if config.weight is not None:
        scale = _called(config.weight, advantages, gap, mask, known)
        divergences = [row * scale[i, : len(row)] for i, row in enumerate(divergences)]
    return [
        Rollout(
            problem={name: value for name, value in problem.items() if name != "images"},
            teacher_prompt=prompts.with_images(seen[i], [{"type": "image"}]),  # no pixels
            completion=texts[i],
            tokens=[tokenizer_of(processing).decode([token]) for token in ids],
            reward=rewards[i].item(),
            advantage=advantages[i].item(),
            gap=compared[i]["gap"].tolist(),
            weight=weights[i, : len(ids)].tolist(),
            credit=credits[i, : len(ids)].tolist(),
            divergence=divergences[i].tolist(),
        )
        for i, ids in enumerate(completions)
    ]


def group_advantages(rewards: Tensor, group_size: int, config: RLSDConfig) -> Tensor:
    """Rewards (N,) in groups of neighbours -> advantages (N,), by Eq. 1 with TRL's deviation."""
    groups = rewards.view(-1, group_size)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if config.scale_rewards != "none":
        advantages /= groups.std(dim=1, keepdim=True) + 1e-4
    return advantages.flatten()


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
    nothing, reference = [None] * len(texts), [problem[prompts.COLUMN]] * len(texts)
    if config.row.teacher_sees != PEER:
        return nothing if config.row.teacher_sees == PROMPT else reference
    how = {"group_size": len(texts), "threshold": config.success_reward_threshold}
    return prompts.demonstrations(texts, rewards, slice(None), **how).texts


def _wrong_contexts(config: RLSDConfig, task: Task, problem: Row) -> list[str]:
    """The row's wrong references, drawn as in training; none where no credit asks."""
    if not config.row.asks & NEEDS_WRONG:
        return []
    distinct = prompts.distinct_references(task.train[prompts.COLUMN][:])
    return prompts.wrong_references(problem[prompts.COLUMN], distinct, config.wrong_references)


def _compare(
    config: RLSDConfig,
    processing: Processing,
    student: tuple[PreTrainedModel, prompts.Prompt],
    teacher: tuple[PreTrainedModel, Sequence[prompts.Prompt]],
    ids: list[int],
) -> dict[str, Tensor]:
    """What the teacher makes of one completion: gap, mask, divergence and signals, (T,) each.

    The teacher reads its own prompt, then those with wrong references. The divergence is (0,)
    without a distillation term. Of a whole group (N, T, V) would not always fit into memory.
    """
    how = {"temperature": config.temperature, "chat_template_kwargs": config.chat_template_kwargs}
    readers = [student, *((teacher[0], prompt) for prompt in teacher[1])]
    log_ps = [log_probabilities(m, processing, [p], [ids], **how).cpu() for m, p in readers]
    log_p_s, log_p_t, *wrong = log_ps
    ours, theirs, *others = (of_tokens(log_p, [ids])[0] for log_p in log_ps)
    found = {"gap": theirs - ours, "mask": torch.ones_like(ours), "divergence": torch.empty(0)}
    if config.divergence is not None:
        found["divergence"] = config.divergence(log_p_t, log_p_s)[0]
        found["teacher_entropy"] = -torch.xlogy(p := log_p_t.exp(), p).sum(-1)[0]
        found["contrast_kl"] = forward_kl(log_p_t, wrong[0])[0] if wrong else torch.zeros_like(ours)
    for k in range(config.wrong_references):
        found[f"wrong {k}"] = others[k] - ours if others else torch.full_like(ours, torch.nan)
    return found


def _padded(compared: Sequence[dict[str, Tensor]], name: str) -> Tensor:
    """(T,) of each rollout -> (N, T)."""
    return pad_sequence([row[name] for row in compared], batch_first=True)


def _known_signals(
    config: RLSDConfig,
    model: PreTrainedModel,
    task: Task,
    processing: Processing,
    compared: Sequence[dict[str, Tensor]],
    rewards: Tensor,
    completions: Sequence[list[int]],
    columns: dict[str, list],
) -> dict[str, Any]:
    """What credit functions and weights may ask for, by name, as `RLSDTrainer` would give it."""
    success = rewards >= config.success_reward_threshold
    given = {"lam": config.lambda_init, "epsilon_w": config.epsilon_w, "gate": 1.0}
    given |= {"success": success, "rewards": rewards, "total": alone}
    if len(rewards) > 1:
        given["group_success"] = leave_one_out(success, len(rewards))
    wrong = [_padded(compared, f"wrong {k}") for k in range(config.wrong_references)]
    given["wrong_gaps"] = torch.stack(wrong)
    if config.divergence is not None:
        names = ("teacher_entropy", "contrast_kl")
        given |= {name: _padded(compared, name) for name in names}
    signals = task_signals(model, task, processing, config)
    if signals is not None:
        ids = pad_sequence([torch.tensor(row) for row in completions], batch_first=True)
        rows = [{k: v[i] for k, v in columns.items()} for i in range(len(completions))]
        given |= signals(rows, ids, _padded(compared, "mask"))
    return given


def check_from_tasks(config: RLSDConfig) -> None:
    """Refuse a method whose credit asks for what no task of the workbook gives: ValueError."""
    if absent := sorted(from_caller(config.credit) - OF_ERRORS - OF_SUCCESS):
        raise ValueError(
            f"method={config.method!r} asks for {', '.join(absent)}, which no task of the workbook "
            "knows. Train it with RLSDTrainer(signals=fn)."
        )


def task_signals(
    model: PreTrainedModel, task: Task, processing: Processing, config: RLSDConfig
) -> Signals | None:
    """`signals` for `RLSDTrainer` of policy `model`, if the credit asks for what the task knows."""
    asked, limit = from_caller(config.credit), config.max_completion_length
    if not asked or task.first_error is None or task.decisions is None:
        return None
    tokenizer = tokenizer_of(processing)

    def signals(rows: list[Row], ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        kept = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
        texts, width = tokenizer.batch_decode(kept, skip_special_tokens=True), ids.size(1)
        found = {}
        if asked & OF_ERRORS:
            found |= error_signals(task, rows, texts, width)
        if asked & OF_SUCCESS:
            sizes = {"width": width, "max_new_tokens": limit}
            found |= success_signals(model, tokenizer, task, rows, kept, **sizes)
        return {name: value.to(ids.device) for name, value in found.items()}

    return signals


def _called(
    function: Any, advantages: Tensor, gap: Tensor, mask: Tensor, known: dict[str, Any]
) -> Tensor:
    """A credit function or a weight with what it asks for; raises ValueError if that is unknown."""
    options = keywords(function)
    missing = [k for k, p in options.items() if p.default is p.empty and k not in known]
    if missing:
        raise ValueError(
            f"This look has no {', '.join(missing)}, for which the credit asks: a group has at least "
            "two rollouts, and other signals come from the task or the trainer alone."
        )
    return function(advantages, gap, mask, **{k: known[k] for k in options if k in known})


def _weights_and_credits(
    config: RLSDConfig, advantages: Tensor, gap: Tensor, mask: Tensor, known: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The clipped weight, 1 where the method has none or A = 0, and the credit: both (N, T)."""
    weight, sign = torch.ones_like(gap), advantages.sign()[:, None]
    if config.row.evidence is not None:
        full = _called(config.credit, advantages.sign(), gap, mask, {**known, "lam": 1.0})
        weight = torch.where(sign == 0, weight, full * sign)
    return weight, _called(config.credit, advantages, gap, mask, known)
