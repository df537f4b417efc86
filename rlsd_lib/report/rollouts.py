"""Rollouts in a notebook: their heat maps, and sliders that move one's credit."""

import textwrap

import torch
from ipywidgets import HTML, FloatSlider, VBox

from rlsd_lib.credit import rlsd
from rlsd_lib.measure.rollouts import Rollout
from rlsd_lib.report.heatmap import Heatmap, credit_heatmap, token_heatmap
from rlsd_lib.trainer.config import RLSDConfig

GAP_LIMIT = 5.0  # nats that get full colour
SCALE = 1.0  # of the colours under the sliders, the same wherever these stand


def rollout_heatmaps(rollout: Rollout, config: RLSDConfig, name: str) -> dict[str, Heatmap]:
    """The gap of a rollout's tokens, and what would move them: `multiplier` or `divergence`.

    The multiplier is A_hat_t / A, white at GRPO's 1, with full colour at the clip where the method
    has one; the divergence stands in its place where a method uses no reward. `name` opens the
    titles.
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


def credit_sliders(rollout: Rollout, *, lam: float = 0.5, epsilon_w: float = 0.2) -> VBox:
    """Return two sliders above a heat map of the rollout's RLSD credit, which follows them.

    A token that weighs nothing, or twice as much as under GRPO, has full colour.
    """
    sliders = {
        "lam": FloatSlider(lam, min=0, max=1, step=0.05, description="lambda"),
        "epsilon_w": FloatSlider(epsilon_w, min=0, max=4, step=0.1, description="epsilon_w"),
    }
    picture, gap = HTML(), torch.tensor([rollout.gap])
    advantages = torch.tensor([rollout.advantage])

    def show(_: object = None) -> None:
        chosen = {name: slider.value for name, slider in sliders.items()}
        [credit] = rlsd(advantages, gap, torch.ones_like(gap), **chosen).tolist()
        told = rollout.tokens, credit, rollout.advantage
        picture.value = credit_heatmap(*told, title="RLSD", limit=SCALE)._repr_html_()

    for slider in sliders.values():
        slider.observe(show, "value")
    show()
    return VBox([*sliders.values(), picture])
