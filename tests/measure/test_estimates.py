"""Means over seeds: an interval that covers as often as it says, and what it could have seen."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from rlsd_lib.measure.estimates import estimate, smallest_detectable


def test_the_interval_of_a_mean() -> None:
    assert estimate([0.5]) == (0.5, None, None)
    mean, low, high = estimate([0.0, 1.0])
    assert (mean, round(high - low, 3)) == (0.5, 12.706)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_it_covers_the_truth_as_often_as_it_says(seeds: int) -> None:
    random = np.random.default_rng(0)
    found = [estimate(random.normal(0.8, 0.02, size=seeds).tolist()) for _ in range(500)]
    covered = np.mean([interval.low <= 0.8 <= interval.high for interval in found])
    assert 0.90 <= covered <= 0.98


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_difference_of_the_detectable_size_is_found_four_times_in_five(seeds: int) -> None:
    random = np.random.default_rng(0)
    sample = random.normal(size=seeds)
    sample = 0.02 * (sample - sample.mean()) / sample.std(ddof=1)
    size = smallest_detectable(sample)
    repeated = random.normal(size, 0.02, size=(4000, seeds))
    found = ttest_1samp(repeated, 0.0, axis=1).pvalue < 0.05
    assert 0.77 <= found.mean() <= 0.83
    assert np.isnan(smallest_detectable([0.1]))
    assert smallest_detectable([0.1, 0.1]) == 0.0
