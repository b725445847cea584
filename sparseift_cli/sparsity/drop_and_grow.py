"""The n best among the places of a mask, on any device, in a few passes over the weight.

`top` in this package does the same for the CPU, with as little memory as possible; this is for the inside of a training
loop, and holds a few masks and the values near the threshold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.randomness import words
from ..mask.select import at_random, nth_largest
from .algorithms import Regrow

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


# What a mask update does to one mask, as functions of tensors: drop and grow, prune, extend. Exact counts, fair ties.
# Scores are float32 without NaN, of the mask's shape and on its device. Ties are broken by random numbers that a key and the
# place alone decide, so every device and rank that has the same scores gets the same mask.

GROWS = 0x5DEECE66D  # any number that is not zero


def exchange(
    mask: Tensor,
    active: int,
    drop_scores: Tensor,
    grow_scores: Tensor,
    n: int,
    key: int,
    regrow: Regrow = "allow",
) -> Tensor:
    """The mask with its `n` lowest by `drop_scores` given up for the `n` highest by `grow_scores`; as many True as before.

    Args:
        mask: bool, any shape, with `active` True.
        drop_scores: looked at where `mask` is True.
        grow_scores: looked at where the mask that remains is False.
        key: decides between equal scores; `GROWS` away from it for growing, so that the two choices are independent.
        regrow: `allow`, as RigL: what was just dropped competes with all other places. `forbid`: it does not, and no more
            is dropped than there are free places.

    Sources: Mocanu et al. 2018 (SET, random `grow_scores`); Evci et al. 2020 (RigL, |gradient|), algorithm 1.
    """
    if regrow == "forbid":
        n = min(n, mask.numel() - active)
    if n == 0:
        return mask.clone()
    kept = best(drop_scores, active - n, mask, active, key)
    free = torch.logical_not(mask if regrow == "forbid" else kept)
    places = mask.numel() - (active if regrow == "forbid" else active - n)
    return best(grow_scores, n, free, places, key ^ GROWS).logical_or_(kept)


def prune(mask: Tensor, active: int, scores: Tensor, n: int, key: int) -> Tensor:
    """The `n` highest by `scores` of the `active` places of `mask`."""
    return best(scores, n, mask, active, key)


def extend(mask: Tensor, active: int, n: int, generator: torch.Generator) -> Tensor:
    """A mask with `n` True that has all of the `active` ones of `mask` and others at random."""
    places = mask.numel() - active
    if n <= active or not places:
        return mask.clone()
    added = at_random((1, places), n - active, generator).view(-1)
    return mask.clone().masked_scatter_(~mask, added.to(mask.device))
