"""Credit made of a success probability V, in worlds where V is an exact sum.

V(y_<t) is the student's success probability from a prefix, Q(y_<t, v) that after one token more, and
the hindsight teacher h_t(v) = P_S(v | y_<t, success). Everything is enumerated, in float64.
"""

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from rlsd_lib import credit
from rlsd_lib.divergence import forward_kl
from rlsd_lib.theory import worlds as wo

SEEDS = range(12)


class Tree(NamedTuple):
    """All V**T completions of a student, each right with a probability."""

    student: tuple[Tensor, ...]  # of position t: (V**t, V)
    right: Tensor  # (V**T,), probability of success
    tokens: Tensor  # (V**T, T)
    rows: Tensor  # (V**T, T), the prefix of each token as a row of its table

    @property
    def prob(self) -> Tensor:
        return wo.reach(self.student)[-1]

    @property
    def values(self) -> list[Tensor]:
        """V of every prefix by backward sums, (V**t,) for t = 0 .. T."""
        values = [self.right]
        for step in reversed(self.student):
            values.insert(0, (step * values[0].view_as(step)).sum(-1))
        return values

    @property
    def hindsight_teacher(self) -> list[Tensor]:
        """h_t by Bayes' rule from the joint law of completion and success, (V**t, V) each."""
        joint, teacher = self.prob * self.right, []
        for step in self.student:
            mass = joint.view(*step.shape, -1).sum(-1)
            teacher.append(mass / mass.sum(-1, keepdim=True))
        return teacher

    def taken(self, tables: list[Tensor]) -> Tensor:
        """The entries of the tokens that each completion takes: (V**T, T)."""
        return torch.stack(
            [x[self.rows[:, t], self.tokens[:, t]] for t, x in enumerate(tables)], dim=1
        )

    def gap(self, teacher: list[Tensor]) -> Tensor:
        """log P_T - log P_S of the taken tokens, -1e3 for -inf: (V**T, T)."""
        return (self.taken(teacher).log() - self.taken(self.student).log()).clamp(min=-1e3)

    def moments(self, credited: Tensor) -> tuple[Tensor, Tensor]:
        """E[g] and E[||g||^2] of g = sum_t credit_t grad log P_S(y_t), in the student's logits."""
        mean, square = [], torch.zeros((), dtype=torch.float64)
        for t, step in enumerate(self.student):
            score = torch.eye(step.shape[-1]).double()[self.tokens[:, t]] - step[self.rows[:, t]]
            pull = credited[:, t, None] * score
            square = square + (self.prob[:, None] * pull.square()).sum()
            mean.append(
                torch.zeros_like(step).index_add(0, self.rows[:, t], self.prob[:, None] * pull)
            )
        return torch.cat([x.flatten() for x in mean]), square

    def group_success(self) -> Tensor:
        """The exact V_0, as each rollout would learn it from a large group."""
        return self.values[0].expand(len(self.right))

    def sigma(self) -> Tensor:
        return (self.values[0] * (1 - self.values[0])).sqrt()


def tree(seed: int, vocab: int = 3, length: int = 3, certain: bool = False) -> Tree:
    """Random student; success is a random probability, or if `certain` 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    student = [wo.random_simplex(generator, vocab**t, vocab) for t in range(length)]
    right = torch.rand(vocab**length, generator=generator, dtype=torch.float64)
    listed = list(product(range(vocab), repeat=length))
    rows = [wo.prefix_indices(tokens, vocab) for tokens in listed]
    return Tree(
        tuple(student),
        (right < 0.5).double() if certain else right,
        torch.tensor(listed),
        torch.tensor(rows),
    )


def policy_gradient(world: Tree) -> Tensor:
    """grad J of J = E[R] in the student's logits, by autograd."""
    logits = [step.log().requires_grad_() for step in world.student]
    prob = wo.reach(tuple(x.softmax(-1) for x in logits))[-1]
    grads = torch.autograd.grad((prob * world.right).sum(), logits)
    return torch.cat([x.flatten() for x in grads])


