"""The probability of a right chain by importance sampling: unbiased, and its gradient too."""

from random import Random

import numpy as np
import pytest
import torch

from rlsd_lib.experiment.presets import PRESETS
from rlsd_lib.measure.evaluate import sample
from rlsd_lib.measure.exact import right_chains
from rlsd_lib.measure.oracle import success_signals
from rlsd_lib.tasks import load_task
from rlsd_lib.tasks.lab.arithmetic import draw_problem, first_error, verify
from rlsd_lib.tasks.lab.chains import Style, write_chain
from rlsd_lib.tasks.lab.model import LabRecipe

LONGEST = LabRecipe(**PRESETS["smoke"].model_options).max_completion_length


@pytest.fixture(scope="module")
def task():
    return load_task("arithmetic", train_size=20, test_size=15, digits=1, seed=0)


def is_right(text: str, row: dict) -> bool:
    return verify(text, row) and first_error(text, row) is None


def test_weights_and_samples_estimate_the_same_probability(smoke_lab, task):
    model, tokenizer = smoke_lab
    rows = list(task.test) * 40
    limit = {"max_new_tokens": LONGEST}
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


def test_the_draw_is_repeatable_and_leaves_torch_as_it_was(smoke_lab, task):
    model, tokenizer = smoke_lab
    before = torch.get_rng_state()
    draws = [
        right_chains(model, tokenizer, task, list(task.test), max_new_tokens=30, seed=seed)
        for seed in (3, 3, 4)
    ]
    assert torch.equal(before, torch.get_rng_state())
    assert draws[0][0] == draws[1][0] != draws[2][0]
    assert np.array_equal(draws[0][1], draws[1][1])


def test_a_chain_that_does_not_end_in_time_weighs_nothing(smoke_lab, task):
    _, weights = right_chains(*smoke_lab, task, list(task.test), max_new_tokens=3)
    assert not weights.any()


def test_a_task_without_right_chains_is_refused(smoke_lab):
    task = load_task("chain_sum", train_size=2, test_size=2, seed=0)
    with pytest.raises(ValueError, match="cannot tell a right chain"):
        right_chains(*smoke_lab, task, list(task.test), max_new_tokens=3)


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


def test_the_value_along_a_rollout_is_the_success_probability_of_its_prefix(smoke_lab, task):
    """Before the first token that of the problem, 1 at a right end, 0 from the first error on."""
    model, tokenizer = smoke_lab
    problems = list(task.test)
    rows, count = problems * 8, len(problems)
    limit = {"max_new_tokens": LONGEST}
    _, weights = right_chains(model, tokenizer, task, problems * 40, **limit)
    plain = sample(model, tokenizer, [row["prompt"] for row in rows], **limit, seed=3)
    width = LONGEST
    found = success_signals(model, tokenizer, task, rows, plain, width=width, **limit)
    exact = weights.reshape(40, -1).mean(axis=0)
    before, after = found["success_before"].numpy(), found["success_after"]
    assert np.array_equal(before[:count], before[-count:])  # the mean of a problem's eight chains
    assert np.abs(before[:count] - exact).mean() < 0.03
    assert np.corrcoef(before[:count], exact)[0, 1] > 0.95
    texts = tokenizer.batch_decode(plain, skip_special_tokens=True)
    ends = []
    for row, text, ids, values in zip(rows, texts, plain, after, strict=True):
        if len(text.split()) + 1 != len(ids):
            continue  # cut, or with a special token inside, which the text does not have
        error = first_error(text, row)
        ends.append(error is None)
        assert values[len(ids) - 1] == float(error is None)
        assert not values[len(ids) if error is None else error :].any()
        assert (values[:error] > 0).all() if error is not None else (values[: len(ids)] > 0).all()
        steps = values[: len(ids) if error is None else error].diff()
        assert (steps >= -1e-6).all()  # a token that keeps the chain right never lowers V
    assert len(set(ends)) == 2
