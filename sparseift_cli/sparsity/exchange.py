"""What a mask update does to one mask, as functions of tensors: drop and grow, prune, extend. Exact counts, fair ties.

Scores are float32 without NaN, of the mask's shape and on its device. Ties are broken by random numbers that a key and the
place alone decide, so every device and rank that has the same scores gets the same mask.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .selection import best
from .uniform import at_random

Regrow = Literal["allow", "forbid"]
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
