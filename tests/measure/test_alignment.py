"""One-step alignment: signs, shares and the true gradient itself."""

import pytest
import torch

from rlsd_lib import credit
from rlsd_lib.measure.alignment import alignment
from rlsd_lib.tasks import load_task
from rlsd_lib.tasks.lab.model import LabRecipe, load_lab
from rlsd_lib.trainer.config import RLSDConfig

RECIPE = LabRecipe(
    digits=1, hidden_size=64, steps=250, ramp_steps=50, hard_share=0.7, hard_high=0.5, nuisance=0.3
)
REQUESTS = {"batches": 6, "problems": 8}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    task = load_task("arithmetic", train_size=40, test_size=5, digits=1, seed=0)
    config = RLSDConfig(
        output_dir=str(tmp_path_factory.mktemp("unused")),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=40,
        privileged_template=task.privileged_template,
        use_cpu=True,
        bf16=False,
    )
    model, tokenizer = load_lab(tmp_path_factory.mktemp("cache"), RECIPE)
    return model, tokenizer, task, config


def against(advantages, gap, mask):
    return -credit.uniform(advantages, gap, mask)


def outcome(advantages, gap, mask, *, rewards):
    return rewards[:, None].expand_as(gap)


def test_signs_and_shares_are_those_of_the_credit(setting):
    rows = {"grpo": credit.uniform, "against": against, "oracle": credit.oracle}
    rows |= {"silent": credit.silent, "rlsd": credit.rlsd, "value": credit.oracle_value}
    before = torch.get_rng_state()
    table = alignment(*setting, rows, **REQUESTS).set_index("credit")
    assert torch.equal(before, torch.get_rng_state())
    assert table.loc["against", "cosine"] == pytest.approx(-table.loc["grpo", "cosine"])
    assert table.loc["grpo", "cosine"] > 0
    assert table.loc["oracle", "first error"] == pytest.approx(1.0)
    assert table.loc["oracle", ["after it", "filler"]].tolist() == [0.0, 0.0]
    assert table.loc["silent"].isna().sum() >= 3
    # The true advantage puts no blame behind an error.
    assert table.loc["value", "after it"] == 0.0
    assert table.loc["value", "cosine"] > table.loc["grpo", "cosine"]
    # Uniform blame falls on kinds of token by their number: one token in a chain is the first error.
    assert 0.02 < table.loc["grpo", "first error"] < 0.2
    assert table.loc["rlsd", "first error"] > table.loc["grpo", "first error"]


def test_the_true_gradient_is_what_reinforcement_tends_to(setting):
    """REINFORCE with the bare outcome is unbiased, and its mean comes near with enough batches."""
    few = alignment(*setting, {"outcome": outcome}, batches=4, problems=10).loc[0]
    many = alignment(*setting, {"outcome": outcome}, batches=16, problems=30).loc[0]
    assert few["cosine of the mean"] < many["cosine of the mean"]
    assert many["cosine of the mean"] > 0.6
    assert many["noise / signal"] > 0


def test_a_task_that_does_not_know_its_chains_is_refused(setting):
    model, tokenizer, _, config = setting
    task = load_task("chain_sum", train_size=2, test_size=2, seed=0)
    with pytest.raises(ValueError, match="cannot tell a right chain"):
        alignment(model, tokenizer, task, config, {"grpo": credit.uniform})
