"""`sparseift inspect` of a model: its layers, their roles, its widths, and what each member would touch and why not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base.sheets import Column, Sheet, integer
from ..errors import SparseiftError, UsageError
from ..models.request import Request
from ..models.source import load_table
from ..plan.audit import audit, row_fields, rows
from ..plan.layer_plan import LayerPlan
from ..plan.members import MEMBERS
from ..plan.plan import make_plan
from ..plan.sheets import layer_shape_text
from ..plan.spec import TransformSpec
from ..plan.widths import solve
from ..recipe.load import resolve_request
from ..table.table import LayerTable
from .flops_view import fold, sorted_entries
from .options import Format
from .output import render

SCHEMA = "sparseift.inspect-model/1"
DEFAULT_SPARSITY = "0.75"


def inspect_model(
    request: Request,
    *,
    why: bool,
    spec: Mapping[str, Any],
    depth: int | None,
    sort: str | None,
    fmt: Format,
    output: Path | None,
) -> None:
    """Print the layers of a model; with `why` one column per member has what it would do to each layer.

    Raises:
        UsageError: options in `spec` without `why`, or a member, layer or column that does not exist.
    """
    request, recipe = resolve_request(request)
    if not why and spec:
        raise UsageError(
            "--transform, --sparsity, --scope, --include and --exclude are options of --why",
            hint="add --why, or use sparseift flops for the numbers",
        )
    table = load_table(request)
    options: dict[str, Any] = {"sparsity": DEFAULT_SPARSITY} | TransformSpec.overridden(
        recipe.transform if recipe else {}, spec
    )
    asked = MEMBERS.canonical(options["member"]) if "member" in options else None
    members = [asked] if asked else list(MEMBERS)
    if spec.get("scope") == "none":  # the control of wide alone: it keeps no FLOPs
        options["match"], members = "off", [asked or "wide"]
    result = audit(table)
    entries = [row_fields(row) | {"shape": layer_shape_text(row, result)} for row in rows(result)]
    notes = _notes(table)
    if why:
        for member in members:
            known = options if asked else TransformSpec.overridden(options, {"member": member})
            notes += _explain(table, entries, TransformSpec.of(known | {"member": member}))
    entries = fold(entries, depth) if depth is not None else entries
    entries = sorted_entries(entries, sort) if sort else entries
    sheets = [_layers(table, entries, members if why else [], notes)]
    if fmt is not Format.csv:
        sheets.append(_widths(table))
    payload = {
        "schema": SCHEMA,
        "model": table.model,
        "input": list(table.input),
        "forward_macs": table.macs,
        "params": table.params,
        "layers": entries,
        "widths": sheets[1].rows if len(sheets) > 1 else [],
        "uncounted": list(table.uncounted),
        "notes": notes,
    }
    render(sheets, payload, fmt, output)


def _explain(table: LayerTable, entries: list[dict[str, Any]], spec: TransformSpec) -> list[str]:
    """Put what a member does to each layer under its name; the notes if it refuses the whole model."""
    name = spec.member
    try:
        plan = make_plan(table, spec)
    except SparseiftError as error:
        return [f"{name}: {error.message}"]
    for entry, row in zip(entries, plan.layers, strict=True):
        entry[name] = _does(row)
    touched = sum(row.dense_macs for row in plan.layers if row.status == "transformed")
    count = sum(row.status == "transformed" for row in plan.layers)
    return [
        f"{name} at sparsity {spec.sparsity} transforms {count} layers with {100 * touched / table.macs:.2f} % of the MACs."
    ]


def _does(row: LayerPlan) -> str:
    if row.status != "transformed":
        return f"no: {row.reason}"
    pattern = "" if row.mask_pattern.unrestricted else f", {row.pattern}"
    if row.detail:
        return f"yes: {row.detail}{pattern}"
    shape = row.parts[0].shape
    return f"yes: {shape.inputs}>{shape.outputs}, density {float(row.density):.4f}{pattern}"


def _layers(table: LayerTable, entries: list[dict[str, Any]], members: list[str], notes: list[str]) -> Sheet:
    columns = [
        Column("name", "layer", wraps=21 if members else 0),
        Column("kind", "kind", priority=2),
        Column("role", "role", priority=1),
        Column("shape", "shape", priority=3),
        Column("dense_macs", "MACs", integer, right=True, priority=1 if members else 0),
        Column("params", "parameters", integer, right=True, priority=3),
    ]
    columns += [Column(m, m, wraps=11) for m in members]
    if not members:
        columns.append(Column("reason", "note", priority=4))
    title = f"{table.model}, input {'x'.join(map(str, table.input))}: {table.macs:,} MACs, {table.params:,} parameters"
    return Sheet(title, columns, entries, notes)


def _notes(table: LayerTable) -> list[str]:
    notes = []
    if table.untraceable:
        notes.append(f"Widths unknown: {table.untraceable}.")
    if table.uncounted:
        notes.append(f"Not counted: {', '.join(table.uncounted)}.")
    return notes


def _widths(table: LayerTable) -> Sheet:
    """The free widths: what Sparse Wide may choose, and how many dims follow each."""
    solution = solve(table.widths, table.equations)
    entries = []
    for free in solution.free:
        followers = [i for i in range(len(table.widths)) if free.id in solution.affine[i]]
        width = table.widths[free.id]
        shared = [
            what
            for what, flag in (
                ("residual", any(table.widths[i].residual for i in followers)),
                ("attention", any(table.widths[i].attention for i in followers)),
            )
            if flag
        ]
        entries.append(
            {
                "name": width.name or free.id,
                "size": free.size,
                "step": free.step,
                "follow": len(followers) - 1,
                "shared": " ".join(shared),
            }
        )
    columns = [
        Column("name", "free width"),
        Column("size", "size", integer, right=True),
        Column("step", "moves in steps of", integer, right=True, priority=1),
        Column("follow", "widths that follow", integer, right=True, priority=1),
        Column("shared", "shared by"),
    ]
    return Sheet("Widths", columns, entries)
