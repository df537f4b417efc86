"""The benchmark: equal work for all, honest arithmetic, a table and a trace."""

import dataclasses
import re
from functools import partial

import pandas as pd
import pytest
import tiny
import torch

from rlsd_lib.__main__ import main
from rlsd_lib.experiment import bench
from rlsd_lib.experiment.bench import Sizes, contenders, preset_trainer
from rlsd_lib.experiment.plan import Plan, config_named, plan_of, shape_of
from rlsd_lib.experiment.presets import PRESETS

TINY = Sizes(prompt=24, completion=6, generations=4, vocabulary=120, reference=8)
PAIRS = [f"-p{name}={value}" for name, value in vars(TINY).items() if name != "model"]


@pytest.fixture
def here(monkeypatch):
    """Turns are taken in this process, and their peaks are those given."""
    peaks = {"GRPO": 9000.0, "RLSD": 13500.0}

    def train(build, name, *rest):
        steps, rollouts, _ = bench.train(build, name, *rest)
        return steps, rollouts, peaks.get(name, 9900.0)

    monkeypatch.setattr(bench, "train_apart", train)


def test_lengths_are_exact(tmp_path):
    tokenizer, row = TINY.make_tokenizer(), TINY.make_rows(1)[0]
    assert len(tokenizer(row["prompt"])["input_ids"]) == TINY.prompt
    shown = row["prompt"] + " " + row["privileged_context"]
    assert len(tokenizer(shown)["input_ids"]) == TINY.prompt + TINY.reference
    trainer = TINY.build("RLSD", tmp_path, 1)
    trainer.train()
    seen = trainer.state.log_history[0]
    assert seen["completions/min_length"] == seen["completions/max_length"] == TINY.completion
    assert seen["rlsd/gap_abs_mean"] > 0


def test_all_trainers_train_on_the_rollouts_of_the_first(here, monkeypatch):
    """Also TRL's own, each with its own code for generation."""
    seen, reward = {}, bench._reward

    def spied(completions, **columns):
        seen.setdefault(tuple(completions), 0)
        seen[tuple(completions)] += 1
        return reward(completions, **columns)

    monkeypatch.setattr(bench, "_reward", spied)
    names = list(contenders())
    table = bench.race(TINY.build, names[1:], steps=1)
    # A warm-up step and a timed one, with the same rollouts for both and for everyone.
    assert list(seen.values()) == [2 * len(names)]
    assert (table["without generation, s"] > 0).all()
    assert table["generation, s"].nunique() == 1
    ours = ["RLSD", "RLSD, plain pass", "OPSD", "RLSD, LoRA"]
    assert list(table.index[table["teacher pass, s"].notna()]) == ours
    assert table.loc["GRPO", "step / GRPO"] == 1


def test_a_preset_is_raced_on_its_own_task(here, monkeypatch):
    # Nothing is pretrained for this.
    loaded = tiny.model(), tiny.tokenizer()
    monkeypatch.setattr("rlsd_lib.experiment.experiment.load_model", lambda *_, **__: loaded)
    table = bench.race(partial(preset_trainer, "smoke"), ["RLSD"], steps=1)
    assert table["teacher pass, s"].isna().tolist() == [True, False]
    assert (table["step, s"] > table["generation, s"]).all()


