"""A weight as the matrix that its mask is drawn on: rows are outputs, columns are the weights that one output has.

A linear layer or convolution [out, in / groups, *kernel] is `weight.flatten(1)`: one column per input channel of the
group and tap, taps innermost. Weights whose first dimension is the inputs, Hugging Face's Conv1D [in, out] and
transposed convolutions [in, out / groups, *kernel], are transposed first (`transposed`). No torch until a tensor is given.

    >>> layout = Layout((4, 6, 3, 3), groups=2)  # a convolution of 4 outputs, of which each group of 2 reads 6 inputs
    >>> layout.rows, layout.columns
    (4, 54)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


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


def part_name(key: str, start: int, stop: int) -> str:
    """How messages, plans and checkpoints call rows [start, stop) of a weight.

    >>> part_name("cross.in_proj_weight", 0, 64)
    'cross.in_proj_weight[0:64]'
    """
    return f"{key}[{start}:{stop}]"
