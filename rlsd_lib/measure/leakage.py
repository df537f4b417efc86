"""Leakage: does the student speak of what it was never shown? Three measures, each with a null.

Of a completion that was sampled without a reference, and of the share of completions that count:

- `phrase`: it mentions a reference, by the task's list of words. Null: the base model's share.
- `value`: it states the reference's value before that can have been derived. Null: the share that
  states the value of another row there.
- `privileged view`: it reads as if some reference had been shown, whatever it quotes, invented
  values included, and with no list of words (`rlsd_lib.measure.leak_evidence`). Null: at most 5 %,
  exact for tokenizers that re-encode their own text alike (the lab's), approximate otherwise.

`report` measures a model and its base model in one call.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlsd_lib.measure.evaluate import generate
from rlsd_lib.measure.intervals import (
    bootstrap_interval,
    share_difference,
    share_interval,
)
from rlsd_lib.measure.leak_evidence import highest_capital, view_ratios
from rlsd_lib.prompts import COLUMN, DEFAULT_TEMPLATE, prompt_text
from rlsd_lib.tasks import Row, Task
from rlsd_lib.tasks.task import REFERENCE_PATTERN

ALPHA = 0.05  # share of completions without a leak that the privileged view may count
Cut = Callable[[str, Row], str]  # the part of a completion in which nothing can be derived yet


def first_half(completion: str, row: Row) -> str:
    """The first half of a completion's words: where a value stands that was not worked out.

    The cut for tasks that cannot know better. A bare answer has no word in its first half.
    """
    words = completion.split()
    return " ".join(words[: len(words) // 2])


def value_leakage(
    completions: Sequence[str], rows: Sequence[Row], underived: Cut = first_half
) -> pd.DataFrame:
    """Say of each completion whether it states its row's value before deriving it: 1.0 or 0.0.

    The value is the row's `answer`, or its privileged text where there is no such column. `chance`
    is the null: the share of the other rows' values that stand in the same place. Both are NaN
    where the prompt itself holds the value, and values of others that the prompt holds are left
    out. Digits may be apart ("7 5 8"); parts of longer words and numbers do not count.
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


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task | Dataset,
    *,
    base_model: PreTrainedModel,
    max_new_tokens: int,
    num_problems: int | None = None,
    template: str | None = None,
    pattern: str | None = None,
    **sampling: Any,
) -> pd.DataFrame:
    """Sample one completion per problem from `model` at temperature 1, and judge each.

    `task` is a `Task` (its test problems count; it brings its own template, pattern and cut), or a
    data set with the columns `prompt` and `privileged_context`. `num_problems` takes the first so
    many. `sampling` are `seed`, `batch_size`, and the `chat_template_kwargs` that the model was
    trained with: it is sampled and judged under the same template.

    Returns a row per problem: `completion`, `phrase` (bool), `value` and `chance` (see
    `value_leakage`) and `evidence` (nats, see `rlsd_lib.measure.leak_evidence`).

    Raises:
        ValueError: for prompts with images, or a pattern that is no regular expression.
    """
    data, underived = task, first_half
    if isinstance(task, Task):
        data, underived = task.test, task.underived or first_half
        template, pattern = template or task.privileged_template, pattern or task.reference_pattern
    rows = list(data.select(range(min(num_problems or len(data), len(data)))))
    if any(row.get("images") for row in rows):
        raise ValueError("rows with images cannot be measured here: the judge reads text alone.")
    mentions = _search(pattern or REFERENCE_PATTERN)
    prompts, references = ([row[name] for row in rows] for name in ("prompt", COLUMN))
    sampling["max_new_tokens"] = max_new_tokens
    texts = [text for (text,) in generate(model, tokenizer, prompts, **sampling)]
    how = {"template": template or DEFAULT_TEMPLATE, **sampling}
    ratios = view_ratios(base_model, tokenizer, prompts, texts, references, **how)
    return value_leakage(texts, rows, underived).assign(
        completion=texts,
        phrase=[mentions(text) is not None for text in texts],
        evidence=highest_capital(ratios, max_new_tokens).numpy(),
    )


def _search(pattern: str) -> Callable[[str], re.Match[str] | None]:
    try:
        return re.compile(pattern, re.IGNORECASE).search
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error


def report(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task | Dataset,
    *,
    base_model: PreTrainedModel,
    **settings: Any,
) -> pd.DataFrame:
    """Measure the leakage of `model` and of the model it was trained from, on the same problems.

        leakage.report(model, tokenizer, dataset, base_model=base, max_new_tokens=512)

    `settings` are further arguments of `measure`. Returns the frame of `summarise`. Raises
    ValueError for prompts with images.
    """
    settings["base_model"] = base_model
    return summarise(*(measure(who, tokenizer, task, **settings) for who in (model, base_model)))


def summarise(judged: pd.DataFrame, base: pd.DataFrame) -> pd.DataFrame:
    """Put two frames of `measure` on the same problems, the model's and its base model's, together.

    Rows: the measures `phrase`, `value`, `privileged view` (shares) and `evidence` (mean, nats),
    `of` the model, the base model, and their difference. Columns: `mean`, `low`, `high` (95 %:
    Wilson for a share, Newcombe's combination of two for a difference, a bootstrap over problems
    for nats), `null` and `problems`, the number that could be judged. A share of which no
    completion could be judged is left out.
    """
    rows: list[tuple] = []
    for measure in ("phrase", "value", "privileged view"):
        marks, base_marks = (_marks(frame, measure) for frame in (judged, base))
        if marks.empty or base_marks.empty:
            continue
        share, base_share = share_interval(marks), share_interval(base_marks)
        null, base_null = {
            "phrase": (base_share.mean, base_share.mean),
            "value": (judged["chance"].mean(), base["chance"].mean()),
            "privileged view": (ALPHA, ALPHA),
        }[measure]
        difference = share_difference(share, base_share)
        rows.append((measure, "model", *share, null, len(marks)))
        rows.append((measure, "base", *base_share, base_null, len(base_marks)))
        rows.append((measure, "difference", *difference, 0.0, len(marks)))
    nats, base_nats = judged["evidence"].to_numpy(), base["evidence"].to_numpy()
    sides = ("model", nats, 1.0), ("base", base_nats, 1.0), ("difference", nats - base_nats, 0.0)
    for of, values, null in sides:
        rows.append(("evidence", of, *bootstrap_interval(values), null, len(values)))
    return pd.DataFrame(rows, columns=["measure", "of", "mean", "low", "high", "null", "problems"])


def _marks(judged: pd.DataFrame, measure: str) -> pd.Series:
    """Which completions count, of those that could be judged."""
    if measure == "privileged view":
        return judged["evidence"] >= math.log(1 / ALPHA)
    return judged[measure].dropna().astype(bool)
