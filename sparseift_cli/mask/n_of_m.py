"""N:M masks: in every group of M consecutive inputs of an output, N non-zeros.

Consecutive inputs means neighbouring input channels at the *same* tap, for a convolution as for a linear layer: that is
what sparse tensor cores skip and what `sparseift inspect` recognises. The groups therefore run over the columns in the
order taps x channels, across the border between two taps where M does not divide the channels. Every order of columns has
the same number of groups, so the count is the plan's: M-groups times N, and r * N // M of a last group of r inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .layout import Layout

_CHUNK = 1 << 21  # places sorted at a time: a sort holds 24 bytes a place


def n_of_m_masks(
    layout: Layout, n: int, m: int, branches: int, generator: torch.Generator, scores: Tensor | None = None
) -> list[Tensor]:
    """`branches` pairwise disjoint masks [rows, columns], the first of the best by `scores` [rows, columns], or at random.

    The caller makes sure that branches * N <= M.
    """
    rows, columns = layout.rows, layout.columns
    keys = None if scores is None else layout.by_tap(scores)
    masks = [torch.zeros(rows, columns, dtype=torch.bool) for _ in range(branches)]
    for start, stop in _row_chunks(rows, columns):
        part = None if keys is None else keys[start:stop]
        for first, size in groups_of(columns, m):
            held = size * n // m  # N in a whole group
            whole = (columns - first) // size * size
            wanted = None if part is None else part[:, first : first + whole].reshape(-1, size)
            order = _ranked((stop - start) * whole // size, size, wanted, generator)
            for b, mask in enumerate(masks):
                taken = torch.zeros(order.shape, dtype=torch.bool)
                taken.scatter_(1, order[:, b * held : (b + 1) * held], True)
                mask[start:stop, first : first + whole] = taken.reshape(stop - start, whole)
    return [layout.by_channel(mask) for mask in masks]


def _row_chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK // columns)
    return ((start, min(rows, start + step)) for start in range(0, rows, step))


def groups_of(columns: int, m: int) -> Iterator[tuple[int, int]]:
    """(first column, size) of the whole groups, then of the last shorter one, where there are any."""
    rest = columns % m
    if columns >= m:
        yield 0, m
    if rest:
        yield columns - rest, rest


def _ranked(groups: int, m: int, scores: Tensor | None, generator: torch.Generator) -> Tensor:
    """The places [groups, m] of each group from best to worst; those of equal score in random order.

    float64: two of m random float32 are equal often enough in a large layer to favour the first.
    """
    order = torch.rand(groups, m, generator=generator, dtype=torch.float64).argsort(1)
    if scores is None:
        return order
    shuffled = scores.gather(1, order)
    return order.gather(1, shuffled.sort(dim=1, descending=True, stable=True).indices)
