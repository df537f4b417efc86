"""The corpus of the lab: chains of column addition that go wrong in known places.

The writer is unreliable about *facts*. A fact is what one column adds up to, given its two digits
and the carry that comes in. Most facts are known well; a random part is known badly, each with an
error rate of its own and one wrong sum of its own that the writer tends to believe. A policy that
imitates this corpus has many separate things to learn from rewards, not one temperature to turn.
"""

from dataclasses import dataclass
from random import Random

from rlsd_lib.tasks.lab.arithmetic import ANSWER, COLUMNS, FILLERS, QUOTE, columns_of
from rlsd_lib.tasks.task import Row

Fact = tuple[int, int, int]  # smaller digit, larger digit, carry in
SLIPS = (-10, -2, -1, 1, 2, 10)  # a wrong sum differs by one of these: in the digit, carry or both


@dataclass(frozen=True)
class Belief:
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

    def words(self, random: Random, count: int) -> list[str]:
        """Draw filler words, independently of everything else."""
        half = len(FILLERS) // 2
        weights = [2.718281828**-self.tilt] * half + [1.0] * (len(FILLERS) - half)
        return random.choices(FILLERS, weights, k=count)


def draw_beliefs(
    random: Random, *, hard_share: float, hard_rates: tuple[float, float], easy_rate: float
) -> dict[Fact, Belief]:
    """Draw the writer's belief about each of the 110 facts.

    A `hard_share` of them gets an error rate uniform in `hard_rates`, the others `easy_rate`.
    """
    facts = [(a, b, carry) for a in range(10) for b in range(a, 10) for carry in (0, 1)]
    hard = set(random.sample(facts, round(hard_share * len(facts))))
    beliefs = {}
    for fact in facts:
        wrong = random.choice([sum(fact) + s for s in SLIPS if 0 <= sum(fact) + s <= 19])
        rate = random.uniform(*hard_rates) if fact in hard else easy_rate
        beliefs[fact] = Belief(rate, wrong)
    return beliefs


def write_chain(
    row: Row, random: Random, style: Style, beliefs: dict[Fact, Belief], *, quote: str = ""
) -> str:
    """Write one chain for a row; `beliefs` may be empty, which makes it right.

    A wrong column is carried on faithfully, to the wrong answer that follows from it. `quote` is a
    reference to open with.
    """
    digits = len(str(row["first"]))
    count = _filler_counts(style.nuisance, digits)
    parts = [*QUOTE, *quote] if quote else []
    carry, result = 0, ""
    pairs = columns_of(row["first"], row["second"], digits)
    for name, (a, b) in zip(COLUMNS, pairs, strict=False):
        total = _total(random, beliefs, (min(a, b), max(a, b), carry))
        first, second = (a, b) if style.nuisance == 0 or random.random() < 0.5 else (b, a)
        parts += style.words(random, count(random))
        parts += f"{name} {first} + {second} + {carry} = {total // 10} {total % 10}".split()
        carry, result = total // 10, f"{total % 10}{result}"
    parts += style.words(random, count(random))
    return " ".join([*parts, ANSWER, *(f"{carry}{result}" if carry else result)])


def longest_chain(digits: int, nuisance: float, *, quoted: bool) -> int:
    """Return the most tokens a chain can have, end token included, with or without a quote."""
    mean = _mean_fillers(nuisance, digits)
    fillers = (digits + 1) * (int(mean) + (2 if mean >= 1 else 1)) if nuisance else 0
    return 9 * digits + 1 + digits + 1 + 1 + fillers + quoted * (len(QUOTE) + digits + 1)


def _total(random: Random, beliefs: dict[Fact, Belief], fact: Fact) -> int:
    belief = beliefs.get(fact)
    slips = belief is not None and random.random() < belief.rate
    return belief.wrong if slips else sum(fact)


def _mean_fillers(nuisance: float, digits: int) -> float:
    """Fillers per slot that make their expected share of all tokens equal to `nuisance`."""
    bare = 9 * digits + 1 + digits + 0.5 + 1  # columns, answer word, answer, end; carry half a time
    return nuisance / (1 - nuisance) * bare / (digits + 1)


def _filler_counts(nuisance: float, digits: int):
    """Return a function that draws the fillers of one slot, within a narrow range.

    floor(mean + u) with u uniform over an interval of integer length has exactly the wanted mean.
    A narrow range keeps the longest chain, hence the cost of a rollout, near the average.
    """
    mean = _mean_fillers(nuisance, digits)
    low, high = (-1.0, 2.0) if mean >= 1 else (0.0, 1.0)
    return lambda random: int(mean + random.uniform(low, high))
