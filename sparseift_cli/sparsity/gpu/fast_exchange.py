"""`exchange` for a GPU: the same masks, of a whole network, in a few passes and without waiting for the device once.

Beside each mask there is a number on the device that is zero where all went well; where it is not, the caller asks `exchange`.
So a network's masks cost one wait, for all of these numbers together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..drop_and_grow import GROWS, Regrow
from .fast_selection import Search, highest, search_numbers
from .memory_order import flat, unflat
from .streams import branches
from .words import as_words

NUMBERS = 8
AT_ONCE = 1 << 27  # places: 2.7 GB


@dataclass(frozen=True, slots=True)
class Exchange:
    """An exchange in one mask with at least one active place, as the function `exchange` takes it."""

    mask: Tensor
    active: int
    drop_scores: Tensor
    grow_scores: Tensor
    numbers: Tensor
    """`exchange_numbers`: int64 [NUMBERS] on the device; in a CUDA graph read anew at every replay."""
    most: int
    """No more places than that are exchanged."""
    regrow: Regrow = "allow"
    drop_by: Callable[[Tensor], Tensor] | None = None
    """Makes scores [*] of `drop_scores` [*], where these are none yet: only active places need them."""


def exchange_numbers(size: int, active: int, n: int, key: int, regrow: Regrow) -> list[int]:
    """What differs between two exchanges of n of the `active` places of a mask of `size`."""
    if regrow == "forbid":
        n = min(n, size - active)
    return [*search_numbers(active, n, key), *search_numbers(size, n, key ^ GROWS)]


def in_groups(sizes: Sequence[int]) -> Iterator[range]:
    """Which masks, of so many places, are exchanged at once: an exchange holds some twenty bytes a place until it is done."""
    first = total = 0
    for i, size in enumerate(sizes):
        if i > first and total + size > AT_ONCE:
            yield range(first, i)
            first, total = i, 0
        total += size
    if sizes:
        yield range(first, len(sizes))


def on_device(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 [len(rows), NUMBERS], without a wait for the device."""
    held = torch.tensor(rows, dtype=torch.int64)
    return held.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else held


@torch.no_grad()
def quick_exchange(wanted: Sequence[Exchange]) -> tuple[list[Tensor], Tensor]:
    """The mask of `exchange` for each, and their doubts: int64 [len(wanted)], 0 where the mask is the right one."""
    device, each = wanted[0].mask.device, list(enumerate(wanted))
    drops = list[Search]()
    with branches(device) as branch:
        for k, w in each:
            with branch(k):
                places = torch.nonzero_static(flat(w.mask, w.mask), size=w.active).view(-1)
                scores = flat(w.drop_scores, w.mask)[places]
                scores = (scores if w.drop_by is None else w.drop_by(scores)).neg_()
            drops.append(Search(scores, w.numbers[: NUMBERS // 2], w.most, w.mask, places))
    lost, doubts = highest(drops, low_lots=True)
    grows, kept = list[Search](), list[Tensor]()
    with branches(device) as branch:
        for k, w in each:
            with branch(k):
                held, places = flat(w.mask, w.mask), drops[k].places
                assert places is not None
                kept.append(held.scatter(0, places, ~lost[k]))
                scores = flat(w.grow_scores, w.mask)
            barred = held if w.regrow == "forbid" else kept[k]
            grows.append(Search(scores, w.numbers[NUMBERS // 2 :], w.most, w.mask, barred=barred))
    grown, more = highest(grows)
    with branches(device) as branch:
        for k, _ in each:
            with branch(k):
                new, stayed = as_words(grown[k], kept[k])
                new |= stayed
    return [unflat(new, w.mask) for new, w in zip(grown, wanted, strict=True)], doubts.add_(more)
