"""RigL: drop the smallest weights, grow where the dense gradient is largest.

Source: Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery: Making All Tickets Winners", ICML 2020, arXiv 1911.11134,
algorithm 1 and section 3. Grown weights start at zero. The paper updates masks *in place of* a gradient step; here the step
is taken too, and first, and its gradient (of all micro-batches and ranks) decides: no batch is lost.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from .set import SET


class RigL(SET):
    """SET with another grow score: |dL/dw| of the update's step, at the places that have no weight."""

    name: ClassVar[str] = "rigl"
    uses_gradient: ClassVar[bool] = True

    def grow_scores(self, weight: Tensor, gradient: Tensor | None, key: int | Tensor) -> Tensor:
        assert gradient is not None
        return gradient.float().abs()
