"""Gates of `sparseift report` for CI: what broke a limit, and what could not be held against it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..errors import CheckFailed, UsageError
from .output import digits_that_differ, one_line

if TYPE_CHECKING:
    from ..report.filters import Expression
    from ..report.report import Report

COMPARED = ("difference", "difference_low", "difference_high", "baseline", "outcome", "flops_vs_baseline")
"""Of a comparison, beside the columns of the groups."""


def parse(texts: Sequence[str]) -> list[Expression]:
    """Read every --fail-if before any run is read."""
    from ..report.filters import parse as expression

    return [expression(text, "--fail-if") for text in texts]


def known(report: Report) -> list[str]:
    """The names that --fail-if may use."""
    from ..report.make import visible

    return [*visible([str(c) for c in report.groups.columns]), *COMPARED]


def stop_on(report: Report, gates: Sequence[Expression], max_flops_ratio: float | None) -> None:
    """Exit 1 with every gate that said no, and every comparison that was refused.

    A gate that could be held against no group at all says no too, and so it does to a group of which no run has finished:
    nothing has passed it. Of finished groups without its columns (another metric, the baseline itself) it says nothing.

    Raises:
        CheckFailed: there is one.
    """
    rows = _rows(report)
    for gate in gates:
        if 0 < len(left := [row["group"] for row in rows if not gate.knows(row)]) < len(rows):
            print(one_line(f"--fail-if '{gate.text}' says nothing of {', '.join(left)}"), file=sys.stderr)
    problems = [p for gate in gates for p in _broken(gate, rows)]
    if max_flops_ratio is not None:
        problems += _too_dear(report, rows, max_flops_ratio)
    if problems:
        raise CheckFailed("\n  ".join(["a check said no:", *problems]))
    if refused := [c for c in report.comparisons if not c.allowed]:
        told = [f"{c.candidate} against {c.baseline}: {c.verdict.removeprefix('refused: ')}" for c in refused]
        raise CheckFailed(
            "\n  ".join(["refused to compare unequal budgets:", *told]),
            hint="--allow-unequal-flops compares all the same; --flops-tolerance 2% allows more",
        )


def _broken(gate: Expression, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    able = [row for row in rows if gate.knows(row)]
    if not able:
        return [f"{gate.text}: no group has {' and '.join(gate.names)}, so nothing was checked"]
    found = [
        f"{gate.text}: {row['group']}: no run has finished, so nothing was checked"
        for row in rows
        if not row["n"] and not gate.knows(row)
    ]
    for row in able:
        if any(isinstance(row[name], float) and row[name] != row[name] for name in gate.names):
            found.append(f"{gate.text}: {row['group']}: {_told(gate, row)}, which is no number")
        elif gate.on(row):
            found.append(f"{gate.text}: {row['group']}: {_broke(gate, row)}")
    return found


def _too_dear(report: Report, rows: Sequence[Mapping[str, Any]], limit: float) -> list[str]:
    if not limit > 0:
        raise UsageError(f"--max-flops-ratio {limit} is no ratio", hint="--max-flops-ratio 1.001")
    name = "flops_vs_baseline" if report.comparisons else "flops_ratio"
    what = "the baseline's" if report.comparisons else "the dense model's"
    able = [row for row in rows if row[name] is not None]
    if not able:
        return [f"no group says its training FLOPs over {what}, so --max-flops-ratio checked nothing"]
    return [
        f"{row['group']} trains with {digits_that_differ(row[name], limit)}x {what} FLOPs, above {limit}"
        for row in able
        if row[name] > limit
    ]


def _rows(report: Report) -> list[dict[str, Any]]:
    """Groups, each with its comparison."""
    from ..report.frame import records

    compared = {c.candidate: c for c in report.comparisons}
    found = []
    for row in records(report.groups):
        c = compared.get(row["group"])
        values = {f.name: getattr(c, f.name) for f in fields(c)} if c is not None else {}
        named = {"difference_low": "low", "difference_high": "high", "flops_vs_baseline": "flops_ratio"}
        found.append({**row, **{name: values.get(named.get(name, name)) for name in COMPARED}})
    return found


def _broke(gate: Expression, row: Mapping[str, Any]) -> str:
    """The values that the gate objects to, in as many digits as it takes to see why."""
    for digits in range(6, 17):
        rounded = {
            name: float(v) if isinstance(row[name], float) else row[name]
            for name in gate.names
            for v in [_shown(row[name], digits)]
        }
        if gate.on({**row, **rounded}):
            return _told(gate, row, digits)
    return _told(gate, row, 17)


def _told(gate: Expression, row: Mapping[str, Any], digits: int = 6) -> str:
    return ", ".join(f"{name} = {_shown(row[name], digits)}" for name in gate.names)


def _shown(value: Any, digits: int) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)
