"""The widths of a widened model, and what they cost at unrounded sizes. Pure; `members/wide.py` chooses them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log
from typing import TYPE_CHECKING

from ..base.text import some_of
from ..table.table import Layer, LayerTable
from .layer_plan import LayerPlan
from .selection import selected
from .widths import Solution, advice_on

if TYPE_CHECKING:
    from .spec import TransformSpec


@dataclass(frozen=True, slots=True)
class WidenedWidth:
    """A free width that grows: by density ** (-1 / sides), rounded to `size`."""

    id: int
    dense: int
    size: int
    ideal: float
    sides: int


@dataclass(frozen=True)
class Widening:
    """Every width of the widened model, and the free widths that determine them.

    Args:
        table: the dense model.
        spec: what was asked for.
        solution: every width as an affine function of the free ones.
        widened: the free widths that grow.
        sizes: the new size of every width, by id.
        candidates: the free widths that may grow, whether they do or not (with scope none they do not).
    """

    table: LayerTable
    spec: TransformSpec
    solution: Solution
    widened: tuple[WidenedWidth, ...]
    sizes: list[int]
    candidates: frozenset[int] = frozenset()

    def at(self, sizes: Sequence[int]) -> Widening:
        """The same with other sizes, one for every width."""
        widened = tuple(replace(w, size=sizes[w.id]) for w in self.widened)
        return replace(self, sizes=list(sizes), widened=widened)

    def may_widen(self, layer: Layer) -> bool:
        """May a dim of this layer grow?"""
        return bool(free_widths(self.solution, layer.inputs.variables | layer.outputs.variables) & self.candidates)

    def body_widths(self) -> tuple[int, dict[str, list[str]]]:
        """How many widths of the selected body layers grow; and the others that something can be done about, by their reason."""
        return body_widths(self.table, self.spec, self.solution, self.sizes)

    def kept(self) -> str | None:
        """A sentence on the widths that scope all leaves at their size although it need not be so; None without any."""
        grown, kept = self.body_widths()
        if self.spec.scope != "all" or not kept:
            return None
        total = grown + sum(map(len, kept.values()))
        return f"{grown} of {total} widths of the body grew: {kept_in_words(kept)}"

    def ideal_sizes(self, density: float) -> list[float]:
        """All sizes without rounding, at any density: what closed forms are stated in."""
        value = {f.id: float(f.size) for f in self.solution.free}
        value |= {w.id: w.dense * density ** (-1 / w.sides) for w in self.widened}
        return [
            sum(float(c) * (1.0 if v is None else value[v]) for v, c in form.items()) for form in self.solution.affine
        ]

    def why_not(self, layer: Layer) -> str:
        """Why none of a layer's dims grow."""
        widths = sorted(layer.inputs.variables | layer.outputs.variables)
        for i in widths:
            reason = next(
                (self.solution.reasons[v] for v in [i, *self.solution.free_widths(i)] if v in self.solution.reasons),
                None,
            )
            if reason:
                return f"its width {self.table.widths[i].name} is kept: {reason}"
        if self.spec.scope == "inner":
            return "its widths are shared by a residual stream, an input, an output or attention (scope inner)"
        return "none of its dims grow"

    def ideal_body_density(self, layers: Sequence[LayerPlan]) -> float:
        """The density of the transformed layers under --match model at unrounded widths; negative where nothing is left."""
        ideal = self.ideal_sizes(float(self.spec.density))
        fixed = sum(p.layer.macs.evaluate(ideal) for p in layers if p.status != "transformed")
        transformed = sum(p.layer.macs.evaluate(ideal) for p in layers if p.status == "transformed")
        return (sum(p.dense_macs for p in layers) - fixed) / transformed

    def s_max(self, layers: Sequence[LayerPlan]) -> float:
        """The sparsity at which what is left alone, at unrounded widths, costs as much as the whole dense model.

        Each row left alone grows as a power of 1/density, read off two points: input and output layers, depthwise and
        attention products as density ** -1/2 under scope all, which gives 1 - (their dense share)^2.
        """
        probe = 0.25
        ideal = self.ideal_sizes(probe)
        by_power: dict[float, float] = {}
        for plan in layers:
            if plan.status != "transformed" and plan.dense_macs:
                power = round(log(plan.layer.macs.evaluate(ideal) / plan.dense_macs) / log(1 / probe), 9)
                by_power[power] = by_power.get(power, 0.0) + plan.dense_macs
        return greatest_sparsity(
            lambda d: sum(m * d**-p for p, m in by_power.items()), sum(p.dense_macs for p in layers)
        )


def body_widths(
    table: LayerTable, spec: TransformSpec, solution: Solution, sizes: Sequence[int]
) -> tuple[int, dict[str, list[str]]]:
    """See `Widening.body_widths`; `sizes` are the new ones."""
    touched = dict.fromkeys(
        v
        for layer in table.layers
        if layer.weighted and layer.role == "body" and selected(layer, spec)
        for v in sorted(layer.inputs.variables | layer.outputs.variables)
    )
    kept: dict[str, list[str]] = {}
    for v in touched:
        reasons = [solution.reasons[u] for u in (v, *solution.free_widths(v)) if u in solution.reasons]
        if sizes[v] == table.sizes[v] and reasons and advice_on(reasons[0]):
            kept.setdefault(reasons[0], []).append(table.widths[v].name)
    return sum(sizes[v] > table.sizes[v] for v in touched), kept


def kept_in_words(kept: Mapping[str, list[str]]) -> str:
    """Widths by their reason, with what to do about it: the same words wherever widths are kept."""
    return "; ".join(
        f"{some_of(names, 2)} {'stays' if len(names) == 1 else 'stay'}, {reason} ({advice_on(reason)})"
        for reason, names in kept.items()
    )


def greatest_sparsity(fixed_at: Callable[[float], float], budget: float) -> float:
    """s_max: the sparsity at which what is left alone takes the whole budget, by bisection on its growth with 1 - s.

    With one growth exponent it is 1 - (dense share of what is left alone)^2. 1.0 means that nothing left alone grows.

    Args:
        fixed_at: MACs of what is left alone, at a density.
        budget: MACs of the dense model.
    """
    low, high = 0.0, 1.0 - 1e-9
    if fixed_at(1.0 - high) <= budget:
        return 1.0
    for _ in range(80):
        middle = (low + high) / 2
        if fixed_at(1.0 - middle) <= budget:
            low = middle
        else:
            high = middle
    return low


def free_widths(solution: Solution, widths: Iterable[int]) -> set[int]:
    """The free widths that any of `widths` depends on."""
    return {v for w in widths for v in solution.free_widths(w)}
