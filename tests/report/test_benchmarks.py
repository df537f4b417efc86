"""Benchmarks: the command, what is refused, and how the tools' results are read."""

import json
import math
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from rlsd_lib.report import benchmarks
from rlsd_lib.report.benchmarks import BENCHMARKS, Benchmark, check_benchmarks, command, read_scores
from rlsd_lib.report.paper_numbers import BENCHMARKS as PAPERS

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


def write(folder: Path, shares: dict = SHARES, questions: dict = QUESTION_COUNTS) -> Path:
    """A results file as lmms-eval writes it, beside a file of samples."""
    inner = folder / "model"
    inner.mkdir(parents=True)
    counts = {task: {"original": n, "effective": n} for task, n in questions.items()}
    results = {"results": shares, "n-samples": counts}
    (inner / "2026-11-25T10-00-00_results.json").write_text(json.dumps(results))
    (inner / "2026-11-25T10-00-00_samples_mmmu_val_reasoning.jsonl").write_text("{}\n")
    return folder


def test_the_five_benchmarks_of_the_paper_are_read(tmp_path):
    scores = read_scores(write(tmp_path / "after"), FIVE)
    assert list(scores) == FIVE
    assert scores["MathVista"].mean == 0.762
    assert scores["WeMath"].mean == pytest.approx(0.5657)
    assert scores["ZeroBench"].low < 76 / 334 < scores["ZeroBench"].high
    assert math.isnan(scores["WeMath"].low)  # a score of groups, without a standard error
    assert read_scores(tmp_path / "before", FIVE) == {}


def test_the_command_is_that_of_the_protocol():
    words = shlex.split(command("/m", FIVE, Path("/run/benchmarks/after"), seed=7, devices=4))
    given = dict(pairwise(words))
    # No paid judge, even where there is a key.
    environment = ["env", "USE_LLM_JUDGE=False", "OPENAI_API_KEY=unused"]
    assert words[:6] == [*environment, "python", "-m", "lmms_eval"]
    assert given["--tasks"].split(",") == [BENCHMARKS[n].task for n in FIVE]
    assert given["--gen_kwargs"].startswith(
        "temperature=0.7,top_p=0.8,top_k=20,presence_penalty=1.5,n=1,seed=7"
    )
    assert '{"min_pixels": 262144, "max_pixels": 1048576}' in given["--model_args"]
    assert "tensor_parallel_size=4" in given["--model_args"]
    assert given["--output_path"] == "/run/benchmarks/after"
    text = shlex.split(command("/m", ["GSM8K"], Path("/out")))
    assert text[4:7] == ["-m", "lm_eval", "run"]
    assert dict(pairwise(text))["--model"] == "hf"
    assert "tensor_parallel_size" not in " ".join(text)
    on_cards = shlex.split(command("/m", ["GSM8K"], Path("/out"), devices=2))
    assert dict(pairwise(on_cards))["--model"] == "vllm"
    with pytest.raises(ValueError, match="splits at commas"):
        command("/a,b", FIVE, Path("/out"))


def test_the_task_file_of_ours_is_the_one_that_the_command_names():
    (file,) = benchmarks.TASKS.glob("*.yaml")
    assert f"task: {BENCHMARKS['ZeroBench'].task}\n" in file.read_text()


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
    assert check_benchmarks(FIVE) == "lmms-eval"


MMMU = "mmmu_val_reasoning"
# What the tool wrote -> what is said of it.
UNUSABLE = [
    ({"shares": {**SHARES, MMMU: {"llm_as_judge_eval,none": 0.5}}}, "MMMU: no"),
    ({"shares": {k: v for k, v in SHARES.items() if "wemath" not in k}}, "WeMath: no wemath_"),
    ({"questions": {**QUESTION_COUNTS, MMMU: 899}}, "MMMU: 899 questions, the benchmark has 900"),
    ({"shares": {**SHARES, MMMU: {"acc_score,none": 65.1}}}, "65.1, not a share"),
    ({"shares": {**SHARES, MMMU: {"acc_score,none": float("nan")}}}, "nan, not a share"),
]


def test_results_that_are_not_what_was_asked_for_are_refused(tmp_path):
    for number, (changes, said) in enumerate(UNUSABLE):
        with pytest.raises(ValueError, match=said):
            read_scores(write(tmp_path / str(number), **changes), FIVE)
    write(tmp_path / "twice" / "a")
    write(tmp_path / "twice" / "b")
    with pytest.raises(ValueError, match="2 results files, expected one"):
        read_scores(tmp_path / "twice", FIVE)


def test_what_lm_eval_wrote_is_read(tmp_path, monkeypatch):
    """A results file that lm-eval 0.4.13 wrote for eight toy questions, cut to what is read."""
    toy = Benchmark("lm-eval", "toy_sums", 8, "exact_match,last-number")
    monkeypatch.setitem(BENCHMARKS, "toy", toy)
    (tmp_path / "results_date.json").write_text((FIXTURES / "lm_eval_results.json").read_text())
    score = read_scores(tmp_path, ["toy"])["toy"]
    assert score.mean * 8 == pytest.approx(round(score.mean * 8))
    assert score.low < score.mean < score.high
