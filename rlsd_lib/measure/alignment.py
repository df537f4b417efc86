"""One step under the lens: does a credit function point along the gradient of success?

On the same rollouts every credit function gives a policy gradient. Where a task knows its right
chains, the gradient of the probability of one is known without reinforcement (`measure.exact`).
The cosine of the two says what a step is worth, the noise-to-signal ratio how much of a batch's
gradient is chance, and the shares where a failed rollout's blame goes. Nothing is trained: a credit
function is judged in a minute. Whether the outcome follows is another question.
"""

from collections.abc import Mapping, Sequence
from itertools import repeat
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlsd_lib.credit import Credit, alone, leave_one_out
from rlsd_lib.measure.evaluate import sample
from rlsd_lib.measure.exact import right_chains
from rlsd_lib.measure.first_error import kinds_of
from rlsd_lib.measure.intervals import student_interval
from rlsd_lib.measure.logps import log_probabilities, padded
from rlsd_lib.measure.oracle import error_signals, success_signals
from rlsd_lib.measure.rollouts import group_advantages
from rlsd_lib.methods import keywords
from rlsd_lib.prompts import COLUMN, distinct_references, teacher_prompt, wrong_references
from rlsd_lib.tasks import Row, Task
from rlsd_lib.tasks.encode import messages_of
from rlsd_lib.trainer.config import RLSDConfig

CHAINS = 64  # right chains of a batch of the true gradient
KINDS = ("first error", "after it", "filler", "other")  # of tokens of a failed rollout


