"""Choosing exactly n places: at random, by scores, without empty rows, in equal shares for heads, in disjoint masks.

Which layer the places belong to is not known here. A random choice is a choice by random scores. Scores are float32 without NaN;
random ones have 24 bits, so ties are common in large layers, and all places of a tie must be equally likely. No function
holds indices of every place: one int64 index is twice the size of a score.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UsageError

_DRAWN_TOGETHER = (
    1 << 15
)  # places drawn at a time, into one buffer: few enough that torch does not split them over threads


def at_random(grid: tuple[int, int], n: int, generator: torch.Generator) -> Tensor:
    """Mask [*grid] with exactly n True, every such mask equally likely; about one random number a place.

    Independent coin flips give a mask that, given its count, is uniform among all masks with that count, and adding or removing
    places uniformly keeps it so. The coin is a little below n / places, so that nearly always a few places are added.
    """
    places = grid[0] * grid[1]
    if n > places // 2:
        return at_random(grid, places - n, generator).logical_not_()
    mask = torch.empty(places, dtype=torch.bool)
    coin = max(0.0, (n - 4 * n**0.5) / places) if places else 0.0
    draws = torch.empty(min(places, _DRAWN_TOGETHER))
    for part in mask.split(_DRAWN_TOGETHER):
        torch.lt(draws[: len(part)].uniform_(generator=generator), coin, out=part)
    missing = n - int(mask.count_nonzero())
    if missing < 0:
        mask[_hits(mask, True, -missing, generator)] = False
    elif missing:
        mask[_hits(mask, False, missing, generator)] = True
    return mask.view(grid)


def _hits(mask: Tensor, value: bool, n: int, generator: torch.Generator) -> Tensor:
    """n different indices at which `mask` is `value`, every choice equally likely."""
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < n:
        darts = torch.randint(len(mask), (4 * n + 64,), generator=generator)
        found = torch.cat((found, darts[mask[darts] == value])).unique()
    return found[torch.randperm(len(found), generator=generator)[:n]]


# --- by scores, ties at random ---

_SMALL = 1 << 18  # up to this size torch's own selection is used
_SAMPLE = 1 << 16
_CHUNK = 1 << 20  # places that are looked at together where temporary copies are needed


def top(keys: Tensor, n: int, generator: torch.Generator, within: Tensor | None = None) -> Tensor:
    """Mask [*shape] of the n largest of `keys` [*shape], of those in the mask `within` [*shape] if given; ties at random.

    The caller makes sure that there are n places.
    """
    places = keys.numel() if within is None else int(within.count_nonzero())
    if n == places:
        return torch.ones_like(keys, dtype=torch.bool) if within is None else within.clone()
    if n == 0:
        return torch.zeros_like(keys, dtype=torch.bool)
    threshold = nth_largest(keys.reshape(-1) if within is None else _compress(keys, within), n)
    mask, tied = keys > threshold, keys == threshold
    if within is not None:
        mask &= within
        tied &= within
    missing, ties = n - int(mask.count_nonzero()), int(tied.count_nonzero())
    if missing == ties:
        return mask.logical_or_(tied)
    chosen = top(torch.rand(ties, generator=generator), missing, generator)
    return mask.masked_scatter_(tied, chosen)


def nth_largest(values: Tensor, n: int) -> Tensor:
    """The n-th largest of `values` [N], 1 <= n <= N, as a scalar.

    Floyd and Rivest's SELECT: a sample gives two pivots that almost surely enclose the answer, and only what is
    between them is searched further, or else the side that holds the answer. torch.kthvalue alone would need 12 bytes a value.
    """
    while (size := values.numel()) > _SMALL:
        sample = values[:: size // _SAMPLE | 1].sort(descending=True).values
        share, count = n / size, sample.numel()
        margin = 5 * (count * share * (1 - share)) ** 0.5 + 2
        high = sample[max(0, int(share * count - margin))]
        low = sample[min(count - 1, int(share * count + margin))]
        above = int((values > high).count_nonzero())
        if n <= above:
            values = _compress(values, values > high)
            continue
        upto = int((values >= high).count_nonzero())
        if n <= upto:
            return high
        below = int((values >= low).count_nonzero())
        if n > below:
            values, n = _compress(values, values < low), n - below
        else:
            values, n = _compress(values, (values >= low) & (values < high)), n - upto
    return values.kthvalue(values.numel() - n + 1).values


def row_best(keys: Tensor, allowed: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's largest of `keys` [R, C] among `allowed` [R, C], ties at random: (value, column, whether there is one), [R]."""
    rows, columns = keys.shape
    step = rows_at_once(columns)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, rows, step):
        part = keys[start : start + step]
        barred = None if allowed is None else ~allowed[start : start + step]
        if barred is not None:
            part = part.masked_fill(barred, -torch.inf)
        value = part.amax(1)
        lost = part != value[:, None]
        draw = torch.rand(part.shape, generator=generator)
        draw.masked_fill_(lost if barred is None else lost | barred, -1.0)
        drawn, column = draw.max(1)
        found.append((value, column, drawn >= 0))
    value, column, exists = (torch.cat(parts) for parts in zip(*found, strict=True))
    return value, column, exists


