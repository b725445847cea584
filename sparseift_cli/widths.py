"""Solves the equations between widths, so that choosing a few free widths sets every size of the model.

With the fixed sizes put in, the equations that layers ask of each other are linear: a fused QKV is 3 * 12 * head_dim, a
concatenation a sum. Elimination leaves *free* widths; all others are affine in them with rational coefficients, and the
denominators say in which steps a free width may move (a width split into 8 and 12 heads moves in steps of 24).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Literal

from .poly import Poly
from .table import Width

HeadScaling = Literal["scale_dim", "scale_count"]
Affine = dict[int | None, Fraction]  # free width id -> coefficient; None -> the constant


@dataclass(frozen=True, slots=True)
class Free:
    """A width that may be chosen. `size` is the dense one; new sizes move in `step`s."""

    id: int
    size: int
    step: int


@dataclass(frozen=True)
class Solution:
    """Every width of a table as an affine function of the free ones."""

    free: tuple[Free, ...]
    affine: tuple[Affine, ...]  # by width id
    reasons: Mapping[int, str]  # why a width is not free to grow

    def sizes(self, chosen: Mapping[int, int]) -> list[int]:
        """All sizes for new values of some free widths; the others keep their dense size.

        Raises:
            ValueError: a chosen value does not give whole sizes (it is not a multiple of the free width's step).
        """
        value = {f.id: chosen.get(f.id, f.size) for f in self.free}
        sizes = []
        for width, affine in enumerate(self.affine):
            size = sum(c * (1 if v is None else value[v]) for v, c in affine.items())
            if Fraction(size).denominator != 1 or size < 1:
                raise ValueError(f"width {width} would become {size}")
            sizes.append(int(size))
        return sizes

    def probe(self, seed: int = 0) -> list[Fraction]:
        """A value for every width that obeys all equations, at random large values of the free ones.

        Two expressions that agree here are, but for a chance of about 2^-40, equal for all sizes.
        """
        draw = random.Random(seed)
        value = {f.id: draw.randrange(1 << 40, 1 << 41) for f in self.free}
        return [sum((c * (1 if v is None else value[v]) for v, c in form.items()), Fraction(0)) for form in self.affine]

    def drivers(self, width: int) -> list[int]:
        """The free widths that a width depends on."""
        return [v for v in self.affine[width] if v is not None]


def solve(widths: Sequence[Width], equations: Sequence[Poly], heads: HeadScaling = "scale_dim") -> Solution:
    """Eliminate. Numbers of heads (or, with `scale_count`, head dims) and other counts keep their size.

    An equation that multiplies two widths which are both free to move (a matrix times a matrix of another layer) cannot
    be kept while scaling: its widths are fixed, and `reasons` says so.
    """
    reasons: dict[int, str] = {}
    known: dict[int, Affine] = {}
    for i, width in enumerate(widths):
        reason = width.fixed or _kept(width, heads)
        if reason:
            reasons[i] = reason
            known[i] = {None: Fraction(width.size)}
    pending = [e for e in equations if e.terms]
    while pending:
        rest: list[Poly] = []
        progress = False
        for equation in pending:
            linear = _linear(equation, known)
            if linear is None:
                rest.append(equation)
                continue
            progress = True
            _eliminate(linear, known, widths, reasons)
        if not progress:
            for i in sorted({v for e in rest for v in e.variables}):
                for v in _drivers(i, known):
                    known_value: Affine = {None: Fraction(widths[v].size)}
                    _substitute(v, known_value, known)
                    reasons.setdefault(v, "part of a product of two widths")
            rest = []
        pending = rest
    return _solution(widths, known, reasons)


def _kept(width: Width, heads: HeadScaling) -> str | None:
    if width.kind == "count":
        return "a count, not a width"
    if width.kind == "heads" and heads == "scale_dim":
        return "number of heads (head_dim scales instead)"
    if width.kind == "head_dim" and heads == "scale_count" and width.attention:
        return "head_dim (the number of heads scales instead)"
    return None


def _drivers(i: int, known: Mapping[int, Affine]) -> list[int]:
    return [v for v in known[i] if v is not None] if i in known else [i]


def _linear(equation: Poly, known: Mapping[int, Affine]) -> Affine | None:
    """The equation as an affine form that is zero, or None while it still multiplies free widths."""
    total: Affine = {}
    for monomial, c in equation.terms:
        product: Affine = {None: Fraction(c)}
        for variable in monomial:
            factor = known.get(variable, {variable: Fraction(1)})
            if any(v is not None for v in product) and any(v is not None for v in factor):
                return None
            if any(v is not None for v in product):
                product, factor = factor, product
            scale = product.get(None, Fraction(0))
            product = {v: scale * x for v, x in factor.items()}
        for v, x in product.items():
            total[v] = total.get(v, Fraction(0)) + x
    return {v: x for v, x in total.items() if x}


def _eliminate(zero: Affine, known: dict[int, Affine], widths: Sequence[Width], reasons: dict[int, str]) -> None:
    """Solve `zero == 0` for its largest width, so that small ones (a head dim) stay the free ones."""
    variables = [v for v in zero if v is not None]
    if not variables:
        return  # holds at the dense sizes; with fixed sizes only it always does
    pivot = max(variables, key=lambda v: (widths[v].size, -v))
    c = zero[pivot]
    value: Affine = {v: -x / c for v, x in zero.items() if v != pivot}
    if not any(v is not None for v in value):
        reasons.setdefault(pivot, "must equal a constant")
    _substitute(pivot, value, known)


def _substitute(pivot: int, value: Affine, known: dict[int, Affine]) -> None:
    for i, affine in known.items():
        c = affine.get(pivot)
        if c:
            merged = {v: x for v, x in affine.items() if v != pivot}
            for v, x in value.items():
                merged[v] = merged.get(v, Fraction(0)) + c * x
            known[i] = {v: x for v, x in merged.items() if x}
    known[pivot] = dict(value)


def _solution(widths: Sequence[Width], known: Mapping[int, Affine], reasons: Mapping[int, str]) -> Solution:
    affine = tuple(known.get(i, {i: Fraction(1)}) for i in range(len(widths)))
    steps: dict[int, int] = {}
    for form in affine:
        for v, c in form.items():
            if v is not None:
                steps[v] = lcm(steps.get(v, 1), c.denominator)
    free = tuple(Free(v, widths[v].size, step) for v, step in sorted(steps.items()))
    return Solution(free, affine, dict(reasons))
