"""Benchmarks: the command, what is refused before it runs, and how the tools' results are read."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from rlsd_lib.report import benchmarks
from rlsd_lib.report.benchmarks import (
    BENCHMARKS,
    PYTHON,
    TEXT,
    VISION,
    Benchmark,
    BenchmarkError,
    check_benchmarks,
    command,
    evaluate_benchmarks,
    score_of,
)
from rlsd_lib.report.paper_numbers import BENCHMARKS as PAPERS
from rlsd_lib.runs.records import read_manifest, state_of

FIXTURES = Path(__file__).parents[1] / "fixtures"
FIVE = list(PAPERS)
# What each task of lmms-eval writes, in its own unit.
SHARES = {
    "mmmu_val_reasoning": {"acc_score,none": 0.6511111, "acc_score_stderr,none": 0.0159},
    "mathvista_testmini_cot_reasoning": {"acc_score,none": 0.762, "acc_score_stderr,none": 0.0135},
    "mathvision_reason_test_reasoning": {"acc_score,none": 0.48816, "acc_score_stderr,none": 0.009},
    "zerobench_subquestions_reasoning": {
        "acc_score,none": 76 / 334,
        "acc_score_stderr,none": 0.023,
    },
    "wemath_testmini_reasoning": {
        "wemath_strict,none": "56.57%",
        "wemath_strict_stderr,none": "N/A",
    },
}
QUESTION_COUNTS = {BENCHMARKS[name].task: BENCHMARKS[name].questions for name in FIVE}


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """A stand-in for the tools' interpreter; `tool(**changes)` says how it behaves."""
    script = tmp_path / "python"
    fake = Path(__file__).parents[1] / "fake_tool.py"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {fake} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv(PYTHON, str(script))

    def behave(**changes):
        plan = {"version": VISION.version, "shares": SHARES, "questions": QUESTION_COUNTS}
        monkeypatch.setenv("FAKE_TOOL", json.dumps({**plan, **changes}))

    behave()
    return behave


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def evaluate(model: Path, tmp_path: Path, **changes) -> Path:
    trained = {"method": "grpo", "preset": "qwen3-vl-8b", "seed": 3}
    settings = {"run_dir": tmp_path / "run", "trained": trained, **changes}
    return evaluate_benchmarks(model, FIVE, **settings)


