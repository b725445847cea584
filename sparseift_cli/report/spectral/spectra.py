"""The spectra of a report's masks: over the checkpoints that its runs have kept, layer by layer, and summed up by group.

It takes seconds a layer of a large model, so a report has them only where they are asked for.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..read import Run
from .history import RunSpectra, history

if TYPE_CHECKING:
    from ..report import Report

GAPS = ("spectral_gap", "ramanujan_gap", "weighted_spectral_gap")


def spectra(
    runs: Sequence[Run], frame_rows: Sequence[Mapping[str, Any]], tell: Callable[[str], None] | None = None
) -> tuple[list[RunSpectra], list[str]]:
    """Of the runs in a group's means, of all its runs where there are none; and what could not be read, in words.

    `frame_rows` are the rows of `frame.runs_frame`, one for each of `runs`; `tell` hears which layer is at work.
    """
    counted = {row["group"] for row in frame_rows if row["counted"]}
    found: list[RunSpectra] = []
    notes: list[str] = []
    for run, row in zip(runs, frame_rows, strict=True):
        if run.recipe.get("transform") and (row["counted"] or row["group"] not in counted):
            found.append(RunSpectra(run.path, row["group"], history(run.path, skipped=notes, tell=tell)))
    found = [one for one in found if one.rows]
    if not found:
        notes.append("--spectral: no run here keeps a checkpoint with masks, so there are no spectra")
    return found, notes


def by_layer(report: Report, group: str) -> Mapping[tuple[int, str], Mapping[str, Any]]:
    """(step, layer) -> the mean of every number of `Spectrum` over the group's runs; None where no run has it."""
    rows: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for one in report.spectra:
        for row in one.rows if one.group == group else ():
            rows.setdefault((row.step or 0, row.layer), []).append(row.spectrum.to_json())
    return {key: {name: _mean([row[name] for row in same]) for name in same[0]} for key, same in rows.items()}


def summed(report: Report) -> list[dict[str, Any]]:
    """A row a group and step: group, step, runs, layers, the mean of each of GAPS over layers and runs, and `ramanujan`.

    `ramanujan` is the share of the layers (0 to 1) whose Ramanujan gap is at least 0.
    """
    found: list[dict[str, Any]] = []
    for group in dict.fromkeys(one.group for one in report.spectra):
        every = [(row.step or 0, one.path, row) for one in report.spectra if one.group == group for row in one.rows]
        for step in sorted({step for step, _, _ in every}):
            rows = [row.spectrum.to_json() for at, _, row in every if at == step]
            gaps = [row["ramanujan_gap"] for row in rows if row["ramanujan_gap"] is not None]
            found.append(
                {
                    "group": group,
                    "step": step,
                    "runs": len({path for at, path, _ in every if at == step}),
                    "layers": len({row.layer for at, _, row in every if at == step}),
                    **{name: _mean([row[name] for row in rows]) for name in GAPS},
                    "ramanujan": sum(gap >= 0 for gap in gaps) / len(gaps) if gaps else None,
                }
            )
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return statistics.fmean(there) if there else None
