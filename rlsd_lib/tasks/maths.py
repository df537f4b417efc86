"""Public verifiable mathematics without images, checked and graded like the paper's data.

By default the 40 315 problems of DeepScaleR-Preview (MIT licence: AIME and AMC before 2024,
Omni-MATH, STILL), whose `solution` takes the place of the trace. Any data set on the hub, or
folder of .parquet or .jsonl files, with the columns `problem` and `answer` will do.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from rlsd_lib.prompts import prompt_text
from rlsd_lib.tasks import mmfinereason
from rlsd_lib.tasks.task import Row, Task

HUB = "agentica-org/DeepScaleR-Preview-Dataset"
FIELDS = {"problem_type": "math", "data_type": "text", "images": [], "videos": []}  # of every row


def load(*, source: str | Path = HUB, revision: str | None = None, **options: Any) -> Task:
    """Build the task with `mmfinereason.load`'s `options`; ValueError for a missing column."""
    rows = mmfinereason.read(source, revision).map(
        lambda row: {**FIELDS, mmfinereason.TRACE: row.get("solution", "")}
    )
    task = mmfinereason.load(source=rows, **options)
    sides = {
        side: getattr(task, side).remove_columns("images").map(_as_text, remove_columns="prompt")
        for side in ("train", "test")
    }
    return replace(task, name="maths", **sides)


def _as_text(row: Row) -> Row:
    """The templates of text models want a string."""
    return {"prompt": [{"role": "user", "content": prompt_text(row["prompt"])}]}
