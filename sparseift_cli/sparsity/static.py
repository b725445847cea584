"""Static sparsity: the masks of the start, for the whole run."""

from __future__ import annotations

from typing import ClassVar

from .algorithm import MaskAlgorithm


class Static(MaskAlgorithm):
    """Masks never move. Costs 3 f_S a step, and is what SET, RigL and the others are compared with."""

    name: ClassVar[str] = "static"
