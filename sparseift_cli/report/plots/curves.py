"""What happened while training: the learning curves, and how the masks moved."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .families import Family, Group, mean_and_range
from .style import house, legend_below, new_figure

BAND = "line: mean of n seeds; band: lowest to highest"


def learning_curves(family: Family) -> Figure:
    """The metric and the training loss over optimiser steps: the mean of the seeds, the band from lowest to highest."""
    with house():
        figure, (above, below) = new_figure(f"{family.title}: learning curves", 4.7, rows=2)
        for group in family.groups:
            _curve(above, group, family.metric)
            _curve(below, group, "train_loss")
        above.set_ylabel(family.axis)
        above.set_title(BAND)
        below.set_ylabel("training loss")
        steps_axis(below)
        legend_below(figure, *above.get_legend_handles_labels())
    return figure


def mask_movement(family: Family) -> Figure:
    """Mask churn and ITOP rate over steps, per cent.

    Churn: the share of the non-zeros that the last mask update replaced. ITOP rate: the share of the weights that have ever
    been active (Liu et al. 2021, "In-Time Over-Parameterization").
    """
    with house():
        figure, (above, below) = new_figure(f"{family.title}: how the masks moved", 4.4, rows=2)
        for group in moving(family):
            _curve(above, group, "churn", 100)
            _curve(below, group, "itop_rate", 100)
        above.set_ylabel("mask churn (%)")
        above.set_title(BAND)
        below.set_ylabel("ITOP rate (%)")
        for axes in (above, below):
            axes.set_ylim(bottom=0)
        steps_axis(below)
        legend_below(figure, *below.get_legend_handles_labels())
    return figure


def moving(family: Family) -> list[Group]:
    """The groups that report masks and have them: one that trains without says 1 throughout."""
    return [g for g in family.groups if not g.unmasked and (g.series("churn") or g.series("itop_rate"))]


def learning_described(family: Family) -> str:
    """The curves in words: where each recipe began and ended."""
    ways = [(g.label, g.series(family.metric)) for g in family.groups]
    parts = [
        f"{label}: from {mean_and_range(w[0][1])[0]:.2f} to {mean_and_range(w[-1][1])[0]:.2f}" for label, w in ways if w
    ]
    return f"{family.metric_name} and training loss over optimiser steps. " + "; ".join(parts) + "."


def movement_described(family: Family) -> str:
    """Churn and ITOP rate in words, at the end."""
    parts = []
    for group in moving(family):
        ends = []
        for name, key in (("churn", "churn"), ("ITOP rate", "itop_rate")):
            if series := group.series(key):
                ends.append(f"{name} {100 * mean_and_range(series[-1][1])[0]:.1f} %")
        parts.append(f"{group.label}: {', '.join(ends)}")
    return "Mask churn and ITOP rate over optimiser steps; at the end " + "; ".join(parts) + "."


def _curve(axes: Axes, group: Group, key: str, factor: float = 1) -> None:
    points = group.series(key)
    if not points:
        return
    steps = [step for step, _ in points]
    mean, low, high = zip(*(mean_and_range([factor * v for v in values]) for _, values in points), strict=True)
    look = group.look
    axes.plot(
        steps,
        mean,
        color=look.color,
        linestyle=look.dashes,
        marker=look.marker,
        markevery=_every(len(steps)),
        label=group.label,
    )
    axes.fill_between(steps, low, high, color=look.color, alpha=0.16, linewidth=0)


def _every(points: int) -> int:
    """A marker on every how many points: about ten a line."""
    return max(1, points // 10)


def steps_axis(axes: Axes) -> None:
    """x is optimiser steps, from 0."""
    axes.set_xlim(left=0)
    axes.set_xlabel("optimiser steps")
    axes.locator_params(axis="x", nbins=6)
    axes.xaxis.set_major_formatter(lambda value, _: _steps(value))


def _steps(value: float) -> str:
    """5,000; 80k; 1.5M: short, so that neighbours on the axis do not touch."""
    if value < 10_000:
        return f"{value:,.0f}"
    return f"{value / 1e3:g}k" if value < 1e6 else f"{value / 1e6:g}M"
