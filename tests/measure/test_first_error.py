"""Where credit lands: the rank of the first wrong token, and the shares of kinds of tokens."""

import math

import pytest

from rlsd_lib.measure import first_error as blame
from rlsd_lib.measure.rollouts import Rollout
from rlsd_lib.tasks import load_task
from rlsd_lib.tasks.lab.arithmetic import make_row, tokens_of

ROW = make_row(4, 5)
WRONG = "well ones 4 + 5 + 0 = 0 8 answer 8"  # the first wrong token is the 8 at place 9
RIGHT = "well ones 4 + 5 + 0 = 0 9 answer 9"


@pytest.fixture(scope="module")
def task():
    return load_task("arithmetic", train_size=1, test_size=1, seed=0, digits=1)


def rollout(text: str, gap: list[float], **changes) -> Rollout:
    """A rollout whose lists are as long as its tokens, padded with zeros and ones."""
    tokens = [*tokens_of(text), "<eos>"]
    full = [*gap, *[0.0] * (len(tokens) - len(gap))]
    wrong = text == WRONG
    facts = {
        "problem": ROW,
        "teacher_prompt": "",
        "completion": text,
        "tokens": tokens,
        "reward": float(not wrong),
        "advantage": -1.0 if wrong else 1.0,
        "gap": full,
        "weight": [math.exp(-g if wrong else g) for g in full],
        "credit": [-1.0 if wrong else 1.0] * len(tokens),
        "divergence": [],
    }
    return Rollout(**{**facts, **changes})


def at(place: int, value: float, other: float = 0.0) -> list[float]:
    return [value if i == place else other for i in range(13)]


def test_evidence_that_points_at_the_error_ranks_first_and_blind_evidence_ranks_half(task):
    sharp, blind = rollout(WRONG, at(9, -5.0)), rollout(WRONG, [])
    opposite = rollout(WRONG, at(9, 2.0))
    frame = blame.first_errors(task, [sharp, rollout(RIGHT, []), blind, opposite])
    assert list(frame["rollout"]) == [0, 2, 3]
    assert set(frame["place"]) == {9} and set(frame["token"]) == {"8"}
    assert list(frame["auroc_gap"]) == [1.0, 0.5, 0.0]
    assert list(frame["rank"]) == [0, 0, 12]


def test_the_interval_is_over_problems_that_have_an_error(task):
    sharp, blind = rollout(WRONG, at(9, -5.0)), rollout(WRONG, [])
    found = blame.error_auroc(task, [[sharp, sharp, sharp, blind], [blind], [rollout(RIGHT, [])]])
    assert found.mean == pytest.approx((0.875 + 0.5) / 2)
    assert found.low <= found.mean <= found.high
    assert all(math.isnan(value) for value in blame.error_auroc(task, [[rollout(RIGHT, [])]]))


def test_problems_are_paired_by_their_place(task):
    groups = [[rollout(RIGHT, [])], [rollout(WRONG, at(9, -5.0))], [rollout(WRONG, [])]]
    assert blame.auroc_by_problem(task, groups).to_dict() == {1: 1.0, 2: 0.5}


def test_shares_count_tokens_and_what_was_moved(task):
    moved = [-1.0] * 13
    moved[0], moved[9] = -1.1, -1.3  # a filler and the error
    frame = blame.credit_shares(task, [rollout(WRONG, [], credit=moved), rollout(RIGHT, [])])
    wrong = frame[frame["rollout ended"] == "wrong"].set_index("kind")
    assert dict(wrong["tokens"]) == pytest.approx(
        {"first error": 1 / 13, "after it": 3 / 13, "filler": 1 / 13, "other": 8 / 13}
    )
    assert wrong.loc["first error", "moved"] == pytest.approx(0.75)
    assert wrong.loc["filler", "moved"] == pytest.approx(0.25)
    with pytest.raises(ValueError, match="nothing to share"):
        blame.credit_shares(task, [rollout(WRONG, [])])
