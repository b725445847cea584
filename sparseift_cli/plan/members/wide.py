"""Sparse Wide: every inner width grows, and the layers between them are sparse (Sparse-IFT, section 3.1).

Which widths may grow, and to what: `widen` solves the equations between the widths of the whole model (`plan.widths`) and
gives every size of the widened one. With scope `all` each grows by k = sqrt(1/d), so that a layer widened on both sides has
1/d times the weights and density d. With scope `inner` only those grow that no residual stream, input, output or attention
product shares.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import ceil, floor, gcd, isqrt, lcm
from typing import TYPE_CHECKING

from ...errors import UsageError
from ...table.table import Layer, LayerTable
from ..layer_plan import LayerPlan, Part, positions_of
from ..selection import may_grow, selected
from ..widening import WidenedWidth, Widening, body_widths, free_widths, kept_in_words
from ..widths import Free, Solution, solve
from .base import DenseLayer, Member

if TYPE_CHECKING:
    from ..spec import TransformSpec


class Wide(Member):
    """Every inner width times sqrt(1/d) (scope all), or the inner ones of blocks alone; each layer at its own density."""

    name = "wide"
    title = "Sparse Wide"
    help = "every inner width times sqrt(1/d), the layers between them sparse"
    order = 1
    torch_half = "sparseift_cli.transforms.members.wide:SparseWide"

    def check(self, spec: TransformSpec) -> None:
        """Scope none widens nothing, so it can match no budget and set no width."""
        if spec.scope != "none":
            return
        what = "scope none widens nothing: the same layers get sparse at their dense size"
        if spec.match != "off":
            raise UsageError(
                f"{what}, at fewer FLOPs than the dense model's, so match {spec.match} cannot be held",
                hint="use it with match off",
            )
        if spec.base_width is not None:
            raise UsageError(f"{what}, so base width {spec.base_width} contradicts it", hint="leave one of them out")

    def widen(self, table: LayerTable, spec: TransformSpec) -> Widening:
        return widen(table, spec)

    def plan_layer(self, dense: DenseLayer) -> LayerPlan:
        layer, spec, widening = dense.layer, dense.spec, dense.widening
        assert widening is not None
        shape = layer.shape(widening.sizes)
        grows = shape.weights != dense.shape.weights
        if not (widening.may_widen(layer) if spec.scope == "none" else grows):
            return dense.untouched(widening.why_not(layer))
        if layer.kind == "depthwise" and spec.depthwise == "dense":
            stays = "stays dense and grows" if grows else "stays dense"
            return dense.untouched(f"depthwise: {stays} (--depthwise sparse to mask it)")
        return LayerPlan(
            layer=layer,
            status="transformed",
            dense_macs=layer.macs.evaluate(dense.table.sizes),
            positions=positions_of(layer, widening.sizes),
            params=layer.params.evaluate(widening.sizes),
            activations=layer.activations.evaluate(widening.sizes),
            parts=(Part.full("weight", shape),),
        )


MEMBER = Wide()


def scaled_width(width: int, square: Fraction, multiple: int = 1, *, offset: int = 0, down: bool = False) -> int:
    """The multiple of `multiple`, plus `offset`, nearest to width * sqrt(square), ties up, never below the dense width.

    Args:
        width: the dense width.
        square: the squared scale: 1/d for Sparse Wide (k = sqrt(1/d)).
        multiple: what the result is a multiple of.
        offset: what is added to that multiple: fewer.
        down: take the largest multiple not above the ideal instead, as patterns of fixed density need to stay within the
            budget.

    >>> scaled_width(64, Fraction(2))  # 90.51
    91
    """
    target = square * width * width
    if down:
        steps = (isqrt(floor(target)) - offset) // multiple
    else:  # largest n with (n - 1/2) * multiple + offset <= sqrt(target)
        steps = (isqrt(floor(4 * target)) + multiple - 2 * offset) // (2 * multiple)
    return max(steps, ceil(Fraction(width - offset, multiple))) * multiple + offset


def widen(table: LayerTable, spec: TransformSpec) -> Widening:
    """Choose the new sizes. With scope none they are the dense ones, and `candidates` is what scope all could widen.

    Raises:
        UsageError: no width can grow, `width_multiple` rounds one back to its dense size, or one that is a difference of
            others has no size.
    """
    freed = [w.outputs and all(may_grow(name, spec) for name in w.outputs) for w in table.widths]
    widths = [replace(w, fixed=None) if free else w for w, free in zip(table.widths, freed, strict=True)]
    solution = solve(widths, table.equations, spec.heads)
    candidates = _eligible(table, spec, solution)
    if spec.density == 1:
        return Widening(table, spec, solution, (), list(table.sizes))
    if not candidates:
        raise UsageError(
            f"{table.model} has no width that Sparse Wide can grow: {_why_none(table, spec, solution)}",
            hint="try --scope all, or another member: --transform parallel|factorized|doped",
        )
    if spec.scope == "none":
        return Widening(table, spec, solution, (), list(table.sizes), frozenset(candidates))
    sides = _widened_sides(table, spec, solution, candidates)
    base = _base(table) if spec.base_width else None
    widened = []
    for free in solution.free:
        if free.id not in candidates:
            continue
        square = (1 / spec.density) ** (2 // sides[free.id])
        if base:
            square = Fraction(spec.base_width or 0, base) ** 2
        multiple, offset = _grid(free, _multiple(table, solution, free.id, spec), table)
        size = scaled_width(free.size, square, multiple, offset=offset, down=spec.mask_pattern.density is not None)
        if size <= free.size and spec.width_multiple > 1:
            ideal = free.size * float(square) ** 0.5
            raise UsageError(
                f"width {table.widths[free.id].name} would go {free.size} -> {ideal:.1f} -> {size}: a multiple of "
                f"{spec.width_multiple} leaves it as it is",
                hint="use a smaller --width-multiple or a higher sparsity",
            )
        widened.append(WidenedWidth(free.id, free.size, size, free.size * float(square) ** 0.5, sides[free.id]))
    try:
        sizes = solution.sizes({w.id: w.size for w in widened})
    except ValueError as error:  # a width is a difference of others, and they do not grow alike
        raise UsageError(
            f"the widths of {table.model} do not grow together at sparsity {spec.sparsity}: {error}",
            hint="another sparsity or --width-multiple, or --exclude the layers around it",
        ) from None
    return Widening(table, spec, solution, tuple(widened), sizes, frozenset(candidates))


def _eligible(table: LayerTable, spec: TransformSpec, solution: Solution) -> set[int]:
    """Free widths that may grow: nothing deselected touches them, and for scope inner nothing shared depends on them."""
    free = {f.id for f in solution.free}
    for layer in table.layers:
        deselected = layer.weighted and layer.role == "body" and not selected(layer, spec)
        boundary = spec.scope == "inner" and layer.weighted and layer.role in ("input", "output")
        if deselected or boundary or _stays_dense(layer):
            for width in layer.inputs.variables | layer.outputs.variables:
                free -= set(solution.free_widths(width))
    if spec.scope == "inner":
        for i, width in enumerate(table.widths):
            if width.residual or width.attention:
                free -= set(solution.free_widths(i))
        for layer in table.layers:
            if layer.role == "embedding":
                for width in layer.params.variables:
                    free -= set(solution.free_widths(width))
    return free & _touching_weights(table, spec, solution)


def _stays_dense(layer: Layer) -> bool:
    """Whether a layer of the body would cost more if it were wider; depthwise layers are left to their option."""
    return layer.role == "body" and bool(layer.note and layer.macs.terms) and layer.kind != "depthwise"


def _touching_weights(table: LayerTable, spec: TransformSpec, solution: Solution) -> set[int]:
    """Free widths that the weight of some transformable layer has. Others (a count) gain nothing by growing."""
    rotary = [i for i, w in enumerate(table.widths) if w.name.rpartition(".")[2].startswith("inv_freq")]
    touched = free_widths(solution, rotary)  # a rotary part of a head keeps its proportion to the head
    for layer in table.layers:
        if layer.weighted and layer.role == "body" and selected(layer, spec):
            touched |= free_widths(solution, layer.inputs.variables | layer.outputs.variables)
    return touched


def _widened_sides(table: LayerTable, spec: TransformSpec, solution: Solution, candidates: set[int]) -> dict[int, int]:
    """On how many sides (inputs, outputs) the layers around each free width grow: m, and the width grows by d ** (-1/m).

    A layer that grows on both sides has d ** (-2/m) times the weights, so m = 2 keeps its density at d. Widths that a
    layer connects need one m: union-find over the layers gives groups of widths, and a group with such a layer has m = 2.
    """
    if spec.scope == "all":
        return dict.fromkeys(candidates, 2)
    parent = {v: v for v in candidates}
    both: set[int] = set()

    def find(v: int) -> int:
        while parent[v] != v:
            v = parent[v]
        return v

    for layer in table.layers:
        stays_dense = layer.kind == "depthwise" and spec.depthwise == "dense"
        if not layer.weighted or layer.role != "body" or stays_dense:
            continue
        inputs = free_widths(solution, layer.inputs.variables) & candidates
        outputs = free_widths(solution, layer.outputs.variables) & candidates
        touched = sorted(inputs | outputs)
        for v in touched[1:]:
            parent[find(v)] = find(touched[0])
        if inputs and outputs:
            both.add(touched[0])
    roots = {find(v) for v in both}
    return {v: 2 if find(v) in roots else 1 for v in candidates}


def _base(table: LayerTable) -> int:
    """The stem's output width: what --base-width replaces."""
    for layer in table.layers:
        if layer.role == "input" and layer.weighted:
            return layer.outputs.evaluate(table.sizes)
        if layer.kind == "embedding":
            return min(table.sizes[v] for v in layer.params.variables)
    raise UsageError(f"{table.model} has no input layer, so --base-width has no width to set")


