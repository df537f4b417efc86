"""Token heat maps: which tokens of a rollout carry a value."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

# Red against blue: told apart with every common kind of colour blindness. The middle is transparent,
# white on a white page and dark on a dark one; of an odd number of colours one is exactly that.
RED, BLUE = "#b2182b", "#2166ac"
PALETTE = LinearSegmentedColormap.from_list(
    "credit", [(0, RED), (0.5, f"{RED}00"), (0.5, f"{BLUE}00"), (1, BLUE)], N=257
).with_extremes(bad="#88888866")  # grey: no value, a masked token
COLUMNS = 96  # character cells in a row
EDGE = {"edgecolor": "#c8c8c8", "linewidth": 0.4}  # a hair that keeps neutral tokens apart
# Boxes that wrap at the width of the page; the text on and around them has the colour of its theme.
HTML = """<figure class="rlsd-heat"><style>
.rlsd-heat {{ margin: .6em 0; font: 13px/1.5 monospace; max-width: 62rem }}
.rlsd-heat figcaption {{ display: flex; flex-wrap: wrap; gap: .1em 1.5em; font: 14px sans-serif;
  margin-bottom: .35em }}
.rlsd-heat div {{ display: flex; flex-wrap: wrap; gap: 2px }}
.rlsd-heat span {{ padding: 0 3px; border-radius: 2px; box-shadow: inset 0 0 0 .5px #8888;
  overflow-wrap: anywhere }}
.rlsd-heat i {{ flex-basis: 100% }}
.rlsd-heat small {{ display: flex; align-items: center; gap: .5em; font: 12px sans-serif }}
.rlsd-heat b {{ width: 9em; height: 1em; border-radius: 2px }}
</style><figcaption>{title}<small>{low}
<b style="background:linear-gradient(90deg,{red},transparent,{blue})"></b>
{high}&ensp;no colour: {middle}</small></figcaption><div>{tokens}</div></figure>"""
# What tokenizers write for a space and a line end, and what a reader sees instead.
MARKS = {"Ġ": "·", "▁": "·", " ": "·", "Ċ": "↵\n", "\n": "↵\n", "\t": "→", "ĉ": "→", "\r": "↩"}


@dataclass(frozen=True)
class Heatmap:
    """A rollout's tokens, coloured by a value each: HTML in a notebook, a PNG in a file.

    A token is blue above `center` and red below, without colour at it and grey for NaN; at `limit`
    from the center it has full colour.
    """

    tokens: list[str]
    values: list[float]
    title: str
    center: float
    limit: float

    def _look(self, value: float) -> tuple[str, str]:
        """The colour of a token, and of the ink on it: "" for the page's own."""
        scale = Normalize(self.center - self.limit, self.center + self.limit, clip=True)
        dark = abs(value - self.center) > 0.8 * self.limit  # both ends of the palette
        return to_hex(PALETTE(scale(value)), keep_alpha=True), "#ffffff" if dark else ""

    def _ends(self) -> list[tuple[float, str]]:
        """Where the scale begins, has its middle and ends; a sign says that values lie beyond."""
        ends = self.center - self.limit, self.center, self.center + self.limit
        slack = 1e-4 * self.limit  # a value on the clip, rounded, is not beyond it
        below = "≤ " * any(value < ends[0] - slack for value in self.values)
        above = "≥ " * any(value > ends[2] + slack for value in self.values)
        signs = zip(ends, (below, "", above), strict=True)
        return [(end, f"{sign}{end:.3g}") for end, sign in signs]

    def figure(self) -> Figure:
        """Return the picture as a figure, in rows of `COLUMNS` characters."""
        pieces = list(place([show_token(token) for token in self.tokens]))
        rows = pieces[-1].row + 1
        wide = max(16, len(self.title), *(p.column + len(p.text) for p in pieces))
        figure = new_figure((0.105 * wide + 1.2, 0.25 * rows + 0.55))
        axes = figure.subplots()
        axes.set(xlim=(0, wide), ylim=(rows, 0))
        axes.set_axis_off()
        # A dollar sign is a dollar sign here, not the beginning of a formula.
        axes.set_title(self.title, loc="left", fontsize=10, parse_math=False)
        middle = {"ha": "center", "va": "center", "family": "monospace", "fontsize": 9}
        for text, column, row, token in pieces:
            paper, ink = self._look(self.values[token])
            box = Rectangle((column, row), len(text), 0.9, facecolor=paper, **EDGE)
            axes.add_patch(box)
            place_of = (column + len(text) / 2, row + 0.46)
            axes.text(*place_of, text, color=ink or "black", parse_math=False, **middle)
        ends, labels = zip(*self._ends(), strict=True)
        scale = ScalarMappable(Normalize(ends[0], ends[-1]), PALETTE)
        bar = figure.colorbar(scale, ax=axes, fraction=0.03, pad=0.01, aspect=max(4, 2.5 * rows))
        bar.set_ticks(ends, labels=labels)
        return figure

    def savefig(self, path: str | Path, **options: Any) -> None:
        """Write the picture as `Figure.savefig` does."""
        self.figure().savefig(path, **options)

    def _repr_html_(self) -> str:
        spans = []
        for token, value in zip(self.tokens, self.values, strict=True):
            paper, ink = self._look(value)
            look = f"background:{paper}" + (f";color:{ink}" if ink else "")
            look = f'style="{look}" title="{escape(f"{token!r}: {value:.4g}")}"'
            for line in show_token(token).splitlines(keepends=True):
                spans.append(f"<span {look}>{escape(line.rstrip())}</span>")
                spans += ["<i></i>"] if line.endswith("\n") else []
        low, middle, high = (label for _, label in self._ends())
        told = {"title": escape(self.title), "tokens": "".join(spans), "red": RED, "blue": BLUE}
        return HTML.format(low=low, middle=middle, high=high, **told)


