"""Data sets of reasoning-gym as tasks, judged by their own verifiers.

Any data set of the installed reasoning-gym is a task under its own name, and the fields of its
config are options: `load_task("chain_sum", ..., min_terms=2, max_terms=2)`.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from operator import itemgetter
from random import Random
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from rlsd_lib.names import look_up
from rlsd_lib.tasks.task import Row, Task, draw_sides

CHUNK = 256  # questions drawn from reasoning-gym at a time
_NUMBER = re.compile(r"(?<![\w.,])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\w])", re.ASCII)
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def last_number(completion: str) -> str | None:
    """Return the last number as reasoning-gym writes one, or None; thousands commas are removed."""
    found = _NUMBER.findall(completion)
    return found[-1].replace(",", "") if found else None


def answer_tag(completion: str) -> str | None:
    """Return the inside of the only answer tag, or None when there is none or a second one."""
    found = _TAG.findall(completion)
    return found[0].strip() if len(found) == 1 else None


def whole(completion: str) -> str:
    """Return the completion without surrounding white space and one final full stop."""
    return completion.strip().removesuffix(".")


EXTRACT = {"last_number": last_number, "answer_tag": answer_tag, "whole": whole}


def load(
    name: str,
    *,
    train_size: int,
    test_size: int,
    seed: int,
    extract: str = "last_number",
    instruction: str = "",
    **config: Any,
) -> Task:
    """Build a task from a data set of reasoning-gym.

    `extract` names the function of this file that reads the answer in a completion; `instruction`,
    which may be empty, is appended to every question.

    Raises:
        ValueError: there is no such `extract`, the data set's config has no such option, or there
            are fewer different questions than asked for.
    """
    answer_in = EXTRACT[look_up(extract, EXTRACT, "extract")]
    allowed = {field.name for field in fields(DATASETS[name][1])} - {"seed", "size"}
    for option in config:
        look_up(option, sorted(allowed), f"option of {name}")

    def rows(random: Random) -> Iterator[Row]:
        while True:
            entries = reasoning_gym.create_dataset(
                name, size=CHUNK, seed=random.randrange(2**31), **config
            )
            for entry in entries:
                question, answer = entry["question"].strip(), str(entry["answer"])
                yield {
                    "prompt": [{"role": "user", "content": f"{question} {instruction}".strip()}],
                    "privileged_context": answer,
                    "answer": answer,
                    "question": question,
                    "entry": json.dumps(entry, default=str),
                }

    sizes = {"train_size": train_size, "test_size": test_size, "seed": seed}
    sides = draw_sides(rows, itemgetter("question"), **sizes)
    judge = reasoning_gym.create_dataset(name, size=1, seed=seed, **config)

    def verify(completion: str, row: Row) -> bool:
        """Say whether the data set's own verifier gives the extracted answer its full score."""
        answer = answer_in(completion)
        return bool(answer) and judge.score_answer(answer, json.loads(row["entry"])) >= 1.0

    return Task(name=name, verify=verify, **sides)
