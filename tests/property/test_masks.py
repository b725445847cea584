"""For any layer, pattern and count: exactly the non-zeros asked for, in the places that the pattern allows."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparseift_cli.base.randomness import generator_for
from sparseift_cli.errors import UsageError
from sparseift_cli.mask.mask import disjoint_masks, empty_rows_and_columns, make_mask
from sparseift_cli.mask.patterns import room


@dataclass(frozen=True)
class Weight:
    shape: tuple[int, ...]
    groups: int
    transposed: bool

    @property
    def options(self) -> dict:
        return {"groups": self.groups, "transposed": self.transposed}

    @property
    def outputs(self) -> int:
        return self.shape[1] * self.groups if self.transposed else self.shape[0]

    def by_output(self, mask: Tensor) -> list[Tensor]:
        """What each output reads, [channels, taps], by indexing alone: independent of Layout."""
        if not self.transposed:
            return [mask[o].reshape(mask.shape[1], -1) for o in range(mask.shape[0])]
        inputs, outputs = mask.shape[0] // self.groups, mask.shape[1]
        return [
            mask[g * inputs : (g + 1) * inputs, o].reshape(inputs, -1)
            for g in range(self.groups)
            for o in range(outputs)
        ]


@st.composite
def weights(draw: st.DrawFn) -> Weight:
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    kernel = draw(st.sampled_from([(), (), (1, 1), (3, 3), (2, 3), (3,)]))
    first, second = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    return Weight((groups * first, second, *kernel), groups, draw(st.booleans()))


COUNTS = st.floats(0, 1)
SEEDS = st.integers(0, 2**40)
BLOCKS = st.tuples(st.integers(1, 4), st.integers(1, 4))
N_OF_M = st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 4), (2, 8), (5, 7), (1, 16)])


def check_blocks(weight: Weight, mask: Tensor, rows: int, columns: int) -> None:
    """Every non-zero lies in a full block of the grid, which starts anew in every group."""
    matrix = torch.stack([row.flatten() for row in weight.by_output(mask)])
    height = weight.outputs // weight.groups
    for r, c in matrix.nonzero().tolist():
        top = r - r % height % rows
        left = c - c % columns
        block = matrix[top : top + rows, left : left + columns]
        assert block.all()
        assert block.shape == (rows, columns)
        assert top // height == (top + rows - 1) // height


def check_n_of_m(weight: Weight, mask: Tensor, n: int, m: int) -> None:
    """Each output walks over its inputs tap by tap, m at a time, and finds n (of a last r: r n / m, rounded down)."""
    for row in weight.by_output(mask):
        walk = [bool(row[channel, tap]) for tap in range(row.shape[1]) for channel in range(row.shape[0])]
        groups = [walk[i : i + m] for i in range(0, len(walk), m)]
        assert [sum(group) for group in groups] == [len(group) * n // m for group in groups]


def slow_mask(scores: Tensor, nnz: int, connect: bool) -> Tensor:
    """The best nnz of distinct scores [R, C]; then one swap at a time until no row is empty, or none can be filled."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    order = sorted(((float(v), i) for i, v in enumerate(scores.flatten())), reverse=True)
    for _, i in order[:nnz]:
        mask.view(-1)[i] = True
    while connect and (~mask.any(1)).any():
        worst = [(v, i) for v, i in order if mask.view(-1)[i] and mask[i // scores.shape[1]].sum() > 1]
        best = [(v, i) for v, i in order if not mask[i // scores.shape[1]].any()]
        if not worst or not best:
            break
        mask.view(-1)[best[0][1]] = True
        mask.view(-1)[worst[-1][1]] = False
    return mask


@given(weights(), COUNTS, SEEDS, st.booleans())
def test_unstructured(weight: Weight, fraction: float, seed: int, connect: bool) -> None:
    nnz = round(fraction * prod(weight.shape))
    mask = make_mask(weight.shape, nnz, generator=generator_for(seed), connect=connect, **weight.options)
    again = make_mask(weight.shape, nnz, generator=generator_for(seed), connect=connect, **weight.options)
    assert mask.dtype == torch.bool and tuple(mask.shape) == weight.shape and mask.is_contiguous()
    assert int(mask.sum()) == nnz
    assert torch.equal(mask, again)
    rows = weight.by_output(mask)
    empty = sum(not row.any() for row in rows)
    if connect:
        assert empty == max(0, weight.outputs - nnz)
    columns = sum(
        int((~torch.stack(rows[i : i + len(rows) // weight.groups]).any(0).any(1)).sum())
        for i in range(0, len(rows), len(rows) // weight.groups)
    )
    assert empty_rows_and_columns(mask, **weight.options) == (empty, columns)


@given(weights(), COUNTS, SEEDS, BLOCKS, st.booleans())
def test_blocks(weight: Weight, fraction: float, seed: int, block: tuple[int, int], scored: bool) -> None:
    pattern, size = f"{block[0]}x{block[1]}", prod(block)
    space = room(weight.shape, pattern, **weight.options)
    height = weight.outputs // weight.groups // block[0]
    width = prod(weight.shape) // weight.outputs // block[1]
    assert space == weight.groups * height * width * size
    nnz = round(fraction * space) // size * size
    generator = generator_for(seed)
    scores = torch.rand(weight.shape, generator=generator) if scored else None
    mask = make_mask(weight.shape, nnz, generator=generator, pattern=pattern, scores=scores, **weight.options)
    assert int(mask.sum()) == nnz
    check_blocks(weight, mask, *block)
    used = sum(bool(row.any()) for row in weight.by_output(mask)) // block[0]
    assert used == min(weight.groups * height, nnz // size)
    if size > 1:
        with pytest.raises(UsageError, match=r"whole|do not fit"):
            make_mask(weight.shape, nnz + 1, generator=generator, pattern=pattern, **weight.options)


@given(weights(), SEEDS, N_OF_M, st.booleans())
def test_n_of_m(weight: Weight, seed: int, nm: tuple[int, int], scored: bool) -> None:
    n, m = nm
    pattern = f"{n}:{m}"
    nnz = room(weight.shape, pattern, **weight.options)
    whole, rest = divmod(prod(weight.shape) // weight.outputs, m)
    assert nnz == weight.outputs * (whole * n + rest * n // m)
    generator = generator_for(seed)
    scores = torch.rand(weight.shape, generator=generator) if scored else None
    mask = make_mask(weight.shape, nnz, generator=generator, pattern=pattern, scores=scores, **weight.options)
    assert int(mask.sum()) == nnz
    check_n_of_m(weight, mask, n, m)
    if scored:  # no place left out beats one taken in its group
        for row, values in zip(weight.by_output(mask), weight.by_output(scores), strict=True):
            taken, value = row.T.flatten(), values.T.flatten()
            for i in range(0, len(taken), m):
                inside, outside = value[i : i + m][taken[i : i + m]], value[i : i + m][~taken[i : i + m]]
                assert not len(inside) or not len(outside) or inside.min() > outside.max()


@given(st.integers(1, 9), st.integers(1, 9), COUNTS, SEEDS, st.booleans())
def test_best_scores(rows: int, columns: int, fraction: float, seed: int, connect: bool) -> None:
    generator = generator_for(seed)
    scores = torch.randperm(rows * columns, generator=generator).view(rows, columns) - 5.0
    nnz = round(fraction * rows * columns)
    mask = make_mask((rows, columns), nnz, generator=generator, scores=scores, connect=connect)
    assert torch.equal(mask, slow_mask(scores, nnz, connect))


@given(weights(), COUNTS, SEEDS, st.integers(1, 4), st.booleans())
def test_ties(weight: Weight, fraction: float, seed: int, levels: int, connect: bool) -> None:
    """With few levels of score the sum of the scores kept is that of the best places, whichever of a tie were taken."""
    generator = generator_for(seed)
    scores = torch.randint(levels, weight.shape, generator=generator).float()
    nnz = round(fraction * scores.numel())
    mask = make_mask(weight.shape, nnz, generator=generator, scores=scores, connect=connect, **weight.options)
    assert int(mask.sum()) == nnz
    matrix = torch.stack([row.flatten() for row in weight.by_output(scores)])
    assert scores[mask].sum() == matrix[slow_mask(matrix, nnz, connect)].sum()


@given(weights(), st.lists(st.floats(0.01, 1), min_size=1, max_size=5), COUNTS, SEEDS, BLOCKS)
def test_disjoint(weight: Weight, parts: list[float], fraction: float, seed: int, block: tuple[int, int]) -> None:
    pattern, size = f"{block[0]}x{block[1]}", prod(block)
    space = room(weight.shape, pattern, **weight.options)
    nnzs = [int(fraction * space * p / sum(parts)) // size * size for p in parts]
    masks = disjoint_masks(weight.shape, nnzs, generator=generator_for(seed), pattern=pattern, **weight.options)
    assert [int(mask.sum()) for mask in masks] == nnzs
    for a, b in combinations(masks, 2):
        assert not (a & b).any()
    rows, columns = weight.groups * (weight.outputs // weight.groups // block[0]), 0
    for mask in masks:
        check_blocks(weight, mask, *block)
    if rows:
        columns = space // size // rows
    if columns >= len(nnzs) and min(nnzs) // size >= rows:
        used = [sum(bool(row.any()) for row in weight.by_output(mask)) for mask in masks]
        assert used == [rows * block[0]] * len(nnzs)


@given(st.integers(1, 10), st.integers(2, 8), st.integers(1, 9), SEEDS)
def test_disjoint_masks_fill_a_weight(rows: int, branches: int, width: int, seed: int) -> None:
    shape = (rows, branches * width)
    masks = disjoint_masks(shape, [rows * width] * branches, generator=generator_for(seed))
    assert torch.stack(masks).sum(0).eq(1).all()
    assert all(mask.any(1).all() for mask in masks)


@given(weights(), SEEDS, st.sampled_from([(1, 4, 3), (2, 4, 2), (1, 8, 8)]))
def test_disjoint_n_of_m(weight: Weight, seed: int, case: tuple[int, int, int]) -> None:
    n, m, branches = case
    nnz = room(weight.shape, f"{n}:{m}", **weight.options)
    masks = disjoint_masks(
        weight.shape, [nnz] * branches, generator=generator_for(seed), pattern=f"{n}:{m}", **weight.options
    )
    for mask in masks:
        check_n_of_m(weight, mask, n, m)
    assert int(torch.stack(masks).sum(0).max()) <= 1


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), BLOCKS, COUNTS, SEEDS, st.booleans(), st.booleans())
def test_balance(
    heads: int, tall: int, wide: int, block: tuple[int, int], fraction: float, seed: int, by_rows: bool, scored: bool
) -> None:
    """Each head's share differs by at most one block, the first ones having more, and no output is empty needlessly."""
    rows, columns = tall * block[0] * (heads if by_rows else 1), wide * block[1] * (1 if by_rows else heads)
    size, generator = prod(block), generator_for(seed)
    nnz = round(fraction * rows * columns) // size * size
    balance = {"row_balance" if by_rows else "column_balance": heads}
    scores = torch.rand(rows, columns, generator=generator) if scored else None
    pattern = f"{block[0]}x{block[1]}"
    mask = make_mask((rows, columns), nnz, generator=generator, pattern=pattern, scores=scores, **balance)
    check_blocks(Weight((rows, columns), 1, False), mask, *block)
    shares = [int(part.sum()) // size for part in mask.chunk(heads, 0 if by_rows else 1)]
    assert sum(shares) * size == nnz
    assert shares == sorted(shares, reverse=True) and shares[0] - shares[-1] <= 1
    assert empty_rows_and_columns(mask)[0] // block[0] == max(0, rows // block[0] - nnz // size)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(2, 4), SEEDS, st.booleans())
def test_balanced_disjoint_masks_fill_a_weight(heads: int, size: int, branches: int, seed: int, by_rows: bool) -> None:
    """The heads that get one more take turns, so that the last branch finds its share in every head."""
    total = heads * size * size * heads
    nnzs = [total // branches + (b < total % branches) for b in range(branches)]
    balance = {"row_balance" if by_rows else "column_balance": heads}
    masks = disjoint_masks((heads * size, heads * size), nnzs, generator=generator_for(seed), **balance)
    assert torch.stack(masks).sum(0).eq(1).all()
    for mask in masks:
        shares = [int(part.sum()) for part in mask.chunk(heads, 0 if by_rows else 1)]
        assert max(shares) - min(shares) <= 1
