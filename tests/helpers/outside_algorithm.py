"""A mask algorithm as a stranger would write it, ten lines of it his own; tests name it as `package.module:Name`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from sparseift_cli.base.options import Option
from sparseift_cli.sparsity.algorithms import DenseGradient, DropAndGrow, WeightView


@dataclass(frozen=True, kw_only=True)
class Sensitivity(DropAndGrow):
    """Drops where |weight^power * gradient| is smallest, grows where |gradient| is largest."""

    dense_gradient: ClassVar[DenseGradient] = "at updates"

    power: Annotated[float, Option("Exponent of the weight in the drop score.", minimum=0)] = 1.0

    def drop_scores(self, at: WeightView) -> Tensor:
        assert at.gradient is not None
        return at.weight.abs() ** self.power * at.gradient.abs()

    def grow_scores(self, at: WeightView) -> Tensor:
        assert at.gradient is not None
        return at.gradient.abs()
