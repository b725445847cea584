"""Solve the equations between widths, so that choosing a few free widths gives every size of the model.

With the fixed sizes put in, the equations that layers ask of each other are linear: a fused QKV is 3 * 12 * head_dim, a
concatenation a sum. Elimination leaves *free* widths; all others are affine in them with rational coefficients, and the
denominators say in which steps a free width may move (a width split into 8 and 12 heads moves in steps of 24).

No width may shrink. So a sum of widths that is fixed (a concatenation added to the input) fixes its parts.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import TYPE_CHECKING

from ..table.poly import Poly
from ..table.table import Width

if TYPE_CHECKING:
    from .spec import HeadScaling

Affine = dict[int | None, Fraction]  # free width id -> coefficient; None -> the constant

_CONSTANT, _COUNT, _IN_FIXED_SUM = "must equal a constant", "a count, not a width", "part of a sum of fixed size"

_HEADS, _HEAD_DIM = "number of heads (head_dim scales instead)", "head_dim (the number of heads scales instead)"

# How a reason begins that a model's author may do something about -> what. Outputs and rows of embeddings are not among them.
_ADVICE = {
    "tied to buffer": "make it a parameter, or compute it in forward from the width",
    _CONSTANT: "a number in forward, or a size of the input: take numbers from a shape or an attribute",
    "must fit": "a width cannot grow where forward compares it with a count",
    _COUNT: "nothing shows that it is a width",
    "forward reads it as a plain number": "no int(), range() or index of a size in forward",
    _IN_FIXED_SUM: "the other parts of the sum cannot shrink",
    "part of a product of two widths": "two sizes that both grow are multiplied with each other",
}


def advice_on(reason: str) -> str | None:
    """What the author of a model can do about a width that is kept for `reason`; None where it has to be so."""
    return next((advice for start, advice in _ADVICE.items() if reason.startswith(start)), None)


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
    names: tuple[str, ...]  # by width id

    def sizes(self, chosen: Mapping[int, int]) -> list[int]:
        """All sizes for new values of some free widths; the others keep their dense size.

        Raises:
            ValueError: a chosen value does not give whole sizes (it is not a multiple of the free width's step), or one
                below the dense size (of a difference of widths that do not grow alike).
        """
        dense = {f.id: f.size for f in self.free}
        value = dense | {v: size for v, size in chosen.items() if v in dense}
        sizes = []
        for name, form in zip(self.names, self.affine, strict=True):
            size, before = (sum(c * (1 if v is None else at[v]) for v, c in form.items()) for at in (value, dense))
            if Fraction(size).denominator != 1 or size < before:
                raise ValueError(f"width {name} would change from {before} to {size}")
            sizes.append(int(size))
        return sizes

    def probe(self, seed: int = 0) -> list[Fraction]:
        """A value for every width that obeys all equations, at random large values of the free ones.

        Two expressions that agree here are equal for all sizes; the probability of an error is about 2^-40.
        """
        draw = random.Random(seed)
        value = {f.id: draw.randrange(1 << 40, 1 << 41) for f in self.free}
        return [sum((c * (1 if v is None else value[v]) for v, c in form.items()), Fraction(0)) for form in self.affine]

    def free_widths(self, width: int) -> list[int]:
        """The free widths that a width, given by its id, depends on."""
        return [v for v in self.affine[width] if v is not None]


def solve(widths: Sequence[Width], equations: Sequence[Poly], heads: HeadScaling = "scale_dim") -> Solution:
    """Eliminate widths until those that are left are free.

    Numbers of heads (or, with `scale_count`, head dims) and other counts keep their size. An equation that multiplies two
    free widths (a product of two layers' matrices) is not linear: its widths are fixed, and `reasons` gives that. So are
    the parts of a sum that is fixed.

    Args:
        widths: of the table, by id.
        equations: polynomials in the widths that are 0.
        heads: whether attention grows by its head dim or by its number of heads.
    """
    reasons: dict[int, str] = {}
    known: dict[int, Affine] = {}
    for i, width in enumerate(widths):
        reason = width.fixed or _kept(width, heads)
        if reason:
            reasons[i] = reason
            known[i] = {None: Fraction(width.size)}
    _fix_parts(equations, known, widths, reasons)
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
            _eliminate(linear, known, widths, reasons, _inherited(equation, reasons))
        if not progress:
            for i in sorted({v for e in rest for v in e.variables}):
                for v in _depends_on(i, known):
                    known_value: Affine = {None: Fraction(widths[v].size)}
                    _substitute(v, known_value, known)
                    reasons.setdefault(v, "part of a product of two widths")
            rest = []
        _fix_parts(equations, known, widths, reasons)
        pending = rest
    return _solution(widths, known, reasons)


def _kept(width: Width, heads: HeadScaling) -> str | None:
    if width.kind == "count":
        return _COUNT
    if width.kind == "heads" and heads == "scale_dim":
        return _HEADS
    if width.kind == "head_dim" and heads == "scale_count" and width.attention:
        return _HEAD_DIM
    return None


def _depends_on(i: int, known: Mapping[int, Affine]) -> list[int]:
    return _variables(known[i]) if i in known else [i]


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


def _inherited(equation: Poly, reasons: Mapping[int, str]) -> str:
    """Why an equation that leaves one width no choice does so: because of a fixed width in it, else because of a number."""
    found = (reasons[v] for v in sorted(equation.variables) if v in reasons)
    return next((reason for reason in found if reason not in (_COUNT, _HEADS, _HEAD_DIM)), _CONSTANT)


def _eliminate(
    zero: Affine, known: dict[int, Affine], widths: Sequence[Width], reasons: dict[int, str], why: str = _CONSTANT
) -> None:
    """Solve `zero == 0` for its largest width, so that small ones (a head dim) stay the free ones.

    With a constant in it (a == b + 8) a width that is a sum of the others is eliminated first: solved for a part, as in
    b = a - 8 - c, that part would shrink while another one grows.
    """
    variables = _variables(zero)
    if not variables:
        return  # holds at the dense sizes; with fixed sizes only it always does
    if None in zero:
        wholes = [v for v in variables if all((zero[v] > 0) != (zero[u] > 0) for u in variables if u != v)]
        variables = wholes or variables
    pivot = max(variables, key=lambda v: (widths[v].size, -v))
    c = zero[pivot]
    value: Affine = {v: -x / c for v, x in zero.items() if v != pivot}
    if not any(v is not None for v in value):
        reasons.setdefault(pivot, why)
    _substitute(pivot, value, known)


def _fix_parts(
    equations: Sequence[Poly], known: dict[int, Affine], widths: Sequence[Width], reasons: dict[int, str]
) -> None:
    """Fix the parts of sums that are fixed, since one part could only grow while another shrinks.

    Such sums are equations, a + b == C, or widths that elimination left as C - a - b. Fixing some parts may leave another
    sum fixed, so it is repeated until there is none.
    """
    while True:
        constants = {i: form for i, form in known.items() if not _variables(form)}
        sums = [form for e in equations if (form := _linear(e, constants)) and _signs(form) != {True, False}]
        falling = [form for form in known.values() if _signs(form) == {False}]
        parts = sorted({v for form in (*sums, *falling) for v in _variables(form)})
        if not parts:
            return
        alone = {v for form in sums for v in _variables(form) if len(_variables(form)) == 1}
        for v in parts:
            if v in alone:
                alone_in = [e for e in equations if v in e.variables and _variables(_linear(e, constants) or {}) == [v]]
                inherited = (_inherited(e, reasons) for e in alone_in)
                root = next((reason for reason in inherited if reason != _CONSTANT), None)
                reasons.setdefault(v, root or _constant(v, equations, widths, reasons))
            reasons.setdefault(v, _IN_FIXED_SUM)
            zero = dict(known.get(v, {v: Fraction(1)}))
            zero[None] = zero.get(None, Fraction(0)) - widths[v].size
            _eliminate({x: c for x, c in zero.items() if c}, known, widths, reasons)
        for i, form in known.items():
            if i not in constants and not _variables(form):
                reasons.setdefault(i, _IN_FIXED_SUM)


def _constant(width: int, equations: Sequence[Poly], widths: Sequence[Width], reasons: Mapping[int, str]) -> str:
    """Which counts of the model's own (`attn.n_parts`) a width must fit, where there are any."""
    tied = (e.variables for e in equations if width in e.variables)
    counts = sorted({widths[v].name for others in tied for v in others if reasons.get(v) == _COUNT and widths[v].name})
    return f"must fit {', '.join(counts[:2])}: {_COUNT}" if counts else _CONSTANT


def _variables(form: Affine) -> list[int]:
    return [v for v in form if v is not None]


def _signs(form: Affine) -> set[bool]:
    return {form[v] > 0 for v in _variables(form)}


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
    return Solution(free, affine, dict(reasons), tuple(w.name for w in widths))
