"""Mask patterns: where the non-zeros of a weight may be. How many fit, how a mask is drawn, what moves, whether a mask has it.

A weight is seen as the matrix [rows, columns] of `Layout`: rows are outputs, columns are the weights that one output has. A
pattern divides places of it into *cells* of equal size that are zero or not as a whole; everything else follows from where the
cells are. From outside, one is added by `PATTERNS.register(name, it)`, by an entry point of the group `sparseift.patterns`,
or as `package.module:Name` (an object or a subclass of `MaskPattern`) where a pattern is named. A complete one:

    class EvenColumns(MaskPattern):  # every second column stays empty
        def grid(self, weight):
            return weight.rows, (weight.columns + 1) // 2

        def to_cells(self, layout, matrix):
            return matrix[:, ::2]

        def from_cells(self, layout, cells):
            matrix = cells.new_zeros(layout.rows, layout.columns)
            matrix[:, ::2] = cells
            return matrix

Needs torch only to draw a mask or to look at one: the plan counts by these objects.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, ClassVar, Protocol, Self
from zlib import crc32

from ..base.registry import Registry
from ..errors import UsageError
from .layout import Layout

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class WeightMatrix(Protocol):
    """The dimensions of a weight as a matrix: a `Layout`, or the `Shape` of a plan."""

    @property
    def rows(self) -> int:
        """Outputs over all groups."""
        ...

    @property
    def columns(self) -> int:
        """Weights of one output."""
        ...

    @property
    def groups(self) -> int:
        """Groups of a convolution, equal parts of the rows."""
        ...


class MaskPattern:
    """Where the non-zeros of a weight may be. By itself: cells of `sides` on a grid, which fills each group from its corner."""

    movable: ClassVar[bool] = True
    """Whether mask algorithms may move its cells. Else it works with static masks alone, and `draw` may ignore cells."""
    unrestricted: ClassVar[bool] = False
    """Whether the cells are all single weights: any set of weights is a mask of this pattern."""
    by_layer: ClassVar[bool] = False
    """Whether a plan gives every layer another form of it: `for_layer`."""

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The pattern that `text` means, by a class of patterns that are written with numbers (4x4); None if it means none."""
        return None

    @property
    def name(self) -> str:
        """What messages call it."""
        return type(self).__name__

    def moves_with(self, keeps_rows: bool, keeps_columns: bool) -> bool:
        """Whether masks keep it under an algorithm by which rows, or columns, keep their numbers of non-zeros."""
        return self.movable

    def for_layer(self, weight: str, whole: bool = True) -> MaskPattern:
        """The form of it that the layer has whose weight is called so; not `whole`: one of several layers in that weight."""
        return self

    # --- what the plan counts ---

    @property
    def sides(self) -> tuple[int, int]:
        """(outputs, weights of an output) of a cell."""
        return 1, 1

    @property
    def unit(self) -> int:
        """Weights of a cell."""
        return prod(self.sides)

    @property
    def density(self) -> Fraction | None:
        """The only density that it can have; None where non-zeros are any number of cells."""
        return None

    @property
    def width_multiple(self) -> int:
        """What new widths are a multiple of, beside `TransformSpec.width_multiple`: always where `density` is fixed, else as far
        as widths stay near to what the sparsity asks for.
        """
        return 1

    def grid(self, weight: WeightMatrix) -> tuple[int, int]:
        """(rows, columns) of cells; no cell crosses from one group to the next."""
        down, across = self.sides
        return weight.groups * (weight.rows // weight.groups // down), weight.columns // across

    def places(self, weight: WeightMatrix) -> int:
        """The weights that are in cells."""
        return prod(self.grid(weight)) * self.unit

    def room(self, weight: WeightMatrix) -> int:
        """The most non-zeros of a mask; with a fixed density the only number."""
        return self.places(weight)

    # --- cells of a mask ---

    def to_cells(self, layout: Layout, matrix: Tensor) -> Tensor:
        """Sums over each cell: [rows, columns] to [cell rows, cell columns], without places that are in no cell."""
        rows, columns = self.sides
        if self.unit == 1:
            return matrix
        down, across = self.grid(layout)
        whole = matrix.reshape(layout.groups, -1, layout.columns)
        whole = whole[:, : down // layout.groups * rows, : across * columns]
        return whole.reshape(down, rows, across, columns).sum((1, 3))

    def from_cells(self, layout: Layout, cells: Tensor) -> Tensor:
        """A mask of cells [cell rows, cell columns] as [rows, columns]; places outside every cell stay empty."""
        rows, columns = self.sides
        if self.unit == 1:
            return cells
        down, across = self.grid(layout)
        matrix = cells.new_zeros(layout.groups, layout.rows // layout.groups, layout.columns)
        spread = cells.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        matrix[:, : down // layout.groups * rows, : across * columns] = spread.reshape(
            layout.groups, down // layout.groups * rows, across * columns
        )
        return matrix.reshape(layout.rows, layout.columns)

    # --- a mask ---

    def draw(
        self,
        layout: Layout,
        nnz: int,
        generator: torch.Generator,
        scores: Tensor | None = None,
        *,
        connect: bool = True,
        balance: tuple[int, int] = (1, 1),
    ) -> Tensor:
        """A mask [rows, columns] with `nnz` True: at random, or the cells with the largest sum of `scores` [rows, columns].

        Random cells of more than one weight are balanced, as `balanced_masks` has it.

        Args:
            connect: no row of cells without one, where there are enough.
            balance: equal blocks of rows, and of columns, that get equal shares.
        """
        import torch

        from .select import at_random, disjoint, without_nan

        grid, count = self.grid(layout), nnz // self.unit
        if scores is None and self.unit > 1:
            (mask,) = self.draw_disjoint(layout, [nnz], generator, balance=balance)
            return mask
        keys = None if scores is None else without_nan(self.to_cells(layout, scores))
        if keys is None and balance == (1, 1):
            cells = at_random(grid, count, generator)
            if not connect or not cells.numel() or bool(cells.view(torch.uint8).amax(1).all()):
                return self.from_cells(layout, cells)
        (cells,) = disjoint(grid, [count], generator, keys, connect=connect, balance=balance)
        return self.from_cells(layout, cells)

    def draw_disjoint(
        self,
        layout: Layout,
        nnzs: Sequence[int],
        generator: torch.Generator,
        *,
        connect: bool = True,
        balance: tuple[int, int] = (1, 1),
    ) -> list[Tensor]:
        """Random masks [rows, columns] with `nnzs` True, no place in two of them. Arguments as in `draw`."""
        from .balanced import balanced_masks
        from .select import disjoint

        grid, counts = self.grid(layout), [nnz // self.unit for nnz in nnzs]
        if self.unit > 1:
            chosen = balanced_masks(grid, counts, generator, balance=balance, groups=layout.groups)
        else:
            chosen = disjoint(grid, counts, generator, connect=connect, balance=balance)
        return [self.from_cells(layout, cells) for cells in chosen]

    def has(self, layout: Layout, mask: Tensor) -> bool:
        """Whether a mask [rows, columns] has the pattern: every cell is full or empty, and nothing is outside of them."""
        if self.unrestricted:
            return True
        full = self.from_cells(layout, self.to_cells(layout, mask.float()) == self.unit)
        return bool((full == mask).all())

    def check_counts(self, layout: Layout, nnzs: Sequence[int]) -> None:
        """Check that there are disjoint masks with these numbers of non-zeros.

        Raises:
            UsageError: there are none.
        """
        named, space = f"a weight of {layout.rows} outputs x {layout.columns}", self.room(layout)
        if self.density is not None:
            if any(nnz != space for nnz in nnzs):
                raise UsageError(f"{self.name} gives {named} {space} non-zeros, not {_listed(nnzs)}")
            return
        if min(nnzs, default=0) < 0 or sum(nnzs) > space:
            raise UsageError(f"{_listed(nnzs)} non-zeros do not fit {named}: {self.name} has room for {space}")
        if any(nnz % self.unit for nnz in nnzs):
            raise UsageError(f"{_listed(nnzs)} non-zeros are not whole {self.name} blocks of {self.unit}")


class Unstructured(MaskPattern):
    """Any weight may be a non-zero."""

    unrestricted: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "unstructured"


@dataclass(frozen=True, slots=True)
class Block(MaskPattern):
    """Non-zeros come in blocks of `rows` outputs by `columns` weights of an output: 4x4.

    What fills no whole block at the end of a group's rows, or of the columns, stays empty. So Sparse Wide makes widths
    multiples of B where blocks are square: B outputs by B inputs, with all taps of a kernel or one (64x64, 64x576).
    """

    rows: int
    columns: int

    @classmethod
    def parse(cls, text: str) -> Self | None:
        found = re.fullmatch(r"(\d+)x(\d+)", text)
        return cls(int(found[1]), int(found[2])) if found and int(found[1]) * int(found[2]) else None

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.columns}"

    @property
    def sides(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def width_multiple(self) -> int:
        """B of square blocks."""
        return 1 if self.columns % self.rows else self.rows


@dataclass(frozen=True, slots=True)
class NofM(MaskPattern):
    """N non-zeros in every M consecutive inputs of an output: 2:4. A last group of r < M inputs has r * N // M.

    Masks are static. Sparse Wide makes widths multiples of M, and rounds them down, to stay within the budget.
    """

    movable: ClassVar[bool] = False

    n: int
    m: int

    @classmethod
    def parse(cls, text: str) -> Self | None:
        found = re.fullmatch(r"(\d+):(\d+)", text)
        return cls(int(found[1]), int(found[2])) if found and 0 < int(found[1]) <= int(found[2]) else None

    @property
    def name(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> Fraction:
        """N / M."""
        return Fraction(self.n, self.m)

    @property
    def width_multiple(self) -> int:
        """M."""
        return self.m

    def room(self, weight: WeightMatrix) -> int:
        """The only number of non-zeros."""
        whole, rest = divmod(weight.columns, self.m)
        return weight.rows * (whole * self.n + rest * self.n // self.m)

    def draw(
        self,
        layout: Layout,
        nnz: int,
        generator: torch.Generator,
        scores: Tensor | None = None,
        *,
        connect: bool = True,
        balance: tuple[int, int] = (1, 1),
    ) -> Tensor:
        """A mask [rows, columns], of the best of each group by `scores` [rows, columns]. Balanced by itself."""
        from .n_of_m import n_of_m_masks

        (mask,) = n_of_m_masks(layout, self.n, self.m, 1, generator, scores)
        return mask

    def draw_disjoint(
        self,
        layout: Layout,
        nnzs: Sequence[int],
        generator: torch.Generator,
        *,
        connect: bool = True,
        balance: tuple[int, int] = (1, 1),
    ) -> list[Tensor]:
        """Random masks [rows, columns] that share no place: the groups of each are other inputs."""
        from .n_of_m import n_of_m_masks

        return n_of_m_masks(layout, self.n, self.m, len(nnzs), generator)

    def has(self, layout: Layout, mask: Tensor) -> bool:
        """Whether every group of M inputs of a mask [rows, columns] has N."""
        from .n_of_m import groups_of

        live = layout.by_tap(mask)
        for first, m in groups_of(layout.columns, self.m):
            whole = (layout.columns - first) // m * m
            held = live[:, first : first + whole].reshape(-1, m).sum(1)
            if bool((held != m * self.n // self.m).any()):
                return False
        return True

    def check_counts(self, layout: Layout, nnzs: Sequence[int]) -> None:
        MaskPattern.check_counts(self, layout, nnzs)
        if len(nnzs) * self.n > self.m:
            groups = len(nnzs) * self.n
            raise UsageError(f"{len(nnzs)} disjoint {self.name} masks need groups of {groups} inputs or more")


@dataclass(frozen=True, slots=True)
class Shuffled(MaskPattern):
    """Blocks after a random order of each layer's outputs, and of its inputs: shuffled:64x64.

    Every output then shares its inputs with others than its neighbours, which is all that blocks ask of it, and no block kernel
    computes them. All taps of an input stay together. `shuffled:64x64:7` is another order; a plan gives each layer one of its
    own, by a number made of this one and the name of its weight.
    """

    by_layer: ClassVar[bool] = True

    block: Block
    seed: int = 0

    @classmethod
    def parse(cls, text: str) -> Self | None:
        found = re.fullmatch(r"shuffled:(\d+x\d+)(?::(\d+))?", text)
        block = Block.parse(found[1]) if found else None
        return cls(block, int(found[2] or 0)) if found and block else None

    @property
    def name(self) -> str:
        return f"shuffled:{self.block.name}" + (f":{self.seed}" if self.seed else "")

    def for_layer(self, weight: str, whole: bool = True) -> MaskPattern:
        return replace(self, seed=1 + crc32(f"{self.seed} {weight}".encode()) % 999_999) if whole else self.block

    @property
    def sides(self) -> tuple[int, int]:
        return self.block.sides

    @property
    def width_multiple(self) -> int:
        return self.block.width_multiple

    def to_cells(self, layout: Layout, matrix: Tensor) -> Tensor:
        """Sums over each cell: [rows, columns], brought into the random order, to [cell rows, cell columns]."""
        rows, columns, _, _ = _orders(self.seed, layout, str(matrix.device))
        return self.block.to_cells(layout, matrix[rows][:, columns])

    def from_cells(self, layout: Layout, cells: Tensor) -> Tensor:
        """A mask of cells [cell rows, cell columns] as [rows, columns], brought back from the random order."""
        _, _, rows, columns = _orders(self.seed, layout, str(cells.device))
        return self.block.from_cells(layout, cells)[rows][:, columns]

    def draw_disjoint(
        self,
        layout: Layout,
        nnzs: Sequence[int],
        generator: torch.Generator,
        *,
        connect: bool = True,
        balance: tuple[int, int] = (1, 1),
    ) -> list[Tensor]:
        """Random masks [rows, columns] as of blocks, but without equal shares for heads: rows of blocks have outputs of all."""
        return MaskPattern.draw_disjoint(self, layout, nnzs, generator, connect=connect)


@lru_cache(maxsize=1024)
def _orders(seed: int, layout: Layout, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A random order of the rows [R], in each group, and of the columns [C], by channel; and their inverses. On the device."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    size = layout.rows // layout.groups
    groups = [g * size + torch.randperm(size, generator=generator) for g in range(layout.groups)]
    rows, channels = torch.cat(groups), torch.randperm(layout.channels, generator=generator)
    columns = (channels[:, None] * layout.taps + torch.arange(layout.taps)).flatten()
    rows, columns, row_back, column_back = (t.to(device) for t in (rows, columns, rows.argsort(), columns.argsort()))
    return rows, columns, row_back, column_back


@dataclass(frozen=True, slots=True)
class Even(MaskPattern):
    """Single weights with constant fan-in: outputs differ by at most one in their number of non-zeros.

    With `columns` the fan-out is constant too: so do the inputs of a group, at each tap. Where the number of non-zeros is no
    multiple of the rows, random ones have one more: so budgets are met exactly. Masks stay so under balanced growth alone.
    """

    movable: ClassVar[bool] = False

    columns: bool = False

    @property
    def name(self) -> str:
        return "fan_in_out" if self.columns else "fan_in"

    def moves_with(self, keeps_rows: bool, keeps_columns: bool) -> bool:
        return keeps_rows and (keeps_columns or not self.columns)

    def draw(
        self,
        layout: Layout,
        nnz: int,
        generator: torch.Generator,
        scores: Tensor | None = None,
        *,
        connect: bool = True,
        balance: tuple[int, int] = (1, 1),
    ) -> Tensor:
        """A mask [rows, columns] with `nnz` True: at random, or of the best `scores` [rows, columns] of each row."""
        from .balanced import best_even_mask
        from .select import without_nan

        if scores is None:
            (mask,) = self.draw_disjoint(layout, [nnz], generator, balance=balance)
            return mask
        return best_even_mask(
            without_nan(scores), nnz, generator, columns=self.columns, balance=balance, groups=layout.groups
        )

    def draw_disjoint(
        self,
        layout: Layout,
        nnzs: Sequence[int],
        generator: torch.Generator,
        *,
        connect: bool = True,
        balance: tuple[int, int] = (1, 1),
    ) -> list[Tensor]:
        """Random masks [rows, columns] that share no place, each with even rows, and columns where those are to be even."""
        from .balanced import balanced_masks, masks_with_even_rows

        grid = layout.rows, layout.columns
        if self.columns:
            return balanced_masks(grid, nnzs, generator, balance=balance, groups=layout.groups)
        return masks_with_even_rows(grid, nnzs, generator, balance=balance)

    def has(self, layout: Layout, mask: Tensor) -> bool:
        """Whether the rows of a mask [rows, columns], and with `columns` the columns of each group, differ by at most one."""
        counts = [mask.sum(1)[None]]
        if self.columns:
            counts.append(mask.unflatten(0, (layout.groups, -1)).sum(1))
        return all(bool((n.amax(1) - n.amin(1) <= 1).all()) for n in counts)


def _listed(nnzs: Sequence[int]) -> str:
    return " + ".join(map(str, nnzs)) or "no"


# --- by name ---


def _why_not(entry: object) -> str | None:
    if isinstance(entry, MaskPattern) or (isinstance(entry, type) and issubclass(entry, MaskPattern)):
        return None
    return f"it is no MaskPattern of sparseift_cli.mask.patterns, but {type(entry).__name__}"


UNSTRUCTURED = Unstructured()
SHIPPED: dict[str, MaskPattern | type[MaskPattern]] = {
    "unstructured": UNSTRUCTURED,
    "n_of_m": NofM,
    "blocks": Block,
    "shuffled": Shuffled,
    "fan_in": Even(),
    "fan_in_out": Even(columns=True),
}
PATTERNS = Registry[MaskPattern | type[MaskPattern]]("mask pattern", "patterns", SHIPPED, check=_why_not)
"""Patterns, and classes of patterns that are written with numbers."""

WRITTEN = r"^(unstructured|\d+:\d+|\d+x\d+|shuffled:\d+x\d+(:\d+)?|[A-Za-z_][\w.-]*(:[A-Za-z_][\w.]*)?)$"
"""How a pattern is written, as a regular expression: 2:4, 4x4, shuffled:4x4, a name, package.module:Name."""

AUTO = "auto"
_CHOSEN = re.compile(rf"{AUTO}|blocks([1-9]\d*)")


def is_chosen(text: str) -> bool:
    """Whether a transform that names this leaves the pattern of each layer to `plan.layer_patterns`: auto, blocks64."""
    return _CHOSEN.fullmatch(text) is not None


def side_of_blocks(text: str) -> int | None:
    """The side that `blocks64` names; None for anything else."""
    found = _CHOSEN.fullmatch(text)
    return int(found[1]) if found and found[1] else None


def parse_pattern(text: str) -> MaskPattern:
    """The pattern that is written so: `unstructured`, `2:4`, `4x4`, `shuffled:4x4`, a registered name, `package.module:Name`.

    >>> parse_pattern("4x4").room(Layout((10, 9)))  # 2 x 2 whole blocks of 16
    64

    Raises:
        UsageError: there is none.
    """
    found = _in_numbers(text, SHIPPED.values())
    if found is None and re.fullmatch(r"[A-Za-z_].*", text) and (":" in text or text in PATTERNS):
        entry = PATTERNS.get(text)
        found = entry if isinstance(entry, MaskPattern) else None if _writes_numbers(entry) else entry()
    found = found or _in_numbers(text, map(PATTERNS.get, PATTERNS))
    if found is None:
        others = [name for name in PATTERNS if name not in SHIPPED]
        more = f"; or {', '.join(others)}" if others else ""
        raise UsageError(
            f"unknown pattern {text!r}",
            hint="use unstructured, N:M (2:4), a block RxC (4x4), shuffled:RxC, fan_in or fan_in_out; a transform also takes "
            f"auto and blocks64{more}",
        )
    return found


def _in_numbers(text: str, entries: Iterable[MaskPattern | type[MaskPattern]]) -> MaskPattern | None:
    """`unstructured`, or the first pattern that one of the classes reads in `text`."""
    if text == "unstructured":
        return UNSTRUCTURED
    classes = (entry for entry in entries if isinstance(entry, type))
    return next((found for entry in classes if (found := entry.parse(text))), None)


def _writes_numbers(entry: type[MaskPattern]) -> bool:
    """Whether a class is one of patterns that are written with numbers."""
    return entry.parse.__func__ is not MaskPattern.parse.__func__


def has_pattern(mask: Tensor, pattern: str, groups: int = 1, transposed: bool = False) -> bool:
    """Whether `mask` [*shape] has the pattern: every block full or empty and none outside of them, or N of every M inputs.

    Raises:
        UsageError: a pattern that does not exist, or not the shape of a weight.
    """
    kind, layout = parse_pattern(pattern), Layout(tuple(mask.shape), groups, transposed)
    return kind.unrestricted or kind.has(layout, layout.to_matrix(mask))


def room(shape: Sequence[int], pattern: str = "unstructured", *, groups: int = 1, transposed: bool = False) -> int:
    """The most non-zeros that `pattern` lets a weight of `shape` have; for N:M the only number.

    >>> room((4, 6, 3, 3), "2x9", groups=2)  # a convolution of 4 outputs, of which each group of 2 reads 6 inputs
    216

    Raises:
        UsageError: an unknown pattern or an impossible shape.
    """
    return parse_pattern(pattern).room(Layout(tuple(shape), groups, transposed))
