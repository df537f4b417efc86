"""The token heat map shows every token legibly, on the colour of its value."""

import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image

from rlsd_lib.report.heatmap import (
    credit_heatmap,
    new_figure,
    place,
    show_token,
    token_heatmap,
)


def faces(figure: Figure) -> list[tuple[float, ...]]:
    """Red, green and blue of each token, on white."""
    return [on_white(patch.get_facecolor()) for patch in figure.axes[0].patches]


def on_white(colour: str | tuple[float, ...]) -> tuple[float, ...]:
    *rgb, alpha = to_rgba(colour)
    return tuple(1 - alpha * (1 - part) for part in rgb)


def test_the_heat_map_colours_by_sign_and_greys_what_has_no_value() -> None:
    picture = token_heatmap(["a", "b", "c", "d"], [1.4, 1.0, 0.6, math.nan], title="w", center=1)
    figure = picture.figure()
    above, at, below, none = faces(figure)
    assert above[2] > above[0] + 0.25  # blue
    assert below[0] > below[2] + 0.25  # red
    assert min(at) > 0.95
    assert len(set(none)) == 1 and none[0] < 0.9  # grey
    # Letters stand out from the colour behind them.
    assert [text.get_color() for text in figure.axes[0].texts] == ["#ffffff", "black"] * 2
    # The same colours on the page, whose own ink is on all but the full ones.
    shown = re.findall(r"background:(#\w+)(;color:#ffffff)?", picture._repr_html_())
    assert [on_white(paper) for paper, _ in shown] == faces(figure)
    assert [bool(ink) for _, ink in shown] == [True, False, True, False]
    assert shown[1][0].endswith("00"), "what has no effect lets a dark page through"


def test_a_limit_clips_and_equal_values_are_neutral() -> None:
    first, second = faces(token_heatmap(["a", "b"], [0.5, 50.0], title="gap", limit=0.5).figure())
    assert first == second
    [colour] = faces(token_heatmap(["a"], [0.0], title="gap").figure())
    assert min(colour) > 0.95


def test_a_scale_says_where_values_lie_beyond_it() -> None:
    """A clip of 0.1 that single precision rounds up is not beyond 1.1."""
    for values, limit, ends in (
        ([1.1 + 1e-7, 0.9 - 1e-7], 0.1, ("0.9", "1", "1.1")),
        ([-6.43, math.nan], 1.0, ("≤ 0", "1", "2")),
        ([52.0, 0.0], 1.0, ("0", "1", "≥ 2")),
    ):
        picture = token_heatmap(["a", "b"], values, title="x", center=1.0, limit=limit)
        ticks = picture.figure().axes[1].get_yticklabels()
        assert tuple(tick.get_text() for tick in ticks) == ends
        page = " ".join(re.sub("<[^>]*>", " ", picture._repr_html_()).split())
        low, middle, high = ends
        assert f"{low} {high}&ensp;no colour: {middle}" in page


def test_bad_heat_maps_are_refused() -> None:
    bad = {
        "1 tokens and 2 values": (["a"], [1.0, 2.0], None),
        "0 tokens": ([], [], None),
        "infinite": (["a"], [float("inf")], None),
        "limit=0.0": (["a"], [1.0], 0.0),
    }
    for message, (tokens, values, limit) in bad.items():
        with pytest.raises(ValueError, match=message):
            token_heatmap(tokens, values, title="x", limit=limit)


def test_tokens_are_shown_legibly() -> None:
    shown = {
        "Ġthe": "·the",
        "▁the": "·the",
        " x": "·x",
        "\n": "↵\n",
        "Ċ": "↵\n",
        "<|im_end|>": "<|im_end|>",
        "\x00": "\\x00",
        "\u200b": "\\x200b",
        "": "∅",
        "数": "数",
    }
    assert {token: show_token(token) for token in shown} == shown


def test_layout_wraps_at_the_margin_and_at_line_ends() -> None:
    laid = list(place(["abc", "def", "↵\n", "gh"], 8))
    assert laid == [("abc", 0, 0, 0), ("def", 3, 0, 1), ("↵", 6, 0, 2), ("gh", 0, 1, 3)]
    wrapped = list(place(["abcde", "fghij"], 8))
    assert [(p.column, p.row) for p in wrapped] == [(0, 0), (0, 1)]
    long = list(place(["x" * 30], 8))
    assert "".join(p.text for p in long) == "x" * 30
    assert all(p.column + len(p.text) <= 8 for p in long)


def test_the_picture_is_written_and_a_dollar_is_no_formula(tmp_path: Path) -> None:
    picture = token_heatmap(["$\\x$", "_", "^$", "\\frac"], [1, -1, 0.2, 0], title="$\\x$")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture.savefig(tmp_path / "heat.png")
    pixels = np.asarray(Image.open(tmp_path / "heat.png").convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 10
    assert [text.get_text() for text in picture.figure().axes[0].texts] == [
        "$\\x$",
        "_",
        "^$",
        "\\frac",
    ]


def test_the_page_keeps_tokens_apart_and_none_of_them_is_markup() -> None:
    page = token_heatmap(["a", "<b>", "c\n\nd"], [1.0, 0.0, -1.0], title="<i>")._repr_html_()
    inside = page[page.index("<div>") : page.index("</div>")]
    assert re.findall(r">([^<>]*)</span>", inside) == ["a", "&lt;b&gt;", "c↵", "↵", "d"]
    assert inside.count("<i></i>") == 2  # a line end each
    assert "<figcaption>&lt;i&gt;<small>" in page


def test_credit_is_shown_around_grpo() -> None:
    """A multiple of the rollout's advantage: 1 is GRPO, and the clip is the end of the scale."""
    picture = credit_heatmap(["a", "b"], [-1.65, -1.5], -1.5, title="wrong", limit=0.1)
    assert picture.values == pytest.approx([1.1, 1.0])
    assert (picture.center, picture.limit) == (1.0, 0.1)
    assert "A = -1.5)" in picture.title
    assert credit_heatmap(["a"], [1.0], -0.9354, title="x").title.endswith("(A = -0.935)")
    silent = credit_heatmap(["a"], [0.5], 0.0, title="x")
    assert (silent.center, silent.values) == (0.0, [0.5])


def test_a_figure_is_a_white_card_with_round_corners(tmp_path: Path) -> None:
    for file in ("tight.png", "whole.png"):
        figure = new_figure((4.0, 2.0))
        figure.text(0.0, -0.2, "under the figure")
        figure.savefig(tmp_path / file, bbox_inches="tight" if file == "tight.png" else None)
        alpha = np.asarray(Image.open(tmp_path / file))[..., 3]
        assert alpha[0, 0] == alpha[-1, -1] == 0 and alpha[len(alpha) // 2].min() == 255, file
