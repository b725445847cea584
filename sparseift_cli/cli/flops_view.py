"""What `sparseift flops` shows: the layers, the totals, who owns the difference, and the comparison of sparsities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.sheets import Column, Sheet, integer, ratio
from ..errors import CheckFailed, UsageError, did_you_mean
from ..mask.patterns import is_chosen
from ..plan.audit import Audit, to_json
from ..plan.execution import has_structure
from ..plan.layer_patterns import chosen_in_words
from ..plan.members import MEMBERS
from ..plan.plan import Plan
from ..plan.sheets import CONTROL, Entries, layer_sheet, owner_sheet, title_of, totals_sheet
from ..plan.spec import TrainingSpec
from ..table.table import LayerTable
from .options import Format
from .output import render

if TYPE_CHECKING:
    from ..trace.verify import Verification


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
    sheets = [] if summary else [layer_sheet(result, lambda entries: _arranged(entries, depth, sort))]
    if fmt is not Format.csv or summary:
        sheets.append(totals_sheet(result, title_of(result) if summary else "Totals"))
    if fmt is not Format.csv and result.plan:
        sheets.append(owner_sheet(result))
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


def _arranged(entries: Entries, depth: int | None, sort: str | None) -> Entries:
    entries = fold(entries, depth) if depth is not None else entries
    return sorted_entries(entries, sort) if sort else entries


def _in_order(layers: list[dict[str, Any]], sheet: Sheet) -> list[dict[str, Any]]:
    by_name = {row["name"]: row for row in layers}
    return [by_name[row["name"]] for row in sheet.rows]


# --- the layers ---


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
    ways = {m["computed"] for m in members if m["computed"]}
    return {
        "name": name,
        "kind": f"{kind} x{len(members)}" if kind else f"{len(members)} rows",
        "role": agreed("role"),
        "pattern": ", ".join(dict.fromkeys(m["pattern"] for m in members if m["pattern"])) or None,
        "status": agreed("status") or "mixed",
        "reason": None,
        **total,
        "ratio": total["transformed_macs"] / total["dense_macs"] if total["dense_macs"] else None,
        "density": total["nnz"] / total["weights"] if total["weights"] else None,
        "shape": None,
        "computed": "mixed" if len(ways) > 1 else next(iter(ways), None),
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
        Column("executed_ratio", "executed (kernels)", lambda v: f"{v:.2f}x", right=True, priority=2),
        Column("executed_masked_ratio", "executed (masked)", lambda v: f"{v:.2f}x", right=True, priority=3),
        Column("body_density", "body density", lambda v: f"{v:.5f}", right=True, priority=3),
        Column("params", "parameters", integer, right=True, priority=4),
        Column("nonzero_params", "non-zero", integer, right=True, priority=3),
        Column("activation_factor", "activations", lambda v: f"{v:.2f}x", right=True, priority=3),
        Column("note", "note", priority=1),
    ]
    columns = [c for c in columns if not c.key.startswith("executed") or any(c.key in entry for entry in entries)]
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
        "note": chosen_in_words(result.plan.layers) if is_chosen(result.plan.spec.pattern) else None,
        **_executed(result, result.plan),
    }


def _executed(result: Audit, plan: Plan) -> dict[str, float]:
    """Training FLOPs that are executed over the dense model's, with block kernels on a GPU and without; {} where none can be."""
    if not has_structure(plan.layers) or not result.dense.training_macs:
        return {}
    kernels, masked = (result.executed(kernels=on).training_macs / result.dense.training_macs for on in (True, False))
    return {"executed_ratio": float(kernels), "executed_masked_ratio": float(masked)}


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
