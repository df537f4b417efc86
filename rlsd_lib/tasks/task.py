"""What a task is: rows, privileged text, verifier and reward in one object.

Questions are held out by the hash of their text: train and test are disjoint for every seed and
size, and two runs with different seeds never train on each other's test questions.
"""

import hashlib
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from random import Random
from typing import Any

from datasets import Dataset

from rlsd_lib.prompts import Completion, text_of

TEST_BUCKETS = 5  # one question in five is held out
DRAWS_PER_ROW = 200  # duplicates and the other side's questions are skipped, up to this many draws
# How models speak of a reference that they were shown, where a task has no words of its own.
REFERENCE_PATTERN = (
    r"\b(reference|provided|given|above|model|sample) (solution|answer)\b"
    r"|\b(solution|answer) (above|provided|given)\b|\breference\b"
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A data set with the functions that judge it; those after `report` are None if none can know.

    `train` and `test` have the columns `prompt` (chat messages), `privileged_context` (what only
    the teacher may read), `answer`, and whatever the verifier needs.
    """

    name: str
    train: Dataset
    test: Dataset
    verify: Callable[[str, Row], bool]
    reference_pattern: str = REFERENCE_PATTERN
    privileged_template: str | None = None  # of the teacher's user turn; None: the trainer's own
    score: Callable[[str, Row], float] | None = None  # the reward where it is not the verdict
    judges: int = 1  # verdicts at a time, where they wait for other processes
    report: dict[str, int] | None = None  # rows read, dropped and kept; None where generated
    first_error: Callable[[str, Row], int | None] | None = None  # index of the first wrong token
    decisions: Callable[[str], list[bool]] | None = None  # tokens that the answer follows from
    right_chain: Callable[[Row], Any] | None = None  # see `lab.arithmetic.RightChain`
    nuisance_mask: Callable[[str], list[bool]] | None = None  # tokens that mean nothing
    underived: Callable[[str, Row], str] | None = None  # the text before the answer is derivable

    def reward(self, completions: list[Completion], **columns: Any) -> list[float]:
        """Return the task's own score of each completion, or 1.0 if it is verified and else 0.0."""
        size = len(completions)
        kept = {k: v for k, v in columns.items() if isinstance(v, list) and len(v) == size}
        judge = self.score or self.verify
        rows = [{name: values[i] for name, values in kept.items()} for i in range(size)]
        texts = list(map(text_of, completions))
        if self.judges == 1:  # in this thread: graders of others may need the main one
            return list(map(float, map(judge, texts, rows)))
        with ThreadPoolExecutor(self.judges) as pool:
            return list(map(float, pool.map(judge, texts, rows)))

    def leak(self, completions: list[Completion], **columns: Any) -> list[float]:
        """Return 1.0 for each completion that mentions a reference: a reward to log, weight 0."""
        return [float(self.speaks_of_reference(completion)) for completion in completions]

    def speaks_of_reference(self, completion: Completion) -> bool:
        """Say whether a completion mentions a reference, in the task's own vocabulary."""
        return re.search(self.reference_pattern, text_of(completion), re.IGNORECASE) is not None


def is_held_out(question: str) -> bool:
    """Say whether the question's text puts it on the test side (one in `TEST_BUCKETS`)."""
    digest = hashlib.sha256(question.encode()).digest()
    return int.from_bytes(digest[:8], "big") % TEST_BUCKETS == 0


def draw_sides(
    stream: Callable[[Random], Iterable[Row]],
    question: Callable[[Row], str],
    *,
    train_size: int,
    test_size: int,
    seed: int,
) -> dict[str, Dataset]:
    """Draw different rows for `train` and `test` from streams of random rows.

    `question` is the text of a row that decides its side. Raises ValueError if a size is below 1,
    or the stream repeats itself before there are enough rows.
    """
    sides = {}
    for side, size in (("train", train_size), ("test", test_size)):
        if size < 1:
            raise ValueError(f"{side}_size is {size}; ask for at least one row of train and test")
        rows: dict[str, Row] = {}
        for row in islice(stream(Random(f"{side}-{seed}")), DRAWS_PER_ROW * size):
            if is_held_out(question(row)) == (side == "test"):
                rows.setdefault(question(row), row)
            if len(rows) == size:
                break
        else:
            raise ValueError(
                f"only {len(rows)} different {side} questions found where {size} were asked for: "
                f"lower {side}_size"
            )
        sides[side] = Dataset.from_list(list(rows.values()))
    return sides
