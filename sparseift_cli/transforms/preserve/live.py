"""Where the dense model's coordinates sit inside each wider width.

Most widths keep theirs in front: channel 3 stays channel 3. A width that the forward takes apart or puts together does
not: the rows of a fused QKV are (3, heads, head_dim), so the dense rows of every head lie in front of that head's new ones;
a concatenation lies part after part; a rotary head is two halves. The trace noted these orders; equations between widths
carry them to every width of the same size.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from ...errors import UsageError
from ...plan.plan import Plan
from ...table.poly import Poly
from ...trace.structure import Layout, Structure

Key = tuple[Fraction, ...]
_PROBES = 2  # random assignments of the free widths that tell two sizes apart
HINT = "use --init fresh, or leave these layers out with --exclude"


class Live:
    """The live coordinates of any size of one plan. Two expressions that are always equal have the same ones."""

    def __init__(self, plan: Plan, structure: Structure) -> None:
        assert plan.growth is not None
        self.plan = plan
        solution = plan.growth.solution
        draw = random.Random(0)
        self.probes: list[list[Fraction]] = []
        for _ in range(_PROBES):
            value = {f.id: draw.randrange(1 << 40, 1 << 41) for f in solution.free}
            forms = [sum(c * (1 if v is None else value[v]) for v, c in form.items()) for form in solution.affine]
            self.probes.append([Fraction(f) for f in forms])
        self.free = {self.key(Poly.var(f.id)) for f in solution.free}
        self.layouts: dict[Key, list[Layout]] = {}
        for whole, seen in structure.orders.items():
            for layout in seen:
                if self._takes_apart(whole, layout):
                    self.layouts.setdefault(self.key(whole), []).append(layout)
        for key, layout in self._nested():
            if layout not in self.layouts.setdefault(key, []):
                self.layouts[key].append(layout)
        self.known: dict[Key, Tensor] = {}

    def key(self, size: Poly) -> Key:
        """Equal for sizes that the equations make equal, whatever the free widths are."""
        return tuple(Fraction(size.evaluate(values)) for values in self.probes)

    def dense(self, size: Poly) -> int:
        """The size in the dense model."""
        return size.evaluate(self.plan.table.sizes)

    def new(self, size: Poly) -> int:
        """The size in the wider model."""
        return size.evaluate(self.plan.sizes)

    def of(self, size: Poly) -> Tensor:
        """Positions of the dense coordinates, [dense size] in their order.

        Raises:
            UsageError: the forward orders this width in two ways that no one placement satisfies (a channel shuffle).
        """
        key = self.key(size)
        if key not in self.known:
            self.known[key] = self._find(size, key)
        return self.known[key]

    def added(self, size: Poly) -> Tensor:
        """True for the coordinates that the dense model has not, [new size]."""
        mask = torch.ones(self.new(size), dtype=torch.bool)
        mask[self.of(size)] = False
        return mask

    def grid(self, dims: Sequence[Poly]) -> tuple[Tensor, ...]:
        """An index that selects the dense entries of a tensor with these dims: `new[live.grid(dims)] = dense`."""
        lists = [self.of(d) for d in dims]
        return tuple(x.view([-1 if i == j else 1 for j in range(len(lists))]) for i, x in enumerate(lists))

    def part(self, size: Poly, part: int, sizes: Sequence[int]) -> Tensor | None:
        """Positions of one part of a fused projection (its query, say) at these sizes; None where nothing takes it apart."""
        for layout in self.layouts.get(self.key(size), ()):
            values = [p.evaluate(sizes) for p in layout.parts]
            if layout.kind == "sum":
                if part < len(values) in (2, 3):
                    return torch.arange(values[part]) + sum(values[:part])
                continue
            for axis, piece in enumerate(layout.parts):
                chosen = None
                if piece.is_constant and part < piece.constant in (2, 3):
                    chosen = torch.tensor([part])
                elif not piece.is_constant:
                    chosen = self.part(piece, part, sizes)
                if chosen is not None:
                    return _product([chosen if i == axis else torch.arange(v) for i, v in enumerate(values)], values)
        return None

    def _takes_apart(self, whole: Poly, layout: Layout) -> bool:
        """Every part is smaller than the whole, and they make it up at either sizes."""
        for sizes in (self.plan.table.sizes, self.plan.sizes):
            values, total = [p.evaluate(sizes) for p in layout.parts], whole.evaluate(sizes)
            made = sum(values) if layout.kind == "sum" else _volume(values)
            if made != total or max(values) >= total or min(values) < 1:
                return False
        return True

    def _nested(self) -> list[tuple[Key, Layout]]:
        """Channels read in 2 groups here and in 4 there: each of the 2 is itself 2 of the 4, one after another."""
        found = []
        for layouts in self.layouts.values():
            grouped = [
                (self.dense(x.parts[0]), x.parts[1])
                for x in layouts
                if x.kind == "product" and len(x.parts) == 2 and self.dense(x.parts[0]) == self.new(x.parts[0])
            ]
            for few, wide in grouped:
                for many, narrow in grouped:
                    if many > few and many % few == 0:
                        parts = Poly.const(many // few), narrow
                        found.append((self.key(wide), Layout("product", parts)))
        return found

    def _find(self, size: Poly, key: Key) -> Tensor:
        n = self.dense(size)
        if self.new(size) == n:
            return torch.arange(n)
        layouts = self.layouts.get(key, [])
        trusted = [x for x in layouts if all(self._is_known(p) for p in x.parts)]
        placements = [self._placed(x) for x in trusted or layouts]
        if any(not torch.equal(p, placements[0]) for p in placements):
            names = ", ".join(sorted({self.plan.table.widths[v].name for v in size.variables}))
            raise UsageError(
                f"the channels of {names} are taken apart in two orders (a channel shuffle, or a view of it), so the dense "
                "ones have no place among more of them",
                hint=HINT,
            )
        return placements[0] if placements else torch.arange(n)

    def _is_known(self, part: Poly) -> bool:
        """Its placement is no guess: a width of its own, one that does not grow, or one whose order was seen."""
        key = self.key(part)
        return self.dense(part) == self.new(part) or key in self.free or key in self.layouts

    def _placed(self, layout: Layout) -> Tensor:
        parts = [self.of(p) for p in layout.parts]
        sizes = [self.new(p) for p in layout.parts]
        if layout.kind == "product":
            return _product(parts, sizes)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return torch.cat([p + s for p, s in zip(parts, starts, strict=True)])


def _product(parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Row-major positions of every combination of coordinates."""
    total = torch.zeros(1, dtype=torch.long)
    for part, size in zip(parts, sizes, strict=True):
        total = (total[:, None] * size + part).flatten()
    return total


def _volume(values: Sequence[int]) -> int:
    total = 1
    for v in values:
        total *= v
    return total
