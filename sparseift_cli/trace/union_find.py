"""Merges the variables of a trace that are plainly one width; what stays are equations between widths."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..table.poly import Poly


class UnionFind:
    """Union-find over variables, with congruence closure: two variables that equal the same expression are one."""

    def __init__(self, variables: int, equations: Iterable[Poly]) -> None:
        self.parent = list(range(variables))
        self.equations = self._merge_all(equations)

    def find(self, v: int) -> int:
        """The variable that stands for all that are equal to `v`."""
        while self.parent[v] != v:
            self.parent[v] = self.parent[self.parent[v]]
            v = self.parent[v]
        return v

    def roots(self, variables: Iterable[int]) -> set[int]:
        """`find` of each."""
        return {self.find(v) for v in variables}

    def groups(self) -> dict[int, list[int]]:
        """Every root with the variables that it stands for."""
        groups: dict[int, list[int]] = {}
        for v in range(len(self.parent)):
            groups.setdefault(self.find(v), []).append(v)
        return groups

    def _merge_all(self, equations: Iterable[Poly]) -> list[Poly]:
        """Merge variables that are plainly equal; then, until nothing moves, those that equal the same expression."""
        left: list[Poly] = []
        for equation in equations:
            pair = _equal_pair(equation)
            if pair:
                self._merge(*pair)
            else:
                left.append(equation)
        while True:
            renamed = dict.fromkeys(e.rename(LazyRenaming(self.find)).primitive() for e in left)
            left, merged, by_rest = [], False, {}
            for equation in renamed:
                pair = _equal_pair(equation)
                if pair:
                    self._merge(*pair)
                    merged = True
                elif equation.terms:
                    left.append(equation)
                    for variable, rest in _solved_for(equation):
                        if rest in by_rest and self.find(by_rest[rest]) != self.find(variable):
                            self._merge(by_rest[rest], variable)
                            merged = True
                        by_rest.setdefault(rest, variable)
            if not merged:
                return left

    def _merge(self, a: int, b: int) -> None:
        a, b = sorted((self.find(a), self.find(b)))
        self.parent[b] = a


class LazyRenaming(dict[int, int]):
    """A mapping that computes its answers: what `Poly.rename` wants."""

    def __init__(self, find: Callable[[int], int]) -> None:
        super().__init__()
        self.find = find

    def __missing__(self, v: int) -> int:
        self[v] = self.find(v)
        return self[v]


def _equal_pair(equation: Poly) -> tuple[int, int] | None:
    """(a, b) if the equation says a - b == 0."""
    if len(equation.terms) == 2:
        (m, x), (n, y) = equation.terms
        if len(m) == len(n) == 1 and x == -y and abs(x) == 1:
            return m[0], n[0]
    return None


def _solved_for(equation: Poly) -> list[tuple[int, Poly]]:
    """(v, rest) for each variable that stands alone with coefficient +-1: v == rest."""
    answers = []
    for monomial, c in equation.terms:
        if len(monomial) == 1 and abs(c) == 1:
            rest = Poly((m, -x * c) for m, x in equation.terms if m != monomial)
            if monomial[0] not in rest.variables:
                answers.append((monomial[0], rest))
    return answers
