"""`rlsd run --dry-run`: what it says, what it catches, and that it opens no connection."""

import json
import re
import socket
from dataclasses import replace
from typing import Any

import pytest
import tiny_vlm
from datasets import Dataset

from rlsd_lib.__main__ import main
from rlsd_lib.experiment import preflight
from rlsd_lib.experiment.experiment import Experiment
from rlsd_lib.experiment.preflight import Findings, check_rows, dry_run, resolve
from rlsd_lib.runs.paths import find_notebook
from rlsd_lib.tasks import Task, load_task
from rlsd_lib.tasks.encode import encode, messages_of, prompt_lengths


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def check(preset: str = "smoke-vl", method: str = "rlsd", **parameters: Any) -> Findings:
    return dry_run("15_rlsd", {"preset": preset, "method": method, **parameters})


def test_a_preset_passes_offline_and_says_what_it_does(capsys, tmp_path):
    expected = {
        "qwen3-vl-8b": (
            "2048 rollouts per step = 256 prompts x 8 = 8 processes x 2 rows x 128",
            "learning_rate                1e-06",
            "lambda_decay_steps           50",
            "--num-processes 8 --accelerate fsdp2",
            "-m rlsd_lib.experiment.launch RUN_DIR",
            "not checked  the rows of mmfinereason",
        ),
        "qwen3-vl-8b-script": ("lambda_decay_steps           60", "'weighted'"),
        "qwen3-text": (
            "256 rollouts per step = 32 prompts x 8 = 1 processes x 4 rows x 64",
            "LoRA {'r': 32",
            "learning_rate                1e-05",
        ),
        "qwen3-text-full": (
            "all weights",
            "not checked  Qwen/Qwen3-1.7B is not on this machine",
        ),
        "smoke-vl": (
            "32 rollouts per step = 4 prompts x 8",
            "131 training and 8 test rows",
            "the trainer takes every row",
            "0 over 512 will be left out",
        ),
    }
    for preset, texts in expected.items():
        assert main(["run", "15_rlsd", "-p", f"preset={preset}", "--dry-run"]) == 0
        printed = capsys.readouterr().out
        for text in (*texts, f"rlsd run 15_rlsd -p method=rlsd -p preset={preset}"):
            assert text in printed, preset
        assert "WRONG" not in printed, preset
    assert not list((tmp_path / "outputs").glob("**/manifest.json")), "a run was begun"


def test_what_cannot_be_resolved_is_an_error(capsys):
    for words, said in (
        (["preset=qwen3-vl"], "Did you mean 'qwen3-vl-8b'"),
        (["preset=smoke-vl", 'overrides={"lambda_inti": 1}'], "lambda_init"),
        (["preset=smoke-vl", "control=shufled"], "shuffled"),
        (["preset=smoke-vl", "control=peer"], "Unknown control 'peer'"),
        (["preset=smoke-vl", "methd=rlsd"], "method"),
        (["preset=qwen3-vl-8b", "method=grpo_opsd"], "distillation_weight"),
        (
            ["preset=qwen3-vl-8b", 'overrides={"per_device_train_batch_size": 3}'],
            "cannot be shared",
        ),
        (["preset=qwen3-vl-8b", 'overrides={"num_generations": 7}'], "divisible"),
    ):
        pairs = [part for word in words for part in ("-p", word)]
        assert main(["run", "15_rlsd", *pairs, "--dry-run"]) == 2, words
        assert said in capsys.readouterr().err, words


def test_processes_that_cannot_share_the_batch():
    for count in (6, 4096):
        with pytest.raises(ValueError, match=f"num_processes={count} does not divide the batch"):
            check("qwen3-vl-8b", num_processes=count)
    for count in (1, 8, 16, 32):
        assert "2048 rollouts per step" in check("qwen3-vl-8b", num_processes=count).text()


def test_lengths_and_sizes_that_do_not_fit():
    for overrides, said in (
        ({"max_prompt_length": 50}, "max_prompt_length=50: every train prompt is longer, the"),
        ({"max_teacher_prompt_length": 300}, "no room in "),
        ({"max_completion_length": 1000}, "may take 1768 positions, the model has 1024"),
        ({"train_size": 1000}, "train_size=1000: expected 1 to 131 rows"),
        ({"task_options": {"reward": "half"}}, "reward 'half'"),
    ):
        wrong = check(overrides=overrides).wrong
        assert any(said in line for line in wrong), (overrides, wrong)


