"""One file for each machine; the README's table is made from them and never typed."""

import json

from conftest import row_of

from rlsd_lib.runs import machines


def test_a_machine_has_one_file_whose_rows_keep_commit_and_versions(tmp_path, monkeypatch):
    state = {"commit": "0123456789", "dirty": False}
    monkeypatch.setattr(machines, "git_state", lambda: state)
    monkeypatch.setattr(machines, "machine_name", lambda: "CPU of 1999, 2 cores")
    machines.record(tmp_path, {"tests": "3 passed", "bench": "1.2"})
    path = machines.record(tmp_path, {"tests": "4 passed"})
    assert [*tmp_path.iterdir()] == [path]
    assert path.name == "cpu-of-1999-2-cores.json"
    rows = json.loads(path.read_text())["rows"]
    assert {what: row["result"] for what, row in rows.items()} == {
        "tests": "4 passed",
        "bench": "1.2",
    }
    assert rows["tests"].items() >= state.items()
    assert rows["tests"]["packages"]["torch"]


def test_the_table_has_a_column_for_each_machine_and_says_what_was_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(machines, "machine_name", lambda: "CPU")
    machines.record(tmp_path, {"tests": "3 passed"})
    assert machines.hardware_table(tmp_path).splitlines() == [
        "| what | CPU | GPU |",
        "| --- | --- | --- |",
        "| tests | 3 passed | - |",
    ]
    monkeypatch.setattr(machines, "machine_name", lambda: "H100")
    monkeypatch.setattr(machines, "hardware", lambda: {"gpus": ["H100"]})
    machines.record(tmp_path, {"bench": "1.05"})
    assert machines.hardware_table(tmp_path).splitlines()[2:] == [
        "| tests | 3 passed | - |",
        "| bench | - | 1.05 |",
    ]


def test_a_test_counts_for_the_first_row_that_it_matches():
    for test, row in (
        ("tests/gpu/test_gpu.py::test_a_vision_language_model_trains", "what a card can show"),
        ("tests/gpu/test_gpu.py::test_rollouts_of_colocated_vllm", "what a card can show"),
        ("tests/trainer/test_vlm.py::test_images", "images"),
        ("tests/trainer/test_sharded.py::test_it[FSDP2]", "FSDP2"),
        ("tests/trainer/test_teacher.py::test_ema", "trainer:"),
        ("tests/test_credit.py::test_signs", "credit, divergences"),
    ):
        assert row_of(test).startswith(row), test
