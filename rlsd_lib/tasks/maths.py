"""Public verifiable mathematics without images, checked and graded like the paper's data.

By default the 40 315 problems of DeepScaleR-Preview (MIT licence: AIME and AMC before 2024,
Omni-MATH, STILL), whose `solution` takes the place of the trace. Any data set on the hub, or
folder of .parquet or .jsonl files, with a problem and a final answer will do: name its columns.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rlsd_lib.names import look_up
from rlsd_lib.prompts import prompt_text
from rlsd_lib.tasks import mmfinereason
from rlsd_lib.tasks.task import Row, Task

HUB = "agentica-org/DeepScaleR-Preview-Dataset"
COLUMNS = {"problem": "problem", "answer": "answer", "solution": "solution"}


def load(*, source: str = HUB, columns: Mapping[str, str] = COLUMNS, **options: Any) -> Task:
    """Build the task with the `options` of `mmfinereason.load`.

    `columns` says what `source` calls problem, answer and solution; without a solution there is no
    trace.

    Raises:
        ValueError: a column is missing, or `columns` names another field.
    """
    for field in columns:
        look_up(field, COLUMNS, "field of columns")
    trace = {"solution": mmfinereason.TRACE}
    named = {trace.get(field, field): name for field, name in columns.items()}
    task = mmfinereason.load(source=source, text_columns=named, **options)
    sides = {
        side: getattr(task, side).remove_columns("images").map(_as_text, remove_columns="prompt")
        for side in ("train", "test")
    }
    return replace(task, name="maths", **sides)


def _as_text(row: Row) -> Row:
    """The templates of text models want a string."""
    return {"prompt": [{"role": "user", "content": prompt_text(row["prompt"])}]}
