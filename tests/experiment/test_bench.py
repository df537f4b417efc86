"""The benchmark: equal work for all, honest arithmetic, a table and a figure."""

import dataclasses
from functools import partial

import pandas as pd
import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from rlsd_lib.__main__ import main
from rlsd_lib.experiment import bench, bench_teacher_pass, bench_trainers
from rlsd_lib.experiment.bench_trainers import Sizes, contenders, preset_trainer
from rlsd_lib.experiment.plan import MEASURED, RESERVED, plan_of
from rlsd_lib.experiment.presets import PRESETS
from rlsd_lib.experiment.shapes import config_named, shape_of

TINY = Sizes(
    prompt=24, completion=6, generations=4, vocabulary=120, hidden=64, layers=2, reference=8
)
INTS = {name: value for name, value in vars(TINY).items() if name != "model"}


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


def test_all_trainers_train_on_the_rollouts_of_the_first(monkeypatch):
    """Also TRL's own, each with its own code for generation."""
    seen, reward = {}, bench_trainers._reward

    def spied(completions, **columns):
        seen.setdefault(tuple(completions), 0)
        seen[tuple(completions)] += 1
        return reward(completions, **columns)

    monkeypatch.setattr(bench_trainers, "_reward", spied)
    names = list(contenders())
    table = bench.race(TINY.build, names, steps=1, memory=False)
    # A warm-up step and a timed one, each with rollouts of its own and the same for everyone.
    assert list(seen.values()) == [len(names)] * 2
    assert (table["without generation, s"] > 0).all()
    assert table["generation, s"].nunique() == 1
    ours = ["RLSD", "RLSD, plain pass", "OPSD"]
    assert list(table.index[table["teacher pass, s"].notna()]) == ours
    assert table.loc["GRPO", "step / GRPO"] == 1


def test_a_preset_is_raced_on_its_own_task(monkeypatch):
    # Nothing is pretrained for this.
    monkeypatch.setattr(
        bench_trainers, "load_model", lambda *_, **__: (tiny.model(), tiny.tokenizer())
    )
    table = bench.race(partial(preset_trainer, "smoke"), ["GRPO", "RLSD"], steps=1, memory=False)
    assert table["teacher pass, s"].isna().tolist() == [True, False]
    assert (table["step, s"] > table["generation, s"]).all()


@pytest.mark.parametrize("shared", [True, False])
def test_the_floor_is_what_torch_counts_without_masked_pairs(tmp_path, shared):
    trainer, score = bench_teacher_pass.scoring(TINY, tmp_path)
    # Torch counts no other attention on a CPU, and this one with its masked pairs.
    trainer.teacher.model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counted:
        score("shared" if shared else "plain")
    shape = shape_of(trainer.teacher.model.config)
    floor = bench_teacher_pass.floor_flops(shape, TINY, shared=shared)
    prompt, new, count = TINY.prompt + TINY.reference - 1, TINY.completion, TINY.generations
    copies, before = (1, prompt) if shared else (count, prompt)
    # The plain pass runs the last token too, which predicts nothing.
    last = 0 if shared else 1
    total = prompt + new + last
    pairs = prompt**2 + count * new * (prompt + new) if shared else count * total**2
    visible = copies * before * (before + 1) / 2 + count * new * (prompt + (new + 1) / 2)
    attention = 4 * TINY.layers * shape.heads * shape.head_dim * (pairs - visible)
    weights = 2 * TINY.layers * shape.layer_weights * count * last
    angles = shape.head_dim * (prompt + count * new if shared else total)  # the rotary embedding's
    heads = counted.get_total_flops() - (floor + attention + weights + angles)
    # The head of the plain pass is cut to whole tiles of a sequence.
    assert heads == 0 if shared else 0 <= heads <= shape.head_flops(count * 2)


def test_the_pass_by_itself_agrees_with_the_plain_one():
    row = bench_teacher_pass.compare_passes(TINY, rounds=1)
    assert 0 < row["largest difference of log-probabilities"] < 1e-4
    assert row["plain / shared"] == pytest.approx(row["plain pass, s"] / row["shared pass, s"])
    assert row["shared / floor"] > 1


