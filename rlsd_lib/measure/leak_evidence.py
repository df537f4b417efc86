r"""Leakage without a list of phrases: does a completion read as if a reference had been shown?

A completion y, sampled without a reference, is a leak to the degree that the frozen base model
finds it likelier after being shown *some* reference than after the question alone. Per token, with
the references r' of other problems (never the row's own, so that stating the right answer, known or
derived, is no evidence),

    P_bar(y_t) = mean over r' of pi_0(y_t | x, r', y_<t),        P_0(y_t) = pi_0(y_t | x, y_<t),

and the evidence of the stretch of tokens s..e is  L = sum_t log P_bar(y_t) - log P_0(y_t), nats.
P_bar is the policy that on-policy self-distillation converges to (Theorem 1 of the paper).

A leak may begin anywhere, and most begin at the opening. The measure is the capital of a gambler
who stakes half of it at the first token and an equal part of the rest at each other place, H in
all, and from there on bets on P_bar against P_0: its highest value, whose logarithm is the
`evidence`. Under the base model's own text each such capital is a martingale that begins at 1,
hence by Ville's inequality, for any model and any task,

    P(evidence >= log(1 / alpha)) <= alpha,   and   E[evidence] <= 1 nat:

the null values, without calibration. Completions are texts that are encoded again here, so the
null is exact for tokenizers that re-encode their own text alike (the lab's), approximate otherwise:
BPE may split a text in another way than the model had sampled it.

Text that neither view would write (a collapsed policy's) could win such bets by chance, so P_0 is
replaced by the larger of pi_0 and pi_0 at temperature 2, a careless writer without a reference.
That only lowers the capital.
"""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlsd_lib.measure.logps import log_probabilities, of_tokens
from rlsd_lib.prompts import Prompt, count_images, teacher_prompt

CARELESS = 2.0  # temperature of the writer that explains noise
NUM_REFERENCES = 8  # r' that the average is over


def highest_capital(ratios: Tensor, places: int) -> Tensor:
    """The evidence, log max_e [sum_{s <= e} q_s exp(L_{s..e}) + sum_{s > e} q_s], nats: (N, T) -> (N,).

    q_s is 1/2 at the first of the `places` H, the limit that texts were sampled under, and equal at
    all others. `ratios` holds log P_bar - log P_0 per token, 0 after the end of a text; T <= H.
    """
    others = max(places - 1, 1)
    staked = torch.full_like(ratios[:, 0], -torch.inf)
    best = torch.zeros_like(staked)
    for place in range(ratios.shape[1]):
        new = torch.full_like(staked, -math.log(2 * others if place else min(places, 2)))
        staked = torch.logaddexp(staked, new) + ratios[:, place]
        unstaked = torch.full_like(staked, (places - place - 1) / (2 * others)).log()
        best = torch.maximum(best, torch.logaddexp(staked, unstaked))
    return best


def view_ratios(
    base_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    references: Sequence[str],
    *,
    template: str,
    max_new_tokens: int,
    batch_size: int = 32,
    seed: int = 0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """log P_bar - log P_0 of every token, nats: (N, T) in float64, 0 after the end of a text.

    Positive where a reference in the prompt would have made the token likelier. Completions are
    encoded again, with the end token unless they were cut off.

    Args:
        base_model: the model before training; it judges, whoever wrote the completions.
        prompts: what the writer read; chat messages or plain text, without images.
        completions: texts sampled at temperature 1, without special tokens.
        references: each row's own; they are shown to one another's questions.
        template: the privileged template, as in `RLSDConfig`.
        max_new_tokens: the limit that the completions were sampled under.
        seed: of the choice of references.
        chat_template_kwargs: arguments of the chat template, those of the writer's prompts.

    Raises:
        ValueError: sequences of different length, fewer than two different references, prompts
            with images, or a completion longer than `max_new_tokens`.
    """
    if len({len(prompts), len(completions), len(references)}) > 1 or not completions:
        raise ValueError(
            f"{len(prompts)} prompts, {len(completions)} completions and {len(references)} "
            "references: give as many of each, at least one"
        )
    if any(map(count_images, prompts)):
        raise ValueError("prompts with images cannot be scored here: the judge reads text alone.")
    ids = [_encode(tokenizer, text, max_new_tokens) for text in completions]

    def score(seen: Sequence[Prompt], temperature: float = 1.0) -> Tensor:
        rows: list[Tensor] = []
        for start in range(0, len(seen), batch_size):
            part = slice(start, start + batch_size)
            log_p = log_probabilities(
                base_model,
                tokenizer,
                seen[part],
                ids[part],
                temperature=temperature,
                chat_template_kwargs=chat_template_kwargs,
            )
            rows += of_tokens(log_p, ids[part])
        return pad_sequence(rows, batch_first=True).double()

    plain = torch.maximum(score(prompts), score(prompts, CARELESS))
    shown = other_references(references, seed)
    views = [
        score([teacher_prompt(p, r, template) for p, r in zip(prompts, column, strict=True)])
        for column in zip(*shown, strict=True)
    ]
    return torch.stack(views).logsumexp(0) - math.log(len(views)) - plain


def other_references(references: Sequence[str], seed: int) -> list[list[str]]:
    """For each row, 8 different references of other rows, never one that reads like its own.

    All others where there are fewer. Raises ValueError where there are no two different ones.
    """
    distinct = sorted(set(references))
    if len(distinct) < 2:
        raise ValueError(
            f"{len(distinct)} different references: the privileged view is an average over other "
            "rows' references; give at least two rows that differ."
        )
    draw = random.Random(seed)
    take = min(NUM_REFERENCES, len(distinct) - 1)
    return [draw.sample([r for r in distinct if r != own], take) for own in references]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, max_new_tokens: int) -> list[int]:
    """The tokens of a sampled text, with the end token unless the limit had cut it off."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) > max_new_tokens:
        raise ValueError(
            f"a completion has {len(ids)} tokens: {max_new_tokens=} was not its limit; give the "
            "limit that it was sampled under"
        )
    return ids if len(ids) == max_new_tokens else [*ids, tokenizer.eos_token_id]
