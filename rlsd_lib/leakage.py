"""Leakage: does the student speak of what it was never shown?

The first measure is at the level of phrases: the share of completions, sampled *without* a
reference, that mention one. A task says which words count (`Task.reference_pattern`), so the share
is only as good as that list: compare it with the base model's, which is the measure's null value.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from scipy.stats import binomtest

from rlsd_lib.tasks import Completion, text_of


class LeakRate(NamedTuple):
    """Completions that speak of a reference: `count` of `total`, as a share with an interval."""

    share: float
    low: float
    high: float
    count: int
    total: int


def phrase_leakage(
    completions: Iterable[Completion], pattern: str, *, level: float = 0.95
) -> LeakRate:
    """Return the share of completions in which `pattern` is found, with its Wilson interval.

    `completions` are texts or chat messages, sampled without a reference; upper and lower case are
    the same. Wilson's interval stays honest at a count of 0, where it says how large the share
    could still be; it takes completions as independent, so give one per problem where problems
    were sampled repeatedly. Raises ValueError for no completions, or a pattern that is no regular
    expression.
    """
    texts = [text_of(completion) for completion in completions]
    if not texts:
        raise ValueError("there are no completions; give at least one")
    try:
        found = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
    count = sum(found.search(text) is not None for text in texts)
    interval = binomtest(count, len(texts)).proportion_ci(level, method="wilson")
    share = count / len(texts)
    return LeakRate(share, float(interval.low), float(interval.high), count, len(texts))
