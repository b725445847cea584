"""Gates of `sparseift report` for CI: which groups fail a limit, and which could not be checked."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..base.sheets import digits_that_differ, one_line
from ..errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from ..report.filters import Expression
    from ..report.report import Report

COMPARED = ("difference", "difference_low", "difference_high", "baseline", "outcome", "flops_vs_baseline")
"""Names of a comparison, in addition to the columns of the groups."""


def parse(texts: Sequence[str]) -> list[Expression]:
    """Read every --fail-if before any run is read."""
    from ..report.filters import parse as expression

    return [expression(text, "--fail-if") for text in texts]


def known(report: Report) -> list[str]:
    """The names that --fail-if can use."""
    from ..report.frame import visible

    return [*visible([str(c) for c in report.groups.columns]), *COMPARED]


def check(report: Report, gates: Sequence[Expression], max_flops_ratio: float | None) -> None:
    """Fail with every gate that does not pass, and every comparison that was refused.

    A gate also fails if it applies to no group at all, and for a group without a finished run: nothing has passed it there. It
    does not apply to finished groups without its columns (another metric, the baseline itself), and a line says so.

    Raises:
        CheckFailed: there is such a gate or comparison.
    """
    rows = _rows(report)
    for gate in gates:
        if 0 < len(left := [row["group"] for row in rows if not gate.knows(row)]) < len(rows):
            print(one_line(f"--fail-if '{gate.text}' does not apply to {', '.join(left)}"), file=sys.stderr)
    problems = [p for gate in gates for p in _failures(gate, rows)]
    if max_flops_ratio is not None:
        problems += _over_ratio(report, rows, max_flops_ratio)
    if problems:
        raise CheckFailed("\n  ".join(["a check failed:", *problems]))
    if refused := [c for c in report.comparisons if not c.allowed]:
        refusals = [f"{c.candidate} against {c.baseline}: {c.verdict.removeprefix('refused: ')}" for c in refused]
        raise CheckFailed(
            "\n  ".join(["refused to compare unequal budgets:", *refusals]),
            hint="--allow-unequal-flops compares them anyway; --flops-tolerance 2% allows larger differences",
        )


def _failures(gate: Expression, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    applicable = [row for row in rows if gate.knows(row)]
    if not applicable:
        return [f"{gate.text}: no group has {' and '.join(gate.names)}, so nothing was checked"]
    found = [
        f"{gate.text}: {row['group']}: no run has finished, so nothing was checked"
        for row in rows
        if not row["n"] and not gate.knows(row)
    ]
    for row in applicable:
        if any(isinstance(row[name], float) and row[name] != row[name] for name in gate.names):
            found.append(f"{gate.text}: {row['group']}: {_values(gate, row)}, which is not a number")
        elif gate.on(row):
            found.append(f"{gate.text}: {row['group']}: {_failing_values(gate, row)}")
    return found


def _over_ratio(report: Report, rows: Sequence[Mapping[str, Any]], limit: float) -> list[str]:
    if not limit > 0:
        raise UsageError(f"--max-flops-ratio must be above 0, not {limit}", hint="--max-flops-ratio 1.001")
    name = "flops_vs_baseline" if report.comparisons else "flops_ratio"
    what = "the baseline's" if report.comparisons else "the dense model's"
    applicable = [row for row in rows if row[name] is not None]
    if not applicable:
        return [f"no group has its training FLOPs over {what}, so --max-flops-ratio checked nothing"]
    return [
        f"{row['group']} trains with {digits_that_differ(row[name], limit)}x {what} FLOPs, above {limit}"
        for row in applicable
        if row[name] > limit
    ]


def _rows(report: Report) -> list[dict[str, Any]]:
    """Groups, each with the values of its comparison."""
    from ..report.frame import records

    compared = {c.candidate: c for c in report.comparisons}
    found = []
    for row in records(report.groups):
        c = compared.get(row["group"])
        values = {f.name: getattr(c, f.name) for f in fields(c)} if c is not None else {}
        named = {"difference_low": "low", "difference_high": "high", "flops_vs_baseline": "flops_ratio"}
        found.append({**row, **{name: values.get(named.get(name, name)) for name in COMPARED}})
    return found


def _failing_values(gate: Expression, row: Mapping[str, Any]) -> str:
    """The values for which the gate fails, with as many digits as show why."""
    for digits in range(6, 17):
        rounded = {
            name: float(v) if isinstance(row[name], float) else row[name]
            for name in gate.names
            for v in [_shown(row[name], digits)]
        }
        if gate.on({**row, **rounded}):
            return _values(gate, row, digits)
    return _values(gate, row, 17)


def _values(gate: Expression, row: Mapping[str, Any], digits: int = 6) -> str:
    return ", ".join(f"{name} = {_shown(row[name], digits)}" for name in gate.names)


def _shown(value: Any, digits: int) -> str:
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)
