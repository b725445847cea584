"""Where the dense model's coordinates are in the wider one: along each width, and along the dims of each layer's weight.

Most widths keep the dense coordinates first: channel 3 stays channel 3. A width that the forward splits or concatenates
does not. The rows of a fused QKV projection are (3, heads, head_dim), so the dense rows of each head come first within
that head; a concatenation keeps its parts one after another; a rotary head is two halves. The trace recorded these
layouts (`Structure.all_layouts`), and the equations between widths carry each layout to every width of the same symbolic
size.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ...mask.attached import is_transposed
from ...plan.plan import Plan
from ...table.poly import Poly
from ...trace.constants import named_constants
from ...trace.structure import DimLayout, Structure
from ..edits import Surgery

SizeKey = tuple[Fraction, ...]
HINT = "use --init fresh, or leave these layers out with --exclude"
_NUM_PROBES = 2  # random assignments of the free widths; sizes with equal values in all of them are taken as equal
_KINDS = ("linear", "conv", "depthwise", "grouped conv", "conv_transpose")


class Coordinates:
    """The positions of the dense coordinates along every width of one plan. Sizes that are always equal share them.

    A size is a polynomial over the widths of the table; it has one value in the dense model and one in the wider model.
    """

    def __init__(self, plan: Plan, structure: Structure) -> None:
        assert plan.widening is not None
        self.plan = plan
        solution = plan.widening.solution
        rng = random.Random(0)
        self._probes: list[list[Fraction]] = []
        for _ in range(_NUM_PROBES):
            # Large random values: two different polynomials then have different values, but for a negligible chance.
            value = {f.id: rng.randrange(1 << 40, 1 << 41) for f in solution.free}
            forms = [sum(c * (1 if v is None else value[v]) for v, c in form.items()) for form in solution.affine]
            self._probes.append([Fraction(f) for f in forms])
        self._free = {self.size_key(Poly.var(f.id)) for f in solution.free}
        self._layouts: dict[SizeKey, list[DimLayout]] = {}
        for whole, layouts in structure.all_layouts.items():
            for layout in layouts:
                if self._is_proper(whole, layout):
                    self._layouts.setdefault(self.size_key(whole), []).append(layout)
        for key, layout in self._nested_groups():
            if layout not in self._layouts.setdefault(key, []):
                self._layouts[key].append(layout)
        self._positions: dict[SizeKey, Tensor] = {}

    def size_key(self, size: Poly) -> SizeKey:
        """Equal for two sizes exactly when the equations make them equal, whatever the free widths are."""
        return tuple(Fraction(size.evaluate(values)) for values in self._probes)

    def dense_size(self, size: Poly) -> int:
        """The value of `size` in the dense model."""
        return size.evaluate(self.plan.table.sizes)

    def new_size(self, size: Poly) -> int:
        """The value of `size` in the wider model."""
        return size.evaluate(self.plan.sizes)

    def positions(self, size: Poly) -> Tensor:
        """Index of each dense coordinate along the wider dim: int64 [dense size], in the order of the dense model.

        Raises:
            UsageError: the forward splits this width in two ways that no single placement fits (a channel shuffle).
        """
        key = self.size_key(size)
        if key not in self._positions:
            self._positions[key] = self._find_positions(size, key)
        return self._positions[key]

    def is_added(self, size: Poly) -> Tensor:
        """True at the coordinates that only the wider model has: bool [new size]."""
        mask = torch.ones(self.new_size(size), dtype=torch.bool)
        mask[self.positions(size)] = False
        return mask

    def index(self, dims: Sequence[Poly]) -> tuple[Tensor, ...]:
        """The index of the dense entries of a tensor with these dims: `new[coordinates.index(dims)] = dense`.

        One int64 tensor a dim, each of the shape [1, .., dense size, .., 1], so that they broadcast to the dense shape.
        """
        lists = [self.positions(d) for d in dims]
        return tuple(x.view([-1 if i == j else 1 for j in range(len(lists))]) for i, x in enumerate(lists))

    def part_positions(self, size: Poly, part: int, sizes: Sequence[int]) -> Tensor | None:
        """Index of each coordinate of one part (0: the query) of a fused projection, for widths of these sizes.

        int64 [size of the part]; None where the forward does not split `size` into two or three parts.
        """
        for layout in self._layouts.get(self.size_key(size), ()):
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
                    chosen = self.part_positions(piece, part, sizes)
                if chosen is not None:
                    ranges = [chosen if i == axis else torch.arange(v) for i, v in enumerate(values)]
                    return _row_major(ranges, values)
        return None

    def _is_proper(self, whole: Poly, layout: DimLayout) -> bool:
        """Every part is smaller than the whole, and the parts make it up at the dense and at the new sizes."""
        for sizes in (self.plan.table.sizes, self.plan.sizes):
            values, total = [p.evaluate(sizes) for p in layout.parts], whole.evaluate(sizes)
            combined = sum(values) if layout.kind == "sum" else math.prod(values)
            if combined != total or max(values) >= total or min(values) < 1:
                return False
        return True

    def _nested_groups(self) -> list[tuple[SizeKey, DimLayout]]:
        """Layouts of groups inside groups: where channels are read in 2 groups and in 4, each of the 2 holds 2 of the 4."""
        found = []
        for layouts in self._layouts.values():
            grouped = [
                (self.dense_size(x.parts[0]), x.parts[1])
                for x in layouts
                if x.kind == "product"
                and len(x.parts) == 2
                and self.dense_size(x.parts[0]) == self.new_size(x.parts[0])
            ]
            for few, wide in grouped:
                for many, narrow in grouped:
                    if many > few and many % few == 0:
                        parts = Poly.const(many // few), narrow
                        found.append((self.size_key(wide), DimLayout("product", parts)))
        return found

    def _find_positions(self, size: Poly, key: SizeKey) -> Tensor:
        n = self.dense_size(size)
        if self.new_size(size) == n:
            return torch.arange(n)
        layouts = self._layouts.get(key, [])
        certain = [x for x in layouts if all(self._is_certain(p) for p in x.parts)]
        placements = [self._place(x) for x in certain or layouts]
        if any(not torch.equal(p, placements[0]) for p in placements):
            names = ", ".join(sorted({self.plan.table.widths[v].name for v in size.variables}))
            raise UsageError(
                f"the forward splits the channels of {names} in two orders (a channel shuffle, or a view of one), so the "
                "dense channels have no single position in the wider layer",
                hint=HINT,
            )
        return placements[0] if placements else torch.arange(n)

    def _is_certain(self, part: Poly) -> bool:
        """The positions along `part` are known: it is a free width, does not grow, or has a recorded layout."""
        key = self.size_key(part)
        return self.dense_size(part) == self.new_size(part) or key in self._free or key in self._layouts

    def _place(self, layout: DimLayout) -> Tensor:
        parts = [self.positions(p) for p in layout.parts]
        sizes = [self.new_size(p) for p in layout.parts]
        if layout.kind == "product":
            return _row_major(parts, sizes)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return torch.cat([p + s for p, s in zip(parts, starts, strict=True)])


def _row_major(parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Flat index of every combination of coordinates: `parts` [n_i] along dims of `sizes` -> [n_0 * n_1 * ...]."""
    total = torch.zeros(1, dtype=torch.long)
    for part, size in zip(parts, sizes, strict=True):
        total = (total[:, None] * size + part).flatten()
    return total


