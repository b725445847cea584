"""Random masks of blocks: exactly balanced rows and columns, for every count and grid, in heads, groups and disjoint masks."""

from __future__ import annotations

from collections import Counter
from itertools import product
from math import comb

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparseift_cli.base.randomness import generator_for
from sparseift_cli.mask.balanced import balanced_masks
from sparseift_cli.mask.mask import disjoint_masks, make_mask


def spread(counts: Tensor) -> int:
    return int(counts.max() - counts.min())


def check(masks: list[Tensor], counts: list[int], balance: tuple[int, int] = (1, 1), groups: int = 1) -> None:
    assert [int(mask.sum()) for mask in masks] == counts
    assert int(torch.stack(masks).sum(0).max()) <= 1
    for mask in masks:
        for part in mask.chunk(groups):
            assert spread(part.sum(0)) <= 1 and spread(part.sum(1)) <= 1
        assert spread(mask.sum(1)) <= 1
        assert spread(torch.stack([part.sum() for part in mask.chunk(groups)])) <= 1
        for dim, blocks in enumerate(balance):
            assert spread(torch.stack([part.sum() for part in mask.chunk(blocks, dim)])) <= 1


@pytest.mark.parametrize("grid", list(product(range(1, 6), repeat=2)), ids=str)
def test_one_mask_of_every_count_on_every_small_grid(grid: tuple[int, int]) -> None:
    for n in range(grid[0] * grid[1] + 1):
        check(balanced_masks(grid, [n], generator_for(0, str(n))), [n])


@pytest.mark.parametrize("grid", list(product(range(1, 5), repeat=2)), ids=str)
def test_two_masks_of_all_counts_on_every_small_grid(grid: tuple[int, int]) -> None:
    """On a grid of 2 x 2, one of one and one of two leave no choice: a greedy second mask would be unbalanced."""
    size = grid[0] * grid[1]
    for n in range(size + 1):
        for other in range(size - n + 1):
            check(balanced_masks(grid, [n, other], generator_for(0, str(n), str(other))), [n, other])


@given(
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
    st.sampled_from([(1, 1), (1, 1), (2, 1), (3, 1), (1, 2), (1, 3)]),
    st.integers(1, 3),
    st.lists(st.floats(0, 1), min_size=1, max_size=6),
    st.integers(0, 2**40),
)
def test_any_disjoint_masks_in_heads_or_groups(
    grid: tuple[int, int], balance: tuple[int, int], groups: int, shares: list[float], seed: int
) -> None:
    if balance != (1, 1):
        groups = 1
    grid = grid[0] * balance[0] * groups, grid[1] * balance[1]
    left, counts = grid[0] * grid[1], []
    for share in shares:
        counts.append(round(share * left))
        left -= counts[-1]
    masks = balanced_masks(grid, counts, generator_for(seed), balance=balance, groups=groups)
    check(masks, counts, balance, groups)
    again = balanced_masks(grid, counts, generator_for(seed), balance=balance, groups=groups)
    assert all(torch.equal(a, b) for a, b in zip(masks, again, strict=True))


@pytest.mark.parametrize(("grid", "n"), [((4, 3), 5), ((3, 5), 4), ((5, 5), 12)])
def test_every_cell_is_as_likely(grid: tuple[int, int], n: int) -> None:
    draws, generator = 3000, generator_for(1)
    total = torch.stack([balanced_masks(grid, [n], generator)[0] for _ in range(draws)]).sum(0)
    share = n / (grid[0] * grid[1])
    assert float((total / draws - share).abs().max()) < 4.5 * (share * (1 - share) / draws) ** 0.5


def test_every_balanced_mask_is_drawn() -> None:
    """There are 90 masks of 4 x 4 with two in every row and column; each about as often as the others."""
    generator = generator_for(2)
    found = Counter(tuple(balanced_masks((4, 4), [8], generator)[0].flatten().tolist()) for _ in range(3600))
    assert len(found) == 90 == comb(4, 2) ** 2 * 5 // 2
    assert max(found.values()) < 2.5 * min(found.values())


def test_branches_are_as_likely() -> None:
    generator = generator_for(3)
    total = sum(torch.stack(balanced_masks((4, 6), [6, 6, 6], generator)) for _ in range(2000))
    assert float((total / 2000 - 0.25).abs().max()) < 4.5 * (0.25 * 0.75 / 2000) ** 0.5


@pytest.mark.parametrize("transposed", [False, True])
def test_masks_of_blocks_are_balanced(transposed: bool) -> None:
    """As weights see it: blocks of a linear layer, of all taps of a convolution, of groups; also without `connect`."""
    for shape, pattern, groups, nnz in (
        ((24, 40), "4x4", 1, 17 * 16),
        ((40, 24), "4x4", 1, 33 * 16),
        ((16, 16, 3, 3), "4x36", 1, 7 * 144),
        ((32, 8, 3, 3), "4x36", 2, 9 * 144),
    ):
        if transposed and len(shape) > 2:
            continue
        for connect in (True, False):
            mask = make_mask(
                shape,
                nnz,
                generator=generator_for(0),
                pattern=pattern,
                connect=connect,
                groups=groups,
                transposed=transposed,
            )
            across = int(pattern.partition("x")[2])
            matrix = (mask.t() if transposed else mask).flatten(1)
            cells = matrix.unflatten(0, (-1, 4)).unflatten(2, (-1, across))[:, 0, :, 0]
            check([cells], [nnz // (4 * across)], groups=groups)
    branches = disjoint_masks((32, 32), [13 * 16, 20 * 16, 31 * 16], generator=generator_for(0), pattern="4x4")
    check([mask[::4, ::4] for mask in branches], [13, 20, 31])
