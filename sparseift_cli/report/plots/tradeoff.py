"""The metric of runs against their training FLOPs: the article's Figure 4 for the user's own runs."""

from __future__ import annotations

import statistics
import textwrap
from collections import Counter
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from .families import Family, Group, is_number, scaled
from .style import INK, MUTED, legend_below, new_figure, style_context

FEWEST = 3  # seeds from which an interval is drawn: that of two is 12.7 deviations wide and would compress all else
_LETTERS = 22  # letters of a group's name on a line
_LINE, _AROUND = 0.18, 0.75  # inches: a line of a group's label in the upper part; titles and axis around the labels
_CURVES = 2.65  # inches: the lower part
_FEW = 12  # groups up to which their curves can be distinguished at the usual size
_MANY = 4.2  # inches: the lower part with more groups
_FAR = 1.1  # ratio to the dense budget, or its inverse, from which a curve is labelled where it ends


def accuracy_against_flops(family: Family) -> Figure:
    """Above, the results at the end of training; below, the curves against training FLOPs.

    Above: a line for each group, labelled with its FLOPs (on an axis of FLOPs, iso-FLOP groups would cover one another). A
    small hollow mark is a counted run; a large one is their mean, with its 95 % interval from `FEWEST` seeds on. Below: the
    mean of the seeds at every evaluation. x: training FLOPs so far, of forward and backward passes and mask updates; y: the
    family's metric. The dotted line is the dense model's budget: iso-FLOP runs end on it. Where budgets differ by more than a
    factor of 2, the axis of FLOPs is logarithmic, because the most expensive group would compress the others.
    """
    flops = (line.get("flops") for g in family.groups for r in g.runs for line in r.metrics)
    largest = max(filter(is_number, flops), default=0)
    divisor, unit = scaled(largest)
    budget = dense_budget(family)
    short = family.metric_name.partition(" (")[0]
    ended = [group for group in family.groups if group.finals(family.metric)]
    labels = [_named(group, family.metric, divisor, unit) for group in ended]
    above = _AROUND + _LINE * len(labels) * max((label.count("\n") + 1 for label in labels), default=0)
    curves = [_curve(group, family.metric, divisor) for group in family.groups]
    ends = [points[-1][0] for points in curves if points and points[-1][0] > 0]
    logarithmic = bool(ends) and max(ends) > 2 * min(ends)
    many = len(ends) > _FEW
    with style_context():
        below = _MANY if many else _CURVES
        rows = (above, below) if ended else (below,)
        figure, axes = new_figure(
            f"{family.title}: {short} by FLOPs", sum(rows), rows=len(rows), same_x=False, heights=rows
        )
        if ended:
            _draw_ends(axes[0], ended, family, labels)
        lower = axes[-1]
        for place, (group, points) in enumerate(zip(family.groups, curves, strict=True)):
            shown = [point for point in points if point[0] > 0] if logarithmic else points
            _draw_curve(lower, group, shown, place if many else None)
        if budget is not None:
            lower.axvline(budget / divisor, color=INK, linewidth=0.9, linestyle=":", zorder=1, label="dense budget")
        lower.set_title("during training" + ("; dotted: the dense budget" if budget is not None else ""))
        lower.set_xlabel(f"training FLOPs so far ({unit})")
        lower.set_ylabel(family.axis)
        if logarithmic:
            _log_axis(lower)
            _name_ends(lower, family, curves, (budget or 0) / divisor)
        else:
            lower.set_xlim(left=0)
        named = {group.label for group in ended} | {"dense budget"}
        unnamed = [
            (line, name) for line, name in zip(*lower.get_legend_handles_labels(), strict=True) if name not in named
        ]
        legend_below(figure, [line for line, _ in unnamed], [name for _, name in unnamed])
    return figure


