"""Rollouts in a notebook: their heat maps, a method beside GRPO and RLSD, and sliders."""

import textwrap

import torch
from ipywidgets import HTML, FloatSlider, VBox

from rlsd_lib.credit import rlsd
from rlsd_lib.measure.rollouts import Rollout
from rlsd_lib.report.heatmap import Heatmap, credit_heatmap, token_heatmap
from rlsd_lib.trainer.config import RLSDConfig

GAP_LIMIT = 5.0  # nats that get full colour
PAPER = 0.5, 0.2  # lambda at its first step, epsilon_w
SCALE = 1.0  # of credit on one scale: full colour is nothing at all, or twice GRPO's


def rollout_heatmaps(rollout: Rollout, config: RLSDConfig, name: str) -> dict[str, Heatmap]:
    """The gap of a rollout's tokens, and what would move them: `multiplier` or `divergence`.

    The multiplier is A_hat_t / A, no colour at GRPO's 1, with full colour at the method's clip; methods
    that use no reward have the divergence. `name` opens the titles.
    """
    reference = textwrap.shorten(rollout.reference, 40, placeholder=" ...")
    told = f"{name}, reward {rollout.reward:.3g}, reference {reference}"
    title = f"{told}: gap, nats"
    found = {"gap": token_heatmap(rollout.tokens, rollout.gap, title=title, limit=GAP_LIMIT)}
    if rollout.divergence and not any(rollout.credit):
        title = f"{told}: divergence of teacher and student, nats"
        found["divergence"] = token_heatmap(rollout.tokens, rollout.divergence, title=title)
        return found
    bound = config.lambda_init * config.epsilon_w if config.row.evidence is not None else 0.0
    told += f", clip at 1 ± {bound:.3g}" if bound else ""
    credit = rollout.tokens, rollout.credit, rollout.advantage
    return found | {"multiplier": credit_heatmap(*credit, title=told, limit=bound or None)}


def side_by_side(rollout: Rollout, config: RLSDConfig) -> tuple[dict[str, Heatmap], str]:
    """A rollout under GRPO, RLSD with the paper's numbers and the method of `config`.

    Returns pictures by method, of token advantages as multiples of A on one scale or of the method's
    divergence, and a sentence: how few tokens hold half of it. An RLSD with other numbers than the
    paper's stands beside as `rlsd_this_run`.
    """
    tokens, size, own = rollout.tokens, rollout.advantage, config.method
    moved = {"grpo": [size] * len(tokens), "rlsd": _rlsd(rollout)}
    if own == "rlsd" and (config.lambda_init, config.epsilon_w) != PAPER:
        own = "rlsd_this_run"
    moved[own] = rollout.divergence or rollout.credit
    pictures = {k: credit_heatmap(tokens, v, size, title=k, limit=SCALE) for k, v in moved.items()}
    if rollout.divergence:
        pictures[own] = token_heatmap(tokens, moved[own], title=f"{own}: divergence, nats")
    counts = ", ".join(f"{_half(values)} under {name}" for name, values in moved.items())
    return pictures, f"Half of what moves this rollout's {len(tokens)} tokens lies on {counts}."


def _half(values: list[float]) -> int:
    """How few values hold half of the sum of all sizes; 0 where all are 0."""
    sizes = torch.tensor(values).abs().sort(descending=True).values
    half = sizes.sum() / 2 * (1 - 1e-5)  # of 52 equal ones 26, whatever their sum is rounded to
    return int((sizes.cumsum(0) < half).sum()) + bool(sizes.any())


def _rlsd(rollout: Rollout, lam: float = PAPER[0], epsilon_w: float = PAPER[1]) -> list[float]:
    """RLSD's token advantages of a rollout, by default with the paper's numbers."""
    gap, advantages = torch.tensor([rollout.gap]), torch.tensor([rollout.advantage])
    return rlsd(advantages, gap, torch.ones_like(gap), lam=lam, epsilon_w=epsilon_w)[0].tolist()


def credit_sliders(rollout: Rollout, *, lam: float = 0.5, epsilon_w: float = 0.2) -> VBox:
    """Return two sliders above a heat map of the rollout's RLSD credit, which follows them."""
    sliders = {
        "lam": FloatSlider(lam, min=0, max=1, step=0.05, description="lambda"),
        "epsilon_w": FloatSlider(epsilon_w, min=0, max=4, step=0.1, description="epsilon_w"),
    }
    picture = HTML()

    def show(_: object = None) -> None:
        chosen = {name: slider.value for name, slider in sliders.items()}
        told = rollout.tokens, _rlsd(rollout, **chosen), rollout.advantage
        picture.value = credit_heatmap(*told, title="RLSD", limit=SCALE)._repr_html_()

    for slider in sliders.values():
        slider.observe(show, "value")
    show()
    return VBox([*sliders.values(), picture])
