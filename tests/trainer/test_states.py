"""The distillation term's mean over tokens, against TRL's own loss."""

import pytest
import tiny
import torch

from rlsd_lib.trainer.states import loss_mask, token_mean

LOSSES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")


@pytest.mark.parametrize("tools", [False, True])
def test_the_mean_over_tokens_is_trls_for_every_loss_type(tmp_path, tools):
    """With A = -x and a ratio of 1 TRL's loss is its mean of x, whatever its loss type."""
    trainer = tiny.trainer(tmp_path, method="grpo", epsilon_high=5.0, sapo_temperature_neg=2.0)
    trainer.current_gradient_accumulation_steps = 3
    torch.manual_seed(0)
    values, mask = torch.rand(4, 7), (torch.arange(7) < torch.tensor([[7], [2], [5], [0]])).long()
    inputs = {
        "prompt_ids": torch.ones(4, 2, dtype=torch.long),
        "prompt_mask": torch.ones(4, 2, dtype=torch.long),
        "completion_ids": torch.ones(4, 7, dtype=torch.long),
        "completion_mask": mask,
        "advantages": -values,
        "num_items_in_batch": torch.tensor(40.0),
    }
    if tools:
        inputs["tool_mask"] = (torch.arange(7) != 1).long().expand(4, 7)
    # Where the loss is A log P, a log-probability of 1 makes it A.
    ones = torch.ones(4, 7, requires_grad=True)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (ones, torch.zeros(4, 7), None)
    trainer.model.train()
    found = set()
    for loss_type in LOSSES:
        trainer.loss_type = trainer.args.loss_type = loss_type
        theirs = trainer._compute_loss(trainer.model, inputs)
        ours = token_mean(
            values,
            loss_mask(inputs),
            trainer.args,
            num_items=inputs["num_items_in_batch"],
            num_processes=1,
            accumulation=3,
        )
        torch.testing.assert_close(ours, theirs.detach(), msg=loss_type)
        found.add(round(ours.item(), 6))
    assert len(found) == 5, "grpo and sapo, and dapo, cispo and vespo, are one mean each"
