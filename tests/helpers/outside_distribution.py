"""A distribution as a user of the package would write it; tests name it as `package.module:Name`."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from sparseift_cli.plan.distributions import BudgetedLayer, Distribution, share_by_score


class Front(Distribution):
    """Layers near the input are denser: layer i of n gets a density proportional to n - i."""

    def densities(self, layers: Sequence[BudgetedLayer], macs: Fraction) -> list[Fraction]:
        return share_by_score([len(layers) - i for i in range(len(layers))], layers, macs)


class Broken(Front):
    """One density too few."""

    def densities(self, layers: Sequence[BudgetedLayer], macs: Fraction) -> list[Fraction]:
        return super().densities(layers, macs)[1:]
