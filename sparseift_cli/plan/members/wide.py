"""Sparse Wide: which widths grow, and to what. Pure; the plan calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from math import gcd, lcm

from ...errors import UsageError, did_you_mean
from ...table.table import Layer, LayerTable
from ..isoflop import scaled_width
from ..spec import TransformSpec
from ..widths import Solution, solve


@dataclass(frozen=True, slots=True)
class Grown:
    """A free width that grows: by density ** (-1 / sides), rounded to `size`."""

    id: int
    dense: int
    size: int
    ideal: float
    sides: int


@dataclass(frozen=True)
class Growth:
    """Every width of the widened model, and the free widths that drive it."""

    table: LayerTable
    spec: TransformSpec
    solution: Solution
    grown: tuple[Grown, ...]
    sizes: list[int]
    reach: frozenset[int] = frozenset()
    """Free widths that may grow, whether they do or not."""

    def reaches(self, layer: Layer) -> bool:
        """May a dim of this layer grow?"""
        return bool(_drivers(self.solution, layer.inputs.variables | layer.outputs.variables) & self.reach)

    def ideal_sizes(self, density: float) -> list[float]:
        """All sizes without rounding, at any density: what closed forms are stated in."""
        value = {f.id: float(f.size) for f in self.solution.free}
        value |= {g.id: g.dense * density ** (-1 / g.sides) for g in self.grown}
        return [
            sum(float(c) * (1.0 if v is None else value[v]) for v, c in form.items()) for form in self.solution.affine
        ]

    def why_not(self, layer: Layer) -> str:
        """Why none of a layer's dims grow."""
        widths = sorted(layer.inputs.variables | layer.outputs.variables)
        for i in widths:
            reason = next(
                (self.solution.reasons[v] for v in [i, *self.solution.drivers(i)] if v in self.solution.reasons), None
            )
            if reason:
                return f"its width {self.table.widths[i].name} is kept: {reason}"
        if self.spec.scope == "inner":
            return "its widths are shared by a residual stream, an input, an output or attention (scope inner)"
        return "none of its dims grow"


def selected(layer: Layer, spec: TransformSpec) -> bool:
    """Whether --include and --exclude leave a layer in."""
    inside = not spec.include or any(fnmatchcase(layer.name, g) for g in spec.include)
    return inside and not any(fnmatchcase(layer.name, g) for g in spec.exclude)


def require_matches(table: LayerTable, spec: TransformSpec) -> None:
    """Raise UsageError for an --include or --exclude that names no layer: a slip would go unnoticed."""
    names = [layer.name for layer in table.layers]
    for option, globs in (("include", spec.include), ("exclude", spec.exclude)):
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in names):
                raise UsageError(
                    f"--{option} {glob!r} matches no layer of {table.model}",
                    hint=did_you_mean(glob, names) or "`sparseift inspect` names the layers",
                )


def grow(table: LayerTable, spec: TransformSpec) -> Growth:
    """Choose the new sizes. With scope none they are the dense ones, and `reach` is what scope all could grow.

    Raises:
        UsageError: no width can grow, `width_multiple` rounds one back to its dense size, or one that is a difference of
            others has no size.
    """
    solution = solve(table.widths, table.equations, spec.heads)
    candidates = _eligible(table, spec, solution)
    if spec.density == 1:
        return Growth(table, spec, solution, (), list(table.sizes))
    if not candidates:
        raise UsageError(
            f"{table.model} has no width that Sparse Wide can grow: {_why_none(table, spec, solution)}",
            hint="try --scope all, or another member: --transform parallel|factorized|doped",
        )
    if spec.scope == "none":
        return Growth(table, spec, solution, (), list(table.sizes), frozenset(candidates))
    sides = _sides(table, spec, solution, candidates)
    base = _base(table) if spec.base_width else None
    grown = []
    for free in solution.free:
        if free.id not in candidates:
            continue
        square = (1 / spec.density) ** (2 // sides[free.id])
        if base:
            square = Fraction(spec.base_width or 0, base) ** 2
        multiple = lcm(free.step, _multiple(table, solution, free.id, spec))
        size = scaled_width(free.size, square, multiple, down=spec.n_of_m is not None)
        if size <= free.size and spec.width_multiple > 1:
            ideal = free.size * float(square) ** 0.5
            raise UsageError(
                f"width {table.widths[free.id].name} would go {free.size} -> {ideal:.1f} -> {size}: a multiple of "
                f"{spec.width_multiple} leaves it as it is",
                hint="use a smaller --width-multiple or a higher sparsity",
            )
        grown.append(Grown(free.id, free.size, size, free.size * float(square) ** 0.5, sides[free.id]))
    try:
        sizes = solution.sizes({g.id: g.size for g in grown})
    except ValueError as error:  # a width is a difference of others, and they do not grow alike
        raise UsageError(
            f"the widths of {table.model} do not grow together at sparsity {spec.sparsity}: {error}",
            hint="another sparsity or --width-multiple, or --exclude the layers around it",
        ) from None
    return Growth(table, spec, solution, tuple(grown), sizes, frozenset(candidates))


def _eligible(table: LayerTable, spec: TransformSpec, solution: Solution) -> set[int]:
    """Free widths that may grow: nothing deselected touches them, and for scope inner nothing shared depends on them."""
    free = {f.id for f in solution.free}
    for layer in table.layers:
        deselected = layer.weighted and layer.role == "body" and not selected(layer, spec)
        boundary = spec.scope == "inner" and layer.weighted and layer.role in ("input", "output")
        if deselected or boundary or layer.kind == "experts":  # experts stay dense, so wider ones would cost more
            for width in layer.inputs.variables | layer.outputs.variables:
                free -= set(solution.drivers(width))
    if spec.scope == "inner":
        for i, width in enumerate(table.widths):
            if width.residual or width.attention:
                free -= set(solution.drivers(i))
        for layer in table.layers:
            if layer.role == "embedding":
                for width in layer.params.variables:
                    free -= set(solution.drivers(width))
    return free & _touching_weights(table, spec, solution)


def _touching_weights(table: LayerTable, spec: TransformSpec, solution: Solution) -> set[int]:
    """Free widths that some transformable layer has; the rest (a count nobody multiplies with) gain nothing by growing."""
    rotary = [i for i, w in enumerate(table.widths) if w.name.rpartition(".")[2].startswith("inv_freq")]
    touched = _drivers(solution, rotary)  # a rotary part of a head keeps its proportion to the head
    for layer in table.layers:
        if layer.weighted and layer.role == "body" and selected(layer, spec):
            touched |= _drivers(solution, layer.inputs.variables | layer.outputs.variables)
    return touched


def _drivers(solution: Solution, widths: Sequence[int] | frozenset[int]) -> set[int]:
    return {v for w in widths for v in solution.drivers(w)}


def _sides(table: LayerTable, spec: TransformSpec, solution: Solution, candidates: set[int]) -> dict[int, int]:
    """m per free width: the most sides on which a transformed layer touching it grows, equal across connected widths."""
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
        inputs = _drivers(solution, layer.inputs.variables) & candidates
        outputs = _drivers(solution, layer.outputs.variables) & candidates
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
    wanted = spec.width_multiple if spec.n_of_m is None else lcm(spec.width_multiple, spec.n_of_m[1])
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
    return "every width is tied to a fixed size (" + "; ".join(sorted(set(solution.reasons.values()))[:3]) + ")"
