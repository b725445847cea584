"""What `sparseift report diff` shows: recipe, environment and metrics side by side, and the verdict of --exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..report.diff import Change, Diff
from ..report.read import Run
from .options import Format
from .output import Column, Sheet, render
from .report_view import clean

SCHEMA = "sparseift.report-diff/1"
_TENSORS_SHOWN = 10


def show(found: Diff, fmt: Format, output: Path | None) -> None:
    """Print it, or write it whole to `output`."""
    parts = [("recipes", _sheet("Recipe", found.recipe)), ("environments", _sheet("Environment", found.environment))]
    same = [f"the {what} are the same" for what, sheet in parts if not sheet.rows]
    metrics = _sheet("Metrics", found.metrics, numbers=True)
    metrics.notes = [f"A: {_about(found.a)}", f"B: {_about(found.b)}", *same]
    sheets = [*(sheet for _, sheet in parts if sheet.rows), metrics, *_exact(found)]
    render(sheets, payload(found), fmt, output)


def payload(found: Diff) -> dict[str, Any]:
    """The JSON of it: schema sparseift.report-diff/1. A key that a run does not have is null."""
    exact: dict[str, Any] | None = None
    if found.exact is not None:
        exact = {"equal": found.exact.equal, **asdict(found.exact)}
        for tensor in exact["differing"]:
            tensor["largest"] = clean(tensor["largest"])
    return {
        "schema": SCHEMA,
        "a": _run(found.a),
        "b": _run(found.b),
        "recipe": [{"key": c.key, "a": c.a, "b": c.b} for c in found.recipe],
        "environment": [{"key": c.key, "a": c.a, "b": c.b} for c in found.environment],
        "metrics": [
            {"key": c.key, "a": clean(c.a), "b": clean(c.b), "difference": clean(c.difference)} for c in found.metrics
        ],
        "exact": exact,
    }


def _run(run: Run) -> dict[str, Any]:
    return {
        "path": str(run.path),
        "recipe": run.name,
        "seed": run.seed,
        "state": run.state,
        "step": run.last.get("step", 0),
    }


def _about(run: Run) -> str:
    return f"{run.path} ({run.name}, seed {run.seed}, {run.state} at step {run.last.get('step', 0):,})"


def _sheet(title: str, changes: Sequence[Change], *, numbers: bool = False) -> Sheet:
    columns = [Column("key", "key"), Column("a", "A", _shown, right=numbers), Column("b", "B", _shown, right=numbers)]
    if numbers:
        columns.append(Column("difference", "B - A", _signed, right=True, priority=1))
    return Sheet(title, columns, [{"key": c.key, "a": c.a, "b": c.b, "difference": c.difference} for c in changes])


def _exact(found: Diff) -> list[Sheet]:
    """What was compared, and the tensors that differ."""
    exact = found.exact
    if exact is None:
        return []
    rows = [
        {"what": "evaluations", "compared": exact.evaluations, "differing": exact.first_difference},
        {
            "what": "tensors",
            "compared": exact.tensors,
            "differing": f"{len(exact.differing)}" if exact.differing else None,
        },
        {
            "what": "state",
            "compared": int(exact.checkpoint_step is not None),
            "differing": ", ".join(exact.state) or None,
        },
    ]
    columns = [Column("what", "what"), Column("compared", "compared", right=True), Column("differing", "differing")]
    verdict = "equal to the bit" if exact.equal else "NOT equal"
    if exact.checkpoint_step is not None:
        verdict += f"; tensors and state are those of step {exact.checkpoint_step:,}"
    sheets = [Sheet("Bit for bit", columns, rows, [verdict, *exact.notes])]
    if exact.differing:
        told = [{"tensor": t.name, "what": t.what, "largest": t.largest} for t in exact.differing[:_TENSORS_SHOWN]]
        more = len(exact.differing) - len(told)
        columns = [
            Column("tensor", "tensor"),
            Column("what", "difference"),
            Column("largest", "largest", lambda v: f"{v:.6g}", right=True, priority=1),
        ]
        sheets.append(Sheet("Tensors", columns, told, [f"and {more} more: --json names every one"] if more else []))
    return sheets


def _signed(value: float) -> str:
    whole = value.is_integer() and abs(value) < 2**53
    return f"{int(value):+,}" if whole else f"{value:+.6g}"


def _shown(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return repr(value) if isinstance(value, float) else str(value)
