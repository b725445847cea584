"""The n best among the places of a mask, on any device, in a few passes over the weight.

`top` in this package does the same for the CPU, with as little memory as possible; this is for the inside of a training
loop, and holds a few masks and the values near the threshold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..randomness import words
from .top import nth_largest

_SAMPLE = 14  # log2 of the places that are looked at to guess the threshold
_SMALL = 1 << 17


def best(scores: Tensor, n: int, within: Tensor, places: int, key: int) -> Tensor:
    """Mask of the `n` highest of `scores` (any shape, float32, no NaN) among the `places` True of `within`.

    Of equal scores those with the higher `lots` come first.
    """
    if n >= places:
        return within.clone()
    if n <= 0:
        return torch.zeros_like(within)
    if 2 * n > places:  # the few that are left out are found faster
        return _highest(-scores, places - n, within, places, key, low_lots=True).logical_not_().logical_and_(within)
    return _highest(scores, n, within, places, key)


def lots(key: int | Tensor, places: Tensor) -> Tensor:
    """Random numbers in 0..2^32-1 that rank places with equal scores: int64 [*], a function of the place's number."""
    return words(key, places) >> 32 & 0xFFFFFFFF


def _highest(scores: Tensor, n: int, within: Tensor, places: int, key: int, *, low_lots: bool = False) -> Tensor:
    threshold = _nth(scores.reshape(-1), n, within.reshape(-1), places)
    chosen = (scores >= threshold).logical_and_(within)
    excess = int(chosen.count_nonzero()) - n
    if excess:
        flat = chosen.reshape(-1)
        tied = (scores == threshold).logical_and_(within).reshape(-1).nonzero()[:, 0]
        unlucky = lots(key, tied).topk(excess, largest=low_lots, sorted=False).indices
        chosen = flat.index_fill(0, tied[unlucky], False).view(scores.shape)
    return chosen


def _nth(scores: Tensor, n: int, within: Tensor, places: int) -> Tensor:
    """The n-th highest of scores [N] within the mask [N].

    A sample gives a pivot that almost surely lies a little below the answer; then only what lies above it is ranked.
    """
    if places > _SMALL:
        step = places >> _SAMPLE | 1
        sample = scores[::step][within[::step]]
        count, share = sample.numel(), n / places
        rank = int(share * count + 5 * (count * share * (1 - share)) ** 0.5) + 2
        if rank < count:
            pivot = sample.kthvalue(count - rank).values
            near = scores[(scores >= pivot).logical_and_(within)]
            if near.numel() >= n:
                return _ranked(near, n)
    return _ranked(scores[within], n)


def _ranked(values: Tensor, n: int) -> Tensor:
    """The n-th highest; on a GPU by a sort of these values, because kthvalue runs in a single block there."""
    return nth_largest(values, n) if values.device.type == "cpu" else values.sort(descending=True).values[n - 1]
