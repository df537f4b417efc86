"""The paper's data: MMFineReason-123K, from the hub or from a local folder in the same schema.

A row has the fields of `FIELDS`. It becomes TRL's `prompt` (a user turn in which each `<image>`
of the problem is an image part) and `images`, with `privileged_context` (the final answer; or the
trace of the released set's teacher, for OPSD), `reference_trace`, and what the grader needs.

Broken rows are never used: each is listed in a `Report` under every fault it has. The split and
the fingerprint are made of hashed contents (texts and image files): the same on every machine.
"""

import logging
import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

from datasets import Dataset, Features, Image, List, Value, load_dataset

from rlsd_lib.prompts import has_image_token, leaks
from rlsd_lib.runs.paths import digest
from rlsd_lib.runs.provenance import fingerprint
from rlsd_lib.tasks.data_report import Report
from rlsd_lib.tasks.grading import TYPES, clean, grade, weighted_reward
from rlsd_lib.tasks.images import images_of, read_bytes, shape_of, stored
from rlsd_lib.tasks.task import Row, Task, is_held_out

HUB = "iieycx/rlsd-train-MMFineReason-123K"
TRACE = "qwen3vl_235b_thinking_response"
FIELDS = ("problem", "answer", "problem_type", "data_type", "images", "videos", TRACE)
MIN_AREA, MAX_AREA = 262_144, 1_048_576  # pixels of one image, as the released code has them
MAX_ASPECT = 200  # Qwen's image processors refuse longer shapes
REFERENCE_PATTERN = (
    r"\b(?:reference|provided|given|known|sample) (?:solution|answer)\b|\breference\b"
    r"|\b(?:solution|answer) (?:above|provided|given)\b"
)
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
_TEXTS = ("privileged_context", "reference_trace", "answer", "problem_type", "key")
FEATURES = Features(
    {
        "prompt": List({"role": Value("string"), "content": List(_PART)}),
        "images": List(Image()),
        "choices": List(Value("string")),
        **dict.fromkeys(_TEXTS, Value("string")),
    }
)
_CHOICE = re.compile(r"(?m)^[ \t]*\(?([A-J])[.):][ \t]*(\S.*?)[ \t]*$")


def load(
    *, train_size: int, test_size: int, seed: int, source: str = HUB, report_dir: str = "",
    reward: str = "binary", **options: Any,
) -> Task:  # fmt: skip
    """Build the task; a size of -1 takes all rows of that side, else `seed` chooses among them.

    `options` are those of `prepare`. What was dropped is logged, and written to `report_dir` where
    one is given. `reward` is "binary" (the paper's text) or "weighted" (the released code: see
    `grading.weighted_reward`). Raises ValueError when a side has fewer rows than asked for.
    """
    check_reward(reward)  # before the data set is read
    rows, report = prepare(source, **options)
    how = {"train_size": train_size, "test_size": test_size, "seed": seed, "reward": reward}
    return as_task("mmfinereason", rows, report, report_dir=report_dir, **how)


def as_task(
    name: str, rows: Dataset, report: Report, *, train_size: int, test_size: int, seed: int,
    reward: str, report_dir: str,
) -> Task:  # fmt: skip
    """Split prepared rows into a task, and tell what was dropped."""
    logging.getLogger(__name__).warning(report.summary())
    if report_dir:
        report.write(report_dir)
    sides = {s: _choose(rows, s, n, seed) for s, n in (("train", train_size), ("test", test_size))}
    judging = {"verify": verify, "score": weighted if reward == "weighted" else None}
    return Task(name=name, reference_pattern=REFERENCE_PATTERN, report=report, **judging, **sides)


def check_reward(reward: str) -> None:
    """Raise ValueError for a kind of reward that there is not."""
    if reward not in ("binary", "weighted"):
        raise ValueError(f"reward={reward!r}: choose 'binary' or 'weighted'")


def verify(completion: str, row: Row) -> bool:
    """Say whether a completion's final answer is right for its problem type."""
    return grade(completion, row["answer"], row["problem_type"], row["choices"])


def weighted(completion: str, row: Row) -> float:
    """Return the released code's reward: for maths, 0.9 accuracy + 0.1 format."""
    columns = {name: [row[name]] for name in ("answer", "problem_type", "choices")}
    return weighted_reward()([completion], **columns)[0]