def close(left: Tensor, right: Tensor, seed: int) -> None:
    assert (left - right).abs().max().item() < 1e-12, seed


def test_the_ratio_of_the_hindsight_teacher_is_q_over_v_and_value_is_v():
    for seed in SEEDS:
        world = tree(seed)
        teacher, values = world.hindsight_teacher, world.values
        for h, step, before, after in zip(
            teacher, world.student, values[:-1], values[1:], strict=True
        ):
            close(h / step, after.view_as(step) / before[:, None], seed)
        gap = world.gap(teacher)
        ours = credit.value(world.group_success(), gap, torch.ones_like(gap))
        for t, exact in enumerate(values[:-1]):
            close(ours[:, t], exact[world.rows[:, t]], seed)
        close(ours[:, -1], world.right, seed)


def test_the_policy_gradient_is_distillation_from_hindsight_weighted_by_value():
    """grad J = -E sum_t V(y_<t) grad KL(h_t || P_S), with the gradient through P_S alone."""
    for seed in SEEDS:
        world = tree(seed)
        gap = world.gap(world.hindsight_teacher)
        values = credit.value(world.group_success(), gap, torch.ones_like(gap))[:, :-1]
        logits = [step.log().requires_grad_() for step in world.student]
        loss = torch.zeros((), dtype=torch.float64)
        for t, (h, x) in enumerate(zip(world.hindsight_teacher, logits, strict=True)):
            distance = forward_kl(h.log(), x.log_softmax(-1))[world.rows[:, t]]
            loss = loss + (world.prob * values[:, t] * distance).sum()
        step = -torch.cat([x.flatten() for x in torch.autograd.grad(loss, logits)])
        close(step, policy_gradient(world), seed)


def test_opsd_value_is_that_weight_bounded_by_the_start():
    for seed in SEEDS:
        world = tree(seed, certain=True)
        gap = world.gap([x.nan_to_num(nan=0.5) for x in world.hindsight_teacher])
        weight = credit.opsd_value(world.right, gap, torch.ones_like(gap))
        for t, exact in enumerate(world.values[:-1]):
            alive = exact[world.rows[:, t]] > 0
            expected = (exact / world.values[0]).clamp(max=1.0)[world.rows[:, t]]
            close(weight[:, t][alive], expected[alive], seed)
            assert not weight[:, t][~alive].any(), "a prefix that is lost teaches nothing"


def advantages(world: Tree) -> Tensor:
    return (world.right - world.values[0]) / world.sigma()


def credits(world: Tree, gap: Tensor) -> dict[str, Tensor]:
    """What GRPO and the rows made of V give to every completion of a world of certain success."""
    a, ones, known = (
        advantages(world),
        torch.ones_like(gap),
        {"group_success": world.group_success()},
    )
    return {
        "grpo": credit.uniform(a, gap, ones),
        "privileged_baseline": credit.privileged_baseline(
            a, gap, ones, success=world.right, **known
        ),
        "hindsight": credit.hindsight(a, gap, ones, **known),
        "posterior_blame": credit.posterior_blame(a, gap, ones, **known),
    }


def test_the_privileged_baseline_is_unbiased_whatever_the_teacher_is_worth():
    for seed in SEEDS:
        world = tree(seed, certain=True)
        generator = torch.Generator().manual_seed(100 + seed)
        teachers = [
            list(world.student),
            [wo.random_simplex(generator, *x.shape, sharpness=3.0) for x in world.student],
            [x.nan_to_num(nan=0.5) for x in world.hindsight_teacher],
        ]
        for teacher in teachers:
            given = credits(world, world.gap(teacher))["privileged_baseline"]
            close(world.moments(given)[0] * world.sigma(), policy_gradient(world), seed)