def _draw_ends(axes: Axes, ended: Sequence[Group], family: Family, labels: Sequence[str]) -> None:
    for place, group in enumerate(ended):
        _draw_end(axes, group, family.metric, place)
    axes.set_yticks(range(len(ended)), labels)
    axes.set_ylim(len(ended) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_title(f"mean, seeds, 95 % interval (n ≥ {FEWEST})")
    axes.set_xlabel(family.axis.replace("\n", " "))
    axes.ticklabel_format(axis="x", style="plain", useOffset=False)
    axes.locator_params(axis="x", nbins=5)


def dense_budget(family: Family) -> float | None:
    """Training FLOPs of the dense model over the same run, from summaries; where lengths differ, those of most runs."""
    found = [
        run.summary["flops"]["dense"]
        for g in family.groups
        for run in g.runs
        if run.summary and is_number((run.summary.get("flops") or {}).get("dense"))
    ]
    return Counter(found).most_common(1)[0][0] if found else None


def described(family: Family) -> str:
    """The picture in words: each group's mean, and its FLOPs."""
    parts = []
    for group in family.groups:
        ends = group.finals(family.metric)
        if ends:
            mean, flops = statistics.fmean(v for _, v in ends), statistics.fmean(f for f, _ in ends)
            divisor, unit = scaled(flops)
            parts.append(f"{group.label}: {mean:.2f} at {flops / divisor:.4g} {unit}")
    return f"{family.metric_name} against training FLOPs. " + ("; ".join(parts) or "No run has finished") + "."


def _named(group: Group, metric: str, divisor: float, unit: str) -> str:
    """The label of a group: its name, its FLOPs, and the number of seeds."""
    used = [flops for flops, _ in group.finals(metric)]
    return f"{textwrap.fill(group.short, _LETTERS)}\n{statistics.fmean(used) / divisor:#.4g} {unit}, n = {len(used)}"


def _draw_end(axes: Axes, group: Group, metric: str, place: int) -> None:
    values = [value for _, value in group.finals(metric)]
    style = group.line_style
    axes.axhline(place, color=MUTED, linewidth=0.4, zorder=1)
    axes.plot(
        values,
        [place] * len(values),
        linestyle="",
        marker=style.marker,
        markersize=4,
        markerfacecolor="none",
        markeredgecolor=style.color,
        markeredgewidth=0.9,
        zorder=3,
    )
    low, high = group.row.get("low"), group.row.get("high")
    if len(values) >= FEWEST and is_number(low) and is_number(high):
        axes.hlines([place], [low], [high], color=style.color, linewidth=1.2, zorder=2)
    axes.plot(
        [statistics.fmean(values)],
        [place],
        linestyle="",
        marker=style.marker,
        markersize=8,
        color=style.color,
        zorder=4,
        label=group.label,
    )


def _curve(group: Group, metric: str, divisor: float) -> list[tuple[float, float]]:
    """(training FLOPs so far, metric) at every evaluation, means of the seeds."""
    flops = dict(group.series("flops"))
    return [(statistics.fmean(flops[s]) / divisor, statistics.fmean(v)) for s, v in group.series(metric) if s in flops]


def _draw_curve(axes: Axes, group: Group, points: Sequence[tuple[float, float]], place: int | None) -> None:
    """Draw one curve; `place` is its number among many, which are thinner, with fewer marks at different points."""
    if not points:
        return
    every = max(1, len(points) // 10)
    size, width, marks = (4.0, 1.6, (0, every)) if place is None else (3.5, 0.9, (place % (2 * every), 4 * every))
    style = group.line_style
    axes.plot(
        *zip(*points, strict=True),
        color=style.color,
        linestyle=style.dashes,
        marker=style.marker,
        markersize=size,
        linewidth=width,
        markevery=marks,
        label=group.label,
    )


def _log_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())


def _name_ends(axes: Axes, family: Family, curves: Sequence[Sequence[tuple[float, float]]], budget: float) -> None:
    """Label every curve that does not end near the dense budget, vertically, on the side where the curves lie."""
    offset, side = (6, "bottom") if family.facts.lower_is_better else (-6, "top")
    for group, points in zip(family.groups, curves, strict=True):
        if points and points[-1][0] > 0 and budget and not 1 / _FAR < points[-1][0] / budget < _FAR:
            axes.annotate(
                group.short,
                points[-1],
                (0, offset),
                textcoords="offset points",
                rotation=90,
                ha="center",
                va=side,
                fontsize=8,
            )
