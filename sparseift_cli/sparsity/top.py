"""Choosing exactly n places by their scores, with every tie broken at random. Which layer they belong to is not known here.

A random choice is a choice by random scores. Scores are float32 without NaN; random ones have 24 bits, so that ties are
common in large layers, and all of a tie's places must be equally likely. Nothing here holds indices of every place: one
int64 index is twice the size of a score.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SMALL = 1 << 18  # places from which a partial sort is as good as anything
_SAMPLE = 1 << 16
_CHUNK = 1 << 20  # places that are looked at together where temporary copies are needed


def top(keys: Tensor, n: int, generator: torch.Generator, within: Tensor | None = None) -> Tensor:
    """Mask of the n largest of `keys` (any shape), of those in the mask `within` where given; ties at random.

    The caller sees to it that there are n places.
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

    Floyd and Rivest's SELECT: a sample gives two pivots that almost surely enclose the answer, and only what lies
    between them is searched on. Where they do not, the side that holds the answer is. torch.kthvalue alone would hold
    12 bytes a value beside the values.
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
    """How many rows make a piece small enough to copy."""
    return max(1, _CHUNK // max(1, columns))


def _compress(values: Tensor, mask: Tensor) -> Tensor:
    """values[mask] [places], in pieces: indexing holds 8 bytes for every place it takes."""
    step = rows_at_once(values[:1].numel())
    return torch.cat([part[where] for part, where in zip(values.split(step), mask.split(step), strict=True)])
