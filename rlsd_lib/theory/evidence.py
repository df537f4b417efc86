"""Theorem 4: what the ratio P_T(y_t) / P_S(y_t) says about r, with and without a joint."""

import torch
from torch import Tensor

from .worlds import SequenceWorld, mean_teacher, reach


def posteriors(world: SequenceWorld) -> list[Tensor]:
    """P(r | y_<=t) under the teacher's own joint, prior times conditionals: entry t is (m, V**t)."""
    joints = [world.prior.unsqueeze(-1)]
    for step in world.teacher:
        joints.append((joints[-1].unsqueeze(-1) * step).flatten(1))
    return [joint / joint.sum(0) for joint in joints]


def predictive(world: SequenceWorld) -> tuple[Tensor, ...]:
    """P_mix = sum_r P(r | y_<t) P_T(y_t | r, y_<t), the student of Theorem 4: entry t is (V**t, V)."""
    pairs = zip(posteriors(world), world.teacher, strict=False)
    return tuple((post.unsqueeze(-1) * step).sum(0) for post, step in pairs)


def leave_joint(world: SequenceWorld, alpha: float) -> SequenceWorld:
    """Move the student's logits from those of `predictive` (alpha 0) to the given ones (alpha 1)."""
    pairs = zip(predictive(world), world.student, strict=True)
    mixed = [torch.softmax((1 - alpha) * p.log() + alpha * q.log(), -1) for p, q in pairs]
    return world._replace(student=tuple(mixed))


def evidence(world: SequenceWorld) -> list[Tensor]:
    """Delta_t = log P_T(y_t | r, y_<t) - log P_S(y_t | y_<t): entry t is (m, V**(t+1))."""
    pairs = zip(world.teacher, world.student, strict=True)
    return [(teacher.log() - student.log()).flatten(1) for teacher, student in pairs]


def belief_change(world: SequenceWorld) -> list[Tensor]:
    """log P(r | y_<=t) - log P(r | y_<t), the right side of Theorem 4: entry t (m, V**(t+1))."""
    posts = posteriors(world)
    vocab = world.student[0].shape[-1]
    before = [post.repeat_interleave(vocab, dim=1) for post in posts[:-1]]
    return [new.log() - old.log() for new, old in zip(posts[1:], before, strict=True)]


def format_term(world: SequenceWorld) -> list[Tensor]:
    """log P_mix(y_t) - log P_S(y_t): entry t is (V**(t+1),).

    Corrected Theorem 4: evidence = belief change + this term, which never depends on r. Its mean over
    student rollouts is -KL(P_S || P_mix).
    """
    pairs = zip(predictive(world), world.student, strict=True)
    return [(mix.log() - student.log()).flatten() for mix, student in pairs]


def sequence_sum(per_position: list[Tensor]) -> Tensor:
    """Sum of a per-token quantity along every completion: entries (..., V**(t+1)) -> (..., V**T)."""
    size = per_position[-1].shape[-1]
    return sum(part.repeat_interleave(size // part.shape[-1], dim=-1) for part in per_position)


def evidence_shares(world: SequenceWorld) -> tuple[Tensor, Tensor]:
    """Mean squares of belief change and format term per token, on student rollouts with r ~ prior."""
    belief = format_ = torch.zeros((), dtype=torch.float64)
    parts = zip(reach(world.student)[1:], belief_change(world), format_term(world), strict=True)
    for prob, change, term in parts:
        belief = belief + (prob * mean_teacher(world.prior, change.square())).sum()
        format_ = format_ + (prob * term.square()).sum()
    length = len(world.student)
    return belief / length, format_ / length
