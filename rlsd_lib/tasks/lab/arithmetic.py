"""Worked column addition, the language of the lab.

A question is `473 + 285`. A completion works through the columns from the right, and every word,
digit and sign is one token:

    well ones 3 + 5 + 0 = 0 8 now look tens 8 + 7 + 0 = 1 5 so hundreds 4 + 2 + 1 = 0 7 answer 7 5 8

A column gives its name, its two digits (in either order), the carry that comes in, and the sum as
carry and digit. The words before a column are *nuisance*: any word may stand there and none bears
on the answer. Everything else can go wrong, and `first_error` finds where it first did.
"""

import re
from collections.abc import Iterator
from random import Random

from datasets import Dataset

from rlsd_lib.tasks.task import Row, Task, draw_rows

COLUMNS = ("ones", "tens", "hundreds", "thousands")  # as many digits as a number may have
# The teacher's style leans towards the second half when a recipe asks for a style difference.
FILLERS = (
    *("well", "so", "now", "okay", "then", "next", "right", "good", "here", "look", "see", "take"),
    *(
        "let",
        "us",
        "add",
        "this",
        "column",
        "of",
        "digits",
        "up",
        "just",
        "also",
        "again",
        "slowly",
    ),
)
SIGNS = ("+", "=", ";")
ANSWER = "answer"
QUOTE = ("reference", "says")
REFERENCES = ("answer", "trace")
VOCABULARY = (*"0123456789", *SIGNS, *COLUMNS, ANSWER, *QUOTE, *FILLERS)
REFERENCE_PATTERN = r"\breference\b"
PRIVILEGED_TEMPLATE = "{prompt} ; reference {privileged_context}"

_WORD = re.compile(r"\d|[^\W\d_]+|[^\w\s]|_")
_FINAL = re.compile(r"\banswer((?:\s*[0-9])+)\s*$")


def tokens_of(text: str) -> list[str]:
    """Split text as the lab's tokenizer does: one token per word, digit and sign."""
    return _WORD.findall(text)


def columns_of(first: int, second: int, digits: int) -> list[tuple[int, int]]:
    """Return the digit pairs of the two numbers, lowest column first."""
    return [(first // 10**place % 10, second // 10**place % 10) for place in range(digits)]


def draw_problem(random: Random, digits: int) -> Row:
    """Draw two numbers of `digits` digits and return the row of their addition."""
    low, high = 10 ** (digits - 1), 10**digits - 1
    return make_row(random.randint(low, high), random.randint(low, high))


def make_row(first: int, second: int) -> Row:
    """Return the data-set row of `first + second`; the numbers need as many digits as each other.

    Raises ValueError for a negative number or numbers of different length.
    """
    if min(first, second) < 0 or len(str(first)) != len(str(second)):
        raise ValueError(f"got {first} and {second}; give two numbers of the same length, none < 0")
    answer = str(first + second)
    return {
        "prompt": [{"role": "user", "content": f"{first} + {second}"}],
        "privileged_context": answer,
        "answer": answer,
        "first": first,
        "second": second,
    }


def verify(completion: str, row: Row) -> bool:
    """Say whether a completion ends in the one answer it gives, and that answer is right.

    Two answers, text after the answer, or digits of another script count as wrong: a policy must
    commit itself, and a hedge must not be paid.
    """
    found = _FINAL.search(completion)
    if found is None or len(re.findall(rf"\b{ANSWER}\b", completion)) != 1:
        return False
    return re.sub(r"\s", "", found.group(1)) == row["answer"]


def nuisance_mask(completion: str) -> list[bool]:
    """Mark the tokens of a completion that are filler words."""
    return [token in FILLERS for token in tokens_of(completion)]


def first_error(completion: str, row: Row) -> int | None:
    """Return the index of the first wrong token of a chain, or None when every token is right.

    The index counts the lab's tokens. Filler words and a quoted reference are neither right nor
    wrong. A chain that stops too early is wrong at the index one past its last token.
    """
    tokens = tokens_of(completion)
    expected = _expected(row)
    position, quoting = 0, False
    for index, token in enumerate(tokens):
        quoting = token in QUOTE or (quoting and token.isdigit())
        if token in FILLERS or quoting:
            continue
        if position == len(expected) or token not in expected[position]:
            return index
        if len(expected[position]) == 2:  # the other operand must follow two tokens later
            (rest,) = expected[position] - {token}
            expected[position + 2] = {rest}
        position += 1
    return None if position == len(expected) else len(tokens)


def underived(completion: str, row: Row) -> str:
    """Return the text before the sum of the last column, where no answer can be known yet.

    A completion that adds fewer columns than the numbers have derives nothing: all of it.
    """
    return "=".join(completion.split("=")[: len(str(row["first"]))])


def _expected(row: Row) -> list[set[str]]:
    """List, for each place of the bare chain, the tokens that are right there."""
    places: list[set[str]] = []
    carry = 0
    pairs = columns_of(row["first"], row["second"], len(str(row["first"])))
    for name, (one, other) in zip(COLUMNS, pairs, strict=False):
        total = one + other + carry
        operands = {str(one), str(other)}
        places += [{name}, operands, {"+"}, operands, {"+"}, {str(carry)}, {"="}]
        carry = total // 10
        places += [{str(carry)}, {str(total % 10)}]
    return [*places, {ANSWER}, *({digit} for digit in row["answer"])]


def bare_chain(row: Row) -> str:
    """Return the right chain of a row without filler words, the larger operand first."""
    tokens: list[str] = []
    for place in _expected(row):
        # Operands are interchangeable: the second one is what the first left over.
        taken = tokens[-2] if tokens[-1:] == ["+"] and len(place) == 2 else None
        tokens.append(max(place - {taken}))
    return " ".join(tokens)


def load(
    *, train_size: int, test_size: int, seed: int, digits: int = 3, reference: str = "answer"
) -> Task:
    """Build the task; the reference is the `answer`, or a `trace`: a right chain without fillers.

    Raises ValueError for a number of digits without a name for each column, or another reference.
    """
    if not 1 <= digits <= len(COLUMNS):
        raise ValueError(f"digits is {digits}; choose 1 to {len(COLUMNS)}")
    if reference not in REFERENCES:
        raise ValueError(f"reference is {reference!r}; choose one of {', '.join(REFERENCES)}")
    sides = {}
    for side, size in (("train", train_size), ("test", test_size)):
        stream = _problems(Random(f"{side}-{seed}"), digits)
        rows = draw_rows(stream, size, held_out=side == "test", question=question_of)
        if reference == "trace":
            rows = [{**row, "privileged_context": bare_chain(row)} for row in rows]
        sides[side] = Dataset.from_list(rows)
    return Task(
        name="arithmetic",
        verify=verify,
        reference_pattern=REFERENCE_PATTERN,
        privileged_template=PRIVILEGED_TEMPLATE,
        first_error=first_error,
        nuisance_mask=nuisance_mask,
        underived=underived,
        **sides,
    )


def question_of(row: Row) -> str:
    """Return the text whose hash decides the side of a row."""
    return row["prompt"][0]["content"]


def _problems(random: Random, digits: int) -> Iterator[Row]:
    while True:
        yield draw_problem(random, digits)
