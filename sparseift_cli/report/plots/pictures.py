"""All pictures of a report in the order in which they are shown, and as files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from ...errors import UsageError
from ..budgets import FLOPS, SECONDS
from ..report import Report
from . import curves, layers, tradeoff
from .families import Family, Group, families, slug
from .style import to_png, to_svg


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure that is drawn when asked for, its title, and what it shows in words."""

    name: str
    """The file's name without its ending; unique in a report."""
    title: str
    described: str
    """The same in words, with the main numbers, for readers who cannot see it."""
    draw: Callable[[], Figure]
    """Makes the figure, a new one with every call: most of the time of a report goes into it."""
    group: Group | None = None
    """The group that it shows, if it does not show the whole family."""


def pictures(report: Report) -> Iterator[tuple[Family, list[Picture]]]:
    """Each family of the report with its pictures; a picture without data is left out.

    In order: the metric against training FLOPs, against wall time (where a report at equal time was asked for), learning
    curves, mask churn and ITOP rate, spectra of the masks (where the report has them), FLOPs per layer (one for each
    transformed group), sparsity per layer.
    """
    used: dict[str, int] = {}
    for family in families(report):
        name = _unused(used, family.slug)
        made = [*_results(name, family, report), *_masks(name, family, report)]
        for group in family.transformed:
            if layers.counted(group):
                file = _unused(used, f"{name}-layers-{slug(group.name)}")
                title, words = f"FLOPs per layer: {family.plan_name(group)}", layers.flops_described(family, group)
                made.append(Picture(file, title, words, partial(layers.flops_per_layer, family, group), group))
        if any(layers.weighted(group) for group in family.transformed):
            words, draw = layers.sparsity_described(family), partial(layers.sparsity_per_layer, family)
            made.append(Picture(f"{name}-sparsity", "Sparsity per layer", words, draw))
        yield family, made


def _results(name: str, family: Family, report: Report) -> Iterator[Picture]:
    if family.drawable:
        for budget in (FLOPS, SECONDS):
            if budget is FLOPS or budget.name in report.at:
                words, draw = tradeoff.described(family, budget), partial(tradeoff.against_budget, family, budget)
                yield Picture(f"{name}-{budget.name}", f"Against {budget.title}", words, draw)
        words, draw = curves.learning_described(family), partial(curves.learning_curves, family)
        yield Picture(f"{name}-curves", "Learning curves", words, draw)


def _masks(name: str, family: Family, report: Report) -> Iterator[Picture]:
    if curves.moving(family):
        words, draw = curves.movement_described(family), partial(curves.mask_movement, family)
        yield Picture(f"{name}-masks", "Mask churn and ITOP rate", words, draw)
    if curves.with_spectra(report, family):
        words, draw = curves.spectra_described(report, family), partial(curves.mask_spectra, report, family)
        yield Picture(f"{name}-spectra", "How well the masks connect", words, draw)


def save_all(report: Report, directory: Path) -> list[Path]:
    """Write every picture as NAME.svg and NAME.png into `directory`, which is created if needed; the paths, in order.

    The SVG files are the same bytes every time.

    Raises:
        UsageError: the directory or a file in it cannot be written.
    """
    written = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for _, made in pictures(report):
            for picture in made:
                svg, png = (directory / f"{picture.name}.{ending}" for ending in ("svg", "png"))
                figure = picture.draw()
                svg.write_text(to_svg(figure, picture.title), encoding="utf-8")
                png.write_bytes(to_png(figure))
                written += [svg, png]
    except OSError as error:
        raise UsageError(
            f"cannot write pictures to {directory}: {error.strerror}", hint="give a folder that can be written"
        ) from None
    return written


def _unused(used: dict[str, int], name: str) -> str:
    """`name`, with a number where it is used already."""
    used[name] = used.get(name, 0) + 1
    return name if used[name] == 1 else _unused(used, f"{name}-{used[name]}")
