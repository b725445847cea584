"""The n highest of many scores, for many tensors at once, in a few passes and without waiting for the device.

To find the n-th of many scores it sorts a sample, which gives two pivots that almost surely enclose the answer; what lies
above them is taken, what lies below is not, and only what lies between is sorted, ties and all. Beside each mask there is
a doubt: zero where all went well.

A kernel costs its start however little it does, inside a CUDA graph too. So what can be worked out on the host is
(`search_numbers`), and what is alike for all tensors is done for all of them in one kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, sqrt

import torch
from torch import Tensor

from ...base.randomness import mix, seeds
from .memory_order import row_major
from .streams import branches
from .words import as_words, count

SAMPLE = 4094  # scores of a sample; with the two ends 4,096, which one kernel sorts for all samples of all tensors
SAMPLES = 4  # of a tensor: the mean of their pivots is twice as sharp as one, and half as many scores lie between two
_SMALL = 1 << 16  # scores that are sorted whole
_SIGMAS = 5  # from the expected place in the sample to each pivot
_TIES = 1 / 64  # of all scores: what may lie between the pivots because many are equal (bfloat16 has 128 an octave)
_BITS = 30
_GOLDEN = 663608941  # 2^30 / golden ratio, odd
_LOWEST = torch.iinfo(torch.int64).min
_HIGHEST = torch.iinfo(torch.int64).max
_LEAST = torch.finfo(torch.float32).min  # of scores that are not -inf


@dataclass(frozen=True, slots=True)
class Search:
    """Take the n highest of `scores` [N], float32 without NaN."""

    scores: Tensor
    numbers: Tensor
    """`search_numbers`: int64 [4] on the device; in a CUDA graph read anew at every replay."""
    most: int
    """n is never more."""
    like: Tensor
    """The tensor of whose places these are the scores."""
    places: Tensor | None = None
    """Which of its places [N], in memory order; None: all of them."""
    barred: Tensor | None = None
    """Which of the scores [N] may not be taken."""


@dataclass(frozen=True, slots=True)
class _Candidates:
    """What one search has after its pivots: `chosen` [N + 1], of which the last is for what does not exist."""

    chosen: Tensor
    found: Tensor
    """Where the scores between the pivots stand [room + 1], N where there are no more."""
    missing: Tensor
    """Where there are no more [room + 1]."""
    scores: Tensor
    seeds: Tensor


def search_numbers(size: int, n: int, key: int) -> list[int]:
    """What a search for the n highest of `size` scores needs to know: n, key of ties, where in the sample the pivots stand."""
    if size <= _SMALL:
        return [n, key, 0, SAMPLE + 1]
    share = min(max(n / size, 0.0), 1.0)
    margin = _margin(share)
    first, last = floor(share * SAMPLE - margin), ceil(share * SAMPLE + margin)
    return [n, key, max(0, first + 1), min(last, SAMPLE) + 1]


@torch.no_grad()
def highest(searches: Sequence[Search], *, low_lots: bool = False) -> tuple[list[Tensor], Tensor]:
    """Each search's mask [N], and its doubt: int64 [len(searches)], 0 where the mask is the right one.

    Between equal scores the higher lots (`selection.lots`) come first, or the lower ones.
    """
    each, device = list(enumerate(searches)), searches[0].scores.device
    numbers = torch.stack([s.numbers for s in searches])
    pivots = _pivots(searches, numbers)
    with branches(device) as branch:
        candidates = list[_Candidates]()
        for k, search in each:
            with branch(k):
                candidates.append(_between(search, pivots[k]))
    ranks = _ranks(
        torch.cat([c.scores for c in candidates]), torch.cat([c.seeds for c in candidates]), low_lots=low_lots
    )
    ranks.masked_fill_(torch.cat([c.missing for c in candidates]), _LOWEST)
    own = ranks.split([len(c.found) for c in candidates])
    certain, more = list[Tensor](), list[Tensor]()
    with branches(device) as branch:
        for k, search in each:
            with branch(k):
                above, between = _take(candidates[k], search.numbers[0], own[k])
            certain.append(above)
            more.append(between)
    taken = torch.stack(certain) + torch.stack(more)
    overflows = ~torch.stack([c.missing[-1] for c in candidates])
    return [c.chosen[:-1] for c in candidates], (taken - numbers[:, 0]).abs_().add_(overflows)


def _pivots(searches: Sequence[Search], numbers: Tensor) -> Tensor:
    """Two scores for each search, [len(searches), 2], between which its n-th highest almost surely lies."""
    shape = len(searches), SAMPLES, SAMPLE + 2
    samples = torch.empty(shape, dtype=torch.float32, device=numbers.device)
    shares = looks(numbers.device)
    with branches(numbers.device) as branch:
        for k, search in enumerate(searches):
            with branch(k):
                looked = spots(len(search.scores), shares)
                own = torch.index_select(search.scores, 0, looked, out=samples[k].view(-1))
                if search.barred is not None:
                    own.masked_fill_(search.barred[looked], -torch.inf)
    samples[..., 0].fill_(torch.inf)
    samples[..., -1].fill_(-torch.inf)
    ranks = numbers[:, None, 2:].expand(-1, SAMPLES, -1)
    return samples.sort(dim=2, descending=True).values.gather(2, ranks).mean(1).clamp_(min=_LEAST)


def looks(device: torch.device | str) -> Tensor:
    """int64 [SAMPLES * (SAMPLE + 2)]: where each sample looks, one after the other, as shares of the scores in 2^-_BITS.

    Multiples of the golden ratio modulo 1: every stretch of them lies evenly, and none falls in step with a weight's rows or
    channels, as equal distances do where sizes are powers of two.
    """
    return torch.arange(SAMPLES * (SAMPLE + 2), device=device).mul_(_GOLDEN).bitwise_and_((1 << _BITS) - 1)


def spots(size: int, shares: Tensor) -> Tensor:
    """Which of `size` scores (2^33 at most) stand at these `looks` [*]."""
    return (shares * size).bitwise_right_shift_(_BITS)


def _margin(share: float) -> float:
    """How far from its expected rank in a sample a pivot is taken."""
    return _SIGMAS * sqrt(SAMPLE * share * (1 - share) / SAMPLES) + 2


def _between(search: Search, pivots: Tensor) -> _Candidates:
    scores, size = search.scores, len(search.scores)
    high, low = pivots[:1], pivots[1:]
    chosen = torch.empty(size + 1, dtype=torch.bool, device=scores.device)
    above, between = torch.gt(scores, high, out=chosen[:-1]), scores >= low
    upper, lower, *barred = as_words(above, between, *(() if search.barred is None else (search.barred,)))
    for taboo in barred:
        lower ^= lower & taboo
        upper &= lower
    lower ^= upper  # what lies above the high pivot lies above the low one
    found = torch.nonzero_static(between, size=_room(size, search.most) + 1, fill_value=size).view(-1)
    somewhere = found.clamp(max=size - 1)
    whose = somewhere if search.places is None else search.places[somewhere]
    seeded = seeds(search.numbers[1], row_major(whose, search.like))
    return _Candidates(chosen, found, found == size, scores[somewhere], seeded)


def _room(size: int, most: int) -> int:
    """How many scores may lie between the pivots: the widest guess, and ties."""
    if size <= _SMALL:
        return size
    share = min(most / size, 0.5)
    widest = 2 * _margin(share) + _SIGMAS * SAMPLE**0.25
    return min(size, int((widest / SAMPLE + _TIES) * size))


def _ranks(scores: Tensor, seeded: Tensor, *, low_lots: bool) -> Tensor:
    """int64 [*] in the order of the scores [*], and of their lots (or against it) where those are equal."""
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # + 0: there are two zeros, which are equal
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # floats compare as their bits do, negative ones backwards
    lot = mix(seeded) >> 32 & 0xFFFFFFFF
    return (ordered << 32) + (0xFFFFFFFF - lot if low_lots else lot)


def _take(candidates: _Candidates, n: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Complete `chosen` with the first of those between the pivots; how many lay above them, and how many these are."""
    above = count(*as_words(candidates.chosen[:-1]))
    wanted = n - above
    last = ranks.sort(descending=True).values.gather(0, (wanted - 1).clamp_(0, len(ranks) - 1).view(1))
    # what does not exist is never taken, and nothing is where the ones above are enough
    last = last.clamp_(min=_LOWEST + 1).masked_fill_(wanted <= 0, _HIGHEST)
    taken = ranks >= last
    candidates.chosen.scatter_(0, candidates.found, taken)
    return above, taken.sum()
