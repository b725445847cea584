"""What `sparseift train` shows: the runs of each recipe side by side, and with --dry-run what one run would cost."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..base.metrics import metrics_in
from ..base.sheets import Column, Sheet, integer, measured, ratio
from ..kernels.registry import AUTO, MASKED, LayerChoice
from ..models.request import Request, parse_input
from ..models.source import build, load_table
from ..plan.audit import Audit, audit
from ..plan.execution import Place, choices_on_gpu, execution, has_structure, stored_in_blocks
from ..plan.layer_plan import LayerPlan
from ..plan.plan import make_plan
from ..plan.sheets import executed_note
from ..plan.spec import TrainingSpec, TransformSpec
from ..recipe import defaults
from ..recipe.load import DTYPES, Recipe, run_steps, why_masked
from ..sparsity.schedule import never_moves
from ..table.table import LayerTable
from .options import Format
from .output import render

UNKNOWN = "The number of steps depends on the size of the data, which is not known beforehand."
MASK_BYTES = 1 + 1 + 4
"""Of each weight that has a mask: the mask, which places were ever active, and the float32 factor of its gradient."""

Fact = tuple[str, Any, str]


# --- finished runs ---


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
    shown = metrics_in(results[0]["metrics"])
    columns = [
        Column("seed", "seed", right=True),
        *(Column(m, m.replace("_", " "), measured, right=True) for m in shown),
        Column("flops", "FLOPs used", integer, right=True),
        Column("flops_ratio", "x dense", ratio, right=True),
        Column("nonzero_params", "non-zero", integer, right=True, priority=2),
        Column("seconds", "seconds", lambda v: f"{v:.1f}", right=True, priority=1),
        Column("path", "run", priority=3),
    ]
    notes = [_mean(rows, m) for m in shown] if len(rows) > 1 else []
    return Sheet(f"{results[0]['recipe']}: {results[0]['steps']:,} steps", columns, rows, notes)


def _row(result: Mapping[str, Any]) -> dict[str, Any]:
    flops = result["flops"]
    used = flops["spent"]
    return {
        "seed": result["seed"],
        **{m: result["metrics"][m] for m in metrics_in(result["metrics"])},
        "flops": used,
        "flops_ratio": used / flops["dense"] if flops["dense"] else None,
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


# --- a run that is measured ---


def show_measured(results: Sequence[Mapping[str, Any]], fmt: Format) -> None:
    """A table a run: what was measured, and what the run itself found at that checkpoint."""
    results = [result for result in results if result]
    if not results:  # a process that is not the first of torchrun's
        return
    sheets: list[Sheet] = []
    for result in results:
        recorded = result["recorded"] or {}
        rows = [
            {"metric": name, "split": split, "value": value, "recorded": recorded.get(name) if i == 0 else None}
            for i, (split, values) in enumerate(result["metrics"].items())
            for name, value in values.items()
        ]
        columns = [
            Column("metric", "metric"),
            Column("split", "split"),
            Column("value", "value", measured, right=True),
            *([Column("recorded", "in the run", measured, right=True)] if recorded else []),
        ]
        at = result["checkpoint"]
        which = "its best checkpoint" if at["best"] else "a checkpoint"
        counts = ", ".join(f"{count:,} {result['unit']} of {split}" for split, count in result["count"].items())
        notes = [f"Measured on {next(iter(result['data']))}: {counts}."]
        sheets.append(Sheet(f"{result['run']}: {which}, step {at['step']:,}", columns, rows, notes))
    render(sheets, {"schema": "sparseift.evaluate/1", "runs": list(results)}, fmt)


# --- a dry run ---


def show_plans(recipes: Sequence[Recipe], runs: Sequence[int], fmt: Format, *, tflops: float | None = None) -> None:
    """A table a recipe, for one run of it; `runs` says how many are wanted of each, `tflops` how fast the device is."""
    sheets: list[Sheet] = []
    payloads: list[dict[str, Any]] = []
    for recipe, times in zip(recipes, runs, strict=True):
        steps = run_steps(recipe.spec)
        result = audit_of(recipe)
        facts = plan_facts(recipe, result, steps, tflops)
        rows = [{"name": name, "value": value, "what": what} for name, value, what in facts]
        columns = [
            Column("name", "name"),
            Column("value", "value", lambda v: f"{v:,}" if isinstance(v, int) else f"{v:.5f}", right=True),
            Column("what", "what it is", wraps=16),
        ]
        notes = [UNKNOWN] if steps is None else [f"Each of {times} runs costs this."] if times > 1 else []
        notes += _still_masks(recipe, steps)
        sheets.append(Sheet(f"{recipe.name}: a dry run", columns, rows, notes))
        choices = _choices(recipe, result)
        if result.plan and has_structure(result.plan.layers):
            sheets.append(_kernels_sheet(result, result.plan.layers, choices))
        payloads.append(plan_payload(recipe, result, facts))
    schema = {"schema": "sparseift.dry-run/1"}
    render(sheets, schema | (payloads[0] if len(payloads) == 1 else {"recipes": payloads}), fmt)


def plan_payload(recipe: Recipe, result: Audit, facts: Sequence[Fact]) -> dict[str, Any]:
    """What --dry-run says of a recipe in JSON."""
    choices = _choices(recipe, result).values()
    kernels = [{"weight": c.name, "kernel": c.backend, "block": c.block, "why_masked": c.reason} for c in choices]
    return {"recipe": recipe.name, **{name: value for name, value, _ in facts}, "kernels": kernels}


def _still_masks(recipe: Recipe, steps: int | None) -> list[str]:
    """A note where the algorithm has no mask update in so many steps."""
    if steps is None or recipe.spec.transform is None:
        return []
    given: dict[str, Any] = {**recipe.training, "steps": steps}
    training = TrainingSpec(**given)
    schedule = training.method.schedule(steps)
    still = training.method.drops_and_grows and schedule.stop and not schedule.updates
    return [never_moves(training.algorithm, schedule)] if still else []


def plan_facts(recipe: Recipe, result: Audit, steps: int | None, tflops: float | None) -> list[Fact]:
    """Name, value and meaning, of the audit `result` of a recipe; of the whole run only where its steps are known."""
    spec = recipe.spec
    if ":" in spec.model.name:
        _require_output(recipe)
    made = result.transformed or result.dense
    batch = spec.training.batch_size
    states = getattr(spec.optimizer.options(), "states_per_weight", 0)
    activations = made.activations * batch // spec.training.accumulate
    masked = sum(_masked(row) for row in result.plan.layers) if result.plan else 0
    facts: list[Fact] = []
    if steps is not None:
        facts.append(("steps", steps, "optimiser steps"))
    facts.append(("batch_size", batch, "samples a step"))
    if steps is not None:
        of_run = 2 * steps * batch
        executed = round(of_run * result.executed(kernels=False).training_macs)
        facts += [
            ("training_flops", round(of_run * made.training_macs), "FLOPs of the run, mask updates included"),
            (
                "dense_training_flops",
                round(of_run * result.dense.training_macs),
                "FLOPs of the dense model over as many steps",
            ),
        ]
        if result.plan:
            facts.append(("executed_flops", executed, "FLOPs that a device without sparse kernels makes of it"))
            if compact := stored_in_blocks(_choices(recipe, result)):
                executed = round(of_run * execution(result.plan.layers, result.training, compact).training_macs)
                facts.append(("executed_flops_kernels", executed, "FLOPs that a GPU with block kernels makes of it"))
        if tflops is not None:
            seconds = round(executed / (tflops * 1e12))
            facts.append(
                (
                    "seconds",
                    seconds,
                    f"of training steps at {tflops:g} TFLOP/s: {in_hours(seconds)}; evaluation comes on top",
                )
            )
    facts += [
        ("ratio", float(made.training_macs / result.dense.training_macs), "training FLOPs over the dense model's"),
        ("params", made.params, "parameters"),
        ("nonzero_params", result.nonzero_after_training, "of them not zero when training ends"),
        ("weight_bytes", 4 * made.params * (2 + states), "bytes of weights, gradients and optimiser state (float32)"),
    ]
    if zeros := _zeros_not_stored(recipe, result):
        kept = 4 * (made.params - zeros) * (2 + states)
        facts.append(("weight_bytes_kernels", kept, "the same where block kernels compute: zeros are not stored"))
    if masked:
        facts.append(("mask_bytes", MASK_BYTES * masked, "bytes of masks and what is kept beside them"))
    facts.append(
        ("activation_bytes", 4 * activations, "bytes of counted layers' outputs for one micro-batch (float32)")
    )
    return facts


def _require_output(recipe: Recipe) -> None:
    """Raise UsageError where a model of one's own gives what its data cannot be learned with, as far as sizes alone tell."""
    import torch

    from ..train import compatibility as fit

    data = recipe.spec.data
    facts = defaults.facts_of({"name": data.name}) if data is not None else None
    if data is None or facts is None:
        return
    built = build(_request(recipe))
    try:
        with torch.no_grad(), torch.device("meta"):
            output = built.model(*built.args, **built.kwargs)
    except Exception:  # it wants more than sizes: training calls it with numbers
        return
    fit.require_logits(built.name, data.name, facts.kind, built.input_shape, output)
    if facts.classes is not None:
        fit.require_classes(built.name, data.name, fit.logits_of(output).shape[-1], facts.classes)


