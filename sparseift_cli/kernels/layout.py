"""How a weight of stored blocks is written in a state dict, and the checks of one that comes from a file.

Under the path of the layer, in place of `weight` [*shape], there are

    values       [n, B, B], of a convolution [n, taps, B, B]: outputs x inputs, ordered by row of blocks, then by column
    row_offsets  int32 [R + 1]: the blocks of row r are row_offsets[r] to row_offsets[r + 1]
    columns      int32 [n]: the column of each block
    layout       int32 [1 + dims]: 1 where the weight is [inputs, outputs] (Hugging Face's Conv1D), else 0; then its shape

so that a state dict alone is enough to compute the dense weight. This module imports no torch: listing a file needs none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from ..errors import UsageError

VALUES, OFFSETS, COLUMNS, LAYOUT = PARTS = ("values", "row_offsets", "columns", "layout")
_LARGEST = 2**31 - 1  # of a size in an int32 index
_SMALL = 2**24  # elements of a weight that may have any density
_SPARSEST = 4096  # elements of a larger weight for each that is stored: a small file never asks for a huge tensor


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """A weight [*shape] of which `num_blocks` blocks of `block` outputs x `block` inputs (x all taps) are stored.

    >>> layout = BlockLayout((512, 2048), transposed=True, block=128, num_blocks=16)
    >>> layout.grid, layout.taps, layout.nnz, layout.numel, str(layout)
    ((16, 4), 1, 262144, 1048576, '16 blocks 128x128 of 512x2048')
    """

    shape: tuple[int, ...]
    transposed: bool
    block: int
    num_blocks: int

    @property
    def grid(self) -> tuple[int, int]:
        """(R, C): rows and columns of blocks, outputs by inputs."""
        outputs, inputs = self.shape[:2][::-1] if self.transposed else self.shape[:2]
        return outputs // self.block, inputs // self.block

    @property
    def taps(self) -> int:
        """Weights of one output and one input: 9 of a 3x3 convolution, 1 of a linear layer."""
        return prod(self.shape[2:])

    @property
    def numel(self) -> int:
        """Elements of the weight, zeros and all."""
        return prod(self.shape)

    @property
    def nnz(self) -> int:
        """Elements that are stored."""
        return self.num_blocks * self.block**2 * self.taps

    def __str__(self) -> str:
        return f"{self.num_blocks:,} blocks {self.pattern} of {'x'.join(map(str, self.shape))}"

    @property
    def pattern(self) -> str:
        """The size of a block as a matrix [outputs, inputs x taps], as masks have it: "128x128", "64x576"."""
        return f"{self.block}x{self.block * self.taps}"


def key(path: str, name: str) -> str:
    """The name of a tensor of the layer at `path`: "fc", "values" -> "fc.values"."""
    return f"{path}.{name}" if path else name


def compact_paths(names: Collection[str]) -> list[str]:
    """The layers of stored blocks, by the names of all tensors of a state dict, in their order.

    >>> compact_paths(["fc.values", "fc.bias", "fc.row_offsets", "fc.columns", "fc.layout", "head.weight"])
    ['fc']

    Raises:
        UsageError: one of the tensors of a layer is missing, or it has a `weight` too.
    """
    names = dict.fromkeys(names)
    paths = [path for name in names if (path := _path_of(name)) is not None and key(path, COLUMNS) in names]
    for path in paths:
        missing = [part for part in PARTS if key(path, part) not in names]
        if missing:
            raise UsageError(
                f"{path or 'the state dict'} is stored in blocks, and has no {' and no '.join(missing)}",
                hint="the file is incomplete; save the model again",
            )
        if key(path, "weight") in names:
            raise UsageError(f"{path or 'the state dict'} has its weight twice, dense and in blocks")
    return paths


def _path_of(name: str) -> str | None:
    path, _, leaf = name.rpartition(".")
    return path if leaf == OFFSETS else None


def checked_layout(
    path: str, values: Sequence[int], offsets: Sequence[int], columns: Sequence[int], layout: Sequence[int]
) -> BlockLayout:
    """The layout of the weight at `path`, after checking that its tensors agree, in time proportional to their sizes.

    Args:
        path: named in errors.
        values: the shape of `values`.
        offsets, columns, layout: the content of `row_offsets`, `columns` and `layout`.

    Raises:
        UsageError: sizes that do not agree or are impossible, offsets that fall, columns outside the grid, not in order or
            given twice.
    """
    found = _layout_of(path, tuple(values), layout)
    rows, across = found.grid
    if len(offsets) != rows + 1:
        raise _wrong(path, f"row_offsets has {len(offsets):,} entries, and {rows:,} rows of blocks need {rows + 1:,}")
    if len(columns) != found.num_blocks:
        raise _wrong(path, f"columns has {len(columns):,} entries for {found.num_blocks:,} blocks")
    if offsets[0] != 0 or offsets[-1] != len(columns) or any(a > b for a, b in pairwise(offsets)):
        raise _wrong(path, f"row_offsets do not rise from 0 to the {len(columns):,} blocks")
    for row, (begin, end) in enumerate(pairwise(offsets)):
        _check_row(path, row, columns[begin:end], across)
    return found


def _check_row(path: str, row: int, columns: Sequence[int], across: int) -> None:
    before = -1
    for column in columns:
        if not 0 <= column < across:
            raise _wrong(path, f"block ({row}, {column}) is outside the grid, which has {across:,} columns")
        if column == before:
            raise _wrong(path, f"block ({row}, {column}) is given twice")
        if column < before:
            raise _wrong(path, f"the columns of row {row} are not in order")
        before = column


def _layout_of(path: str, values: tuple[int, ...], layout: Sequence[int]) -> BlockLayout:
    """The layout, from the shape of `values` and the content of `layout`, whose sizes are checked before any is used."""
    if not 3 <= len(layout) <= 6 or layout[0] not in (0, 1) or (layout[0] and len(layout) != 3):
        raise _wrong(path, "its layout is not [transposed, outputs, inputs, ...]")
    shape = tuple(int(size) for size in layout[1:])
    if not all(0 < size <= _LARGEST for size in shape):
        raise _wrong(path, f"its layout has the shape {_sizes(shape)}")
    taps = prod(shape[2:])
    if len(values) not in (3, 4) or (len(values) == 4 and values[1] != taps) or (len(values) == 3 and taps != 1):
        raise _wrong(path, f"values are {_sizes(values)}, for a weight {_sizes(shape)}")
    n, block, width = values[0], values[-2], values[-1]
    if block != width or block < 1 or shape[0] % block or shape[1] % block:
        raise _wrong(path, f"blocks of {block:,}x{width:,} do not divide a weight {_sizes(shape)}")
    found = BlockLayout(shape, bool(layout[0]), block, n)
    if not 0 < found.nnz <= found.numel:
        raise _wrong(path, f"{n:,} blocks of {block:,}x{block:,} are not a part of a weight {_sizes(shape)}")
    if found.numel > max(_SMALL, _SPARSEST * found.nnz):
        raise _wrong(path, f"{found.nnz:,} stored values are too few for a weight {_sizes(shape)}")
    return found


def _sizes(shape: Iterable[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _wrong(path: str, what: str) -> UsageError:
    return UsageError(
        f"{path or 'the weight'} is stored in blocks, and its tensors do not agree: {what}",
        hint="the file is damaged or was changed; save the model again",
    )
