"""By which numbers a forward pass multiplies its tensors, and where those numbers come from.

An attention divides its scores by sqrt(head_dim). When the head grows, that number has to grow with it, and no shape
shows it. So every number that a tensor is multiplied with or divided by is followed to its *sources*: sizes
(`q.shape[-1] ** -0.5`), float attributes (`self.tau`), buffers of one element, and numbers of the code itself. Names
play no part.

Sizes and attributes are floats with a memory, `TracedFloat`, in the forward pass; a product of two has the sources of
both. A tensor has a *scale* as an attribute: the sources of all numbers that multiplied it since the last op that is
not linear. What reads it at a softmax is the scale of an attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..table.poly import Poly
from .ops import LINEAR, is_view

aten = torch.ops.aten

Attribute = tuple[str, str]  # path of the owner, name
Source = Poly | Attribute | float  # a size, a float attribute, or a number of the code
Scale = Mapping[Source, float]  # source -> power; the scale is the product of all of them


def product(a: Scale, b: Scale, power: float = 1) -> Scale:
    """The scale a * b ** power.

    >>> product({("attn", "tau"): 1}, {8.0: 1}, -1)
    {('attn', 'tau'): 1, 8.0: -1}
    """
    powers = dict(a)
    for source, exponent in b.items():
        powers[source] = powers.get(source, 0) + power * exponent
    return {source: exponent for source, exponent in powers.items() if exponent}


class TracedFloat(float):
    """A float that remembers which sizes and attributes it is a product of powers of.

    Only products, quotients and powers keep the memory; a sum is a plain float. `floor`, `ceil` and `round` of half a
    size give a size again.

    Args:
        value: in this run.
        scale: what it is made of.
        facts: `symint.Facts` of the trace.
    """

    __slots__ = ("facts", "scale")

    def __new__(cls, value: float, scale: Scale, facts: Any) -> TracedFloat:
        made = super().__new__(cls, value)
        made.scale, made.facts = scale, facts
        return made

    def _times(self, other: Any, power: float, value: Any) -> Any:
        if value is NotImplemented:
            return value
        return TracedFloat(value, product(self.scale, scale_of(other), power), self.facts)

    def __mul__(self, other: Any) -> Any:
        return self._times(other, 1, super().__mul__(_plain(other)))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self._times(other, -1, super().__truediv__(_plain(other)))

    def __rtruediv__(self, other: Any) -> Any:
        value = super().__rtruediv__(_plain(other))
        if value is NotImplemented:
            return value
        return TracedFloat(value, product(scale_of(other), self.scale, -1), self.facts)

    def __pow__(self, power: Any, mod: None = None) -> Any:
        value = super().__pow__(_plain(power))
        if value is NotImplemented or type(value) is not float:
            return value
        return TracedFloat(value, {s: e * float(_plain(power)) for s, e in self.scale.items()}, self.facts)

    def __neg__(self) -> TracedFloat:
        return TracedFloat(super().__neg__(), self.scale, self.facts)

    # torch calls these on the float of a symbolic int
    __float_truediv__, __rfloat_truediv__, __float_pow__ = __truediv__, __rtruediv__, __pow__

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        return float, (float(self),)  # a copy has no memory

    def __int__(self) -> int:
        return self._plain_int(int)

    __trunc__ = __int__

    def __floor__(self) -> Any:
        return self._as_size() or self._plain_int(math.floor)

    def __ceil__(self) -> Any:
        return self._as_size() or self._plain_int(math.ceil)

    def __round__(self, digits: Any = None) -> Any:
        if digits is not None:
            return round(float(self), digits)
        return self._as_size() or self._plain_int(round)

    def _plain_int(self, rounded: Callable[[float], int]) -> int:
        """An int that Python rounds: it cannot follow a size."""
        for source in self.scale:
            if isinstance(source, Poly):
                self.facts.freeze(source, "forward reads it as a plain number")
        return rounded(float(self))

    def _as_size(self) -> Any:
        """This number as a size, where it is a whole fraction of one (`width * 0.5`); else None."""
        sizes = [source for source in self.scale if isinstance(source, Poly)]
        others = [source for source in self.scale if not isinstance(source, (Poly, float))]
        if len(sizes) != 1 or self.scale[sizes[0]] != 1 or others or not self.is_integer():
            return None
        share = Fraction(int(float(self)), sizes[0].evaluate(self.facts.sizes))
        return self.facts.symint(sizes[0] * Poly.const(share.numerator)) // share.denominator


def _plain(value: Any) -> Any:
    """A symbolic int as the float that it is in this run, without a fact; anything else as it is."""
    return float(value.node.value) if isinstance(value, torch.SymInt) else value


def scale_of(value: Any) -> Scale:
    """What a number, or a tensor of any shape, was multiplied with: empty for 1, and for what is not known."""
    if isinstance(value, Tensor):
        return getattr(value, _MARK, _UNSCALED).scale
    if isinstance(value, torch.SymInt):
        return {value.node.expr: 1}
    if isinstance(value, TracedFloat):
        return value.scale
    plain = isinstance(value, (int, float)) and math.isfinite(value) and abs(value) not in (0, 1)
    return {abs(float(value)): 1} if plain else {}


@dataclass(eq=False)
class Score:
    """The product q k^T of one attention: the module that computes it, the dim that it sums over, and its scale."""

    module: str
    dim: Poly
    queries: tuple[str, ...] = ()  # keys of the weights that make the query
    scale: Scale = field(default_factory=dict)
    softmaxed: bool = False  # a softmax reads it


@dataclass(frozen=True)
class _Mark:
    """What a tensor carries: its scale, and the attention score that it is."""

    scale: Scale
    score: Score | None = None


_MARK = "_sparseift_scale"
_UNSCALED = _Mark({})
_MULTIPLY, _DIVIDE = (aten.mul, aten.mul_), (aten.div, aten.div_, aten.true_divide)
_SOFTMAX = (aten._softmax, aten._safe_softmax, aten._log_softmax)
_SELECTING = {  # not linear, but what they leave keeps its scale: masks, and limits of scores
    aten.where,
    aten.masked_fill,
    aten.masked_fill_,
    aten.maximum,
    aten.minimum,
    aten.clamp,
    aten.clamp_min,
    aten.clamp_max,
    aten.nan_to_num,
    aten.tril,
    aten.triu,
}


class Scales:
    """The scales of one forward pass: `scores` of its attentions, and which dims each source scaled."""

    def __init__(self) -> None:
        self.scores: list[Score] = []
        self.scaled_dims: dict[Source, dict[Poly, None]] = {}  # source -> dims of the tensors that it scaled

    def multiply(self, tensor: Tensor, out: Tensor, number: Any, power: float) -> Tensor:
        """Note out = tensor * number ** power, `tensor` and `out` [...] alike; returns `out`.

        `number` may be a tensor of shape [] or [1].
        """
        factors = scale_of(number)
        for source in factors:
            dims = self.scaled_dims.setdefault(source, {})
            dims.update((d.node.expr, None) for d in reversed(tensor.shape) if isinstance(d, torch.SymInt))
        if not factors or isinstance(number, Tensor):  # of two tensors, `propagate` saw the product
            return out
        before: _Mark = getattr(tensor, _MARK, _UNSCALED)
        return self._mark(out, product(before.scale, factors, power), before.score)

    def note_score(self, score: Score, q: Tensor, k: Tensor, out: Tensor | None, scale: Scale) -> None:
        """Note `score` = q k^T * scale, written to `out` [..., T_q, T_k] where it is stored."""
        score.scale = product(product(scale_of(q), scale_of(k)), scale)
        self.scores.append(score)
        if out is not None:
            self._mark(out, score.scale, score)

    def propagate(self, func: Any, tensors: Iterable[Tensor], out: Any) -> None:
        """Pass on the scales of what an op without MACs reads (any shapes) to its result."""
        marked: list[tuple[int, _Mark]] = [(i, m) for i, t in enumerate(tensors) if (m := getattr(t, _MARK, None))]
        if not marked:
            return
        packet, first = func.overloadpacket, marked[0][1]
        score = next((m.score for _, m in marked if m.score), None)
        if packet in _MULTIPLY or packet in _DIVIDE:
            scale: Scale = {}
            for i, mark in marked:
                scale = product(scale, mark.scale, -1 if i and packet in _DIVIDE else 1)
        elif packet in LINEAR or packet in _SELECTING or is_view(func):
            scale = first.scale if score is None else next(m.scale for _, m in marked if m.score)
        else:
            if score is not None and packet in _SOFTMAX:
                score.softmaxed = True
            return
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._mark(tensor, scale, score)

    def _mark(self, tensor: Tensor, scale: Scale, score: Score | None) -> Tensor:
        setattr(tensor, _MARK, _Mark(scale, score))
        if score is not None:
            score.scale = scale
        return tensor


def mark_number(tensor: Tensor, value: Any) -> Tensor:
    """Note that every element of `tensor`, of any shape, is the number `value`; returns `tensor`."""
    scale = value if isinstance(value, dict) else scale_of(value)
    if scale:
        setattr(tensor, _MARK, _Mark(scale))
    return tensor


class Formulas:
    """What the scales of a finished run say about its sizes.

    Args:
        scales: of the run.
        sizes: variable -> its value.
        computed: sizes that Python turned into plain floats (`math.sqrt(self.width)`), whose memory is lost: a number
            of the code that is a power of one of them is taken for it.
    """

    def __init__(self, scales: Scales, sizes: Sequence[int], computed: Iterable[Poly]) -> None:
        self.scales = scales
        self.sizes = sizes
        self.computed = list(computed)

    def resolve(self, scale: Scale) -> Scale:
        """`scale` with a power of a size in place of each number that is one."""
        resolved: Scale = {}
        for source, power in scale.items():
            found = self._power_of_size(source) if isinstance(source, float) else None
            resolved = product(resolved, {source: 1} if found is None else found, power)
        return resolved

    def _power_of_size(self, number: float) -> Scale | None:
        for size in self.computed:
            for power in (0.5, -0.5, 1, -1, 0.25, -0.25):
                if math.isclose(number, size.evaluate(self.sizes) ** power, rel_tol=1e-9):
                    return {size: power}
        return None

    def sizes_multiplying(self) -> Iterator[tuple[Poly, list[Poly]]]:
        """(size, the dims of what it multiplies) for each size that a tensor is scaled by a power of, summed dims first."""
        dims: dict[Poly, dict[Poly, None]] = {}
        for score in self.scales.scores:
            for source in self.resolve(score.scale):
                if isinstance(source, Poly):
                    dims.setdefault(source, {})[score.dim] = None
        for source, scaled in self.scales.scaled_dims.items():
            for size in self.resolve({source: 1}):
                if isinstance(size, Poly):
                    dims.setdefault(size, {}).update(scaled)
        for size, scaled in dims.items():
            yield size, list(scaled)
