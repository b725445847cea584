"""What masks did: density, how much of a weight has ever been active, how much the last update replaced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..base.text import some_of
from ..errors import CheckFailed
from .sparse_weight import SparseWeight

# Are the masks equal on every rank of a torch.distributed run?

_WORD = 8  # bytes that are hashed at a time
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 over the golden ratio, as a signed number


def fingerprint(mask: Tensor) -> Tensor:
    """A 64-bit hash of a boolean mask, as an int64 scalar on its device: words of 8 places, each times its own odd number.

    Any single difference changes it; two random masks agree with probability of about 2^-56. No more: it is no
    protection against somebody who wants two masks to agree.
    """
    flat = mask.detach().reshape(-1).view(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % _WORD))
    words = flat.view(torch.int64)
    place = torch.arange(1, words.numel() + 1, device=words.device)
    return (words * ((place * _ODD) | 1)).sum()


def check_ranks(masks: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Compare all masks (bool, any shape, by weight name) over the ranks: one hash a mask, two small all-reduces.

    Every rank of the group must call it. In a single process there is nothing to do.

    Raises:
        CheckFailed: on every rank, naming the weights whose masks differ.
    """
    if not masks or not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    low = torch.stack([fingerprint(mask) for mask in masks.values()])
    high = low.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN, group)
    dist.all_reduce(high, dist.ReduceOp.MAX, group)
    differ = [name for name, same in zip(masks, (low == high).tolist(), strict=True) if not same]
    if differ:
        raise CheckFailed(
            f"masks differ between ranks: {some_of(differ)}",
            hint="average gradients over all ranks before sparsifier.step(), and give every rank the same seed",
        )


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
    return WeightStatistics(w.numel, w.nnz, w.num_ever_active, w.read_num_grown())


def total(parts: Iterable[WeightStatistics]) -> WeightStatistics:
    """The counts of all weights together."""
    found = list(parts)
    return WeightStatistics(
        sum(p.weights for p in found),
        sum(p.nnz for p in found),
        sum(p.ever_active for p in found),
        sum(p.churned for p in found),
    )
