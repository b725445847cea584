"""What `sparseift flops` shows: the layers, the totals, who owns the difference, and the comparison of sparsities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.text import shape_text
from ..errors import CheckFailed, UsageError, did_you_mean
from ..plan.audit import Audit, row_json, rows, to_json
from ..plan.layer_plan import LayerPlan
from ..plan.members import MEMBERS
from ..plan.spec import TrainingSpec
from ..table.shape import Shape
from ..table.table import LayerTable
from .options import Format
from .output import Column, Sheet, digits_that_differ, integer, ratio, render

if TYPE_CHECKING:
    from ..trace.verify import Verification

WITHOUT_MASKS = (
    "Trained without masks (algorithm dense): forward MACs and non-zeros are the plan's, not what is trained."
)
CONTROL = "Scope none: nothing is widened and FLOPs fall with the sparsity. A control, no iso-FLOP transform."
STYLES = {"transformed": "green", "boundary": "yellow", "untouched": "dim", "mixed": ""}


def show(
    result: Audit,
    fmt: Format,
    output: Path | None,
    *,
    depth: int | None,
    sort: str | None,
    summary: bool,
    verification: Verification | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Print one audit; `extra` joins the JSON document."""
    sheets = [] if summary else [_layers(result, depth, sort)]
    if fmt is not Format.csv or summary:
        sheets.append(_totals(result, _title(result) if summary else "Totals"))
    if fmt is not Format.csv and result.plan:
        sheets.append(_owners(result))
    if fmt is not Format.csv and verification is not None:
        sheets.append(verification_sheet(verification))
    payload = to_json(result) | (extra or {})
    if verification is not None:
        payload["verify"] = verification.to_json()
    if not summary:
        shown = {row["name"]: row for row in sheets[0].rows}
        payload["layers"] = (
            [shown[r["name"]] for r in sheets[0].rows] if depth is not None else _in_order(payload["layers"], sheets[0])
        )
    render(sheets, payload, fmt, output)


def _in_order(layers: list[dict[str, Any]], sheet: Sheet) -> list[dict[str, Any]]:
    by_name = {row["name"]: row for row in layers}
    return [by_name[row["name"]] for row in sheet.rows]


# --- the layers ---


def _layers(result: Audit, depth: int | None, sort: str | None) -> Sheet:
    entries = [_entry(row, result) for row in rows(result)]
    if depth is not None:
        entries = fold(entries, depth)
    if sort:
        entries = sorted_entries(entries, sort)
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
            Column("status", "status", style=STYLES.__getitem__),
            Column("reason", "why / how", priority=5),
        ]
    else:
        columns += [
            Column("params", "parameters", integer, right=True, priority=2),
            Column("reason", "note", priority=5),
        ]
    return Sheet(_title(result), columns, entries)


def _title(result: Audit) -> str:
    title = f"{result.table.model}, input {shape_text(result.table.input)}"
    if result.plan:
        spec = result.plan.spec
        title += f": {result.plan.member.title.lower()}, sparsity {spec.sparsity}, match {spec.match}"
        title += f", scope {spec.scope}" if spec.scope != "all" else ""
        title += ", a control" if result.control else ""
    return title + " (1 MAC = 2 FLOPs)"


def _entry(row: LayerPlan, result: Audit) -> dict[str, Any]:
    entry = row_json(row)
    entry["shape"] = layer_shape_text(row, result)
    return entry


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


def fold(entries: Sequence[dict[str, Any]], depth: int) -> list[dict[str, Any]]:
    """Rows summed by the first `depth` names of their path; a folded row keeps a field only where all its rows agree."""
    if depth < 1:
        raise UsageError(f"--depth {depth} folds everything away", hint="1 folds to the top-level modules")
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(".".join(entry["name"].split(".")[:depth]), []).append(entry)
    return [members[0] if len(members) == 1 else _folded(name, members) for name, members in groups.items()]


