"""Shared weights: what moves when teacher and student are one model (Theorems 2 and 3).

Seeing r multiplies the odds of a token by a fixed `boost`, so the teacher is the student, tilted:
P_T(v | r) is proportional to P_S(v) * boost(r, v). Every update of the student moves the teacher.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlsd_lib import credit

from .bandwidth import CREDITS, normalised_advantages
from .worlds import kl, mean_teacher, mutual_information


def tilt(student: Tensor, boost: Tensor) -> Tensor:
    """P_T(v | r) = P_S(v) boost(r, v) / Z(r): (V,), (m, V) -> (m, V)."""
    weight = student * boost
    return weight / weight.sum(-1, keepdim=True)


def shared_loss(prior: Tensor, teacher: Tensor, student: Tensor) -> Tensor:
    """E_r KL(P_T(. | r) || P_S): (m,), (m, V), (V,) -> ()."""
    return (prior * kl(teacher, student.expand_as(teacher))).sum()


def loss_split(prior: Tensor, boost: Tensor, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Theorem 2: the loss change as Delta_S (student moves) + Delta_T (the teacher follows)."""
    before, after = tilt(old, boost), tilt(new, boost)
    student_part = shared_loss(prior, before, new) - shared_loss(prior, before, old)
    teacher_part = shared_loss(prior, after, new) - shared_loss(prior, before, new)
    return student_part, teacher_part


class QuoteWorld(NamedTuple):
    """A reply is a style and a line of reasoning, drawn independently.

    Style: plain or citing the reference; it does not bear on the reward. Reasoning: sound, faulty,
    or quoting one of `answers` equally likely values, which is right if the value is r. Seeing r
    multiplies the odds of citing, of sound reasoning and of quoting r.
    """

    answers: int = 4
    cite: float = 3.0
    help: float = 2.0
    quote: float = 20.0
    p_sound: float = 0.9
    p_faulty: float = 0.2

    @property
    def prior(self) -> Tensor:
        """Uniform over the values of r: (K,)."""
        return torch.full((self.answers,), 1 / self.answers, dtype=torch.float64)

    @property
    def boosts(self) -> tuple[Tensor, Tensor]:
        """What r does to the odds: style (K, 2), reasoning (K, 2 + K)."""
        style = torch.tensor([1.0, self.cite], dtype=torch.float64).repeat(self.answers, 1)
        head = torch.tensor([self.help, 1.0], dtype=torch.float64).repeat(self.answers, 1)
        quotes = 1 + (self.quote - 1) * torch.eye(self.answers, dtype=torch.float64)
        return style, torch.cat([head, quotes], dim=1)

    @property
    def success(self) -> Tensor:
        """P(R = 1 | reasoning, r): (K, 2 + K)."""
        head = torch.tensor([self.p_sound, self.p_faulty], dtype=torch.float64)
        return torch.cat([head.repeat(self.answers, 1), torch.eye(self.answers).double()], dim=1)

    def start(self, cite: float = 0.05, sound: float = 0.4, quote: float = 0.05) -> Tensor:
        """Log-probabilities of a student that rarely cites and rarely quotes: (4 + K,)."""
        each = quote / self.answers
        style = [1 - cite, cite]
        reasoning = [sound, 1 - sound - quote, *[each] * self.answers]
        return torch.tensor(style + reasoning, dtype=torch.float64).log()


def tables(theta: Tensor) -> tuple[Tensor, Tensor]:
    """Student distributions of style (2,) and reasoning (2 + K,) from logits (4 + K,)."""
    return torch.softmax(theta[:2], -1), torch.softmax(theta[2:], -1)


def teacher_tables(world: QuoteWorld, anchor: Tensor) -> tuple[Tensor, Tensor]:
    """Teacher distributions of style (K, 2) and reasoning (K, 2 + K) with weights `anchor`."""
    pairs = zip(tables(anchor), world.boosts, strict=True)
    style, reasoning = (tilt(student, boost) for student, boost in pairs)
    return style, reasoning


def expected_reward(world: QuoteWorld, theta: Tensor) -> Tensor:
    """P(R = 1) of the student, which does not see r."""
    return mean_teacher(world.prior, world.success) @ tables(theta)[1]


def distillation_step(world: QuoteWorld, theta: Tensor, anchor: Tensor) -> Tensor:
    """Minus the gradient of E_r KL(P_T || P_S), teacher held fixed: P_bar - P_S, (4 + K,)."""
    pairs = zip(teacher_tables(world, anchor), tables(theta), strict=True)
    return torch.cat([mean_teacher(world.prior, teacher) - student for teacher, student in pairs])


