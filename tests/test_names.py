"""A keyword that somebody mistyped is refused with the nearest that there is."""

import pytest

from rlsd_lib import RLSDConfig, RLSDTrainer


@pytest.mark.parametrize(
    "make, typed, meant",
    [
        (RLSDConfig, "lambda_inti", "lambda_init"),
        (RLSDConfig, "max_step", "max_steps"),
        (RLSDTrainer, "reward_fn", "reward_funcs"),
    ],
)
def test_a_mistyped_keyword_is_refused_with_the_nearest(make, typed, meant) -> None:
    with pytest.raises(ValueError, match=f"{make.__name__} '{typed}'. Did you mean '{meant}'"):
        make(**{typed: 1})
