"""The paper's data: MMFineReason-123K, from the hub or from a local folder in the same schema.

Broken rows are never used: they are counted under every fault that they have. The split is made of
hashed contents (texts and image files): the same on every machine.
"""

import io
import logging
import math
import os
from functools import partial
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

from datasets import Dataset, Features, Image, LargeList, List, Value, load_dataset
from PIL import Image as PillowImage

from rlsd_lib.names import look_up
from rlsd_lib.prompts import has_image_token, holds_reference
from rlsd_lib.runs.paths import digest
from rlsd_lib.tasks.grading import TYPES, clean, grade, weighted
from rlsd_lib.tasks.task import Row, Task, is_held_out

HUB = "iieycx/rlsd-train-MMFineReason-123K"
TRACE = "qwen3vl_235b_thinking_response"
FIELDS = ("problem", "answer", "problem_type", "data_type", "images", "videos", TRACE)
MIN_AREA, MAX_AREA = 262_144, 1_048_576  # pixels of one image, as the released code has them
MAX_ASPECT = 200  # Qwen's image processors refuse longer shapes
FORMAT = (
    "Think first, in <thought> </thought>, then give only the final answer in <answer> </answer>."
)
INSTRUCTIONS = {
    "math": f"Solve the mathematical problem. {FORMAT}",
    "multiple choice": f"Choose the right option. {FORMAT} The final answer is its letter.",
    "numerical": f"Compute what is asked for. {FORMAT} The final answer is one number.",
    "boolean": f"Judge the statement. {FORMAT} The final answer is Yes or No.",
}
_PART = {"type": Value("string"), "text": Value("string")}
_TEXTS = ("privileged_context", "answer", "problem_type", "key")
FEATURES = Features(
    {
        "prompt": List({"role": Value("string"), "content": List(_PART)}),
        "images": List(Image()),
        **dict.fromkeys(_TEXTS, Value("string")),
    }
)


def load(
    *, train_size: int, test_size: int, seed: int, reward: str = "binary", **options: Any
) -> Task:
    """Build the task; a size of -1 takes all rows of that side, else `seed` chooses among them.

    `options` are those of `prepare`. `reward` is "binary" (the paper's text) or "weighted" (the
    released code: see `grading.weighted`). Raises ValueError if a side has fewer rows than asked
    for, or there is no such `reward`.
    """
    look_up(reward, ("binary", "weighted"), "reward")
    rows, report = prepare(**options)
    logging.getLogger(__name__).warning("rows: %s", report)
    return Task(
        name="mmfinereason",
        train=_choose(rows, "train", train_size, seed),
        test=_choose(rows, "test", test_size, seed),
        verify=partial(_judge, grade),
        judges=min(8, os.cpu_count() or 1),
        score=partial(_judge, weighted) if reward == "weighted" else None,
        report=report,
    )


def _judge(grader: Any, completion: str, row: Row) -> Any:
    return grader(completion, row["answer"], row["problem_type"])


def prepare(
    source: str | Path | Dataset = HUB,
    *,
    revision: str | None = None,
    privileged: str = "answer",
    min_area: int = MIN_AREA,
    max_area: int = MAX_AREA,
) -> tuple[Dataset, dict[str, int]]:
    """Read and check a data set, and map its rows to the columns of `FEATURES`.

    `source` is what `read` takes, or rows that were read already. `privileged` is "answer" (RLSD) or
    "trace" (OPSD). Each `<image>` of a problem becomes an image part, scaled to `min_area` ..
    `max_area` pixels. Returned with the rows: how many were read, kept, and dropped for each fault.
    Raises FileNotFoundError if the folder has no data files; ValueError if fields are missing, no
    row is usable, or there is no such `privileged`.
    """
    look_up(privileged, ("answer", "trace"), "privileged")
    given = isinstance(source, Dataset)
    raw, name = (source, "the data set") if given else (read(source, revision), source)
    if missing := [field for field in FIELDS if field not in raw.column_names]:
        have = ", ".join(raw.column_names)
        raise ValueError(f"{name} has no {', '.join(missing)}, only {have}; rename its columns")
    many, image = isinstance(raw.features["images"], List | LargeList), Image(decode=False)
    raw = raw.select_columns(list(FIELDS)).cast_column("images", List(image) if many else image)
    folder = str(source) if not given and Path(source).is_dir() else ""
    how = {"folder": folder, "privileged": privileged}
    fresh = {"load_from_cache_file": False, "keep_in_memory": True}  # files may have changed
    inspected = raw.map(partial(inspect_row, **how), remove_columns=raw.column_names, **fresh)
    checked = inspected.to_pandas()
    whole = checked[checked["faults"].str.len() == 0]
    kept = whole.drop_duplicates("key").index
    faults = checked["faults"].explode().value_counts().to_dict()
    faults |= {"duplicate": len(whole) - len(kept)} if len(kept) < len(whole) else {}
    dropped = {f"dropped: {fault}": count for fault, count in faults.items()}
    counts = {"read": len(checked), **dropped, "kept": len(kept)}
    if not len(kept):
        raise ValueError(f"{name}: no row is left of {counts}; check it and its image files")
    # The keys are contents: they also tell apart what `datasets` caches.
    raw = raw.add_column("key", checked["key"].tolist())
    rows = raw.select(kept).map(
        partial(to_columns, area=(min_area, max_area), **how),
        remove_columns=raw.column_names,
        features=FEATURES,
        writer_batch_size=64,  # one image may take a megabyte
    )
    return rows, counts


