"""Over optimiser steps: learning curves, how the masks moved, and how well they connect their layers."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..report import Report
from ..spectral.history import by_layer
from .families import Family, Group, mean_and_range
from .style import MUTED, legend_below, new_figure, style_context

_GAPS = (("spectral_gap", "spectral gap\ns1 - s2"), ("ramanujan_gap", "Ramanujan gap"))
BAND = "line: mean of n seeds; band: lowest to highest"


def learning_curves(family: Family) -> Figure:
    """The metric and the training loss over optimiser steps: the mean of the seeds, the band from lowest to highest."""
    with style_context():
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
    with style_context():
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
    """The groups whose masks move. One that trains without masks records 1 throughout and is left out."""
    return [g for g in family.groups if not g.unmasked and (g.series("churn") or g.series("itop_rate"))]


def learning_described(family: Family) -> str:
    """The curves in words: the first and last value of each group."""
    curves = [(g.label, g.series(family.metric)) for g in family.groups]
    parts = [
        f"{label}: from {mean_and_range(c[0][1])[0]:.2f} to {mean_and_range(c[-1][1])[0]:.2f}"
        for label, c in curves
        if c
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


def mask_spectra(report: Report, family: Family) -> Figure:
    """Both gaps over optimiser steps: the mean over the masked layers of a group, and a band from lowest to highest layer.

    Each layer is the mean of the seeds. On the dotted line and above, a layer is Ramanujan as `spectral.gaps` estimates it.
    """
    with style_context():
        figure, axes = new_figure(f"{family.title}: how well the masks connect", 4.4, rows=2)
        for group in with_spectra(report, family):
            for place, (key, _) in zip(axes, _GAPS, strict=True):
                points = _gaps(report, group, key)
                steps = [step for step, _ in points]
                mean, low, high = zip(*(mean_and_range(values) for _, values in points), strict=True)
                style = group.line_style
                place.plot(
                    steps, mean, color=style.color, linestyle=style.dashes, marker=style.marker, label=group.short
                )
                place.fill_between(steps, low, high, color=style.color, alpha=0.16, linewidth=0)
        for place, (_, name) in zip(axes, _GAPS, strict=True):
            place.set_ylabel(name)
        axes[0].set_title("line: mean of the layers; band: lowest to highest")
        axes[1].axhline(0, color=MUTED, linestyle=":", linewidth=1)
        steps_axis(axes[1])
        legend_below(figure, *axes[0].get_legend_handles_labels())
    return figure


def with_spectra(report: Report, family: Family) -> list[Group]:
    """The groups with spectra to draw."""
    return [group for group in family.groups if all(_gaps(report, group, key) for key, _ in _GAPS)]


def _gaps(report: Report, group: Group, key: str) -> list[tuple[int, Sequence[float]]]:
    """(step, `key` of every layer) at each step with a checkpoint."""
    found: dict[int, list[float]] = {}
    for (step, _), values in by_layer(report.spectra, group.name).items():
        if values[key] is not None:
            found.setdefault(step, []).append(values[key])
    return sorted(found.items())


def spectra_described(report: Report, family: Family) -> str:
    """The picture in words: each group's means at its newest checkpoint."""
    parts = []
    for group in with_spectra(report, family):
        ends = [_gaps(report, group, key)[-1] for key, _ in _GAPS]
        spectral, ramanujan = (mean_and_range(values) for _, values in ends)
        parts.append(
            f"{group.short} at step {ends[0][0]:,}: spectral gap {spectral[0]:.3g}, Ramanujan gap {ramanujan[0]:.3g} "
            f"({ramanujan[1]:.3g} to {ramanujan[2]:.3g} over {len(ends[1][1])} layers)"
        )
    return "Spectral gap and Ramanujan gap of the masks over optimiser steps. " + "; ".join(parts) + "."


def _curve(axes: Axes, group: Group, key: str, factor: float = 1) -> None:
    points = group.series(key)
    if not points:
        return
    steps = [step for step, _ in points]
    mean, low, high = zip(*(mean_and_range([factor * v for v in values]) for _, values in points), strict=True)
    style = group.line_style
    axes.plot(
        steps,
        mean,
        color=style.color,
        linestyle=style.dashes,
        marker=style.marker,
        markevery=_every(len(steps)),
        label=group.label,
    )
    axes.fill_between(steps, low, high, color=style.color, alpha=0.16, linewidth=0)


def _every(points: int) -> int:
    """The distance of markers, in points: about ten a line."""
    return max(1, points // 10)


def steps_axis(axes: Axes) -> None:
    """Make x the optimiser steps, from 0."""
    axes.set_xlim(left=0)
    axes.set_xlabel("optimiser steps")
    axes.locator_params(axis="x", nbins=6)
    axes.xaxis.set_major_formatter(lambda value, _: _steps(value))


def _steps(value: float) -> str:
    """5,000; 80k; 1.5M: short, so that labels of the axis do not touch."""
    if value < 10_000:
        return f"{value:,.0f}"
    return f"{value / 1e3:g}k" if value < 1e6 else f"{value / 1e6:g}M"