def test_the_sweep_leaves_a_table_and_a_small_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "FACTORS", {"prompt": (1, 2), "generations": (1,)})
    table = bench.sweep(TINY, ["GRPO", "RLSD"], tmp_path, steps=1)
    assert table.groupby("factor")["value"].unique().map(list).to_dict() == {
        "prompt": [24, 48],
        "generations": [4],
    }
    # The common point is measured once.
    base = table[table["value"].isin([24, 4])]
    assert base.groupby("trainer")["step, s"].nunique().tolist() == [1, 1]
    assert len(pd.read_csv(tmp_path / "tables" / "bench.csv")) == len(table)
    assert 0 < (tmp_path / "figures" / "bench_scaling.png").stat().st_size < 200_000


def test_the_command_prints_passes_and_race(monkeypatch, capsys):
    monkeypatch.setattr(bench, "peak_mib", lambda build, name: {"GRPO": 100.0}.get(name, 150.0))
    sizes = [word for name, value in INTS.items() for word in ("-p", f"{name}={value}")]
    command = ["bench", "--steps", "1", "--rounds", "1", *sizes]
    assert main([*command, "--against", "GRPO", "RLSD"]) == 0
    printed = capsys.readouterr().out
    assert "plain / shared" in printed
    assert printed.splitlines()[-1].split()[-1] == "1.500"
    assert main([*command, "--against", "GRPo"]) == 2
    assert "Did you mean 'GRPO'?" in capsys.readouterr().err


