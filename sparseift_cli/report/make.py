"""Make a report: collect runs, filter, group, compare them, and add the published numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..errors import ArtifactError, UsageError, did_you_mean
from . import frame as frames
from .collect import collect
from .compare import ComparisonRules, compare
from .filters import Expression
from .grouping import changed_data, contradicting, duplicate_names, edited, pooled
from .published import published_rows
from .read import Run
from .report import Report

if TYPE_CHECKING:
    from .spectral.history import RunSpectra


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """What a report should contain."""

    baseline: str | None = None
    rules: ComparisonRules = field(default_factory=ComparisonRules)
    reference: str | None = None
    by: Sequence[str] = ("group",)
    """Columns that make a group; ("group",): by recipe, transform, sparsity, algorithm, and every other setting."""
    filter: Expression | None = None
    sort: Sequence[str] = ()
    """Columns of groups; a minus in front sorts from the highest."""
    spectral: bool = False
    """Compute the spectra of the masks in every kept checkpoint: slow for large models."""
    metric: str | None = None
    """The metric by which all runs are judged; None: the metric of each recipe."""
    peak_tflops: float | None = None
    """What one device can do, for MFU; None: what its data sheet says, where that is known."""


def make(
    paths: Sequence[Path], options: ReportOptions, command: Sequence[str], progress: Callable[[str], None] | None = None
) -> Report:
    """The report of every run below `paths`.

    Args:
        paths: run directories, files of kept runs, or folders that hold some at any depth.
        options: what the report should contain.
        command: the command line, which the report shows.
        progress: called with the name of what is computed, where that takes long.

    Raises:
        UsageError: a path is not there, no run is left, or there is no such column, metric or baseline.
        ArtifactError: every run is damaged.
    """
    found = collect(paths)
    if not found.runs:
        kind = ArtifactError if found.damaged else UsageError
        reasons = "".join(f"\n  {path}: {reason}" for path, reason in found.skipped[:20])
        raise kind(
            f"no run could be read in {', '.join(map(str, paths))}{reasons}",
            hint="give run directories, or folders that hold some: runs/",
        )
    frame = frames.runs_frame(found.runs, _known_metric(options.metric, found.runs), options.peak_tflops)
    runs, frame, by_group = _filter_runs(found.runs, frame, options.filter)
    if "group" not in options.by:
        frame = frames.regroup(frame, options.by)
    groups = frames.groups_frame(frame, options.rules.confidence)
    comparisons, notes = (
        compare(frame, groups, options.baseline, options.rules, runs) if options.baseline is not None else ([], [])
    )
    rows = frames.records(groups)
    reference = published_rows(rows, options.reference) if options.reference else []
    if by_group is not None:
        groups = _filter_groups(groups, by_group)
        comparisons = [c for c in comparisons if c.candidate in set(groups["group"])]
    if options.sort and "path" not in options.by:  # where runs are shown, `sort` is of runs
        groups = sort(groups, options.sort)
        place = {label: i for i, label in enumerate(groups["group"])}
        comparisons.sort(key=lambda c: place.get(c.candidate, len(place)))
    notes = [*_group_notes(runs, frame, options), *notes]
    spectra: list[RunSpectra] = []
    if options.spectral:
        from .spectral.history import spectra_of_runs

        spectra, unread = spectra_of_runs(runs, frames.records(frame), progress)
        notes += unread
    return Report(runs, found.skipped, groups, comparisons, command, frame, reference, notes, spectra, options.rules.at)


def sort(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """A table by columns, each ascending, or descending with a minus in front; rows without a value come last.

    Raises:
        UsageError: there is no such column.
    """
    for column in reversed(columns):  # a stable sort by the last key first
        name = column.removeprefix("-")
        frames.require_column(name, list(table.columns), "--sort")
        values: list[Any] = list(table[name])
        known = [i for i, v in enumerate(values) if v is not None]
        text = any(isinstance(values[i], str) for i in known)
        known.sort(key=lambda i: str(values[i]) if text else values[i], reverse=column.startswith("-"))
        table = table.iloc[[*known, *(i for i, v in enumerate(values) if v is None)]]
    return table


def _known_metric(name: str | None, runs: Sequence[Run]) -> str | None:
    """The key of `--metric`: a registered metric, or one that a run recorded, by its key or its name in the recipe."""
    known = frames.metric_columns(runs)
    if name is None or name in known:
        return name
    for run in runs:
        if run.metric_key(name) in known:
            return run.metric_key(name)
    raise UsageError(
        f"--metric {name}: there is no such metric",
        hint=did_you_mean(name, known) or f"metrics: {', '.join(known)}",
    )


def _filter_runs(
    runs: Sequence[Run], frame: pd.DataFrame, wanted: Expression | None
) -> tuple[list[Run], pd.DataFrame, Expression | None]:
    """The runs that fit, their rows, and the expression if it is about groups, which are filtered later."""
    if wanted is None:
        return list(runs), frame, None
    of_runs, of_groups = list(frame.columns), frames.group_columns(frame)
    wanted.require(frames.visible([*of_runs, *of_groups]), "--filter")
    if any(name not in of_runs for name in wanted.names):
        return list(runs), frame, wanted
    keep = [wanted.on(row) for row in frames.records(frame)]
    if not any(keep):
        raise UsageError(f"--filter '{wanted.text}' leaves no run of {len(runs)}", hint=wanted.hint)
    return [run for run, kept in zip(runs, keep, strict=True) if kept], frames.keep(frame, keep), None


def _filter_groups(groups: pd.DataFrame, wanted: Expression) -> pd.DataFrame:
    wanted.require(frames.visible(list(groups.columns)), "--filter")  # a group has no seed or state
    kept = frames.keep(groups, [wanted.on(row) for row in frames.records(groups)])
    if kept.empty:
        raise UsageError(f"--filter '{wanted.text}' leaves no group of {len(groups)}", hint="see them without --filter")
    return kept


def _group_notes(runs: Sequence[Run], frame: pd.DataFrame, options: ReportOptions) -> list[str]:
    """What a reader should know of how the runs were grouped."""
    labels = list(frame["group"])
    different = [*contradicting(frames.records(frame)), *changed_data(runs)]
    if "group" in options.by:
        return [*duplicate_names(runs, labels), *edited(runs, labels), *_not_counted(frame), *different]
    return [*pooled(runs, labels), *edited(runs, labels), *different]


def _not_counted(frame: pd.DataFrame) -> list[str]:
    """A sentence for seeds that were run more than once in one group, and for finished runs without the metric."""
    notes = []
    rows = [row for row in frames.records(frame) if row["state"] == "finished" and not row["counted"]]
    for label in dict.fromkeys(row["group"] for row in rows):
        same = [row for row in rows if row["group"] == label]
        if repeated := [row["seed"] for row in same if row["value"] is not None]:
            seeds = ", ".join(map(str, dict.fromkeys(repeated)))
            earlier = "1 earlier one does" if len(repeated) == 1 else f"{len(repeated)} earlier ones do"
            notes.append(f"{label}: the newest run of seed {seeds} counts, {earlier} not")
        if lacking := [row for row in same if row["value"] is None]:
            notes.append(f"{label}: finished without {lacking[0]['metric']}, so not counted: {len(lacking)}")
    return notes
