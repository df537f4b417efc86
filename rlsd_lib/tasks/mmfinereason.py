"""The paper's data: MMFineReason-123K, from the hub or from a local folder in the same schema.

Broken rows are never used: a `Report` lists each under every fault it has. The split and the
fingerprint are made of hashed contents (texts and image files): the same on every machine.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
from datasets import Dataset, Features, Image, LargeList, List, Value, load_dataset

from rlsd_lib.names import look_up
from rlsd_lib.prompts import has_image_token, holds_reference
from rlsd_lib.runs.paths import digest
from rlsd_lib.runs.provenance import fingerprint
from rlsd_lib.runs.records import replace_text, write_json
from rlsd_lib.tasks.grading import LETTERS, TYPES, clean, grade, weighted
from rlsd_lib.tasks.images import images_of, read_bytes, shape_of, stored
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


@dataclass(frozen=True)
class Report:
    """How many rows were read and kept; `faults` names the rows (from 0) that have each fault."""

    source: str
    rows: int
    kept: int
    faults: dict[str, list[int]]
    unknown_types: dict[str, int]  # how often each type without a grader occurs
    fingerprint: str  # of the kept rows, in order

    @property
    def counts(self) -> dict[str, int]:
        """How many rows have each fault that occurs."""
        return {fault: len(rows) for fault, rows in self.faults.items()}

    def summary(self) -> str:
        """Say in one line how many rows were kept, and how many were dropped for each fault."""
        parts = ", ".join(f"{fault} {count}" for fault, count in self.counts.items())
        return f"{self.source}: {self.kept} of {self.rows} rows kept; dropped: {parts or 'none'}"

    def write(self, folder: str | Path) -> None:
        """Write data_report.json (counts) and dropped.jsonl (row, fault) to an existing folder."""
        counts = {**asdict(self), "counts": self.counts}
        faults = counts.pop("faults").items()
        lines = [{"row": row, "fault": fault} for fault, rows in faults for row in rows]
        write_json(Path(folder) / "data_report.json", counts)
        replace_text(Path(folder) / "dropped.jsonl", "".join(json.dumps(x) + "\n" for x in lines))


def load(
    *,
    train_size: int,
    test_size: int,
    seed: int,
    source: str = HUB,
    reward: str = "binary",
    **options: Any,
) -> Task:
    """Build the task; a size of -1 takes all rows of that side, else `seed` chooses among them.

    `options` are those of `prepare`. `reward` is "binary" (the paper's text) or "weighted" (the
    released code: see `grading.weighted`).

    Raises:
        ValueError: a side has fewer rows than asked for, or there is no such `reward`.
    """
    look_up(reward, ("binary", "weighted"), "reward")
    rows, report = prepare(source, **options)
    logging.getLogger(__name__).warning(report.summary())
    return Task(
        name="mmfinereason",
        train=_choose(rows, "train", train_size, seed),
        test=_choose(rows, "test", test_size, seed),
        verify=partial(_judge, grade),
        score=partial(_judge, weighted) if reward == "weighted" else None,
        report=report,
    )


def _judge(grader: Any, completion: str, row: Row) -> Any:
    return grader(completion, row["answer"], row["problem_type"], row["choices"])


def prepare(
    source: str | Path = HUB,
    *,
    revision: str | None = None,
    image_folder: str | Path = "",
    privileged: str = "answer",
    min_area: int = MIN_AREA,
    max_area: int = MAX_AREA,
    num_proc: int | None = None,
    text_columns: Mapping[str, str] | None = None,
) -> tuple[Dataset, Report]:
    """Read and check a data set, and map its rows to the columns of `FEATURES`.

    A row's `prompt` is a user turn in which each `<image>` of the problem is an image part;
    `images` are scaled to `min_area` .. `max_area` pixels; `reference_trace` is the trace of the
    released set's teacher.

    `source` is a name on the hub (at `revision`), or a folder of .parquet or .jsonl files. Image
    paths are relative to `image_folder`, by default that folder. `privileged` is "answer" (RLSD) or
    "trace" (OPSD). `num_proc` processes do the work. `text_columns` reads a set of mathematical
    texts with columns of its own: {field: its column}, see `rlsd_lib.tasks.maths`.

    Raises:
        FileNotFoundError: the folder has no data files.
        ValueError: fields are missing, no row is usable, or there is no such `privileged`.
    """
    look_up(privileged, ("answer", "trace"), "privileged")
    raw = _read(source, revision)
    raw = raw if text_columns is None else _as_texts(raw, text_columns)
    if missing := [field for field in FIELDS if field not in raw.column_names]:
        have = ", ".join(raw.column_names)
        raise ValueError(f"{source} has no {', '.join(missing)}, only {have}; rename its columns")
    many, image = isinstance(raw.features["images"], List | LargeList), Image(decode=False)
    raw = raw.select_columns(list(FIELDS)).cast_column("images", List(image) if many else image)
    name = f"{source}@{revision}" if revision else str(source)
    folder = str(image_folder or (source if Path(source).is_dir() else ""))
    how = {"folder": folder, "privileged": privileged}
    fresh = {"load_from_cache_file": False, "keep_in_memory": True}  # files may have changed
    checked = raw.map(
        partial(inspect_row, **how), remove_columns=raw.column_names, num_proc=num_proc, **fresh
    ).to_pandas()
    report, kept = _report(name, checked)
    if not kept:
        raise ValueError(f"{report.summary()}. No row is left; check the source and image_folder")
    # The keys are contents: they also tell apart what `datasets` caches.
    raw = raw.add_column("key", checked["key"].tolist())
    rows = raw.select(kept).map(
        partial(to_columns, area=(min_area, max_area), **how),
        remove_columns=raw.column_names,
        features=FEATURES,
        num_proc=num_proc,
        writer_batch_size=64,  # one image may take a megabyte
    )
    return rows, report


def _read(source: str | Path, revision: str | None) -> Dataset:
    if not Path(source).is_dir():
        return load_dataset(str(source), revision=revision, split="train")
    files = [p for p in Path(source).rglob("*") if p.suffix in (".parquet", ".jsonl")]
    if len(kinds := {file.suffix for file in files}) != 1:
        kinds = " and ".join(sorted(kinds)) or "neither"
        raise FileNotFoundError(f"{source}: expected .parquet or .jsonl files, found {kinds}")
    loader = {".parquet": "parquet", ".jsonl": "json"}[kinds.pop()]
    return load_dataset(loader, data_files=sorted(map(str, files)), split="train")


def _as_texts(rows: Dataset, columns: Mapping[str, str]) -> Dataset:
    """Give a set of mathematical texts the fields that it lacks; its other columns are dropped."""
    here = {column: field for field, column in columns.items() if column in rows.column_names}
    rows = rows.select_columns(list(here))
    rows = rows.rename_columns({old: new for old, new in here.items() if old != new})
    same = {"problem_type": "math", "data_type": "text", "images": [], "videos": []}
    same |= {} if TRACE in rows.column_names else {TRACE: ""}
    new = {k: List(Value("string")) if v == [] else Value("string") for k, v in same.items()}
    return rows.map(lambda _: same, features=Features({**rows.features, **new}))


def inspect_row(row: Row, folder: str, privileged: str) -> dict[str, Any]:
    """Return a raw row's `faults`, its `type`, and the hashes `key` (question) and `content` (all)."""
    problem, answer, kind, trace = _texts(row)
    images = [read_bytes(image) for image in images_of(row, folder)]
    shapes = [shape_of(data) for data in images if data is not None]
    count = problem.count("<image>")
    has_video = bool(row["videos"]) or row["data_type"] == "video" or "<video>" in problem
    needs_image = count > 0 or row["data_type"] == "image"
    traced = privileged == "trace"
    # The answer's place is looked at for traces too: methods are compared on the same problems.
    shown = [answer, trace] if traced else [answer]
    known = kind.lower() in TYPES
    prompt = [{"content": _content(problem, TYPES[kind.lower()])}] if known else problem
    faults = {
        "empty_problem": not problem.replace("<image>", "").strip(),
        "empty_answer": not clean(answer),
        "image_in_answer": has_image_token(answer),  # which the teacher's prompt may not add
        "answer_in_problem": any(holds_reference(prompt, text) for text in shown),
        "unknown_type": not known,
        "video": has_video,  # this task has images only
        "missing_image": None in images or (needs_image and not images and not has_video),
        "unreadable_image": None in shapes,
        "image_shape": any(shape and max(shape) > MAX_ASPECT * min(shape) for shape in shapes),
        "placeholders": bool(images) and count != len(images),
        "missing_trace": traced and not trace,
        "image_in_trace": traced and has_image_token(trace),
    }
    key = digest([problem, [sha256(data or b"").hexdigest() for data in images]])
    found = [name for name, here in faults.items() if here]
    content = digest([key, answer, kind, trace])
    return {"faults": found, "type": kind, "key": key, "content": content}


