"""Token heat maps: which tokens of a rollout carry a value."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

# Blue against red through white: told apart with every common kind of colour blindness.
PALETTE = colormaps["RdBu"].with_extremes(bad="#d9d9d9")  # grey: no value, a masked token
COLUMNS = 96  # character cells in a row
# What tokenizers write for a space and a line end, and what a reader sees instead.
MARKS = {"Ġ": "·", "▁": "·", " ": "·", "Ċ": "↵\n", "\n": "↵\n", "\t": "→", "ĉ": "→", "\r": "␍"}


def token_heatmap(
    tokens: Sequence[str],
    values: Sequence[float],
    *,
    title: str,
    center: float = 0.0,
    limit: float | None = None,
) -> Figure:
    """Colour each token by its value: blue above `center`, red below, white at it, grey for NaN.

    `center` is the neutral value, 0 for a gap and 1 for a weight. `limit` is the distance from it
    that gets full colour; by default the largest there is. Spaces, line ends and control characters
    are made visible.

    Raises:
        ValueError: no tokens, lengths that differ, an infinite value, or a limit that is not > 0.
    """
    if len(tokens) != len(values) or not len(tokens):
        raise ValueError(f"{len(tokens)} tokens and {len(values)} values: expected one each")
    if any(math.isinf(value) for value in values):
        raise ValueError("a value is infinite: a heat map needs finite values, or NaN for none")
    if limit is None:  # where every value is at the center, any range shows them white
        limit = max((abs(v - center) for v in values if not math.isnan(v)), default=0.0) or 1.0
    if not limit > 0:
        raise ValueError(f"limit={limit}: expected a positive number")
    pieces = list(place([show_token(token) for token in tokens]))
    rows = pieces[-1].row + 1
    wide = max(16, len(title), *(p.column + len(p.text) for p in pieces))
    figure = new_figure((0.105 * wide + 1.2, 0.25 * rows + 0.55))
    axes = figure.subplots()
    axes.set(xlim=(0, wide), ylim=(rows, 0))
    axes.set_axis_off()
    axes.set_title(title, loc="left", fontsize=10, parse_math=False)
    scale = ScalarMappable(Normalize(center - limit, center + limit, clip=True), PALETTE)
    middle = {"ha": "center", "va": "center", "family": "monospace", "fontsize": 9}
    for text, column, row, token in pieces:
        width, value = len(text), values[token]
        axes.add_patch(Rectangle((column, row), width, 0.92, color=scale.to_rgba(value)))
        ink = "white" if abs(value - center) > 0.55 * limit else "black"  # the ends are dark
        # A dollar sign is a dollar sign here, not the beginning of a formula.
        place_of = (column + width / 2, row + 0.46)
        axes.text(*place_of, text, color=ink, parse_math=False, **middle)
    figure.colorbar(scale, ax=axes, fraction=0.03, pad=0.01, aspect=max(4, 2.5 * rows))
    return figure


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty figure that a notebook shows once, where it is returned, and does not keep.

    pyplot must make it, for only then does Jupyter know how to show it; and pyplot must forget it,
    for else it shows it a second time.
    """
    figure = plt.figure(figsize=size, layout="constrained")
    plt.close(figure)
    return figure


def show_token(token: str) -> str:
    """Return a token with its spaces, line ends and control characters made visible."""
    visible = (c if c.isprintable() else f"\\x{ord(c):02x}" for c in token)
    return "".join(MARKS.get(c, shown) for c, shown in zip(token, visible, strict=True)) or "∅"


class Piece(NamedTuple):
    """A piece of a token in the picture: its text, its first character cell, and which token."""

    text: str
    column: int
    row: int
    token: int


def place(tokens: Sequence[str], columns: int = COLUMNS) -> Iterator[Piece]:
    """Lay tokens out in rows: a line end ends a row, as does the margin at `columns`."""
    column = row = 0
    for number, token in enumerate(tokens):
        for line in token.splitlines(keepends=True):
            text = line.rstrip("\n")
            step = columns // 2 if len(text) > columns else max(len(text), 1)
            for part in (text[i : i + step] for i in range(0, len(text), step)):
                if column and column + len(part) > columns:
                    column, row = 0, row + 1
                yield Piece(part, column, row, number)
                column += len(part)
            if line.endswith("\n"):
                column, row = 0, row + 1
