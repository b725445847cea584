"""What a mask update does to one mask, as functions of tensors: drop and grow, prune, extend. Exact counts, fair ties.

    drop scores ──► keep the best of the active places ──┐
    grow scores ──► take the best of the free places ────┴──► the new mask, with as many True as before

Scores are float32 without NaN, of the mask's shape and on its device. Equal scores are ranked by random numbers that are a
function of a key and the place, so every device and rank that has the same scores makes the same mask.

The package takes the n best of many scores in three places, for three reasons. `mask.select.top` makes masks at the start: on
the CPU, in the least memory, ties from a torch generator. `best` here is for the training loop: on any device, ties from a key.
`gpu.fast_selection` gives the masks of `best` without waiting for the device, which a CUDA graph needs, but can fail; then
`best` makes them. Their ties differ by design, and so would the masks if one replaced another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.randomness import words
from ..mask.quotas import best_of_rows, best_with_quotas
from ..mask.select import at_random, nth_largest
from .algorithms import Regrow

GROW_KEY = 0x5DEECE66D  # any number that is not zero: what is dropped and what grows are independent choices
_SAMPLE = 14  # log2 of the places from which the threshold is estimated
_SMALL = 1 << 17  # places that are ranked without an estimate


def drop_and_grow(
    mask: Tensor,
    active: int,
    drop_scores: Tensor,
    grow_scores: Tensor,
    n: int,
    key: int,
    regrow: Regrow = "allow",
) -> Tensor:
    """The mask [*shape] without its `n` lowest by `drop_scores`, with the `n` highest by `grow_scores`; as many True as before.

    >>> mask, drop = torch.tensor([True, True, False, False]), torch.tensor([5.0, 1.0, 0.0, 0.0])
    >>> drop_and_grow(mask, 2, drop, grow_scores=torch.tensor([0.0, 0.0, 2.0, 3.0]), n=1, key=0)
    tensor([ True, False, False,  True])

    Args:
        mask: bool [*shape], with `active` True.
        drop_scores: [*shape], read where `mask` is True.
        grow_scores: [*shape], read where the mask that remains is False.
        key: decides between equal scores.
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
    return best(grow_scores, n, free, places, key ^ GROW_KEY).logical_or_(kept)


def balanced_drop_and_grow(
    mask: Tensor,
    active: int,
    drop_scores: Tensor,
    grow_scores: Tensor,
    n: int,
    key: int,
    regrow: Regrow = "allow",
    groups: int = 1,
) -> Tensor:
    """`drop_and_grow` of a matrix [R, C] in which every row keeps its number of True, and every column, group by group.

    The `n` lowest are dropped as there; then each row takes as many places as it lost, in columns that lost some, the best first
    (`mask.quotas`). What was just dropped would always fit, so under `allow` rows and columns keep their numbers exactly. Under
    `forbid` a row drops no more than it has free places, and columns keep theirs as nearly as that leaves room for.

    >>> mask, drop = torch.eye(3, dtype=torch.bool), torch.diag(torch.tensor([1.0, 2.0, 9.0]))
    >>> balanced_drop_and_grow(mask, 3, drop, grow_scores=torch.rand(3, 3) + 1 - torch.eye(3), n=2, key=0).int()
    tensor([[0, 1, 0],
            [1, 0, 0],
            [0, 0, 1]], dtype=torch.int32)

    Args:
        groups: of a convolution: equal blocks of rows, whose columns are other inputs.
    """
    if n == 0:
        return mask.clone()
    kept = best(drop_scores, active - n, mask, active, key)
    free = ~kept
    if regrow == "forbid":
        free, dropped = ~mask, mask & ~kept
        excess = (dropped.sum(1) - free.sum(1)).clamp_(min=0)
        kept |= best_of_rows(drop_scores, dropped, excess, key)
    lost = mask & ~kept
    columns = lost.view(groups, -1, lost.shape[1]).sum(1)
    return best_with_quotas(grow_scores, free, lost.sum(1), columns, key ^ GROW_KEY, groups).logical_or_(kept)


def prune(mask: Tensor, active: int, scores: Tensor, n: int, key: int) -> Tensor:
    """The `n` highest by `scores` [*shape] of the `active` places of `mask` [*shape]: bool [*shape]."""
    return best(scores, n, mask, active, key)


def extend(mask: Tensor, active: int, n: int, generator: torch.Generator) -> Tensor:
    """A mask [*shape] with `n` True: the `active` ones of `mask` [*shape], and others at random."""
    places = mask.numel() - active
    if n <= active or not places:
        return mask.clone()
    added = at_random((1, places), n - active, generator).view(-1)
    return mask.clone().masked_scatter_(~mask, added.to(mask.device))


def best(scores: Tensor, n: int, within: Tensor, places: int, key: int) -> Tensor:
    """Mask [*shape] of the `n` highest of `scores` [*shape], float32 without NaN, among the `places` True of `within` [*shape].

    Of equal scores those with the higher `tie_keys` come first.
    """
    if n >= places:
        return within.clone()
    if n <= 0:
        return torch.zeros_like(within)
    if 2 * n > places:  # the few that are left out are found faster
        return _highest(-scores, places - n, within, places, key, low_first=True).logical_not_().logical_and_(within)
    return _highest(scores, n, within, places, key)


def tie_keys(key: int | Tensor, places: Tensor) -> Tensor:
    """Random numbers in 0..2^32-1 that rank places [*] with equal scores: int64 [*], functions of key and place alone."""
    return words(key, places) >> 32 & 0xFFFFFFFF


def _highest(scores: Tensor, n: int, within: Tensor, places: int, key: int, *, low_first: bool = False) -> Tensor:
    """`best` for 0 < n < places; `low_first` takes the lower tie keys first."""
    threshold = _nth(scores.reshape(-1), n, within.reshape(-1), places)
    chosen = (scores >= threshold).logical_and_(within)
    excess = int(chosen.count_nonzero()) - n
    if excess:
        flat = chosen.reshape(-1)
        tied = (scores == threshold).logical_and_(within).reshape(-1).nonzero()[:, 0]
        last = tie_keys(key, tied).topk(excess, largest=low_first, sorted=False).indices
        chosen = flat.index_fill(0, tied[last], False).view(scores.shape)
    return chosen


def _nth(scores: Tensor, n: int, within: Tensor, places: int) -> Tensor:
    """The n-th highest of scores [N] within the mask [N], a scalar.

    A sample gives a pivot that is almost surely a little below the answer, and only the scores above it are ranked: selecting
    among all of them would need several times the memory of the weight.
    """
    if places > _SMALL:
        step = places >> _SAMPLE | 1
        sample = scores[::step][within[::step]]
        count, share = sample.numel(), n / places
        rank = int(share * count + 5 * (count * share * (1 - share)) ** 0.5) + 2  # five standard deviations lower
        if rank < count:
            pivot = sample.kthvalue(count - rank).values
            near = scores[(scores >= pivot).logical_and_(within)]
            if near.numel() >= n:
                return _ranked(near, n)
    return _ranked(scores[within], n)


def _ranked(values: Tensor, n: int) -> Tensor:
    """The n-th highest; on a GPU by a sort of these values, because kthvalue runs in a single block there."""
    return nth_largest(values, n) if values.device.type == "cpu" else values.sort(descending=True).values[n - 1]
