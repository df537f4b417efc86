"""The benchmark: equal work for all, honest arithmetic, a table and a trace."""

import dataclasses
import json
import re
from collections import Counter
from functools import partial

import pandas as pd
import pytest
import tiny
import torch

from rlsd_lib.__main__ import main
from rlsd_lib.experiment import bench
from rlsd_lib.experiment.bench import Sizes, contenders, preset_trainer
from rlsd_lib.experiment.plan import MEASURED, RESERVED, Plan, plan_of, shape_of
from rlsd_lib.experiment.presets import PRESETS
from rlsd_lib.methods import METHODS
from rlsd_lib.runs import machines
from rlsd_lib.tasks.models import config_named

TINY = Sizes(prompt=24, completion=6, generations=4, vocabulary=120, reference=8)
PAIRS = [f"-p{name}={value}" for name, value in vars(TINY).items() if name != "model"]


def train_here(build, name, *rest):
    """A turn in this process, whose peak is the one given."""
    steps, rollouts = bench.train(build, name, *rest)
    peak = {"GRPO": 9000.0, "RLSD": 13500.0}.get(name, 9900.0)
    return [{**step, "peak MiB": peak} for step in steps], rollouts


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(bench, "train_apart", train_here)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """All that `--gpu` does, at tiny size: its table, its folder, how often a group was rewarded."""
    folder, seen, reward = tmp_path_factory.mktemp("tables"), Counter(), bench._reward

    def spied(completions, **columns):
        seen[tuple(completions)] += 1
        return reward(completions, **columns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "train_apart", train_here)
        patch.setattr(bench, "_reward", spied)
        [(model, table)] = bench.bench_gpu(folder, [TINY])
    assert model == "synthetic"
    return table, folder, seen


def test_lengths_are_exact(tmp_path):
    trainer = TINY.build("RLSD", tmp_path, 1)
    tokenizer, row = trainer.processing_class, TINY.make_rows(1)[0]
    assert len(tokenizer(row["prompt"])["input_ids"]) == TINY.prompt
    shown = row["prompt"] + " " + row["privileged_context"]
    assert len(tokenizer(shown)["input_ids"]) == TINY.prompt + TINY.reference
    trainer.train()
    seen = trainer.state.log_history[0]
    assert seen["completions/min_length"] == seen["completions/max_length"] == TINY.completion
    assert seen["rlsd/gap_abs_mean"] > 0


def test_all_trainers_train_on_the_rollouts_of_the_first(measured):
    """Also TRL's own, each with its own code for generation."""
    table, _, seen = measured
    names = list(contenders())
    assert list(table.index) == names
    # A warm-up step and a timed one, with the same rollouts for both and for everyone.
    assert list(seen.values()) == [2 * len(names)]
    assert (table["without generation, s"] > 0).all()
    assert table["generation, s"].nunique() == 1
    ours = ["RLSD", "RLSD, plain pass", "OPSD", "RLSD, LoRA"]
    assert list(table.index[table["teacher pass, s"].notna()]) == ours
    assert table.loc["GRPO", "step / GRPO"] == 1


def test_rows_of_the_methods_table_race_with_all_that_they_need(tmp_path):
    """Another teacher, a reference model, what `signals` gives; a weight; a wrong reference."""
    needy = [row for row in METHODS if bench.from_caller(METHODS[row].credit)]
    for row in (*needy, *bench.NEEDS, "opd", "cepo"):
        trainer = TINY.build(row, tmp_path, 2)
        assert trainer.args.method == row
        assert (trainer.ref_model is not None) == (row == "sdpg")
        if row in ("opd", "oracle_value"):
            trainer.train()
            assert trainer.state.global_step == 2


def test_a_preset_is_raced_on_its_own_task(here, monkeypatch):
    # Nothing is pretrained for this.
    loaded = tiny.model(), tiny.tokenizer()
    monkeypatch.setattr("rlsd_lib.experiment.experiment.load_model", lambda *_, **__: loaded)
    table = bench.race(partial(preset_trainer, "smoke"), ["RLSD"], steps=1)
    assert table["teacher pass, s"].isna().tolist() == [True, False]
    assert (table["step, s"] > table["generation, s"]).all()


