"""A few coloured squares in the schema of the paper's data: every part of its path, offline.

The rows go through `rlsd_lib.tasks.mmfinereason` like any other folder. Each of the four problem
types occurs, with no image, one or two. For trying the path, not for measuring anything.
"""

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from rlsd_lib.runs.paths import outputs_root
from rlsd_lib.tasks import mmfinereason
from rlsd_lib.tasks.lab.model import new_folder
from rlsd_lib.tasks.task import Task

COLOURS = {"red": (200, 40, 40), "green": (40, 180, 40), "blue": (40, 40, 200)}
SIDE = 8  # pixels of a square
AREAS = {"min_area": 64, "max_area": 4096}  # so small an image is left as it is
ROWS = 160


def load(*, train_size: int, test_size: int, seed: int, rows: int = ROWS, **options: Any) -> Task:
    """Build the task from a folder that is written on first use; `options` as in `mmfinereason`."""
    sizes = {"train_size": train_size, "test_size": test_size}
    return mmfinereason.load(**sizes, seed=seed, source=str(folder(rows)), **AREAS, **options)


def folder(rows: int = ROWS) -> Path:
    """Return the folder of rows.jsonl and images/ under the outputs' cache; written on first use."""
    path = outputs_root() / "cache" / f"colours-{rows}"
    with new_folder(path) as scratch:
        if scratch is not None:
            write(scratch, rows)
    return path


def write(path: Path, rows: int = ROWS) -> None:
    """Write rows.jsonl and images/ into an existing folder; the same rows on every machine."""
    (path / "images").mkdir()
    lines = []
    for index in range(rows):
        random = Random(index)
        row, pictures = _row(index, random)
        row["images"] = [f"images/{index}-{n}.png" for n in range(len(pictures))]
        for name, picture in zip(row["images"], pictures, strict=True):
            picture.save(path / name)
        lines.append(json.dumps(row) + "\n")
    (path / "rows.jsonl").write_text("".join(lines))


def _row(index: int, random: Random) -> tuple[dict[str, Any], list[Image.Image]]:
    """One row in the schema of `mmfinereason.FIELDS`, and its pictures; the types take turns."""
    kind = ("multiple choice", "boolean", "numerical", "math")[index % 4]
    names = random.choices(sorted(COLOURS), k=(1, 2, 0, 1)[index % 4])
    count, other = random.randrange(1, 4), random.randrange(1, 7)
    problem, answer = {
        "multiple choice": lambda: ("Which colour?\nA. blue\nB. green\nC. red", _letter(names[0])),
        "boolean": lambda: ("The same colour?", "Yes" if len(set(names)) == 1 else "No"),
        "numerical": lambda: (f"Problem {index}: {count} + {other} = ?", str(count + other)),
        "math": lambda: ("How many squares?", str(count)),
    }[kind]()
    row = {
        "problem": "<image>" * len(names) + problem,
        "answer": answer,
        "problem_type": kind,
        "data_type": "image" if names else "text",
        "videos": [],
        mmfinereason.TRACE: f"I look closely. The answer is {answer}.",
    }
    return row, [_picture(name, count if kind == "math" else 1, random) for name in names]


def _letter(colour: str) -> str:
    return "ABC"[sorted(COLOURS).index(colour)]


def _picture(colour: str, squares: int, random: Random) -> Image.Image:
    """Squares of one colour side by side, with some noise: no two pictures are equal."""
    noise = np.random.default_rng(random.randrange(2**31)).integers(-30, 31, (SIDE, 8 * squares, 3))
    pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
    return Image.fromarray(pixels)
