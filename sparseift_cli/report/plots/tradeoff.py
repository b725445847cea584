"""How good runs became and what they spent: the article's Figure 4, of one's own runs."""

from __future__ import annotations

import statistics
import textwrap
from collections import Counter
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from ...base.metrics import lower_is_better
from .families import Family, Group, is_number, scaled
from .style import INK, MUTED, house, legend_below, new_figure

FEWEST = 3  # seeds that an interval is drawn of: two give one 12.7 deviations wide, which would squeeze all else
_LETTERS = 22  # of a recipe's name on a line
_LINE, _AROUND = 0.18, 0.75  # inches: a line of a recipe's label above; titles and axis around them
_WAYS = 2.65  # inches: the part below
_FEW = 12  # recipes up to which their ways are told apart at the usual size
_MANY = 4.2  # inches: the part below of more
_FAR = 1.1  # times the dense budget, or less than the dense budget by as much: a way that says its name where it ends


def accuracy_against_flops(family: Family) -> Figure:
    """Above, where runs ended; below, how they got there.

    Above: a line for each recipe, with the FLOPs that it spent; every counted run a small hollow mark, their mean a large one
    with its 95 % interval over `FEWEST` seeds or more. Iso-FLOP runs stand at one place of an axis of FLOPs, one over the
    other. Below: the mean of the seeds at every evaluation, FLOPs from 0. x: training FLOPs spent, forward, backward and mask
    updates; y: the family's metric. The dotted line is the dense model's budget: iso-FLOP runs end on it. Where budgets
    differ by more than twice the axis of FLOPs is logarithmic, or the dearest recipe would leave the others no room.
    """
    spent = (line.get("flops") for g in family.groups for r in g.runs for line in r.metrics)
    largest = max(filter(is_number, spent), default=0)
    divisor, unit = scaled(largest)
    budget = dense_budget(family)
    short = family.metric_name.partition(" (")[0]
    ended = [group for group in family.groups if group.finals(family.metric)]
    labels = [_named(group, family.metric, divisor, unit) for group in ended]
    above = _AROUND + _LINE * len(labels) * max((label.count("\n") + 1 for label in labels), default=0)
    gone = [_way(group, family.metric, divisor) for group in family.groups]
    ends = [points[-1][0] for points in gone if points and points[-1][0] > 0]
    logarithmic = bool(ends) and max(ends) > 2 * min(ends)
    many = len(ends) > _FEW
    with house():
        below = _MANY if many else _WAYS
        rows = (above, below) if ended else (below,)
        figure, axes = new_figure(
            f"{family.title}: {short} by FLOPs", sum(rows), rows=len(rows), same_x=False, heights=rows
        )
        if ended:
            _draw_ends(axes[0], ended, family, labels)
        ways = axes[-1]
        for place, (group, points) in enumerate(zip(family.groups, gone, strict=True)):
            shown = [point for point in points if point[0] > 0] if logarithmic else points
            _draw_way(ways, group, shown, place if many else None)
        if budget is not None:
            ways.axvline(budget / divisor, color=INK, linewidth=0.9, linestyle=":", zorder=1, label="dense budget")
        ways.set_title("on the way" + ("; dotted: the dense budget" if budget is not None else ""))
        ways.set_xlabel(f"training FLOPs spent ({unit})")
        ways.set_ylabel(family.axis)
        if logarithmic:
            _log_axis(ways)
            _name_ends(ways, family, gone, (budget or 0) / divisor)
        else:
            ways.set_xlim(left=0)
        named = {group.label for group in ended} | {"dense budget"}
        unnamed = [
            (line, name) for line, name in zip(*ways.get_legend_handles_labels(), strict=True) if name not in named
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
    """What the dense model spends over the same run, as summaries say; that of most runs where lengths differ."""
    found = [
        run.summary["flops"]["dense"]
        for g in family.groups
        for run in g.runs
        if run.summary and is_number((run.summary.get("flops") or {}).get("dense"))
    ]
    return Counter(found).most_common(1)[0][0] if found else None


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


def _named(group: Group, metric: str, divisor: float, unit: str) -> str:
    """A recipe on the axis: its name, what it spent, and the number of seeds."""
    spent = [flops for flops, _ in group.finals(metric)]
    return f"{textwrap.fill(group.short, _LETTERS)}\n{statistics.fmean(spent) / divisor:#.4g} {unit}, n = {len(spent)}"


def _draw_end(axes: Axes, group: Group, metric: str, place: int) -> None:
    values = [value for _, value in group.finals(metric)]
    look = group.look
    axes.axhline(place, color=MUTED, linewidth=0.4, zorder=1)
    axes.plot(
        values,
        [place] * len(values),
        linestyle="",
        marker=look.marker,
        markersize=4,
        markerfacecolor="none",
        markeredgecolor=look.color,
        markeredgewidth=0.9,
        zorder=3,
    )
    low, high = group.row.get("low"), group.row.get("high")
    if len(values) >= FEWEST and is_number(low) and is_number(high):
        axes.hlines([place], [low], [high], color=look.color, linewidth=1.2, zorder=2)
    axes.plot(
        [statistics.fmean(values)],
        [place],
        linestyle="",
        marker=look.marker,
        markersize=8,
        color=look.color,
        zorder=4,
        label=group.label,
    )


def _way(group: Group, metric: str, divisor: float) -> list[tuple[float, float]]:
    """(FLOPs spent, metric) at every evaluation, means of the seeds."""
    spent = dict(group.series("flops"))
    return [(statistics.fmean(spent[s]) / divisor, statistics.fmean(v)) for s, v in group.series(metric) if s in spent]


def _draw_way(axes: Axes, group: Group, points: Sequence[tuple[float, float]], place: int | None) -> None:
    """`place`: of one way among many, thinner, with few marks, which do not stand over its neighbours'."""
    if not points:
        return
    every = max(1, len(points) // 10)
    size, width, marks = (4.0, 1.6, (0, every)) if place is None else (3.5, 0.9, (place % (2 * every), 4 * every))
    look = group.look
    axes.plot(
        *zip(*points, strict=True),
        color=look.color,
        linestyle=look.dashes,
        marker=look.marker,
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


def _name_ends(axes: Axes, family: Family, ways: Sequence[Sequence[tuple[float, float]]], budget: float) -> None:
    """The name of every recipe that ends elsewhere than on the dense budget, upright on the side from which ways come."""
    offset, side = (6, "bottom") if lower_is_better(family.metric) else (-6, "top")
    for group, points in zip(family.groups, ways, strict=True):
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