def test_the_command_prints_the_race(here, capsys):
    command = ["bench", "--steps", "1", "--rounds", "1", *PAIRS]
    assert main([*command, "--against", "GRPO", "RLSD"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("RLSD ")
    assert printed[-1].split()[-1] == "1.500"
    assert main([*command, "--against", "GRPo"]) == 2
    assert "Did you mean 'GRPO'?" in capsys.readouterr().err


def test_bad_sizes_are_refused(capsys):
    for words, message in (
        (["--against", "GRPO", "-p", "promt=3"], "Unknown size 'promt'. Did you mean 'prompt'?"),
        (["--against", "GRPO", "-p", "prompt=0"], "prompt=0: expected a whole number >= 1"),
        (["--against", "GRPO", "-p", "generations=1"], "generations=1: expected 2 or more"),
        (["-p", "prompt=1"], "-p prompt=1: a size of synthetic rollouts"),
    ):
        assert main(["bench", *words]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_peak_memory_is_of_a_process_of_its_own():
    held = torch.ones(2**28)  # 1 GiB of this process, which is no part of the other's peak
    steps, rollouts, peak = bench.train_apart(TINY.build, "RLSD", 1, {})
    assert 1 < peak < held.numel() * 4 / 2**21
    assert len(steps) == 1
    assert len(rollouts) == 2
    with pytest.raises(ValueError, match="Did you mean 'RLSD'"):
        bench.train_apart(TINY.build, "RLSB", 1, {})


# Real sizes, a profile, records


def test_plans_read_what_a_gpu_reached(here, tmp_path):
    """The path of `--gpu` at tiny size on a CPU."""
    table = bench.measure(TINY)
    assert [name.partition(", ")[2] for name in table.index] == list(contenders())
    folder = tmp_path / "outputs" / "tables"
    folder.mkdir(parents=True)
    table.to_csv(folder / "bench_gpu.csv")
    plan, base = plan_of(PRESETS["qwen3-text"], gpus=1), table.iloc[0]
    assert plan.mfu == pytest.approx(base["mfu"])
    assert str(folder / "bench_gpu.csv") in plan.speeds
    assert plan_of(PRESETS["qwen3-text"], gpus=1, mfu=0.3).mfu == 0.3
    # The plan of what was measured, at the measured speed, says what was measured.
    shape, speed = shape_of(TINY.config()), {"mfu": base["mfu"], "gradient_checkpointing": False}
    same = Plan(shape, 1, TINY.prompt, TINY.completion, TINY.generations, **speed).grpo
    spent = same.step() - same.seconds()["generation"]
    assert spent == pytest.approx(base["without generation, s"])


def test_a_trainer_that_runs_out_of_memory_leaves_an_empty_row(monkeypatch):
    def train(build, name, *_):
        if name == "RLSD":
            raise torch.OutOfMemoryError("no room")
        return [{"without generation, s": 2.0, "generation, s": 1.0}], {}, 100.0

    monkeypatch.setattr(bench, "train_apart", train)
    table = bench.race(TINY.build, ["RLSD", "OPSD"])
    assert table["step, s"].fillna(0).tolist() == [3, 0, 3]
    assert table.loc["OPSD", "step / GRPO"] == 1


def test_real_sizes_are_those_of_the_named_model():
    sizes = dataclasses.replace(TINY, model="Qwen/Qwen3-0.6B")
    assert shape_of(sizes.config()) == shape_of(config_named("Qwen/Qwen3-0.6B"))
    assert sizes.words == 151936 - 3
    assert sizes.rows == 2


def test_without_a_gpu_it_says_what_it_needs(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["bench", "--gpu"]) == 2
    assert "--gpu needs an NVIDIA GPU" in capsys.readouterr().err


def test_a_profile_is_a_table_of_operators_and_a_trace_of_functions(tmp_path, capsys):
    assert main(["bench", "--profile", *PAIRS]) == 0
    printed = capsys.readouterr().out
    assert "aten::mm" in printed
    trace = tmp_path / "outputs" / "profiles" / "teacher_pass.json"
    assert str(trace) in printed
    assert float(re.search(r"floor .*: (.*) x", printed)[1]) > 0.9
    traced, functions = trace.read_text(), ("teacher_prompts", "_read_prompts", "update")
    assert [name for name in functions if f": {name}" not in traced] == []


def test_a_bench_in_words():
    table = pd.DataFrame({"step / GRPO": [1.0, 1.2]}, index=["GRPO", "RLSD"])
    assert bench.in_words(table) == "of GRPO's step: RLSD 1.200"
    models = table.rename(index="small, {}".format)
    assert bench.in_words(models) == "of GRPO's step: small, RLSD 1.200"


def test_the_command_records_what_it_measured(tmp_path, monkeypatch, capsys):
    table = pd.DataFrame({"step / GRPO": [1.0, 1.2]}, index=["GRPO", "RLSD"])
    monkeypatch.setattr(bench, "race", lambda *_, **__: table)
    assert main(["bench", "--preset", "lab", "--record"]) == 0
    (path,) = (tmp_path / "outputs" / "tables" / "machines").glob("*.json")
    assert str(path) in capsys.readouterr().out
    assert "bench --preset lab" in path.read_text()
