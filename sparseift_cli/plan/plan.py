"""The Plan: what a transform will do to each layer. A pure function of (LayerTable, TransformSpec); no torch; JSON out.

Every command prints from the plan, so they cannot disagree. Sizes, ranks and branch counts are chosen first, as integers;
then each layer gets an integer number of non-zeros that spends its FLOP budget and never exceeds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from ..errors import UsageError
from ..table.table import Layer, LayerTable
from .budget import spend
from .isoflop import branches, doped_rank, factorized_rank, factors
from .layer_plan import LayerPlan, Part, Status
from .members.wide import Grown, Growth, grow, require_matches, selected
from .spec import TrainingSpec, TransformSpec

SCHEMA = "sparseift.plan/1"

_WHY_LEFT_ALONE = {
    "input": "input layer",
    "output": "output layer",
    "attention": "attention product",
    "norm": "norm, no MACs",
    "embedding": "look-up, no MACs",
}


@dataclass(frozen=True)
class Plan:
    """The transform of one table: new sizes of all widths, and every row's fate."""

    table: LayerTable
    spec: TransformSpec
    training: TrainingSpec
    sizes: list[int]
    grown: tuple[Grown, ...]
    layers: tuple[LayerPlan, ...]
    scale: Fraction | None = None  # model or train match: the factor on the transformed layers' cost
    growth: Growth | None = None

    def to_json(self) -> dict[str, Any]:
        widths = [
            {"name": self.table.widths[g.id].name, "dense": g.dense, "size": g.size, "ideal": g.ideal}
            for g in self.grown
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


def make_plan(table: LayerTable, spec: TransformSpec, training: TrainingSpec | None = None) -> Plan:
    """Plan a transform; `training` matters only where training FLOPs are matched.

    Raises:
        UsageError: nothing in the model can be transformed as asked.
        CheckFailed: no density can match the model's budget.
    """
    training = training or TrainingSpec()
    require_matches(table, spec)
    growth = grow(table, spec) if spec.member == "sparse_wide" else None
    sizes = growth.sizes if growth else list(table.sizes)
    layers = [_plan_layer(layer, table, spec, growth, sizes) for layer in table.layers]
    if not any(p.status == "transformed" for p in layers) and spec.density < 1:
        reasons = sorted({p.reason for p in layers if p.layer.macs.terms and p.layer.role == "body"}) or [
            "it has no body layers"
        ]
        raise UsageError(f"{spec.member} leaves every layer of {table.model} as it is: {'; '.join(reasons[:4])}")
    layers, scale = spend(layers, table, spec, training, growth)
    return Plan(table, spec, training, sizes, growth.grown if growth else (), tuple(layers), scale, growth)


def dense_layers(table: LayerTable) -> list[LayerPlan]:
    """Every row as it is, before any transform."""
    return [_left_alone(row, row.macs.evaluate(table.sizes), table.sizes, "") for row in table.layers]


def _plan_layer(
    layer: Layer, table: LayerTable, spec: TransformSpec, growth: Growth | None, sizes: list[int]
) -> LayerPlan:
    dense_macs = layer.macs.evaluate(table.sizes)
    if not layer.weighted or layer.role != "body":
        return _left_alone(layer, dense_macs, sizes, _why_left_alone(layer))
    if layer.tied_to:
        return _left_alone(layer, dense_macs, sizes, f"weight shared with {layer.tied_to}")
    if layer.note:
        return _left_alone(layer, dense_macs, sizes, layer.note)
    if not selected(layer, spec):
        return _left_alone(layer, dense_macs, sizes, "left out by --include/--exclude")
    if growth is not None:
        return _plan_wide(layer, table, spec, growth, dense_macs)
    return _plan_local(layer, table, spec, dense_macs)


def _why_left_alone(layer: Layer) -> str:
    if layer.role == "body":
        return layer.note or ""
    return "parameter, no MACs" if layer.kind == "parameter" else _WHY_LEFT_ALONE[layer.role]


def _left_alone(layer: Layer, dense_macs: int, sizes: list[int], reason: str) -> LayerPlan:
    macs = layer.macs.evaluate(sizes)
    shape = layer.shape(sizes)
    parts = (Part("weight", shape, True, shape.weights),) if layer.weighted else ()
    status: Status = "boundary" if layer.role in ("input", "output") and macs != dense_macs else "untouched"
    if status == "boundary":
        reason = f"{reason}: follows the wider stream, stays dense"
    if layer.note:
        reason = layer.note
    return LayerPlan(
        layer, status, reason, dense_macs, macs, layer.params.evaluate(sizes), layer.activations.evaluate(sizes), parts
    )


def _plan_wide(layer: Layer, table: LayerTable, spec: TransformSpec, growth: Growth, dense_macs: int) -> LayerPlan:
    sizes = growth.sizes
    shape = layer.shape(sizes)
    grows = shape.weights != layer.shape(table.sizes).weights
    if not (growth.reaches(layer) if spec.scope == "none" else grows):
        return _left_alone(layer, dense_macs, sizes, growth.why_not(layer))
    if layer.kind == "depthwise" and spec.depthwise == "dense":
        fate = "stays dense and grows" if grows else "stays dense"
        return _left_alone(layer, dense_macs, sizes, f"depthwise: {fate} (--depthwise sparse to mask it)")
    part = Part("weight", shape, False, shape.weights)
    macs = layer.macs.evaluate(sizes)
    params, activations = layer.params.evaluate(sizes), layer.activations.evaluate(sizes)
    return LayerPlan(layer, "transformed", "", dense_macs, macs, params, activations, (part,))


def norm_inside(layer: Layer, table: LayerTable, spec: TransformSpec) -> Literal["batch_norm", "layer_norm"] | None:
    """The norm of 2 parameters a channel that stands inside a member: the model's own kind, after convolutions."""
    inside = spec.branch_activation == "each" if spec.member == "sparse_parallel" else spec.inner != "linear"
    if spec.member == "sparse_doped" or layer.projection or not inside or spec.norm == "none":
        return None
    if layer.kernel:
        follows = spec.norm == "batch_norm" or any(row.kind == "batch_norm" for row in table.layers)
        return "batch_norm" if follows else None
    return "layer_norm" if spec.member == "sparse_factorized" and spec.inner == "norm" else None


def activation_inside(layer: Layer, spec: TransformSpec) -> bool:
    """Does a non-linearity stand inside a member? Never in an attention projection, nor in Doped: it follows the sum."""
    if layer.projection or spec.activation == "none":
        return False
    if spec.member == "sparse_parallel":
        return spec.branch_activation == "each"
    return spec.member == "sparse_factorized" and spec.inner == "activation"


def _plan_local(layer: Layer, table: LayerTable, spec: TransformSpec, dense_macs: int) -> LayerPlan:
    sizes, shape = table.sizes, layer.shape(table.sizes)
    if layer.projection and spec.projections == "untouched":
        return _left_alone(
            layer, dense_macs, sizes, "attention projection: without a non-linearity its parts fold into one matrix"
        )
    if layer.kind == "conv_transpose":
        return _left_alone(layer, dense_macs, sizes, "transposed convolution: only Sparse Wide reaches it")
    if layer.host:
        return _left_alone(layer, dense_macs, sizes, f"its weight is used by {layer.host}: only Sparse Wide reaches it")
    if spec.density == 1:
        return _left_alone(layer, dense_macs, sizes, "sparsity 0 changes nothing")
    activations, params = layer.activations.evaluate(sizes), layer.params.evaluate(sizes)
    bias = max(0, params - shape.weights)
    norm = 2 if norm_inside(layer, table, spec) else 0
    if spec.member == "sparse_parallel":
        count = branches(spec.density)
        parts = tuple(Part(f"branch {i}", shape, False, shape.weights) for i in range(count))
        each = spec.branch_activation == "each"
        extra = count * (bias + norm * shape.outputs) if each else bias
        detail = f"{count} branches, realised sparsity {1 - 1 / count:.4g}"
        activations *= count
    elif spec.member == "sparse_factorized":
        rank = factorized_rank(shape, spec.density)
        u, v = factors(shape, rank)
        parts = (Part("U", u, False, u.weights), Part("V", v, False, v.weights))
        extra = bias + norm * u.outputs
        detail = f"rank {rank}"
        activations += activations * u.outputs // shape.outputs
    else:
        rank = doped_rank(shape, spec.density)
        if rank == 0:
            return _left_alone(layer, dense_macs, sizes, "rank 0: too small for a low-rank part")
        u, v = factors(shape, rank)
        copy = Part("sparse", shape, False, shape.weights)
        parts = (Part("U", u, True, u.weights), Part("V", v, True, v.weights), copy)
        extra = bias
        detail = f"rank {rank}"
        activations += activations + activations * u.outputs // shape.outputs
    weights = sum(p.shape.weights for p in parts)
    macs = dense_macs // shape.weights * weights
    return LayerPlan(layer, "transformed", "", dense_macs, macs, weights + extra, activations, parts, detail)
