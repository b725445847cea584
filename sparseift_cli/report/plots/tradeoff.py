"""Accuracy against training FLOPs: the article's Figure 4, of one's own runs."""

from __future__ import annotations

import statistics

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .families import Family, Group, is_number, scaled
from .style import INK, house, legend_below, new_figure

_SPAN = 0.01  # ten times the tolerance within which budgets are compared


def accuracy_against_flops(family: Family) -> Figure:
    """Above, where runs ended; below, how they got there.

    Above: every counted run a small hollow mark, every recipe's mean a large one with its 95 % interval over the seeds.
    Below: the mean of the seeds at every evaluation, FLOPs from 0. x: training FLOPs spent, forward, backward and mask
    updates; y: the family's metric. The dotted line is the dense model's budget: iso-FLOP runs end on it.
    """
    spent = (line.get("flops") for g in family.groups for r in g.runs for line in r.metrics)
    largest = max(filter(is_number, spent), default=0)
    divisor, unit = scaled(largest)
    budget = dense_budget(family)
    short = family.metric_name.partition(" (")[0]
    with house():
        figure, (ends, ways) = new_figure(f"{family.title}: {short} by FLOPs", 5.3, rows=2, same_x=False)
        for group in family.groups:
            _draw_end(ends, group, family.metric, divisor)
            _draw_way(ways, group, family.metric, divisor)
        for axes in (ends, ways):
            if budget is not None:
                axes.axvline(budget / divisor, color=INK, linewidth=0.9, linestyle=":", zorder=1, label="dense budget")
            axes.set_ylabel(family.axis)
            axes.set_xlabel(f"training FLOPs spent ({unit})")
        ends.set_title("at the end: mean with 95 % interval; hollow: seeds")
        ends.margins(x=0.12)
        _widen(ends)
        ends.ticklabel_format(style="plain", useOffset=False)
        ends.locator_params(axis="x", nbins=5)
        ways.set_title("on the way: mean of n seeds")
        ways.set_xlim(left=0)
        legend_below(figure, *ends.get_legend_handles_labels())
    return figure


def _widen(axes: Axes) -> None:
    """Show at least `_SPAN` of the budget: on a finer scale budgets that are equal would seem to differ."""
    left, right = axes.get_xlim()
    short = _SPAN * right - (right - left)
    if short > 0:
        axes.set_xlim(left - short / 2, right + short / 2)


def dense_budget(family: Family) -> float | None:
    """What the dense model spends over the same run: a summary's own figure; the mean where summaries differ."""
    found = [run.summary["flops"]["dense"] for g in family.groups for run in g.runs
             if run.summary and is_number((run.summary.get("flops") or {}).get("dense"))]  # fmt: skip
    return statistics.fmean(found) if found else None


def described(family: Family) -> str:
    """The picture in words: each recipe's mean and where it ended."""
    parts = []
    for group in family.groups:
        ends = group.finals(family.metric)
        if ends:
            mean, flops = statistics.fmean(v for _, v in ends), statistics.fmean(f for f, _ in ends)
            divisor, unit = scaled(flops)
            parts.append(f"{group.label}: {mean:.2f} at {flops / divisor:.4g} {unit}")
    return f"{family.metric_name} against training FLOPs. " + ("; ".join(parts) or "No run has finished") + "."


def _draw_end(axes: Axes, group: Group, metric: str, divisor: float) -> None:
    ends = [(flops / divisor, value) for flops, value in group.finals(metric)]
    if not ends:
        return
    look = group.look
    axes.plot(*zip(*ends, strict=True), linestyle="", marker=look.marker, markersize=4, markerfacecolor="none",
              markeredgecolor=look.color, markeredgewidth=0.9, zorder=3)  # fmt: skip
    flops, mean = statistics.fmean(f for f, _ in ends), statistics.fmean(v for _, v in ends)
    low, high = group.row.get("low"), group.row.get("high")
    if is_number(low) and is_number(high):
        axes.vlines([flops], [low], [high], color=look.color, linewidth=1.2, zorder=2)
    axes.plot(
        [flops], [mean], linestyle="", marker=look.marker, markersize=8, color=look.color, zorder=4, label=group.label
    )


def _draw_way(axes: Axes, group: Group, metric: str, divisor: float) -> None:
    spent = dict(group.series("flops"))
    points = [
        (statistics.fmean(spent[s]) / divisor, statistics.fmean(v)) for s, v in group.series(metric) if s in spent
    ]
    look = group.look
    if points:
        axes.plot(*zip(*points, strict=True), color=look.color, linestyle=look.dashes, marker=look.marker, markersize=4,
                  markevery=max(1, len(points) // 10))  # fmt: skip