def test_bad_sizes_are_refused(capsys):
    for words, message in (
        (["--against", "GRPO", "-p", "promt=3"], "Unknown size 'promt'. Did you mean 'prompt'?"),
        (["--against", "GRPO", "-p", "prompt=0"], "prompt=0: expected a whole number >= 1"),
        (["--against", "GRPO", "-p", "hidden=100"], "hidden=100: expected a multiple of 64"),
        (["--against", "GRPO", "-p", "generations=1"], "generations=1: expected 2 or more"),
        (["--against", "GRPO", "-p", "rows=3"], "rows=3: expected a divisor of 8"),
        (["-p", "prompt=1"], "-p prompt=1: a size of synthetic rollouts"),
    ):
        assert main(["bench", *words]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_peak_memory_is_of_a_process_of_its_own():
    held = torch.ones(2**28)  # 1 GiB of this process, which is no part of the other's peak
    assert 1 < bench.peak_mib(TINY.build, "RLSD") < held.numel() * 4 / 2**21
    with pytest.raises(ValueError, match="Did you mean 'RLSD'"):
        bench.peak_mib(TINY.build, "RLSB")


# Real sizes, a profile, records


def test_a_gpu_table_holds_plans_beside_measurements_and_plans_read_it(monkeypatch, tmp_path):
    """The path of `--gpu` at tiny size on a CPU."""
    small = dataclasses.replace(TINY, rows=2)
    peaks = {"GRPO": 9000.0, "RLSD": 12000.0}
    monkeypatch.setattr(bench, "peak_mib", lambda build, name: peaks.get(name, 10000.0))
    models = [small, dataclasses.replace(small, model="Qwen/Qwen3-8B")]
    table = bench.measure(models, memory=80)
    assert list(table["trainer"]) == list(bench.TRAINERS)  # the second model would not fit
    assert table["without generation / GRPO"].notna().all()
    columns = [f"plan, {column}" for column in ("peak MiB", *bench.RATIOS)]
    planned = table.set_index("trainer")[columns]
    assert planned.notna().all(axis=1).tolist() == [True, True, True, False, False]
    shares = planned["plan, without generation / GRPO"]
    assert shares.iloc[0] == 1 < shares.iloc[1] < shares.iloc[2]

    bench.write_gpu(tmp_path / "outputs", table)
    assert 0 < (tmp_path / "outputs" / "figures" / "bench_gpu.png").stat().st_size < 200_000
    plan, base = plan_of(PRESETS["qwen3-text"], gpus=1), table.iloc[0]
    assert [getattr(plan, name) for name in MEASURED] == pytest.approx(base[[*MEASURED]].tolist())
    # The plan of what was measured, at the measured speeds, says what was measured.
    speeds = {name: base[name] for name in MEASURED}
    same = dataclasses.replace(bench.plan_for(small), **speeds).grpo
    spent = same.step() - same.seconds()["generation"]
    assert spent == pytest.approx(base["without generation, s"])
    assert (same.peak() - RESERVED) * 1024 == pytest.approx(9000)
    assert plan.speeds == f"measured, {tmp_path / 'outputs' / 'tables' / 'bench_gpu.csv'}"
    assert plan_of(PRESETS["qwen3-text"], gpus=1, mfu=0.3).mfu == 0.3


def test_a_trainer_that_runs_out_of_memory_or_time_leaves_an_empty_row(monkeypatch):
    def train(build, name, *_):
        if name == "RLSD":
            raise torch.OutOfMemoryError("no room")
        return [{"without generation, s": 2.0, "generation, s": 1.0}], 100.0

    monkeypatch.setattr(bench, "train", train)
    table = bench.race(TINY.build, ["GRPO", "RLSD", "OPSD"], memory=False)
    assert table["step, s"].fillna(0).tolist() == [3, 0, 3]
    assert table.loc["OPSD", "step / GRPO"] == 1
    late = bench.race(TINY.build, ["GRPO"], memory=False, until=0)
    assert late["step, s"].isna().all()


def test_real_sizes_are_those_of_the_named_model():
    sizes = dataclasses.replace(TINY, model="Qwen/Qwen3-0.6B", rows=2)
    assert shape_of(sizes.config()) == shape_of(config_named("Qwen/Qwen3-0.6B"))
    assert sizes.words == 151936 - 3
    plan = bench.plan_for(sizes)
    assert (plan.per_device_train_batch_size, plan.gradient_checkpointing) == (2, True)


def test_without_a_gpu_it_says_what_it_needs(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["bench", "--gpu"]) == 2
    assert "--gpu needs an NVIDIA GPU" in capsys.readouterr().err


def test_a_profile_names_every_phase_and_leaves_a_trace(tmp_path, capsys):
    sizes = [word for name, value in INTS.items() for word in ("-p", f"{name}={value}")]
    assert main(["bench", "--profile", *sizes]) == 0
    printed = capsys.readouterr().out
    for phase in ("tokenise", "prompt pass", "cache copy", "completion pass", "head"):
        (line,) = [line for line in printed.splitlines() if line.startswith(phase)]
        assert float(line.split()[-1]) > 0
    assert "aten::mm" in printed
    trace = tmp_path / "outputs" / "profiles" / "teacher_pass.json"
    assert str(trace) in printed
    assert "cache copy" in trace.read_text()


def test_a_bench_in_words():
    one = pd.DataFrame({"step / GRPO": [1.0, 1.2]}, index=["GRPO", "RLSD"])
    models = one.reset_index(names="trainer").assign(model="small")
    assert bench.in_words(one) == "of GRPO's step: RLSD 1.200"
    assert bench.in_words(models) == "of GRPO's step: small, RLSD 1.200"
    assert bench.in_words(one.drop(columns="step / GRPO")) == "no GRPO beside it"


def test_the_command_records_what_it_measured(tmp_path, monkeypatch, capsys):
    table = pd.DataFrame({"step / GRPO": [1.0, 1.2]}, index=["GRPO", "RLSD"])
    monkeypatch.setattr(bench, "race", lambda *_, **__: table)
    assert main(["bench", "--preset", "lab", "--record"]) == 0
    (path,) = (tmp_path / "outputs" / "tables" / "machines").glob("*.json")
    assert str(path) in capsys.readouterr().out
    assert "bench --preset lab" in path.read_text()
