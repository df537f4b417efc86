"""Token heat maps: which tokens of a rollout carry a value, for notebooks and for pictures."""

import html
import math
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

# Blue against red through white: told apart with every common kind of colour blindness.
PALETTE = "RdBu"
MISSING = "#d9d9d9"  # no value: a masked token
# What tokenizers write for a space and a line end, and what a reader sees instead.
MARKS = {"Ġ": "·", "▁": "·", " ": "·", "Ċ": "↵\n", "\n": "↵\n", "\t": "→", "ĉ": "→", "\r": "␍"}


class Placed(NamedTuple):
    """A token in a picture: its text, where it begins in character cells, and its colour."""

    text: str
    column: int
    row: int
    width: int
    colour: str


class TokenHeatmap:
    """Tokens on colours; Jupyter shows it as HTML, `figure` and `save_png` make a picture."""

    def __init__(
        self,
        tokens: Sequence[str],
        values: Sequence[float],
        *,
        title: str,
        center: float,
        limit: float | None,
    ) -> None:
        self.tokens = [show_token(token) for token in tokens]
        self.values = [float(value) for value in values]
        self.title = title
        self.center = center
        self.limit = limit if limit is not None else _reach(self.values, center)

    @property
    def colours(self) -> list[str]:
        """One colour per token, as hexadecimal."""
        return [self._colour(value) for value in self.values]

    def _repr_html_(self) -> str:
        spans = zip(self.tokens, self.values, self.colours, strict=True)
        body = "".join(_span(*parts) for parts in spans)
        low, high = self.center - self.limit, self.center + self.limit
        stops = ", ".join(self._colour(low + (high - low) * i / 8) for i in range(9))
        scale = (
            f"<span>{low:.3g}</span> <span style='display:inline-block;width:8em;height:.8em;"
            f"border:1px solid #999;background:linear-gradient(to right, {stops})'></span> "
            f"<span>{high:.3g}</span>"
        )
        return (
            "<div style='margin:.5em 0;color:#111;background:#fff;padding:.4em'>"
            f"<div style='font-size:90%'><b>{html.escape(self.title)}</b> &nbsp; {scale}</div>"
            "<div style='font-family:monospace;line-height:1.7;overflow-wrap:anywhere'>"
            f"{body}</div></div>"
        )

    def figure(self, columns: int = 96) -> Figure:
        """The heat map as a matplotlib figure, wrapped at `columns` characters.

        Raises:
            ValueError: `columns` is below 8.
        """
        if columns < 8:
            raise ValueError(f"columns={columns}: expected 8 or more")
        placed = list(place(self.tokens, self.colours, columns))
        rows = placed[-1].row + 1
        wide = max(16, text_width(self.title), *(p.column + p.width for p in placed))
        size = (0.105 * wide + 1.2, 0.25 * rows + 0.55)
        figure = new_figure(size)
        axes = figure.subplots()
        axes.set(xlim=(0, wide), ylim=(rows, 0))
        axes.set_axis_off()
        axes.set_title(self.title, loc="left", fontsize=10, parse_math=False)
        for token in placed:
            axes.add_patch(
                Rectangle((token.column, token.row), token.width, 0.92, color=token.colour)
            )
            # A dollar sign is a dollar sign here, not the beginning of a formula.
            axes.text(
                token.column + token.width / 2,
                token.row + 0.46,
                token.text,
                ha="center",
                va="center",
                family="monospace",
                fontsize=9,
                color=_ink(token.colour),
                parse_math=False,
            )
        scale = ScalarMappable(self._norm(), colormaps[PALETTE])
        figure.colorbar(scale, ax=axes, fraction=0.03, pad=0.01, aspect=max(4, 2.5 * rows))
        return figure

    def save_png(self, path: str | Path, columns: int = 96) -> Path:
        """Write the picture; its folder must exist. Returns the path."""
        self.figure(columns).savefig(path, dpi=150)
        return Path(path)

    def _norm(self) -> Normalize:
        return Normalize(self.center - self.limit, self.center + self.limit, clip=True)

    def _colour(self, value: float) -> str:
        palette: Colormap = colormaps[PALETTE]
        return MISSING if math.isnan(value) else to_hex(palette(self._norm()(value)))


def token_heatmap(
    tokens: Sequence[str],
    values: Sequence[float],
    *,
    title: str,
    center: float = 0.0,
    limit: float | None = None,
) -> TokenHeatmap:
    """Colour each token by its value: blue above `center`, red below, white at it, grey for NaN.

    Args:
        tokens: one string per token; spaces, line ends and control characters are made visible.
        values: one number per token.
        title: stands above the picture.
        center: the value that is neutral: 0 for a gap, 1 for a weight.
        limit: the distance from `center` that gets full colour; default: the largest there is.

    Raises:
        ValueError: no tokens, lengths that differ, an infinite value, or a limit that is not > 0.
    """
    if len(tokens) != len(values) or not len(tokens):
        raise ValueError(f"{len(tokens)} tokens and {len(values)} values: expected one each")
    if any(math.isinf(value) for value in values):
        raise ValueError("a value is infinite: a heat map needs finite values, or NaN for none")
    if limit is not None and not limit > 0:
        raise ValueError(f"limit={limit}: expected a positive number")
    return TokenHeatmap(tokens, values, title=title, center=center, limit=limit)


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty figure that a notebook shows once, where it is returned, and does not keep.

    pyplot must make it, for only then does Jupyter know how to show it; and pyplot must forget it,
    for else it shows it a second time.
    """
    figure = plt.figure(figsize=size, layout="constrained")
    plt.close(figure)
    return figure


def show_token(token: str) -> str:
    """A token with its spaces, line ends and control characters made visible."""
    return "".join(MARKS.get(char) or _visible(char) for char in token) or "∅"


def place(tokens: Sequence[str], colours: Sequence[str], columns: int) -> Iterator[Placed]:
    """Lay tokens out in rows: a line end ends a row, as does the margin at `columns`."""
    column = row = 0
    for token, colour in zip(tokens, colours, strict=True):
        for piece in token.splitlines(keepends=True):
            text = piece.rstrip("\n")
            for part in _chunks(text, columns):
                width = text_width(part)
                if column and column + width > columns:
                    column, row = 0, row + 1
                yield Placed(part, column, row, width, colour)
                column += width
            if piece.endswith("\n"):
                column, row = 0, row + 1


def text_width(text: str) -> int:
    """Character cells that a text takes: two for wide characters, none for combining ones."""
    wide = {"W": 2, "F": 2}
    return sum(
        0 if unicodedata.combining(c) else wide.get(unicodedata.east_asian_width(c), 1)
        for c in text
    )


def _chunks(text: str, columns: int) -> list[str]:
    step = columns // 2 if text_width(text) > columns else max(len(text), 1)
    return [text[i : i + step] for i in range(0, len(text), step)]


def _visible(char: str) -> str:
    hidden = unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp")
    return f"\\x{ord(char):02x}" if hidden else char


def _reach(values: Sequence[float], center: float) -> float:
    far = max((abs(v - center) for v in values if not math.isnan(v)), default=0.0)
    return far or 1.0  # every value at the center: any range shows them white


def _span(text: str, value: float, colour: str) -> str:
    shown = html.escape(text).replace("\n", "<br>")
    style = f"background:{colour};color:{_ink(colour)};padding:1px 0;border-radius:2px"
    return f"<span title='{value:+.4g}' style='{style}'>{shown}</span>"


def _ink(colour: str) -> str:
    """Black or white, whichever reads better on a colour."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#ffffff"
