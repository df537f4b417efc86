"""The credit functions: properties over random tensors in float64, and the schedule."""

import inspect
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsd_lib import credit
from rlsd_lib.methods import AGAINST_SIGN

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
    scale = (advantages.abs()[:, None] * gap.square() * mask).sum()

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

    def reverse_kl(a, gap, mask):
        return a.abs()[:, None] * gap * mask

    torch.testing.assert_close(drift(reverse_kl), scale)  # 1


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


# --- the rows after the paper's: each against its formula, token by token ------------------------


class Batch(NamedTuple):
    """Rollouts of both signs and of none, with every signal that a row may name."""

    advantages: torch.Tensor
    gap: torch.Tensor
    mask: torch.Tensor
    signals: dict[str, torch.Tensor]

    def credit(self, function: credit.Credit, **options: Any) -> torch.Tensor:
        """Calls `function` as the trainer does: with the signals that its signature names."""
        asked = inspect.signature(function).parameters
        signals = {name: x for name, x in self.signals.items() if name in asked}
        return function(self.advantages, self.gap, self.mask, **signals | options)


def batch_of(seed: int, scale: float = 1.0, rollouts: int = 8, tokens: int = 7) -> Batch:
    """Rollout 0 has no wrong reference and rollout 1 one of three; 2 has A = 0; 3 no token."""
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    uniform = partial(torch.rand, generator=generator, dtype=torch.float64)
    advantages, mask = normal(rollouts), (uniform(rollouts, tokens) < 0.8).long()
    advantages[2], mask[3] = 0.0, 0
    wrong_gaps = scale * normal(3, rollouts, tokens)
    wrong_gaps[:, 0], wrong_gaps[1:, 1] = torch.nan, torch.nan
    signals = {
        "wrong_gaps": wrong_gaps,
        "reference_gap": scale * normal(rollouts, tokens),
        "teacher_entropy": 2 * uniform(rollouts, tokens),
        "contrast_kl": scale * uniform(rollouts, tokens),
        "success": uniform(rollouts) < 0.5,
        "group_success": torch.arange(rollouts) / (rollouts - 1),
        "thought": uniform(rollouts, tokens) < 0.5,
        "first_error": torch.randint(0, tokens + 1, (rollouts,), generator=generator),
        "decisions": uniform(rollouts, tokens) < 0.4,
        "success_before": uniform(rollouts),
        "success_after": uniform(rollouts, tokens),
    }
    return Batch(advantages, scale * normal(rollouts, tokens), mask, signals)


class Token(NamedTuple):
    """Token t of rollout n, in floats: what a formula is written with."""

    b: Batch
    n: int
    t: int

    @property
    def a(self) -> float:
        return self.b.advantages[self.n].item()

    @property
    def d(self) -> float:
        return self.b.gap[self.n, self.t].item()

    def signal(self, name: str) -> float:
        return self.b.signals[name][self.n, self.t].item()

    @property
    def own(self) -> list["Token"]:
        """The rollout's tokens under the mask, in their order."""
        steps = range(self.b.mask.shape[1])
        return [Token(self.b, self.n, t) for t in steps if self.b.mask[self.n, t]]

    @property
    def wrong(self) -> list[float]:
        """The gaps under the wrong references that the rollout has."""
        gaps = self.b.signals["wrong_gaps"][:, self.n, self.t].tolist()
        return [gap for gap in gaps if not math.isnan(gap)]

    def evidence(self, count: int) -> float:
        """log P_T(y | r) - log mean_k P_T(y | r'_k), from the first `count` wrong references."""
        wrong = self.wrong[:count]
        if not wrong:
            return 0.0
        return self.d - math.log(sum(math.exp(gap) for gap in wrong) / len(wrong))

    def gated(self, tau: float = 1.0) -> float:
        """The gap, times the share of what no wrong reference explains, tau in nats."""
        size = abs(self.evidence(3))
        return self.d * size / (size + tau)

    def value(self, after: bool, gap: Callable[["Token"], float] = lambda s: s.d) -> float:
        """The success probability before this token, or after it."""
        past = [gap(s) for s in self.own if s.t < self.t or (after and s.t == self.t)]
        return min(self.prior * math.exp(sum(past)), 1.0)

    @property
    def prior(self) -> float:
        return min(max(self.b.signals["group_success"][self.n].item(), 1 / 16), 15 / 16)

    @property
    def sigma(self) -> float:
        return math.sqrt(self.prior * (1 - self.prior))


