"""Where the FLOPs go, layer by layer: before and after (the article's Figure 3 as data), and how sparse each layer is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .families import Family, Group, scaled
from .style import BLUE, INK, MUTED, ORANGE, PAPER, PURPLE, legend_below, new_figure, style_context

STATUS = {  # colour and hatch of what the transform did to a layer
    "transformed": (BLUE, ""),
    "boundary": (ORANGE, "/////"),
    "untouched": (PURPLE, "|||"),
    "mixed": (MUTED, "xxxx"),
}
MEANING = {
    "transformed": "after: transformed",
    "boundary": "after: next to wider layers, stays dense",
    "untouched": "after: unchanged",
    "mixed": "after: folded rows of both kinds",
}
MOST = 40  # rows that a picture as high as a page can label
_NAME = 26  # characters of a layer's name beside its bar


def flops_per_layer(family: Family, group: Group) -> Figure:
    """Two bars a layer, forward FLOPs of one sample: hollow before, filled after; the colour says how the layer was treated."""
    layers = counted(group)
    largest = max(2 * max(row["dense_macs"], row["transformed_macs"]) for g in family.transformed for row in counted(g))
    divisor, unit = scaled(largest)
    with style_context():
        figure, (axes,) = new_figure(f"{_who(family, group)}: FLOPs per layer", 0.9 + 0.19 * len(layers))
        for at, row in enumerate(layers):
            color, hatch = STATUS[row["status"]]
            axes.barh(
                at - 0.2, 2 * row["dense_macs"] / divisor, height=0.36, facecolor=PAPER, edgecolor=INK, linewidth=0.8
            )
            axes.barh(
                at + 0.2,
                2 * row["transformed_macs"] / divisor,
                height=0.36,
                facecolor=color,
                hatch=hatch,
                edgecolor=INK,
                linewidth=0.5,
            )
        _rows(axes, [row["name"] for row in layers])
        axes.set_xlim(
            0, 1.04 * largest / divisor
        )  # the same for all of the family: bars can be compared across pictures
        axes.set_xlabel(f"forward FLOPs of one sample ({unit})")
        present = [status for status in STATUS if any(row["status"] == status for row in layers)]
        keys = [Patch(facecolor=PAPER, edgecolor=INK, label="before: dense")]
        for status in present:
            color, hatch = STATUS[status]
            keys.append(Patch(facecolor=color, hatch=hatch, edgecolor=INK, linewidth=0.5, label=MEANING[status]))
        legend_below(figure, keys, [str(key.get_label()) for key in keys])
    return figure


def sparsity_per_layer(family: Family) -> Figure:
    """A row a layer with weights, a marker a group: the share of the weights that are zero. Dense layers are at 0."""
    groups = [g for g in family.transformed if weighted(g)]
    names = list(dict.fromkeys(row["name"] for g in groups for row in weighted(g)))
    with style_context():
        figure, (axes,) = new_figure(f"{family.title}: sparsity per layer", 1.0 + 0.17 * len(names))
        for group in groups:
            points = [(100 * (1 - row["density"]), names.index(row["name"])) for row in weighted(group)]
            style = group.line_style
            axes.plot(
                *zip(*points, strict=True),
                linestyle="",
                marker=style.marker,
                color=style.color,
                label=family.plan_name(group),
                clip_on=False,
            )
        _rows(axes, names)
        axes.set_xlim(-3, 103)
        axes.set_xlabel("sparsity: weights that are zero (%)")
        legend_below(figure, *axes.get_legend_handles_labels())
    return figure


def counted(group: Group) -> list[dict[str, Any]]:
    """The audit's rows that cost something, folded to at most MOST: name, status, dense_macs, transformed_macs."""
    rows = [row for row in (group.audit or {}).get("layers", ()) if row["dense_macs"] or row["transformed_macs"]]
    return _folded(rows, ("dense_macs", "transformed_macs"))


def weighted(group: Group) -> list[dict[str, Any]]:
    """The audit's rows that have weights, folded to at most MOST, each with its density."""
    rows = [row for row in (group.audit or {}).get("layers", ()) if row.get("weights") and row.get("nnz") is not None]
    return [row | {"density": row["nnz"] / row["weights"]} for row in _folded(rows, ("nnz", "weights"))]


def flops_described(family: Family, group: Group) -> str:
    """The bars in words: the FLOPs of each kind of layer before and after."""
    parts = []
    for status in STATUS:
        rows = [row for row in counted(group) if row["status"] == status]
        before, after = (2 * sum(row[k] for row in rows) for k in ("dense_macs", "transformed_macs"))
        if rows:
            divisor, unit = scaled(max(before, after))
            parts.append(f"{status} layers {before / divisor:.3f} before, {after / divisor:.3f} {unit} after")
    return f"Forward FLOPs of one sample, layer by layer, {_who(family, group)}: " + "; ".join(parts) + "."


def sparsity_described(family: Family) -> str:
    """The picture in words: each group's range of sparsities, and how many layers are dense."""
    parts = []
    for group in family.transformed:
        rows = weighted(group)
        sparse = [1 - row["density"] for row in rows if row["density"] < 1]
        if sparse:
            span = f"{100 * min(sparse):.1f} to {100 * max(sparse):.1f} %"
            parts.append(f"{family.plan_name(group)}: {span} in {len(sparse)} layers, {len(rows) - len(sparse)} dense")
        elif rows:
            parts.append(f"{family.plan_name(group)}: all {len(rows)} dense")
    return "Sparsity of every layer with weights. " + "; ".join(parts) + "."


def _folded(rows: Sequence[Mapping[str, Any]], summed: Sequence[str]) -> list[dict[str, Any]]:
    """Rows summed by the first parts of their path, with as many parts as give at most MOST rows."""
    depth = max((row["name"].count(".") + 1 for row in rows), default=1)
    names = [row["name"].split(".") for row in rows]
    while depth > 1 and len({tuple(name[:depth]) for name in names}) > MOST:
        depth -= 1
    folded: dict[str, dict[str, Any]] = {}
    for row, name in zip(rows, names, strict=True):
        key = ".".join(name[:depth])
        into = folded.setdefault(key, {"name": key, "status": row["status"], **dict.fromkeys(summed, 0)})
        for field in summed:
            into[field] += row[field]
        if into["status"] != row["status"]:
            into["status"] = "mixed"
    return list(folded.values())


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """Names at the rows, the first layer on top."""
    axes.set_yticks(range(len(names)), _short(names), fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def _short(names: Sequence[str]) -> list[str]:
    """Names that fit beside a bar: if too long without the module that most begin with, then without their beginnings."""
    if max(map(len, names)) > _NAME:
        first, often = Counter(name.partition(".")[0] for name in names).most_common(1)[0]
        if 2 * often > len(names):
            names = [name.replace(f"{first}.", "…", 1) if name.startswith(f"{first}.") else name for name in names]
    return [name if len(name) <= _NAME else f"…{name[1 - _NAME :]}" for name in names]


def _who(family: Family, group: Group) -> str:
    return f"{family.model}, {family.plan_name(group)}"
