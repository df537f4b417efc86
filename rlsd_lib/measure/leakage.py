r"""Leakage: does the student speak of what it was never shown? Three measures, each with a null.

- `phrase`: a completion mentions a reference, by the task's list of words. Null: the base model's
  share.
- `value`: it states the reference's value before that can have been derived. Null: the share that
  states the value of another row there.
- `privileged view`: it reads as if some reference had been shown, whatever it quotes and in
  whatever words. Null: at most 5 %.

The last needs no list of words: a completion y, sampled without a reference, is a leak to the degree
that the frozen base model finds it likelier after being shown *some* reference than after the
question alone. Per token, with the references r' of other problems (never the row's own, so that
stating the right answer, known or derived, is no evidence),

    P_bar(y_t) = mean over r' of pi_0(y_t | x, r', y_<t),        P_0(y_t) = pi_0(y_t | x, y_<t),

and the evidence of the stretch of tokens s..e is  L = sum_t log P_bar(y_t) - log P_0(y_t), nats.
P_bar is the policy that on-policy self-distillation converges to (Theorem 1 of the paper).

A leak may begin anywhere, and most begin at the opening. The measure is the capital of a gambler
who stakes half of it at the first token and an equal part of the rest at each other place, H in
all, and from there on bets on P_bar against P_0: its highest value, whose logarithm is the
`evidence`. Under the base model's own text each such capital is a martingale that begins at 1,
hence by Ville's inequality, for any model and any task,

    P(evidence >= log(1 / alpha)) <= alpha,   and   E[evidence] <= 1 nat:

the null values, without calibration. The tokens that are judged are those that were sampled.

Text that neither view would write (a collapsed policy's) could win such bets by chance, so P_0 is
replaced by the larger of pi_0 and pi_0 at temperature 2, a careless writer without a reference.
That only lowers the capital.
"""

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlsd_lib.measure.evaluate import sample
from rlsd_lib.measure.intervals import bootstrap_interval, share_difference, share_interval
from rlsd_lib.measure.logps import log_probabilities, of_tokens
from rlsd_lib.prompts import (
    COLUMN,
    DEFAULT_TEMPLATE,
    Prompt,
    count_images,
    prompt_text,
    teacher_prompt,
)
from rlsd_lib.tasks import Row, Task

CARELESS = 2.0  # temperature of the writer that explains noise
NUM_REFERENCES = 8  # r' that the average is over
ALPHA = 0.05  # share of completions without a leak that the privileged view may count
Cut = Callable[[str, Row], str]  # the part of a completion in which nothing can be derived yet


