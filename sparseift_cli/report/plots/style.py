"""The style of all pictures, and how they are written: colours, markers, hatches, sizes, deterministic SVG and PNG.

Colours are the eight of Okabe and Ito (Color Universal Design, 2008), which colour-blind readers can distinguish; and nothing
is shown by colour alone: lines have markers and dashes, bars have hatches. Figures are made with matplotlib's objects, never
with pyplot, so that drawing a report leaves no window, no current figure and no changed rcParams.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#1b1b1b", "#5a5a5a", "#d9d9d9", "#ffffff"
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"

WIDTH = 4.8  # inches: one column of a paper; about as wide as a phone shows, so that letters stay readable
DPI = 200
_TITLE_LETTERS = 58  # letters of 10.5 points that fit WIDTH
_LEGEND_LINE = 0.18  # inches
_RC: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib: the same picture on every machine
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,  # a `$` in a recipe's name is a `$`
    "text.usetex": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "figure.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": "auto",
    "hatch.color": INK,
    "hatch.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
}


@dataclass(frozen=True, slots=True)
class LineStyle:
    """Colour, marker and dashes of one series; each of them alone distinguishes it from the first others."""

    color: str
    marker: str
    dashes: str | tuple[int, tuple[int, ...]]


BASELINE = LineStyle(INK, "o", "-")
_COLORS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
_MARKERS = ("s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")
_DASHES = ((0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (6, 2, 1, 2, 1, 2)), (0, (8, 2)))


def line_style(index: int) -> LineStyle:
    """The style of series `index`; the first 330 are all different. The baseline has its own, BASELINE."""
    return LineStyle(_COLORS[index % len(_COLORS)], _MARKERS[index % len(_MARKERS)], _DASHES[index % len(_DASHES)])


@contextmanager
def style_context() -> Iterator[None]:
    """Inside, matplotlib has the settings of this module, whatever the user's matplotlibrc says; afterwards the old ones."""
    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from font"
        )  # a name in another script is drawn as boxes
        yield


def new_figure(
    title: str, height: float, rows: int = 1, *, same_x: bool = True, heights: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure with a title and `rows` axes above one another. Call it inside `style_context()`.

    Args:
        title: over the whole figure; long ones are wrapped.
        height: in inches; the width is WIDTH.
        rows: the number of axes.
        same_x: the axes share their x axis.
        heights: the axes' shares of the height, in any unit; None: equal ones.
    """
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    lines = textwrap.wrap(title, _TITLE_LETTERS, break_long_words=True)
    figure.suptitle("\n".join(lines), x=0.01, horizontalalignment="left")
    axes = figure.subplots(rows, 1, squeeze=False, sharex=same_x and rows > 1, height_ratios=heights)
    return figure, [row[0] for row in axes]


def legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """A legend below the axes; the figure becomes higher by it, so that the axes keep their size and no data is hidden."""
    if not handles:
        return
    columns = 2 if max(map(len, labels)) <= _TITLE_LETTERS // 2 - 7 else 1
    wrapped = [textwrap.fill(label, _TITLE_LETTERS - 6) for label in labels]
    per_column = -(-len(wrapped) // columns)
    lines = sum(label.count("\n") + 1 for label in wrapped) if columns == 1 else per_column
    figure.set_figheight(figure.get_figheight() + _LEGEND_LINE * (lines + 1))
    figure.legend(handles, wrapped, loc="outside lower left", ncols=columns, handlelength=3.2, columnspacing=1.2)


def to_svg(figure: Figure, title: str, *, text: bool = False) -> str:
    """The figure as SVG, the same bytes every time. With `text`, letters are text (for a page), else paths."""
    buffer = io.StringIO()
    salt: dict[Any, Any] = {"svg.hashsalt": "sparseift", "svg.fonttype": "none" if text else "path"}
    with style_context(), matplotlib.rc_context(salt):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Title": title, "Date": None, "Creator": "sparseift"})
    return buffer.getvalue()


def to_png(figure: Figure) -> bytes:
    """The figure as PNG at 200 dots an inch."""
    buffer = io.BytesIO()
    with style_context():
        figure.set_dpi(DPI)
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": "sparseift"})
    return buffer.getvalue()
