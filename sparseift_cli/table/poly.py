"""Integer polynomials over width variables: how every size in a model depends on its widths.

A width variable is an integer id, printed as w0, w1, ... The trace computes with these polynomials, and a LayerTable
stores them: `3*w0` are the outputs of a fused QKV projection, `w1 + w2` is a concatenation, `196*w0*w1` are the MACs of
a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import gcd
from typing import Any, ClassVar

Monomial = tuple[int, ...]  # sorted variable ids, repeated for powers; () is the constant term


class Poly:
    """A polynomial with integer coefficients: immutable, hashable, equal where all coefficients are.

    `terms` are (monomial, coefficient), sorted, without zero coefficients; a monomial is a sorted tuple of variable
    ids.

    >>> width, other = Poly.var(0), Poly.var(1)
    >>> macs = Poly.const(196) * width * other
    >>> macs, macs.terms, macs.evaluate([64, 128])
    (196*w0*w1, (((0, 1), 196),), 1605632)
    >>> (width + width - other).primitive()  # as an equation, 2*w0 - w1 == 0
    -2*w0 + w1
    """

    __slots__ = ("_hash", "terms")
    terms: tuple[tuple[Monomial, int], ...]
    free_symbols: ClassVar[frozenset[int]] = frozenset()  # PyTorch 2.11 asks sizes for those without a value: none

    def __init__(self, terms: Iterable[tuple[Monomial, int]] = ()) -> None:
        self.terms = tuple(sorted((m, c) for m, c in terms if c))
        self._hash = hash(self.terms)

    @staticmethod
    def const(value: int) -> Poly:
        """The constant polynomial `value`."""
        return Poly((((), value),))

    @staticmethod
    def var(identifier: int) -> Poly:
        """The polynomial of one variable, by its id."""
        return Poly((((identifier,), 1),))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Poly) and self.terms == other.terms

    def __hash__(self) -> int:
        return self._hash

    def __add__(self, other: Poly) -> Poly:
        return self._combine(other, 1)

    def __sub__(self, other: Poly) -> Poly:
        return self._combine(other, -1)

    def __mul__(self, other: Poly) -> Poly:
        if self.terms == _ONE:
            return other
        if other.terms == _ONE:
            return self
        product: dict[Monomial, int] = {}
        for a, x in self.terms:
            for b, y in other.terms:
                key = tuple(sorted(a + b))
                product[key] = product.get(key, 0) + x * y
        return Poly(product.items())

    def _combine(self, other: Poly, sign: int) -> Poly:
        total = dict(self.terms)
        for monomial, c in other.terms:
            total[monomial] = total.get(monomial, 0) + sign * c
        return Poly(total.items())

    @property
    def is_constant(self) -> bool:
        return not self.terms or (len(self.terms) == 1 and not self.terms[0][0])

    @property
    def constant(self) -> int:
        """The value of a constant polynomial.

        Raises:
            ValueError: it depends on a variable.
        """
        if not self.is_constant:
            raise ValueError(f"{self} is not a constant")
        return self.terms[0][1] if self.terms else 0

    @property
    def as_variable(self) -> int | None:
        """The id of the variable, where the polynomial is one variable and nothing else."""
        if len(self.terms) == 1 and self.terms[0][1] == 1 and len(self.terms[0][0]) == 1:
            return self.terms[0][0][0]
        return None

    @property
    def variables(self) -> frozenset[int]:
        return frozenset(v for monomial, _ in self.terms for v in monomial)

    @property
    def degree(self) -> int:
        return max((len(m) for m, _ in self.terms), default=0)

    def evaluate(self, values: Mapping[int, Any] | Sequence[Any]) -> Any:
        """The number at an assignment of the variables: int, Fraction or float, as the values are."""
        total: Any = 0
        for monomial, c in self.terms:
            product: Any = c
            for v in monomial:
                product = product * values[v]
            total = total + product
        return total

    def rename(self, names: Mapping[int, int]) -> Poly:
        """Replace every variable by another one; several may be given the same new name."""
        total: dict[Monomial, int] = {}
        for monomial, c in self.terms:
            key = tuple(sorted(names[v] for v in monomial))
            total[key] = total.get(key, 0) + c
        return Poly(total.items())

    def divided_by(self, divisor: Poly) -> Poly | None:
        """The exact quotient by a one-term divisor, or None where it does not divide."""
        if len(divisor.terms) != 1:
            return Poly.const(1) if self == divisor else None
        (by, by_c) = divisor.terms[0]
        quotient: list[tuple[Monomial, int]] = []
        for monomial, c in self.terms:
            rest = list(monomial)
            for v in by:
                if v not in rest:
                    return None
                rest.remove(v)
            if c % by_c:
                return None
            quotient.append((tuple(rest), c // by_c))
        return Poly(quotient)

    def primitive(self) -> Poly:
        """The simplest polynomial that is 0 for the same positive sizes, as a normal form of the equation `self == 0`.

        Common integer factors and common variables are divided out (a size is never 0), and the last coefficient is
        positive.
        """
        if not self.terms:
            return self
        factor = gcd(*(c for _, c in self.terms))
        common = list(self.terms[0][0])
        for monomial, _ in self.terms[1:]:
            rest, kept = list(monomial), []
            for v in common:
                if v in rest:
                    rest.remove(v)
                    kept.append(v)
            common = kept
        sign = 1 if self.terms[-1][1] > 0 else -1
        return self.divided_by(Poly(((tuple(common), sign * factor),))) or self

    def to_json(self) -> int | list[list[int]]:
        """A constant as an int, anything else as [[coefficient, id, id, ...], ...]."""
        return self.constant if self.is_constant else [[c, *m] for m, c in self.terms]

    @staticmethod
    def from_json(data: int | list[list[int]]) -> Poly:
        return Poly.const(data) if isinstance(data, int) else Poly((tuple(t[1:]), t[0]) for t in data)

    def text(self, names: Mapping[int, str]) -> str:
        """The polynomial as people write it, what is taken away last.

        >>> (Poly.var(1) - Poly.const(2) * Poly.var(0)).text({0: "conv.weight[0]", 1: "width / 4"})
        'width / 4 - 2 * conv.weight[0]'
        """
        text = ""
        for monomial, c in sorted(self.terms, key=lambda term: term[1] < 0):
            factors = [str(abs(c))] * (abs(c) != 1 or not monomial) + [names[v] for v in monomial]
            term = factors[0] if len(factors) == 1 else " * ".join(map(in_parentheses, factors))
            text = f"{text} {'-' if c < 0 else '+'} {term}" if text else f"{'-' * (c < 0)}{term}"
        return text or "0"

    def __repr__(self) -> str:
        def term(monomial: Monomial, c: int) -> str:
            names = [f"w{v}" for v in monomial]
            return "*".join([str(c), *names] if c != 1 or not names else names)

        return " + ".join(term(m, c) for m, c in self.terms) or "0"


def in_parentheses(formula: str) -> str:
    """A formula as an operand of another one: a name stays as it is."""
    return f"({formula})" if " " in formula else formula


_ONE = (((), 1),)
