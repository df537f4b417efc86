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
        gap, known = world.gap(world.teacher), {"group_success": world.group_success}
        weight = credit.opsd_value(world.right, gap, torch.ones_like(gap), **known)
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
    """So with the hindsight teacher its gradient is right, and its variance the smaller one."""
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