def tokens_of(b: Batch) -> Iterator[Token]:
    return (Token(b, n, t) for n, t in b.mask.nonzero().tolist())


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


def weighed(k: Token, exponent: float, low: float = 0.8, high: float = 1.2) -> float:
    """RLSD with lambda 1/2: half of A as it is, half of it times the clipped weight."""
    return k.a * (0.5 + 0.5 * min(max(math.exp(sign(k.a) * exponent), low), high))


def rlcsd_token(k: Token, eta: float = 1.0, clip: float = 0.5) -> float:
    def rho(s: Token) -> float:
        return min(max(0.2 * 0.5 * math.tanh(s.evidence(3) / 0.03), -clip), clip)

    every = list(tokens_of(k.b))
    chosen = [s for s in every if abs(rho(s)) > 0.02]
    if k not in chosen:
        return k.a * len(every) / (len(every) - len(chosen))
    moved = max(k.a + rho(k), 0) if k.a > 0 else min(k.a + rho(k), 0) if k.a < 0 else 0.0
    return eta * moved * len(every) / len(chosen)


def amr_sd_token(k: Token, tau: float = 0.0) -> float:
    information = min(max(k.d, -5), 5)
    gain = 0.2 * max(0, information - tau) if k.a >= 0 else 0.1 * max(0, -information - tau)
    return k.a * (1 + gain)


def blame_token(k: Token) -> float:
    def drop(s: Token) -> float:
        return max(s.value(after=False) - s.value(after=True), 0)

    total = sum(map(drop, k.own))
    return k.a if k.a >= 0 or total == 0 else k.a * len(k.own) * drop(k) / total


def oracle_token(k: Token) -> float:
    first = k.b.signals["first_error"][k.n].item()
    picked = [s for s in k.own if (s.t == first if k.a < 0 else s.signal("decisions"))]
    return k.a if not picked else k.a * len(k.own) / len(picked) * (k in picked)


def oracle_value_token(k: Token) -> float:
    start = k.b.signals["success_before"][k.n].item()
    before = [s.signal("success_after") for s in k.own if s.t < k.t]
    prior = min(max(start, 1 / 16), 15 / 16)
    return (k.signal("success_after") - [start, *before][-1]) / math.sqrt(prior * (1 - prior))


def srpo_weight_token(k: Token) -> float:
    routed = [s for s in tokens_of(k.b) if s.a <= 0]
    mean = sum(math.exp(-s.signal("teacher_entropy")) for s in routed) / len(routed)
    return math.exp(-k.signal("teacher_entropy")) / mean if k.a <= 0 else 0.0


def value_token(k: Token) -> float:
    return min(k.value(after=False) / k.prior, 1)


def gated_token(k: Token, tau: float = 1.0) -> float:
    before, after = (k.value(past, lambda s: s.gated(tau)) for past in (False, True))
    return (after - before) / k.sigma


def contrast_token(k: Token, tau: float = 1.0) -> float:
    return k.signal("contrast_kl") / (k.signal("contrast_kl") + tau)


