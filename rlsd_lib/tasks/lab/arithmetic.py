"""Worked column addition, the language of the lab.

A question is `473 + 285`. A completion works through the columns from the right, and every word,
digit and sign is one token:

    well ones 3 + 5 + 0 = 0 8 now look tens 8 + 7 + 0 = 1 5 so hundreds 4 + 2 + 1 = 0 7 answer 7 5 8

A column gives its name, its two digits (in either order), the carry that comes in, and the sum as
carry and digit. The words before a column are *nuisance*: none bears on the answer.
"""

import re
from collections.abc import Iterator
from random import Random

from rlsd_lib.names import look_up
from rlsd_lib.tasks.task import Row, Task, draw_sides

# As many columns as a number may have digits; the vocabulary holds at least the first four.
COLUMNS = ("ones", "tens", "hundreds", "thousands", "myriads", "lakhs", "millions", "crores")
# The corpus leans towards the second half where a recipe asks for a difference in style.
_WORDS = (
    "well so now okay then next right good here look see take "
    "let us add this column of digits up just also again slowly"
)
FILLERS = tuple(_WORDS.split())
ANSWER = "answer"
QUOTE = ("reference", "says")
VOCABULARY = (*"0123456789", *"+=;", *COLUMNS[:4], ANSWER, *QUOTE, *FILLERS)
TOKEN = r"\d|[^\W\d_]+|[^\w\s]|_"  # every digit, word and sign
PRIVILEGED_TEMPLATE = "{prompt} ; reference {privileged_context}"
ANYWHERE = frozenset((*FILLERS, *QUOTE))  # neither right nor wrong
_FINAL = re.compile(r"\banswer((?:\s*[0-9])+)\s*$")


def vocabulary_of(digits: int) -> tuple[str, ...]:
    """Return every token of additions of so many digits, the special ones aside."""
    return (*VOCABULARY, *COLUMNS[4:digits])


def tokens_of(text: str) -> list[str]:
    """Split text as the lab's tokenizer does: one token per word, digit and sign."""
    return re.findall(TOKEN, text)


def columns_of(row: Row) -> list[tuple[str, int, int]]:
    """Return name and digits of each column of a row's addition, the ones first."""
    digits = zip(reversed(str(row["first"])), reversed(str(row["second"])), strict=True)
    return [(name, int(a), int(b)) for name, (a, b) in zip(COLUMNS, digits, strict=False)]


def draw_problem(random: Random, digits: int) -> Row:
    """Draw two numbers of `digits` digits and return the row of their addition."""
    first, second = (random.randint(10 ** (digits - 1), 10**digits - 1) for _ in range(2))
    return make_row(first, second)


def make_row(first: int, second: int) -> Row:
    """Return the data-set row of `first + second`, two numbers of the same length."""
    answer = str(first + second)
    return {
        "prompt": [{"role": "user", "content": f"{first} + {second}"}],
        "privileged_context": answer,
        "answer": answer,
        "first": first,
        "second": second,
    }


def question_of(row: Row) -> str:
    """Return the text that decides the side of a row."""
    return row["prompt"][0]["content"]


def verify(completion: str, row: Row) -> bool:
    """Say whether a completion ends in the one answer it gives, in ASCII digits, and it is right."""
    found = _FINAL.search(completion)
    if found is None or len(re.findall(rf"\b{ANSWER}\b", completion)) != 1:
        return False
    return re.sub(r"\s", "", found[1]) == row["answer"]


def nuisance_mask(completion: str) -> list[bool]:
    """Mark the tokens of a completion that are filler words."""
    return [token in FILLERS for token in tokens_of(completion)]


class RightChain:
    """Reads a completion of a row token by token, and knows how a right one may go on.

    Filler words and a quoted reference may stand anywhere before the answer, and a column's operands
    change places. `shortest` holds the tokens of the shortest right completion, without an end
    token, and `position` is how many of those the completion has come past.
    """

    def __init__(self, row: Row) -> None:
        self.shortest = bare_chain(row).split()
        self._expected = [{token} for token in self.shortest]
        for place in range(1, 9 * len(str(row["first"])), 9):
            operands = self._expected[place] | self._expected[place + 2]
            self._expected[place] = self._expected[place + 2] = operands
        self.position, self._quoting = 0, False
        self._answer = len(self._expected) - len(row["answer"])  # where its digits begin

    @property
    def is_complete(self) -> bool:
        """Whether the answer's last digit was read."""
        return self.position == len(self._expected)

    def allowed(self) -> frozenset[str]:
        """Return the tokens after which a right chain can still follow; none where it is complete."""
        if self.is_complete:
            return frozenset()
        if self.position >= self._answer:
            return frozenset(self._expected[self.position])
        quoted = "0123456789" if self._quoting else ""
        return ANYWHERE.union(quoted, self._expected[self.position])

    def read(self, token: str) -> bool:
        """Take the next token. False where it is the first wrong one."""
        self._quoting = token in QUOTE or (self._quoting and token.isdigit())
        if self.position < self._answer and (token in FILLERS or self._quoting):
            return True
        if self.is_complete or token not in self._expected[self.position]:
            return False
        if len(self._expected[self.position]) == 2:  # the other operand follows two tokens later
            self._expected[self.position + 2] = self._expected[self.position] - {token}
        self.position += 1
        return True


def first_error(completion: str, row: Row) -> int | None:
    """Return the index of the first wrong token of a chain, or None when every token is right.

    A chain that stops too early is wrong at the index one past its last token.
    """
    chain, tokens = RightChain(row), tokens_of(completion)
    for index, token in enumerate(tokens):
        if not chain.read(token):
            return index
    return None if chain.is_complete else len(tokens)


def decisions(completion: str) -> list[bool]:
    """Mark the tokens of a completion that state what a column adds up to: its two digits."""
    tokens = tokens_of(completion)
    return [any(before == "=" for before in tokens[max(0, i - 2) : i]) for i in range(len(tokens))]


def underived(completion: str, row: Row) -> str:
    """Return the text before the last column's sum, where no answer can be known yet."""
    return "=".join(completion.split("=")[: len(str(row["first"]))])


def bare_chain(row: Row) -> str:
    """Return the right chain of a row without filler words, the larger operand first."""
    parts, carry = [], 0
    for name, one, other in columns_of(row):
        total = one + other + carry
        operands = f"{max(one, other)} + {min(one, other)} + {carry}"
        parts.append(f"{name} {operands} = {total // 10} {total % 10}")
        carry = total // 10
    return " ".join([*parts, ANSWER, *row["answer"]])


def load(*, digits: int = 3, reference: str = "answer", **sizes: int) -> Task:
    """Build the task with the `sizes` and seed of `draw_sides`.

    The reference is the `answer`, or a `trace`: a right chain without fillers. Raises ValueError if
    there is no name for each column of so many digits, or no such reference.
    """
    if not 1 <= digits <= len(COLUMNS):
        raise ValueError(f"digits is {digits}; choose 1 to {len(COLUMNS)}")
    traced = look_up(reference, ("answer", "trace"), "reference") == "trace"

    def problems(random: Random) -> Iterator[Row]:
        while True:
            row = draw_problem(random, digits)
            yield {**row, "privileged_context": bare_chain(row)} if traced else row

    return Task(
        name="arithmetic",
        verify=verify,
        reference_pattern=rf"\b{QUOTE[0]}\b",
        privileged_template=PRIVILEGED_TEMPLATE,
        first_error=first_error,
        decisions=decisions,
        right_chain=RightChain,
        nuisance_mask=nuisance_mask,
        underived=underived,
        **draw_sides(problems, question_of, **sizes),
    )
