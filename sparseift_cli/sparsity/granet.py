"""GraNet: prune gradually from half density, and at every update also exchange weights as RigL does.

Source: Liu et al., "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration", NeurIPS 2021, arXiv
2106.10404, algorithm 1: the cubic schedule of Zhu & Gupta, then regeneration by gradient at an unchanged number of non-zeros.
The paper ranks the weights of all layers together; an iso-FLOP plan has fixed every layer's number, so each layer is pruned
by itself (the paper's "uniform" variant).
"""

from __future__ import annotations

from fractions import Fraction
from typing import ClassVar

from ..isoflop import START_DENSITY, Schedule, nonzeros_at
from .rigl import RigL


class GraNet(RigL):
    """RigL on masks that GMP's schedule thins out, from density 0.5 or the final one where that is higher."""

    name: ClassVar[str] = "granet"
    start: ClassVar[Fraction | None] = START_DENSITY["granet"]

    def nonzeros(self, step: int, start: int, final: int, schedule: Schedule) -> int:
        return nonzeros_at(step, start, final, schedule)
