"""What each control writes in place of a reference, and the rows that it refuses."""

import pytest
from datasets import Dataset

from rlsd_lib.experiment.controls import CONTROLS, apply_control


def test_controls_change_the_reference_and_nothing_else():
    data = Dataset.from_dict(
        {
            "prompt": [f"{i}?" for i in range(50)],
            "privileged_context": [f"{i} apples" for i in range(50)],
        }
    )
    before = data["privileged_context"][:]
    written = {}
    for control in CONTROLS:
        changed = apply_control(data, control, seed=1)
        after = written[control] = changed["privileged_context"][:]
        assert changed["prompt"][:] == data["prompt"][:], control
        assert apply_control(data, control, seed=1)["privileged_context"][:] == after, control
    assert written["none"] == before
    assert set(written["empty"]) == {""}
    assert set(written["shuffled"]) <= set(before)
    assert all(text.endswith(" apples") for text in written["wrong"])
    for control in ("wrong", "noise", "shuffled"):
        assert all(new != old for new, old in zip(written[control], before, strict=True)), control
    for control in ("wrong", "noise"):
        assert [*map(len, written[control])] == [*map(len, before)], control


def test_unknown_controls_and_hopeless_references_are_refused():
    same = Dataset.from_dict({"privileged_context": ["4", "4"]})
    with pytest.raises(ValueError, match="Did you mean 'shuffled'"):
        apply_control(same, "shufled", seed=0)
    with pytest.raises(ValueError, match="two different references"):
        apply_control(same, "shuffled", seed=0)
    with pytest.raises(ValueError, match="letter or a digit"):
        apply_control(Dataset.from_dict({"privileged_context": ["?!"]}), "noise", seed=0)


def test_a_wrong_word_is_another_rows():
    words = Dataset.from_dict(
        {"prompt": ["a", "b", "c", "d"], "privileged_context": ["yes", "no", "A", "7"]}
    )
    changed = apply_control(words, "wrong", seed=0)["privileged_context"][:]
    assert all(word in ("yes", "no", "A", "7") for word in changed[:3])
    assert changed[:3] != ["yes", "no", "A"]
    assert changed[3].isdigit() and changed[3] != "7"