def test_the_command_prints_the_race(here, capsys):
    command = ["bench", "--steps", "1", "--rounds", "1", *PAIRS]
    assert main([*command, "--against", "GRPO", "sdar", "RLSD"]) == 0
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
    steps, rollouts = bench.train_apart(TINY.build, "RLSD", 1, {})
    [step] = steps
    assert 1 < step["peak MiB"] < held.numel() * 4 / 2**21
    assert list(rollouts) == [2]
    with pytest.raises(ValueError, match="Did you mean 'RLSD'"):
        bench.train_apart(TINY.build, "RLSB", 1, {})


# Real sizes, a profile, records


def test_plans_read_what_a_gpu_reached(measured, tmp_path):
    table, folder, _ = measured
    reached = table.loc["GRPO", list(MEASURED)].astype(float)
    assert reached.notna().all()
    assert table.loc["GRPO", "planned generation, s"] * Plan.mbu == pytest.approx(
        reached["mbu"] * table.loc["GRPO", "generation, s"]
    )
    # The peak of GRPO in these tests is 9,000 MiB, of which one part is what the factor scales.
    grown = dataclasses.replace(TINY.plan.grpo, activations=reached["activations"])
    assert grown.peak("update") * 1024 == pytest.approx(9000 + RESERVED * 1024)
    tables, preset = tmp_path / "outputs" / "tables", PRESETS["qwen3-text"]
    tables.mkdir(parents=True)

    def plan_from(**columns):
        table = pd.DataFrame({"trainer": ["a", "b", "c"], **columns})
        table.to_csv(tables / "bench_gpu.csv", index=False)
        return plan_of(preset, gpus=1, use_vllm=False)

    # An older bench wrote mfu alone. Whichever model reached most; one without room has no number.
    plan = plan_from(mfu=[0.2, 0.1, None])
    assert (plan.mfu, plan.mbu, plan.activations) == (0.2, Plan.mbu, 1.0)
    assert plan.speeds == f"mfu measured, {tables / 'bench_gpu.csv'}; others assumed"
    plan = plan_from(mfu=[0.3, None, 0.1], mbu=[0.5, "none", ""], x=[1, 2, 3])
    assert (plan.mfu, plan.mbu, plan.activations) == (0.3, 0.5, 1.0)
    assert "mfu, mbu measured" in plan.speeds
    given = plan_of(preset, gpus=1, mfu=0.35)
    assert given.use_vllm
    assert given.speeds == Plan.speeds
    assert (given.mfu, given.mbu) == (0.35, Plan.mbu), "transformers' speed for vLLM's"
    assert plan_from(mfu=[None] * 3).speeds == Plan.speeds
    (folder / "bench_gpu.csv").replace(tables / "bench_gpu.csv")  # as it was written
    plan = plan_of(preset, gpus=1, use_vllm=False)
    found = plan.mfu, plan.mbu, plan.activations
    assert found == pytest.approx(tuple(reached), rel=5e-3), "to three digits"
    assert "mfu, mbu, activations measured" in plan.speeds


