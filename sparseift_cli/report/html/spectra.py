"""The page's section on masks: a row a group and checkpoint, and every layer of the newest one on demand."""

from __future__ import annotations

from typing import Any

from ..report import Report
from ..spectral.spectra import by_layer, summed
from .element import Child, Safe, folded, join, numbers, plain, table


def spectra(report: Report) -> Safe | None:
    """None where spectra were not asked for, or no run keeps masks."""
    if not report.spectra:
        return None
    columns = [
        *plain("group"),
        *numbers("step", "runs", "layers", "spectral gap", "Ramanujan gap", "layers at 0 or above", "weighted gap"),
    ]
    rows: list[list[Child]] = [
        [
            row["group"],
            f"{row['step']:,}",
            str(row["runs"]),
            str(row["layers"]),
            _number(row["spectral_gap"]),
            _number(row["ramanujan_gap"]),
            None if row["ramanujan"] is None else f"{100 * row['ramanujan']:.0f} %",
            _number(row["weighted_spectral_gap"]),
        ]
        for row in summed(report)
    ]
    said = "Means over masked layers and runs at every kept checkpoint; a Ramanujan gap of at least 0 is well connected"
    groups = dict.fromkeys(one.group for one in report.spectra)
    return join([table(said, columns, rows), *(_layers(report, group) for group in groups)])


def _layers(report: Report, group: str) -> Safe:
    found = by_layer(report, group)
    newest = max(step for step, _ in found)
    columns = [*plain("layer"), *numbers("non-zeros", "density", "s1", "s2", "spectral gap", "Ramanujan gap", "parts")]
    rows: list[list[Child]] = [
        [
            layer,
            _count(v["nnz"]),
            _number(v["density"]),
            _number(v["s1"]),
            _number(v["s2"]),
            _number(v["spectral_gap"]),
            _number(v["ramanujan_gap"]),
            _count(v["components"]),
        ]
        for (step, layer), v in found.items()
        if step == newest
    ]
    said = f"{group}: every masked layer at step {newest:,}, means over the runs"
    return folded(f"{group}: {len(rows)} masked layers", table(said, columns, rows))


def _number(value: Any) -> str | None:
    return None if value is None else f"{value:#.4g}".rstrip(".").replace("-", "−")


def _count(value: Any) -> str | None:
    return None if value is None else f"{value:,.0f}"
