"""The n highest of many scores, for many tensors at once, in a few passes and without waiting for the device.

    sort a sample of the scores ──► two pivots that almost surely enclose the n-th highest score
    above both pivots: taken        below both: not taken        between: sorted, ties included, and the first of them taken

Sizes of all intermediate tensors are fixed beforehand (`_room`), because to learn how many scores are between the pivots would
be to wait for the device. With each mask comes `uncertain`, zero where the pivots did enclose the answer and the room sufficed.

Every kernel takes a few microseconds to start however little it does, inside a CUDA graph too. So what does not depend on the
scores is computed on the host (`search_numbers`), and what is alike for all tensors is one kernel for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, sqrt

import torch
from torch import Tensor

from ...base.randomness import mix, seeds
from .primitives import as_words, branches, count, row_major

SAMPLE = 4094  # scores of a sample; with the two ends 4,096, which one kernel sorts for all samples of all tensors
SAMPLES = 4  # of a tensor: the mean of their pivots is twice as sharp as one, and half as many scores lie between two
_SMALL = 1 << 16  # up to this size all scores are sorted: the pivots are infinite
_SIGMAS = 5  # standard deviations from the expected rank in the sample to each pivot
_TIES = 1 / 64  # of all scores: room between the pivots for equal ones (bfloat16 has only 128 values an octave)
_BITS = 30  # of a fraction in fixed point
_GOLDEN = 663608941  # 2^30 / golden ratio, odd
_LOWEST = torch.iinfo(torch.int64).min
_HIGHEST = torch.iinfo(torch.int64).max
_LEAST = torch.finfo(torch.float32).min  # of scores that are not -inf


@dataclass(frozen=True, slots=True)
class Search:
    """Take the n highest of `scores` [N], float32 without NaN."""

    scores: Tensor
    numbers: Tensor
    """`search_numbers`: int64 [4] on the device; a CUDA graph reads them at every replay."""
    most: int
    """An upper bound of n, at any replay."""
    like: Tensor
    """The tensor [*shape] whose places these are the scores of."""
    places: Tensor | None = None
    """Which of its places [N], in memory order; None: all of them."""
    barred: Tensor | None = None
    """Which of the scores [N] may not be taken."""


@dataclass(frozen=True, slots=True)
class _Candidates:
    """A search once it has its pivots."""

    chosen: Tensor
    """bool [N + 1]: what is above the pivots. The last place takes the writes of candidates that do not exist."""
    found: Tensor
    """Indices of the scores between the pivots [room + 1]; N where there are no more."""
    missing: Tensor
    """bool [room + 1]: where there are no more. False in the last place means that the room did not suffice."""
    scores: Tensor
    """Their scores [room + 1]."""
    seeds: Tensor
    """What their tie keys are made of: int64 [room + 1]."""


def search_numbers(size: int, n: int, key: int) -> list[int]:
    """A search for the n highest of `size` scores in four integers: n, key of ties, ranks of the two pivots in the sample."""
    if size <= _SMALL:
        return [n, key, 0, SAMPLE + 1]
    share = min(max(n / size, 0.0), 1.0)
    margin = _margin(share)
    first, last = floor(share * SAMPLE - margin), ceil(share * SAMPLE + margin)
    return [n, key, max(0, first + 1), min(last, SAMPLE) + 1]


@torch.no_grad()
def highest(searches: Sequence[Search], *, low_first: bool = False) -> tuple[list[Tensor], Tensor]:
    """Each search's mask [N], and `uncertain`: int64 [len(searches)], 0 where the mask is the right one.

    Of equal scores those with the higher `drop_and_grow.tie_keys` come first, or with `low_first` the lower ones.
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
        torch.cat([c.scores for c in candidates]), torch.cat([c.seeds for c in candidates]), low_first=low_first
    )
    ranks.masked_fill_(torch.cat([c.missing for c in candidates]), _LOWEST)
    own = ranks.split([len(c.found) for c in candidates])
    above, between = list[Tensor](), list[Tensor]()
    with branches(device) as branch:
        for k, search in each:
            with branch(k):
                counts = _take(candidates[k], search.numbers[0], own[k])
            above.append(counts[0])
            between.append(counts[1])
    taken = torch.stack(above) + torch.stack(between)
    overflows = ~torch.stack([c.missing[-1] for c in candidates])
    return [c.chosen[:-1] for c in candidates], (taken - numbers[:, 0]).abs_().add_(overflows)