def test_hindsight_is_the_baselines_mean_given_what_was_said_so_far():
    """So with the hindsight teacher its gradient is right, and its variance the smaller one."""
    for seed in SEEDS:
        world = tree(seed, certain=True)
        given = credits(world, world.gap([x.nan_to_num(nan=0.5) for x in world.hindsight_teacher]))
        moments = {name: world.moments(x) for name, x in given.items()}
        close(moments["hindsight"][0] * world.sigma(), policy_gradient(world), seed)
        assert moments["hindsight"][1] <= moments["privileged_baseline"][1], seed
        assert moments["hindsight"][1] < moments["grpo"][1], seed
        for t in range(given["hindsight"].shape[1]):
            said = world.rows[:, t] * world.student[0].shape[-1] + world.tokens[:, t]
            total = torch.zeros(2, int(said.max()) + 1, dtype=torch.float64)
            for row, name in zip(total, ("privileged_baseline", "hindsight"), strict=True):
                row.index_add_(0, said, world.prob * given[name][:, t])
            close(total[0], total[1], seed)


def test_hindsight_may_have_more_variance_than_grpo():
    """A coin decides between a prefix of V = 0.08 and one of 0.92; then the unlikely token is loud."""
    student = (wo.table([[0.5, 0.5]]), wo.table([[0.92, 0.08], [0.08, 0.92]]))
    world = tree(0, vocab=2, length=2)._replace(student=student, right=wo.table([0, 1, 0, 1]))
    given = credits(world, world.gap(world.hindsight_teacher))
    (mean, square), (grpo_mean, grpo_square) = (
        world.moments(given[name]) for name in ("hindsight", "grpo")
    )
    close(mean, grpo_mean, 0)
    assert square > 1.2 * grpo_square


def test_posterior_blame_has_more_signal_per_noise_and_more_variance_than_grpo():
    """Its total is A n like GRPO's, so that blame in one place has a larger square."""
    better = 0
    for seed in SEEDS:
        world = tree(seed, certain=True)
        given = credits(world, world.gap([x.nan_to_num(nan=0.5) for x in world.hindsight_teacher]))
        (mean, square), (grpo_mean, grpo_square) = (
            world.moments(given[name]) for name in ("posterior_blame", "grpo")
        )
        assert square - mean.square().sum() > grpo_square - grpo_mean.square().sum(), seed
        better += int(mean.square().sum() / square > grpo_mean.square().sum() / grpo_square)
    assert better >= len(SEEDS) - 1


def test_of_two_rollouts_the_others_success_is_one_bit_and_the_bound_cuts_after_a_right_one():
    """V_0 is then 1/16 or 15/16. After a wrong other, `hindsight` points along grad J exactly and
    `posterior_blame` is what the exact V_0 gives; after a right one both lose what lies above 1.
    """
    moved = 0
    for seed in SEEDS:
        world = tree(seed, certain=True)
        assert 1 / 16 < world.values[0] < 15 / 16, seed
        gap = world.gap([x.nan_to_num(nan=0.5) for x in world.hindsight_teacher])
        exact, ends = credits(world, gap), {}
        for other, prior in ((0, 1 / 16), (1, 15 / 16)):
            pairs = torch.stack([world.right, torch.full_like(world.right, other)], dim=1)
            known = {"group_success": credit.leave_one_out(pairs.flatten(), 2)[::2]}
            a, ones = advantages(world), torch.ones_like(gap)
            values = credit.value(known["group_success"], gap, ones)
            close(values[:, 0], torch.full_like(a, prior), seed)
            ends[other] = (
                world.moments(credit.hindsight(a, gap, ones, **known))[0] * (1 - prior) ** 0.5,
                credit.posterior_blame(a, gap, ones, **known),
            )
        truth = policy_gradient(world)
        close(ends[0][0], truth * (1 / 16) ** 0.5 / world.values[0], seed)
        close(ends[0][1], exact["posterior_blame"], seed)
        cosines = [torch.cosine_similarity(end[0], truth, dim=0).item() for end in ends.values()]
        assert abs(cosines[0] - 1) < 1e-12 and 0 < cosines[1] < 0.999, (seed, cosines)
        moved += int((ends[1][1] - exact["posterior_blame"]).abs().max() > 1e-3)
    assert moved == len(SEEDS)