def _folded(name: str, members: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def agreed(key: str) -> Any:
        values = {m[key] for m in members if m["dense_macs"] or m["transformed_macs"]} or {m[key] for m in members}
        return values.pop() if len(values) == 1 else None

    total = {k: sum(m[k] or 0 for m in members) for k in ("dense_macs", "transformed_macs", "nnz", "weights", "params")}
    kind = agreed("kind")
    return {
        "name": name,
        "kind": f"{kind} x{len(members)}" if kind else f"{len(members)} rows",
        "role": agreed("role"),
        "status": agreed("status") or "mixed",
        "reason": None,
        **total,
        "ratio": total["transformed_macs"] / total["dense_macs"] if total["dense_macs"] else None,
        "density": total["nnz"] / total["weights"] if total["weights"] else None,
        "shape": None,
    }


def sorted_entries(entries: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Largest first, names in alphabetical order.

    Raises:
        UsageError: no such column.
    """
    known = ("name", "dense_macs", "transformed_macs", "ratio", "density", "nnz", "params")
    if key not in known:
        raise UsageError(f"cannot sort by {key!r}", hint=did_you_mean(key, known) or f"known: {', '.join(known)}")
    if key == "name":
        return sorted(entries, key=lambda e: e["name"])
    return sorted(entries, key=lambda e: -(e[key] or 0))


# --- totals ---


def _totals(result: Audit, title: str) -> Sheet:
    dense, after = result.dense, result.transformed

    def line(what: str, a: int, b: int | None) -> dict[str, Any]:
        return {"what": what, "dense": a, "transformed": b, "ratio": b / a if b is not None and a else None}

    entries = [
        line("forward MACs", dense.forward_macs, after and after.forward_macs),
        line("forward FLOPs", dense.forward_flops, after and after.forward_flops),
        line(f"training FLOPs, {result.training.algorithm}", dense.training_flops, after and after.training_flops),
        line("parameters", dense.params, after and after.params),
        line("non-zero parameters", dense.nonzero_params, after and after.nonzero_params),
        line("activation elements", dense.activations, after and after.activations),
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
    if result.table.untraceable:
        notes.append(f"Widths unknown ({result.table.untraceable}): Sparse Wide cannot be planned.")
    if result.table.uncounted:
        notes.append(f"Not counted: {', '.join(result.table.uncounted)}.")
    if result.plan is None or result.transformed is None:
        return notes
    plan = result.plan
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
    limit = result.s_max
    if limit is not None and limit < 1:
        notes.append(
            f"s_max {digits_that_differ(limit, 1, 3)}: above it, what is left alone costs more than the whole dense model."
        )
    if result.activation_factor and result.activation_factor > 1:
        notes.append(f"Activations take {result.activation_factor:.2f}x the memory, which no FLOP count shows.")
    return notes


def _owners(result: Audit) -> Sheet:
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


# --- comparison and verification ---


def compare(
    table: LayerTable,
    results: Sequence[tuple[str, Audit | CheckFailed]],
    training: TrainingSpec,
    causal: str,
    fmt: Format,
    output: Path | None,
) -> None:
    """One line per sparsity, the dense model first."""
    entries = []
    first = next((r for _, r in results if isinstance(r, Audit)), None)
    if first is not None:
        d = first.dense
        entries.append(
            {
                "sparsity": "dense",
                "forward_flops": d.forward_flops,
                "forward_ratio": 1.0,
                "training_flops": d.training_flops,
                "training_ratio": 1.0,
                "params": d.params,
                "nonzero_params": d.params,
                "activation_factor": 1.0,
            }
        )
    for sparsity, result in results:
        entries.append(_compared(sparsity, result))
    columns = [
        Column("sparsity", "sparsity", right=True),
        Column("forward_flops", "forward FLOPs", integer, right=True),
        Column("forward_ratio", "ratio", ratio, right=True),
        Column("training_flops", f"training FLOPs ({training.algorithm})", integer, right=True, priority=2),
        Column("training_ratio", "training ratio", ratio, right=True, priority=1),
        Column("body_density", "body density", lambda v: f"{v:.5f}", right=True, priority=3),
        Column("params", "parameters", integer, right=True, priority=4),
        Column("nonzero_params", "non-zero", integer, right=True, priority=3),
        Column("activation_factor", "activations", lambda v: f"{v:.2f}x", right=True, priority=3),
        Column("note", "note", priority=1),
    ]
    spec = next((r.plan.spec for _, r in results if isinstance(r, Audit) and r.plan), None)
    what = f": {MEMBERS.get(spec.member).title.lower()}, match {spec.match}, scope {spec.scope}" if spec else ""
    title = f"{table.model}, input {'x'.join(map(str, table.input))}{what}"
    payload = {
        "schema": "sparseift.flops-comparison/1",
        "model": table.model,
        "unit": "flop",
        "rows": entries,
        "results": [to_json(r) if isinstance(r, Audit) else {"sparsity": s, "error": r.message} for s, r in results],
    }
    notes = [CONTROL] if spec and spec.scope == "none" else []
    render([Sheet(title, columns, entries, notes)], payload, fmt, output)


def _compared(sparsity: str, result: Audit | CheckFailed) -> dict[str, Any]:
    if isinstance(result, CheckFailed) or result.transformed is None or result.plan is None:
        return {"sparsity": sparsity, "note": result.message if isinstance(result, CheckFailed) else None}
    t = result.transformed
    transformed = [row for row in result.plan.layers if row.status == "transformed"]
    full = sum(row.full_macs for row in transformed)
    return {
        "sparsity": sparsity,
        "forward_flops": t.forward_flops,
        "forward_ratio": float(result.forward_ratio or 0),
        "training_flops": t.training_flops,
        "training_ratio": float(result.training_ratio or 0),
        "body_density": sum(row.macs for row in transformed) / full if full else None,
        "params": t.params,
        "nonzero_params": t.nonzero_params,
        "activation_factor": result.activation_factor,
        "note": None,
    }


def verification_sheet(verification: Verification) -> Sheet:
    """The counts of FlopCounterMode and fvcore next to ours, in MACs, and the verdict."""
    columns = [
        Column("what", "counted"),
        Column("ours", "sparseift MACs", integer, right=True),
        Column("flop_counter", "FlopCounterMode MACs", integer, right=True),
        Column("fvcore", "fvcore MACs", integer, right=True),
        Column("note", "note", priority=1),
    ]
    title = "Counted again by FlopCounterMode (meta tensors) and fvcore (real tensors), dense model"
    return Sheet(title, columns, verification.rows, [verification.verdict])
