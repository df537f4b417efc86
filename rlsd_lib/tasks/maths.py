"""Public verifiable mathematics without images, checked and graded like the paper's data.

By default the 40 315 problems of DeepScaleR-Preview (MIT licence: AIME and AMC before 2024,
Omni-MATH, STILL), whose `solution` takes the place of the trace. Any data set on the hub, or
folder of .parquet or .jsonl files, with a problem and a final answer will do: name its columns.
"""

from collections.abc import Mapping
from typing import Any

from rlsd_lib.prompts import prompt_text
from rlsd_lib.tasks.mmfinereason import TRACE, as_task, check_reward, prepare
from rlsd_lib.tasks.task import Row, Task

HUB = "agentica-org/DeepScaleR-Preview-Dataset"
COLUMNS = {"problem": "problem", "answer": "answer", "solution": "solution"}


def load(
    *, train_size: int, test_size: int, seed: int, source: str = HUB,
    columns: Mapping[str, str] = COLUMNS, report_dir: str = "", reward: str = "binary",
    **options: Any,
) -> Task:  # fmt: skip
    """Build the task as `mmfinereason.load` does; `columns` says what problem, answer and solution
    are called in `source` (without one there is no trace). Raises ValueError for a missing column.
    """
    check_reward(reward)
    if unknown := sorted(columns.keys() - COLUMNS.keys()):
        raise ValueError(f"columns names {unknown}: expected {sorted(COLUMNS)}")
    named = {TRACE if field == "solution" else field: name for field, name in columns.items()}
    rows, report = prepare(source, text_columns=named, **options)
    how = {"train_size": train_size, "test_size": test_size, "seed": seed, "reward": reward}
    texts = rows.remove_columns("images").map(_as_text, remove_columns="prompt")
    return as_task("maths", texts, report, report_dir=report_dir, **how)


def _as_text(row: Row) -> Row:
    """The templates of text models want a string."""
    return {"prompt": [{"role": "user", "content": prompt_text(row["prompt"])}]}
