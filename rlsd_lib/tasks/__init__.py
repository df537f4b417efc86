"""Tasks by name: the lab's arithmetic, the paper's data, public maths, and all of reasoning-gym."""

import difflib
import importlib
from typing import Any

from rlsd_lib.prompts import Completion, text_of
from rlsd_lib.tasks.lab import arithmetic
from rlsd_lib.tasks.task import Row, Task

# Modules of this package that read data sets, by the task's name.
DATA = {"mmfinereason": "mmfinereason", "maths": "maths", "colours": "lab.colours"}

__all__ = ["Completion", "Row", "Task", "load_task", "task_names", "text_of"]


def task_names() -> list[str]:
    """Return every name that `load_task` accepts."""
    from rlsd_lib.tasks import gym  # here, because importing reasoning-gym takes seconds

    return ["arithmetic", *DATA, *gym.names()]


def load_task(name: str, *, train_size: int, test_size: int, seed: int, **options: Any) -> Task:
    """Build a task: the same arguments give the same rows, and no test question is in train.

    `options` go to the task: `digits` for `arithmetic`, the fields of its config for a
    reasoning-gym data set (see `rlsd_lib.tasks.gym`), `source` and more for the data sets. Raises
    ValueError for a name or an option that does not exist, naming the nearest one that does.
    """
    if name == "arithmetic":
        return arithmetic.load(train_size=train_size, test_size=test_size, seed=seed, **options)
    if name in DATA:
        module = importlib.import_module(
            f"rlsd_lib.tasks.{DATA[name]}"
        )  # only then datasets and Pillow
        return module.load(train_size=train_size, test_size=test_size, seed=seed, **options)
    if name not in (known := task_names()):
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown task {name!r}; the nearest valid name is {nearest!r}")
    from rlsd_lib.tasks import gym

    return gym.load(name, train_size=train_size, test_size=test_size, seed=seed, **options)