def _request(recipe: Recipe) -> Request:
    model = recipe.spec.model
    return Request(model.name, model.num_classes, parse_input(model.input), model.seq)


def audit_of(recipe: Recipe, tables: dict[Request, LayerTable] | None = None) -> Audit:
    """The audit of a recipe, its dense model read from the zoo's tables where they have it.

    `tables` keeps those of models for other recipes.
    """
    spec = recipe.spec
    training = {**recipe.training, **({} if spec.transform else {"algorithm": "dense"})}
    wanted = TransformSpec.of(recipe.transform) if recipe.transform else None
    tables, request = {} if tables is None else tables, _request(recipe)
    if request not in tables:
        tables[request] = load_table(request)
    table = tables[request]
    counting = TrainingSpec.of(training)
    return audit(make_plan(table, wanted, counting) if wanted else table, counting)


def _choices(recipe: Recipe, result: Audit) -> dict[Place, LayerChoice]:
    """Every masked weight, and whether a GPU would compute it by its blocks, or what keeps the recipe from it."""
    if result.plan is None:
        return {}
    training = recipe.spec.training
    found = choices_on_gpu(result.plan.layers, result.training, training.kernels, DTYPES[training.precision])
    off = why_masked(recipe.spec)
    if training.device in ("cpu", "mps") and training.kernels == AUTO:
        off = f"training.device is {training.device}"
    if off:
        return {place: replace(one, backend=MASKED, reason=one.reason or off) for place, one in found.items()}
    return found


