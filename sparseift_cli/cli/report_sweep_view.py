"""What `sparseift report` shows of a sweep: a metric over two axes, and in JSON the axes of each group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..base.sheets import Column, Sheet
from ..report.report import Report
from ..report.sweep import SweepTable, axes_of_groups, sweep_tables, varying_axes


def sweep_sheets(report: Report) -> list[Sheet]:
    """A sheet a table: the values of one axis below each other, those of another one side by side."""
    return [_sheet(table) for table in sweep_tables(report)]


def _sheet(table: SweepTable) -> Sheet:
    keys = {f"{i}": column for i, column in enumerate(table.columns)}
    rows = [
        {"row": _word(row), **{key: _cell(table.groups.get((row, column))) for key, column in keys.items()}}
        for row in table.rows
    ]
    columns = [
        Column("row", table.row_axis.replace("_", " ")),
        *(Column(key, f"{table.column_axis}={_word(column)}", right=True) for key, column in keys.items()),
    ]
    label = next(iter(table.groups.values()))["metric_facts"].label
    at = "".join(f", {name} {_word(value)}" for name, value in table.others.items())
    title = f"{table.recipe}: {label} by {table.row_axis} and {table.column_axis}{at}"
    notes = [f"{group['group']}: {_cell(group)}" for group in table.off_axes]
    return Sheet(title, columns, rows, [*notes, "Mean +- sample deviation (n seeds), at the end of training."])


def _cell(group: Mapping[str, Any] | None) -> str | None:
    if group is None:
        return None
    spread = f" +- {group['std']:.3g}" if group["std"] is not None else ""
    return f"{group['mean']:#.5g}{spread} ({group['n']})"


def sweep_json(report: Report) -> dict[str, Any]:
    """Of each sweep the axes that vary with their values, and the values of each group; nothing where no run belongs to one."""
    sweeps = [
        {
            "recipe": recipe,
            "axes": varying_axes(groups),
            "groups": [{"group": label, "axes": axes} for label, axes in groups.items()],
        }
        for recipe, groups in axes_of_groups(report).items()
    ]
    return {"sweeps": sweeps} if sweeps else {}


def _word(value: Any) -> str:
    """A value in a heading; a dense baseline has none."""
    return "dense" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
