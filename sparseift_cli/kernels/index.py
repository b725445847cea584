"""Where the blocks of a block-sparse weight are: block-CSR, a permutation for the transposed walk, and groups for dW.

A weight [R * B, C * B] is a grid of R x C blocks of B x B. The n stored blocks are ordered by row, then by column, as
`values` [n, B, B]. Every tensor here is int32 and has a size that depends on R, C and n alone: when blocks move, the index is
rewritten in place, and compiled code and captured graphs go on using it. Nothing here depends on B but the groups: cells of r x c
are indexed in the same way.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UsageError


class BlockIndex(NamedTuple):
    """The index of n blocks on a grid of R rows and C columns.

    Args:
        row_offsets: [R + 1], the blocks of row r are row_offsets[r] to row_offsets[r + 1].
        columns: [n], the column of each block.
        rows: [n], the row of each block.
        column_offsets: [C + 1], the same as row_offsets for a walk by columns.
        column_rows: [n], the row of each block, in the order of that walk.
        column_order: [n], the position in `values` of each block, in the order of that walk.
        groups: [groups, size], positions in `values` of blocks that share a row (or a column, see `shares_columns`), so that
            the weight gradient loads the shared operand once for all of them. A group that is not full repeats its first
            block; an unused group, at the end, is -1. [0, 0] for blocks under 32, which have no kernel that reads groups.
    """

    row_offsets: Tensor
    columns: Tensor
    rows: Tensor
    column_offsets: Tensor
    column_rows: Tensor
    column_order: Tensor
    groups: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor, block: int = 128) -> BlockIndex:
        """Index the True cells of `mask` [R, C], blocks of `block` x `block` weights.

        >>> index = BlockIndex.from_mask(torch.tensor([[True, False, True], [False, False, True]]))
        >>> index.row_offsets.tolist(), index.columns.tolist(), index.column_order.tolist()
        ([0, 2, 3], [0, 2, 2], [0, 1, 2])

        Raises:
            UsageError: the mask is not a matrix of bool, or has no block.
        """
        if mask.dim() != 2 or mask.dtype != torch.bool:
            raise UsageError(f"a mask of blocks is a bool matrix [rows, columns], not {mask.dtype} {list(mask.shape)}")
        rows, columns = mask.nonzero().unbind(1)
        if not len(rows):
            raise UsageError("a block-sparse weight needs at least one block")
        size = group_size(block, mask.shape[0], mask.shape[1], len(rows))
        return cls(*_tensors(rows, columns, mask.shape[0], mask.shape[1], size))

    @classmethod
    def from_pairs(cls, rows: Tensor, columns: Tensor, shape: tuple[int, int], block: int = 128) -> BlockIndex:
        """Index the blocks at (rows[k], columns[k]), two integer tensors [n], on a grid of `shape` (R, C), in any order.

        Raises:
            UsageError: a block is given twice, or is outside the grid.
        """
        down, across = shape
        outside = (rows < 0) | (rows >= down) | (columns < 0) | (columns >= across)
        if outside.any():
            k = int(outside.nonzero()[0])
            raise UsageError(
                f"block ({int(rows[k])}, {int(columns[k])}) is outside the grid of {down} x {across} blocks"
            )
        keys = (rows.long() * across + columns.long()).sort().values
        repeated = keys[1:] == keys[:-1]
        if repeated.any():
            key = int(keys[1:][repeated][0])
            raise UsageError(f"block ({key // across}, {key % across}) is given twice")
        mask = torch.zeros(down, across, dtype=torch.bool, device=rows.device)
        mask[rows.long(), columns.long()] = True
        return cls.from_mask(mask, block)

    @property
    def grid(self) -> tuple[int, int]:
        """(R, C): rows and columns of blocks."""
        return len(self.row_offsets) - 1, len(self.column_offsets) - 1

    @property
    def num_blocks(self) -> int:
        """n, the number of stored blocks."""
        return len(self.columns)

    def mask(self) -> Tensor:
        """Bool [R, C], True where a block is stored."""
        mask = torch.zeros(self.grid, dtype=torch.bool, device=self.columns.device)
        mask[self.rows.long(), self.columns.long()] = True
        return mask

    def move_(self, mask: Tensor) -> None:
        """Rewrite this index in place for the True cells of `mask` [R, C]: the same grid and number of blocks.

        It is made where the mask is: on the CPU, of a GPU's index, in one copy to the GPU and without waiting for it.

        Raises:
            UsageError: the mask has another grid or another number of blocks.
        """
        if tuple(mask.shape) != self.grid or int(mask.sum()) != self.num_blocks:
            raise UsageError(
                f"this index has {self.num_blocks} blocks on a grid of {self.grid[0]} x {self.grid[1]}, the new mask "
                f"{int(mask.sum())} on {' x '.join(map(str, mask.shape))}",
                hint="an index moves in place between masks of one size; make a new one with BlockIndex.from_mask",
            )
        rows, columns = mask.nonzero().unbind(1)
        made = _tensors(rows, columns, *self.grid, self.groups.shape[1])
        if mask.device != self.columns.device:
            packed = torch.cat([new.flatten() for new in made]).to(self.columns.device, non_blocking=True)
            parts = packed.split([new.numel() for new in made])
            made = [part.view(new.shape) for part, new in zip(parts, made, strict=True)]
        torch._foreach_copy_(list(self), made)  # pyright: ignore[reportPrivateImportUsage]


def group_size(block: int, num_rows: int, num_columns: int, num_blocks: int) -> int:
    """How many blocks share an operand in the weight gradient: enough for a wide product, few enough to fill the groups.

    0 for blocks that only kernels without groups take, those of CPUs.

    >>> group_size(128, 90, 23, 1024), group_size(64, 181, 45, 4096), group_size(64, 404, 101, 4096), group_size(4, 9, 9, 9)
    (2, 8, 2, 0)
    """
    if block < 32:
        return 0
    if block == 64 and num_blocks >= 48 * min(num_rows, num_columns):
        return 8
    return 4 if block == 32 else 2


def balanced_groups(num_lists: int, num_blocks: int, size: int) -> int:
    """The number of groups when the lists (rows or columns) of blocks differ by at most one block.

    >>> balanced_groups(num_lists=3, num_blocks=10, size=2)  # lists of 4, 3 and 3
    6
    """
    short, longer = divmod(num_blocks, num_lists)
    return longer * -(-(short + 1) // size) + (num_lists - longer) * -(-short // size)


def shares_columns(num_rows: int, num_columns: int, num_blocks: int, size: int) -> bool:
    """Are the blocks of a group in one column (otherwise in one row)? Whatever leaves fewer groups when lists are balanced.

    It depends on sizes alone, so that it never changes when blocks move. Rows win a near tie: they share the gradient of the
    output, which is the wider tensor where a layer widens.

    >>> shares_columns(num_rows=202, num_columns=50, num_blocks=1024, size=2)
    True
    """
    by_row, by_column = (balanced_groups(lists, num_blocks, size) for lists in (num_rows, num_columns))
    return by_column < 0.95 * by_row


def token_parts(groups: int, tokens: int, step: int, programs: int) -> int:
    """Into how many parts the tokens are cut, so that groups x parts fill `programs` places well; at most 16.

    More parts balance better, and each costs a float32 copy of the gradient, about as much time as 2,048 tokens.

    >>> token_parts(groups=512, tokens=16384, step=64, programs=132), token_parts(72, 16384, 64, 132)
    (1, 3)
    """

    def cost(parts: int) -> float:
        waves = -(-groups * parts // programs)
        return waves * (tokens / parts + (2048 if parts > 1 else 0))

    return min(range(1, max(2, min(16, tokens // (4 * step)) + 1)), key=cost)


def _offsets(lists: Tensor, count: int) -> Tensor:
    """[count + 1]: where each list starts, for `lists` [n], the list that each element is in."""
    offsets = torch.zeros(count + 1, dtype=torch.long, device=lists.device)
    offsets[1:] = torch.bincount(lists, minlength=count).cumsum(0)
    return offsets


def _groups(lists: Tensor, num_lists: int, size: int) -> Tensor:
    """[groups, size]: the blocks of each list, `size` at a time, for `lists` [n], the list of each block."""
    count = len(lists)
    order = lists.argsort(stable=True)
    lists = lists[order]
    place = torch.arange(count, device=lists.device) - _offsets(lists, num_lists)[lists]
    group = (place % size == 0).cumsum(0) - 1
    most = (count + num_lists * (size - 1)) // size  # no mask of these sizes has more groups
    groups = torch.full((min(most, count), size), -1, dtype=torch.long, device=lists.device)
    groups[group, place % size] = order
    return torch.where(groups < 0, groups[:, :1], groups)


def _tensors(rows: Tensor, columns: Tensor, num_rows: int, num_columns: int, size: int) -> list[Tensor]:
    """The fields of a BlockIndex, from block coordinates [n] that are sorted by row, then by column."""
    order = (columns * num_rows + rows).argsort()
    row_offsets, column_offsets = _offsets(rows, num_rows), _offsets(columns, num_columns)
    if not size:
        groups = rows.new_empty(0, 0)
    elif shares_columns(num_rows, num_columns, len(rows), size):
        groups = _groups(columns, num_columns, size)
    else:
        groups = _groups(rows, num_rows, size)
    fields = (row_offsets, columns, rows, column_offsets, rows[order], order, groups)
    return [field.int().contiguous() for field in fields]
