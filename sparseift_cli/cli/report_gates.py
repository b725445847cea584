"""Gates of `sparseift report` for CI: which groups fail a limit, and which could not be checked."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..base.sheets import digits_that_differ, one_line
from ..errors import CheckFailed, UsageError
from ..report.budgets import BUDGETS, BudgetName

if TYPE_CHECKING:
    from ..report.filters import Expression
    from ..report.report import Comparison, Report

COMPARED = (
    "difference",
    "difference_low",
    "difference_high",
    "baseline",
    "outcome",
    "flops_vs_baseline",
    "seconds_vs_baseline",
    "at",
)
"""Names of a comparison, in addition to the columns of the groups; `at` is flops or seconds."""
_FIELDS = {
    "difference_low": "low",
    "difference_high": "high",
    "flops_vs_baseline": "flops_ratio",
    "seconds_vs_baseline": "seconds_ratio",
}


def parse(texts: Sequence[str]) -> list[Expression]:
    """Read every --fail-if before any run is read."""
    from ..report.filters import parse as expression

    return [expression(text, "--fail-if") for text in texts]


def known(report: Report) -> list[str]:
    """The names that --fail-if can use."""
    from ..report.frame import visible

    return [*visible([str(c) for c in report.groups.columns]), *COMPARED]


def check(report: Report, gates: Sequence[Expression], max_ratios: Mapping[BudgetName, float | None]) -> None:
    """Fail with every gate that does not pass, and every comparison that was refused.

    A gate also fails if it applies to no group at all, and for a group without a finished run: nothing has passed it there. It
    does not apply to finished groups without its columns (another metric, the baseline itself), and a line says so. Where groups
    are compared at two budgets, a gate on a comparison is checked at both of them, and a group is refused that is equal in none.

    Args:
        report: what was compared.
        gates: what must not hold.
        max_ratios: by budget, the largest ratio to the baseline.

    Raises:
        CheckFailed: there is such a gate or comparison.
    """
    rows = _rows(report)
    for gate in gates:
        of_gate = _rows_of(gate, rows)
        left = [_name(row, report) for row in of_gate if not gate.knows(row)]
        if 0 < len(left) < len(of_gate):
            print(one_line(f"--fail-if '{gate.text}' does not apply to {', '.join(left)}"), file=sys.stderr)
    problems = [p for gate in gates for p in _failures(gate, _rows_of(gate, rows), report)]
    for budget, limit in max_ratios.items():
        if limit is not None:
            problems += _over_ratio(report, _one_a_group(rows), budget, limit)
    if problems:
        raise CheckFailed("\n  ".join(["a check failed:", *problems]))
    compared = {c.candidate for c in report.comparisons if c.allowed}
    if refused := [c for c in report.comparisons if c.candidate not in compared]:
        refusals = [f"{c.candidate} against {c.baseline}: {c.verdict.removeprefix('refused: ')}" for c in refused]
        hints = dict.fromkeys(BUDGETS[c.at].hint for c in refused)
        raise CheckFailed("\n  ".join(["refused to compare unequal budgets:", *refusals]), hint="; ".join(hints))


def _rows_of(gate: Expression, rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """What a gate is checked on: comparisons where it uses one of COMPARED, else groups."""
    return rows if set(gate.names) & set(COMPARED) else _one_a_group(rows)


def _one_a_group(rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    return list({row["group"]: row for row in reversed(rows)}.values())[::-1]


def _name(row: Mapping[str, Any], report: Report) -> str:
    """The group, and at which budget where there are two."""
    at = f" at equal {BUDGETS[row['at']].short}" if len(report.at) > 1 and row["at"] else ""
    return f"{row['group']}{at}"


def _failures(gate: Expression, rows: Sequence[Mapping[str, Any]], report: Report) -> list[str]:
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
            found.append(f"{gate.text}: {_name(row, report)}: {_values(gate, row)}, which is not a number")
        elif gate.on(row):
            found.append(f"{gate.text}: {_name(row, report)}: {_failing_values(gate, row)}")
    return found


def _over_ratio(report: Report, rows: Sequence[Mapping[str, Any]], budget: BudgetName, limit: float) -> list[str]:
    option = "--max-flops-ratio" if budget == "flops" else "--max-time-ratio"
    if not limit > 0:
        raise UsageError(f"{option} must be above 0, not {limit}", hint=f"{option} 1.001")
    if budget == "seconds" and not report.comparisons:
        return [f"{option} needs a baseline to compare wall times with, so it checked nothing"]
    if budget == "seconds" and (differ := [c for c in report.comparisons if c.conditions]):
        names = dict.fromkeys(f"{c.candidate}: {'; '.join(c.conditions)}, so {option} cannot check it" for c in differ)
        return list(names)
    name = f"{budget}_vs_baseline" if report.comparisons else "flops_ratio"
    what = "the baseline's" if report.comparisons else "the dense model's"
    measure = "FLOPs" if budget == "flops" else "wall time"
    applicable = [row for row in rows if row[name] is not None]
    if not applicable:
        return [f"no group has its training {measure} over {what}, so {option} checked nothing"]
    return [
        f"{row['group']} trains with {digits_that_differ(row[name], limit)}x {what} {measure}, above {limit}"
        for row in applicable
        if row[name] > limit
    ]


def _rows(report: Report) -> list[dict[str, Any]]:
    """Groups, each with the values of its comparison; a group that is compared at two budgets has two rows."""
    from ..report.frame import records

    compared: dict[str, list[Comparison | None]] = {}
    for c in report.comparisons:
        compared.setdefault(c.candidate, []).append(c)
    found = []
    for row in records(report.groups):
        for c in compared.get(row["group"], [None]):
            values = {name: getattr(c, _FIELDS.get(name, name)) if c is not None else None for name in COMPARED}
            found.append({**row, **values})
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
