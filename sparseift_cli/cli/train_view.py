"""What `sparseift train` shows: the plan of a dry run, and the runs of a recipe side by side."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..recipe.load import Recipe, run_steps
from .formats import Format
from .output import Column, Sheet, integer, ratio, render

METRICS = ("loss", "top1", "top5", "perplexity", "bits_per_byte")


def show_runs(results: Sequence[Mapping[str, Any]], fmt: Format) -> None:
    """A line a seed, and mean and spread over the seeds."""
    rows = [_row(result) for result in results if result]
    if not rows:  # a process that is not the first of torchrun's
        return
    shown = [m for m in METRICS if m in rows[0]]
    columns = [
        Column("seed", "seed", right=True),
        *(Column(m, m, lambda v: f"{v:.4f}", right=True) for m in shown),
        Column("flops", "FLOPs spent", integer, right=True),
        Column("flops_ratio", "x dense", ratio, right=True),
        Column("nonzero_params", "non-zero", integer, right=True, priority=2),
        Column("seconds", "seconds", lambda v: f"{v:.1f}", right=True, priority=1),
        Column("path", "run", priority=3),
    ]
    notes = [_mean(rows, m) for m in shown] if len(rows) > 1 else []
    sheet = Sheet(f"{results[0]['recipe']}: {results[0]['steps']:,} steps", columns, rows, notes)
    render([sheet], {"schema": "sparseift.train/1", "runs": list(results)}, fmt)


def _row(result: Mapping[str, Any]) -> dict[str, Any]:
    flops = result["flops"]
    return {
        "seed": result["seed"],
        **{m: result["metrics"][m] for m in METRICS if m in result["metrics"]},
        "flops": flops["spent"],
        "flops_ratio": flops["spent"] / flops["dense"] if flops["dense"] else None,
        "nonzero_params": result["nonzero_params"],
        "seconds": result["seconds"],
        "path": result.get("path"),
    }


def _mean(rows: Sequence[Mapping[str, Any]], metric: str) -> str:
    values = [row[metric] for row in rows]
    mean, spread = statistics.fmean(values), statistics.stdev(values)
    return f"{metric}: {mean:.4f} +- {spread:.4f} (mean, sample deviation, n = {len(values)})"


def show_plan(recipe: Recipe, fmt: Format) -> None:
    """Steps, FLOPs, parameters and memory of a run, from the meta device alone."""
    from ..flop_audit import audit
    from ..request import Request, parse_input
    from ..source import load_table
    from ..spec import TrainingSpec, TransformSpec

    spec = recipe.spec
    steps = run_steps(spec)
    request = Request(spec.model.name, spec.model.num_classes, parse_input(spec.model.input), spec.model.seq)
    training = {**recipe.training, **({} if spec.transform else {"algorithm": "dense"})}
    wanted = TransformSpec.of(recipe.transform) if recipe.transform else None
    result = audit(load_table(request), wanted, TrainingSpec.of(training))
    made = result.transformed or result.dense
    batch = spec.training.batch_size
    states = {"sgd": 1 if getattr(spec.optimizer, "momentum", 0) else 0, "adamw": 2}[spec.optimizer.name]
    activations = made.activations * batch // spec.training.accumulate
    total = None if steps is None else round(2 * made.training_macs * steps * batch)
    dense = None if steps is None else round(2 * result.dense.training_macs * steps * batch)
    facts: list[tuple[str, Any, str]] = [
        ("steps", steps, "optimiser steps"),
        ("batch_size", batch, "samples a step"),
        ("training_flops", total, "FLOPs of the run, mask updates included"),
        ("dense_training_flops", dense, "FLOPs of the dense model over as many steps"),
        ("ratio", float(made.training_macs / result.dense.training_macs), "training FLOPs over the dense model's"),
        ("params", made.params, "parameters"),
        ("nonzero_params", made.nonzero_params, "of them not zero"),
        ("weight_bytes", 4 * made.params * (2 + states), "bytes of weights, gradients and optimiser state (float32)"),
        ("activation_bytes", 4 * activations, "bytes of counted layers' outputs for one micro-batch (float32)"),
    ]
    rows = [{"name": name, "value": value, "what": what} for name, value, what in facts if value is not None]
    columns = [
        Column("name", "name"),
        Column("value", "value", lambda v: f"{v:,}" if isinstance(v, int) else f"{v:.5f}", right=True),
        Column("what", "what it is"),
    ]
    notes = (
        []
        if steps is not None
        else ["The number of steps depends on the size of the data, which is not known beforehand."]
    )
    sheet = Sheet(f"{recipe.name}: a dry run", columns, rows, notes)
    payload = {"schema": "sparseift.dry-run/1", "recipe": recipe.name, **{r["name"]: r["value"] for r in rows}}
    render([sheet], payload, fmt)
