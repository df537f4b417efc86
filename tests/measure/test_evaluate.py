"""Evaluation: sampling that repeats itself, pass@k by hand, intervals of known coverage."""

from copy import deepcopy

import pandas as pd
import pytest
import torch

from rlsd_lib.measure.evaluate import (
    accuracies,
    evaluate,
    per_problem,
    sample,
)
from rlsd_lib.tasks import load_task
from rlsd_lib.tasks.lab.model import LabRecipe, build_model, build_tokenizer


@pytest.fixture(scope="module")
def untrained():
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = build_model(LabRecipe(hidden_size=32, layers=1), len(tokenizer))
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def task():
    return load_task("arithmetic", train_size=4, test_size=6, seed=0)


def test_sampling_follows_the_seed_and_leaves_the_world_as_it_was(untrained, task):
    model, tokenizer = untrained
    model.train()
    state = torch.get_rng_state()
    options = {"max_new_tokens": 5, "batch_size": 4}
    first = sample(model, tokenizer, task.test["prompt"], **options)
    assert first == sample(model, tokenizer, task.test["prompt"], **options)
    assert first != sample(model, tokenizer, task.test["prompt"], **options, seed=1)
    assert len(first) == 6
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_greedy_does_not_depend_on_the_batch(untrained, task):
    options = {"max_new_tokens": 5, "temperature": 0.0}
    alone = sample(*untrained, task.test["prompt"], **options, batch_size=1)
    assert alone == sample(*untrained, task.test["prompt"], **options, batch_size=6)


OPINIONS = {
    "repetition_penalty": 1.5,
    "min_p": 0.2,
    "top_k": 2,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(2, 20)),
    "forced_eos_token_id": 1,
    "typical_p": 0.2,
    "top_h": 0.2,
    "eta_cutoff": 0.5,
    "num_beams": 2,
    "max_time": 1e-9,
    "return_dict_in_generate": True,
    "stop_strings": ["1"],
}


def test_the_models_own_generation_config_has_no_say(untrained, task):
    model, tokenizer = untrained
    for temperature in (0.0, 1.0):
        options = {"max_new_tokens": 8, "temperature": temperature}
        plain = sample(model, tokenizer, task.test["prompt"], **options)
        for opinion, value in OPINIONS.items():
            opinionated = deepcopy(model)
            setattr(opinionated.generation_config, opinion, value)
            found = sample(opinionated, tokenizer, task.test["prompt"], **options)
            assert found == plain, (opinion, temperature)
            assert getattr(opinionated.generation_config, opinion) == value


def test_a_completion_ends_with_the_models_own_end_tokens_too(untrained, task):
    model, tokenizer = untrained
    ending = deepcopy(model)
    ending.generation_config.eos_token_id = list(range(2, len(tokenizer)))
    assert {len(ids) for ids in ids_of(ending, tokenizer, task)} == {1}
    assert max(len(ids) for ids in ids_of(model, tokenizer, task)) == 8


def ids_of(model, tokenizer, task) -> list[list[int]]:
    return sample(model, tokenizer, task.test["prompt"], max_new_tokens=8, temperature=1.0)


def test_results_are_tidy_and_judged_by_the_task(untrained, task, monkeypatch):
    seen = []

    def fake(model, tokenizer, prompts, **options):
        seen.extend(prompts)
        texts = [f"answer {task.test['answer'][i // 2]}" for i in range(len(prompts))]
        texts[1::2] = ["reference says 1"] * 6
        return [tokenizer.encode(text) for text in texts]

    monkeypatch.setattr("rlsd_lib.measure.evaluate.sample", fake)
    results = evaluate(*untrained, task, max_new_tokens=5, num_samples=2)
    assert results["problem"].tolist() == [i // 2 for i in range(12)]
    assert results["sample"].tolist() == [0, 1] * 6
    assert results["correct"].tolist() == [True, False] * 6
    assert results["speaks_of_reference"].tolist() == [False, True] * 6
    assert per_problem(results).tolist() == [0.5] * 6
    assert seen == [prompt for prompt in task.test["prompt"] for _ in range(2)]


def test_a_run_records_sampled_and_greedy_accuracy_and_pass_at_all_its_samples():
    right = {0: [1, 0, 0, 0], 1: [0, 0, 0, 0], 2: [1, 1, 1, 1]}
    sampled = pd.DataFrame(
        {"problem": problem, "correct": bool(value)}
        for problem, values in right.items()
        for value in values
    )
    greedy = pd.DataFrame({"problem": [0, 1, 2], "correct": [False, False, True]})
    found = accuracies(sampled, greedy)
    means = {name: interval.mean for name, interval in found.items()}
    expected = {"accuracy": 5 / 12, "accuracy_greedy": 1 / 3, "pass@4": 2 / 3}
    assert means == pytest.approx(expected)
    assert all(interval.low <= interval.mean <= interval.high for interval in found.values())


def test_bad_input_raises(untrained, task):
    with pytest.raises(ValueError, match=r"-1.* strictly positive"):
        sample(*untrained, task.test["prompt"], max_new_tokens=1, temperature=-1)
    with pytest.raises(ValueError, match="greedy"):
        evaluate(*untrained, task, max_new_tokens=1, temperature=0, num_samples=2)