def read(source: str | Path, revision: str | None = None) -> Dataset:
    """Read a set of the hub, or a folder of .parquet or .jsonl files; else FileNotFoundError."""
    if not Path(source).is_dir():
        return load_dataset(str(source), revision=revision, split="train")
    files = [p for p in Path(source).rglob("*") if p.suffix in (".parquet", ".jsonl")]
    if len(kinds := {file.suffix for file in files}) != 1:
        kinds = " and ".join(sorted(kinds)) or "neither"
        raise FileNotFoundError(f"{source}: expected .parquet or .jsonl files, found {kinds}")
    loader = {".parquet": "parquet", ".jsonl": "json"}[kinds.pop()]
    return load_dataset(loader, data_files=sorted(map(str, files)), split="train")


def inspect_row(row: Row, folder: str, privileged: str) -> dict[str, Any]:
    """Return a raw row's `faults`, and `key`, a hash of its question and images."""
    problem, answer, kind, trace = _texts(row)
    images = [image_bytes(image) for image in images_of(row, folder)]
    # The answer is checked beside a trace too: methods are compared on the same problems.
    shown = [answer, trace] if privileged == "trace" else [answer]
    known = kind.lower() in TYPES
    prompt = [{"content": _content(problem, TYPES[kind.lower()])}] if known else problem
    needs_image = row["data_type"] == "image" and not images
    faults = {
        "empty": not (problem.replace("<image>", "").strip() and clean(answer) and all(shown)),
        # The teacher's prompt may not add an image, nor the student's hold the reference.
        "reference": any(has_image_token(t) or holds_reference(prompt, t) for t in shown),
        "type": not known,  # which has no grader
        "video": bool(row["videos"]) or row["data_type"] == "video" or "<video>" in problem,
        "image": needs_image or len(images) != problem.count("<image>"),
        "broken_image": not all(map(is_usable, images)),
    }
    key = digest([problem, [sha256(data).hexdigest() for data in images]])
    return {"faults": [name for name, here in faults.items() if here], "key": key}


def to_columns(row: Row, area: tuple[int, int], folder: str, privileged: str) -> Row:
    """Map a raw row without faults to the columns of `FEATURES`; `area` bounds its images' pixels."""
    problem, answer, kind, trace = _texts(row)
    kind = TYPES[kind.lower()]
    return {
        "prompt": [{"role": "user", "content": _content(problem, kind)}],
        "images": [stored(image, *area) for image in images_of(row, folder)],
        "privileged_context": answer if privileged == "answer" else trace,
        "answer": answer,
        "problem_type": kind,
        "key": row["key"],
    }


def _texts(row: Row) -> list[str]:
    """Problem, answer, type and trace, with "" for None."""
    fields = ("problem", "answer", "problem_type", TRACE)
    return ["" if row[field] is None else str(row[field]).strip() for field in fields]


def images_of(row: Row, folder: str) -> list[dict[str, Any]]:
    """Return a raw row's images as {"bytes", "path"} with resolved paths; both None if missing."""
    images = row["images"] if isinstance(row["images"], list) else [row["images"]]
    found = [image or {"bytes": None, "path": None} for image in images if row["images"]]
    return [
        {**image, "path": image["path"] and str(Path(folder, image["path"]))} for image in found
    ]


def image_bytes(image: dict[str, Any]) -> bytes:
    """Return an image's bytes, from its file where it has none of its own; empty without either."""
    path = Path(image["path"] or "")
    return image["bytes"] or (path.read_bytes() if path.is_file() else b"")


def is_usable(data: bytes) -> bool:
    """Whether Pillow decodes an image to its end, and its shape is none that processors refuse."""
    try:
        with PillowImage.open(io.BytesIO(data)) as image:
            image.load()
            return max(image.size) <= MAX_ASPECT * min(image.size)
    except Exception:  # a decoder may raise anything on bytes that are not its own
        return False


def stored(image: dict[str, Any], min_area: int, max_area: int) -> dict[str, Any]:
    """Return an image within the limits and in RGB; one that was so already is left as it is."""
    # Once and for all: a transform on reading would decode all images at a look at any column.
    with PillowImage.open(io.BytesIO(image_bytes(image))) as given:
        fitted = fit(given, min_area, max_area)
        if (given.size, given.mode) == (fitted.size, "RGB"):
            return image
    out = io.BytesIO()
    fitted.save(out, "PNG", compress_level=1)  # lossless at any level, and this one is fast
    return {"bytes": out.getvalue(), "path": None}


def fit(image: PillowImage.Image, min_area: int, max_area: int) -> PillowImage.Image:
    """Scale to an area within the limits, sides rounded down, and RGB, as the released code does."""
    area = image.width * image.height
    limit = min(max(area, min_area), max_area)
    factor = math.sqrt(limit / area)
    size = (max(int(image.width * factor), 1), max(int(image.height * factor), 1))
    return (image if limit == area else image.resize(size)).convert("RGB")


def _content(problem: str, kind: str) -> list[dict[str, Any]]:
    """The parts of the student's turn: an instruction, then text and images in turn."""
    first, *rest = problem.split("<image>")
    parts = [{"type": "text", "text": f"{INSTRUCTIONS[kind]}\n\n{first}"}]
    for text in rest:
        parts.append({"type": "image", "text": None})
        parts += [{"type": "text", "text": text}] if text.strip() else []
    return parts


def _choose(rows: Dataset, side: str, size: int, seed: int) -> Dataset:
    """Take `size` rows of one side at random, or all of them, in order, for -1."""
    pool = [i for i, key in enumerate(rows["key"][:]) if is_held_out(key) == (side == "test")]
    if size > len(pool) or size < -1 or size == 0:
        raise ValueError(f"{side}_size={size}: expected 1 to {len(pool)} rows, or -1 for all")
    return rows.select(pool if size == -1 else Random(f"{side}-{seed}").sample(pool, size))
