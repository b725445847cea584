"""The axes of a sweep in a report: which value each group has on them, and tables of a metric over two of them.

A run's values are in its provenance (`train --sweep` records them), so moved and kept runs have them too.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import frame as frames
from .report import Report

Values = Mapping[str, Any]
"""A value on each axis that a group has one on: a dense baseline has no sparsity."""


@dataclass(frozen=True, slots=True)
class SweepTable:
    """The groups of a sweep at each combination of the values of two axes, at one combination of the others."""

    recipe: str
    row_axis: str
    column_axis: str
    rows: Sequence[Any]
    """The values of the first axis; None where groups have no value on it."""
    columns: Sequence[Any]
    others: Values
    """The values on all further axes that vary."""
    groups: Mapping[tuple[Any, Any], Mapping[str, Any]]
    """The row of Report.groups at each (row, column) that there is."""
    off_axes: Sequence[Mapping[str, Any]]
    """Groups without a value on either axis: dense baselines."""


def axes_of_groups(report: Report) -> dict[str, dict[str, dict[str, Any]]]:
    """The value of each group on each axis, by the sweep's recipe and the group's label; where the group's runs agree."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for run, label in zip(report.runs, report.frame["group"], strict=True):
        if run.sweep is None:
            continue
        recipe, axes = run.sweep
        groups = found.setdefault(recipe, {})
        before = groups.setdefault(label, dict(axes))
        groups[label] = {name: value for name, value in before.items() if name in axes and axes[name] == value}
    return found


def varying_axes(groups: Mapping[str, Values]) -> dict[str, list[Any]]:
    """Every axis on which groups differ, with its values: numbers in their order, anything else as it comes."""
    longest_first = sorted(groups.values(), key=len, reverse=True)
    names = dict.fromkeys(name for axes in longest_first for name in axes)
    every = {name: _ordered([axes[name] for axes in groups.values() if name in axes]) for name in names}
    return {name: found for name, found in every.items() if len(found) > 1}


def sweep_tables(report: Report) -> list[SweepTable]:
    """Of each sweep a table over the first two axes that vary, for each combination of values on the others.

    Only groups that are judged by the metric of the first one are in it.
    """
    found = []
    for recipe, groups in axes_of_groups(report).items():
        rows = [row for row in frames.records(report.groups) if row["group"] in groups and row["mean"] is not None]
        found += _tables(recipe, groups, [row for row in rows if row["metric"] == rows[0]["metric"]])
    return found


def _tables(recipe: str, groups: Mapping[str, Values], rows: Sequence[Mapping[str, Any]]) -> list[SweepTable]:
    axes = varying_axes({row["group"]: groups[row["group"]] for row in rows})
    if len(axes) < 2:
        return []
    first, second, *others = axes
    tables = []
    for chosen in itertools.product(*(axes[name] for name in others)):
        wanted = dict(zip(others, chosen, strict=True))
        here = [row for row in rows if all(groups[row["group"]].get(k, v) == v for k, v in wanted.items())]
        places = [(groups[row["group"]].get(first), groups[row["group"]].get(second)) for row in here]
        at = {place: row for place, row in zip(places, here, strict=True) if place != (None, None)}
        off = [row for place, row in zip(places, here, strict=True) if place == (None, None)]
        if at:
            down, across = (
                [value for value in (None, *axes[name]) if any(place[i] == value for place in at)]
                for i, name in enumerate((first, second))
            )
            tables.append(SweepTable(recipe, first, second, down, across, wanted, at, off))
    return tables


def _ordered(values: Sequence[Any]) -> list[Any]:
    """Each value once: numbers in their order, then anything else in the order given."""
    found = list(dict.fromkeys(values))
    numbers = sorted(v for v in found if isinstance(v, int | float) and not isinstance(v, bool))
    return [*numbers, *(v for v in found if not isinstance(v, int | float) or isinstance(v, bool))]
