"""Learning curves as plain numbers: of a run, and the mean over the runs of a group."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from .frame import records
from .read import Run, number
from .report import Report


def mean_curve(runs: Sequence[Run], metric: str) -> list[float]:
    """The mean over the runs at every step at which one of them was evaluated, in the order of steps; no NaN in it."""
    found: dict[int, list[float]] = {}
    for run in runs:
        for line in run.metrics:
            value = number(line.get(metric))
            if value is not None and abs(value) < float("inf"):
                found.setdefault(line["step"], []).append(value)
    return [statistics.fmean(found[step]) for step in sorted(found)]


def by_run(report: Report) -> Mapping[str, list[float]]:
    """Each run's curve of its own metric, by its path."""
    rows = records(report.frame)
    return {row["path"]: mean_curve([run], row["metric"]) for run, row in zip(report.runs, rows, strict=True)}


def by_group(report: Report) -> Mapping[str, list[float]]:
    """Each group's curve, by its label: of the runs in its means, of all of them where there are none."""
    rows = records(report.frame)
    found: dict[str, list[float]] = {}
    for label in dict.fromkeys(row["group"] for row in rows):
        of = [(run, row) for run, row in zip(report.runs, rows, strict=True) if row["group"] == label]
        counted = [pair for pair in of if pair[1]["counted"]] or of
        found[label] = mean_curve([run for run, _ in counted], counted[0][1]["metric"])
    return found
