"""Who learns faster: rollouts to a threshold, arms against one, and the best rates."""

import numpy as np
import pytest
import synthetic

from rlsd_lib.report.headroom import best_rates, compared, efficiency, rollouts_to
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
    assert rollouts_to(reward, 1) == 2
    assert rollouts_to(reward, 3) == 6
    assert rollouts_to(reward, 3, threshold=0.5) == 4
    assert rollouts_to(reward, 2, threshold=1.1) is None


def test_a_planted_lead_is_found_and_said_as_a_ratio(tmp_path):
    for seed in range(5):
        for method, rise in [("grpo", 160), ("rlsd", 80), ("opd", 160)]:
            write(tmp_path, method, seed, rise=rise + seed, steps=240)
    runs = read_runs(tmp_path)
    found = efficiency(runs).set_index(["method", "seed"])
    assert found["reached"].all()
    table = compared(runs).rows.set_index(["measure", "arm"])
    assert table.loc[("rollouts to 0.7", "rlsd"), "verdict"] == "below"
    assert table.loc[("rollouts to 0.7", "opd"), "verdict"] == "no difference larger than 10 %"
    assert table.loc[("mean reward over training", "rlsd"), "verdict"] == "above"
    assert table.loc[("success after training", "rlsd"), "verdict"].startswith("no difference")
    assert table.loc[("rollouts to 0.7", "rlsd"), "found again"] == "100 of 100"
    assert table.loc[("rollouts to 0.7", "opd"), "found again"] == "0 of 100"
    ratio = table.loc[("rollouts to 0.7", "rlsd"), "against grpo"]
    expected = np.exp(np.log(found.loc["rlsd", "rollouts"] / found.loc["grpo", "rollouts"]).mean())
    assert ratio.startswith(f"x {expected:.2f} [")


def test_a_run_that_never_got_there_counts_its_rollouts_and_is_named(tmp_path):
    write(tmp_path, "grpo", 0, rise=50)
    write(tmp_path, "rlsd", 0, rise=50, top=0.5)
    runs = read_runs(tmp_path)
    assert efficiency(runs).set_index("method").loc["rlsd", "rollouts"] == 200
    table = compared(runs)
    assert any(note.startswith("rlsd: 1 runs never reached it") for note in table.notes)
    assert set(table.rows["verdict"]) == {"-", "not settled"}  # one lab settles nothing
    with pytest.raises(ValueError, match="arms are: grpo, rlsd"):
        compared(runs, "oracle")


def test_the_best_rate_is_the_fastest_of_those_with_the_highest_mean_reward(tmp_path):
    for rate, rise in [(1e-5, 150), (1e-4, 20), (1e-3, 60)]:
        write(tmp_path, "grpo", 100, rise=rise, rate=rate)
        write(tmp_path, "rlsd", 100, rise=170 - rise, rate=rate)
    best = best_rates(read_runs(tmp_path)).set_index("method")["rate"]
    assert best.to_dict() == {"grpo": 1e-4, "rlsd": 1e-5}
