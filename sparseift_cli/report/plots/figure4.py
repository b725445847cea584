"""The article's Figure 4 drawn again, from the numbers of `report.figure4`."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..figure4 import FigureRow, models
from .families import scaled
from .style import BASELINE, MUTED, legend_below, line_style, new_figure, style_context

TITLE = "Published results against audited training FLOPs"


def figure() -> Figure:
    """Above, top-1 on ImageNet against the FLOPs of the run; below, Open LLM average against those of one sequence.

    Circles are dense, squares Sparse Wide matched layer by layer as in the article; a dotted line is a model whose result is
    not known to us, [n] marks a result from an unverified note. Dashes lead from a dense model to its transformed one:
    vertical would be iso-FLOP.
    """
    with style_context():
        made, (above, below) = new_figure(TITLE, 5.8, rows=2, same_x=False)
        shown = [row for row in models() if row.match != "model"]
        _draw(above, [row for row in shown if row.model.startswith("resnet")])
        above.set_ylabel("top-1 accuracy (%), published")
        above.set_title("ImageNet: FLOPs of 90 epochs; [n]: from an unverified note")
        _draw(below, [row for row in shown if row.model.startswith("gpt3")])
        below.set_ylabel("average accuracy (%), published")
        below.set_title("Open LLM: FLOPs of 2,048 tokens; dotted: no result known")
        legend_below(made, *above.get_legend_handles_labels())
    return made


def described() -> str:
    """The figure in words."""
    parts = []
    for row in models():
        divisor, unit = scaled(row.training_flops)
        result = "no published result" if row.value is None else f"{row.value:g} % published"
        parts.append(
            f"{_name(row)}{', match model' if row.match == 'model' else ''}: {result}, {row.training_flops / divisor:.4g} {unit}"
        )
    return f"{TITLE}. " + "; ".join(parts) + "."


def _draw(axes: Axes, shown: Sequence[FigureRow]) -> None:
    divisor, unit = scaled(max(row.training_flops for row in shown))
    known = [row for row in shown if row.value is not None]
    for mark, kind, label in ((BASELINE, "dense", "dense"), (line_style(0), "wide", "Sparse Wide, match layer")):
        points = [(row.training_flops / divisor, row.value) for row in known if row.transform == kind]
        axes.plot(
            *zip(*points, strict=True),
            linestyle="",
            marker=mark.marker,
            color=mark.color,
            markersize=8,
            label=label,
            zorder=3,
        )
    for row in known:
        x = row.training_flops / divisor
        label = _name(row) + (" [n]" if row.evidence == "n" else "")
        axes.annotate(label, (x, row.value or 0), xytext=(-9, 0), textcoords="offset points", ha="right", va="center")
        dense = next(d for d in known if d.model == row.model and d.transform == "dense")
        line = [dense.training_flops / divisor, x], [dense.value or 0, row.value or 0]
        axes.plot(*line, color=MUTED, linestyle="--", linewidth=0.9, zorder=2)
    _place_unknown(axes, [row for row in shown if row.value is None], divisor)
    axes.set_xlim(0, 1.08 * max(row.training_flops for row in shown) / divisor)
    axes.set_xlabel(f"training FLOPs, audited ({unit})")


def _place_unknown(axes: Axes, rows: Sequence[FigureRow], divisor: float) -> None:
    """Models without a published result: a short line up from the axis, in a strip below the points."""
    axes.margins(y=0.15)
    if not rows:
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low - 0.35 * (high - low), high)
    widest = max(row.training_flops for row in rows)
    for at, row in enumerate(rows):  # labels one above the other, that of the rightmost line on its left
        x, left = row.training_flops / divisor, row.training_flops == widest
        axes.axvline(x, ymax=0.2, color=MUTED, linestyle=":", linewidth=1.6, zorder=1)
        axes.annotate(
            _name(row),
            (x, 0.15 - 0.09 * at),
            xycoords=("data", "axes fraction"),
            xytext=(-4 if left else 4, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            color=MUTED,
        )


def _name(row: FigureRow) -> str:
    family, _, size = row.model.partition("_")
    model = f"GPT-3 {size.capitalize()}" if size else f"ResNet-{family.removeprefix('resnet')}"
    return model if row.sparsity is None else f"{model} Wide {100 * float(row.sparsity):g} %"
