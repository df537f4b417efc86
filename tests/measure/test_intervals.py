"""Intervals that cover as often as they say, and what they could have seen."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.stats import ttest_1samp

from rlsd_lib.measure.intervals import (
    Interval,
    bootstrap_interval,
    decide,
    pooled_share,
    share_difference,
    share_interval,
    simultaneous_intervals,
    smallest_detectable,
    student_interval,
)


def test_the_interval_of_a_mean() -> None:
    alone = student_interval([0.5])
    assert (alone.mean, alone.is_known, f"{alone:.2f}") == (0.5, False, "0.50")
    assert f"{student_interval([0.0, 1.0]):.1f}" == "0.5 [-5.9, 6.9]"
    mean, low, high = student_interval([0.0, 1.0])
    assert (mean, round(high - low, 3)) == (0.5, 12.706)


def test_it_covers_the_truth_as_often_as_it_says() -> None:
    for seeds in (2, 3, 5):
        draws = np.random.default_rng(0).normal(0.8, 0.02, size=(500, seeds))
        found = [student_interval(draw) for draw in draws]
        covered = np.mean([interval.low <= 0.8 <= interval.high for interval in found])
        assert 0.90 <= covered <= 0.98, seeds


def test_a_difference_of_the_detectable_size_is_found_four_times_in_five() -> None:
    for seeds in (3, 5):
        random = np.random.default_rng(0)
        sample = random.normal(size=seeds)
        sample = 0.02 * (sample - sample.mean()) / sample.std(ddof=1)
        repeated = random.normal(smallest_detectable(sample), 0.02, size=(4000, seeds))
        found = ttest_1samp(repeated, 0.0, axis=1).pvalue < 0.05
        assert 0.77 <= found.mean() <= 0.83, seeds
    assert np.isnan(smallest_detectable([0.1]))
    assert np.isnan(smallest_detectable([0.1, 0.1])), "two equal differences show no spread"


def test_no_interval_leaves_the_range_of_its_quantity():
    assert student_interval([0.6, 0.8]).within(0, 1) == pytest.approx((0.7, 0.0, 1.0))
    assert student_interval([0.6, 0.8]).within(-1, 2) == student_interval([0.6, 0.8])
    assert not student_interval([0.6]).within(0, 1).is_known


def test_the_interval_over_problems_covers_as_often_as_it_says():
    random, hits = np.random.default_rng(0), 0
    for _ in range(200):
        successes = random.binomial(4, random.beta(1, 1, size=80)) / 4
        interval = bootstrap_interval(successes, resamples=400)
        hits += interval.low <= 0.5 <= interval.high
    assert 0.90 <= hits / 200 <= 0.98


@pytest.mark.parametrize(("over", "seeds", "problems"), [("seeds", 5, 30), ("problems", 1, 80)])
def test_the_paired_interval_covers_as_often_as_it_says(over, seeds, problems):
    random, hits = np.random.default_rng(0), 0
    for _ in range(200):
        base = random.normal(0.5, 0.3, size=(1, problems))
        noise = random.normal(0, 0.05, size=(seeds, 1)) + random.normal(0, 0.1, (seeds, problems))
        trained = (
            base
            + 0.1
            + noise * (over == "seeds")
            + random.normal(0, 0.1, (1, problems)) * (over == "problems")
        )
        if over == "seeds":
            interval = student_interval((trained - base).mean(axis=1))
        else:
            interval = bootstrap_interval((trained - base).mean(axis=0), resamples=400)
        hits += interval.low <= 0.1 <= interval.high
    assert 0.90 <= hits / 200 <= 0.98


def test_a_share_has_wilsons_interval_and_a_difference_newcombes() -> None:
    """Newcombe (1998), Statistics in Medicine 17, table II, method 10: 56/70 against 48/80."""
    none = share_interval([False] * 100)
    assert none == pytest.approx((0.0, 0.0, 3.8415 / 103.8415), abs=1e-4)  # z^2 / (n + z^2)
    first, second = share_interval([True] * 56 + [False] * 14), share_interval([1] * 48 + [0] * 32)
    assert share_difference(first, second) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_equal_values_and_single_values_have_no_invented_spread():
    assert bootstrap_interval([1.0, 1.0, 1.0]) == (1.0, 1.0, 1.0)
    mean, low, high = bootstrap_interval([0.25])
    assert mean == 0.25
    assert np.isnan([low, high]).all()


def test_bad_input_raises():
    with pytest.raises(ValueError, match="no completions"):
        share_interval([])
    with pytest.raises(ValueError, match="one finite number per problem"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="one finite number per problem"):
        bootstrap_interval([1.0, float("nan")])


def blocks(random: np.random.Generator, means: list[float], labs: int = 5) -> pd.DataFrame:
    """Arms named by number, with noise of their own and a far larger one that a lab shares."""
    noise = random.normal(size=(labs, len(means))) + random.normal(scale=5.0, size=(labs, 1))
    return pd.DataFrame(noise + np.array(means))


SCALES = np.array([1.0, 1.0, 1.0, 1.0, 10.0, 30.0])


def test_dunnetts_level_holds_where_arms_are_equally_noisy_and_only_there():
    """Why intervals here are not Dunnett's: one variance for all arms is too small for the noisiest."""
    noise = np.random.default_rng(0).normal(size=(4000, 5, 6))  # repetitions, labs, arms

    def against_the_first(arms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Differences (R, arms - 1) of means over labs, and the standard error (R, 1) of one."""
        means = arms.mean(axis=1)
        error = np.sqrt(arms.var(axis=1, ddof=1).mean(axis=1) * 2 / arms.shape[1])
        return means[:, 1:] - means[:, :1], error[:, None]

    control, *others = noise[0].T
    ends = stats.dunnett(*others, control=control, random_state=0).confidence_interval()
    difference, error = (values[0] for values in against_the_first(noise))
    critical = ((ends.high - difference) / error)[0]  # the same for each repetition of the design
    wrong = []
    for scale in (1.0, SCALES):
        difference, error = against_the_first(noise * scale)
        wrong.append((np.abs(difference) > critical * error).any(axis=1).mean())
    assert 0.04 < wrong[0] < 0.06
    assert 0.1 < wrong[1] < 0.2


def test_the_level_holds_also_where_arms_differ_thirtyfold_in_noise():
    random, false, found = np.random.default_rng(0), 0, 0
    for _ in range(1000):
        noise = random.normal(size=(5, 6)) * SCALES + random.normal(scale=5.0, size=(5, 1))
        null = simultaneous_intervals(pd.DataFrame(noise), 0).values()
        false += any(interval.low > 0 or interval.high < 0 for interval in null)
        planted = simultaneous_intervals(pd.DataFrame(noise + np.array([0, 5, 0, 0, 0, 0])), 0)
        found += decide(planted[1], margin=0.1) == "above"
    assert 0.03 <= false / 1000 <= 0.06
    assert found / 1000 > 0.8


def test_one_arm_has_students_paired_interval_and_more_have_bonferronis():
    values = blocks(np.random.default_rng(1), [0.0, 1.0, 2.0])
    difference = values[2] - values[0]
    alone = simultaneous_intervals(values[[0, 2]], 0)[2]
    assert alone == pytest.approx(student_interval(difference))
    mean, low, high = simultaneous_intervals(values, 0)[2]
    assert mean == pytest.approx(difference.mean())
    half = stats.t.ppf(1 - 0.05 / 4, 4) * stats.sem(difference)
    assert (low, high) == pytest.approx((mean - half, mean + half))


def test_a_planted_null_is_called_equivalent_and_little_data_settles_nothing():
    random = np.random.default_rng(2)
    verdicts = []
    for _ in range(100):
        values = 0.004 * blocks(random, [0.0, 0.0], labs=8)
        verdicts.append(decide(simultaneous_intervals(values, 0)[1], margin=0.02))
    assert verdicts.count("no difference larger than 0.02") > 90
    assert decide(Interval(0.01), margin=0.02) == "not settled"
    assert decide(Interval(-0.1, -0.15, -0.05), margin=0.02) == "below"
    assert decide(Interval(0.01, -0.01, 0.03), margin=0.02) == "not settled"


def test_intervals_and_verdicts_refuse_what_they_cannot_judge():
    values = pd.DataFrame({"grpo": [0.1, 0.2], "rlsd": [0.1, np.nan]})
    with pytest.raises(ValueError, match=r"value of \['rlsd'\]"):
        simultaneous_intervals(values, "grpo")
    with pytest.raises(ValueError, match="'opsd' and at least one other"):
        simultaneous_intervals(values, "opsd")
    assert np.isnan(simultaneous_intervals(values[:1].fillna(0.0), "grpo")["rlsd"].low)
    with pytest.raises(ValueError, match="margin is 0"):
        decide(Interval(0.0, -1.0, 1.0), margin=0)


def test_pooled_shares_are_the_share_of_all_completions() -> None:
    groups = [[True] * 3 + [False] * 247, [False] * 250, [True] + [False] * 23]
    shares = [share_interval(group) for group in groups]
    found = pooled_share([share.mean for share in shares], [share.high for share in shares])
    assert found == share_interval([mark for group in groups for mark in group])