def distillation_loss(world: QuoteWorld, theta: Tensor, anchor: Tensor) -> Tensor:
    """E_r KL(P_T || P_S), style and reasoning together."""
    pairs = zip(teacher_tables(world, anchor), tables(theta), strict=True)
    return sum(shared_loss(world.prior, teacher, student) for teacher, student in pairs)


def reward_step(
    world: QuoteWorld, theta: Tensor, anchor: Tensor, rule: str, lam: float, epsilon_w: float
) -> Tensor:
    """Expected update E[sum_t A_hat_t grad log P_S(y_t)], every outcome enumerated: (4 + K,)."""
    (style, reasoning), teachers = tables(theta), teacher_tables(world, anchor)
    sizes = [world.answers, 2, len(reasoning), 2]
    r, s, v, success = torch.cartesian_prod(*[torch.arange(n) for n in sizes]).T
    chance = world.success[r, v]
    prob = world.prior[r] * style[s] * reasoning[v] * torch.where(success == 1, chance, 1 - chance)
    advantages = normalised_advantages(success.double(), prob)
    gap = torch.stack(
        [(teachers[0][r, s] / style[s]).log(), (teachers[1][r, v] / reasoning[v]).log()], dim=-1
    )
    hat = CREDITS[rule](advantages, gap, torch.ones_like(gap), lam=lam, epsilon_w=epsilon_w)
    parts = []
    for t, (student, token) in enumerate([(style, s), (reasoning, v)]):
        mass = torch.zeros_like(student).scatter_add(0, token, prob * hat[:, t])
        parts.append(mass - mass.sum() * student)
    return torch.cat(parts)


def simulate(
    world: QuoteWorld,
    rule: str,
    *,
    sync_every: int,
    steps: int,
    lr: float = 0.5,
    lam: float = 1.0,
    decay_steps: int = 0,
    epsilon_w: float = 0.2,
) -> dict[str, Tensor]:
    """Train from `world.start()`; `rule` is distil or a credit, `sync_every` 0 a frozen teacher.

    Updates are exact expectations. Returns (steps + 1,) each: `reward`, `cite` and `quote`, the
    student's probabilities, `information` I(reasoning; R), `loss` E_r KL(P_T || P_S), and
    `target_shift`, how far a refresh of the teacher moves the update at the same student.
    """
    theta = anchor = world.start()
    rows = []

    def update(anchor: Tensor, k: int) -> Tensor:
        if rule == "distil":
            return distillation_step(world, theta, anchor)
        scale = credit.lambda_schedule(k, lam, 0, decay_steps)
        return reward_step(world, theta, anchor, rule, scale, epsilon_w)

    for k in range(steps + 1):
        shift = torch.zeros((), dtype=torch.float64)
        if sync_every and k and k % sync_every == 0:
            shift = (update(theta, k) - update(anchor, k)).norm()
            anchor = theta
        style, reasoning = tables(theta)
        leak = mutual_information(world.prior, teacher_tables(world, anchor)[1])
        loss = distillation_loss(world, theta, anchor)
        reward = expected_reward(world, theta)
        rows.append((reward, style[1], reasoning[2:].sum(), leak, loss, shift))
        theta = theta + lr * update(anchor, k)
    names = ["reward", "cite", "quote", "information", "loss", "target_shift"]
    return dict(zip(names, map(torch.stack, zip(*rows, strict=True)), strict=True))


def matched_rounds(world: QuoteWorld, theta: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """Student after `rounds` snapshots, each matched to the end, in closed form.

    Every round multiplies the odds by E_r boost. Exact where the quotes start equally likely.
    """
    grown = []
    for student, boost in zip(tables(theta), world.boosts, strict=True):
        gain = mean_teacher(world.prior, boost)
        weight = student * (gain / gain.max()) ** rounds  # finite for many rounds
        grown.append(weight / weight.sum())
    return grown[0], grown[1]


def quoting_invades(world: QuoteWorld, theta: Tensor) -> bool:
    """Whether the first matched round raises P(quote): its E_r boost exceeds the student's mean."""
    gain = mean_teacher(world.prior, world.boosts[1])
    return bool(gain[2] > tables(theta)[1] @ gain)


def quoting_wins(world: QuoteWorld) -> bool:
    """Whether quoting takes over in the end: E_r boost of a quote exceeds that of sound work."""
    return (world.answers - 1 + world.quote) / world.answers > max(world.help, 1.0)