FORMULAS: dict[str, Callable[[Token], float]] = {
    "cepo": lambda k: weighed(k, k.evidence(1)),
    "rlsd_contrast": lambda k: weighed(k, k.evidence(3)),
    "rlcsd": rlcsd_token,
    "rlrt": lambda k: weighed(k, -k.d, 0.0, 2.0) if k.a > 0 else k.a,
    "antisd": lambda k: k.a - 0.5 * 0.5 * math.log((1 + math.exp(min(max(k.d, -5), 5))) / 2),
    "sdar": lambda k: k.a + 0.1 / (1 + math.exp(-5 * k.d)),
    "amr_sd": amr_sd_token,
    "srpo": lambda k: max(k.a, 0),
    "sdpg": lambda k: k.a + 1e-3 * k.signal("reference_gap"),
    "rlsd_negative_only": lambda k: weighed(k, k.d) if k.a < 0 else k.a,
    "rlsd_thought_only": lambda k: weighed(k, k.d) if k.signal("thought") else k.a,
    "privileged_baseline": lambda k: (
        (k.b.signals["success"][k.n].item() - k.value(False)) / k.sigma
    ),
    "hindsight": lambda k: (k.value(after=True) - k.value(after=False)) / k.sigma,
    "hindsight_gated": gated_token,
    "posterior_blame": blame_token,
    "raft": lambda k: float(k.b.signals["success"][k.n]),
    "oracle": oracle_token,
    "oracle_value": oracle_value_token,
}
WEIGHTS: dict[str, Callable[[Token], float]] = {
    "srpo_weight": srpo_weight_token,
    "opsd_value": value_token,
    "opsd_contrast": contrast_token,
    "opsd_value_contrast": lambda k: value_token(k) * contrast_token(k),
}
ROWS = {name: getattr(credit, name) for name in [*FORMULAS, *WEIGHTS]}
# Rows whose credit may be of the other sign than A, and is not 0 where A = 0.
TURNS_SIGN = {"antisd", "sdar", "sdpg", "privileged_baseline", "hindsight", "oracle_value"}
TURNS_SIGN |= {"hindsight_gated", "raft"}
# Rows that count tokens over the whole batch of a call.
OVER_THE_BATCH = {"rlcsd", "srpo_weight"}


# The paper's rows, which have no defaults, and settings whose defaults are idle.
PAPERS = {"lam": 0.5, "epsilon_w": 0.2}
WITH_SETTINGS: dict[str, tuple[Callable[[Token], float], dict[str, float]]] = {
    "rlsd": (lambda k: weighed(k, k.d), PAPERS),
    "rlsd_neutral": (lambda k: weighed(k, sign(k.a) * abs(k.d)), PAPERS),
    "rlcsd": (partial(rlcsd_token, eta=2.0, clip=0.05), {"eta": 2.0, "clip": 0.05}),
    "amr_sd": (partial(amr_sd_token, tau=0.3), {"tau": 0.3}),
    "hindsight_gated": (partial(gated_token, tau=0.3), {"tau": 0.3}),
    "opsd_value_contrast": (lambda k: value_token(k) * contrast_token(k, 0.2), {"tau": 0.2}),
}


def test_every_row_equals_its_formula():
    cases = [(name, formula, {}) for name, formula in (FORMULAS | WEIGHTS).items()]
    cases += [(name, *row) for name, row in WITH_SETTINGS.items()]
    for name, formula, options in cases:
        for seed, scale in enumerate((0.05, 0.5, 2.0, 5.0)):
            b = batch_of(seed, scale)
            expected = b.advantages[:, None].repeat(1, b.mask.shape[1])
            if name in WEIGHTS:
                expected = torch.zeros_like(expected)
            for k in tokens_of(b):
                expected[k.n, k.t] = formula(k)
            credited = b.credit(getattr(credit, name), **options)
            difference = (credited - expected).abs().max().item()
            assert difference < 1e-12 * max(1, expected.abs().max().item()), (name, seed)