def alignment(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: RLSDConfig,
    credits: Mapping[str, Credit],
    *,
    batches: int = 16,
    problems: int = 8,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare credit functions by one step on the same rollouts; returns a row for each.

    `batches` of `problems` training problems with `config.num_generations` rollouts each are drawn;
    the teacher is the model itself. A credit function gets the signals that its signature names,
    lambda being `config.lambda_init`.

    Columns: `cosine` of a batch's gradient with that of the probability of a right chain, with its
    95 % interval over batches (`low`, `high`); `cosine of the mean` gradient of all batches;
    `noise / signal`, the trace of the gradient's covariance over its squared mean, both unbiased; the
    shares of a failed rollout's absolute credit on each of `KINDS`, NaN without credit. Raises
    ValueError if the task cannot tell a right chain or a first error.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    count = batches * problems
    rows = [task.train[i % len(task.train)] for i in range(count)]
    truth = _true_gradient(model, tokenizer, task, config, rows, parameters, seed)
    asks_for_wrong = any("wrong_gaps" in keywords(credit) for credit in credits.values())
    distinct = distinct_references(task.train[COLUMN][:]) if asks_for_wrong else []
    gradients: dict[str, list[Tensor]] = {name: [] for name in credits}
    shares: dict[str, list[Tensor]] = {name: [] for name in credits}
    for start in range(0, count, problems):
        drawn = [
            row for row in rows[start : start + problems] for _ in range(config.num_generations)
        ]
        signals, logps = _rollouts(model, tokenizer, task, config, drawn, distinct, seed + start)
        failed = ~signals["success"].bool()
        for name, credit in credits.items():
            given = {key: signals[key] for key in keywords(credit) if key in signals}
            arguments = signals["advantages"], signals["gap"], signals["mask"]
            blame = credit(*arguments, **given).detach() * signals["mask"]
            loss = (blame * logps).sum() / signals["mask"].sum()
            found = torch.autograd.grad(loss, parameters, retain_graph=True)
            gradients[name].append(torch.cat([g.flatten().cpu() for g in found]))
            shares[name].append(_shares(blame[failed].abs(), signals["kinds"][failed]))
    return pd.DataFrame(
        {
            "credit": name,
            **_compared(torch.stack(gradients[name]), truth),
            **dict(zip(KINDS, torch.cat(shares[name]).nanmean(dim=0).tolist(), strict=True)),
        }
        for name in credits
    )


def _compared(gradients: Tensor, truth: Tensor) -> dict[str, float]:
    """Cosines with the truth and noise of B gradients (B, P)."""
    batches = len(gradients)
    cosines = torch.nn.functional.cosine_similarity(gradients, truth[None])
    mean = gradients.mean(dim=0)
    # An unbiased trace of the covariance of one batch, and the squared mean without its share of it.
    noise = (gradients - mean).square().sum() / (batches - 1)
    signal = mean.square().sum() - noise / batches
    interval = student_interval(cosines.tolist())  # a batch without a gradient counts as 0
    return {
        **dict(zip(("cosine", "low", "high"), interval, strict=True)),
        "cosine of the mean": torch.nn.functional.cosine_similarity(mean, truth, dim=0).item(),
        "noise / signal": (noise / signal).item() if signal > 0 else float("inf"),
    }


def _shares(blame: Tensor, kinds: Tensor) -> Tensor:
    """The share of each failed rollout's blame (F, T) on each of `KINDS`: (F, 4)."""
    total = blame.sum(dim=1)
    parts = [(blame * (kinds == k)).sum(dim=1) / total for k in range(len(KINDS))]
    return torch.stack(parts, dim=1)


def _rollouts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: RLSDConfig,
    rows: Sequence[Row],
    distinct: Sequence[str],
    seed: int,
) -> tuple[dict[str, Any], Tensor]:
    """Credit functions' signals for rollouts of `rows`, and their log P_S (N, T) with a graph."""
    prompts = [messages_of(row) for row in rows]
    limit = config.max_completion_length
    ids = sample(model, tokenizer, prompts, max_new_tokens=limit, batch_size=256, seed=seed)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    chosen, mask = padded(ids)[..., None], padded([[1.0] * len(row) for row in ids])

    def score(seen: Sequence[Any], *, differentiable: bool = False) -> Tensor:
        found = log_probabilities(model, tokenizer, seen, ids, differentiable=differentiable)
        return found.cpu()

    def told(references: Sequence[str]) -> Tensor:
        template = config.privileged_template
        pairs = zip(prompts, references, strict=True)
        seen = [teacher_prompt(prompt, reference, template) for prompt, reference in pairs]
        return score(seen).gather(2, chosen)[..., 0]

    ours = score(prompts, differentiable=True)
    logps = ours.gather(2, chosen)[..., 0]
    references = [row[COLUMN] for row in rows]
    wrong = {}
    if distinct:
        others = [wrong_references(reference, distinct, 1)[0] for reference in references]
        wrong["wrong_gaps"] = (told(others) - logps.detach())[None]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    rewards = torch.tensor(task.reward(texts, **columns))
    success, width = rewards >= config.success_reward_threshold, mask.size(1)
    oracle = error_signals(task, rows, texts, width)
    oracle |= success_signals(model, tokenizer, task, rows, ids, width=width, max_new_tokens=limit)
    named = map(kinds_of, repeat(task), texts, rows, map(len, ids))
    kinds = padded([[KINDS.index(kind) for kind in row] for row in named])
    return {
        "total": alone,
        "advantages": group_advantages(rewards, config.num_generations, config),
        "gap": told(references) - logps.detach(),
        "mask": mask,
        "lam": config.lambda_init,
        "epsilon_w": config.epsilon_w,
        "success": success,
        "rewards": rewards,
        "group_success": leave_one_out(success.float(), config.num_generations),
        "entropy": -(ours.detach().exp() * ours.detach()).sum(dim=-1),
        **wrong,
        **oracle,
        "kinds": kinds,
    }, logps


def _true_gradient(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: RLSDConfig,
    rows: Sequence[Row],
    parameters: Sequence[Tensor],
    seed: int,
) -> Tensor:
    """The gradient (P,) of the mean probability of a right chain over `rows`."""
    limit = config.max_completion_length
    ids, weights = right_chains(model, tokenizer, task, rows, max_new_tokens=limit, seed=seed)
    total = [torch.zeros_like(p) for p in parameters]
    for part in (slice(start, start + CHAINS) for start in range(0, len(rows), CHAINS)):
        chains, prompts = ids[part], list(map(messages_of, rows[part]))
        ours = log_probabilities(model, tokenizer, prompts, chains, differentiable=True)
        mask = padded([[1.0] * len(chain) for chain in chains])
        logps = (ours.cpu().gather(2, padded(chains)[..., None])[..., 0] * mask).sum(dim=1)
        objective = (torch.tensor(weights[part], dtype=logps.dtype) * logps).sum() / len(rows)
        for whole, found in zip(total, torch.autograd.grad(objective, parameters), strict=True):
            whole += found
    return torch.cat([g.flatten().cpu() for g in total])