def rows_at_once(columns: int) -> int:
    """How many rows of a matrix make a piece that is small enough to copy."""
    return max(1, _CHUNK // max(1, columns))


def _compress(values: Tensor, mask: Tensor) -> Tensor:
    """values[mask] [places], in pieces: indexing holds 8 bytes for every place it takes."""
    step = rows_at_once(values[:1].numel())
    return torch.cat([part[where] for part, where in zip(values.split(step), mask.split(step), strict=True)])


def without_nan(keys: Tensor) -> Tensor:
    """Return `keys` [*shape] unchanged, after checking that none is NaN.

    The sum of a block is NaN where it holds inf and -inf.

    Raises:
        UsageError: some are NaN.
    """
    found = int(keys.isnan().count_nonzero())
    if found:
        raise UsageError(f"{found} of {keys.numel()} scores are NaN")
    return keys


# --- in a matrix: no empty rows, equal shares for heads, several disjoint masks ---


def disjoint(
    grid: tuple[int, int],
    counts: Sequence[int],
    generator: torch.Generator,
    keys: Tensor | None = None,
    *,
    connect: bool = True,
    balance: tuple[int, int] = (1, 1),
) -> list[Tensor]:
    """Disjoint masks [*grid] with `counts` places each, from one order of all places: the first takes the best, and so on.

    Args:
        keys: the scores [*grid]; at random where not given.
        connect: as few rows as possible stay empty, in every mask.
        balance: number of equal blocks of rows, and of columns, that share each count; one of them is 1.
    """
    keys = torch.rand(grid, generator=generator) if keys is None else keys
    down, across = balance
    shares = equal_shares(counts, down * across)
    if down == 1:
        return _branches(keys, shares, generator, connect)
    heads = [
        _branches(part, [[share[i]] for share in shares], generator, connect)
        for i, part in enumerate(keys.split(grid[0] // down))
    ]
    return [torch.cat(masks) for masks in zip(*heads, strict=True)]


def equal_shares(counts: Sequence[int], blocks: int) -> list[list[int]]:
    """Each count split over equal blocks, as evenly as integers allow: [len(counts)][blocks].

    A remainder goes to the blocks that follow those which got the last one. Always starting from the first block would give it
    more places than it has, where disjoint masks fill a weight.
    """
    start, shares = 0, list[list[int]]()
    for n in counts:
        base, over = divmod(n, blocks)
        shares.append([base + ((i - start) % blocks < over) for i in range(blocks)])
        start = (start + over) % blocks
    return shares


def _branches(keys: Tensor, shares: Sequence[Sequence[int]], generator: torch.Generator, connect: bool) -> list[Tensor]:
    """Disjoint masks of `keys` [R, C]; shares[b] are branch b's counts per block of columns."""
    masks: list[Tensor] = []
    free: Tensor | None = None
    for b, share in enumerate(shares):
        later = len(shares) - b - 1
        late = _reserved(keys, free, later) if connect and later else None
        masks.append(select(keys, share, generator, free=free, late=late, connect=connect))
        if later:
            free = ~masks[-1] if free is None else free & ~masks[-1]
    return masks


def _reserved(keys: Tensor, free: Tensor | None, branches: int) -> Tensor:
    """The worst free places of each row, one for every later branch, but never a row's last: mask [R, C]."""
    reserved = torch.zeros(keys.shape, dtype=torch.bool)
    step, some = rows_at_once(keys.shape[1]), min(branches, keys.shape[1])
    for start in range(0, len(keys), step):
        part = keys[start : start + step]
        places = torch.full((len(part),), keys.shape[1])
        if free is not None:
            here = free[start : start + step]
            part, places = part.masked_fill(~here, torch.inf), here.sum(1)
        worst = part.topk(some, dim=1, largest=False).indices
        reserved[start : start + step].scatter_(1, worst, torch.arange(some) < places[:, None] - 1)
    return reserved


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
    mask[safe] = False  # only places that are not a row's best may leave
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
            wanting = exists & (wish == q)
            taken = top(values[:, q], min(n, int(wanting.count_nonzero())), generator, wanting)
            chosen[taken] = q
            left[q] -= int(taken.count_nonzero())


def _blocks(columns: int, count: int) -> list[tuple[int, int]]:
    size = columns // count
    return [(q * size, (q + 1) * size) for q in range(count)]
