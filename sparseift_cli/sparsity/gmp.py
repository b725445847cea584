"""Gradual magnitude pruning: start dense, prune the smallest weights on a cubic schedule, never grow.

Source: Zhu, Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017, arXiv
1710.01878, eq. 1. Under Sparse Wide it starts with the whole widened network, so it costs more than the dense model: 1.19,
1.56, 2.69 times at sparsity .5, .75, .9.
"""

from __future__ import annotations

from fractions import Fraction
from typing import ClassVar

from ..isoflop import START_DENSITY, Schedule, nonzeros_at
from .algorithm import MaskAlgorithm


class GMP(MaskAlgorithm):
    """From dense to the attached number of non-zeros, at `delta_t`, 2 `delta_t`, ..., and the last time at `stop`."""

    name: ClassVar[str] = "gmp"
    start: ClassVar[Fraction | None] = START_DENSITY["gmp"]

    def nonzeros(self, step: int, start: int, final: int, schedule: Schedule) -> int:
        return nonzeros_at(step, start, final, schedule)
