"""Merges the variables of a trace that are one width; what is left over are equations between widths.

A trace has one variable for each parameter dim and int attribute, and facts such as `v3 - v7 == 0` or `v8 - v1 - v2 ==
0`. A fact that says that two variables are equal merges them. *Congruence closure* merges more: where two variables
equal the same expression (v8 == v1 + v2 and v9 == v1 + v2), they are equal too. DenseNet needs it: its concatenated
widths are never compared directly. So are two quotients of one dim by the same number (v8 == v1 * v2 and v8 == v1 * v3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping

from ..table.poly import Poly


class UnionFind:
    """Union-find over variables, with congruence closure.

    >>> v0, v1, v2, v3 = map(Poly.var, range(4))
    >>> variables = UnionFind(4, [v2 - v0 - v1, v3 - v0 - v1])
    >>> variables.groups(), variables.equations
    ({0: [0], 1: [1], 2: [2, 3]}, [-1*w0 + -1*w1 + w2])
    >>> UnionFind(4, [v3 - v0 * v1, v3 - v0 * v2]).groups()
    {0: [0], 1: [1, 2], 3: [3]}

    Args:
        variables: how many there are.
        equations: polynomials that are 0.
        constants: variable -> its size, of those that cannot change; where one is a factor of a product, it is put in.
    """

    def __init__(self, variables: int, equations: Iterable[Poly], constants: Mapping[int, int] | None = None) -> None:
        self.parent = list(range(variables))
        self.constants = constants or {}
        self.equations = self._merge_all(equations)

    def find(self, v: int) -> int:
        """The representative of all variables that are equal to `v`."""
        while self.parent[v] != v:
            self.parent[v] = self.parent[self.parent[v]]
            v = self.parent[v]
        return v

    def roots(self, variables: Iterable[int]) -> set[int]:
        """The representatives of some variables."""
        return {self.find(v) for v in variables}

    def groups(self) -> dict[int, list[int]]:
        """Representative -> all variables that are equal to it."""
        groups: dict[int, list[int]] = {}
        for v in range(len(self.parent)):
            groups.setdefault(self.find(v), []).append(v)
        return groups

    def _merge_all(self, equations: Iterable[Poly]) -> list[Poly]:
        """Merge variables until no equation says that two are equal; returns the equations that are left.

        First those that an equation names directly. Then, until nothing changes, rewrite the equations with
        representatives: that makes new direct equalities, and shows variables that equal the same expression.
        """
        left: list[Poly] = []
        for equation in equations:
            pair = _equal_pair(equation)
            if pair:
                self._merge(*pair)
            else:
                left.append(equation)
        while True:
            constants = {self.find(v): size for v, size in self.constants.items()}
            names = LazyRenaming(self.find)
            renamed = dict.fromkeys(_with_constants(e.rename(names), constants).primitive() for e in left)
            left, merged, first_equal, quotients = [], False, {}, {}
            for equation in renamed:
                pair = _equal_pair(equation)
                if pair:
                    self._merge(*pair)
                    merged = True
                elif equation.terms:
                    left.append(equation)
                    for variable, rest in _solved_for(equation):
                        if rest in first_equal and self.find(first_equal[rest]) != self.find(variable):
                            self._merge(first_equal[rest], variable)
                            merged = True
                        first_equal.setdefault(rest, variable)
                        for divided, factor in _quotients(variable, rest):
                            if self.find(quotients.setdefault(divided, factor)) != self.find(factor):
                                self._merge(quotients[divided], factor)
                                merged = True
            if not merged:
                return left

    def _merge(self, a: int, b: int) -> None:
        a, b = sorted((self.find(a), self.find(b)))
        self.parent[b] = a


class LazyRenaming(dict[int, int]):
    """A mapping for `Poly.rename` that computes and caches its values."""

    def __init__(self, find: Callable[[int], int]) -> None:
        super().__init__()
        self.find = find

    def __missing__(self, v: int) -> int:
        self[v] = self.find(v)
        return self[v]


def _with_constants(equation: Poly, constants: Mapping[int, int]) -> Poly:
    """The equation with the sizes of constant factors in its products: the two halves of a split are w0 == 2 * w1."""
    if not any(len(m) > 1 and not constants.keys().isdisjoint(m) for m, _ in equation.terms):
        return equation
    total = Poly()
    for monomial, coefficient in equation.terms:
        rest = tuple(v for v in monomial if len(monomial) == 1 or v not in constants)
        known = math.prod(constants[v] for v in monomial if v not in rest)
        total = total + Poly([(rest, coefficient * known)])
    return total


def _equal_pair(equation: Poly) -> tuple[int, int] | None:
    """(a, b) if the equation is a - b == 0."""
    if len(equation.terms) == 2:
        (m, x), (n, y) = equation.terms
        if len(m) == len(n) == 1 and x == -y and abs(x) == 1:
            return m[0], n[0]
    return None


def _quotients(variable: int, rest: Poly) -> Iterator[tuple[tuple[int, int, int], int]]:
    """(variable == c * a * b, divided by c * a) -> b, and by c * b -> a: no size is 0, so there is one quotient."""
    ((monomial, c),) = rest.terms if len(rest.terms) == 1 else [((), 0)]
    if len(monomial) == 2:
        for divisor, factor in (monomial, monomial[::-1]):
            yield (variable, c, divisor), factor


def _solved_for(equation: Poly) -> list[tuple[int, Poly]]:
    """(v, rest) for each variable that is a term by itself with coefficient 1 or -1, so that v == rest."""
    answers = []
    for monomial, c in equation.terms:
        if len(monomial) == 1 and abs(c) == 1:
            rest = Poly((m, -x * c) for m, x in equation.terms if m != monomial)
            if monomial[0] not in rest.variables:
                answers.append((monomial[0], rest))
    return answers
