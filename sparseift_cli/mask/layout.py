"""A weight as the matrix that its mask is drawn on: rows are outputs, columns are the weights that one output has.

A linear layer or convolution [out, in / groups, *kernel] is `weight.flatten(1)`: one column per input channel of the
group and tap, taps innermost. Weights whose first dimension is the inputs, Hugging Face's Conv1D [in, out] and
transposed convolutions [in, out / groups, *kernel], are transposed first (`transposed`).

    >>> layout = Layout((4, 6, 3, 3), groups=2)  # a convolution of 4 outputs, of which each group of 2 reads 6 inputs
    >>> layout.rows, layout.columns, room((4, 6, 3, 3), "2x9", groups=2)
    (4, 54, 216)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from ..errors import UsageError


@dataclass(frozen=True, slots=True)
class NofM:
    """N non-zeros in every M consecutive inputs; a last group of r < M inputs has r * N // M."""

    n: int
    m: int

    def per_row(self, columns: int) -> int:
        """Non-zeros of a row of that many columns, as the plan counts them."""
        whole, rest = divmod(columns, self.m)
        return whole * self.n + rest * self.n // self.m


@dataclass(frozen=True, slots=True)
class Block:
    """Non-zeros come in blocks of rows x columns on a grid; 1 x 1 is unstructured."""

    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.rows * self.columns


def parse_pattern(pattern: str) -> NofM | Block:
    """`unstructured`, `2:4` or `4x4`.

    Raises:
        UsageError: none of these.
    """
    if pattern == "unstructured":
        return Block(1, 1)
    found = re.fullmatch(r"(\d+)([:x])(\d+)", pattern)
    first, second = (int(found[1]), int(found[3])) if found else (0, 0)
    if found and found[2] == ":" and 0 < first <= second:
        return NofM(first, second)
    if found and found[2] == "x" and first * second:
        return Block(first, second)
    raise UsageError(f"unknown pattern {pattern!r}", hint="use unstructured, N:M (2:4) or a block RxC (4x4)")


@dataclass(frozen=True, slots=True)
class Layout:
    """The shape of a weight and the meaning of its dimensions: `groups` of a convolution, `transposed` where inputs come first.

    Raises:
        UsageError: not the shape of a weight matrix or kernel, or groups that do not divide it.
    """

    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False

    def __post_init__(self) -> None:
        if len(self.shape) < 2 or min(self.shape) < 1:
            raise UsageError(f"a mask needs a weight of two dimensions or more, none of them empty, not {self._named}")
        if self.groups < 1 or self.shape[0] % self.groups:
            raise UsageError(f"{self._named} does not split into {self.groups} groups")

    @property
    def _named(self) -> str:
        return f"shape {'x'.join(map(str, self.shape))}"

    @property
    def rows(self) -> int:
        """Outputs over all groups."""
        return self.shape[1] * self.groups if self.transposed else self.shape[0]

    @property
    def channels(self) -> int:
        """Input channels of one group."""
        return self.shape[0] // self.groups if self.transposed else self.shape[1]

    @property
    def taps(self) -> int:
        return prod(self.shape[2:])

    @property
    def columns(self) -> int:
        return self.channels * self.taps

    def to_matrix(self, weight: Tensor) -> Tensor:
        """`weight` [*shape] as [rows, columns]; a copy where the weight is transposed."""
        if not self.transposed:
            return weight.reshape(self.rows, self.columns)
        grouped = weight.reshape(self.groups, self.channels, -1, self.taps)
        return grouped.transpose(1, 2).reshape(self.rows, self.columns)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """[rows, columns] as a contiguous [*shape]."""
        if not self.transposed:
            return matrix.reshape(self.shape).contiguous()
        grouped = matrix.reshape(self.groups, -1, self.channels, self.taps)
        return grouped.transpose(1, 2).reshape(self.shape).contiguous()

    def by_tap(self, matrix: Tensor) -> Tensor:
        """[rows, columns] with the columns in the order taps x channels, where neighbours are inputs at the same tap."""
        return matrix.reshape(self.rows, self.channels, self.taps).transpose(1, 2).reshape(self.rows, -1)

    def by_channel(self, matrix: Tensor) -> Tensor:
        """The inverse of `by_tap`: [rows, columns] with the columns in the order channels x taps again."""
        return matrix.reshape(self.rows, self.taps, self.channels).transpose(1, 2).reshape(self.rows, -1)

    def grid(self, block: Block) -> tuple[int, int]:
        """(rows, columns) of whole blocks, rows over all groups: no block crosses from one group to the next."""
        return self.groups * (self.rows // self.groups // block.rows), self.columns // block.columns

    def to_blocks(self, matrix: Tensor, block: Block) -> Tensor:
        """Sums [block rows, block columns] over the blocks of [rows, columns], without what fills no block."""
        if block.size == 1:
            return matrix
        down, across = self.grid(block)
        whole = matrix.reshape(self.groups, -1, self.columns)
        whole = whole[:, : down // self.groups * block.rows, : across * block.columns]
        return whole.reshape(down, block.rows, across, block.columns).sum((1, 3))

    def from_blocks(self, blocks: Tensor, block: Block) -> Tensor:
        """A mask [block rows, block columns] as [rows, columns]; places outside every block stay empty."""
        if block.size == 1:
            return blocks
        down, across = self.grid(block)
        matrix = blocks.new_zeros(self.groups, self.rows // self.groups, self.columns)
        spread = blocks.repeat_interleave(block.rows, 0).repeat_interleave(block.columns, 1)
        matrix[:, : down // self.groups * block.rows, : across * block.columns] = spread.reshape(
            self.groups, down // self.groups * block.rows, across * block.columns
        )
        return matrix.reshape(self.rows, self.columns)


def room(
    shape: Sequence[int], pattern: str | NofM | Block = "unstructured", *, groups: int = 1, transposed: bool = False
) -> int:
    """The most non-zeros that `pattern` lets a weight of `shape` have; for N:M the only number.

    Raises:
        UsageError: an unknown pattern or an impossible shape.
    """
    layout = Layout(tuple(shape), groups, transposed)
    kind = parse_pattern(pattern) if isinstance(pattern, str) else pattern
    if isinstance(kind, NofM):
        return layout.rows * kind.per_row(layout.columns)
    return prod(layout.grid(kind)) * kind.size
