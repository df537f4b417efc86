"""The credit functions: properties over random tensors in float64, and the schedule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsd_lib import credit

REWEIGHTING = [credit.rlsd, credit.rlsd_neutral]
both = pytest.mark.parametrize("function", REWEIGHTING)
unit = st.floats(0, 1)
widths = st.floats(0, 3)


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n, t = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]))
    advantages = torch.randn(n, generator=generator, dtype=torch.float64)
    advantages[torch.rand(n, generator=generator) < 0.3] = 0.0
    gap = scale * torch.randn(n, t, generator=generator, dtype=torch.float64)
    mask = (torch.rand(n, t, generator=generator) < 0.7).long()
    return advantages, gap, mask


@both
@settings(deadline=None, max_examples=150)
@given(batch=batches(), lam=unit, epsilon_w=widths)
def test_sign_is_kept_and_bounds_hold(function, batch, lam, epsilon_w):
    advantages, gap, mask = batch
    credited = function(advantages, gap, mask, lam=lam, epsilon_w=epsilon_w)
    ratio = credited / torch.where(advantages == 0, 1.0, advantages)[:, None]
    moving = (advantages != 0)[:, None].expand_as(gap)
    assert credited.isfinite().all()
    assert (credited[~moving] == 0).all()
    low = 1 - lam * min(epsilon_w, 1.0)
    assert (ratio[moving] >= low - 1e-12).all()
    assert (ratio[moving] <= 1 + lam * epsilon_w + 1e-12).all()


@both
@settings(deadline=None, max_examples=50)
@given(batch=batches(), lam=unit, epsilon_w=widths)
def test_rows_are_independent_and_masked_tokens_do_not_matter(function, batch, lam, epsilon_w):
    advantages, gap, mask = batch
    credited = function(advantages, gap, mask, lam=lam, epsilon_w=epsilon_w)
    order = torch.randperm(len(advantages))
    again = function(advantages[order], gap[order], mask[order], lam=lam, epsilon_w=epsilon_w)
    assert torch.equal(again, credited[order])
    noisy = torch.where(mask.bool(), gap, torch.full_like(gap, float("nan")))
    assert torch.equal(function(advantages, noisy, mask, lam=lam, epsilon_w=epsilon_w), credited)
    outside = ~mask.bool()
    assert torch.equal(credited[outside], advantages[:, None].expand_as(gap)[outside])


@both
@settings(deadline=None, max_examples=100)
@given(batch=batches(), lam=unit, epsilon_w=widths)
def test_the_log_clip_reaches_as_far_down_as_up(function, batch, lam, epsilon_w):
    advantages, gap, mask = batch
    credited = function(advantages, gap, mask, lam=lam, epsilon_w=epsilon_w, log_clip=True)
    ratio = (credited / torch.where(advantages == 0, 1.0, advantages)[:, None])[advantages != 0]
    assert (ratio >= 1 - lam + lam / (1 + epsilon_w) - 1e-12).all()
    assert (ratio <= 1 + lam * epsilon_w + 1e-12).all()


@both
@settings(deadline=None, max_examples=100)
@given(batch=batches(), lam=unit, epsilon_w=widths, log_clip=st.booleans())
def test_conserved_credit_keeps_the_advantage_of_each_rollout(
    function, batch, lam, epsilon_w, log_clip
):
    advantages, gap, mask = batch
    options = {"lam": lam, "epsilon_w": epsilon_w, "log_clip": log_clip, "conserve": True}
    credited = function(advantages, gap, mask, **options)
    assert credited.isfinite().all()
    assert (credited * advantages[:, None] >= 0).all()
    torch.testing.assert_close((credited * mask).sum(1), advantages * mask.sum(1))


def test_conserved_weights_worked_out_by_hand():
    gap = torch.tensor([[2.0, 0.25, 9.0]], dtype=torch.float64).log()
    options = {"lam": 1.0, "epsilon_w": 1.0, "log_clip": True, "conserve": True}
    credited = credit.rlsd(torch.tensor([1.0]), gap, torch.tensor([[1, 1, 0]]), **options)
    # Clipped to 2 and 1/2, of mean 5/4; the masked token counts in neither.
    torch.testing.assert_close(credited, torch.tensor([[1.6, 0.4, 1.0]], dtype=torch.float64))


def test_drift_is_the_credit_that_no_verdict_caused():
    advantages, gap = torch.tensor([1.0, -2.0, 0.0]).double(), torch.randn(3, 40).double()
    mask = (torch.rand(3, 40) < 0.7).long()
    scale = (advantages.abs()[:, None] * gap.abs() * mask).sum()

    def drift(function, **options):
        assigned = [function(a, gap, mask, **options) for a in (advantages, -advantages)]
        total, count = credit.drift_sums(*assigned, advantages, gap, mask)["drift"]
        torch.testing.assert_close(count, scale)
        return total

    wide = {"lam": 0.3, "epsilon_w": 1e6}
    expected = (0.3 * advantages.abs()[:, None] * gap.sinh() * gap * mask).sum()
    # The clip at 0 is never reached and that at 1e6 not either, so this is exp without a clip.
    torch.testing.assert_close(drift(credit.rlsd, **wide), expected)
    for blind in (credit.uniform, credit.rlsd_neutral):
        torch.testing.assert_close(drift(blind, **wide), torch.zeros_like(scale))


@both
def test_no_gradient_flows(function):
    gap = torch.randn(2, 3, requires_grad=True)
    credited = function(torch.tensor([1.0, -1.0]), gap, torch.ones(2, 3), lam=0.5, epsilon_w=0.2)
    assert not credited.requires_grad


def test_rlsd_on_numbers_worked_out_by_hand():
    # w = exp(sign(A) Delta): 2 -> clipped to 1.2, 1/2 -> clipped to 0.8, 1.1 stays.
    gap = torch.tensor([[2.0, 0.5, 1.1]], dtype=torch.float64).log()
    mask = torch.ones(1, 3)
    up = credit.rlsd(torch.tensor([3.0]), gap, mask, lam=0.5, epsilon_w=0.2)
    torch.testing.assert_close(up, torch.tensor([[3.3, 2.7, 3.15]], dtype=torch.float64))
    # A < 0 inverts the ratios: 1/2 -> 0.8, 2 -> 1.2, 1/1.1 = 0.909 stays.
    down = credit.rlsd(torch.tensor([-1.0]), gap, mask, lam=1.0, epsilon_w=0.2)
    torch.testing.assert_close(down, -torch.tensor([[0.8, 1.2, 1 / 1.1]], dtype=torch.float64))


def test_neutral_weight_ignores_the_sign_of_the_advantage():
    gap, mask = torch.randn(1, 9, dtype=torch.float64), torch.ones(1, 9)
    weights = [
        credit.rlsd_neutral(torch.tensor([a]), gap, mask, lam=1.0, epsilon_w=0.5) / a
        for a in (1.0, -2.0)
    ]
    torch.testing.assert_close(weights[0], weights[1])
    assert (weights[0] >= 1).all()


def test_wide_clip_leaves_the_lower_side_open():
    gap = torch.tensor([[-1e4, -3.0]], dtype=torch.float64)
    credited = credit.rlsd(torch.tensor([1.0]), gap, torch.ones(1, 2), lam=1.0, epsilon_w=9.0)
    torch.testing.assert_close(credited, gap.exp())


def test_uniform_and_sampled_distillation():
    advantages, gap = torch.tensor([2.0, -1.0]), torch.randn(2, 3)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert torch.equal(credit.uniform(advantages, gap, mask), advantages[:, None].expand(2, 3))
    assert torch.equal(credit.sampled_distillation(advantages, gap, mask), gap * mask)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"advantages \(N,\)"):
        credit.rlsd(torch.ones(2, 1), torch.ones(2, 3), torch.ones(2, 3), lam=0.5, epsilon_w=0.2)


def test_schedule_of_the_paper_and_of_the_launch_script():
    assert [credit.lambda_schedule(k, 0.5, 0, 50) for k in (0, 25, 50, 99)] == [0.5, 0.25, 0, 0]
    assert [credit.lambda_schedule(k, 0.5, 4, 10) for k in (0, 2, 4, 9, 14)] == [
        0.0,
        0.25,
        0.5,
        0.25,
        0.0,
    ]
    assert credit.lambda_schedule(10_000, 0.3, 5, 0) == 0.3


def test_sums_count_clipped_tokens_and_skip_zero_advantages():
    advantages = torch.tensor([1.0, 0.0])
    gap = torch.tensor([[2.0, 0.5, 1.0, 7.0], [3.0, 1.0, 1.0, 1.0]]).log()
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    log_weight = credit.signed_evidence(advantages, gap)
    credited = credit.rlsd(advantages, gap, mask, lam=0.5, epsilon_w=0.2)
    sums = credit.weight_sums(log_weight, mask, 0.2)
    sums |= credit.intervention_sums(credited, advantages, mask)
    sums |= credit.gap_sums(gap, mask)
    mean = {name: (total / count).item() for name, (total, count) in sums.items()}
    assert mean["clip_high_frac"] == pytest.approx(1 / 5)
    assert mean["clip_low_frac"] == pytest.approx(1 / 5)
    assert mean["intervention"] == pytest.approx((0.1 + 0.1 + 0) / 3)
    assert mean["gap_abs_mean"] == pytest.approx(gap[mask.bool()].abs().mean().item())
    assert mean["weight_mean"] == pytest.approx((1.2 + 0.8 + 1 + 1 + 1) / 5)
