"""The lens agrees with the trainer: same prompts, same gap, same credit."""

import pytest
import tiny
import torch
from datasets import Dataset

from rlsd_lib.experiment import controls
from rlsd_lib.measure import rollouts as lens
from rlsd_lib.methods import METHODS
from rlsd_lib.tasks import Task

TEMPLATE = "{prompt}|{privileged_context}"


def task() -> Task:
    rows = [
        {"prompt": [{"role": "user", "content": f"{i}?"}], "privileged_context": "7", "answer": "7"}
        for i in range(4)
    ]
    return Task(
        name="letters",
        train=Dataset.from_list(rows),
        test=Dataset.from_list(rows),
        verify=lambda completion, row: sum(map(ord, completion)) % 2 == 0,
        reference_pattern="ref",
        first_error=lambda completion, row: 1,
    )


def group(method: str = "rlsd", model=None, **changes) -> list[lens.Rollout]:
    settings = {"lam": 0.5, "epsilon_w": 0.2, "max_new_tokens": 6, "template": TEMPLATE}
    model = tiny.model().eval() if model is None else model
    return lens.look(model, tiny.tokenizer(), task(), 1, method=method, **{**settings, **changes})


def test_gap_and_credit_follow_the_definitions():
    model, tokenizer = tiny.model().eval(), tiny.tokenizer()
    for rollout in group():
        ids = [tokenizer.convert_tokens_to_ids(token) for token in rollout.tokens]
        scores = {}
        for name, prompt in (
            ("student", "<user>1?</s><assistant>"),
            ("teacher", "<user>1?|7</s><assistant>"),
        ):
            prefix = tokenizer.encode(prompt)
            logits = model(torch.tensor([prefix + ids])).logits[0, len(prefix) - 1 : -1]
            scores[name] = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        gap = (scores["teacher"] - scores["student"]).detach()
        torch.testing.assert_close(torch.tensor(rollout.gap), gap, rtol=1e-4, atol=1e-4)
        sign = 1 if rollout.advantage > 0 else -1
        expected = rollout.advantage * (0.5 + 0.5 * (sign * gap).exp().clamp(0.8, 1.2))
        torch.testing.assert_close(torch.tensor(rollout.credit), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_looked_at(method):
    rollouts = group(method)
    assert len(rollouts) == 8
    assert {r.reward for r in rollouts} == {0.0, 1.0}
    assert all(len(r.tokens) == len(r.gap) == len(r.credit) for r in rollouts)
    frame = lens.token_frame(rollouts)
    assert len(frame) == sum(len(r.tokens) for r in rollouts)


PUBLISHED = {
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 1,
    "min_p": 0.5,
    "typical_p": 0.2,
    "top_k": 2,
    "top_h": 0.2,
    "eta_cutoff": 0.5,
    "suppress_tokens": list(range(2, 40)),
    "forced_eos_token_id": 1,
    "num_beams": 2,
}


def test_a_models_own_settings_have_no_say_in_sampling():
    """Many are published with a top-k or a repetition penalty, which training does not use."""
    plain = [rollout.completion for rollout in group()]
    for name, value in PUBLISHED.items():
        model = tiny.model().eval()
        setattr(model.generation_config, name, value)
        assert [rollout.completion for rollout in group(model=model)] == plain, name


def test_looking_leaves_the_random_state_alone():
    model, tokenizer = tiny.model(), tiny.tokenizer()
    before = torch.random.get_rng_state()
    lens.look(
        model,
        tokenizer,
        task(),
        0,
        method="rlsd",
        template=TEMPLATE,
        lam=0.5,
        epsilon_w=0.2,
        max_new_tokens=4,
    )
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("control", controls.CONTROLS)
def test_controls_change_the_reference_and_nothing_else(control):
    data = Dataset.from_dict(
        {
            "prompt": [f"{i}?" for i in range(50)],
            "privileged_context": [f"{i} apples" for i in range(50)],
        }
    )
    changed = controls.apply_control(data, control, seed=1)
    again = controls.apply_control(data, control, seed=1)
    before, after = data["privileged_context"][:], changed["privileged_context"][:]
    assert after == again["privileged_context"][:]
    assert changed["prompt"][:] == data["prompt"][:]
    if control in ("none", "peer"):
        assert after == before
    elif control == "empty":
        assert set(after) == {""}
    else:
        assert all(new != old for new, old in zip(after, before, strict=True))
    if control == "wrong":
        assert all(
            new.endswith(" apples") and len(new) == len(old)
            for new, old in zip(after, before, strict=True)
        )
    if control == "noise":
        assert [len(text) for text in after] == [len(text) for text in before]
    if control == "shuffled":
        assert set(after) <= set(before)


def test_unknown_controls_and_hopeless_references_are_refused():
    same = Dataset.from_dict({"privileged_context": ["4", "4"]})
    with pytest.raises(ValueError, match="Did you mean 'shuffled'"):
        controls.apply_control(same, "shufled", seed=0)
    with pytest.raises(ValueError, match="two different references"):
        controls.apply_control(same, "shuffled", seed=0)
    with pytest.raises(ValueError, match="letter or a digit"):
        controls.apply_control(Dataset.from_dict({"privileged_context": ["?!"]}), "noise", seed=0)


def test_a_wrong_word_is_another_rows():
    words = Dataset.from_dict(
        {"prompt": ["a", "b", "c", "d"], "privileged_context": ["yes", "no", "A", "7"]}
    )
    changed = controls.apply_control(words, "wrong", seed=0)["privileged_context"][:]
    assert all(word in ("yes", "no", "A", "7") for word in changed[:3])
    assert changed[:3] != ["yes", "no", "A"]
    assert changed[3].isdigit() and changed[3] != "7"