def _texts(row: Row) -> list[str]:
    """Problem, answer, type and trace, with "" for None."""
    fields = ("problem", "answer", "problem_type", TRACE)
    return ["" if row[field] is None else str(row[field]).strip() for field in fields]


def _report(source: str, checked: pd.DataFrame) -> tuple[Report, list[int]]:
    """Collect the faults of all rows, duplicates among the whole ones included; and who is kept."""
    listed = checked["faults"].explode().dropna()
    faults = {fault: rows.tolist() for fault, rows in listed.groupby(listed).groups.items()}
    whole = checked[checked["faults"].str.len() == 0]
    kept = whole.drop_duplicates("key")
    if len(kept) < len(whole):
        faults["duplicate"] = whole.index.difference(kept.index).tolist()
    return Report(
        source=source,
        rows=len(checked),
        kept=len(kept),
        faults=faults,
        unknown_types=checked["type"][faults.get("unknown_type", [])].value_counts().to_dict(),
        fingerprint=fingerprint(kept["content"]),
    ), kept.index.tolist()


def to_columns(row: Row, area: tuple[int, int], folder: str, privileged: str) -> Row:
    """Map a raw row without faults to the columns of `FEATURES`; `area` bounds its images' pixels."""
    problem, answer, kind, trace = _texts(row)
    kind = TYPES[kind.lower()]
    return {
        "prompt": [{"role": "user", "content": _content(problem, kind)}],
        "images": [stored(image, *area) for image in images_of(row, folder)],
        "privileged_context": answer if privileged == "answer" else trace,
        "reference_trace": trace,
        "answer": answer,
        "problem_type": kind,
        "choices": choices_of(problem) if kind == "multiple choice" else [],
        "key": row["key"],
    }


