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
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from datasets import Dataset
from scipy.stats import binomtest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlsd_lib.measure.evaluate import generate
from rlsd_lib.measure.intervals import Interval, bootstrap_interval
from rlsd_lib.measure.leak_evidence import view_evidence, view_ratios
from rlsd_lib.prompts import COLUMN, DEFAULT_TEMPLATE, Completion, prompt_text, text_of
from rlsd_lib.tasks import Row, Task
from rlsd_lib.tasks.task import REFERENCE_PATTERN

Cut = Callable[[str, Row], str]  # the part of a completion in which nothing can be derived yet
SHARES = ("phrase", "value", "privileged view")
COLUMNS = ("measure", "of", "mean", "low", "high", "null", "problems")


class LeakRate(NamedTuple):
    """Completions that speak of a reference: `count` of `total`, as a share with an interval."""

    share: float
    low: float
    high: float
    count: int
    total: int


def leak_rate(found: Iterable[bool], *, level: float = 0.95) -> LeakRate:
    """Return the share of completions in which something was found, with its Wilson interval.

    Wilson's interval stays honest at a count of 0, where it says how large the share could still
    be; it takes completions as independent, so give one per problem where problems were sampled
    repeatedly. Raises ValueError for no completions.
    """
    marks = [bool(mark) for mark in found]
    if not marks:
        raise ValueError("there are no completions; give at least one")
    count = sum(marks)
    interval = binomtest(count, len(marks)).proportion_ci(level, method="wilson")
    share = count / len(marks)
    return LeakRate(share, float(interval.low), float(interval.high), count, len(marks))


def phrase_leakage(
    completions: Iterable[Completion], pattern: str, *, level: float = 0.95
) -> LeakRate:
    """Return the share of completions in which `pattern` is found, with its Wilson interval.

    `completions` are texts or chat messages, sampled without a reference; upper and lower case are
    the same. Raises ValueError for no completions, or a pattern that is no regular expression.
    """
    return leak_rate(_mentions(completions, pattern), level=level)


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
    **options: Any,
) -> pd.DataFrame:
    """Measure completions that exist already: one row each, in the given order.

    Columns: `completion`, `phrase` (bool), `value` and `chance` (see `value_leakage`) and
    `evidence` (nats, see `rlsd_lib.measure.leak_evidence`; `view_ratios` takes the `options`, such as the
    `chat_template_kwargs` that the prompts were written with). `rows` hold `prompt` and
    `privileged_context`; completions were sampled at temperature 1, `max_new_tokens` at most.
    """
    texts = [text_of(completion) for completion in completions]
    ratios = view_ratios(
        base_model,
        tokenizer,
        [row["prompt"] for row in rows],
        texts,
        [row[COLUMN] for row in rows],
        template=template,
        max_new_tokens=max_new_tokens,
        **options,
    )
    evidence = view_evidence(ratios, max_new_tokens)
    marks = pd.DataFrame({"completion": texts, "phrase": _mentions(texts, pattern)})
    return marks.join(value_leakage(texts, rows, underived or first_half)).join(evidence)


def report(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task | Dataset,
    *,
    base_model: PreTrainedModel,
    max_new_tokens: int,
    alpha: float = 0.05,
    num_problems: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> pd.DataFrame:
    """Measure the leakage of `model` and of the model it was trained from, on the same problems.

    One completion per problem at temperature 1, of `num_problems` at most. `task` is a `Task` (its
    test problems count), or a data set with the columns `prompt` and `privileged_context`.
    `settings` go to `measure` and `judge`; a task brings its own template, pattern and cut.

        leakage.report(model, tokenizer, dataset, base_model=base, max_new_tokens=512)

    Returns the frame of `summarise`. Raises ValueError for prompts with images.
    """
    settings |= {"base_model": base_model, "max_new_tokens": max_new_tokens}
    settings |= {"num_problems": num_problems, "seed": seed}
    judged = [measure(each, tokenizer, task, **settings) for each in (model, base_model)]
    return summarise(*judged, alpha=alpha)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task | Dataset,
    *,
    max_new_tokens: int,
    num_problems: int | None = None,
    seed: int = 0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **settings: Any,
) -> pd.DataFrame:
    """Sample one completion per problem from `model` and judge it: the frame of `judge`.

    `chat_template_kwargs` are those that the model was trained with: it is sampled and judged under
    the same template.
    """
    rows, known = _subject(task, num_problems)
    prompts = [row["prompt"] for row in rows]
    shared = {"max_new_tokens": max_new_tokens, "seed": seed}
    shared |= {"chat_template_kwargs": chat_template_kwargs}
    samples = generate(model, tokenizer, prompts, **shared)
    settings = {**known, **settings, **shared}
    return judge([texts[0] for texts in samples], rows, tokenizer, **settings)


