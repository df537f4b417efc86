"""Credit made of a success probability V, in worlds where V is an exact sum, to 1e-12."""

import torch
from torch import Tensor

from rlsd_lib import credit
from rlsd_lib.theory import hindsight as hi
from rlsd_lib.theory import worlds as wo

SEEDS = range(12)


def close(left: Tensor, right: Tensor, seed: int) -> None:
    assert (left - right).abs().max().item() < 1e-12, seed


def credits(world: hi.Tree) -> dict[str, Tensor]:
    return hi.credits_of(world, world.gap(world.teacher))


def test_the_ratio_of_the_hindsight_teacher_is_q_over_v_and_value_is_v():
    for seed in SEEDS:
        world = hi.random_tree(seed)
        values = world.values
        for h, step, before, after in zip(
            world.teacher, world.student, values[:-1], values[1:], strict=True
        ):
            close(h / step, after.view_as(step) / before[:, None], seed)
        gap = world.gap(world.teacher)
        ours = credit.value(world.group_success, gap, torch.ones_like(gap))
        for t, exact in enumerate(values[:-1]):
            close(ours[:, t], exact[world.rows[:, t]], seed)
        close(ours[:, -1], world.right, seed)


def test_the_policy_gradient_is_distillation_from_hindsight_weighted_by_value():
    """And without the weight it is not."""
    for seed in SEEDS:
        world = hi.random_tree(seed)
        exact = hi.policy_gradient(world)
        close(hi.distillation_gradient(world), exact, seed)
        plain = hi.distillation_gradient(world, by_value=False)
        assert torch.cosine_similarity(plain, exact, dim=0) < 0.999, seed


def test_opsd_value_is_that_weight_bounded_by_the_start():
    for seed in SEEDS:
        world = hi.random_tree(seed, certain=True)
        gap = world.gap(world.teacher)
        weight = credit.opsd_value(world.right, gap, torch.ones_like(gap))
        for t, exact in enumerate(world.values[:-1]):
            alive = exact[world.rows[:, t]] > 0
            expected = (exact / world.values[0]).clamp(max=1.0)[world.rows[:, t]]
            close(weight[:, t][alive], expected[alive], seed)
            assert not weight[:, t][~alive].any(), "a prefix that is lost teaches nothing"


def test_the_privileged_baseline_is_unbiased_whatever_the_teacher_is_worth():
    for seed in SEEDS:
        world = hi.random_tree(seed, certain=True)
        generator = torch.Generator().manual_seed(100 + seed)
        teachers = [
            list(world.student),
            [wo.random_simplex(generator, *x.shape, sharpness=3.0) for x in world.student],
            world.teacher,
        ]
        for teacher in teachers:
            given = hi.credits_of(world, world.gap(teacher))["privileged_baseline"]
            close(hi.moments(world, given)[0] * world.sigma, hi.policy_gradient(world), seed)


def test_hindsight_is_the_baselines_mean_given_what_was_said_so_far():
    """So with the hindsight teacher its gradient is right, and its variance the smaller one.

    Of tables of logits, that is: where prefixes share parameters see 38_theory_hindsight.
    """
    for seed in SEEDS:
        world = hi.random_tree(seed, certain=True)
        given = credits(world)
        moments = {name: hi.moments(world, x) for name, x in given.items()}
        close(moments["hindsight"][0] * world.sigma, hi.policy_gradient(world), seed)
        assert moments["hindsight"][1] <= moments["privileged_baseline"][1], seed
        assert moments["hindsight"][1] < moments["grpo"][1], seed
        for t in range(given["hindsight"].shape[1]):
            said = world.rows[:, t] * world.student[0].shape[-1] + world.tokens[:, t]
            total = torch.zeros(2, int(said.max()) + 1, dtype=torch.float64)
            for row, name in zip(total, ("privileged_baseline", "hindsight"), strict=True):
                row.index_add_(0, said, world.prob * given[name][:, t])
            close(total[0], total[1], seed)


def test_hindsight_may_have_more_variance_than_grpo():
    world = hi.loud_tree()
    given = credits(world)
    (mean, square), (grpo_mean, grpo_square) = (
        hi.moments(world, given[name]) for name in ("hindsight", "grpo")
    )
    close(mean, grpo_mean, 0)
    assert square > 1.2 * grpo_square


def test_posterior_blame_has_more_signal_per_noise_and_more_variance_than_grpo():
    """Its total is A n like GRPO's, so that blame in one place has a larger square."""
    better = 0
    for seed in SEEDS:
        world = hi.random_tree(seed, certain=True)
        given = credits(world)
        (mean, square), (grpo_mean, grpo_square) = (
            hi.moments(world, given[name]) for name in ("posterior_blame", "grpo")
        )
        assert square - mean.square().sum() > grpo_square - grpo_mean.square().sum(), seed
        better += int(mean.square().sum() / square > grpo_mean.square().sum() / grpo_square)
    assert better >= len(SEEDS) - 1


def test_of_two_rollouts_the_others_success_is_one_bit_and_the_bound_cuts_after_a_right_one():
    """V_0 is then 1/16 or 15/16. After a wrong other, `hindsight` points along grad J exactly and
    `posterior_blame` is what the exact V_0 gives; after a right one both lose what lies above 1.
    """
    for seed in SEEDS:
        world = hi.random_tree(seed, certain=True)
        assert 1 / 16 < world.values[0] < 15 / 16, seed
        gap = world.gap(world.teacher)
        exact, ends = hi.credits_of(world, gap), {}
        a, ones = (world.right - world.group_success) / world.sigma, torch.ones_like(gap)
        for other, prior in ((0, 1 / 16), (1, 15 / 16)):
            pairs = torch.stack([world.right, torch.full_like(world.right, other)], dim=1)
            known = {"group_success": credit.leave_one_out(pairs.flatten(), 2)[::2]}
            values = credit.value(known["group_success"], gap, ones)
            close(values[:, 0], torch.full_like(a, prior), seed)
            ends[other] = (
                hi.moments(world, credit.hindsight(a, gap, ones, **known))[0] * (1 - prior) ** 0.5,
                credit.posterior_blame(a, gap, ones, **known),
            )
        truth = hi.policy_gradient(world)
        close(ends[0][0], truth * (1 / 16) ** 0.5 / world.values[0], seed)
        close(ends[0][1], exact["posterior_blame"], seed)
        cosines = [torch.cosine_similarity(end[0], truth, dim=0).item() for end in ends.values()]
        assert abs(cosines[0] - 1) < 1e-12 and 0 < cosines[1] < 0.999, (seed, cosines)
        assert (ends[1][1] - exact["posterior_blame"]).abs().max() > 1e-3, seed
