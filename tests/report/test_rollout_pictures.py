"""What a notebook shows of a rollout: GRPO's credit has no colour, and sliders recompute RLSD's."""

import re
from dataclasses import replace

import pytest
import tiny
import torch

from rlsd_lib.credit import rlsd
from rlsd_lib.measure.rollouts import Rollout
from rlsd_lib.report.rollouts import credit_sliders, rollout_heatmaps, side_by_side


def rollout(**changes) -> Rollout:
    given = {
        "problem": {"prompt": [{"role": "user", "content": "1+2"}], "privileged_context": "3" * 50},
        "teacher_prompt": "1+2|3",
        "completion": "ab",
        "tokens": ["a", "b"],
        "reward": 0.0,
        "advantage": -2.0,
        "gap": [-3.0, 0.01],
        "weight": [1.2, 0.99],
        "credit": [-2.2, -1.99],
        "divergence": [],
    }
    return Rollout(**{**given, **changes})


def test_the_multiplier_is_shown_around_grpo_up_to_the_clip(tmp_path):
    found = rollout_heatmaps(rollout(), tiny.config(tmp_path), "rollout 0")
    assert list(found) == ["gap", "multiplier"]
    picture = found["multiplier"]
    assert (picture.center, picture.limit) == (1.0, pytest.approx(0.1))
    assert picture.values == pytest.approx([1.1, 0.995])
    assert "clip at 1 ± 0.1" in picture.title and len(picture.title) < 120
    assert rollout().question == "1+2"
    flat = rollout(credit=[-2.0, -2.0])
    grpo = rollout_heatmaps(flat, tiny.config(tmp_path, method="grpo"), "x")["multiplier"]
    assert grpo.values == [1.0, 1.0] and "clip" not in grpo.title


def test_a_method_without_a_reward_shows_its_divergence(tmp_path):
    config = tiny.config(tmp_path, method="opsd")
    found = rollout_heatmaps(rollout(credit=[0.0, 0.0], divergence=[0.5, 0.1]), config, "x")
    assert list(found) == ["gap", "divergence"]
    assert (found["divergence"].center, found["divergence"].values) == (0.0, [0.5, 0.1])


def test_a_method_stands_beside_grpo_and_rlsd_and_its_few_tokens_are_counted(tmp_path):
    shown = rollout(tokens=[*"abcd"], gap=[-3.0, 0.0, 0.0, 3.0], credit=[-2.0] * 4)
    pictures, sentence = side_by_side(shown, tiny.config(tmp_path, method="grpo"))
    assert list(pictures) == ["grpo", "rlsd"]
    assert pictures["rlsd"].values == pytest.approx([1.1, 1.0, 1.0, 0.9])
    assert {picture.limit for picture in pictures.values()} == {1.0}

    shown = replace(shown, credit=[0.0] * 4, divergence=[0.1, 0.1, 0.7, 0.1])
    pictures, sentence = side_by_side(shown, tiny.config(tmp_path, method="opsd"))
    assert (pictures["opsd"].center, pictures["opsd"].values) == (0.0, [0.1, 0.1, 0.7, 0.1])
    assert sentence == (
        "Half of what moves this rollout's 4 tokens lies on 2 under grpo, 2 under rlsd, 1 under opsd."
    )
    silent = replace(shown, advantage=0.0, divergence=[0.0] * 4)
    assert "0 under grpo, 0 under rlsd" in side_by_side(silent, tiny.config(tmp_path))[1]
    even = rollout(advantage=-0.3, tokens=["a"] * 52, gap=[0.0] * 52, credit=[-0.3] * 52)
    assert "26 under grpo, 26 under rlsd" in side_by_side(even, tiny.config(tmp_path))[1]


def test_rlsd_with_other_numbers_stands_beside_the_papers(tmp_path):
    assert list(side_by_side(rollout(), tiny.config(tmp_path))[0]) == ["grpo", "rlsd"]
    shown = rollout(credit=[-8.0, -1.0])
    for numbers in ({"epsilon_w": 9.0}, {"lambda_init": 1.0}):
        pictures, sentence = side_by_side(shown, tiny.config(tmp_path, **numbers))
        assert pictures["rlsd"].values == pytest.approx([1.1, 0.995], abs=1e-4)
        assert pictures["rlsd_this_run"].values == [4.0, 0.5]
        assert "1 under rlsd, 1 under rlsd_this_run" in sentence


def test_sliders_recolour_the_rollout():
    sliders = credit_sliders(rollout())
    lam, epsilon_w, picture = sliders.children
    before = picture.value
    lam.value, epsilon_w.value = 1.0, 3.0
    assert picture.value != before
    one = torch.ones(1, 2)
    credit = rlsd(torch.tensor([-2.0]), torch.tensor([[-3.0, 0.01]]), one, lam=1.0, epsilon_w=3.0)
    assert f"{credit[0, 0] / -2:.4g}" in picture.value
    lam.value = 0.0
    assert len(re.findall(r"background:#\w{6}00", picture.value)) == 2  # no colour: GRPO
