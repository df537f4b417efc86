"""Rollouts under the lens: one group of rollouts with gap, weight and credit of every token.

What a training step computes in passing is computed here for a handful of rollouts and kept, for
the notebooks' heat maps, with the trainer's own functions for prompts, demonstrations, credit and
divergence. The teacher is the model itself (a `live` teacher), or the external one of `opd`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlsd_lib.credit import Credit
from rlsd_lib.measure.sampling import undistorted
from rlsd_lib.methods import METHODS, PEER, PROMPT, Method
from rlsd_lib.prompts import COLUMN, Prompt, demonstrations, teacher_prompt, without_pixels
from rlsd_lib.tasks import Task
from rlsd_lib.tasks.encode import Processing, encode, extend, messages_of, tokenizer_of


@dataclass(frozen=True)
class Rollout:
    """One completion, token by token. The lists have one entry per token, end token included."""

    problem: dict[str, Any]  # the task's row, without its images
    teacher_prompt: Prompt
    completion: str
    tokens: list[str]
    reward: float
    advantage: float
    student_logp: list[float]  # log P_S(y_t), nats
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
        """What the teacher was shown."""
        return self.problem[COLUMN]

    def as_dict(self) -> dict[str, Any]:
        """A JSON-like record for samples.jsonl."""
        return asdict(self)


@torch.no_grad()
def look(
    model: PreTrainedModel,
    tokenizer: Processing,
    task: Task,
    row: int,
    *,
    method: str,
    template: str,
    lam: float,
    epsilon_w: float,
    max_new_tokens: int,
    credit: Credit | None = None,
    teacher: PreTrainedModel | None = None,
    peer_context: bool = False,
    num_generations: int = 8,
    temperature: float = 1.0,
    seed: int = 0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Rollout]:
    """Sample one group for test problem `row` and give every token its credit under `method`.

    `tokenizer` is a processor where the model sees images. Advantages are normalised within the
    group as TRL does (Eq. 1, sample standard deviation). torch's global random state is left as it
    was. `credit` is the method's with options of its own (`RLSDConfig.credit`), and `teacher`
    another model, for `opd`; with `peer_context` the teacher reads a successful rollout of the
    group in place of the reference.
    """
    problem, chosen = task.test[row], METHODS[method]
    if peer_context:
        chosen = replace(chosen, teacher_sees=PEER)
    asking = _Asking(tokenizer, temperature, dict(chat_template_kwargs or {}))
    prompt = messages_of(problem)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        completions = _sample(model, asking, prompt, num_generations, max_new_tokens)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]
    rewards = torch.tensor([float(task.verify(text, problem)) for text in texts])
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    seen = _teacher_prompts(
        chosen, {**problem, "prompt": prompt}, texts, rewards.tolist(), template
    )
    pairs = [
        _compare(model, teacher or model, asking, prompt, *both, chosen)
        for both in zip(seen, completions, strict=True)
    ]
    gap, mask = _padded([pair.gap for pair in pairs])
    assign = partial(credit or chosen.credit, gap=gap, mask=mask, epsilon_w=epsilon_w)
    credited = assign(advantages, lam=lam)
    weight = torch.ones_like(gap)
    if chosen.evidence is not None:
        sign = advantages.sign()[:, None]
        weight = torch.where(sign == 0, weight, assign(advantages.sign(), lam=1.0) * sign)
    return [
        Rollout(
            problem={name: value for name, value in problem.items() if name != "images"},
            teacher_prompt=without_pixels(seen[i]),
            completion=texts[i],
            tokens=[tokenizer.decode([token]) for token in ids],
            reward=rewards[i].item(),
            advantage=advantages[i].item(),
            student_logp=pairs[i].student_logp.tolist(),
            gap=pairs[i].gap.tolist(),
            weight=weight[i, : len(ids)].tolist(),
            credit=credited[i, : len(ids)].tolist(),
            divergence=pairs[i].divergence.tolist(),
        )
        for i, ids in enumerate(completions)
    ]


def _teacher_prompts(
    method: Method, problem: dict[str, Any], texts: list[str], rewards: list[float], template: str
) -> list[Prompt]:
    """What the teacher reads before each completion of the group, by what the method shows it."""
    prompt, contexts = problem["prompt"], [problem[COLUMN]] * len(texts)
    if method.teacher_sees == PROMPT:
        contexts = [None] * len(texts)
    elif method.teacher_sees == PEER:
        contexts = demonstrations(
            texts,
            rewards,
            [None] * len(texts),
            slice(None),
            group_size=len(texts),
            threshold=1.0,
            with_failed=False,
        ).texts
    return [prompt if c is None else teacher_prompt(prompt, c, template) for c in contexts]


class _Asking(NamedTuple):
    """How a model is asked: with which tokenizer or processor, temperature and template."""

    processing: Processing
    temperature: float
    template: dict[str, Any]


class _Pair(NamedTuple):
    student_logp: Tensor  # (T,)
    gap: Tensor  # (T,)
    divergence: Tensor  # (T,), or empty


def _compare(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    asking: _Asking,
    prompt: Prompt,
    seen: Prompt,
    ids: list[int],
    method: Method,
) -> _Pair:
    log_p_s = _log_probabilities(student, asking, prompt, ids)
    log_p_t = _log_probabilities(teacher, asking, seen, ids)
    chosen = torch.tensor(ids)[:, None]
    ours, theirs = (log_p.gather(1, chosen)[:, 0] for log_p in (log_p_s, log_p_t))
    distances = torch.empty(0)
    if method.divergence is not None:
        top_k = method.divergence.top_k
        spec = replace(method.divergence, top_k=top_k and min(top_k, log_p_s.shape[1]))
        distances = spec(log_p_t, log_p_s)
    return _Pair(ours, theirs - ours, distances)


def _log_probabilities(
    model: PreTrainedModel, asking: _Asking, prompt: Prompt, ids: list[int]
) -> Tensor:
    """log P(. | prompt, y_<t) before each token of one completion: (T, V) on the CPU, nats."""
    encoded = encode(asking.processing, [prompt], **asking.template).to(model.device)
    # Only the completion's positions go through the vocabulary.
    logits = model(**extend(encoded, ids), logits_to_keep=len(ids) + 1).logits[0, :-1].float()
    return (logits / asking.temperature).log_softmax(-1).cpu()


def token_frame(rollouts: Sequence[Rollout]) -> pd.DataFrame:
    """A row per token of all rollouts: rollout, position, token, advantage, gap, weight, credit."""
    rows = []
    for number, rollout in enumerate(rollouts):
        columns = (rollout.tokens, rollout.gap, rollout.weight, rollout.credit)
        for position, (token, gap, weight, credit) in enumerate(zip(*columns, strict=True)):
            rows.append(
                {
                    "rollout": number,
                    "position": position,
                    "token": token,
                    "advantage": rollout.advantage,
                    "gap": gap,
                    "weight": weight,
                    "credit": credit,
                }
            )
    return pd.DataFrame(rows)


def _sample(
    model: PreTrainedModel, asking: _Asking, prompt: Prompt, count: int, max_new_tokens: int
) -> list[list[int]]:
    """`count` completions as token ids, each up to and including its first end token."""
    tokenizer = tokenizer_of(asking.processing)
    encoded = encode(asking.processing, [prompt] * count, **asking.template).to(model.device)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    generated = model.generate(
        **encoded,
        **undistorted(asking.temperature),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(ends - {None}),
    )[:, encoded["input_ids"].shape[1] :]
    return [_until_end(ids, ends) for ids in generated.tolist()]


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: end + 1]


def _padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Right-pad (T_i,) tensors to (N, T), with the mask."""
    values = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
    return values, mask