@pytest.fixture
def minute(monkeypatch):
    """A bench whose models take a minute each, and the time that is left after each."""
    clock = [0.0]

    def measure(sizes):
        clock[0] += 60
        columns = [*bench.RATIOS.values()]
        return pd.DataFrame([[1.0] * 3, [1.2] * 3], index=["GRPO", "RLSD"], columns=columns)

    monkeypatch.setattr(bench.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_models_that_would_end_too_late_are_left_out_by_name(minute, tmp_path, capsys, monkeypatch):
    for budget, count in ((0, 1), (119, 1), (121, 2), (200, 3)):
        monkeypatch.setattr(bench, "BUDGET", budget)
        names = [name for name, _ in bench.bench_gpu(tmp_path)]
        every = [sizes.model for sizes in bench.REAL]
        assert names == every[:count], budget
        left = "".join(capsys.readouterr())
        assert [name for name in every if name in left] == every[count:]
    written = pd.read_csv(tmp_path / "bench_gpu.csv")["trainer"]
    assert list(written) == [f"{m}, {name}" for m in every for name in ("GRPO", "RLSD")]


def test_each_model_is_recorded_as_soon_as_it_is_measured(minute, tmp_path, monkeypatch):
    """The second is cut off; what the first showed is kept."""
    whole = bench.measure

    def measure(sizes):
        if sizes.model.endswith("0.6B"):
            raise KeyboardInterrupt
        return whole(sizes)

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(machines, "machine_name", lambda: "A card")
    assert main(["bench", "--gpu", "--record"]) == 130
    [path] = (tmp_path / "outputs" / "tables" / "machines").glob("*.json")
    [(what, row)] = json.loads(path.read_text())["rows"].items()
    assert what == "`rlsd bench --gpu`, Qwen3-1.7B, generation included"
    assert row["result"] == "of GRPO's step: RLSD 1.200"


def test_plans_stand_beside_what_was_measured(measured):
    """At the speed that GRPO reached, where a plan is known; peaks less what torch does not count."""
    table, folder, _ = measured
    assert (folder / "bench_gpu.png").stat().st_size > 10_000
    plan = dataclasses.replace(TINY.plan, mfu=table.loc["GRPO", "mfu"])
    alone = dataclasses.replace(plan, num_generations=1)
    lora = dataclasses.replace(plan, lora_rank=8)
    expected = {
        "GRPO": plan.grpo,
        "GRPO, completion head": plan.grpo,
        "RLSD": plan,
        "RLSD, plain pass": alone,
        "GRPO, LoRA": lora.grpo,
        "RLSD, LoRA": lora,
    }
    found = table.filter(like="planned")
    assert list(found.index[found.notna().all(axis=1)]) == list(expected)
    assert found.drop(index=expected).isna().all(axis=None)
    for name, known in expected.items():
        seconds, decoding, peak = found.loc[name]
        assert seconds == pytest.approx(known.step() - known.seconds()["generation"]), name
        assert decoding == pytest.approx(TINY.plan.seconds()["generation"]), name
        update = {**known.memory()["always"], **known.memory()["update"], "reserved": 0}
        assert peak == pytest.approx(sum(update.values()) * 1024), name
    assert found.loc["GRPO"].iloc[0] == pytest.approx(table.loc["GRPO", "without generation, s"])
    assert not alone.shares_prompts
    assert plan.shares_prompts


def test_a_trainer_that_runs_out_of_memory_leaves_an_empty_row(monkeypatch):
    def train(build, name, *_):
        if name == "RLSD":
            raise torch.OutOfMemoryError("no room")
        return [{"without generation, s": 2.0, "generation, s": 1.0, "peak MiB": 100.0}], {}

    monkeypatch.setattr(bench, "train_apart", train)
    table = bench.race(TINY.build, ["RLSD", "OPSD"])
    assert table["step, s"].fillna(0).tolist() == [3, 0, 3]
    assert table.loc["OPSD", "step / GRPO"] == 1


def test_real_sizes_are_those_of_the_named_model():
    sizes = dataclasses.replace(TINY, model="Qwen/Qwen3-0.6B")
    found, known = shape_of(sizes.config()), shape_of(config_named("Qwen/Qwen3-0.6B"))
    assert found == dataclasses.replace(known, text=found.text)
    assert sizes.config().vocab_size == 151936
    assert sizes.plan.per_device_train_batch_size == 2
    assert sizes.plan.dtype == "bfloat16"


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
    assert float(re.search(r"ratio of a round: (.*)", printed)[1]) > 0.9
    traced, functions = trace.read_text(), ("teacher_prompts", "_read_prompts", "update")
    assert [name for name in functions if f": {name}" not in traced] == []


def test_a_bench_in_words():
    table = pd.DataFrame({"step / GRPO": [1.0, 1.2]}, index=["GRPO", "RLSD"])
    assert bench.in_words(table) == "of GRPO's step: RLSD 1.200"


def test_the_command_records_what_it_measured(tmp_path, monkeypatch, capsys):
    table = pd.DataFrame({"step / GRPO": [1.0, 1.2]}, index=["GRPO", "RLSD"])
    monkeypatch.setattr(bench, "race", lambda *_, **__: table)
    assert main(["bench", "--preset", "lab", "--record"]) == 0
    (path,) = (tmp_path / "outputs" / "tables" / "machines").glob("*.json")
    assert str(path) in capsys.readouterr().out
    assert "bench --preset lab" in path.read_text()
