"""The benchmark on synthetic rollouts: equal work for all, honest arithmetic, a table and a figure."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rlsd_lib.__main__ import main
from rlsd_lib.experiment.cost import race
from rlsd_lib.experiment.cost.contenders import (
    HEAD_DIM,
    Setting,
    build,
    contenders,
    make_rows,
    make_tokenizer,
)
from rlsd_lib.experiment.cost.floor import Machine, Work, teacher_pass

TINY = Setting(
    prompt=24, completion=6, generations=4, vocabulary=120, hidden=64, layers=2, reference=8
)


def test_lengths_are_exact():
    tokenizer, row = make_tokenizer(TINY), make_rows(TINY, 1)[0]
    assert len(tokenizer(row["prompt"])["input_ids"]) == TINY.prompt
    shown = row["prompt"] + " " + row["privileged_context"]
    assert len(tokenizer(shown)["input_ids"]) == TINY.prompt + TINY.reference


def test_all_trainers_see_the_same_rollouts(tmp_path):
    """Also TRL's own, each with its own code for generation; and the work is of one length."""
    table = race.race(TINY, list(contenders()), steps=1, memory=False)
    assert (table["step, s"] > table["generation, s"]).all()
    ours = [name for name in table.index if name.split(",")[0] in ("RLSD", "OPSD", "SDPO")]
    assert table["teacher pass, s"].notna().sum() == len(ours) == 6
    assert table.loc["GRPO", "step / GRPO"] == 1
    trainer = build("RLSD", TINY, tmp_path, 1)
    clock = race._train(trainer)
    seen = trainer.state.log_history[0]
    assert seen["completions/min_length"] == seen["completions/max_length"] == TINY.completion
    assert seen["rlsd/gap_abs_mean"] > 0
    clock.rollouts[0] += 1
    with pytest.raises(RuntimeError, match=r"\['RLSD'\] did not see the rollouts of 'other'"):
        race._check_rollouts({"other": [race._timed("GRPO", TINY, 0)], "RLSD": [clock]})


@pytest.mark.parametrize("shared", [True, False])
def test_the_floor_is_what_torch_counts_without_masked_pairs(tmp_path, shared):
    trainer = build("RLSD", TINY, tmp_path, 1)
    trainer.args.teacher_pass = "shared" if shared else "plain"
    # Torch counts no other attention on a CPU, and this one with its masked pairs.
    trainer.teacher.model.set_attn_implementation("eager")
    row, count = trainer.train_dataset[0], TINY.generations
    ids = torch.full((count, TINY.completion), 5)
    output = {
        "prompt_ids": torch.zeros(count, 1, dtype=torch.long),
        "completion_ids": ids,
        "completion_mask": torch.ones_like(ids),
    }
    prompts, contexts = [row["prompt"]] * count, [row["privileged_context"]] * count
    with FlopCounterMode(display=False) as counted:
        trainer.teacher_scores(prompts, contexts, output)
    floor = teacher_pass(trainer.teacher.model, TINY, shared=shared)
    prompt, completion = TINY.prompt + TINY.reference, TINY.completion
    width = 4 * TINY.layers * TINY.hidden
    if shared:
        pairs = (prompt - 1) ** 2 + count * completion * (prompt - 1 + completion)
        visible = prompt * (prompt - 1) / 2
        visible += count * completion * (prompt - 1 + (completion + 1) / 2)
        angles = HEAD_DIM * (prompt - 1 + count * completion)  # of the rotary embedding
        assert counted.get_total_flops() == floor.flops + width * (pairs - visible) + angles
    else:
        # TRL scores every position on a CPU and runs the last token, which predicts nothing.
        assert floor.flops < counted.get_total_flops() < 2.5 * floor.flops


def test_the_roofline_takes_the_longer_of_the_two():
    machine = Machine(flops=10.0, bandwidth=2.0)
    assert machine.seconds(Work(flops=100.0, bytes=1.0)) == 10.0
    assert machine.seconds(Work(flops=1.0, bytes=8.0)) == 4.0


def test_the_pass_by_itself_agrees_with_the_plain_one():
    row = race.passes(TINY, rounds=1)
    assert 0 < row["largest difference of log-probabilities"] < 1e-4
    assert row["plain / shared"] == pytest.approx(row["plain pass, s"] / row["shared pass, s"])
    assert row["shared / floor"] > 1


def test_the_sweep_leaves_a_table_and_a_small_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(race, "FACTORS", {"prompt": (1, 2), "generations": (1,)})
    table = race.sweep(TINY, ["GRPO", "RLSD"], tmp_path, steps=1)
    assert table.groupby("factor")["value"].unique().map(list).to_dict() == {
        "prompt": [24, 48],
        "generations": [4],
    }
    # The common point is measured once.
    base = table[table["value"].isin([24, 4])]
    assert base.groupby("trainer")["step, s"].nunique().tolist() == [1, 1]
    assert len(pd.read_csv(tmp_path / "tables" / "bench.csv")) == len(table)
    assert 0 < (tmp_path / "figures" / "bench_scaling.png").stat().st_size < 200_000


def sizes() -> list[str]:
    return [word for name, value in vars(TINY).items() for word in ("-p", f"{name}={value}")]


def test_the_command_prints_passes_and_race(monkeypatch, capsys):
    monkeypatch.setattr(race, "peak_memory", lambda name, setting: {"GRPO": 100.0}.get(name, 150.0))
    command = ["bench", "--steps", "1", "--rounds", "1", *sizes()]
    assert main([*command, "--against", "GRPO", "RLSD"]) == 0
    printed = capsys.readouterr().out
    assert "plain / shared" in printed
    assert printed.splitlines()[-1].split()[-1] == "1.500"
    assert main([*command, "--against", "GRPo"]) == 2
    assert "Did you mean 'GRPO'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("promt=3", "Unknown size 'promt'. Did you mean 'prompt'?"),
        ("prompt=0", "prompt=0: expected a whole number >= 1"),
        ("hidden=100", "hidden=100: expected a multiple of 64"),
        ("generations=1", "generations=1: expected 2 or more"),
    ],
)
def test_bad_sizes_are_refused(capsys, pair, message):
    assert main(["bench", "--against", "GRPO", "-p", pair]) == 2
    assert message in capsys.readouterr().err


def test_a_size_without_rollouts_of_that_size_is_refused(capsys):
    assert main(["bench", "-p", "prompt=1"]) == 2
    assert "-p prompt=1: a size of synthetic rollouts" in capsys.readouterr().err


@pytest.mark.slow
def test_peak_memory_is_of_a_process_of_its_own(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(race.__file__).parents[2]))
    held = torch.ones(2**28)  # 1 GiB of this process, which is no part of the other's peak
    assert 1 < race.peak_memory("RLSD", TINY) < held.numel() * 4 / 2**21
    with pytest.raises(RuntimeError, match="the process for its memory failed"):
        race.peak_memory("RLSB", TINY)
