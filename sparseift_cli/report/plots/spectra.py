"""How well the masks connect their layers over a run: spectral gap and Ramanujan gap of every kept checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from ..report import Report
from ..spectral.spectra import by_layer
from .curves import steps_axis
from .families import Family, Group, mean_and_range
from .style import MUTED, house, legend_below, new_figure

_GAPS = (("spectral_gap", "spectral gap\ns1 - s2"), ("ramanujan_gap", "Ramanujan gap"))


def mask_spectra(report: Report, family: Family) -> Figure:
    """Both gaps over optimiser steps: the mean over the masked layers of a recipe, the band from lowest to highest layer.

    Each layer is the mean of the seeds. On the dotted line and above, a layer is Ramanujan as `spectral.gaps` estimates it.
    """
    with house():
        figure, axes = new_figure(f"{family.title}: how well the masks connect", 4.4, rows=2)
        for group in measured(report, family):
            for place, (key, _) in zip(axes, _GAPS, strict=True):
                points = series(report, group, key)
                steps = [step for step, _ in points]
                mean, low, high = zip(*(mean_and_range(values) for _, values in points), strict=True)
                look = group.look
                place.plot(steps, mean, color=look.color, linestyle=look.dashes, marker=look.marker, label=group.short)
                place.fill_between(steps, low, high, color=look.color, alpha=0.16, linewidth=0)
        for place, (_, name) in zip(axes, _GAPS, strict=True):
            place.set_ylabel(name)
        axes[0].set_title("line: mean of the layers; band: lowest to highest")
        axes[1].axhline(0, color=MUTED, linestyle=":", linewidth=1)
        steps_axis(axes[1])
        legend_below(figure, *axes[0].get_legend_handles_labels())
    return figure


def measured(report: Report, family: Family) -> list[Group]:
    """The groups with spectra to draw."""
    return [group for group in family.groups if all(series(report, group, key) for key, _ in _GAPS)]


def series(report: Report, group: Group, key: str) -> list[tuple[int, Sequence[float]]]:
    """(step, `key` of every layer) at each step with a checkpoint."""
    found: dict[int, list[float]] = {}
    for (step, _), values in by_layer(report, group.name).items():
        if values[key] is not None:
            found.setdefault(step, []).append(values[key])
    return sorted(found.items())


def described(report: Report, family: Family) -> str:
    """The picture in words: each recipe's means at its newest checkpoint."""
    parts = []
    for group in measured(report, family):
        ends = [series(report, group, key)[-1] for key, _ in _GAPS]
        spectral, ramanujan = (mean_and_range(values) for _, values in ends)
        parts.append(
            f"{group.short} at step {ends[0][0]:,}: spectral gap {spectral[0]:.3g}, Ramanujan gap {ramanujan[0]:.3g} "
            f"({ramanujan[1]:.3g} to {ramanujan[2]:.3g} over {len(ends[1][1])} layers)"
        )
    return "Spectral gap and Ramanujan gap of the masks over optimiser steps. " + "; ".join(parts) + "."
