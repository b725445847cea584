"""The sheet of `sparseift report --spectral`: how well the masks connect, a row a group and kept checkpoint."""

from __future__ import annotations

from typing import Any

from ..report.report import Report
from .output import Column, Sheet, integer


def sheet(report: Report) -> Sheet:
    """Means over masked layers and runs; `sparseift inspect RUN --spectral` has every layer."""
    from ..report.spectral.spectra import summed

    def number(key: str, header: str, priority: int = 0) -> Column:
        return Column(key, header, lambda v: f"{v:,.4f}", right=True, priority=priority)

    columns = [
        Column("group", "group"),
        Column("step", "step", integer, right=True),
        Column("runs", "runs", integer, right=True, priority=4),
        Column("layers", "layers", integer, right=True, priority=3),
        number("spectral_gap", "spectral gap"),
        number("ramanujan_gap", "Ramanujan gap"),
        number("weighted_spectral_gap", "weighted gap", 2),
        Column("ramanujan", "at 0 or above", lambda v: f"{100 * v:.0f} %", right=True, priority=1),
    ]
    notes = [
        "Means over masked layers and runs. A layer whose Ramanujan gap is at least 0 is well connected; at 0 or above: "
        "the share of them. sparseift inspect RUN --spectral shows every layer."
    ]
    return Sheet("How well the masks connect, at every kept checkpoint", columns, summed(report), notes)


def payload(report: Report) -> dict[str, Any]:
    """Its rows for JSON, and every layer of every run. Empty where spectra were not asked for."""
    if not report.spectra:
        return {"spectra": [], "spectra_layers": []}
    from ..report.spectral.spectra import summed

    layers = [
        {"path": str(one.path), "group": one.group, **row.to_json()} for one in report.spectra for row in one.rows
    ]
    return {"spectra": summed(report), "spectra_layers": layers}
