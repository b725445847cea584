"""Sparse Evolutionary Training: drop the smallest weights, grow as many at random.

Source: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by network
science", Nature Communications 2018, arXiv 1707.04780. There a fixed share of the weights closest to zero is exchanged after
every epoch; here every `delta_t` steps, with the schedule of the drop fraction that all algorithms share.
"""

from __future__ import annotations

from typing import ClassVar

from .algorithm import MaskAlgorithm


class SET(MaskAlgorithm):
    """Magnitude drops, chance grows; no dense gradient is ever needed."""

    name: ClassVar[str] = "set"
    exchanges: ClassVar[bool] = True
