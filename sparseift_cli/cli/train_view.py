"""What `sparseift train` shows: the runs of each recipe side by side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..base.metrics import metric_names
from .options import Format
from .output import Column, Sheet, integer, measured, ratio, render


def show_runs(results: Sequence[Mapping[str, Any]], fmt: Format) -> None:
    """A table a recipe, a line a seed, and mean and spread over the seeds."""
    results = [result for result in results if result]
    if not results:  # a process that is not the first of torchrun's
        return
    recipes = {result["recipe"]: None for result in results}
    sheets = [_sheet([result for result in results if result["recipe"] == name]) for name in recipes]
    render(sheets, {"schema": "sparseift.train/1", "runs": results}, fmt)


def _sheet(results: Sequence[Mapping[str, Any]]) -> Sheet:
    rows = [_row(result) for result in results]
    shown = [m for m in metric_names() if m in rows[0]]
    columns = [
        Column("seed", "seed", right=True),
        *(Column(m, m.replace("_", " "), measured, right=True) for m in shown),
        Column("flops", "FLOPs spent", integer, right=True),
        Column("flops_ratio", "x dense", ratio, right=True),
        Column("nonzero_params", "non-zero", integer, right=True, priority=2),
        Column("seconds", "seconds", lambda v: f"{v:.1f}", right=True, priority=1),
        Column("path", "run", priority=3),
    ]
    notes = [_mean(rows, m) for m in shown] if len(rows) > 1 else []
    return Sheet(f"{results[0]['recipe']}: {results[0]['steps']:,} steps", columns, rows, notes)


def _row(result: Mapping[str, Any]) -> dict[str, Any]:
    flops = result["flops"]
    return {
        "seed": result["seed"],
        **{m: result["metrics"][m] for m in metric_names() if m in result["metrics"]},
        "flops": flops["spent"],
        "flops_ratio": flops["spent"] / flops["dense"] if flops["dense"] else None,
        "nonzero_params": result["nonzero_params"],
        "seconds": result["seconds"],
        "path": result.get("path"),
    }


def _mean(rows: Sequence[Mapping[str, Any]], metric: str) -> str:
    values = [row[metric] for row in rows if row[metric] is not None and math.isfinite(row[metric])]
    if len(values) < len(rows):
        return f"{metric}: no number in {len(rows) - len(values)} of {len(rows)} runs"
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    return f"{metric}: {measured(mean)} +- {measured(spread)} (mean, sample deviation, n = {len(values)})"
