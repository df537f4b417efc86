"""The phrase measure of leakage: planted cases, its interval, bad input."""

import pytest

from rlsd_lib.leakage import phrase_leakage

PATTERN = r"\breference\b"


def test_planted_leaks_are_counted_in_texts_and_messages():
    texts = ["The Reference says 4", "answer 4", [{"role": "assistant", "content": "reference"}]]
    rate = phrase_leakage(texts, PATTERN)
    assert (rate.count, rate.total) == (2, 3)
    assert rate.share == pytest.approx(2 / 3)
    assert rate.low < rate.share < rate.high


def test_no_leak_still_has_an_upper_end():
    rate = phrase_leakage(["answer 4"] * 100, PATTERN)
    assert rate.share == rate.low == 0.0
    assert rate.high == pytest.approx(3.8415 / 103.8415, abs=1e-4)  # z^2 / (n + z^2)


def test_bad_input_raises():
    with pytest.raises(ValueError, match="no completions"):
        phrase_leakage([], PATTERN)
    with pytest.raises(ValueError, match="no regular expression"):
        phrase_leakage(["a"], "(")
