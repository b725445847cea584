"""The report itself: collect, filter, group, compare, put the published numbers beside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..base.metrics import metric_names
from ..errors import ArtifactError, UsageError, did_you_mean
from . import frame as frames
from . import published
from .collect import collect
from .compare import Rules, compare
from .filters import Expression
from .grouping import edited, namesakes, pooled
from .report import Comparison, Report

if TYPE_CHECKING:
    from .spectral.history import RunSpectra

HIDDEN = "subject"  # of our own bookkeeping: neither shown nor asked for


@dataclass(frozen=True, slots=True)
class Options:
    """What a report is asked for. `by` of ("group",) is recipe, transform, sparsity, algorithm, and every other setting."""

    baseline: str | None = None
    rules: Rules = field(default_factory=Rules)
    reference: str | None = None
    by: Sequence[str] = ("group",)
    filter: Expression | None = None
    sort: Sequence[str] = ()
    """Columns of groups; a minus in front sorts from the highest."""
    spectral: bool = False
    """Look at the masks of every kept checkpoint: slow for large models."""
    metric: str | None = None
    """What all runs are judged by; None: what each recipe calls best."""


def _known_metric(name: str | None) -> str | None:
    if name is not None and name not in metric_names():
        raise UsageError(
            f"--metric {name}: no metric is called that",
            hint=did_you_mean(name, metric_names()) or f"metrics: {', '.join(metric_names())}",
        )
    return name


def make(
    paths: Sequence[Path], options: Options, command: Sequence[str], tell: Callable[[str], None] | None = None
) -> Report:
    """The report of every run below `paths`. `tell` hears what is at work where that takes long.

    Raises:
        UsageError: a path is not there, no run is left, or a column or baseline has a name that nothing has.
        ArtifactError: every run is damaged.
    """
    found = collect(paths)
    if not found.runs:
        kind = ArtifactError if found.damaged else UsageError
        raise kind(
            f"no run could be read in {', '.join(map(str, paths))}{_reasons(found.skipped)}",
            hint="give run directories, or folders that hold some: runs/",
        )
    runs = list(found.runs)
    frame = frames.runs_frame(runs, _known_metric(options.metric))
    wanted = options.filter
    late = None
    if wanted is not None:
        known = visible([*frames.RUN_COLUMNS, *frames.GROUP_COLUMNS])
        wanted.require(known, "--filter")
        if all(name in frames.RUN_COLUMNS for name in wanted.names):
            keep = [wanted.on(row) for row in frames.records(frame)]
            frame = frames.keep(frame, keep)
            runs = [run for run, kept in zip(runs, keep, strict=True) if kept]
        else:
            late = wanted
    if not runs:
        raise UsageError(
            f"--filter '{wanted.text if wanted else ''}' leaves no run of {len(found.runs)}",
            hint=wanted.hint if wanted else None,
        )
    if "group" not in options.by:
        frame = frames.regroup(frame, options.by)
    groups = frames.groups_frame(frame, options.rules.confidence)
    comparisons: list[Comparison] = []
    notes: list[str] = []
    if options.baseline is not None:
        comparisons, notes = compare(frame, groups, options.baseline, options.rules)
    rows = frames.records(groups)
    beside = published.beside(rows, options.reference) if options.reference else []
    if late is not None:
        late.require(visible(frames.GROUP_COLUMNS), "--filter")  # a group has no seed or state
        groups = frames.keep(groups, [late.on(row) for row in rows])
        if groups.empty:
            raise UsageError(f"--filter '{late.text}' leaves no group of {len(rows)}", hint="see them without --filter")
        comparisons = [c for c in comparisons if c.candidate in set(groups["group"])]
    if options.sort and "path" not in options.by:  # whoever shows runs sorts runs
        groups = sort(groups, options.sort)
        place = {label: i for i, label in enumerate(groups["group"])}
        comparisons.sort(key=lambda c: place.get(c.candidate, len(place)))
    told = namesakes if "group" in options.by else pooled
    labels = list(frame["group"])
    notes = [*told(runs, labels), *edited(runs, labels), *(_not_counted(frame) if told is namesakes else ()), *notes]
    spectra: list[RunSpectra] = []
    if options.spectral:
        from .spectral.spectra import spectra as of_masks

        spectra, said = of_masks(runs, frames.records(frame), tell)
        notes = [*notes, *said]
    return Report(runs, found.skipped, groups, comparisons, command, frame, beside, notes, spectra)


def sort(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """A table by columns, each ascending, or descending with a minus in front; what has no value comes last.

    Raises:
        UsageError: there is no such column.
    """
    for column in reversed(columns):  # a stable sort by the last key first
        name = column.removeprefix("-")
        frames.require_column(name, list(table.columns), "--sort")
        values: list[Any] = list(table[name])
        there = [i for i, v in enumerate(values) if v is not None]
        text = any(isinstance(values[i], str) for i in there)
        there.sort(key=lambda i: str(values[i]) if text else values[i], reverse=column.startswith("-"))
        table = table.iloc[[*there, *(i for i, v in enumerate(values) if v is None)]]
    return table


def visible(columns: Sequence[str]) -> list[str]:
    """Columns that may be asked for, each once."""
    return [c for c in dict.fromkeys(columns) if c != HIDDEN]


def _not_counted(frame: pd.DataFrame) -> list[str]:
    """A sentence for seeds that were run more than once in one group."""
    said = []
    rows = [row for row in frames.records(frame) if row["state"] == "finished" and not row["counted"]]
    for label in dict.fromkeys(row["group"] for row in rows):
        again = [row for row in rows if row["group"] == label]
        if twice := [row["seed"] for row in again if row["value"] is not None]:
            seeds = ", ".join(map(str, dict.fromkeys(twice)))
            earlier = "1 earlier one does" if len(twice) == 1 else f"{len(twice)} earlier ones do"
            said.append(f"{label}: the newest run of seed {seeds} counts, {earlier} not")
        if lacking := [row for row in again if row["value"] is None]:
            said.append(f"{label}: finished without {lacking[0]['metric']}, so not counted: {len(lacking)}")
    return said


def _reasons(skipped: Sequence[tuple[Path, str]]) -> str:
    return "".join(f"\n  {path}: {reason}" for path, reason in skipped[:20])