def prepare(
    source: str | Path = HUB, *, revision: str | None = None, split: str = "train",
    image_folder: str | Path = "", privileged: str = "answer", preamble: bool = True,
    min_area: int = MIN_AREA, max_area: int = MAX_AREA, num_proc: int | None = None,
    text_columns: Mapping[str, str] | None = None,
) -> tuple[Dataset, Report]:  # fmt: skip
    """Read, check and map a data set, scaling its images to `min_area` .. `max_area` pixels.

    `source` is a name on the hub (`revision` and `split` are for it), or a folder of .parquet or
    .jsonl files. Image paths are relative to `image_folder`, by default that folder. `privileged`
    is "answer" (RLSD) or "trace" (OPSD). With `preamble` the student's turn begins with an
    instruction. `num_proc` processes do the work. `text_columns` reads a set of mathematical texts
    with columns of its own: {field: its column}, see `rlsd_lib.tasks.maths`. Raises
    FileNotFoundError for a folder without data files, ValueError for missing fields, no usable row,
    or an unknown `privileged`.
    """
    if privileged not in ("answer", "trace"):
        raise ValueError(f"privileged={privileged!r}: choose 'answer' or 'trace'")
    raw = _read(source, revision, split, text_columns)
    name = f"{source}@{revision}" if revision else str(source)
    folder = str(image_folder or (source if Path(source).is_dir() else ""))
    check = partial(inspect_row, folder=folder, need_trace=privileged == "trace", preamble=preamble)
    fresh = {"load_from_cache_file": False, "keep_in_memory": True}  # files may have changed
    checked = raw.map(check, remove_columns=raw.column_names, num_proc=num_proc, **fresh).to_list()
    report, kept = _report(name, raw, checked)
    if not kept:
        raise ValueError(f"{report.summary()}. No row is left; check the source and image_folder")
    facts = {"folder": folder, "privileged": privileged, "preamble": preamble}
    keys = [checked[index]["key"] for index in kept]  # contents: they also tell the cache apart
    to_trl = partial(to_columns, keys=keys, area=(min_area, max_area), **facts)
    # One image may take a megabyte, so rows are written out in small batches.
    how = {"with_indices": True, "num_proc": num_proc, "writer_batch_size": 64}
    rows = raw.select(kept)
    return rows.map(to_trl, remove_columns=raw.column_names, features=FEATURES, **how), report


def _read(
    source: str | Path, revision: str | None, split: str, text_columns: Mapping[str, str] | None
) -> Dataset:
    """Load the rows with their images not decoded."""
    if Path(source).is_dir():
        files = [p for p in Path(source).rglob("*") if p.suffix in (".parquet", ".jsonl")]
        if len(kinds := {file.suffix for file in files}) != 1:
            kinds = " and ".join(sorted(kinds)) or "neither"
            raise FileNotFoundError(f"{source}: expected .parquet or .jsonl files, found {kinds}")
        loader = {".parquet": "parquet", ".jsonl": "json"}[kinds.pop()]
        rows = load_dataset(loader, data_files=sorted(map(str, files)), split="train")
    else:
        rows = load_dataset(str(source), revision=revision, split=split)
    rows = rows if text_columns is None else _as_texts(rows, text_columns)
    if missing := [field for field in FIELDS if field not in rows.column_names]:
        have = ", ".join(rows.column_names)
        raise ValueError(f"{source} has no {', '.join(missing)}, only {have}; rename its columns")
    feature = rows.features["images"]
    if isinstance(feature, Image):
        return rows.cast_column("images", Image(decode=False))
    decoded = isinstance(getattr(feature, "feature", None), Image)
    return rows.cast_column("images", List(Image(decode=False))) if decoded else rows


def _as_texts(rows: Dataset, columns: Mapping[str, str]) -> Dataset:
    """Give a set of mathematical texts the fields that it lacks; its other columns are dropped."""
    here = {field: column for field, column in columns.items() if column in rows.column_names}
    rows = rows.select_columns(list(here.values()))
    rows = rows.rename_columns({column: field for field, column in here.items() if column != field})
    same = {"problem_type": "math", "data_type": "text", "images": [], "videos": []}
    same |= {} if TRACE in rows.column_names else {TRACE: ""}
    new = {name: Value("string") for name in same} | {
        name: List(Value("string")) for name in ("images", "videos")
    }
    features = Features({**rows.features, **new})
    return rows.map(lambda _: same, features=features)