def test_vllm_needs_room_for_prompt_and_completion():
    (wrong,) = check("qwen3-vl-8b", overrides={"vllm_max_model_length": 4096}).wrong
    assert "vllm_max_model_length=4096 is less than max_prompt_length=4096 + " in wrong


def test_a_folder_of_rows_is_checked(tmp_path, capsys):
    row = {"problem": "1+1?", "answer": "2", "problem_type": "math", "data_type": "text"}
    row |= {"images": [], "videos": [], "qwen3vl_235b_thinking_response": "two"}
    rows = [row | {"problem": f"{i}+1?"} for i in range(40)]

    def verdict(rows: list[dict]) -> int:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "rows.jsonl").write_text(text)
        overrides = json.dumps({"task_options": {"source": str(tmp_path)}, "test_size": 2})
        words = ["-p", "preset=qwen3-vl-8b", "-p", f"overrides={overrides}"]
        return main(["run", "15_rlsd", *words, "--dry-run"])

    assert verdict(rows) == 0
    assert "2 test rows" in capsys.readouterr().out
    assert verdict([{k: v for k, v in row.items() if k != "problem_type"} for row in rows]) == 2
    assert "has no problem_type" in capsys.readouterr().out
    assert verdict([row | {"answer": ""} for row in rows]) == 2
    assert "'dropped: empty': 40" in capsys.readouterr().out


def test_rows_that_show_the_student_the_reference_are_found():
    turn = [{"role": "user", "content": "Is it 1 : 2, 1 : 3 or 1 : 4?"}]
    data = Dataset.from_dict({"prompt": [turn] * 2, "privileged_context": ["1 : 2", "4"]})
    task = Task("ratios", data, data, lambda text, row: True, "reference")
    run = {"preset": "smoke", "method": "rlsd"}
    with pytest.raises(ValueError, match=r"1 dataset rows hold .* own prompt \(rows 0\)"):
        check_rows(resolve(run), task)
    # What the teacher is shown under a control is what counts.
    for harmless in ({"control": "noise"}, {"method": "grpo"}, {"method": "opd"}):
        check_rows(resolve({**run, **harmless}), task)
    blank = replace(task, train=task.train.remove_columns("privileged_context"))
    with pytest.raises(ValueError, match="needs a 'privileged_context' column"):
        check_rows(resolve(run), blank)


def test_a_preset_without_a_prompt_limit_has_no_plan():
    assert "no `rlsd plan`: The preset does not say how long a prompt is" in check("smollm2").text()


def test_a_control_sets_the_same_fields_as_in_the_run_itself():
    found = dry_run(
        "15_rlsd", {"preset": "smoke-vl", "method": "rlsd", "overrides": {"peer_context": True}}
    )
    assert re.search(r"peer_context +True", found.text())