def _zeros_not_stored(recipe: Recipe, result: Audit) -> int:
    """Masked places of the weights that kernels compute, which store their blocks alone."""
    compact = stored_in_blocks(_choices(recipe, result))
    parts = ((row.layer.name, part) for row in (result.plan.layers if result.plan else ()) for part in row.parts)
    return sum(part.shape.weights - part.nnz for layer, part in parts if (layer, part.name) in compact)


def _kernels_sheet(result: Audit, layers: Sequence[LayerPlan], choices: Mapping[Place, LayerChoice]) -> Sheet:
    """Which way computes which weights, one row for all that are computed in one way for one reason."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for choice in choices.values():
        way = "masked-dense" if choice.backend == MASKED else f"blocks of {choice.block}"
        grouped.setdefault((way, choice.reason), []).append(choice.name)
    rows = [
        {"way": way, "weights": len(names), "reason": reason, "names": _in_globs(names)}
        for (way, reason), names in grouped.items()
    ]
    columns = [
        Column("way", "computed as"),
        Column("weights", "weights", right=True),
        Column("reason", "why not better", wraps=16),
        Column("names", "which", wraps=24, priority=1),
    ]
    kernels = execution(layers, result.training, stored_in_blocks(choices))
    return Sheet("Kernels", columns, rows, [executed_note(result, list(choices.values()), kernels)])


def _in_globs(names: Sequence[str]) -> str:
    """The names, those that differ in numbers alone as one: `h.*.mlp.c_fc.weight (12)`."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    return ", ".join(f"{glob} ({len(same)})" if len(same) > 1 else same[0] for glob, same in alike.items())


def _masked(row: LayerPlan) -> int:
    return sum(part.shape.weights for part in row.parts if not part.dense) if row.status == "transformed" else 0


def in_hours(seconds: int) -> str:
    """A time as a person says it: 42 seconds, 3.5 minutes, 1.84 hours."""
    if seconds < 60:
        return f"{seconds} seconds"
    return f"{seconds / 3600:.3g} hours" if seconds >= 3600 else f"{seconds / 60:.2g} minutes"
