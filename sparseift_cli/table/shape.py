"""The dimensions of a dense layer: inputs, outputs, kernel taps and groups. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Shape:
    """A dense layer: `inputs` and `outputs` in channels or features over all groups, `taps` = k_h * k_w (1 for a linear)."""

    inputs: int
    outputs: int
    taps: int = 1
    groups: int = 1

    @property
    def weights(self) -> int:
        """Number of weights, biases apart."""
        return self.taps * self.inputs * self.outputs // self.groups

    def blocks(self, rows: int, columns: int) -> int:
        """Whole blocks of rows (outputs) x columns (inputs and taps); none crosses from one group to the next."""
        return self.groups * (self.outputs // self.groups // rows) * (self.taps * self.inputs // self.groups // columns)

    @property
    def rank(self) -> Fraction:
        """r0, the rank per group at which U V costs what the dense layer costs: D_in D_out / (D_in + D_out)."""
        d_in, d_out = self.taps * self.inputs // self.groups, self.outputs // self.groups
        return Fraction(d_in * d_out, d_in + d_out)

    @property
    def depthwise(self) -> bool:
        """One input channel a group."""
        return self.groups > 1 and self.groups == self.inputs