@dataclass(frozen=True, slots=True)
class LayerWeight:
    """The weight of a linear or convolution by its symbolic dims, in the order of the tensor.

    Outputs are along `axis` (0, or 1 where the layer stores [in, out]), inputs along the other one of the first two
    dims. `computed`: the layer multiplies with what is computed from it.
    """

    key: str
    kind: str
    dims: tuple[Poly, ...]
    axis: int
    masked: bool
    computed: bool = False

    @property
    def outputs(self) -> Poly:
        """Output features (of a grouped transposed convolution: per group)."""
        return self.dims[self.axis]

    @property
    def inputs(self) -> Poly:
        """Input features (of a grouped convolution: per group)."""
        return self.dims[1 - self.axis]

    @property
    def bias_key(self) -> str:
        """The state_dict key that the layer's bias has, if there is one."""
        path, _, name = self.key.rpartition(".")
        return f"{path}.{name.replace('weight', 'bias')}".removeprefix(".")


def layer_weights(plan: Plan, structure: Structure, surgery: Surgery, dense: nn.Module) -> dict[str, LayerWeight]:
    """The weight of every linear and convolution in the plan, by its state_dict key."""
    masked = {m.key for m in surgery.masked}
    found = {}
    for row in plan.layers:
        key = row.layer.weight
        if key is None or row.layer.kind not in _KINDS or "weight" not in key:
            continue
        dims = structure.shapes[key]
        if len(dims) >= 2:
            path, _, name = key.rpartition(".")
            axis = int(name == "weight" and is_transposed(dense.get_submodule(path)))
            found[key] = LayerWeight(key, row.layer.kind, dims, axis, key in masked, row.layer.computed)
    return found


def canonical_names(dense: nn.Module) -> Mapping[str, str]:
    """Every name of a parameter, buffer or plain tensor -> the first name of the same tensor (tied ones have several)."""
    first: dict[int, str] = {}
    named = (*dense.named_parameters(remove_duplicate=False), *named_constants(dense))
    return {key: first.setdefault(id(tensor), key) for key, tensor in named}
