"""Masks with exactly the non-zeros that the plan gives a layer.

Random choices depend on a generator alone: `generator_for(seed, layer, part)` makes every mask a function of the seed and its
own name, whatever else was drawn before it. Scores, masks and generators are on the CPU.

    >>> from sparseift_cli.base.randomness import generator_for
    >>> mask = make_mask((4, 6), 8, generator=generator_for(0, "fc"))
    >>> int(mask.sum()), empty_rows_and_columns(mask)[0]
    (8, 0)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UsageError
from .layout import Layout
from .patterns import MaskPattern, parse_pattern
from .select import without_nan


def make_mask(
    shape: Sequence[int],
    nnz: int,
    *,
    generator: torch.Generator,
    pattern: str = "unstructured",
    scores: Tensor | None = None,
    connect: bool = True,
    groups: int = 1,
    transposed: bool = False,
    row_balance: int | None = None,
    column_balance: int | None = None,
) -> Tensor:
    """A mask [*shape] with exactly `nnz` True: at random, or where `scores` [*shape] are largest.

    Args:
        shape: of the weight: [out, in], [out, in / groups, *kernel], or with `transposed` [in, out],
            [in, out / groups, *kernel].
        pattern: unstructured; N:M along the inputs (see `n_of_m`); RxC blocks of R outputs by C columns of
            `weight.flatten(1)`, which never cross from one group to the next. Rows and columns that fill no block stay
            empty. A block's score is the sum of its scores.
        scores: compared in float32; ties are broken at random.
        connect: no output without a weight where nnz allows, else as few as possible. The best place of a row that would be
            empty replaces the worst of a row that has more than one. With blocks the same for rows of blocks.
            Random blocks are balanced in any case: rows of blocks, and columns of them, differ by at most one in their number.
        row_balance: number of equal contiguous blocks of rows (attention heads; 3 * heads of a fused QKV), each of which
            gets nnz / row_balance, the first ones one more (one block more) where that is no integer.
        column_balance: the same for columns, as an output projection needs. N:M patterns are balanced without either.

    Raises:
        UsageError: no mask of this shape and pattern has `nnz` non-zeros, or scores that are NaN or of another shape.
    """
    layout, kind = Layout(tuple(shape), groups, transposed), parse_pattern(pattern)
    matrix = None if scores is None else _score_matrix(layout, scores)
    kind.check_counts(layout, [nnz])
    balance = _balance(layout, kind, row_balance, column_balance)
    return layout.from_matrix(kind.draw(layout, nnz, generator, matrix, connect=connect, balance=balance))


def disjoint_masks(
    shape: Sequence[int],
    nnzs: Sequence[int],
    *,
    generator: torch.Generator,
    pattern: str = "unstructured",
    connect: bool = True,
    groups: int = 1,
    transposed: bool = False,
    row_balance: int | None = None,
    column_balance: int | None = None,
) -> list[Tensor]:
    """Random masks [*shape], one per entry of `nnzs` and with exactly that many True, no place in two of them.

    For the branches of Sparse Parallel that are summed before the activation: together they are one weight, so a place
    in two branches would be computed twice for one weight. Arguments as in `make_mask`; `connect` holds in every branch as far
    as there are places, and reserves places of each row for later branches.

    Raises:
        UsageError: the weight has fewer places than sum(nnzs), or one of the counts is impossible by itself.
    """
    layout, kind = Layout(tuple(shape), groups, transposed), parse_pattern(pattern)
    kind.check_counts(layout, nnzs)
    balance = _balance(layout, kind, row_balance, column_balance)
    masks = kind.draw_disjoint(layout, nnzs, generator, connect=connect, balance=balance)
    return [layout.from_matrix(mask) for mask in masks]


def empty_rows_and_columns(mask: Tensor, groups: int = 1, transposed: bool = False) -> tuple[int, int]:
    """(outputs without a weight, input channels that no output reads) of a mask or weight [*shape], over all groups.

    Raises:
        UsageError: not the shape of a weight, or groups that do not divide it.
    """
    layout = Layout(tuple(mask.shape), groups, transposed)
    live = layout.to_matrix(mask.bool()).reshape(groups, -1, layout.channels, layout.taps).view(torch.uint8)
    rows = live.flatten(2).amax(2)  # of bytes: several times as fast as `any` of booleans
    columns = live.amax(1).amax(2)
    return rows.numel() - int(rows.count_nonzero()), columns.numel() - int(columns.count_nonzero())


def _balance(layout: Layout, pattern: MaskPattern, rows: int | None, columns: int | None) -> tuple[int, int]:
    """How many blocks of rows and of columns get equal shares. A pattern of fixed density is balanced anyway."""
    if pattern.density is not None:
        return 1, 1
    if rows is not None and columns is not None:
        raise UsageError("a mask is balanced over rows or over columns, not both")
    if (rows is not None or columns is not None) and layout.groups > 1:
        raise UsageError("a grouped convolution has no heads to balance")
    grid = pattern.grid(layout)
    for parts, size, side, cells, what in (
        (rows, layout.rows, pattern.sides[0], grid[0], "rows"),
        (columns, layout.columns, pattern.sides[1], grid[1], "columns"),
    ):
        if parts is not None and (parts < 1 or size % parts or size // parts % side or cells % parts):
            whole = f" of whole blocks of {side}" if side > 1 else ""
            raise UsageError(
                f"{size} {what} are not {parts} equal parts{whole}",
                hint=f"choose heads that are a multiple of {side}, or no balance" if whole else None,
            )
    return rows or 1, columns or 1


def _score_matrix(layout: Layout, scores: Tensor) -> Tensor:
    if tuple(scores.shape) != layout.shape:
        raise UsageError(f"scores of shape {tuple(scores.shape)} for a weight of shape {layout.shape}")
    return without_nan(layout.to_matrix(scores.detach().to("cpu", torch.float32)))
