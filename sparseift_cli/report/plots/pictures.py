"""All pictures of a report in the order in which they are shown, and as files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from ...errors import UsageError
from ..report import Report
from . import curves, layers, spectra, tradeoff
from .families import Family, Group, families, slug
from .style import to_png, to_svg


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure with its words."""

    name: str
    """The file's name without its ending; unique in a report."""
    title: str
    described: str
    """The same in words, with the main numbers: for who cannot see it."""
    figure: Figure
    group: Group | None = None
    """The one group that it is about, if it is not about the whole family."""


def pictures(report: Report) -> Iterator[tuple[Family, list[Picture]]]:
    """Each family of the report with its pictures; what there is no data for is left out.

    In order: the metric against training FLOPs, learning curves, mask churn and ITOP rate, spectra of the masks
    (where the report has them), FLOPs per layer (one for each
    transformed group), sparsity per layer.
    """
    taken: dict[str, int] = {}
    for family in families(report):
        name = _free(taken, family.slug)
        made = []
        if family.drawable:
            made.append(
                Picture(
                    f"{name}-flops",
                    "Against training FLOPs",
                    tradeoff.described(family),
                    tradeoff.accuracy_against_flops(family),
                )
            )
            made.append(
                Picture(
                    f"{name}-curves",
                    "Learning curves",
                    curves.learning_described(family),
                    curves.learning_curves(family),
                )
            )
        if curves.moving(family):
            made.append(
                Picture(
                    f"{name}-masks",
                    "Mask churn and ITOP rate",
                    curves.movement_described(family),
                    curves.mask_movement(family),
                )
            )
        if spectra.measured(report, family):
            made.append(
                Picture(
                    f"{name}-spectra",
                    "How well the masks connect",
                    spectra.described(report, family),
                    spectra.mask_spectra(report, family),
                )
            )
        for group in family.transformed:
            if layers.counted(group):
                file, title = (
                    _free(taken, f"{name}-layers-{slug(group.name)}"),
                    f"FLOPs per layer: {family.plan_name(group)}",
                )
                made.append(
                    Picture(
                        file, title, layers.flops_described(family, group), layers.flops_per_layer(family, group), group
                    )
                )
        if any(layers.weighted(group) for group in family.transformed):
            made.append(
                Picture(
                    f"{name}-sparsity",
                    "Sparsity per layer",
                    layers.sparsity_described(family),
                    layers.sparsity_per_layer(family),
                )
            )
        yield family, made


def save_all(report: Report, directory: Path) -> list[Path]:
    """Write every picture as NAME.svg and NAME.png into `directory`, which is made if need be; the paths, in order.

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
                svg.write_text(to_svg(picture.figure, picture.title), encoding="utf-8")
                png.write_bytes(to_png(picture.figure))
                written += [svg, png]
    except OSError as error:
        raise UsageError(
            f"cannot write pictures to {directory}: {error.strerror}", hint="give a folder that can be written"
        ) from None
    return written


def _free(taken: dict[str, int], name: str) -> str:
    """`name`, numbered where it is taken."""
    taken[name] = taken.get(name, 0) + 1
    return name if taken[name] == 1 else _free(taken, f"{name}-{taken[name]}")
