"""The dimensions of one layer as plain numbers: inputs, outputs, kernel taps and groups."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Shape:
    """A layer: `inputs` and `outputs` are channels or features over all groups, `taps` is k_h * k_w (1 for a linear layer).

    >>> conv = Shape(inputs=64, outputs=128, taps=9)
    >>> conv.weights, conv.blocks(16, 16)  # 128 x 576 weights: 8 x 36 blocks of 16 x 16
    (73728, 288)
    >>> conv.rank  # U V of this rank has as many weights: 576 * 128 / (576 + 128)
    Fraction(1152, 11)
    """

    inputs: int
    outputs: int
    taps: int = 1
    groups: int = 1

    @property
    def weights(self) -> int:
        """Number of weights, without biases."""
        return self.taps * self.inputs * self.outputs // self.groups

    def blocks(self, rows: int, columns: int) -> int:
        """Number of whole blocks of `rows` outputs x `columns` inputs (times taps); no block crosses groups."""
        return self.groups * (self.outputs // self.groups // rows) * (self.taps * self.inputs // self.groups // columns)

    @property
    def rank(self) -> Fraction:
        """r0, the rank per group at which U V costs as much as the layer: D_in * D_out / (D_in + D_out)."""
        d_in, d_out = self.taps * self.inputs // self.groups, self.outputs // self.groups
        return Fraction(d_in * d_out, d_in + d_out)

    @property
    def depthwise(self) -> bool:
        """Whether every group has one input channel."""
        return self.groups > 1 and self.groups == self.inputs