def test_every_row_is_finite_detached_and_blind_outside_the_mask():
    for name, row in ROWS.items():
        for seed, scale in enumerate((0.0, 1e-3, 30.0, 1e4)):
            b = batch_of(seed, scale)
            credited = b.credit(row)
            assert credited.isfinite().all(), (name, scale)
            assert credited.shape == b.gap.shape, name
            outside = ~b.mask.bool()
            kept = torch.zeros_like(b.gap) if name in WEIGHTS else b.advantages[:, None] + 0 * b.gap
            assert torch.equal(credited[outside], kept[outside]), name
            signals = {
                key: x.masked_fill(outside, torch.nan)
                if x.is_floating_point() and x.dim() > 1
                else x
                for key, x in b.signals.items()
            }
            spoilt = b._replace(gap=b.gap.masked_fill(outside, torch.nan), signals=signals)
            assert torch.equal(spoilt.credit(row), credited), name
        b = batch_of(0)
        signals = {
            key: x.clone().requires_grad_() if x.is_floating_point() else x
            for key, x in b.signals.items()
        }
        tracked = b._replace(gap=b.gap.clone().requires_grad_(), signals=signals)
        assert not tracked.credit(row).requires_grad, name


def test_the_sign_of_the_advantage_stays_where_a_row_says_so():
    for name in FORMULAS:
        turned = False
        for seed, scale in enumerate((0.1, 1.0, 30.0)):
            b = batch_of(seed, scale)
            credited = b.credit(ROWS[name])
            wrong = credited * b.advantages[:, None] < 0
            zero = (credited != 0) & (b.advantages == 0)[:, None]
            turned |= bool(wrong.any() or zero.any())
        assert turned == (name in TURNS_SIGN), name
    known = {function.__name__ for function in AGAINST_SIGN}
    # RAFT moves where A is 0, and nowhere against it.
    assert known == TURNS_SIGN - {"raft"} | {"sampled_distillation"}


def test_rows_without_a_batch_count_treat_each_rollout_alone():
    for name, row in ROWS.items():
        b = batch_of(5)
        order = torch.tensor([4, 1, 7, 0])
        signals = {
            key: x[:, order] if key == "wrong_gaps" else x[order] for key, x in b.signals.items()
        }
        part = Batch(b.advantages[order], b.gap[order], b.mask[order], signals)
        same = torch.equal(part.credit(row), b.credit(row)[order])
        assert same == (name not in OVER_THE_BATCH), name


def test_rows_with_a_batch_count_give_parts_the_credit_of_the_whole_with_their_total():
    b = batch_of(6)
    halves = [
        Batch(
            *(x[rows] for x in b[:3]),
            {k: x[..., rows, :] for k, x in b.signals.items() if x.dim() > 1},
        )
        for rows in (slice(0, 5), slice(5, 8))
    ]
    for name in OVER_THE_BATCH:
        alone = [Mock(side_effect=credit.alone) for _ in halves]
        for half, total in zip(halves, alone, strict=True):
            half.credit(ROWS[name], total=total)
        pairs = zip(*(total.call_args_list for total in alone), strict=True)
        sums = [first.args[0] + second.args[0] for first, second in pairs]
        assert len(sums) == 2, name
        parts = [half.credit(ROWS[name], total=Mock(side_effect=sums)) for half in halves]
        torch.testing.assert_close(torch.cat(parts), b.credit(ROWS[name]), msg=name)


def test_the_scale_of_a_weight_is_at_most_one_or_one_in_the_mean():
    b = batch_of(1, 3.0)
    for name in ("opsd_value", "opsd_contrast", "opsd_value_contrast"):
        weight = b.credit(ROWS[name])
        assert ((weight >= 0) & (weight <= 1)).all(), name
    routed = b.mask.bool() & (b.advantages <= 0)[:, None]
    weight = b.credit(credit.srpo_weight)
    torch.testing.assert_close(weight[routed].mean(), torch.ones_like(weight[0, 0]))
    nobody = b._replace(advantages=torch.ones(8, dtype=torch.float64))
    assert not nobody.credit(credit.srpo_weight).any()


