"""The dimensions of one layer as plain numbers: inputs, outputs, kernel taps and groups."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Shape:
    """A layer: `inputs` and `outputs` are channels or features over all groups, `taps` is k_h * k_w (1 for a linear layer).

    >>> conv = Shape(inputs=64, outputs=128, taps=9)
    >>> conv.weights, conv.rows, conv.columns
    (73728, 128, 576)
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

    @property
    def rows(self) -> int:
        """Rows of the weight as a matrix: outputs over all groups."""
        return self.outputs

    @property
    def columns(self) -> int:
        """Columns of the weight as a matrix: the weights that one output has."""
        return self.taps * self.inputs // self.groups

    @property
    def rank(self) -> Fraction:
        """r0, the rank per group at which U V costs as much as the layer: D_in * D_out / (D_in + D_out)."""
        d_in, d_out = self.taps * self.inputs // self.groups, self.outputs // self.groups
        return Fraction(d_in * d_out, d_in + d_out)

    @property
    def depthwise(self) -> bool:
        """Whether every group has one input channel."""
        return self.groups > 1 and self.groups == self.inputs
