"""Data sets of reasoning-gym as tasks, judged by their own verifiers.

Any data set of the installed reasoning-gym is a task under its own name, and the fields of its
config are options: `load_task("chain_sum", ..., min_terms=2, max_terms=2)`. What is handed to the
data set's `score_answer` is decided by `extract`:

| `extract` | what counts as the answer |
|---|---|
| `last_number` | the last number of the completion |
| `answer_tag` | the inside of the only `<answer>...</answer>` |
| `whole` | the completion without surrounding white space and one final full stop |
"""

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from random import Random
from typing import Any

import reasoning_gym
from datasets import Dataset
from reasoning_gym.factory import DATASETS

from rlsd_lib.tasks.task import REFERENCE_PATTERN, Row, Task, draw_rows

CHUNK = 256  # questions drawn from reasoning-gym at a time
_NUMBER = re.compile(r"(?<![\w.,])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\w])", re.ASCII)
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def names() -> list[str]:
    """Return the names of all data sets of the installed reasoning-gym."""
    return sorted(DATASETS)


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
    system: str = "",
    examples: int = 0,
    **config: Any,
) -> Task:
    """Build a task from a data set of reasoning-gym.

    `instruction` is appended to every question, `system` is the system prompt; both may be empty.
    Every prompt opens with the same `examples` solved questions as earlier turns; they are in
    neither train nor test, and they show a small model what form an answer has. Raises ValueError
    for an `extract` that does not exist, an option that the data set's config does not have, or
    fewer different questions than asked for.
    """
    if extract not in EXTRACT:
        raise ValueError(f"extract is {extract!r}; choose one of {', '.join(EXTRACT)}")
    allowed = {field.name for field in fields(DATASETS[name][1])} - {"seed", "size"}
    if unknown := set(config) - allowed:
        raise ValueError(f"{name} has no options {sorted(unknown)}; it has {sorted(allowed)}")
    sides = {}
    for side, size in (("train", train_size + examples), ("test", test_size)):
        stream = (_row(e, instruction) for e in _entries(name, Random(f"{side}-{seed}"), config))
        sides[side] = draw_rows(stream, size, held_out=side == "test", question=question_of)
    opening = [{"role": "system", "content": system}] if system else []
    opening += [turn for row in sides["train"][:examples] for turn in _solved(row, extract)]
    sides["train"] = sides["train"][examples:]
    for row in (*sides["train"], *sides["test"]):
        row["prompt"] = [*opening, *row["prompt"]]
    datasets = {side: Dataset.from_list(rows) for side, rows in sides.items()}
    judge = reasoning_gym.create_dataset(name, size=1, seed=seed, **config)

    def verify(completion: str, row: Row) -> bool:
        """Say whether the data set's own verifier gives the extracted answer its full score."""
        answer = EXTRACT[extract](completion)
        return bool(answer) and judge.score_answer(answer, json.loads(row["entry"])) >= 1.0

    return Task(name=name, verify=verify, reference_pattern=REFERENCE_PATTERN, **datasets)


def question_of(row: Row) -> str:
    """Return the text whose hash decides the side of a row: the question without instructions."""
    return row["question"]


def _row(entry: dict[str, Any], instruction: str) -> Row:
    """Turn an entry of reasoning-gym into a row; the entry itself travels along as JSON."""
    question = entry["question"].strip()
    prompt = [{"role": "user", "content": f"{question} {instruction}".strip()}]
    answer = str(entry["answer"])
    return {
        "prompt": prompt,
        "privileged_context": answer,
        "answer": answer,
        "question": question,
        "entry": json.dumps(entry, default=str),
    }


def _solved(row: Row, extract: str) -> list[dict[str, str]]:
    """Return the turns of a solved example, its answer in the form that `extract` reads."""
    answer = f"<answer>{row['answer']}</answer>" if extract == "answer_tag" else row["answer"]
    return [*row["prompt"], {"role": "assistant", "content": answer}]


def _entries(name: str, random: Random, config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield entries for ever, in chunks whose seeds come from `random`."""
    while True:
        seed = random.randrange(2**31)
        yield from reasoning_gym.create_dataset(name, size=CHUNK, seed=seed, **config)
