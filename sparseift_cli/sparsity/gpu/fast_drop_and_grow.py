"""`drop_and_grow` for a GPU: the same masks, of a whole network, in a few passes and without waiting for the device once.

With each mask comes a number on the device, `uncertain`: zero where the mask is the right one. Where it is not, the caller uses
`drop_and_grow` for that weight. So all masks of a network together wait for the device once, to read these numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..algorithms import Regrow
from ..drop_and_grow import GROW_KEY
from .fast_selection import Search, highest, search_numbers
from .primitives import as_words, branches, flat, unflat

NUMBERS = 8
AT_ONCE = 1 << 27  # places, in which 2.7 GB of intermediate tensors are made


@dataclass(frozen=True, slots=True)
class FastUpdate:
    """The arguments of `drop_and_grow` for one mask [*shape] with at least one active place."""

    mask: Tensor
    active: int
    drop_scores: Tensor
    grow_scores: Tensor
    numbers: Tensor
    """`update_numbers`: int64 [NUMBERS] on the device; a CUDA graph reads them at every replay."""
    most: int
    """An upper bound of the places that are dropped, at any replay."""
    regrow: Regrow = "allow"
    drop_by: Callable[[Tensor], Tensor] | None = None
    """Makes scores [*] of `drop_scores` [*] where these are weights still: only active places need scores."""


def update_numbers(size: int, active: int, n: int, key: int, regrow: Regrow) -> list[int]:
    """What differs between two updates that drop n of the `active` places of a mask of `size`: NUMBERS integers."""
    if regrow == "forbid":
        n = min(n, size - active)
    return [*search_numbers(active, n, key), *search_numbers(size, n, key ^ GROW_KEY)]


def in_groups(sizes: Sequence[int]) -> Iterator[range]:
    """Which masks, of so many places, are updated at once: an update holds some twenty bytes a place until it is done."""
    first = total = 0
    for i, size in enumerate(sizes):
        if i > first and total + size > AT_ONCE:
            yield range(first, i)
            first, total = i, 0
        total += size
    if sizes:
        yield range(first, len(sizes))


def on_device(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 [len(rows), NUMBERS], copied without waiting for the device: from pinned memory."""
    held = torch.tensor(rows, dtype=torch.int64)
    return held.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else held


@torch.no_grad()
def fast_drop_and_grow(updates: Sequence[FastUpdate]) -> tuple[list[Tensor], Tensor]:
    """The mask [*shape] of `drop_and_grow` for each, and `uncertain`: int64 [len(updates)], 0 where the mask is the right one."""
    device, each = updates[0].mask.device, list(enumerate(updates))
    drops = list[Search]()
    with branches(device) as branch:
        for k, w in each:
            with branch(k):
                places = torch.nonzero_static(flat(w.mask, w.mask), size=w.active).view(-1)
                scores = flat(w.drop_scores, w.mask)[places]
                scores = (scores if w.drop_by is None else w.drop_by(scores)).neg_()  # the highest are dropped
            drops.append(Search(scores, w.numbers[: NUMBERS // 2], w.most, w.mask, places))
    dropped, uncertain = highest(drops, low_first=True)
    grows, kept = list[Search](), list[Tensor]()
    with branches(device) as branch:
        for k, w in each:
            with branch(k):
                before, places = flat(w.mask, w.mask), drops[k].places
                assert places is not None
                kept.append(before.scatter(0, places, ~dropped[k]))
                scores = flat(w.grow_scores, w.mask)
            barred = before if w.regrow == "forbid" else kept[k]
            grows.append(Search(scores, w.numbers[NUMBERS // 2 :], w.most, w.mask, barred=barred))
    grown, more = highest(grows)
    with branches(device) as branch:
        for k, _ in each:
            with branch(k):
                new, stayed = as_words(grown[k], kept[k])
                new |= stayed
    return [unflat(new, w.mask) for new, w in zip(grown, updates, strict=True)], uncertain.add_(more)
