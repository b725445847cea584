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
from ..layer_patterns import blocks_of_widths
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
    rounding = _Rounding(table, solution, spec)
    free = [f for f in solution.free if f.id in candidates]
    squares = {
        f.id: Fraction(spec.base_width or 0, base) ** 2 if base else (1 / spec.density) ** (2 // sides[f.id])
        for f in free
    }
    for whole_blocks in (True, False):
        chosen = {f.id: rounding.size(f, squares[f.id], whole_blocks=whole_blocks) for f in free}
        try:
            sizes = solution.sizes(chosen)
        except ValueError as error:  # a width is a difference of others, and they do not grow alike
            if whole_blocks and rounding.blocks:
                continue
            raise UsageError(
                f"the widths of {table.model} do not grow together at sparsity {spec.sparsity}: {error}",
                hint="another sparsity or --width-multiple, or --exclude the layers around it",
            ) from None
        widened = (WidenedWidth(f.id, f.size, chosen[f.id], _ideal(f, squares[f.id]), sides[f.id]) for f in free)
        return Widening(table, spec, solution, tuple(widened), sizes, frozenset(candidates))
    raise AssertionError("widths of whole blocks or of none")


def _ideal(free: Free, square: Fraction) -> float:
    return free.size * float(square) ** 0.5


class _Rounding:
    """How the ideal size of a free width becomes a whole one: a multiple of what the spec asks for, and of a block if possible.

    In a layer of whole blocks no weight is in none. But a small width has no multiple of a large block near to its ideal: then
    smaller ones are tried.
    """

    def __init__(self, table: LayerTable, solution: Solution, spec: TransformSpec) -> None:
        self.table, self.solution, self.spec = table, solution, spec
        pattern = spec.mask_pattern
        self.fixed = pattern is not None and pattern.density is not None
        self.wanted = lcm(spec.width_multiple, pattern.width_multiple if pattern and self.fixed else 1)
        self.blocks, self.near = blocks_of_widths(spec)

    def size(self, free: Free, square: Fraction, *, whole_blocks: bool) -> int:
        """The new size of a width that grows by the root of `square`.

        Raises:
            UsageError: `width_multiple` rounds it back to its dense size, or no size is a multiple of what it has to be.
        """
        for block in self.blocks if whole_blocks else ():
            size = self._of_blocks(free, square, block)
            if size is not None:
                return size
        multiple, offset = self._grid(free, _multiple(self.table, self.solution, free.id, self.wanted))
        size = scaled_width(free.size, square, multiple, offset=offset, down=self.fixed)
        if size <= free.size and self.spec.width_multiple > 1:
            raise UsageError(
                f"width {self.table.widths[free.id].name} would go {free.size} -> {_ideal(free, square):.1f} -> {size}: a "
                f"multiple of {self.spec.width_multiple} leaves it as it is",
                hint="use a smaller --width-multiple or a higher sparsity",
            )
        return size

    def _of_blocks(self, free: Free, square: Fraction, block: int) -> int | None:
        """The nearest size above the dense one that makes whole blocks; None where it is not near to the ideal, or where there
        is none.
        """
        try:
            multiple, offset = self._grid(free, _multiple(self.table, self.solution, free.id, lcm(self.wanted, block)))
        except UsageError:
            return None
        size = scaled_width(free.size, square, multiple, offset=offset)
        size += multiple if size <= free.size else 0
        low, high = ((1 + sign * self.near) ** 2 * square * free.size**2 for sign in (-1, 1))
        return size if low <= size**2 <= high else None

    def _grid(self, free: Free, wanted: int) -> tuple[int, int]:
        """(multiple, offset) of the sizes of a free width that are whole steps from its dense one and multiples of `wanted`.

        A width of 88 that is split into chunks of (88 + 2) / 3 moves in steps of 3 from 88: 91, 94.
        """
        multiple = lcm(free.step, wanted)
        for offset in range(0, multiple, wanted):
            if (offset - free.size) % free.step == 0:
                return multiple, offset
        raise UsageError(
            f"width {self.table.widths[free.id].name} moves in steps of {free.step} from {free.size}, so it meets no multiple of "
            f"{wanted}",
            hint="use another --width-multiple or pattern",
        )


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


def _multiple(table: LayerTable, solution: Solution, free: int, wanted: int) -> int:
    """The step of a free width that makes every weight width proportional to it a multiple of `wanted`."""
    step = 1
    for i, form in enumerate(solution.affine):
        if wanted > 1 and set(form) == {free} and table.widths[i].kind == "width":
            step = lcm(step, wanted // gcd(wanted, int(form[free]) or 1))
    return step


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
