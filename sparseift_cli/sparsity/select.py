"""Places of a matrix chosen by their scores: no empty rows, equal shares for heads, several masks without a common place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .top import row_best, rows_at_once, top


def disjoint(
    grid: tuple[int, int],
    counts: Sequence[int],
    generator: torch.Generator,
    keys: Tensor | None = None,
    *,
    connect: bool = True,
    balance: tuple[int, int] = (1, 1),
) -> list[Tensor]:
    """Masks [*grid] with `counts` places each, from one order of all places: the first takes the best, and so on.

    Args:
        keys: the scores [*grid]; at random where not given.
        connect: as few rows as possible stay empty, in every mask.
        balance: number of equal blocks of rows, and of columns, that share each count; one of them is 1.
    """
    keys = torch.rand(grid, generator=generator) if keys is None else keys
    down, across = balance
    shares = _deal(counts, down * across)
    if down == 1:
        return _branches(keys, shares, generator, connect)
    heads = [
        _branches(part, [[share[i]] for share in shares], generator, connect)
        for i, part in enumerate(keys.split(grid[0] // down))
    ]
    return [torch.cat(masks) for masks in zip(*heads, strict=True)]


def _deal(counts: Sequence[int], blocks: int) -> list[list[int]]:
    """Each count over equal blocks, as evenly as integers go; what is over goes on where the last count stopped.

    Going on, rather than always from the first, is what lets disjoint masks fill a weight.
    """
    start, dealt = 0, list[list[int]]()
    for n in counts:
        base, over = divmod(n, blocks)
        dealt.append([base + ((i - start) % blocks < over) for i in range(blocks)])
        start = (start + over) % blocks
    return dealt


def _branches(keys: Tensor, shares: Sequence[Sequence[int]], generator: torch.Generator, connect: bool) -> list[Tensor]:
    """Disjoint masks of `keys` [R, C]; shares[b] are branch b's counts per block of columns."""
    masks: list[Tensor] = []
    free: Tensor | None = None
    for b, share in enumerate(shares):
        waiting = len(shares) - b - 1
        late = _set_aside(keys, free, waiting) if connect and waiting else None
        masks.append(select(keys, share, generator, free=free, late=late, connect=connect))
        if waiting:
            free = ~masks[-1] if free is None else free & ~masks[-1]
    return masks


def _set_aside(keys: Tensor, free: Tensor | None, waiting: int) -> Tensor:
    """The worst free places of each row, one for every branch that waits, but never a row's last: mask [R, C]."""
    aside = torch.zeros(keys.shape, dtype=torch.bool)
    step, some = rows_at_once(keys.shape[1]), min(waiting, keys.shape[1])
    for start in range(0, len(keys), step):
        part = keys[start : start + step]
        places = torch.full((len(part),), keys.shape[1])
        if free is not None:
            here = free[start : start + step]
            part, places = part.masked_fill(~here, torch.inf), here.sum(1)
        worst = part.topk(some, dim=1, largest=False).indices
        aside[start : start + step].scatter_(1, worst, torch.arange(some) < places[:, None] - 1)
    return aside


def select(
    keys: Tensor,
    counts: Sequence[int],
    generator: torch.Generator,
    *,
    free: Tensor | None = None,
    late: Tensor | None = None,
    connect: bool = True,
) -> Tensor:
    """Mask [R, C] of the largest of `keys` [R, C]: counts[q] in the q-th of len(counts) equal blocks of columns.

    Only places in `free` are taken, those in `late` when the others do not suffice. With `connect` as few rows as
    possible stay empty.
    """
    mask = torch.zeros(keys.shape, dtype=torch.bool)
    for (a, b), n in zip(_blocks(keys.shape[1], len(counts)), counts, strict=True):
        within = None if free is None else free[:, a:b]
        if late is None:
            mask[:, a:b] = top(keys[:, a:b], n, generator, within)
            continue
        early, last = ~late[:, a:b], late[:, a:b]
        if within is not None:
            early, last = early & within, last & within
        first = min(n, int(early.count_nonzero()))
        mask[:, a:b] = top(keys[:, a:b], first, generator, early)
        if first < n:
            mask[:, a:b] |= top(keys[:, a:b], n - first, generator, last)
    if connect and sum(counts):
        _connect(keys, mask, free, generator, len(counts))
    return mask


def _connect(keys: Tensor, mask: Tensor, free: Tensor | None, generator: torch.Generator, blocks: int) -> None:
    """Swap the worst of `mask` for the best places of its empty rows, within the same block of columns; in place.

    Every row keeps its best, so no swap empties a row. With one block this is the best mask without empty rows.
    """
    empty = (~mask.any(1)).nonzero()[:, 0]
    if not len(empty):
        return
    _, column, kept = row_best(keys, mask, generator)
    safe = kept.nonzero()[:, 0], column[kept]
    mask[safe] = False  # what remains may leave
    spans = _blocks(keys.shape[1], blocks)
    spare = [int(mask[:, a:b].count_nonzero()) for a, b in spans]
    best = [
        row_best(keys[empty, a:b], None if free is None else free[empty, a:b], generator) for a, b in spans
    ]  # of every empty row, per block
    values, columns, open_ = (torch.stack(parts, 1) for parts in zip(*best, strict=True))
    chosen = _match(values, open_, spare, generator)
    for q, (a, b) in enumerate(spans):
        takers = chosen == q
        leaving = int(takers.count_nonzero())
        if leaving:
            mask[:, a:b] = top(keys[:, a:b], spare[q] - leaving, generator, mask[:, a:b])
            mask[empty[takers], a + columns[takers, q]] = True
    mask[safe] = True


def _match(values: Tensor, open_: Tensor, spare: Sequence[int], generator: torch.Generator) -> Tensor:
    """Which block each row goes to [E], -1 for none: its best by `values` [E, Q] that has room, the best rows first.

    `open_` [E, Q]: whether the row has a place in the block. `spare` [Q]: how many rows a block can take.
    """
    chosen = torch.full((values.shape[0],), -1)
    left = list(spare)
    while True:  # every round fills a block or places every row that still can be
        can = open_ & torch.tensor([n > 0 for n in left]) & (chosen < 0)[:, None]
        _, wish, exists = row_best(values, can, generator)
        if not exists.any():
            return chosen
        for q, n in enumerate(left):
            suitors = exists & (wish == q)
            taken = top(values[:, q], min(n, int(suitors.count_nonzero())), generator, suitors)
            chosen[taken] = q
            left[q] -= int(taken.count_nonzero())


def _blocks(columns: int, count: int) -> list[tuple[int, int]]:
    size = columns // count
    return [(q * size, (q + 1) * size) for q in range(count)]
