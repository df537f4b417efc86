"""The paper's data on a made-up set of 200 rows: every planted fault is found and listed."""

import io
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PillowImage

from rlsd_lib.prompts import check_contexts, count_in_prompts, prompt_text
from rlsd_lib.runs.provenance import fingerprint
from rlsd_lib.tasks import load_task, task_names
from rlsd_lib.tasks.mmfinereason import (
    FIELDS,
    TRACE,
    fit,
    inspect_row,
    load,
    prepare,
    read,
)
from rlsd_lib.tasks.task import is_held_out

ROWS = 200
KINDS = ("math", "Multiple Choice", "numerical", "boolean")
SMALL = {"min_area": 64, "max_area": 1024}  # pixels: scaling costs time and is tested apart
ANSWERS = ("\\frac{1}{2}", "B", "12.5 cm", "Yes")


def png(seed: int, width: int = 12, height: int = 8) -> bytes:
    """A small image whose pixels are those of the seed."""
    image = PillowImage.new("RGB", (width, height))
    rng = random.Random(seed)
    image.putdata([tuple(rng.randrange(256) for _ in range(3)) for _ in range(width * height)])
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def whole_row(index: int) -> dict[str, Any]:
    """A row without faults: none, one or two images, each type in turn."""
    count = (1, 1, 2, 0)[index // 4 % 4]
    problem = "<image>" * count + f"Question {index}?"
    if index % 4 == 1:
        problem += "\nA. red\nB. blue\nC. green"
    return {
        "problem": problem,
        "answer": ANSWERS[index % 4],
        "problem_type": KINDS[index % 4],
        "data_type": "image" if count else "text",
        "images": [png(10 * index + n) for n in range(count)],
        "videos": [],
        TRACE: f"Look. So the answer is {ANSWERS[index % 4]}." if index % 10 else None,
    }


# row -> what is changed in it; the faults that each change must be found under stand in PLANTED
BREAKS: dict[int, dict[str, Any]] = {
    3: {"answer": ""},
    19: {"answer": None},
    23: {"answer": "$ $"},
    32: {"answer": "<image>"},
    36: {"problem_type": "essay"},
    37: {"problem_type": None},
    38: {"problem_type": "Essay "},
    48: {"videos": ["clip.mp4"]},
    49: {"data_type": "video", "images": [], "problem": "<video>What happens?"},
    64: {"images": ["nowhere.png"]},
    65: {"images": []},
    66: {"images": None},
    67: {"images": [None]},
    80: {"images": [b"this is no image"]},
    81: {"images": [png(810)[:-40]]},
    82: {"images": [b""]},
    96: {"images": [png(960, 2000, 2)]},
    112: {"problem": "No placeholder here."},
    113: {"problem": "<image><image>Two for one?"},
    128: {"problem": "<image>  "},
    129: {"problem": None, "images": []},
    144: whole_row(0),
    145: whole_row(0) | {"answer": "3"},
    160: {"answer": "", "problem_type": "essay", "images": [b"broken"]},
    176: {"problem": "<image>Is it 1 : 2, 1 : 3 or 1 : 4?", "answer": "1 : 2"},
    177: {TRACE: "Look at <|image_pad|> again."},  # of no matter where traces are not shown
    161: whole_row(160) | {"answer": "7", "problem_type": "math", "data_type": "image"},
}
PLANTED = {
    "empty": [3, 19, 23, 128, 129, 160],
    "reference": [32, 176],
    "type": [36, 37, 38, 160],
    "video": [48, 49],
    "image": [65, 66, 112, 113, 129],
    "broken_image": [64, 67, 80, 81, 82, 96, 160],
}
DUPLICATES = [144, 145]
DROPPED = {row for rows in PLANTED.values() for row in rows} | {*DUPLICATES}


def fixture_rows() -> list[dict[str, Any]]:
    return [whole_row(index) | BREAKS.get(index, {}) for index in range(ROWS)]


def as_jsonl(folder: Path) -> Path:
    """Write the fixture as JSON lines with image files."""
    (folder / "images").mkdir(parents=True)
    with (folder / "rows.jsonl").open("w") as file:
        for index, row in enumerate(fixture_rows()):
            names = []
            for n, image in enumerate(row["images"] or []):
                names.append(f"images/{index}-{n}.png" if isinstance(image, bytes) else image)
                # Nothing in a file is the same as no file: the path is left dangling.
                if isinstance(image, bytes) and image:
                    (folder / names[-1]).write_bytes(image)
            images = None if row["images"] is None else names
            file.write(json.dumps({**row, "images": images}) + "\n")
    return folder


def as_parquet(folder: Path) -> Path:
    """Write the fixture as parquet with the images' bytes inside, in two files."""
    folder.mkdir()
    rows = fixture_rows()
    for row in rows:
        images = row["images"]
        # A path that leads nowhere cannot be written into parquet; its place stays empty.
        row["images"] = images and [
            {"bytes": i, "path": None} if isinstance(i, bytes) else None for i in images
        ]
    texts = dict.fromkeys(FIELDS, Value("string"))
    features = Features({**texts, "images": List(Image()), "videos": List(Value("string"))})
    for part in (0, 1):
        data = Dataset.from_list(rows[100 * part : 100 * part + 100], features=features)
        data.to_parquet(folder / f"train-{part}.parquet")
    return folder


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_jsonl(tmp_path_factory.mktemp("data") / "jsonl")


def faults_of(folder: Path, privileged: str = "answer") -> dict[str, list[int]]:
    """The rows under each fault, duplicates left out: those are no fault of a row."""
    raw = read(folder).cast_column("images", List(Image(decode=False)))
    found: dict[str, list[int]] = {}
    for index, row in enumerate(raw):
        for fault in inspect_row(row, str(folder), privileged)["faults"]:
            found.setdefault(fault, []).append(index)
    return found


def test_every_planted_fault_is_found_and_counted(local: Path) -> None:
    assert faults_of(local) == PLANTED
    rows, counts = prepare(local, **SMALL)
    dropped = {f"dropped: {fault}": len(rows) for fault, rows in PLANTED.items()}
    dropped |= {"dropped: duplicate": len(DUPLICATES)}
    assert counts == {"read": ROWS, "kept": ROWS - len(DROPPED), **dropped}
    assert len(rows) == counts["kept"]


def test_embedded_and_filed_images_are_the_same_data(local: Path, tmp_path: Path) -> None:
    filed, counts = prepare(local, **SMALL)
    embedded, other = prepare(as_parquet(tmp_path / "parquet"), **SMALL)
    assert other == counts
    assert fingerprint(embedded) == fingerprint(filed)
    assert embedded["key"][:] == filed["key"][:]
    assert embedded[0]["images"][0].tobytes() == filed[0]["images"][0].tobytes()


def test_fingerprint_is_the_same_in_another_place_and_process(local: Path, tmp_path: Path) -> None:
    moved = as_jsonl(tmp_path / "elsewhere")
    code = "import sys; from rlsd_lib.tasks.mmfinereason import prepare\n"
    code += "from rlsd_lib.runs.provenance import fingerprint\n"
    code += "sys.stdout.write(fingerprint(prepare(sys.argv[1], min_area=64)[0]))"
    command = [sys.executable, "-c", code, str(moved)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == fingerprint(prepare(local, **SMALL)[0])
    file = moved / "rows.jsonl"
    file.write_text(file.read_text().replace("Question 100?", "Question 100!"))
    assert fingerprint(prepare(moved, **SMALL)[0]) != done.stdout


def test_a_file_that_goes_missing_is_noticed(tmp_path: Path) -> None:
    folder = as_jsonl(tmp_path / "data")
    before = prepare(folder, **SMALL)[1]["dropped: broken_image"]
    (folder / "images" / "1-0.png").unlink()
    assert prepare(folder, **SMALL)[1]["dropped: broken_image"] == before + 1


def test_rows_are_what_trl_takes(local: Path) -> None:
    from trl.data_utils import prepare_multimodal_messages

    rows, _ = prepare(local, **SMALL)
    for row in rows:
        messages = prepare_multimodal_messages(row["prompt"], images=row["images"])
        images = [p["image"] for p in messages[0]["content"] if p["type"] == "image"]
        assert images == row["images"]
        assert "<image>" not in prompt_text(row["prompt"])
        assert row["privileged_context"] == row["answer"]
    check_contexts(rows["privileged_context"][:], "{prompt} {privileged_context}")
    count_in_prompts(rows["prompt"][:], rows["privileged_context"][:])
    two = rows[next(i for i, row in enumerate(rows) if len(row["images"]) == 2)]
    kinds = [part["type"] for part in two["prompt"][0]["content"]]
    assert kinds == ["text", "image", "image", "text"]  # the instruction, then the problem


def test_a_privileged_trace(local: Path) -> None:
    rows, _ = prepare(local, privileged="trace", **SMALL)
    faults = faults_of(local, "trace")
    missing = {i for i, row in enumerate(fixture_rows()) if not row[TRACE]}
    assert faults["empty"] == sorted({*PLANTED["empty"], *missing})
    assert faults["reference"] == [32, 176, 177]
    check_contexts(rows["privileged_context"][:], "{prompt} {privileged_context}")
    assert rows[0]["privileged_context"] == f"Look. So the answer is {rows[0]['answer']}."
    assert prompt_text(rows[0]["prompt"]).startswith("Choose the right option.")


def test_images_are_scaled_into_the_limits(tmp_path: Path) -> None:
    names = ("small.png", "grey.png", "right.png", "large.png")
    modes = (("RGB", (12, 8)), ("L", (800, 600)), ("RGB", (800, 600)), ("RGB", (1500, 1000)))
    for name, (mode, size) in zip(names, modes, strict=True):
        PillowImage.new(mode, size).save(tmp_path / name)
    rows = [whole_row(0) | {"images": [name], "problem": f"<image>{name}"} for name in names]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, _ = prepare(tmp_path)
    images = [image for row in data for image in row["images"]]
    # 12 x 8 goes up to 262,144 px and 1500 x 1000 down to 1,048,576 px, sides rounded down
    assert [i.size for i in images] == [(627, 418), (800, 600), (800, 600), (1254, 836)]
    assert {image.mode for image in images} == {"RGB"}
    raw = data.cast_column("images", List(Image(decode=False)))["images"][:]
    assert [bool(image["bytes"]) for (image,) in raw] == [True, True, False, True]


def test_scaling_keeps_the_shape() -> None:
    for size in ((4000, 3000), (3000, 40), (800, 600), (1, 150)):
        scaled = fit(PillowImage.new("L", size), 262_144, 1_048_576)
        area = scaled.width * scaled.height
        assert area <= 1_048_576
        assert area >= 262_144 * 0.9
        ratio = (scaled.width / scaled.height) / (size[0] / size[1])
        assert math.isclose(ratio, 1.0, rel_tol=0.05)
    assert fit(PillowImage.new("RGB", (800, 600)), 262_144, 1_048_576).size == (800, 600)


def test_task_splits_by_content_and_grades(local: Path) -> None:
    sizes = {"train_size": -1, "test_size": -1, "seed": 0}
    task = load_task("mmfinereason", **sizes, source=str(local), **SMALL)
    train, test = set(task.train["key"]), set(task.test["key"])
    assert len(train) + len(test) == ROWS - len(DROPPED)
    assert all(map(is_held_out, test)) and not any(map(is_held_out, train))
    rows = task.train[:8]
    assert len(rows["images"]) == 8
    good = [f"<answer>{answer}</answer>" for answer in rows["answer"]]
    assert task.reward(good, **rows) == [1.0] * 8
    assert task.reward(["<answer>Z</answer>"] * 8, **rows) == [0.0] * 8
    choice = next(row for row in task.train if row["problem_type"] == "multiple choice")
    assert task.verify("(B)", choice) and not task.verify("C", choice)
    assert task.speaks_of_reference("As the reference solution says")


def test_sizes_choose_rows_by_seed(local: Path) -> None:
    def keys(seed: int) -> list[str]:
        task = load(train_size=20, test_size=5, seed=seed, source=str(local), **SMALL)
        return task.train["key"][:]

    assert keys(0) == keys(0) != keys(1)
    assert len(set(keys(0))) == 20
    with pytest.raises(ValueError, match=r"test_size=500: expected 1 to \d+ rows, or -1"):
        load(train_size=5, test_size=500, seed=0, source=str(local), **SMALL)


def test_bad_sources_are_refused(tmp_path: Path) -> None:
    assert "mmfinereason" in task_names()
    with pytest.raises(FileNotFoundError, match="found neither"):
        prepare(tmp_path)
    with pytest.raises(ValueError, match=r"privileged 'all'.*Valid: answer, trace"):
        prepare(tmp_path, privileged="all")
    (tmp_path / "rows.jsonl").write_text('{"problem": "1+1?", "answer": "2"}\n')
    with pytest.raises(ValueError, match="has no problem_type, data_type, images, videos"):
        prepare(tmp_path)
    row = whole_row(3) | {"images": [], "answer": ""}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(
        ValueError, match=r"no row is left of .*'dropped: empty': 1, 'dropped: image': 1"
    ):
        prepare(tmp_path)
