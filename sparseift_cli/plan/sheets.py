"""An audit and a plan as sheets: the layers, the totals, and what causes the difference to the dense model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from ..base.sheets import Column, Sheet, digits_that_differ, integer, ratio
from ..base.text import shape_text
from ..kernels.registry import LayerChoice
from ..mask.patterns import is_chosen
from ..table.shape import Shape
from .audit import Audit, audit, row_fields, rows
from .execution import Execution, executed_in_words, has_structure
from .layer_patterns import chosen_in_words
from .layer_plan import EXPERTS, LayerPlan
from .plan import Plan

WITHOUT_MASKS = (
    "Trained without masks (algorithm dense): forward MACs and non-zeros are the plan's, not what is trained."
)
CONTROL = "Scope none: nothing is widened and FLOPs fall with the sparsity. A control, no iso-FLOP transform."
EXPERTS_COUNT = (
    "Experts: MACs are tokens x experts a token is routed to x non-zeros of one expert. All experts of a layer have equally "
    "many, so the routing changes nothing."
)
STYLES = {"transformed": "green", "boundary": "yellow", "untouched": "dim", "mixed": ""}


def audit_sheets(result: Audit) -> list[Sheet]:
    """The layers, the totals and, of a transformed model, the causes of the difference."""
    return [layer_sheet(result), totals_sheet(result, "Totals"), *([owner_sheet(result)] if result.plan else [])]


def plan_sheets(plan: Plan) -> list[Sheet]:
    """The layers, and the widths that were chosen."""
    sheets = [layer_sheet(audit(plan))]
    widths = plan.to_json()["free_widths"]
    if widths:
        columns = [
            Column("name", "width"),
            Column("dense", "dense", integer, right=True),
            Column("size", "new", integer, right=True),
            Column("ideal", "before rounding", lambda v: f"{v:.2f}", right=True),
        ]
        sheets.append(Sheet("Widths", columns, widths))
    return sheets


Entries = list[dict[str, Any]]
"""One mapping a row: the fields of the JSON document, and `shape` as text."""


def layer_sheet(result: Audit, arrange: Callable[[Entries], Entries] = list) -> Sheet:
    """One row a counted operation; `arrange` may fold and sort them."""
    entries = arrange([_entry(row, result) for row in rows(result)])
    columns = [
        Column("name", "layer"),
        Column("kind", "kind", priority=3),
        Column("role", "role", priority=1),
        Column("shape", "shape", priority=4),
        Column("dense_macs", "dense MACs", integer, right=True),
    ]
    if result.plan:
        columns += [
            Column("transformed_macs", "transformed MACs", integer, right=True),
            Column("ratio", "ratio", ratio, right=True),
            Column("density", "density", lambda d: f"{d:.5f}", right=True, priority=2),
            Column("nnz", "non-zeros", integer, right=True, priority=2),
            *([Column("pattern", "pattern", priority=3)] if _patterns_differ(result.plan) else []),
            Column("status", "status", style=STYLES.__getitem__),
            *([Column("computed", "computed", priority=3)] if has_structure(result.plan.layers) else []),
            Column("reason", "why / how", priority=5),
        ]
    else:
        columns += [
            Column("params", "parameters", integer, right=True, priority=2),
            Column("reason", "note", priority=5),
        ]
    return Sheet(title_of(result), columns, entries)


def title_of(result: Audit) -> str:
    """The model, its input, and the transform."""
    title = f"{result.table.model}, input {shape_text(result.table.input)}"
    if result.plan:
        spec = result.plan.spec
        title += f": {result.plan.member.title.lower()}, sparsity {spec.sparsity}, match {spec.match}"
        title += f", scope {spec.scope}" if spec.scope != "all" else ""
        title += f", distribution {spec.distribution}" if spec.distribution != "uniform" else ""
        title += f", pattern {spec.pattern}" if spec.pattern != "unstructured" else ""
        title += ", a control" if result.control else ""
    return title + " (1 MAC = 2 FLOPs)"


def _entry(row: LayerPlan, result: Audit) -> dict[str, Any]:
    entry = row_fields(row, result.choices)
    entry["shape"] = layer_shape_text(row, result)
    entry["reason"] = entry["reason"] or row.why_pattern
    entry["computed"] = f"masked: {entry['why_masked']}" if entry["why_masked"] else entry["kernel"]
    return entry


def _patterns_differ(plan: Plan) -> bool:
    return is_chosen(plan.spec.pattern) or len({row.pattern for row in plan.layers if row.status == "transformed"}) > 1


def layer_shape_text(row: LayerPlan, result: Audit) -> str:
    """`64>128 3x3 -> 202>405 3x3`: inputs > outputs, kernel, groups, before and after."""
    layer = row.layer
    if not layer.weighted:
        return ""
    before = layer.shape(result.table.sizes)
    after = [p.shape for p in row.parts]
    if len(after) == 1:
        return (
            _written(before, layer.kernel)
            if after[0] == before
            else f"{_written(before, layer.kernel)} -> {_written(after[0], layer.kernel)}"
        )
    return f"{_written(before, layer.kernel)} -> {row.new_shape}"


def _written(shape: Shape, kernel: tuple[int, ...]) -> str:
    taps = " " + "x".join(map(str, kernel)) if kernel and shape.taps > 1 else ""
    groups = f" g{shape.groups}" if shape.groups > 1 else ""
    return f"{shape.inputs}>{shape.outputs}{taps}{groups}"


# --- totals ---


def totals_sheet(result: Audit, title: str) -> Sheet:
    """MACs, FLOPs, parameters and activation elements of the whole model, dense and transformed, and notes on them."""
    dense, after = result.dense, result.transformed

    def line(what: str, a: int, b: int | None, known: Fraction | None = None) -> dict[str, Any]:
        share = float(known) if known is not None else b / a if b is not None and a else None
        return {"what": what, "dense": a, "transformed": b, "ratio": share}

    forward = result.forward_ratio
    entries = [
        line("forward MACs", dense.forward_macs, after and after.forward_macs, forward),
        line("forward FLOPs", dense.forward_flops, after and after.forward_flops, forward),
        # Over the whole FLOPs of this row. `training_ratio` divides unrounded MACs: under RigL its last digits differ.
        line(f"training FLOPs, {result.training.algorithm}", dense.training_flops, after and after.training_flops),
        line("parameters", dense.params, after and after.params),
        line("non-zero parameters", dense.nonzero_params, after and after.nonzero_params),
        line("activation elements", dense.activations, after and after.activations),
    ]
    if dense.active_params != dense.params:
        entries += [
            line("parameters a token uses", dense.active_params, after and after.active_params),
            line("non-zero, a token uses", dense.active_nonzero_params, after and after.active_nonzero_params),
        ]
    columns = [Column("what", "total"), Column("dense", "dense", integer, right=True)]
    if after:
        columns += [
            Column("transformed", "transformed", integer, right=True),
            Column("ratio", "ratio", ratio, right=True),
        ]
    return Sheet(title, columns, entries, _notes(result))


def _notes(result: Audit) -> list[str]:
    notes = []
    if result.causal != "full":
        found = any(row.causal for row in result.table.layers)
        unseen = "no attention here says that it is causal (`is_causal=True`; a mask of its own is not read): counted in full"
        notes.append(f"Causal attention counted {result.causal}." if found else f"--causal {result.causal}: {unseen}.")
    if any(row.kind == EXPERTS for row in result.table.layers):
        notes.append(EXPERTS_COUNT)
    if result.table.untraceable:
        notes.append(f"Widths unknown ({result.table.untraceable}): Sparse Wide cannot be planned.")
    if result.table.uncounted:
        notes.append(f"Not counted: {', '.join(result.table.uncounted)}.")
    return notes if result.plan is None else [*notes, *_notes_on_plan(result, result.plan)]


def _notes_on_plan(result: Audit, plan: Plan) -> list[str]:
    notes = _notes_on_outputs(plan)
    if result.control:
        notes.append(CONTROL)
    if result.training.method.costs_more_while_updating and result.training_while_updating is not None:
        still = float(result.training_while_updating / result.dense.training_macs)
        notes.append(
            f"Training: {ratio(still)}x dense while masks update, {ratio(float(result.training_ratio or 0))}x over the run."
        )
    if not result.training.method.masked:
        notes.append(WITHOUT_MASKS)
    if plan.scale is not None:
        notes.append(f"Matched: the transformed layers cost {float(plan.scale):.5f}x their dense FLOPs.")
        if plan.scale < Fraction(1, 2):
            notes.append(
                "Warning: less than half of the transformed layers' FLOPs are left; what stays dense eats the rest."
            )
    if is_chosen(plan.spec.pattern):
        notes.append(f"Pattern {plan.spec.pattern}: {chosen_in_words(plan.layers)}.")
    if unused := result.weights_in_no_block():
        notes.append(f"{unused}.")
    if kept := result.kept_widths():
        notes.append(f"{kept}.")
    if growth := result.growth():
        notes.append(f"Warning: {growth}.")
    limit = result.s_max
    if limit is not None and limit < 1:
        notes.append(
            f"s_max {digits_that_differ(limit, 1, 3)}: above it, what is left alone costs more than the whole dense model."
        )
    if has_structure(plan.layers):
        notes.append(executed_note(result, list(result.choices.values()), result.executed(kernels=True)))
    if result.activation_factor and result.activation_factor > 1:
        scores = (
            f" ({result.activation_factor_without_scores:.2f}x without stored attention scores)"
            if result.dense.scores
            else ""
        )
        notes.append(f"Activations take {result.activation_factor:.2f}x the memory{scores}, which no FLOP count shows.")
    return notes


def executed_note(result: Audit, choices: Sequence[LayerChoice], kernels: Execution) -> str:
    """What is executed with masked dense layers, and with `kernels` where `choices` has some, over the dense model."""
    forward, training = result.dense.forward_macs, result.dense.training_macs
    masked, kept = (
        (done.forward_macs / forward, float(done.training_macs / training))
        for done in (result.executed(kernels=False), kernels)
    )
    return executed_in_words(masked, kept, choices)


def _notes_on_outputs(plan: Plan) -> list[str]:
    notes = []
    if plan.widening and plan.spec.scope == "all" and (outputs := plan.outputs_of_stream):
        name = outputs[0] or "*"
        what = f"output {name}" if outputs[0] else "the output"
        notes.append(
            f"A residual stream keeps its width, which is that of {what}: --free-outputs '{name}' lets both grow."
        )
    if grown := plan.grown_by_products:
        notes.append(f"Wider than before, beside the outputs, which keep their shapes: {', '.join(grown)}.")
    return notes


def owner_sheet(result: Audit) -> Sheet:
    """The causes of the difference in forward MACs; their sum is the whole difference."""
    owned = result.owners()
    total = result.dense.forward_macs
    entries = [{"owner": k, "macs": v, "share": v / total} for k, v in owned.items()]
    entries.append({"owner": "whole model", "macs": sum(owned.values()), "share": sum(owned.values()) / total})
    return Sheet(
        "Who owns the difference",
        [
            Column("owner", "owner"),
            Column("macs", "MACs", lambda v: f"{v:+,}", right=True),
            Column("share", "of the dense model", _percent, right=True),
        ],
        entries,
    )


def _percent(share: float) -> str:
    """To four decimals, or as many as show that it is not 0."""
    share *= 100
    digits = 4 if abs(share) >= 5e-5 or not share else 1 - math.floor(math.log10(abs(share)))
    return f"{share + 0.0:+.{digits}f} %"