def _subject(task: Task | Dataset, num_problems: int | None) -> tuple[list[Row], dict[str, Any]]:
    """The rows to measure on, and what the task knows about leaking."""
    data = task.test if isinstance(task, Task) else task
    rows = list(data.select(range(min(num_problems or len(data), len(data)))))
    if any(row.get("images") for row in rows):
        raise ValueError("rows with images cannot be measured here: the judge reads text alone.")
    if not isinstance(task, Task):
        return rows, {}
    known = {"pattern": task.reference_pattern, "underived": task.underived}
    return rows, {**known, "template": task.privileged_template or DEFAULT_TEMPLATE}


def summarise(judged: pd.DataFrame, base: pd.DataFrame, *, alpha: float = 0.05) -> pd.DataFrame:
    """Put two frames of `judge` on the same problems, the model's and its base model's, together.

    Rows: the measures `phrase`, `value`, `privileged view` (shares) and `evidence` (mean, nats),
    `of` the model, the base model, and their difference. Columns: `mean`, `low`, `high` (95 %:
    Wilson for a share, Newcombe's combination of two for a difference, a bootstrap over problems
    for nats), `null` and `problems`, the number that could be judged.
    """
    sides = {"model": judged, "base": base}
    found = [row for measure in SHARES for row in _shares(measure, sides, alpha)]
    nats = {of: frame["evidence"].to_numpy() for of, frame in sides.items()}
    nats["difference"] = nats["model"] - nats["base"]
    for of, values in nats.items():
        null = 0.0 if of == "difference" else 1.0
        found.append(("evidence", of, *bootstrap_interval(values), null, len(values)))
    return pd.DataFrame(found, columns=COLUMNS)


def _shares(measure: str, sides: dict[str, pd.DataFrame], alpha: float) -> list[tuple]:
    """The rows of `summarise` for one share; none where no completion could be judged."""
    marks = {of: _marks(frame, measure, alpha) for of, frame in sides.items()}
    if any(mark.empty for mark in marks.values()):
        return []
    rates = {of: leak_rate(mark) for of, mark in marks.items()}
    nulls = {
        "phrase": dict.fromkeys(sides, rates["base"].share),
        "value": {of: float(frame["chance"].mean()) for of, frame in sides.items()},
        "privileged view": dict.fromkeys(sides, alpha),
    }[measure]
    rows = [(measure, of, *rate[:3], nulls[of], rate.total) for of, rate in rates.items()]
    difference = rate_difference(rates["model"], rates["base"])
    return [*rows, (measure, "difference", *difference, 0.0, rates["model"].total)]


def _marks(frame: pd.DataFrame, measure: str, alpha: float) -> pd.Series:
    """Which completions count, of those that could be judged."""
    if measure == "privileged view":
        return frame["evidence"] >= math.log(1 / alpha)
    return frame[measure].dropna().astype(bool)


def rate_difference(first: LeakRate, second: LeakRate) -> Interval:
    """first - second with Newcombe's interval, made of the two Wilson intervals.

    Distances to the ends add up in squares. It stays honest where both counts are 0, and takes the
    two as independent, which for completions of the same problems is on the safe side.
    """
    share = first.share - second.share
    below = math.hypot(first.share - first.low, second.high - second.share)
    above = math.hypot(first.high - first.share, second.share - second.low)
    return Interval(share, share - below, share + above)
