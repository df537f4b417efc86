"""What a task is: rows, privileged text, verifier and reward in one object.

Held-out questions are held out by content. A question belongs to the test side when the hash of
its text says so, so train and test are disjoint for every seed and every size, and two runs with
different seeds never train on each other's test questions.
"""

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
    """A data set with the functions that judge it.

    `train` and `test` hold the columns `prompt` (chat messages), `privileged_context` (what only
    the teacher may read), `answer`, and whatever the verifier needs. `privileged_template` is the
    text of the teacher's user turn, with the placeholders `{prompt}` and `{privileged_context}`;
    None stands for the trainer's default. `score` is the reward where it is more than the verdict.
    `report` counts the rows that were read and dropped, None where rows are generated.
    `first_error` gives the index of the first wrong token of a completion (None when there is none)
    and `nuisance_mask` marks the tokens that do not bear on the answer; `underived` cuts a
    completion off where its answer can first have been derived. All three are None where a task
    cannot know.
    """

    name: str
    train: Dataset
    test: Dataset
    verify: Callable[[str, Row], bool]
    reference_pattern: str = REFERENCE_PATTERN
    privileged_template: str | None = None
    score: Callable[[str, Row], float] | None = None
    report: Any = None
    first_error: Callable[[str, Row], int | None] | None = None
    nuisance_mask: Callable[[str], list[bool]] | None = None
    underived: Callable[[str, Row], str] | None = None

    def reward(self, completions: list[Completion], **columns: Any) -> list[float]:
        """Return 1.0 for each verified completion and 0.0 for the others, or the task's own score.

        `columns` are the data set's columns, each as long as `completions`; anything else that a
        trainer passes along is ignored.
        """
        size = len(completions)
        kept = {k: v for k, v in columns.items() if isinstance(v, list) and len(v) == size}
        judge = self.score or self.verify
        return [
            float(judge(text_of(completion), {name: values[i] for name, values in kept.items()}))
            for i, completion in enumerate(completions)
        ]

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

    `question` is the text of a row that decides its side.

    Raises:
        ValueError: a size is below 1, or the stream repeats itself before there are enough rows.
    """
    return {
        side: Dataset.from_list(_draw(stream(Random(f"{side}-{seed}")), question, side, size))
        for side, size in (("train", train_size), ("test", test_size))
    }


def _draw(stream: Iterable[Row], question: Callable[[Row], str], side: str, size: int) -> list[Row]:
    if size < 1:
        raise ValueError(f"{side}_size is {size}; ask for at least one row of train and of test")
    rows: dict[str, Row] = {}
    for draws, row in enumerate(stream, start=1):
        key = question(row)
        if is_held_out(key) == (side == "test"):
            rows.setdefault(key, row)
        if len(rows) == size:
            return list(rows.values())
        if draws >= DRAWS_PER_ROW * size:
            break
    raise ValueError(
        f"only {len(rows)} different {side} questions found where {size} were asked for; "
        f"lower {side}_size, or choose options with more questions"
    )