def test_a_weight_by_contrast_is_0_without_one_and_1_at_tau_0_with_one():
    contrast_kl, ones = torch.tensor([[0.0, 1e-30, 2.0, math.inf, -1e-9]]), torch.ones(1, 5)
    for tau, expected in ((0.0, [0.0, 1, 1, 1, 0]), (2.0, [0.0, 0, 0.5, 1, 0])):
        given = {"contrast_kl": contrast_kl, "tau": tau}
        weight = credit.opsd_contrast(torch.ones(1), 0 * ones, ones, **given)
        torch.testing.assert_close(weight, torch.tensor([expected]))


def test_every_row_ends_in_its_neighbour():
    """Limits: lambda or coefficient 0 is GRPO, a wrong gap of 0 is RLSD, one wrong answer is CEPO."""
    b = batch_of(3)
    grpo = credit.uniform(b.advantages, b.gap, b.mask)
    for name, off in [
        *(
            (name, {"lam": 0.0})
            for name in FORMULAS
            if "lam" in inspect.signature(ROWS[name]).parameters
        ),
        ("antisd", {"gate": 0.0}),
        ("sdar", {"coefficient": 0.0}),
        ("sdpg", {"alpha": 0.0}),
        ("rlsd_thought_only", {"thought": torch.zeros_like(b.mask)}),
    ]:
        assert torch.equal(b.credit(ROWS[name], **off), grpo), (name, off)
    rlsd = b.credit(credit.rlsd, lam=0.5, epsilon_w=0.2)
    for name in ("cepo", "rlsd_contrast"):
        silent = b.credit(ROWS[name], wrong_gaps=torch.zeros(3, *b.gap.shape).double())
        torch.testing.assert_close(silent, rlsd, rtol=0, atol=1e-15)
        for none in (torch.full((2, *b.gap.shape), torch.nan), torch.zeros(0, *b.gap.shape)):
            assert torch.equal(b.credit(ROWS[name], wrong_gaps=none.double()), grpo), name
    one = b.signals["wrong_gaps"][:1]
    cepo = b.credit(credit.cepo)
    assert torch.equal(b.credit(credit.rlsd_contrast, wrong_gaps=one), cepo)
    copies = b.credit(credit.rlsd_contrast, wrong_gaps=one.repeat(4, 1, 1))
    torch.testing.assert_close(copies, cepo, rtol=0, atol=1e-15)
    everywhere = b.credit(credit.rlsd_thought_only, thought=torch.ones_like(b.mask))
    assert torch.equal(everywhere, rlsd)


def test_a_silent_teacher_moves_nothing_or_everything_alike():
    """GRPO's credit where the gap is 0, but for the lift of sdar and for credit made of V alone."""
    b = batch_of(4, 0.0)
    grpo = credit.uniform(b.advantages, b.gap, b.mask)
    inside, own = b.mask.bool(), b.signals["success"].double()[:, None]
    for name in ("rlsd_contrast", "rlcsd", "rlrt", "antisd", "amr_sd", "posterior_blame"):
        torch.testing.assert_close(b.credit(ROWS[name]), grpo, msg=name)
    torch.testing.assert_close(b.credit(credit.sdar)[inside], (grpo + 0.05)[inside])
    assert not b.credit(credit.hindsight)[inside].any()
    prior = credit.value(b.signals["group_success"], b.gap, b.mask)[:, :1]
    expected = ((own - prior) / (prior * (1 - prior)).sqrt()).expand_as(b.gap)
    torch.testing.assert_close(b.credit(credit.privileged_baseline)[inside], expected[inside])


def test_blame_and_oracle_keep_the_total_of_each_rollout():
    for name in ("posterior_blame", "oracle"):
        for seed, scale in enumerate((0.0, 0.3, 3.0, 30.0, 1e4)):
            b = batch_of(seed, scale)
            total = (b.credit(ROWS[name]) * b.mask).sum(1)
            torch.testing.assert_close(total, b.advantages * b.mask.sum(1), msg=name)


