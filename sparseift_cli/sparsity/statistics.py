"""What masks did: density, how much of the weight was ever looked at, how much the last update moved."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .sparse_weight import SparseWeight


@dataclass(frozen=True, slots=True)
class WeightStatistics:
    """Counts of one sparse weight (or of several, added up), and the rates that follow from them."""

    weights: int
    nnz: int
    ever_active: int
    churned: int
    """Places that the last mask update made active."""

    @property
    def density(self) -> float:
        return self.nnz / self.weights if self.weights else 1.0

    @property
    def itop_rate(self) -> float:
        """Share of the places that have ever been active (Liu et al. 2021, "In-Time Over-Parameterization")."""
        return self.ever_active / self.weights if self.weights else 1.0

    @property
    def churn(self) -> float:
        """Share of the non-zeros that the last mask update replaced."""
        return self.churned / self.nnz if self.nnz else 0.0


def statistics_of(w: SparseWeight) -> WeightStatistics:
    """The counts of one weight; one pass over the record of where it has been active."""
    return WeightStatistics(w.factor.numel(), w.nnz, int(w.ever.count_nonzero()), w.churned)


def total(parts: Iterable[WeightStatistics]) -> WeightStatistics:
    """The counts of all weights together."""
    found = list(parts)
    return WeightStatistics(
        sum(p.weights for p in found), sum(p.nnz for p in found), sum(p.ever_active for p in found),
        sum(p.churned for p in found),
    )  # fmt: skip
