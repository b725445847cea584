"""What a sparse training algorithm decides. Everything else (when, how many, exactness, state) is the Sparsifier's.

The axes are separate: a pattern (unstructured, blocks) says what moves together, a schedule when and how many, and an
algorithm which: by a drop score, a grow score and a density to start from. RigL is SET with another grow score.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from ..isoflop import Schedule
from ..randomness import counters, words


@dataclass(frozen=True)
class MaskAlgorithm:
    """Masks that stay as they are; subclasses say what moves.

    A drop score ranks active weights, the lowest go first; a grow score ranks free places, the highest come first. Both are
    float32, in the weight's shape and on its device.
    """

    name: ClassVar[str]
    exchanges: ClassVar[bool] = False
    """Weights move at mask updates: as many are grown as were dropped."""
    uses_gradient: ClassVar[bool] = False
    """The grow score needs the dense gradient of the update's step."""
    start: ClassVar[Fraction | None] = None
    """Density at step 0 where that is above the final one; None: the masks that are attached."""

    def drop_scores(self, weight: Tensor) -> Tensor:
        """Magnitude: |w| after the optimiser step."""
        return weight.detach().float().abs()

    def grow_scores(self, weight: Tensor, gradient: Tensor | None, key: int | Tensor) -> Tensor:
        """Random: every free place is as likely as any other. The same numbers on every device, made there.

        Minus a number from [0, 1): floats are finest near zero, where the highest of these lie, so that ties are rare.
        """
        random = words(key, counters(0, weight.numel(), weight.device))
        return random.bitwise_and_((1 << 63) - 1).to(torch.float32).mul_(-(2.0**-63)).view(weight.shape)

    def nonzeros(self, step: int, start: int, final: int, schedule: Schedule) -> int:
        """The non-zeros (or blocks) that step `step` computes with."""
        return final