def test_the_oracle_worked_out_by_hand():
    advantages, gap, mask = torch.tensor([-1.0, 2.0, -1.0]), torch.zeros(3, 4), torch.ones(3, 4)
    mask[1, 3] = 0
    decisions = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [1, 0, 0, 0]]).bool()
    signals = {"first_error": torch.tensor([2, 0, 4]), "decisions": decisions}
    credited = credit.oracle(advantages, gap, mask, **signals)
    # The second's last decision lies outside the mask; the third never went wrong.
    expected = torch.tensor([[0.0, 0, -4, 0], [0, 6, 0, 2], [-1, -1, -1, -1]])
    assert torch.equal(credited, expected)


def test_a_permuted_credit_keeps_its_values_and_loses_their_places():
    for name in FORMULAS:
        b = batch_of(6)
        credited = b.credit(ROWS[name])
        shuffled = credit.permuted(ROWS[name], torch.Generator().manual_seed(0))
        assert inspect.signature(shuffled) == inspect.signature(ROWS[name])
        inside, moved = b.mask.bool(), b.credit(shuffled)
        assert torch.equal(moved[~inside], credited[~inside]), name
        for before, after, keep in zip(credited, moved, inside, strict=True):
            assert torch.equal(before[keep].sort().values, after[keep].sort().values), name
        assert torch.equal(moved, credited) == (name in ("raft", "srpo")), name
        again = credit.permuted(ROWS[name], torch.Generator().manual_seed(0))
        assert torch.equal(b.credit(again), moved), name


def test_a_permutation_lets_every_token_reach_every_place():
    gap = torch.arange(5.0).expand(400, 5)
    mask = torch.tensor([1, 1, 0, 1, 1]).expand(400, 5)
    shuffled = credit.permuted(credit.sampled_distillation, torch.Generator().manual_seed(0))
    moved = shuffled(torch.ones(400), gap, mask)
    for place in (0, 1, 3, 4):
        shares = [(moved[:, place] == token).float().mean().item() for token in (0, 1, 3, 4)]
        assert min(shares) > 0.18, (place, shares)


def test_leave_one_out_is_the_share_of_the_others():
    success = torch.tensor([True, False, False, True, True, True])
    shares = credit.leave_one_out(success, 3)
    torch.testing.assert_close(shares, torch.tensor([0, 0.5, 0.5, 1, 1, 1]))
    assert credit.leave_one_out(~success, 3)[0] == 1, "a rollout's own outcome does not enter"
    with pytest.raises(ValueError, match="group_size=1"):
        credit.leave_one_out(success, 1)


def test_a_rollout_that_nobody_scored_is_no_ones_other():
    success = torch.tensor([1.0, 0.0, torch.nan, 1.0, torch.nan, torch.nan])
    shares = credit.leave_one_out(success, 3)
    torch.testing.assert_close(shares, torch.tensor([0, 1, 0.5, 0.5, 1, 1]))


def test_value_worked_out_by_hand():
    gap = torch.tensor([[2.0, 0.25, 9.0, 8.0, 0.5]], dtype=torch.float64).log()
    mask = torch.tensor([[1, 1, 0, 1, 1]])
    values = credit.value(torch.tensor([0.25]), gap, mask)
    # The third token is masked. V is cut at 1 and not its exponent, which 0.5 brings back to 1/2.
    expected = torch.tensor([[0.25, 0.5, 0.125, 0.125, 1.0, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(values, expected)
    ends = credit.value(torch.tensor([0.0, 1.0]), gap.repeat(2, 1), mask.repeat(2, 1))[:, 0]
    torch.testing.assert_close(ends, torch.tensor([1 / 16, 15 / 16], dtype=torch.float64))


def test_every_row_checks_shapes():
    b = batch_of(0)
    for row in ROWS.values():
        with pytest.raises(ValueError, match=r"advantages \(N,\)"):
            b._replace(advantages=b.advantages[:, None]).credit(row)
    for name in ("cepo", "rlsd_contrast", "rlcsd"):
        with pytest.raises(ValueError, match=r"wrong_gaps is .*: expected \(K, N, T\)"):
            b.credit(ROWS[name], wrong_gaps=b.gap)
