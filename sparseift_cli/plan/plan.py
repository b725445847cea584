"""The Plan: what a transform will do to each layer. A pure function of (LayerTable, TransformSpec); no torch; JSON out.

Every command makes the plan once and prints from it, so that its numbers cannot disagree. Sizes, ranks and branch counts
are chosen first, as integers; then each layer gets an integer number of non-zeros within its FLOP budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar

from ..base.sheets import ShownAsSheets
from ..errors import UsageError
from ..table.poly import Poly
from ..table.table import Layer, LayerTable
from .budget import allocate_nonzeros
from .layer_patterns import allocate_in_patterns
from .layer_plan import LayerPlan, left_alone
from .members import MEMBERS, DenseLayer, Member
from .selection import require_matches, selected
from .spec import TrainingSpec, TransformSpec
from .widening import Widening

SCHEMA = "sparseift.plan/1"

_WHY_UNTOUCHED = {
    "input": "input layer",
    "output": "output layer",
    "attention": "attention product",
    "norm": "norm, no MACs",
    "embedding": "look-up, no MACs",
}


@dataclass(frozen=True, repr=False)
class Plan(ShownAsSheets):
    """The transform of one table: new sizes of all widths, and what happens to every row.

    Args:
        table: the dense model, attention counted in full.
        spec: what was asked for.
        training: whose cost was matched, under `match train`.
        sizes: the new size of every width, by id.
        layers: one plan a row, in the order of the table.
        scale: model or train match: the factor on the transformed layers' dense cost.
        widening: how the widths were chosen, by a member that changes widths.
        causal: how attention under a causal mask was counted: `full`, `half` or `exact`.
    """

    sheets_by: ClassVar[str] = "sparseift_cli.plan.sheets:plan_sheets"

    table: LayerTable
    spec: TransformSpec
    training: TrainingSpec
    sizes: list[int]
    layers: tuple[LayerPlan, ...]
    scale: Fraction | None = None
    widening: Widening | None = None
    causal: str = "full"

    @property
    def member(self) -> Member:
        """The member that made it."""
        return MEMBERS.get(self.spec.member)

    @property
    def grown_by_products(self) -> list[str]:
        """Names of what the model returns beside its outputs and that changes its shape: hidden_states, past_key_values."""
        changed = {i for i, (new, old) in enumerate(zip(self.sizes, self.table.sizes, strict=True)) if new != old}
        return [name for name, widths in self.table.by_products.items() if changed & set(widths)]

    @property
    def outputs_of_stream(self) -> list[str]:
        """Names of the outputs that keep the width of a residual stream; an output that is a tensor has an empty name."""
        kept = (w for w, new in zip(self.table.widths, self.sizes, strict=True) if w.residual and new == w.size)
        return list(dict.fromkeys(name for width in kept for name in width.outputs))

    def to_json(self) -> dict[str, Any]:
        widths = [
            {"name": self.table.widths[w.id].name, "dense": w.dense, "size": w.size, "ideal": w.ideal}
            for w in (self.widening.widened if self.widening else ())
        ]
        return {
            "schema": SCHEMA,
            "model": self.table.model,
            "input": list(self.table.input),
            "spec": self.spec.to_json(),
            "scale": None if self.scale is None else float(self.scale),
            "free_widths": widths,
            "sizes": self.sizes,
            "layers": [layer.to_json() for layer in self.layers],
        }


def make_plan(
    table: LayerTable,
    spec: TransformSpec,
    training: TrainingSpec | None = None,
    *,
    causal: str = "full",
    sizes: Sequence[int] | None = None,
) -> Plan:
    """Plan a transform.

    Args:
        table: the dense model.
        spec: what is asked for.
        training: how training FLOPs are counted; it changes the plan only where they are matched.
        causal: how attention under a causal mask is counted; it changes the plan only where the model's FLOPs are matched.
        sizes: of every width by id, where they were chosen before, maybe by another version: those of a stored plan.

    Raises:
        UsageError: nothing in the model can be transformed as asked, or `causal` is not full, half or exact.
        CheckFailed: no density can match the model's budget.
    """
    training = training or TrainingSpec()
    member, counted = MEMBERS.get(spec.member), with_causal(table, causal)
    require_matches(table, spec)
    widening = member.widen(counted, spec)
    if widening and sizes is not None and len(sizes) == len(widening.sizes):
        widening = widening.at(sizes)
    new_sizes = widening.sizes if widening else list(table.sizes)
    layers = [_plan_layer(member, DenseLayer(row, counted, spec, widening)) for row in counted.layers]
    if not any(p.status == "transformed" for p in layers) and spec.density < 1:
        reasons = sorted({p.reason for p in layers if p.layer.macs.terms and p.layer.role == "body"}) or [
            "it has no body layers"
        ]
        raise UsageError(f"{member.title} leaves every layer of {table.model} as it is: {'; '.join(reasons[:4])}")
    layers, scale = allocate_in_patterns(
        layers, spec, new_sizes, lambda rows: allocate_nonzeros(rows, spec, training, widening)
    )
    return Plan(table, spec, training, new_sizes, tuple(layers), scale, widening, causal)


def dense_layers(table: LayerTable) -> list[LayerPlan]:
    """Every row as it is, before any transform."""
    return [left_alone(row, table.sizes, table.sizes, "") for row in table.layers]


def _plan_layer(member: Member, dense: DenseLayer) -> LayerPlan:
    reason = _why_untouched(dense.layer, dense.spec)
    return member.plan_layer(dense) if reason is None else dense.untouched(reason)


def _why_untouched(layer: Layer, spec: TransformSpec) -> str | None:
    """Why no member transforms a row, whichever it is; None where the member decides."""
    if not layer.weighted or layer.role != "body":
        if layer.role == "body":
            return layer.note or ""
        return "parameter, no MACs" if layer.kind == "parameter" else _WHY_UNTOUCHED[layer.role]
    if layer.tied_to:
        return f"weight shared with {layer.tied_to}"
    if layer.note:
        return layer.note
    return None if selected(layer, spec) else "left out by --include/--exclude"


def with_causal(table: LayerTable, causal: str) -> LayerTable:
    """The table with attention products under a causal mask counted in `full`, `half` or `exact` (T (T + 1) / 2 pairs).

    Raises:
        UsageError: another word, or half of an odd number of query-key pairs.
    """
    if causal == "full":
        return table
    if causal not in ("half", "exact"):
        raise UsageError(f"unknown causal count {causal!r}", hint="full, half or exact")

    def share_of(queries: int, keys: int) -> Fraction:
        if causal == "half":
            return Fraction(1, 2)
        return Fraction(sum(min(i + 1, keys) for i in range(queries)), queries * keys)

    layers = []
    for row in table.layers:
        if row.causal:
            share = share_of(*row.causal)
            terms = [(m, c * share) for m, c in row.macs.terms]
            if any(c.denominator != 1 for _, c in terms):
                raise UsageError(
                    f"half of {row.name}'s query-key pairs is not a whole number", hint="use --causal exact"
                )
            row = replace(row, macs=Poly((m, int(c)) for m, c in terms))
        layers.append(row)
    return replace(table, layers=tuple(layers))


def counted_anew(plan: Plan, causal: str) -> Sequence[LayerPlan]:
    """The rows of a plan with attention under a causal mask counted otherwise; its non-zeros are what they are."""
    if causal == plan.causal:
        return plan.layers
    rows = []
    for old, row in zip(plan.layers, with_causal(plan.table, causal).layers, strict=True):
        if row.causal:
            dense, new = row.macs.evaluate(plan.table.sizes), row.macs.evaluate(plan.sizes)
            old = replace(old, layer=row, dense_macs=dense, product_macs=new)
        rows.append(old)
    return rows
