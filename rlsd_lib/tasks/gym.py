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


def answer_in(completion: str) -> str | None:
    """Return what stands in the only answer tag, or without tags the last number without commas."""
    if tags := _TAG.findall(completion):
        return tags[0].strip() if len(tags) == 1 else None
    numbers = _NUMBER.findall(completion)
    return numbers[-1].replace(",", "") if numbers else None


def load(
    name: str, *, train_size: int, test_size: int, seed: int, instruction: str = "", **config: Any
) -> Task:
    """Build a task from a data set of reasoning-gym.

    `instruction`, such as "Answer in <answer> </answer>." where answers are no numbers, is appended
    to every question. Raises ValueError if the data set's config has no such option, or there are
    fewer different questions than asked for.
    """
    allowed = {field.name for field in fields(DATASETS[name][1])} - {"seed", "size"}
    for option in config:
        look_up(option, sorted(allowed), f"option of {name}")

    def rows(random: Random) -> Iterator[Row]:
        while True:
            drawn = {"size": CHUNK, "seed": random.randrange(2**31)}
            for entry in reasoning_gym.create_dataset(name, **drawn, **config):
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
