"""The gradients that are measured on models, on one linear layer where they can be written out."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsd_lib.theory import direction, measured

TIGHT = {"rtol": 0, "atol": 1e-10}


@given(st.integers(0, 2**31 - 1))
@settings(deadline=None, max_examples=15, derandomize=True, database=None)
def test_gradients_of_a_linear_model(seed):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    student = 1.0 * weights
    teacher, credit = torch.randn(2, 2, 3, 5, generator=generator, dtype=torch.float64)
    credit, tokens = credit[..., 0], torch.randint(5, (2, 3), generator=generator)
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    probs, onehot = weights.detach().softmax(-1), torch.nn.functional.one_hot(tokens, 5)
    scores = onehot - probs
    actual = measured.credit_gradient(student, tokens, credit, mask, [weights])
    expected = (scores * (credit * mask).unsqueeze(-1)).flatten()
    torch.testing.assert_close(actual, expected, **TIGHT)

    weight = torch.tensor([0.5, 2.0], dtype=torch.float64)
    actual = measured.reverse_kl_gradient(student, teacher, weight, mask, [weights])
    rows = [
        direction.reverse_kl_step(p, q)
        for p, q in zip(probs.view(-1, 5), teacher.softmax(-1).view(-1, 5), strict=True)
    ]
    expected = torch.stack(rows).view(2, 3, 5) * (weight.unsqueeze(-1) * mask).unsqueeze(-1)
    torch.testing.assert_close(actual, expected.flatten(), **TIGHT)

    advantages = torch.tensor([1.5, -0.5], dtype=torch.float64)
    all_ = measured.update_gradients(
        student, teacher, tokens, advantages, mask, [weights], lam=0.5, epsilon_w=0.2
    )
    onto = measured.credit_gradient(
        student, tokens, advantages[:, None].expand(2, 3), mask, [weights]
    )
    torch.testing.assert_close(all_["grpo"], onto, **TIGHT)
    gap = measured.sampled_log_probs(teacher, tokens) - measured.sampled_log_probs(student, tokens)
    added = direction.added_credit(advantages, gap.detach(), lam=0.5, epsilon_w=0.2)
    onto = measured.credit_gradient(student, tokens, added, mask, [weights])
    torch.testing.assert_close(all_["rlsd"], onto, **TIGHT)
    push = 0.5 * advantages[:, None] * (gap.abs().exp().clamp(max=1.2) - 1).detach()
    onto = measured.credit_gradient(student, tokens, push, mask, [weights])
    torch.testing.assert_close(all_["sign-free"], onto, **TIGHT)
    onto = measured.reverse_kl_gradient(student, teacher, advantages.abs(), mask, [weights])
    torch.testing.assert_close(all_["reverse KL"], onto, **TIGHT)

    positions = torch.tensor([[0, 1], [1, 2]])
    norms = measured.token_gradient_norms(student, tokens, positions, [weights])
    torch.testing.assert_close(norms, scores.norm(dim=-1)[[0, 1], [1, 2]], **TIGHT)
