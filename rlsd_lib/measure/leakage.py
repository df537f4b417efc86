"""Leakage: does the student speak of what it was never shown? Three measures, each with a null.

Of a completion that was sampled without a reference, and of the share of completions that count:

- `phrase`: it mentions a reference, by the task's list of words. Null: the base model's share.
- `value`: it states the reference's value before that can have been derived. Null: the share that
  states the value of another row there.
- `privileged view`: it reads as if some reference had been shown, whatever it quotes, invented
  values included, and with no list of words (`rlsd_lib.measure.leak_evidence`). Null: at most `alpha`,
  exact for tokenizers that re-encode their own text alike (the lab's), approximate otherwise.

`report` measures a model and its base model in one call; `judge` takes completions.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlsd_lib.measure.evaluate import generate
from rlsd_lib.measure.intervals import (
    Interval,
    bootstrap_interval,
    share_difference,
    share_interval,
)
from rlsd_lib.measure.leak_evidence import highest_capital, view_ratios
from rlsd_lib.prompts import COLUMN, DEFAULT_TEMPLATE, Completion, prompt_text, text_of
from rlsd_lib.tasks import Row, Task
from rlsd_lib.tasks.task import REFERENCE_PATTERN

Cut = Callable[[str, Row], str]  # the part of a completion in which nothing can be derived yet


def phrase_leakage(completions: Iterable[Completion], pattern: str) -> Interval:
    """Return the share of completions in which `pattern` is found, with its Wilson interval.

    `completions` are texts or chat messages, sampled without a reference; upper and lower case are
    the same. Raises ValueError for no completions, or a pattern that is no regular expression.
    """
    return share_interval(_mentions(completions, pattern))


def _mentions(completions: Iterable[Completion], pattern: str) -> list[bool]:
    try:
        found = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
    return [found.search(text_of(completion)) is not None for completion in completions]


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


def judge(
    completions: Sequence[Completion],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    base_model: PreTrainedModel,
    max_new_tokens: int,
    template: str = DEFAULT_TEMPLATE,
    pattern: str = REFERENCE_PATTERN,
    underived: Cut | None = None,
    **view: Any,
) -> pd.DataFrame:
    """Measure completions that exist already: one row each, in the given order.

    Columns: `completion`, `phrase` (bool), `value` and `chance` (see `value_leakage`) and
    `evidence` (nats, see `rlsd_lib.measure.leak_evidence`). `rows` hold `prompt` and
    `privileged_context`; completions were sampled at temperature 1, `max_new_tokens` at most.
    `view` are further arguments of `view_ratios`, such as `chat_template_kwargs`.
    """
    texts = [text_of(completion) for completion in completions]
    prompts, references = ([row[name] for row in rows] for name in ("prompt", COLUMN))
    view |= {"template": template, "max_new_tokens": max_new_tokens}
    ratios = view_ratios(base_model, tokenizer, prompts, texts, references, **view)
    return value_leakage(texts, rows, underived or first_half).assign(
        completion=texts,
        phrase=_mentions(texts, pattern),
        evidence=highest_capital(ratios, max_new_tokens).numpy(),
    )


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task | Dataset,
    *,
    base_model: PreTrainedModel,
    max_new_tokens: int,
    num_problems: int | None = None,
    seed: int = 0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **known: Any,
) -> pd.DataFrame:
    """Sample one completion per problem from `model` at temperature 1 and `judge` it.

    `task` is a `Task` (its test problems count; it brings its own template, pattern and cut), or a
    data set with the columns `prompt` and `privileged_context`. `num_problems` takes the first so
    many. `chat_template_kwargs` are those that the model was trained with: it is sampled and judged
    under the same template. `known` are `template`, `pattern` and `underived` of `judge`.

    Raises:
        ValueError: for prompts with images.
    """
    data = task
    if isinstance(task, Task):
        data = task.test
        template = task.privileged_template or DEFAULT_TEMPLATE
        own = {"template": template, "pattern": task.reference_pattern, "underived": task.underived}
        known = {**own, **known}
    rows = list(data.select(range(min(num_problems or len(data), len(data)))))
    if any(row.get("images") for row in rows):
        raise ValueError("rows with images cannot be measured here: the judge reads text alone.")
    sampling = {"max_new_tokens": max_new_tokens, "seed": seed}
    sampling["chat_template_kwargs"] = chat_template_kwargs
    samples = generate(model, tokenizer, [row["prompt"] for row in rows], **sampling)
    texts = [text for (text,) in samples]
    return judge(texts, rows, tokenizer, base_model=base_model, **sampling, **known)


def report(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task | Dataset,
    *,
    base_model: PreTrainedModel,
    alpha: float = 0.05,
    **settings: Any,
) -> pd.DataFrame:
    """Measure the leakage of `model` and of the model it was trained from, on the same problems.

        leakage.report(model, tokenizer, dataset, base_model=base, max_new_tokens=512)

    `settings` are further arguments of `measure`. Returns the frame of `summarise`. Raises
    ValueError for prompts with images.
    """
    judged = [
        measure(each, tokenizer, task, base_model=base_model, **settings)
        for each in (model, base_model)
    ]
    return summarise(*judged, alpha=alpha)


def summarise(judged: pd.DataFrame, base: pd.DataFrame, *, alpha: float = 0.05) -> pd.DataFrame:
    """Put two frames of `judge` on the same problems, the model's and its base model's, together.

    Rows: the measures `phrase`, `value`, `privileged view` (shares) and `evidence` (mean, nats),
    `of` the model, the base model, and their difference. Columns: `mean`, `low`, `high` (95 %:
    Wilson for a share, Newcombe's combination of two for a difference, a bootstrap over problems
    for nats), `null` and `problems`, the number that could be judged. A share of which no
    completion could be judged is left out.
    """
    rows = []
    for measure in ("phrase", "value", "privileged view"):
        marks = [_marks(frame, measure, alpha) for frame in (judged, base)]
        if any(mark.empty for mark in marks):
            continue
        model, other = map(share_interval, marks)
        nulls = {
            "phrase": (other.mean, other.mean),
            "value": (judged["chance"].mean(), base["chance"].mean()),
            "privileged view": (alpha, alpha),
        }[measure]
        rows += [
            (measure, "model", *model, nulls[0], len(marks[0])),
            (measure, "base", *other, nulls[1], len(marks[1])),
            (measure, "difference", *share_difference(model, other), 0.0, len(marks[0])),
        ]
    nats, base_nats = judged["evidence"].to_numpy(), base["evidence"].to_numpy()
    sides = ("model", nats, 1.0), ("base", base_nats, 1.0), ("difference", nats - base_nats, 0.0)
    for of, values, null in sides:
        rows.append(("evidence", of, *bootstrap_interval(values), null, len(values)))
    return pd.DataFrame(rows, columns=["measure", "of", "mean", "low", "high", "null", "problems"])


def _marks(frame: pd.DataFrame, measure: str, alpha: float) -> pd.Series:
    """Which completions count, of those that could be judged."""
    if measure == "privileged view":
        return frame["evidence"] >= math.log(1 / alpha)
    return frame[measure].dropna().astype(bool)
