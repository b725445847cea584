"""The proof: the transformed module is traced again, its masks are counted, and every row must cost what was planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from ..errors import CheckFailed
from ..plan.plan import Plan
from ..table.table import Layer
from ..trace.build import Traced, trace
from .edits import Surgery

SHOWN = 5


@dataclass(frozen=True, slots=True)
class Measured:
    """What the transformed module does: MACs and parameters of every planned row, and totals. Exact integers."""

    macs: dict[str, Fraction]
    forward_macs: int
    params: int
    nonzero_params: int
    rows: int


def measure(
    model: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    plan: Plan,
    surgery: Surgery,
    masks: Mapping[str, Tensor] | None,
) -> tuple[Measured, Traced]:
    """Trace `model` with plain sizes and count it; a masked weight's share of its MACs is its mask's popcount.

    Without `masks` (a module on meta) the planned numbers of non-zeros stand in for the popcounts.
    """
    traced = trace(model, inputs, kwargs, name=plan.table.model, input_shape=plan.table.input, symbolic=False)
    counts = {m.key: m.nnz if masks is None else int(masks[m.key].count_nonzero()) for m in surgery.masked}
    owner = {m.key: m.layer for m in surgery.masked}
    replaced = {edit.path for edit in surgery.members}
    macs: dict[str, Fraction] = {}
    zeros = 0
    for row in traced.table.layers:
        cost = Fraction(row.macs.evaluate(()))
        if row.weight in counts:
            weights = model.get_parameter(row.weight).numel()
            cost = cost * counts[row.weight] / weights
            zeros += weights - counts[row.weight]
        name = owner.get(row.weight or "") or _replaced_row(row, replaced)
        macs[name] = macs.get(name, Fraction(0)) + cost
    params = sum(p.numel() for p in model.parameters())
    total = sum(macs.values(), Fraction(0))
    return Measured(macs, round(total), params, params - zeros, len(traced.table.layers)), traced


def _replaced_row(row: Layer, replaced: set[str]) -> str:
    """The planned row that a row of the transformed module belongs to: U and V of `fc` are `fc`."""
    parts = row.name.split(".")
    for n in range(len(parts), 0, -1):
        if ".".join(parts[:n]) in replaced:
            return ".".join(parts[:n])
    return row.name


def require_as_planned(measured: Measured, plan: Plan, before: Traced, after: Traced) -> None:
    """Everything that was planned is what is there, to the MAC.

    Raises:
        CheckFailed: a row, a total or the output shape differs; the message names the first ones.
    """
    problems = []
    planned = {p.layer.name: p for p in plan.layers if p.macs}
    for name, row in planned.items():
        found = measured.macs.get(name, Fraction(0))
        if found != row.macs:
            problems.append(f"{name}: planned {row.macs:,} MACs, measured {float(found):,.0f}")
    for name, found in measured.macs.items():
        if found and name not in planned:
            problems.append(f"{name}: {float(found):,.0f} MACs that were not planned")
    params = sum(p.params for p in plan.layers)
    nonzero = params - sum(p.weights - p.nnz for p in plan.layers)
    for what, want, have in (("parameters", params, measured.params), ("non-zero", nonzero, measured.nonzero_params)):
        if want != have:
            problems.append(f"{what}: planned {want:,}, measured {have:,}")
    if before.structure.output != after.structure.output:
        problems.append(f"the output has shape {after.structure.output}, not {before.structure.output}")
    if problems:
        more = f" (and {len(problems) - SHOWN} more)" if len(problems) > SHOWN else ""
        raise CheckFailed(
            f"the transformed {plan.table.model} is not what was planned: {'; '.join(problems[:SHOWN])}{more}"
        )