def _content(problem: str, kind: str) -> list[dict[str, Any]]:
    """The parts of the student's turn: an instruction, then text and images in turn."""
    first, *rest = problem.split("<image>")
    parts = [{"type": "text", "text": f"{INSTRUCTIONS[kind]}\n\n{first}"}]
    for text in rest:
        parts.append({"type": "image", "text": None})
        parts += [{"type": "text", "text": text}] if text.strip() else []
    return parts


def choices_of(problem: str) -> list[str]:
    """Read the texts of the choices A, B, ... that stand on lines of their own; [] without two."""
    found = _CHOICE.findall(problem)
    in_order = [letter for letter, _ in found] == list(LETTERS[: len(found)])
    return [text for _, text in found] if in_order and len(found) > 1 else []


def _choose(rows: Dataset, side: str, size: int, seed: int) -> Dataset:
    """Take `size` rows of one side at random, or all of them, in order, for -1."""
    pool = [i for i, key in enumerate(rows["key"][:]) if is_held_out(key) == (side == "test")]
    if size > len(pool) or size < -1 or size == 0:
        raise ValueError(f"{side}_size={size}: expected 1 to {len(pool)} rows, or -1 for all")
    return rows.select(pool if size == -1 else Random(f"{side}-{seed}").sample(pool, size))