def token_heatmap(
    tokens: Sequence[str],
    values: Sequence[float],
    *,
    title: str,
    center: float = 0.0,
    limit: float | None = None,
) -> Heatmap:
    """Colour each token by its value: blue above `center`, red below, none at it, grey for NaN.

    `limit` is the distance from `center` that gets full colour; by default the largest there is.
    Raises ValueError for no tokens, lengths that differ, an infinite value, or a limit that is not
    > 0.
    """
    if len(tokens) != len(values) or not len(tokens):
        raise ValueError(f"{len(tokens)} tokens and {len(values)} values: expected one each")
    if any(math.isinf(value) for value in values):
        raise ValueError("a value is infinite: a heat map needs finite values, or NaN for none")
    if limit is None:  # every value may be at the center: then any limit will do
        limit = max((abs(v - center) for v in values if not math.isnan(v)), default=0.0) or 1.0
    if not limit > 0:
        raise ValueError(f"limit={limit}: expected a positive number")
    return Heatmap(list(tokens), list(values), title, center, limit)


def credit_heatmap(
    tokens: Sequence[str],
    credit: Sequence[float],
    advantage: float,
    *,
    title: str,
    limit: float | None = None,
) -> Heatmap:
    """Show a rollout's token advantages A_hat_t as multiples of its advantage A, around GRPO's 1.

    `limit` is the distance from 1 that gets full colour. Where A is 0 there is no multiple, and
    A_hat_t itself is shown, around 0. Raises ValueError as `token_heatmap` does.
    """
    if advantage == 0:
        return token_heatmap(tokens, credit, title=f"{title}: token advantage (A = 0)")
    title = f"{title}: token advantage / A (A = {advantage:.3g})"
    multiples = [value / advantage for value in credit]
    return token_heatmap(tokens, multiples, title=title, center=1.0, limit=limit)


class Card(Figure):
    """A figure on a white card with round corners, for pages of any theme."""

    def __init__(self, figsize: tuple[float, float], **options: Any) -> None:
        super().__init__(figsize, layout="constrained", **options)
        look = {"boxstyle": "round,pad=0,rounding_size=0.015", "facecolor": "white", "lw": 0}
        look |= {"mutation_aspect": figsize[0] / figsize[1], "transform": self.transFigure}
        self.patch = FancyBboxPatch((0, 0), 1, 1, **look)


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty figure that Jupyter can show, made by pyplot, and shows once, forgotten by it."""
    figure = plt.figure(figsize=size, FigureClass=Card)
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
