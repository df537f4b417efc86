"""Tasks by name: the lab's arithmetic, the paper's data, public maths, and all of reasoning-gym."""

from typing import Any

from rlsd_lib.names import look_up
from rlsd_lib.tasks import maths, mmfinereason
from rlsd_lib.tasks.lab import arithmetic
from rlsd_lib.tasks.task import Row, Task

__all__ = ["DATA", "Row", "Task", "load_task", "task_names"]


def _colours(**how: Any) -> Task:
    from rlsd_lib.tasks.lab import vision  # here: Qwen3-VL's classes take seconds to import

    return vision.load(**how)


LOADERS = {
    "arithmetic": arithmetic.load,
    "colours": _colours,
    "maths": maths.load,
    "mmfinereason": mmfinereason.load,
}
DATA = ("maths", "mmfinereason")  # read from a folder or the hub; the others are made in code


def task_names() -> list[str]:
    """Return every name that `load_task` accepts."""
    from rlsd_lib.tasks import gym  # here: reasoning-gym takes seconds to import

    return [*LOADERS, *gym.DATASETS]


def load_task(name: str, *, train_size: int, test_size: int, seed: int, **options: Any) -> Task:
    """Build a task: the same arguments give the same rows, and no test question is in train.

    `options` go to the task: `digits` for `arithmetic`, the fields of its config for a
    reasoning-gym data set (see `rlsd_lib.tasks.gym`), `source` and more for the data sets. Raises
    ValueError if there is no such task or option, and names the nearest.
    """
    how = {"train_size": train_size, "test_size": test_size, "seed": seed, **options}
    if name in LOADERS:
        return LOADERS[name](**how)
    from rlsd_lib.tasks import gym

    return gym.load(look_up(name, task_names(), "task"), **how)
