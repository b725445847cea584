"""What `sparseift train --sweep` shows: what all points would cost, which cannot be trained, and their results side by side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..base.metrics import metrics_in
from ..base.sheets import Column, Sheet, integer, measured, ratio
from ..errors import CheckFailed, SparseiftError
from ..models.request import Request
from ..plan.audit import Audit
from ..recipe import defaults
from ..recipe.load import Recipe, run_steps
from ..recipe.strict_yaml import scalar
from ..recipe.sweep import DENSE, Sweep
from ..table.table import LayerTable
from ..train.parallel import Failure
from .options import Format
from .output import render
from .train_view import UNKNOWN, audit_of, in_hours, plan_facts, plan_payload

SUMMED = ("steps", "training_flops", "dense_training_flops", "executed_flops", "seconds")
"""Facts of a dry run that add up over runs."""


def refused_points(recipes: Iterable[Recipe]) -> dict[str, Failure]:
    """The points whose transform cannot be planned, by name, so that they are known before anything is trained.

    Where sizes depend on data that is not known beforehand, only the run itself can say.
    """
    tables: dict[Request, LayerTable] = {}
    found: dict[str, Failure] = {}
    for recipe in {recipe.name: recipe for recipe in recipes}.values():
        spec = recipe.spec
        facts = defaults.facts_of({"name": spec.data.name}) if spec.data else None
        own = ":" in spec.model.name or spec.model.num_classes is not None
        sized = own or (facts is not None and (facts.classes is not None or facts.kind != "image"))
        if sized and run_steps(spec) is not None:
            planned = _planned(recipe, tables)
            if isinstance(planned, Failure):
                found[recipe.name] = planned
    return found


def _planned(recipe: Recipe, tables: dict[Request, LayerTable]) -> Audit | Failure:
    try:
        return audit_of(recipe, tables)
    except SparseiftError as error:
        return Failure.of(error, recipe.name, recipe.name, None)


# --- a dry run ---


def show_budget(
    sweep: Sweep, recipes: Sequence[Recipe], runs: Sequence[int], fmt: Format, *, tflops: float | None = None
) -> None:
    """A line a point for one run of it, and the sum over all runs; `runs` says how many are wanted of each.

    Raises:
        CheckFailed: a point is refused; with the exit code of the first.
    """
    tables: dict[Request, LayerTable] = {}
    rows: list[dict[str, Any]] = []
    payloads: list[dict[str, Any]] = []
    refused: list[Failure] = []
    for recipe, times in zip(recipes, runs, strict=True):
        planned = _planned(recipe, tables)
        if isinstance(planned, Failure):
            refused.append(planned)
            continue
        facts = plan_facts(recipe, planned, run_steps(recipe.spec), tflops)
        row = {name: value for name, value, _ in facts}
        row.setdefault("executed_flops", row.get("training_flops"))  # of a dense model they are the same
        rows.append({**_cells(sweep, recipe.name), "runs": times, **row})
        payloads.append({**plan_payload(recipe, planned, facts), "axes": _values(recipe), "runs": times})
    total = {"points": len(rows), "runs": sum(row["runs"] for row in rows), **_sums(rows)}
    columns = [
        *_axis_columns(sweep),
        Column("runs", "runs", right=True, priority=1),
        Column("steps", "steps", integer, right=True, priority=4),
        Column("training_flops", "FLOPs a run", _four_digits, right=True),
        Column("ratio", "x dense", ratio, right=True, priority=2),
        *([Column("executed_flops", "executed", _four_digits, right=True, priority=5)] if tflops is not None else []),
        *([Column("seconds", "time a run", in_hours, right=True)] if tflops is not None else []),
        Column("nonzero_params", "non-zero", integer, right=True, priority=3),
    ]
    sheets = [Sheet(f"{sweep.folder}: a dry run", columns, rows, _in_words(total, tflops))] if rows else []
    payload = {"schema": "sparseift.dry-run/1", "sweep": _axes(sweep), "recipes": payloads, "total": total}
    if refused:
        sheets.append(_failures_sheet("Refused: these points cannot be trained", refused))
    render(sheets, payload | {"refused": [_failure_json(f) for f in refused]}, fmt)
    if refused:
        error = CheckFailed(f"{len(refused)} of {len(recipes)} points are refused", hint=refused[0].hint)
        error.exit_code = refused[0].exit_code
        raise error


def _sums(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """What all runs together cost; a fact that is not known of every point is left out."""
    known = [name for name in SUMMED if rows and all(row.get(name) is not None for row in rows)]
    return {name: sum(row["runs"] * row[name] for row in rows) for name in known}


def _in_words(total: Mapping[str, Any], tflops: float | None) -> list[str]:
    runs, points = (f"{total[what]:,} {what if total[what] != 1 else what[:-1]}" for what in ("runs", "points"))
    said = f"Together {runs} of {points}"
    if "steps" not in total:
        return [f"{said}. {UNKNOWN}"]
    said += f": {total['steps']:,} steps, {total['training_flops']:,} FLOPs"
    if dense := total["dense_training_flops"]:
        said += f" ({total['training_flops'] / dense:.5f}x as many dense runs)"
    if tflops is not None:
        said += f"; {in_hours(total['seconds'])} one after the other at {tflops:g} TFLOP/s, evaluation comes on top"
    return [f"{said}."]


# --- finished runs ---


def show_sweep(
    sweep: Sweep, results: Sequence[Mapping[str, Any]], failures: Sequence[Failure], folder: Path, fmt: Format
) -> None:
    """A line a point: the means over its seeds; below, what failed."""
    results = [result for result in results if result]
    points = {point.name: point for point in sweep.points}
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        by_name.setdefault(result["recipe"], []).append(result)
    rows = [_row(sweep, name, of_point) for name, of_point in by_name.items()]
    shown = list(dict.fromkeys(m for result in results for m in metrics_in(result["metrics"])))
    columns = [
        *_axis_columns(sweep),
        Column("n", "n", right=True),
        *(c for i, m in enumerate(shown) for c in _metric_columns(m, i)),
        Column("flops", "FLOPs used", _four_digits, right=True, priority=4),
        Column("flops_ratio", "x dense", ratio, right=True, priority=2),
        Column("seconds", "seconds", lambda v: f"{v:.1f}", right=True, priority=3),
    ]
    notes = [f"Means and sample deviations over n seeds. Runs: {folder}"]
    if dense := next((point.name for point in sweep.points if point.dense and point.name in by_name), None):
        notes.append(f"Verdicts: sparseift report {folder} --baseline {dense}")
    sheets = [Sheet(f"{sweep.folder}: {len(rows)} of {len(points)} points", columns, rows, notes)] if rows else []
    if failures:
        sheets.append(_failures_sheet("Failed", failures))
    payload = {
        "schema": "sparseift.train/1",
        "sweep": _axes(sweep),
        "runs": [{**r, "axes": dict(points[r["recipe"]].values) if r["recipe"] in points else {}} for r in results],
        "failures": [_failure_json(failure) for failure in failures],
    }
    if sheets:  # a process that is not the first of torchrun's has none
        render(sheets, payload, fmt)


def _row(sweep: Sweep, name: str, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    flops = [result["flops"] for result in results]
    row: dict[str, Any] = {
        **_cells(sweep, name),
        "n": len(results),
        "flops": statistics.fmean(f["spent"] for f in flops),
        "flops_ratio": statistics.fmean(f["spent"] / f["dense"] for f in flops)
        if all(f["dense"] for f in flops)
        else None,
        "seconds": statistics.fmean(result["seconds"] for result in results),
    }
    for metric in metrics_in(results[0]["metrics"]):
        values = [result["metrics"][metric] for result in results]
        if all(v is not None and math.isfinite(v) for v in values):
            row[metric] = statistics.fmean(values)
            row[f"{metric} deviation"] = statistics.stdev(values) if len(values) > 1 else None
    return row


def _metric_columns(metric: str, place: int) -> list[Column]:
    """The mean and, of the first ones, the deviation; what comes later gives way first."""
    return [
        Column(metric, metric.replace("_", " "), measured, right=True, priority=5 * (place > 1)),
        Column(f"{metric} deviation", "+-", measured, right=True, priority=1 if place == 0 else 6),
    ]


# --- both ---


def _axis_columns(sweep: Sweep) -> list[Column]:
    return [Column(f"axis {name}", name.replace("_", " ")) for name in sweep.axes]


def _cells(sweep: Sweep, name: str) -> dict[str, Any]:
    """The cells of the axes of a point; a dense baseline is called so in the first column that it has no value for."""
    point = next(point for point in sweep.points if point.name == name)
    cells = {f"axis {axis}": _text(point.values[axis]) for axis in sweep.axes if axis in point.values}
    if point.dense and (free := next((axis for axis in sweep.axes if axis not in point.values), None)):
        cells[f"axis {free}"] = DENSE
    return cells


def _text(value: Any) -> str:
    return value if isinstance(value, str) else scalar(value)


def _values(recipe: Recipe) -> dict[str, Any]:
    return dict(recipe.point.values) if recipe.point else {}


def _axes(sweep: Sweep) -> dict[str, Any]:
    """The axes in JSON: key and values by name."""
    return {
        "name": sweep.folder,
        "axes": {name: {"key": axis.key, "values": list(axis.values)} for name, axis in sweep.axes.items()},
        "points": [{"name": point.name, "axes": dict(point.values), "dense": point.dense} for point in sweep.points],
    }


def _failures_sheet(title: str, failures: Sequence[Failure]) -> Sheet:
    """A line for all seeds of a point that failed for one reason."""
    alike: dict[tuple[str, int, str], list[int]] = {}
    for failure in failures:
        seeds = alike.setdefault((failure.recipe, failure.exit_code, failure.message), [])
        seeds += [] if failure.seed is None else [failure.seed]
    rows = [
        {"point": point, "seed": ", ".join(map(str, seeds)) or None, "code": code, "why": message.replace("\n", " ")}
        for (point, code, message), seeds in alike.items()
    ]
    columns = [
        Column("point", "point", wraps=12),
        Column("seed", "seed", wraps=4, priority=1),
        Column("code", "exit code", right=True, priority=2),
        Column("why", "why", wraps=24),
    ]
    return Sheet(title, columns, rows)


def _failure_json(failure: Failure) -> dict[str, Any]:
    names = ("recipe", "seed", "exit_code", "message", "hint")
    return {name: getattr(failure, name) for name in names}


def _four_digits(value: float) -> str:
    return f"{value:.4g}"