def inspect_row(
    row: Row, folder: str = "", need_trace: bool = False, preamble: bool = True
) -> dict[str, Any]:
    """Return a raw row's `faults`, the hash `key` of its question, `content` of all, and `traced`."""
    problem, answer, kind, trace = (_text(row[f]) for f in (*FIELDS[:3], TRACE))
    images = [read_bytes(image) for image in images_of(row, folder)]
    shapes = [shape_of(data) for data in images if data is not None]
    count = problem.count("<image>")
    has_video = bool(row["videos"]) or row["data_type"] == "video" or "<video>" in problem
    needs_image = count > 0 or row["data_type"] == "image"
    # The answer's place is looked at for traces too: methods are compared on the same problems.
    shown = [answer, trace] if need_trace else [answer]
    known = kind.lower() in TYPES
    prompt = [{"content": _content(problem, TYPES[kind.lower()], preamble)}] if known else problem
    faults = {
        "empty_problem": not problem.replace("<image>", "").strip(),
        "empty_answer": not clean(answer),
        "image_in_answer": has_image_token(answer),  # which the teacher's prompt may not add
        "answer_in_problem": any(leaks(prompt, text) for text in shown),
        "unknown_type": not known,
        "video": has_video,  # this task has images only
        "missing_image": None in images or (needs_image and not images and not has_video),
        "unreadable_image": None in shapes,
        "image_shape": any(shape and max(shape) > MAX_ASPECT * min(shape) for shape in shapes),
        "placeholders": bool(images) and count != len(images),
        "missing_trace": need_trace and not trace,
        "image_in_trace": need_trace and has_image_token(trace),
    }
    key = digest([problem, [sha256(data or b"").hexdigest() for data in images]])
    found = [name for name, here in faults.items() if here]
    facts = {"content": digest([key, answer, kind, trace]), "traced": bool(trace)}
    return {"faults": found, "key": key, **facts}


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _report(source: str, raw: Dataset, checked: list[Row]) -> tuple[Report, list[int]]:
    """Collect the faults of all rows, duplicates among the whole ones included."""
    faults: dict[str, list[int]] = {}
    kept: dict[str, int] = {}
    for index, row in enumerate(checked):
        found = row["faults"] or (["duplicate"] if row["key"] in kept else [])
        for fault in found:
            faults.setdefault(fault, []).append(index)
        if not found:
            kept[row["key"]] = index
    whole = [checked[index] for index in kept.values()]
    types = raw.select_columns("problem_type").select(faults.get("unknown_type", []))
    return Report(
        source=source,
        rows=len(raw),
        kept=len(whole),
        faults=faults,
        unknown_types=dict(Counter(_text(row["problem_type"]) for row in types)),
        without_trace=sum(not row["traced"] for row in whole),
        fingerprint=fingerprint(row["content"] for row in whole),
    ), list(kept.values())


def to_columns(
    row: Row, index: int, *, keys: list[str], area: tuple[int, int], folder: str, privileged: str,
    preamble: bool,
) -> Row:  # fmt: skip
    """Map a raw row that is whole to the columns of `FEATURES`."""
    problem, answer, kind, trace = (_text(row[f]) for f in (*FIELDS[:3], TRACE))
    kind = TYPES[kind.lower()]
    return {
        "prompt": [{"role": "user", "content": _content(problem, kind, preamble)}],
        "images": [stored(image, *area) for image in images_of(row, folder)],
        "privileged_context": answer if privileged == "answer" else trace,
        "reference_trace": trace,
        "answer": answer,
        "problem_type": kind,
        "choices": choices_of(problem) if kind == "multiple choice" else [],
        "key": keys[index],
    }


def _content(problem: str, kind: str, preamble: bool) -> list[dict[str, Any]]:
    """The parts of the student's turn."""
    texts = problem.split("<image>")
    parts = [{"type": "text", "text": f"{INSTRUCTIONS[kind]}\n\n" * preamble + texts[0]}]
    for text in texts[1:]:
        parts += [{"type": "image", "text": None}, {"type": "text", "text": text}]
    return [part for part in parts if part["type"] == "image" or part["text"].strip()]


def choices_of(problem: str) -> list[str]:
    """Read the texts of the choices A, B, ... that stand on lines of their own; [] without two."""
    found = _CHOICE.findall(problem)
    in_order = [letter for letter, _ in found] == list("ABCDEFGHIJ"[: len(found)])
    return [text for _, text in found] if in_order and len(found) > 1 else []


def _choose(rows: Dataset, side: str, size: int, seed: int) -> Dataset:
    """Take `size` rows of one side at random, or all of them, in order, for -1."""
    pool = [i for i, key in enumerate(rows["key"][:]) if is_held_out(key) == (side == "test")]
    if size > len(pool) or size < -1 or size == 0:
        raise ValueError(f"{side}_size={size}: expected 1 to {len(pool)} rows, or -1 for all")
    return rows.select(pool if size == -1 else Random(f"{side}-{seed}").sample(pool, size))
