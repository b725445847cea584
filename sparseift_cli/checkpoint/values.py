"""Scans the values of a checkpoint, tensor by tensor in bounded memory: zeros, NaN, inf and the pattern of the zeros.

Three patterns are looked for in a matrix, in one pass over its tiles: whole rows and columns of zeros; N:M groups (at
most N non-zeros in every M consecutive inputs); and blocks of R x C on a grid, each all zero or full. By chance a very
sparse matrix has empty groups too, so a pattern counts only where the other groups are *full*: random zeros leave most
groups with fewer than N non-zeros, and most non-zero blocks with zeros inside.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .facts import Checkpoint, TensorInfo
from .reading import ALIGN, TILE, Matrix, TensorReader, Tile, Unreadable, as_matrix

if TYPE_CHECKING:
    import torch


GROUPS = (2, 4, 8, 16)
SIZES = (1, 2, 4, 8, 16, 32, 64)  # sides of blocks, up to ALIGN
_FULL = 0.9  # of N non-zeros: what the average group must have, for an N:M pattern
_HOLES = 0.01  # zeros inside non-zero blocks, at most, as a share of the non-zeros: some weights are zero by themselves
_FEW = 0.01  # below this share of zeros a matrix is dense
_ENOUGH = 16  # groups, for a pattern to be more than chance


@dataclass(frozen=True, slots=True)
class TensorValues:
    """What a scan of one tensor found. `zeros` counts exact zeros (-0.0 too); `pattern` is of matrices and convolutions.

    Rows are the first dimension (output channels of a conv), columns all others (its input channels x taps).
    `unread` is why the values were not read; then the counts are None.
    """

    name: str
    numel: int
    zeros: int | None = None
    nans: int | None = None
    infs: int | None = None
    pattern: Pattern | None = None
    unread: str | None = None

    @property
    def density(self) -> float | None:
        """Share of the elements that are not zero."""
        return None if self.zeros is None or not self.numel else (self.numel - self.zeros) / self.numel

    @property
    def label(self) -> str:
        """The pattern of the zeros in a few words; empty for a dense tensor."""
        if self.unread:
            return self.unread
        if not self.zeros:
            return ""
        if self.pattern:
            return self.pattern.label(self.zeros, self.numel)
        return "all zero" if self.zeros == self.numel else ""


def scan(checkpoint: Checkpoint) -> Iterator[TensorValues]:
    """The values of every tensor, in the order of `checkpoint.tensors`; a tied tensor is read once.

    Raises:
        CheckpointError: a file was shortened, or made unreadable, since it was opened.
    """
    done: dict[str, TensorValues] = {}
    with TensorReader() as reader:
        for info in checkpoint.tensors:
            if info.tied_to is not None:
                yield replace(done[info.tied_to], name=info.name)
                continue
            done[info.name] = scan_tensor(reader, info)
            yield done[info.name]


def scan_tensor(reader: TensorReader, info: TensorInfo) -> TensorValues:
    """The values of one tensor."""
    matrix = as_matrix(info)
    finder = PatternFinder(matrix) if len(info.shape) > 1 and PatternFinder.fits(matrix) else None
    zeros = nans = infs = 0
    try:
        for tile in reader.tiles(matrix):
            values = comparable(tile.values)
            found = int(values.count_nonzero())
            zeros += values.numel() - found
            if not all_finite(values):
                nans += int(values.isnan().count_nonzero())
                infs += int(values.isinf().count_nonzero())
            if finder:
                finder.add(replace(tile, values=values), found)
    except Unreadable as reason:
        return TensorValues(info.name, info.numel, unread=str(reason))
    pattern = finder.pattern() if finder else None
    if pattern and info.blocks and zeros:  # known, and of any size
        layout = info.blocks.layout
        block = ValueBlock(layout.block, layout.block * layout.taps, layout.taps)
        pattern = replace(pattern, lines=None, nm=None, block=block)
    return TensorValues(info.name, info.numel, zeros, nans, infs, pattern)


def all_finite(values: torch.Tensor) -> bool:
    """Whether values of any shape have no NaN and no inf: their minimum and maximum would show both, in one fast pass."""
    if not values.is_floating_point() and not values.is_complex():
        return True
    import torch

    low, high = torch.aminmax(torch.view_as_real(values) if values.is_complex() else values)
    return bool(low.isfinite() and high.isfinite())


def comparable(values: torch.Tensor) -> torch.Tensor:
    """The same values (same shape) in a type that torch compares on a CPU, for 8-bit floats and wide unsigned integers."""
    import torch

    if values.is_floating_point() and values.dtype.itemsize == 1:
        return values.to(torch.float32)
    signed = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
    return values.view(signed[values.dtype]) if values.dtype in signed else values


# --- the pattern of the zeros of one matrix ---


@dataclass(frozen=True, slots=True)
class NM:
    """At most n non-zeros in every m consecutive entries along dimension `dim` of the tensor."""

    n: int
    m: int
    dim: int

    def __str__(self) -> str:
        return f"{self.n}:{self.m} along dim {self.dim}"


@dataclass(frozen=True, slots=True)
class ValueBlock:
    """Zeros come in blocks of rows x columns of the matrix; with `taps` > 1 the columns are whole channels of taps."""

    rows: int
    columns: int
    taps: int = 1

    def __str__(self) -> str:
        whole = f" ({self.columns // self.taps} channels of {self.taps} taps)" if self.taps > 1 else ""
        return f"blocks {self.rows}x{self.columns}{whole}"


@dataclass(frozen=True, slots=True)
class Pattern:
    """What was found. `most[dim][m]`: the most non-zeros in any aligned group of m along dimension dim."""

    empty_rows: int
    empty_columns: int
    lines: str | None  # "rows", "columns" or "rows and columns" where these explain every zero
    nm: NM | None
    block: ValueBlock | None
    most: dict[int, dict[int, int]]

    def label(self, zeros: int, numel: int) -> str:
        """The pattern in a few words: the simplest that explains the zeros."""
        if zeros == numel:
            return "all zero"
        if self.lines:
            return f"empty {self.lines}"
        if self.nm or self.block:
            return str(self.nm or self.block)
        return "" if zeros < _FEW * numel else "unstructured"


class PatternFinder:
    """Finds the pattern of one matrix: `add` every tile of it, in order, then call `pattern`."""

    def __init__(self, matrix: Matrix) -> None:
        import torch

        self.rows, self.columns, self.taps = matrix.rows, matrix.columns, matrix.taps
        self.swapped = matrix.swapped
        self.nonzeros = 0
        self.row_counts = torch.zeros(self.rows, dtype=torch.int64)
        self.column_any = torch.zeros(self.columns, dtype=torch.bool)
        channels = self.columns // self.taps
        self.groups = {
            **{(1, m): 0 for m in GROUPS if channels % m == 0 and self.rows * self.columns >= _ENOUGH * m},
            **{(0, m): 0 for m in GROUPS if self.rows % m == 0 and self.rows * self.columns >= _ENOUGH * m},
        }
        self.holes = {
            (r, c, taps): 0
            for taps in {1, self.taps}
            for r in SIZES
            for c in SIZES
            if self.rows % r == 0 and (self.columns // taps) % c == 0
        }

    @staticmethod
    def fits(matrix: Matrix) -> bool:
        """Whether tiles of this matrix hold whole groups, and its rows and columns are few enough to count each."""
        whole = ALIGN * matrix.taps * min(matrix.rows, ALIGN) <= TILE
        return whole and 1 < matrix.rows <= 1 << 24 and 1 < matrix.columns <= 1 << 24

    def add(self, tile: Tile, found: int) -> None:
        """Count one tile, `found` of whose values are not zero. Dense and empty tiles, the usual ones, take no time."""
        r, c = tile.values.shape
        self.nonzeros += found
        if found == 0:
            return
        if found == r * c:
            self.row_counts[tile.row : tile.row + r] += c
            self.column_any[tile.column : tile.column + c] = True
            self.groups = {key: key[1] for key in self.groups}
            return
        live = tile.values != 0
        self.row_counts[tile.row : tile.row + r] += live.count_nonzero(1)
        self.column_any[tile.column : tile.column + c] |= live.any(0)
        self._count_groups(live)
        for taps in {1, self.taps}:
            cells = live if taps == 1 else live.view(r, c // taps, taps).any(2)
            self._count_holes(cells, taps, found)

    def _count_groups(self, live: torch.Tensor) -> None:
        r, c = live.shape
        for (dim, m), most in self.groups.items():
            if most < m:
                shape = (r, -1, m, self.taps) if dim == 1 else (-1, m, c)
                in_group = live.view(shape).count_nonzero(2 if dim == 1 else 1)
                self.groups[dim, m] = max(most, int(in_group.max()))

    def _count_holes(self, cells: torch.Tensor, taps: int, found: int) -> None:
        """Per block size, count the zeros inside non-zero blocks. Where a size has too many, larger ones have too."""
        limit = _HOLES * self.rows * self.columns
        by_rows = cells
        for r in SIZES:
            if (r, 1, taps) not in self.holes:
                break
            by_rows = by_rows if r == 1 else by_rows[0::2] | by_rows[1::2]
            blocks = by_rows
            for c in SIZES:
                if (r, c, taps) not in self.holes:
                    break
                blocks = blocks if c == 1 else blocks[:, 0::2] | blocks[:, 1::2]
                self.holes[r, c, taps] += int(blocks.count_nonzero()) * r * c * taps - found
                if self.holes[r, c, taps] > limit:
                    self._drop(r, c, taps)

    def _drop(self, r: int, c: int, taps: int) -> None:
        self.holes = {k: v for k, v in self.holes.items() if not (k[0] >= r and k[1] >= c and k[2] == taps)}

    def pattern(self) -> Pattern:
        """What the zeros of the whole matrix look like."""
        empty_rows = int((self.row_counts == 0).sum())
        empty_columns = int((~self.column_any).sum())
        explained = self.rows * self.columns - (self.rows - empty_rows) * (self.columns - empty_columns)
        zeros = self.rows * self.columns - self.nonzeros
        lines = None
        if 0 < zeros == explained:
            names = (["rows"] if empty_rows else []) + (["columns"] if empty_columns else [])
            lines = " and ".join({"rows": "columns", "columns": "rows"}[n] if self.swapped else n for n in names)
        most: dict[int, dict[int, int]] = {}
        for (dim, m), n in self.groups.items():
            most.setdefault(self._dim(dim), {})[m] = n
        nm, block = (self._nm(), self._block()) if zeros >= _FEW * self.rows * self.columns else (None, None)
        empty = (empty_columns, empty_rows) if self.swapped else (empty_rows, empty_columns)
        return Pattern(*empty, lines, nm, block, most)

    def _dim(self, dim: int) -> int:
        return 1 - dim if self.swapped else dim

    def _nm(self) -> NM | None:
        """The N:M with the fewest non-zeros that most groups fill; if equal, along the inputs, then with the smallest M."""
        density = self.nonzeros / (self.rows * self.columns)
        found = [
            NM(n, m, self._dim(dim))
            for (dim, m), n in self.groups.items()
            if 0 < n < m and density >= _FULL * n / m and self.rows * self.columns >= _ENOUGH * m
        ]
        return min(found, key=lambda p: (p.n / p.m, -p.dim, p.m), default=None)

    def _block(self) -> ValueBlock | None:
        """The largest block size whose non-zero blocks are full; if equal, the squarest."""
        full = [key for key, holes in self.holes.items() if holes <= _HOLES * self.nonzeros and self.nonzeros]
        r, c, taps = max(full, key=lambda k: (k[0] * k[1] * k[2], -abs(k[0] - k[1])), default=(1, 1, 1))
        if r * c * taps == 1:
            return None
        return ValueBlock(c, r) if self.swapped else ValueBlock(r, c * taps, taps)
