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

from .layout import Block, Layout, NofM, parse_pattern

_CHUNK = 1 << 21  # places sorted at a time: a sort holds 24 bytes a place


def n_of_m_masks(
    layout: Layout, pattern: NofM, branches: int, generator: torch.Generator, scores: Tensor | None = None
) -> list[Tensor]:
    """`branches` pairwise disjoint masks [rows, columns], the first of the best by `scores` [rows, columns], or at random.

    The caller makes sure that branches * N <= M.
    """
    rows, columns = layout.rows, layout.columns
    keys = None if scores is None else layout.by_tap(scores)
    masks = [torch.zeros(rows, columns, dtype=torch.bool) for _ in range(branches)]
    for start, stop in _row_chunks(rows, columns):
        part = None if keys is None else keys[start:stop]
        for first, m in groups_of(columns, pattern.m):
            n = m * pattern.n // pattern.m  # N in a whole group
            whole = (columns - first) // m * m
            wanted = None if part is None else part[:, first : first + whole].reshape(-1, m)
            order = _ranked((stop - start) * whole // m, m, wanted, generator)
            for b, mask in enumerate(masks):
                taken = torch.zeros(order.shape, dtype=torch.bool)
                taken.scatter_(1, order[:, b * n : (b + 1) * n], True)
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


def has_pattern(mask: Tensor, pattern: str, groups: int = 1, transposed: bool = False) -> bool:
    """Whether `mask` [*shape] has the pattern: every block full or empty and none outside of them, or N of every M inputs.

    Raises:
        UsageError: a pattern that does not exist, or not the shape of a weight.
    """
    kind, layout = parse_pattern(pattern), Layout(tuple(mask.shape), groups, transposed)
    if kind == Block(1, 1):
        return True
    matrix = layout.to_matrix(mask)
    if isinstance(kind, NofM):
        live = layout.by_tap(matrix)
        for first, m in groups_of(layout.columns, kind.m):
            whole = (layout.columns - first) // m * m
            held = live[:, first : first + whole].reshape(-1, m).sum(1)
            if bool((held != m * kind.n // kind.m).any()):
                return False
        return True
    full = layout.from_blocks(layout.to_blocks(matrix.float(), kind) == kind.size, kind)
    return bool((full == matrix).all())
