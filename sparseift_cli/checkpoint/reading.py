"""Reads the values of tensors in tiles of bounded size, so that a tensor of any size needs the memory of one tile.

It uses plain reads at known offsets and no memory map: if a mapped file shrinks, the process is killed (SIGBUS); a read
that returns too little can be reported.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import CheckpointError
from .facts import BITS, Checkpoint, StoredBlocks, TensorInfo, is_readable
from .untrusted import printable

if TYPE_CHECKING:
    import torch

TILE = 1 << 21  # elements read at a time
ALIGN = 64  # tiles begin at multiples of this in both dims, so no block or N:M group up to this size is cut
GATHER = 1 << 27  # bytes that may be read for one tile of a tensor with an unusual stride


class Unreadable(Exception):
    """Why the values of a tensor are not read, in a few words."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A tensor as a matrix: rows are its first dimension, columns all others (of a conv: outputs by inputs x taps).

    A vector or a scalar is one row. A transposed matrix is read in the order of the file, with `swapped` set.
    """

    info: TensorInfo
    rows: int
    columns: int
    taps: int = 1  # columns per input channel
    swapped: bool = False


@dataclass(frozen=True, slots=True)
class Tile:
    """`values`, r x c, are rows [row, row + r) and columns [column, column + c) of a matrix."""

    row: int
    column: int
    values: torch.Tensor


def as_matrix(info: TensorInfo) -> Matrix:
    """`info` as the matrix that a scan reads."""
    shape, stride = info.shape, info.stride
    if len(shape) < 2:
        flat = replace(info, shape=(1, info.numel), stride=(info.numel, *(stride or (1,))))
        return Matrix(flat, 1, info.numel)
    if len(shape) == 2 and stride[0] < stride[1]:
        return Matrix(replace(info, shape=shape[::-1], stride=stride[::-1]), shape[1], shape[0], swapped=True)
    return Matrix(info, shape[0], prod(shape[1:]), prod(shape[2:]))


def read_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """The whole tensor `name` of `checkpoint.tensors`: of its shape [*shape], contiguous, in its own dtype.

    Raises:
        CheckpointError: no such tensor, a dtype that torch cannot hold, or the file has changed since it was opened.
    """
    info = checkpoint[name]
    try:
        with TensorReader() as reader:
            return reader.read(info).contiguous()
    except Unreadable as error:
        where = printable(str(checkpoint.path))
        raise CheckpointError(f"{where}: {printable(name)!r} cannot be read: {error}") from None


class TensorReader:
    """Reads from the files of checkpoints; keeps the last one open."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: BinaryIO | None = None

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def read(self, info: TensorInfo) -> torch.Tensor:
        """All of `info` as a tensor [*info.shape] with its stride, from one read of the bytes between its ends.

        Of a weight of stored blocks, the dense weight.
        """
        import torch

        _check(info)
        if info.blocks:
            matrix = as_matrix(info)
            return self._from_blocks(info.blocks, 0, matrix.rows, 0, matrix.columns).view(info.shape)
        begin, end = info.extent
        flat = self._elements(info, begin, end - begin)
        return flat.reshape(info.shape) if info.contiguous else torch.as_strided(flat, info.shape, info.stride)

    def tiles(self, matrix: Matrix) -> Iterator[Tile]:
        """All of `matrix` in tiles of about TILE elements; a tile without all columns has whole channels.

        Raises:
            Unreadable: the dtype or the stride does not allow reading it piece by piece.
        """
        rows, columns = matrix.rows, matrix.columns
        if rows * columns == 0:
            return
        height = min(rows, ALIGN)
        if height * columns <= TILE:
            height = max(TILE // columns // ALIGN * ALIGN, height)
            for row in range(0, rows, height):
                yield Tile(row, 0, self._row_block(matrix, row, min(height, rows - row)))
            return
        if not matrix.info.contiguous:
            raise Unreadable("its rows are too long for its stride")
        channels = ALIGN * matrix.taps
        unit = channels if channels * height <= TILE else 1
        width = TILE // height // unit * unit
        for row in range(0, rows, height):
            for column in range(0, columns, width):
                yield self._window(matrix, row, min(height, rows - row), column, min(width, columns - column))

    def _row_block(self, matrix: Matrix, row: int, n: int) -> torch.Tensor:
        info = matrix.info
        if info.blocks:
            return self._from_blocks(info.blocks, row, n, 0, matrix.columns)
        part = replace(info, shape=(n, *info.shape[1:]), first=info.first + row * info.stride[0])
        begin, end = part.extent
        if end - begin > max(GATHER, part.nbytes):
            raise Unreadable("its stride scatters a row over the whole file")
        return self.read(part).reshape(n, matrix.columns)

    def _window(self, matrix: Matrix, row: int, n: int, column: int, width: int) -> Tile:
        """Columns [column, column + width) of n rows of a contiguous matrix, with one read per row."""
        import torch

        info = matrix.info
        _check(info)
        if info.blocks:
            return Tile(row, column, self._from_blocks(info.blocks, row, n, column, width))
        size = BITS[info.dtype] // 8
        values = torch.empty(n, width, dtype=getattr(torch, info.dtype))
        for i in range(n):
            start = info.extent[0] + ((row + i) * matrix.columns + column) * size
            values[i] = self._elements(info, start, width * size)
        return Tile(row, column, values)

    def _from_blocks(self, blocks: StoredBlocks, row: int, n: int, column: int, width: int) -> torch.Tensor:
        """Rows [row, row + n) and columns [column, column + width) of a weight of stored blocks, read block by block."""
        import torch

        layout, info = blocks.layout, blocks.values
        side, across = layout.block, layout.block * layout.taps
        tile = torch.zeros(n, width, dtype=getattr(torch, info.dtype))
        rows = range(row // side, -(-(row + n) // side))  # of blocks, which the tile touches
        columns = range(column // across, -(-(column + width) // across))
        lists, inside = (columns, rows) if layout.transposed else (rows, columns)
        unit = info.numel // layout.num_blocks
        for i in lists:
            begin, end = blocks.offsets[i], blocks.offsets[i + 1]
            for k in range(
                bisect_left(blocks.columns, inside.start, begin, end),
                bisect_left(blocks.columns, inside.stop, begin, end),
            ):
                block = self.read(
                    replace(info, shape=info.shape[1:], stride=info.stride[1:], first=info.first + k * unit)
                )
                j = blocks.columns[k]
                if layout.transposed:
                    _place(tile, block.t(), j * side - row, i * side - column)
                else:
                    matrix = block.reshape(-1, side, side).permute(1, 2, 0).reshape(side, across)
                    _place(tile, matrix, i * side - row, j * across - column)
        return tile

    def _elements(self, info: TensorInfo, begin: int, nbytes: int) -> torch.Tensor:
        """`nbytes` of the storage from byte `begin` on, as a tensor [elements] of the dtype of `info`."""
        import torch

        dtype: torch.dtype = getattr(torch, info.dtype)
        if nbytes == 0:
            return torch.empty(0, dtype=dtype)
        raw = bytearray(nbytes)
        self._fill(info, begin, raw)
        if info.storage.big_endian != (sys.byteorder == "big"):
            width = dtype.itemsize // (2 if dtype.is_complex else 1)
            return torch.frombuffer(raw, dtype=torch.uint8).view(-1, width).flip(1).reshape(-1).view(dtype)
        return torch.frombuffer(raw, dtype=dtype)

    def _fill(self, info: TensorInfo, begin: int, raw: bytearray) -> None:
        path = info.storage.path
        try:
            if self._path != path or self._file is None:
                self._close()
                self._path, self._file = path, path.open("rb", buffering=0)
            self._file.seek(info.storage.offset + begin)
            view, done = memoryview(raw), 0
            while done < len(raw):
                got = self._file.readinto(view[done:])  # pyright: ignore[reportAttributeAccessIssue]
                if not got:
                    raise CheckpointError(f"{printable(str(path))}: became shorter while it was read")
                done += got
        except OSError as error:
            raise CheckpointError(f"{printable(str(path))}: {error.strerror}") from None

    def _close(self) -> None:
        if self._file:
            self._file.close()
        self._path = self._file = None


def _place(tile: torch.Tensor, block: torch.Tensor, row: int, column: int) -> None:
    """Copy a block [r, c] to (row, column) of a tile [n, width], both of which may be negative; what is outside is left out."""
    top, left = max(-row, 0), max(-column, 0)
    cut = block[top : tile.shape[0] - row, left : tile.shape[1] - column]
    tile[row + top : row + top + cut.shape[0], column + left : column + left + cut.shape[1]] = cut


def _check(info: TensorInfo) -> None:
    import torch

    if not is_readable(info.dtype) or not hasattr(torch, info.dtype):
        raise Unreadable(f"{info.dtype} values are not read")
