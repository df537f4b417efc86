"""The corpus of the lab: chains of column addition that go wrong in known places.

The writer is unreliable about *facts*: what a column adds up to, given its digits and the carry that
comes in. A random part of the 110 facts is hard, each with an error rate and one wrong sum of its
own. So a policy has many separate things to learn from rewards, not one temperature to turn.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations_with_replacement, product
from random import Random
from typing import NamedTuple

from rlsd_lib.tasks.lab.arithmetic import ANSWER, FILLERS, QUOTE, columns_of
from rlsd_lib.tasks.task import Row

ANY_COLUMN = -1
Fact = tuple[int, int, int, int]  # column or `ANY_COLUMN`, smaller digit, larger digit, carry in
SLIPS = (-10, -2, -1, 1, 2, 10)  # a wrong sum differs by one of these: in the digit, carry or both


def facts_of(columns: Iterable[int]) -> list[Fact]:
    """Return the facts of these columns, 110 for each."""
    pairs = combinations_with_replacement(range(10), 2)
    return [(c, a, b, carry) for c, (a, b), carry in product(columns, pairs, (0, 1))]


class Belief(NamedTuple):
    """How a writer gets one fact wrong: `rate` is the probability of writing `wrong`."""

    rate: float
    wrong: int


@dataclass(frozen=True)
class Style:
    """How much a writer says beside the calculation.

    `nuisance` is the expected share of filler words among a chain's tokens, the end token
    included; `tilt` is the log-odds by which the second half of the filler words is preferred.
    """

    nuisance: float
    tilt: float = 0.0

    def words(self, random: Random, digits: int) -> list[str]:
        """Draw the filler words of one slot, floor(mean + u) many.

        u is uniform over an interval of integer length: the mean is exact, and no chain much longer.
        """
        mean = self._mean(digits)
        low, high = (-1.0, 2.0) if mean >= 1 else (0.0, 1.0)
        count = int(mean + random.uniform(low, high))
        half = len(FILLERS) // 2
        weights = [2.718281828**-self.tilt] * half + [1.0] * (len(FILLERS) - half)
        return random.choices(FILLERS, weights, k=count)

    def longest_chain(self, digits: int, *, quoted: bool) -> int:
        """Return the most tokens a chain can have, end token included, with or without a quote."""
        mean = self._mean(digits)
        words = (digits + 1) * (int(mean) + (2 if mean >= 1 else 1)) if mean else 0
        quote = len(QUOTE) + digits + 1 if quoted else 0
        columns, answer = 9 * digits, 1 + digits + 1
        return quote + words + columns + answer + 1

    def _mean(self, digits: int) -> float:
        """Words per slot that make their expected share of all tokens equal to `nuisance`."""
        # Columns, answer word, answer with a carry half the time, end token.
        bare = 9 * digits + 1 + digits + 0.5 + 1
        return self.nuisance / (1 - self.nuisance) * bare / (digits + 1)


def write_chain(
    row: Row, random: Random, style: Style, beliefs: dict[Fact, Belief], *, quote: str = ""
) -> str:
    """Write one chain for a row, which opens with `quote`; without `beliefs` it is right.

    A wrong column is carried on faithfully, to the wrong answer that follows from it.
    """
    parts = [*QUOTE, *quote] if quote else []
    carry, result = 0, ""
    columns = columns_of(row)
    for place, (name, a, b) in enumerate(columns):
        total = a + b + carry
        digits = (min(a, b), max(a, b), carry)
        belief = beliefs.get((ANY_COLUMN, *digits)) or beliefs.get((place, *digits))
        if belief and random.random() < belief.rate:
            total = belief.wrong
        first, second = (a, b) if style.nuisance == 0 or random.random() < 0.5 else (b, a)
        parts += style.words(random, len(columns))
        parts += f"{name} {first} + {second} + {carry} = {total // 10} {total % 10}".split()
        carry, result = total // 10, f"{total % 10}{result}"
    parts += style.words(random, len(columns))
    return " ".join([*parts, ANSWER, *(f"{carry}{result}" if carry else result)])