def _pivots(searches: Sequence[Search], numbers: Tensor) -> Tensor:
    """Two scores for each search, [len(searches), 2], that almost surely enclose its n-th highest."""
    shape = len(searches), SAMPLES, SAMPLE + 2
    samples = torch.empty(shape, dtype=torch.float32, device=numbers.device)
    shares = sample_shares(numbers.device)
    with branches(numbers.device) as branch:
        for k, search in enumerate(searches):
            with branch(k):
                indices = sample_indices(len(search.scores), shares)
                own = torch.index_select(search.scores, 0, indices, out=samples[k].view(-1))
                if search.barred is not None:
                    own.masked_fill_(search.barred[indices], -torch.inf)
    samples[..., 0].fill_(torch.inf)
    samples[..., -1].fill_(-torch.inf)
    ranks = numbers[:, None, 2:].expand(-1, SAMPLES, -1)
    return samples.sort(dim=2, descending=True).values.gather(2, ranks).mean(1).clamp_(min=_LEAST)


def sample_shares(device: torch.device | str) -> Tensor:
    """Where each sample looks, one sample after the other: int64 [SAMPLES * (SAMPLE + 2)], fractions of the scores in 2^-_BITS.

    Multiples of the golden ratio modulo 1: any stretch of them is spread evenly, and none keeps step with a weight's rows or
    channels, as equal distances would where sizes are powers of two.
    """
    return torch.arange(SAMPLES * (SAMPLE + 2), device=device).mul_(_GOLDEN).bitwise_and_((1 << _BITS) - 1)


def sample_indices(size: int, shares: Tensor) -> Tensor:
    """The indices [*] among `size` scores (2^33 at most) at these `sample_shares` [*]."""
    return (shares * size).bitwise_right_shift_(_BITS)


def _margin(share: float) -> float:
    """How many ranks in a sample a pivot is from its expected one."""
    return _SIGMAS * sqrt(SAMPLE * share * (1 - share) / SAMPLES) + 2


def _between(search: Search, pivots: Tensor) -> _Candidates:
    scores, size = search.scores, len(search.scores)
    high, low = pivots[:1], pivots[1:]
    chosen = torch.empty(size + 1, dtype=torch.bool, device=scores.device)
    above, between = torch.gt(scores, high, out=chosen[:-1]), scores >= low
    upper, lower, *barred = as_words(above, between, *(() if search.barred is None else (search.barred,)))
    for excluded in barred:
        lower ^= lower & excluded
        upper &= lower
    lower ^= upper  # what is above the high pivot is above the low one too
    found = torch.nonzero_static(between, size=_room(size, search.most) + 1, fill_value=size).view(-1)
    existing = found.clamp(max=size - 1)  # any index will do for candidates that do not exist
    places = existing if search.places is None else search.places[existing]
    seeded = seeds(search.numbers[1], row_major(places, search.like))
    return _Candidates(chosen, found, found == size, scores[existing], seeded)


def _room(size: int, most: int) -> int:
    """How many scores may be between the pivots: the widest estimate for any n up to `most`, and ties."""
    if size <= _SMALL:
        return size
    share = min(most / size, 0.5)
    widest = 2 * _margin(share) + _SIGMAS * SAMPLE**0.25
    return min(size, int((widest / SAMPLE + _TIES) * size))


def _ranks(scores: Tensor, seeded: Tensor, *, low_first: bool) -> Tensor:
    """int64 [*] in the order of the scores [*], and where those are equal in the order of their tie keys, or against it."""
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # + 0 turns -0 into 0, which is equal to it
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # floats compare as their bits do, negative ones backwards
    keys = mix(seeded) >> 32 & 0xFFFFFFFF  # `tie_keys`
    return (ordered << 32) + (0xFFFFFFFF - keys if low_first else keys)


def _take(candidates: _Candidates, n: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Complete `chosen` with the first of those between the pivots; returns how many were above them, and how many these are."""
    above = count(*as_words(candidates.chosen[:-1]))
    wanted = n - above
    last = ranks.sort(descending=True).values.gather(0, (wanted - 1).clamp_(0, len(ranks) - 1).view(1))
    # candidates that do not exist (_LOWEST) are never taken, and none is taken where those above suffice (_HIGHEST)
    last = last.clamp_(min=_LOWEST + 1).masked_fill_(wanted <= 0, _HIGHEST)
    taken = ranks >= last
    candidates.chosen.scatter_(0, candidates.found, taken)
    return above, taken.sum()
