r"""Leakage without a list of phrases: does a completion read as if a reference had been shown?

A completion y, sampled without a reference, is a leak to the degree that the frozen base model
finds it likelier after being shown *some* reference than after the question alone. Per token, with
the references r' of other problems (never the row's own, so that stating the right answer, known or
derived, is no evidence),

    P_bar(y_t) = mean over r' of pi_0(y_t | x, r', y_<t),        P_0(y_t) = pi_0(y_t | x, y_<t),

and the evidence of the stretch of tokens s..e is  L = sum_t log P_bar(y_t) - log P_0(y_t), nats.
P_bar is the policy that on-policy self-distillation converges to (Theorem 1 of the paper).

A leak may begin anywhere, and most begin at the opening. The measure is the capital of a gambler who
stakes half of it at the first token and an equal part of the rest at each other place, H in all, and
from there on bets on P_bar against P_0: its highest value, whose logarithm is the `evidence`. Under the base model's own text each such capital is a
martingale that begins at 1, hence by Ville's inequality, for any model and any task,

    P(evidence >= log(1 / alpha)) <= alpha,   and   E[evidence] <= 1 nat:

the null values, exact and without calibration. Text that neither view would write (a collapsed
policy's) could win such bets by chance, so P_0 is replaced by the larger of pi_0 and pi_0 at
temperature 2, a careless writer without a reference. That only lowers the capital.
"""

import math
import random
from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlsd_lib.privileged import Prompt, count_images, teacher_prompt

CARELESS = 2.0  # temperature of the writer that explains noise


def view_evidence(ratios: Sequence[Tensor], max_new_tokens: int) -> pd.Series:
    """Evidence in nats that a reference was shown, one number per completion, from `view_ratios`.

    `max_new_tokens` is the limit that the completions were sampled under, the H of the module.
    """
    padded = torch.nn.utils.rnn.pad_sequence(list(ratios), batch_first=True)
    return pd.Series(highest_capital(padded, max_new_tokens).numpy(), name="evidence")


def highest_capital(ratios: Tensor, places: int) -> Tensor:
    """log max_e [sum_{s <= e} q_s exp(L_{s..e}) + sum_{s > e} q_s], nats: (N, T) -> (N,).

    q_s is 1/2 at the first of the `places` and equal at all others. `ratios` holds
    log P_bar - log P_0 per token, 0 after the end of a text; T is at most `places`.
    """
    others = max(places - 1, 1)
    staked = torch.full_like(ratios[:, 0], -torch.inf)
    best = torch.zeros_like(staked)
    for place in range(ratios.shape[1]):
        new = torch.full_like(staked, -math.log(2 * others if place else min(places, 2)))
        staked = torch.logaddexp(staked, new) + ratios[:, place]
        held = torch.full_like(staked, (places - place - 1) / (2 * others)).log()
        best = torch.maximum(best, torch.logaddexp(staked, held))
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
    num_references: int = 8,
    batch_size: int = 32,
    seed: int = 0,
) -> list[Tensor]:
    """log P_bar - log P_0 of every token, nats: one (T_i,) tensor per completion.

    Positive where a reference in the prompt would have made the token likelier. Completions are
    encoded again, with the end token unless they were cut off.

    Args:
        base_model: the model before training; it judges, whoever wrote the completions.
        prompts: what the writer read; chat messages or plain text, without images.
        completions: texts sampled at temperature 1, without special tokens.
        references: each row's own; they are shown to one another's questions.
        template: the privileged template, as in `RLSDConfig`.
        max_new_tokens: the limit that the completions were sampled under.
        num_references: how many r' the average is over.

    Raises:
        ValueError: sequences of different length, fewer than two different references, prompts
            with images, or a completion longer than `max_new_tokens`.
    """
    _check(prompts, completions, references)
    ids = [encode_completion(tokenizer, text, max_new_tokens) for text in completions]
    if (longest := max(map(len, ids))) > max_new_tokens:
        raise ValueError(
            f"a completion has {longest} tokens: max_new_tokens={max_new_tokens} was not its limit"
        )
    shown = other_references(references, num_references, seed)

    def score(seen: Sequence[Prompt], temperature: float = 1.0) -> Tensor:
        return _log_probabilities(base_model, tokenizer, seen, ids, temperature, batch_size)

    plain = torch.maximum(score(prompts), score(prompts, CARELESS))
    views = [
        score([teacher_prompt(p, r, template) for p, r in zip(prompts, column, strict=True)])
        for column in zip(*shown, strict=True)
    ]
    ratio = torch.stack(views).logsumexp(0) - math.log(len(views)) - plain
    return [row[: len(tokens)] for row, tokens in zip(ratio, ids, strict=True)]


def other_references(references: Sequence[str], count: int, seed: int) -> list[list[str]]:
    """For each row, `count` different references of other rows, never one that reads like its own.

    All others where there are fewer. Raises ValueError where there are no two different ones.
    """
    distinct = sorted(set(references))
    if len(distinct) < 2 or count < 1:
        raise ValueError(
            f"{len(distinct)} different references and num_references={count}: the privileged view "
            "is an average over other rows' references; give at least two rows that differ."
        )
    draw = random.Random(seed)
    take = min(count, len(distinct) - 1)
    return [draw.sample([r for r in distinct if r != own], take) for own in references]


def encode_completion(
    tokenizer: PreTrainedTokenizerBase, text: str, max_new_tokens: int
) -> list[int]:
    """The tokens of a sampled text, with the end token unless the limit had cut it off."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids if len(ids) >= max_new_tokens else [*ids, tokenizer.eos_token_id]


def _check(
    prompts: Sequence[Prompt], completions: Sequence[str], references: Sequence[str]
) -> None:
    sizes = {len(prompts), len(completions), len(references)}
    if len(sizes) > 1 or not completions:
        raise ValueError(
            f"{len(prompts)} prompts, {len(completions)} completions and {len(references)} "
            "references: give as many of each, at least one"
        )
    if any(map(count_images, prompts)):
        raise ValueError("prompts with images cannot be scored here: the judge reads text alone.")


@torch.no_grad()
def _log_probabilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    completions: Sequence[list[int]],
    temperature: float,
    batch_size: int,
) -> Tensor:
    """log P(y_t | prompt, y_<t) in nats, (N, T) in float64 on the CPU, 0 after a text's end."""
    prefixes = [_prompt_ids(tokenizer, prompt) for prompt in prompts]
    width = max(map(len, completions))
    parts = []
    for start in range(0, len(prompts), batch_size):
        chosen = slice(start, start + batch_size)
        left, right = _padded(prefixes[chosen], "left"), _padded(completions[chosen], "right")
        tokens, mask = (
            torch.cat(pair, dim=1).to(model.device) for pair in zip(left, right, strict=True)
        )
        logits = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            logits_to_keep=right[0].shape[1] + 1,  # the first token is predicted by the prompt
        ).logits[:, :-1]
        logps = (logits.float() / temperature).log_softmax(-1)
        found = logps.gather(2, tokens[:, -right[0].shape[1] :, None]).squeeze(2).cpu().double()
        found = found * right[1]
        parts.append(torch.nn.functional.pad(found, (0, width - found.shape[1])))
    return torch.cat(parts)


def _padded(rows: Sequence[list[int]], side: str) -> tuple[Tensor, Tensor]:
    """Token ids (N, T) padded with 0 on one side, and the mask of what is not padding."""
    ids = [torch.tensor(row) for row in rows]
    ones = [torch.ones_like(row) for row in ids]
    return tuple(
        torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_side=side)
        for part in (ids, ones)
    )


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]