def first_half(completion: str, row: Row) -> str:
    """The first half of a completion's words: the cut for tasks that cannot know better."""
    words = completion.split()
    return " ".join(words[: len(words) // 2])


def value_leakage(
    completions: Sequence[str], rows: Sequence[Row], underived: Cut = first_half
) -> pd.DataFrame:
    """Say of each completion whether it states its row's value before deriving it: 1.0 or 0.0.

    The value is the row's `answer`, else its privileged text. `chance` is the null: the share of the
    other rows' values in the same place. Both are NaN where the prompt holds the value. Digits may be
    apart ("7 5 8"); parts of longer words and numbers do not count.
    """
    values = [str(row.get("answer") or row[COLUMN]) for row in rows]
    patterns = {value: _value_pattern(value) for value in values}
    found = []
    for completion, row, own in zip(completions, rows, values, strict=True):
        prompt, text = prompt_text(row["prompt"]), underived(completion, row)
        unseen = {v: p for v, p in patterns.items() if p.search(prompt) is None}
        stated = {v: float(p.search(text) is not None) for v, p in unseen.items()}
        mine = stated.pop(own, math.nan)
        others = np.mean(list(stated.values())) if stated and own in unseen else math.nan
        found.append({"value": mine, "chance": others})
    return pd.DataFrame(found)


def _value_pattern(value: str) -> re.Pattern[str]:
    """Find a value as a whole: with any white space between its words, and between its digits."""
    parts = [re.escape(part) for part in re.findall(r"\d|[^\s\d]+|\s+", value.strip())]
    pattern = r"\s*".join(part for part in parts if part.strip())
    return re.compile(rf"(?<!\w)(?<!\d[.,]){pattern}(?!\w|[.,]\d)", re.IGNORECASE)


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
    completions: Sequence[list[int]],
    references: Sequence[str],
    *,
    template: str,
    batch_size: int = 32,
    seed: int = 0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """log P_bar - log P_0 of every token, nats: (N, T) in float64, 0 after the end of a text.

    Positive where a reference in the prompt would have made the token likelier. `base_model` is that
    before training. Of N texts: the `prompts` that the writer read, without images; `completions` as
    token ids, sampled at temperature 1, with their end; `references`, each row's own, which are shown
    to one another's questions through `template`. Raises ValueError for fewer than two different
    ones.
    """

    def score(seen: Sequence[Prompt], temperature: float = 1.0) -> Tensor:
        how = {"temperature": temperature, "chat_template_kwargs": chat_template_kwargs}
        rows: list[Tensor] = []
        for start in range(0, len(seen), batch_size):
            part = slice(start, start + batch_size)
            log_p = log_probabilities(base_model, tokenizer, seen[part], completions[part], **how)
            rows += of_tokens(log_p, completions[part])
        return pad_sequence(rows, batch_first=True).double()

    plain = torch.maximum(score(prompts), score(prompts, CARELESS))
    shown = other_references(references, seed)
    views = [
        score([teacher_prompt(p, r, template) for p, r in zip(prompts, column, strict=True)])
        for column in zip(*shown, strict=True)
    ]
    return torch.stack(views).logsumexp(0) - math.log(len(views)) - plain


def other_references(references: Sequence[str], seed: int) -> list[list[str]]:
    """For each row, `NUM_REFERENCES` different texts that are not its own, or all where fewer.

    Raises ValueError where there are no two different ones.
    """
    distinct = sorted(set(references))
    if len(distinct) < 2:
        raise ValueError(
            f"{len(distinct)} different references: give at least two rows that differ"
        )
    draw = random.Random(seed)
    take = min(NUM_REFERENCES, len(distinct) - 1)
    return [draw.sample([r for r in distinct if r != own], take) for own in references]


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    base_model: PreTrainedModel,
    max_new_tokens: int,
    num_problems: int | None = None,
    **sampling: Any,
) -> pd.DataFrame:
    """Sample one completion for each of `num_problems` test problems at temperature 1, and judge it.

    `sampling` are `seed`, `batch_size`, and the `chat_template_kwargs` of training. Returns a row
    per problem: `completion`, `phrase` (bool), `value` and `chance` (see `value_leakage`) and
    `evidence` (nats, see `highest_capital`). Raises ValueError for prompts with images, or fewer
    than two different references.
    """
    rows = list(task.test)[:num_problems]
    if any(row.get("images") or count_images(row["prompt"]) for row in rows):
        raise ValueError("rows with images cannot be measured here: the judge reads text alone.")
    prompts, references = ([row[name] for row in rows] for name in ("prompt", COLUMN))
    ids = sample(model, tokenizer, prompts, max_new_tokens=max_new_tokens, **sampling)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    how = {"template": task.privileged_template or DEFAULT_TEMPLATE, **sampling}
    ratios = view_ratios(base_model, tokenizer, prompts, ids, references, **how)
    return value_leakage(texts, rows, task.underived or first_half).assign(
        completion=texts,
        phrase=[task.speaks_of_reference(text) for text in texts],
        evidence=highest_capital(ratios, max_new_tokens).numpy(),
    )


def summarise(judged: pd.DataFrame, base: pd.DataFrame) -> pd.DataFrame:
    """Put two frames of `measure` on the same problems, the model's and its base model's, together.

    Rows: the measures `phrase`, `value`, `privileged view` (shares) and `evidence` (mean, nats), if
    any completion could be judged, `of` the model, the base model, and their difference. Columns:
    `mean`, `low`, `high` (95 %: Wilson, Newcombe, a bootstrap for nats), `null` and `problems`.
    """
    leaks = "privileged view"
    sides = [f.assign(**{leaks: f["evidence"] >= math.log(1 / ALPHA)}) for f in (judged, base)]
    rows: list[tuple] = []
    nulls = {
        "phrase": (base["phrase"].mean(), base["phrase"].mean()),
        "value": (judged["chance"].mean(), base["chance"].mean()),
        leaks: (ALPHA, ALPHA),
    }
    for measure, (null, base_null) in nulls.items():
        marks, base_marks = (side[measure].dropna() for side in sides)
        if marks.empty or base_marks.empty:
            continue
        share, base_share = share_interval(marks), share_interval(base_marks)
        difference = share_difference(share, base_share)
        rows.append((measure, "model", *share, null, len(marks)))
        rows.append((measure, "base", *base_share, base_null, len(base_marks)))
        rows.append((measure, "difference", *difference, 0.0, len(marks)))
    nats, base_nats = judged["evidence"].to_numpy(), base["evidence"].to_numpy()
    means = ("model", nats, 1.0), ("base", base_nats, 1.0), ("difference", nats - base_nats, 0.0)
    for of, values, null in means:
        rows.append(("evidence", of, *bootstrap_interval(values), null, len(values)))
    return pd.DataFrame(rows, columns=["measure", "of", "mean", "low", "high", "null", "problems"])
