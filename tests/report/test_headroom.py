"""Who learns faster: rollouts to a threshold, arms against one, and the best rates."""

import json

import numpy as np
import pytest
import synthetic

from rlsd_lib.report.headroom import best_rates, compared, efficiency, steps_to
from rlsd_lib.runs.records import read_runs


def write(folder, method, seed, *, rise, rate=1e-4, top=0.9, steps=100):
    """A run whose reward rises from 0.2 to `top` within `rise` steps, two rollouts each."""
    path = synthetic.write_run(
        folder / f"{method}-{rate}-{seed}",
        method,
        seed,
        steps=steps,
        after=top,
        reward=lambda step: min(top, 0.2 + (top - 0.2) * step / rise),
        parameters={"overrides": {"learning_rate": rate}},
        config={"generation_batch_size": 2, "learning_rate": rate},
    )
    return path


def test_the_threshold_is_passed_by_the_mean_of_a_window():
    reward = np.array([0.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    assert steps_to(reward, 1) == 2
    assert steps_to(reward, 3) == 6
    assert steps_to(reward, 3, threshold=0.5) == 4
    assert steps_to(reward, 2, threshold=1.1) is None


def test_a_planted_lead_is_found_and_said_as_a_ratio(tmp_path):
    for seed in range(5):
        noise = np.random.default_rng(seed).integers(-3, 4, size=3)
        for (method, rise), shift in zip(
            [("grpo", 160), ("rlsd", 80), ("opd", 160)], noise, strict=True
        ):
            write(tmp_path, method, seed, rise=rise + 2 * seed + shift, steps=240)
    runs = read_runs(tmp_path)
    found = efficiency(runs).set_index(["method", "seed"])
    assert found["reached"].all()
    table = compared(runs).rows.set_index(["measure", "arm"])
    assert table.loc[("rollouts to 0.7", "rlsd"), "verdict"] == "below"
    assert table.loc[("rollouts to 0.7", "opd"), "verdict"] == "no difference larger than 10 %"
    assert table.loc[("mean reward over training", "rlsd"), "verdict"] == "above"
    # Equal in every seed, which is a finding.
    ended = table.loc[("accuracy after training", "rlsd"), "verdict"]
    assert ended == "no difference larger than 0.02"
    assert table.loc[("rollouts to 0.7", "rlsd"), "without one"] == "5 of 5"
    assert table.loc[("rollouts to 0.7", "opd"), "without one"] == "0 of 5"
    ratio = table.loc[("rollouts to 0.7", "rlsd"), "against grpo"]
    expected = np.exp(np.log(found.loc["rlsd", "rollouts"] / found.loc["grpo", "rollouts"]).mean())
    assert ratio.startswith(f"x {expected:.2f} [")


def test_a_run_that_never_got_there_gives_a_bound_and_no_verdict(tmp_path):
    for seed in range(5):
        write(tmp_path, "grpo", seed, rise=50 + seed, steps=240)
        write(tmp_path, "rlsd", seed, rise=50, top=0.5 if seed == 2 else 0.9, steps=240)
        write(tmp_path, "opd", seed, rise=60 - seed, steps=240)
    runs = read_runs(tmp_path)
    assert not efficiency(runs).set_index(["method", "seed"]).loc[("rlsd", 2), "reached"]
    table = compared(runs)
    rows = table.rows.set_index(["measure", "arm"])
    bound = rows.loc[("rollouts to 0.7", "rlsd")]
    assert bound["mean"].startswith("over ")
    assert (bound["against grpo"], bound["verdict"], bound["without one"]) == ("-", "-", "-")
    assert rows.loc[("rollouts to 0.7", "opd"), "verdict"] != "-"
    assert any(note.startswith("rlsd: 1 runs never reached it") for note in table.notes)
    with pytest.raises(ValueError, match="arms are: grpo, opd, rlsd"):
        compared(runs, "oracle")


def test_a_run_that_a_suite_has_planned_and_not_started_is_named(tmp_path):
    for method in ("grpo", "rlsd"):
        write(tmp_path, method, 0, rise=50)
    plan = {"command": "rlsd suite paper", "runs": ["rlsd-0.0001-0", "rlsd-0.0001-1"]}
    (tmp_path / "suite.json").write_text(json.dumps({"plans": [plan]}))
    notes = "\n".join(compared(read_runs(tmp_path).of_preset("lab")).notes)
    assert "2 of 3 runs" in notes
    assert "INCOMPLETE, 1 left out: rlsd-0.0001-1 (not started)" in notes


def test_one_seed_settles_nothing(tmp_path):
    write(tmp_path, "grpo", 0, rise=50)
    write(tmp_path, "opd", 0, rise=20)
    rows = compared(read_runs(tmp_path)).rows.set_index(["measure", "arm"])
    assert rows.loc[("mean reward over training", "opd"), "verdict"] == "not settled"


def test_the_best_rate_is_the_fastest_of_those_with_the_highest_mean_reward(tmp_path):
    for rate, rise in [(1e-5, 150), (1e-4, 20), (1e-3, 60)]:
        write(tmp_path, "grpo", 100, rise=rise, rate=rate)
        write(tmp_path, "rlsd", 100, rise=170 - rise, rate=rate)
    best = best_rates(read_runs(tmp_path)).set_index("arm")["rate"]
    assert best.to_dict() == {"grpo": 1e-4, "rlsd": 1e-5}
