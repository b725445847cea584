"""Mask patterns as a user of the package would write them; tests name them as `package.module:Name`."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from sparseift_cli.mask.layout import Layout
from sparseift_cli.mask.patterns import MaskPattern, WeightMatrix


class EvenColumns(MaskPattern):
    """Every second column of the weight stays empty; the weights of the others move one by one."""

    def grid(self, weight: WeightMatrix) -> tuple[int, int]:
        return weight.rows, (weight.columns + 1) // 2

    def to_cells(self, layout: Layout, matrix: Tensor) -> Tensor:
        return matrix[:, ::2]

    def from_cells(self, layout: Layout, cells: Tensor) -> Tensor:
        matrix = cells.new_zeros(layout.rows, layout.columns)
        matrix[:, ::2] = cells
        return matrix


class EvenPairs(EvenColumns):
    """Blocks of two even columns, which are zero or not together."""

    @property
    def sides(self) -> tuple[int, int]:
        return 1, 2

    def grid(self, weight: WeightMatrix) -> tuple[int, int]:
        return weight.rows, weight.columns // 4

    def to_cells(self, layout: Layout, matrix: Tensor) -> Tensor:
        across = layout.columns // 4
        return matrix[:, : 4 * across].reshape(layout.rows, across, 4)[..., ::2].sum(2)

    def from_cells(self, layout: Layout, cells: Tensor) -> Tensor:
        across = layout.columns // 4
        matrix = cells.new_zeros(layout.rows, layout.columns)
        matrix[:, : 4 * across].view(layout.rows, across, 4)[..., ::2] = cells[..., None]
        return matrix


class StillColumns(EvenColumns):
    """The same columns for static masks alone."""

    movable: ClassVar[bool] = False