def test_the_five_benchmarks_of_the_paper_become_a_run(tool, model, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a real one")
    folder = evaluate(model, tmp_path)
    metrics, manifest = json.loads((folder / "metrics.json").read_text()), read_manifest(folder)
    assert state_of(folder) == "finished"
    assert metrics["benchmark/MathVista"] == 0.762
    assert metrics["benchmark/WeMath"] == pytest.approx(0.5657)
    assert metrics["benchmark/ZeroBench_low"] < 76 / 334 < metrics["benchmark/ZeroBench_high"]
    assert metrics["benchmark/WeMath_low"] is None  # a score of groups, without a standard error
    assert metrics["benchmark/MathVision_questions"] == 3040
    protocol = manifest["evaluation"]["protocol"]
    assert protocol["sampling"] == dict(VISION.sampling)
    assert (protocol["version"], protocol["image_area"]) == ("0.7.3", [262_144, 1_048_576])
    assert manifest["data"]["MMMU"]["rows_sha256"] == "hash of mmmu_val_reasoning"
    assert "seed=3" in " ".join(manifest["evaluation"]["command"])
    files = {name: list(folder.glob(f"tool/**/*{BENCHMARKS[name].task}*")) for name in FIVE}
    assert all(len(found) == 1 for found in files.values()), "every judged question is kept"
    log = (folder / "tool.log").read_text()
    # No paid judge, even where there is a key; no backend of this environment's notebooks.
    assert "False unused agg" in log


def test_the_command_is_that_of_the_protocol():
    words = command("/m", FIVE, seed=7, devices=4)
    given = dict(pairwise(words))
    assert words[:2] == ["-m", "lmms_eval"]
    assert given["--tasks"].split(",") == [BENCHMARKS[n].task for n in FIVE]
    assert given["--gen_kwargs"].startswith(
        "temperature=0.7,top_p=0.8,top_k=20,presence_penalty=1.5,n=1,seed=7"
    )
    assert '{"min_pixels": 262144, "max_pixels": 1048576}' in given["--model_args"]
    assert "tensor_parallel_size=4" in given["--model_args"]
    text = command("/m", ["GSM8K"])
    assert text[:3] == ["-m", "lm_eval", "run"]
    assert dict(pairwise(text))["--model"] == "hf"
    assert "tensor_parallel_size" not in " ".join(text)
    assert dict(pairwise(command("/m", ["GSM8K"], devices=2)))["--model"] == "vllm"
    with pytest.raises(ValueError, match="splits at commas"):
        command("/a,b", FIVE)


def test_the_task_file_of_ours_is_the_one_that_the_command_names():
    (file,) = benchmarks.TASKS.glob("*.yaml")
    text = file.read_text()
    row = BENCHMARKS["ZeroBench"]
    for line in (f"task: {row.task}", f"dataset_path: {row.dataset}", f"test_split: {row.split}"):
        assert line + "\n" in text


def test_a_list_that_cannot_be_run_is_refused():
    refused = {
        "no benchmark named": [],
        "Unknown benchmark 'MathVist'. Did you mean 'MathVista'": ["MathVist"],
        "one run for each": ["MMMU", "GSM8K"],
        "more than once": ["MMMU", "MMMU"],
    }
    for said, names in refused.items():
        with pytest.raises(ValueError, match=said):
            check_benchmarks(names)


def test_what_is_missing_costs_no_directory(tool, model, tmp_path, monkeypatch):
    for version, said in {
        "": r"lmms-eval missing, .*pip install lmms-eval==0.7.3",
        "0.5.0": r"lmms-eval 0.5.0, not 0.7.3: .*pip install lmms-eval==0.7.3",
    }.items():
        tool(version=version)
        with pytest.raises(BenchmarkError, match=said):
            evaluate(model, tmp_path)
    tool()
    (model / "config.json").rename(model / "adapter_config.json")
    with pytest.raises(FileNotFoundError, match=r"no config\.json: .*merge an adapter"):
        evaluate(model, tmp_path)
    (model / "adapter_config.json").rename(model / "config.json")
    monkeypatch.setenv(PYTHON, str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        evaluate(model, tmp_path)
    monkeypatch.delenv(PYTHON)
    with pytest.raises(ValueError, match=f"{PYTHON}=FOLDER/bin/python"):
        evaluate(model, tmp_path)
    assert not (tmp_path / "run").exists()


MMMU = "mmmu_val_reasoning"
# What the tool does -> what is said of it.
UNUSABLE = [
    ({"status": 3}, "status 3.*this is what the tool said"),
    ({"silent": True}, "0 results files.*this is what the tool said"),
    ({"model": "another/model"}, "results of 'another/model'"),
    ({"shares": {**SHARES, MMMU: {"llm_as_judge_eval,none": 0.5}}}, "MMMU: no"),
    ({"shares": {k: v for k, v in SHARES.items() if "wemath" not in k}}, "WeMath: no wemath_"),
    ({"questions": {**QUESTION_COUNTS, MMMU: 899}}, "MMMU: 899 questions, the protocol has 900"),
    ({"shares": {**SHARES, MMMU: {"acc_score,none": 65.1}}}, "65.1, not a share"),
    ({"shares": {**SHARES, MMMU: {"acc_score,none": float("nan")}}}, "nan, not a share"),
]


def test_results_that_are_not_what_was_asked_for_fail_the_run(tool, model, tmp_path):
    for number, (changes, said) in enumerate(UNUSABLE):
        folder = tmp_path / f"run-{number}"
        tool(**changes)
        with pytest.raises(BenchmarkError, match=f"(?s){said}"):
            evaluate(model, tmp_path, run_dir=folder)
        assert state_of(folder) == "failed"
        assert not (folder / "metrics.json").exists()


TOY = Benchmark(TEXT, "toy_sums", "toy", "test", 8, "exact_match,last-number")


def test_what_lm_eval_wrote_is_read(monkeypatch):
    """A results file that lm-eval 0.4.13 wrote for eight toy questions, cut to what is read."""
    monkeypatch.setitem(BENCHMARKS, "toy", TOY)
    results = json.loads((FIXTURES / "lm_eval_results.json").read_text())
    score = score_of(results, "toy", results["model_name"])
    assert score["benchmark/toy"] * 8 == pytest.approx(round(score["benchmark/toy"] * 8))
    assert score["benchmark/toy_low"] < score["benchmark/toy"] < score["benchmark/toy_high"]
    assert score["benchmark/toy_questions"] == 8
