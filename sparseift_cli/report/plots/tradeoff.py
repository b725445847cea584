"""The metric of runs against their training FLOPs, the article's Figure 4 for the user's own runs, or against their wall time."""

from __future__ import annotations

import statistics
import textwrap
from collections import Counter
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from .. import timing
from ..budgets import SECONDS, Budget
from .families import Family, Group, is_number, scaled
from .style import BASELINE, INK, MUTED, legend_below, new_figure, style_context

FEWEST = 3  # seeds from which an interval is drawn: that of two is 12.7 deviations wide and would compress all else
_LETTERS = 22  # letters of a group's name on a line
_LINE, _AROUND = 0.18, 0.75  # inches: a line of a group's label in the upper part; titles and axis around the labels
_CURVES = 2.65  # inches: the lower part
_FEW = 12  # groups up to which their curves can be distinguished at the usual size
_MANY = 4.2  # inches: the lower part with more groups
_FAR = 1.1  # ratio to the dense budget, or its inverse, from which a curve is labelled where it ends


def against_budget(family: Family, budget: Budget) -> Figure:
    """Above, the results at the end of training; below, the curves against what training used: FLOPs or seconds.

    Above: a line for each group, labelled with its FLOPs (on an axis of FLOPs, iso-FLOP groups would cover one another). A
    small hollow mark is a counted run; a large one is their mean, with its 95 % interval from `FEWEST` seeds on. Below: the
    mean of the seeds at every evaluation. x: training FLOPs so far, of forward and backward passes and mask updates; y: the
    family's metric. The dotted line is the dense model's budget: iso-FLOP runs end on it. Where budgets differ by more than a
    factor of 2, the axis of FLOPs is logarithmic, because the most expensive group would compress the others. Wall time in
    place of FLOPs is that of the run's clock.
    """
    used = (line.get(budget.name) for g in family.groups for r in g.runs for line in r.metrics)
    divisor, unit = scaled(max(filter(is_number, used), default=0), budget)
    of_dense = dense_budget(family, budget)
    short = family.metric_name.partition(" (")[0]
    ended = [group for group in family.groups if group.finals(family.metric, budget)]
    labels = [_named(group, family.metric, budget, divisor, unit) for group in ended]
    above = _AROUND + _LINE * len(labels) * max((label.count("\n") + 1 for label in labels), default=0)
    curves = [_curve(group, family.metric, budget, divisor) for group in family.groups]
    ends = [points[-1][0] for points in curves if points and points[-1][0] > 0]
    logarithmic = bool(ends) and max(ends) > 2 * min(ends)
    many = len(ends) > _FEW
    with style_context():
        below = _MANY if many else _CURVES
        rows = (above, below) if ended else (below,)
        figure, axes = new_figure(
            f"{family.title}: {short} by {budget.axis}", sum(rows), rows=len(rows), same_x=False, heights=rows
        )
        if ended:
            _draw_ends(axes[0], ended, family, labels, budget)
        lower = axes[-1]
        for place, (group, points) in enumerate(zip(family.groups, curves, strict=True)):
            shown = [point for point in points if point[0] > 0] if logarithmic else points
            _draw_curve(lower, group, shown, place if many else None)
        line = f"dense {budget.limit}"
        if of_dense is not None:
            lower.axvline(of_dense / divisor, color=INK, linewidth=0.9, linestyle=":", zorder=1, label=line)
        lower.set_title("during training" + (f"; dotted: the {line}" if of_dense is not None else ""))
        lower.set_xlabel(f"{budget.title} so far ({unit})")
        lower.set_ylabel(family.axis)
        if logarithmic:
            _log_axis(lower)
            _name_ends(lower, family, curves, (of_dense or 0) / divisor)
        else:
            lower.set_xlim(left=0)
        named = {group.label for group in ended} | {line}
        unnamed = [
            (line, name) for line, name in zip(*lower.get_legend_handles_labels(), strict=True) if name not in named
        ]
        legend_below(figure, [line for line, _ in unnamed], [name for _, name in unnamed])
    return figure


def _draw_ends(axes: Axes, ended: Sequence[Group], family: Family, labels: Sequence[str], budget: Budget) -> None:
    for place, group in enumerate(ended):
        _draw_end(axes, group, family.metric, place, budget)
    axes.set_yticks(range(len(ended)), labels)
    axes.set_ylim(len(ended) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_title(f"mean, seeds, 95 % interval (n ≥ {FEWEST})")
    axes.set_xlabel(family.axis.replace("\n", " "))
    axes.ticklabel_format(axis="x", style="plain", useOffset=False)
    axes.locator_params(axis="x", nbins=5)


def dense_budget(family: Family, budget: Budget) -> float | None:
    """What the dense model uses: its audited FLOPs over the same run, or the mean wall time of the baseline's runs.

    FLOPs are of summaries; where lengths differ, those of most runs.
    """
    if budget is SECONDS:
        dense = next((group for group in family.groups if group.line_style is BASELINE), None)
        ends = [used for used, _ in dense.finals(family.metric, budget)] if dense else []
        return statistics.fmean(ends) if ends else None
    found = [
        run.summary["flops"]["dense"]
        for g in family.groups
        for run in g.runs
        if run.summary and is_number((run.summary.get("flops") or {}).get("dense"))
    ]
    return Counter(found).most_common(1)[0][0] if found else None


def described(family: Family, budget: Budget) -> str:
    """The picture in words: each group's mean, its FLOPs or seconds, and of which devices times are."""
    parts = []
    for group in family.groups:
        ends = group.finals(family.metric, budget)
        if ends:
            mean, used = statistics.fmean(v for _, v in ends), statistics.fmean(f for f, _ in ends)
            divisor, unit = scaled(used, budget)
            parts.append(f"{group.label}: {mean:.2f} at {used / divisor:.4g} {unit}")
    text = f"{family.metric_name} against {budget.title}. " + ("; ".join(parts) or "No run has finished") + "."
    return f"{text}{_devices(family)}" if budget is SECONDS else text


def _devices(family: Family) -> str:
    """A warning where wall times of one picture are of several devices or versions."""
    conditions = timing.same_conditions(*[[run for g in family.groups for run in g.counted or g.runs]] * 2)
    differing = [text.partition(" against ")[0] for text in conditions]
    return (
        f" Wall times are not of the same conditions, so they do not compare: {'; '.join(differing)}."
        if differing
        else ""
    )


def _named(group: Group, metric: str, budget: Budget, divisor: float, unit: str) -> str:
    """The label of a group: its name, what it used, and the number of seeds."""
    used = [amount for amount, _ in group.finals(metric, budget)]
    return f"{textwrap.fill(group.short, _LETTERS)}\n{statistics.fmean(used) / divisor:#.4g} {unit}, n = {len(used)}"


def _draw_end(axes: Axes, group: Group, metric: str, place: int, budget: Budget) -> None:
    values = [value for _, value in group.finals(metric, budget)]
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


def _curve(group: Group, metric: str, budget: Budget, divisor: float) -> list[tuple[float, float]]:
    """(used so far, metric) at every evaluation, means of the seeds."""
    used = dict(group.series(budget.name))
    return [(statistics.fmean(used[s]) / divisor, statistics.fmean(v)) for s, v in group.series(metric) if s in used]


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
