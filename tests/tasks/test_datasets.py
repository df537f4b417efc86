"""Data sets beside the paper's: public maths of any column names, and the coloured squares."""

import json
from pathlib import Path

import pytest

from rlsd_lib.tasks import load_task
from rlsd_lib.tasks.encode import within
from rlsd_lib.tasks.lab.vision import COLOURS, build_processor


def write(folder: Path, rows: list[dict]) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def maths(source: str, **options):
    return load_task("maths", train_size=-1, test_size=-1, seed=0, source=source, **options)


def test_maths_have_text_prompts_solutions_and_their_faults_counted(tmp_path):
    rows = [{"problem": f"{i}+{i}?", "answer": str(2 * i), "solution": "add"} for i in range(40)]
    rows[3]["answer"] = None
    rows[5] = rows[4]
    source = write(tmp_path, rows)
    task = maths(source)
    assert len(task.train) + len(task.test) == 38
    dropped = {"dropped: empty": 1, "dropped: duplicate": 1}
    assert task.report == {"read": 40, **dropped, "kept": 38}
    row = task.train[0]
    assert row["prompt"][0]["content"].startswith("Solve the mathematical problem.")
    assert row["privileged_context"] == row["answer"]
    assert "images" not in task.train.column_names
    assert task.verify(f"<answer>{row['answer']}.0</answer>", row)
    assert maths(source, privileged="trace").train[0]["privileged_context"] == "add"


def test_maths_without_solutions_and_without_answers(tmp_path):
    rows = [{"problem": f"{i}+{i}?", "answer": str(2 * i), "id": i} for i in range(40)]
    task = maths(write(tmp_path, rows))
    assert len(task.train) + len(task.test) == 40
    write(tmp_path, [{"problem": "1+1?", "gold": "2"}])
    with pytest.raises(ValueError, match=r"has no answer, only problem, gold"):
        maths(str(tmp_path))
    with pytest.raises(ValueError, match=r"reward 'both'.*Valid: binary, weighted"):
        maths(str(tmp_path), reward="both")


def test_the_squares_are_of_every_type_and_answerable():
    task = load_task("colours", train_size=-1, test_size=-1, seed=0)
    types = task.train["problem_type"][:]
    assert {types.count(kind) > 20 for kind in set(types)} == {True}
    assert len(set(types)) == 4
    for row in task.train.select(range(40)):
        means = [image.resize((1, 1)).getpixel((0, 0)) for image in row["images"]]
        seen = [max(COLOURS, key=lambda name: -_distance(COLOURS[name], m)) for m in means]
        if row["problem_type"] == "multiple choice":
            assert ["blue", "green", "red"]["ABC".index(row["answer"])] == seen[0]
        if row["problem_type"] == "boolean":
            assert row["answer"] == ("Yes" if seen[0] == seen[1] else "No")
        assert task.verify(row["answer"], row)


def _distance(one: tuple[int, ...], two: tuple[int, ...]) -> int:
    return sum(abs(a - b) for a, b in zip(one, two, strict=True))


def test_the_weighted_reward_is_the_released_codes():
    task = load_task("colours", train_size=-1, test_size=-1, seed=0, reward="weighted")
    row = next(row for row in task.train if row["problem_type"] == "math")
    full = f"<thought>I count.</thought><answer>{row['answer']}</answer>"
    columns = {name: [value] * 3 for name, value in row.items()}
    wrong = full.replace(f">{row['answer']}<", ">9<")
    assert task.reward([full, row["answer"], wrong], **columns) == pytest.approx([1, 0.9, 0.1])
    assert task.verify(row["answer"], row)
    choice = next(row for row in task.train if row["problem_type"] == "multiple choice")
    assert task.score(choice["answer"], choice) == 1.0


def test_long_prompts_are_left_out():
    task = load_task("colours", train_size=-1, test_size=-1, seed=0)
    short, dropped = within(task, build_processor(), 175)
    assert dropped == len(task.train) + len(task.test) - len(short.train) - len(short.test) > 10
    assert within(task, build_processor(), 1000)[1] == 0
    with pytest.raises(ValueError, match=r"every train prompt is longer, the shortest has \d+"):
        within(task, build_processor(), 10)
