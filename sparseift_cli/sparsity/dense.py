"""No sparsity: the transformed network with every weight in use, or a network that has no masks at all."""

from __future__ import annotations

from fractions import Fraction
from typing import ClassVar

from ..isoflop import Schedule
from .algorithm import MaskAlgorithm


class Dense(MaskAlgorithm):
    """Masks are opened wholly and stay so: 3 f_D a step. The Sparsifier has nothing to do."""

    name: ClassVar[str] = "dense"
    start: ClassVar[Fraction | None] = Fraction(1)

    def nonzeros(self, step: int, start: int, final: int, schedule: Schedule) -> int:
        return start
