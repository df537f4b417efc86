"""The probability of a right chain by importance sampling: unbiased, and its gradient too."""

from random import Random

import numpy as np
import pytest
import torch

from rlsd_lib.measure.evaluate import sample
from rlsd_lib.measure.exact import right_chains
from rlsd_lib.tasks import load_task
from rlsd_lib.tasks.lab.arithmetic import draw_problem, first_error, verify
from rlsd_lib.tasks.lab.chains import Style, write_chain
from rlsd_lib.tasks.lab.model import LabRecipe, load_lab

RECIPE = LabRecipe(
    digits=1, hidden_size=64, steps=250, ramp_steps=50, hard_share=0.7, hard_high=0.5, nuisance=0.3
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return load_lab(tmp_path_factory.mktemp("cache"), RECIPE)


@pytest.fixture(scope="module")
def task():
    return load_task("arithmetic", train_size=20, test_size=15, digits=1, seed=0)


def is_right(text: str, row: dict) -> bool:
    return verify(text, row) and first_error(text, row) is None


def test_weights_and_samples_estimate_the_same_probability(lab, task):
    model, tokenizer = lab
    rows = list(task.test) * 40
    limit = {"max_new_tokens": RECIPE.max_completion_length}
    ids, weights = right_chains(model, tokenizer, task, rows, **limit)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    ended = zip(texts, rows, weights > 0, strict=True)
    assert all(is_right(text, row) for text, row, in_time in ended if in_time)
    assert (weights > 0).mean() > 0.8
    plain = sample(model, tokenizer, [row["prompt"] for row in rows], **limit, seed=1)
    texts = tokenizer.batch_decode(plain, skip_special_tokens=True)
    hits = np.array([is_right(*pair) for pair in zip(texts, rows, strict=True)], dtype=float)
    # Problems differ and are the same on both sides: the noise is that within a problem.
    noise = [values.reshape(40, 15).std(axis=0, ddof=1) for values in (weights, hits)]
    errors = [np.sqrt((spread**2).mean() / 600) for spread in noise]
    assert abs(weights.mean() - hits.mean()) < 3 * np.hypot(*errors)
    assert 0.05 < hits.mean() < 0.95
    assert errors[0] < errors[1] / 2


def test_the_draw_is_repeatable_and_leaves_torch_as_it_was(lab, task):
    model, tokenizer = lab
    before = torch.get_rng_state()
    draws = [
        right_chains(model, tokenizer, task, list(task.test), max_new_tokens=30, seed=seed)
        for seed in (3, 3, 4)
    ]
    assert torch.equal(before, torch.get_rng_state())
    assert draws[0][0] == draws[1][0] != draws[2][0]
    assert np.array_equal(draws[0][1], draws[1][1])


def test_a_chain_that_does_not_end_in_time_weighs_nothing(lab, task):
    _, weights = right_chains(*lab, task, list(task.test), max_new_tokens=3)
    assert not weights.any()


def test_a_task_without_right_chains_is_refused(lab):
    task = load_task("chain_sum", train_size=2, test_size=2, seed=0)
    with pytest.raises(ValueError, match="cannot tell a right chain"):
        right_chains(*lab, task, list(task.test), max_new_tokens=3)


def test_what_the_corpus_writes_is_allowed_up_to_its_first_error(task):
    random, beliefs = Random(0), LabRecipe(hard_share=1.0).beliefs
    for _ in range(200):
        row = draw_problem(random, 3)
        tokens = write_chain(row, random, Style(0.3), beliefs, quote=row["answer"]).split()
        error, chain = first_error(" ".join(tokens), row), task.right_chain(row)
        for index, token in enumerate(tokens):
            assert (token in chain.allowed()) == (index != error), (index, error, tokens)
            if not chain.read(token):
                break
        assert chain.is_complete == (error is None)
        assert bool(chain.allowed()) != chain.is_complete