def test_a_credit_that_the_workbook_cannot_train_is_refused_before_a_directory_is_claimed(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("RLSD_OUTPUTS", str(tmp_path))
    run = {"method": "rlsd_thought_only", "preset": "smoke"}
    for begin in (lambda: dry_run("16_credits", run), lambda: Experiment(**run)):
        with pytest.raises(ValueError, match=r"'rlsd_thought_only' asks for thought.*signals=fn"):
            begin()
    assert not any(tmp_path.iterdir())


def test_every_typo_is_found_before_anything_exists(tmp_path, monkeypatch):
    monkeypatch.setenv("RLSD_OUTPUTS", str(tmp_path))
    base = {"method": "rlsd", "preset": "smoke"}
    assert preflight.check([base]) == []
    for change, said in (
        ({"preset": "smok"}, "Did you mean 'smoke'"),
        ({"method": "rsld"}, "Did you mean 'rlsd'"),
        ({"control": "shufled"}, "Did you mean 'shuffled'"),
        ({"max_steps": 0}, "max_steps=0: expected a step count >= 1"),
        ({"seed": -1}, "seed=-1"),
        ({"overrides": {"epsilonw": 0.5}}, "Did you mean 'epsilon_w'"),
        ({"overrides": {"loss_type": "dappo"}}, "Did you mean 'dapo'"),
        ({"overrides": {"scale_rewards": "grup"}}, "Did you mean 'group'"),
        ({"overrides": {"importance_sampling_level": "tokn"}}, "Did you mean 'token'"),
        ({"overrides": {"lr_scheduler_type": "liner"}}, "liner"),
        ({"overrides": {"model_options": {"digitz": 2}}}, "Did you mean 'digits'"),
        ({"overrides": {"task_options": {"digitz": 2}}}, "digitz"),
    ):
        with pytest.raises((ValueError, TypeError), match=said):
            preflight.check([{**base, **change}])
    assert not any(tmp_path.iterdir())


def test_what_changes_nothing_is_told():
    for method, overrides, said in (
        ("grpo", {"epsilon_w": 0.5}, "epsilon_w=0.5 changes nothing for method='grpo'"),
        ("rlsd", {"epsilon_w": 0.5, "lambda_init": 1.0}, None),
        ("rlsd", {"epsilon": 0.5}, "the weight's clip is epsilon_w"),
        ("grpo", {"epsilon": 0.5}, None),
        ("rlsd", {"teacher_update_rate": 0.5}, "teacher_update_rate=0.5 changes nothing"),
        ("rlsd", {"teacher_update_rate": 0.5, "teacher_model_kind": "ema"}, None),
        ("opsd", {"lambda_init": 1.0}, "lambda_init=1.0 changes nothing for method='opsd'"),
    ):
        found = preflight.check([{"method": method, "preset": "smoke", "overrides": overrides}] * 2)
        assert len(found) == (said is not None), (method, overrides)
        assert said is None or said in found[0]


def test_a_notebook_that_trains_nothing_is_refused(capsys):
    assert main(["run", "20_compare", "--dry-run"]) == 2
    assert "trains nothing" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["qwen3-vl", "qwen2.5-vl"])
def test_lengths_are_those_of_the_processor(family):
    rows = load_task("colours", train_size=12, test_size=1, seed=0).train
    made = tiny_vlm.processor(family)
    exact = [int(encode(made, [messages_of(row)])["attention_mask"].sum()) for row in rows]
    assert prompt_lengths(rows, made) == exact
    assert len(set(exact)) > 3


def test_lengths_of_a_family_that_writes_more_around_an_image_are_close():
    """Gemma 3 puts blank lines and marks around each image, which its own count leaves out."""
    rows = load_task("colours", train_size=12, test_size=1, seed=0).train
    made = tiny_vlm.processor("gemma3")
    exact = [int(encode(made, [messages_of(row)])["attention_mask"].sum()) for row in rows]
    for row, found, wanted in zip(rows, prompt_lengths(rows, made), exact, strict=True):
        assert 0 <= wanted - found <= 6 * len(row["images"])


def test_the_words_of_the_command_can_be_given_again(capsys):
    words = ["-p", "preset=smoke-vl", "-p", 'overrides={"max_prompt_length": 400}']
    main(["run", "15_rlsd", *words, "--dry-run"])
    printed = capsys.readouterr().out
    assert """-p 'overrides={"max_prompt_length": 400}'""" in printed


def test_the_plan_and_the_command_are_those_of_the_run_and_not_of_the_preset():
    run = {"preset": "qwen3-vl-8b", "method": "rlsd", "seed": 0, "control": "none"}
    changes = {"max_completion_length": 256, "gradient_checkpointing": False}
    asked = {"max_steps": -1, "num_processes": 1, "benchmarks": ["MMMU"], "runs_dir": ""}
    found = dry_run("40_qwen3_vl", {**run, **asked, "overrides": changes})
    planned = " ".join(found.text().split())
    assert "max_completion_length=256" in planned
    assert "gradient_checkpointing=False" in planned
    assert """-p 'benchmarks=["MMMU"]'""" in planned
    assert "runs_dir" not in planned.partition("start it with")[2]


def test_a_notebook_of_ones_own_is_checked_and_started_by_its_path(tmp_path, capsys):
    own = tmp_path / "mine.ipynb"
    own.write_bytes(find_notebook("15_rlsd").read_bytes())
    assert main(["run", str(own), "-p", "preset=smoke", "--dry-run"]) == 0
    assert f"rlsd run {own} -p method=rlsd" in capsys.readouterr().out
