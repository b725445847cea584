"""What runs without masks compute. Pure.

The audit of a transformed model has the plan's layers, whatever trains it. Algorithm `dense` opens every mask: such a run has
the plan's widths, and neither its sparsity nor its FLOPs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..table.shape import Shape


def without_masks(audit: Mapping[str, Any]) -> bool:
    """Is it of a transformed model that is trained without masks?"""
    trained = audit.get("training")
    return bool(audit.get("transform")) and isinstance(trained, Mapping) and trained.get("algorithm") == "dense"


def as_trained(audit: Mapping[str, Any]) -> Mapping[str, Any]:
    """The audit; of a run without masks, its `layers` and its `totals` of a forward pass are those that it trained."""
    if not without_masks(audit):
        return audit
    block = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", str(audit["transform"].get("pattern")))
    unit = (int(block[1]), int(block[2])) if block else None
    layers = [_opened(row, unit) for row in audit.get("layers", ())]
    totals = dict(audit.get("totals") or {})
    if after := totals.get("transformed"):
        macs, nnz = (
            sum((new.get(key) or 0) - (old.get(key) or 0) for new, old in zip(layers, audit["layers"], strict=True))
            for key in ("transformed_macs", "nnz")
        )
        more = {"forward_macs": macs, "forward_flops": macs * audit.get("flops_per_mac", 2), "nonzero_params": nnz}
        totals["transformed"] = {**after, **{key: after[key] + by for key, by in more.items() if key in after}}
    return {**audit, "layers": layers, "totals": totals}


def _opened(row: Mapping[str, Any], block: tuple[int, int] | None) -> Mapping[str, Any]:
    """A transformed row with all its weights, or with all that lie in whole blocks, each used as often as before."""
    if row["status"] != "transformed" or not row.get("nnz") or not row.get("weights"):
        return row
    nnz = row["weights"] if block is None else sum(_whole(part, *block) for part in row["parts"])
    macs = row["transformed_macs"] * nnz // row["nnz"]
    ratio = macs / row["dense_macs"] if row["dense_macs"] else None
    return {**row, "nnz": nnz, "transformed_macs": macs, "ratio": ratio, "density": nnz / row["weights"]}


def _whole(part: Mapping[str, Any], rows: int, columns: int) -> int:
    shape = Shape(*(part[key] for key in ("inputs", "outputs", "taps", "groups")))
    return part["nnz"] if part["dense"] else shape.blocks(rows, columns) * rows * columns