def _multiple(table: LayerTable, solution: Solution, free: int, spec: TransformSpec) -> int:
    """The step of a free width that makes every weight width proportional to it a multiple of --width-multiple."""
    wanted = lcm(spec.width_multiple, spec.mask_pattern.width_multiple)
    step = 1
    for i, form in enumerate(solution.affine):
        if wanted > 1 and set(form) == {free} and table.widths[i].kind == "width":
            step = lcm(step, wanted // gcd(wanted, int(form[free]) or 1))
    return step


def _grid(free: Free, wanted: int, table: LayerTable) -> tuple[int, int]:
    """(multiple, offset) of the sizes of a free width that are whole steps from its dense one and multiples of `wanted`.

    A width of 88 that is split into chunks of (88 + 2) / 3 moves in steps of 3 from 88: 91, 94.
    """
    multiple = lcm(free.step, wanted)
    for offset in range(0, multiple, wanted):
        if (offset - free.size) % free.step == 0:
            return multiple, offset
    raise UsageError(
        f"width {table.widths[free.id].name} moves in steps of {free.step} from {free.size}, so it meets no multiple of {wanted}",
        hint="use another --width-multiple or pattern",
    )


def _why_none(table: LayerTable, spec: TransformSpec, solution: Solution) -> str:
    if table.untraceable:
        return f"its widths could not be traced ({table.untraceable})"
    if spec.include or spec.exclude:
        return "--include and --exclude leave none"
    if spec.scope == "inner":
        return "every width is shared by a residual stream, an input, an output or an attention product"
    _, kept = body_widths(table, spec, solution, table.sizes)
    if kept:
        return kept_in_words(kept)
    dense = {layer.note for layer in table.layers if _stays_dense(layer) and layer.note} if solution.free else set()
    if dense:
        return f"every width is one of layers that stay dense ({'; '.join(sorted(dense))})"
    return "every width is tied to a fixed size (" + "; ".join(sorted(set(solution.reasons.values()))[:3]) + ")"
