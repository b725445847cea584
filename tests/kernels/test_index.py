"""Block indices: what they hold, that they refuse duplicates, that they move in place."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparseift_cli.errors import UsageError
from sparseift_cli.kernels.index import BlockIndex, token_parts

MASK = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1]], dtype=torch.bool)


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """A mask [R, C] with at least one block."""
    rows, columns, seed = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(0, 99))
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < draw(st.floats(0.05, 1))
    mask[seed % rows, seed % columns] = True
    return mask


def test_walks_by_rows_and_by_columns() -> None:
    index = BlockIndex.from_mask(MASK)
    assert index.grid == (3, 4) and index.num_blocks == 5
    assert index.row_offsets.tolist() == [0, 3, 3, 5]
    assert index.columns.tolist() == [0, 2, 3, 0, 3]
    assert index.rows.tolist() == [0, 0, 0, 2, 2]
    assert index.column_offsets.tolist() == [0, 2, 2, 3, 5]
    assert index.column_rows.tolist() == [0, 2, 0, 0, 2]
    assert index.column_order.tolist() == [0, 3, 1, 2, 4]
    assert all(tensor.dtype == torch.int32 and tensor.is_contiguous() for tensor in index)


@given(masks(), st.sampled_from([32, 64, 128]))
def test_mask_comes_back_and_every_block_is_in_one_group(mask: Tensor, block: int) -> None:
    index = BlockIndex.from_mask(mask, block)
    assert torch.equal(index.mask(), mask)
    used = index.groups[index.groups[:, 0] >= 0]
    assert sorted({k for group in used.tolist() for k in group}) == list(range(index.num_blocks))
    assert sum(len(set(group)) for group in used.tolist()) == index.num_blocks
    for group in used.tolist():
        rows, columns = {int(index.rows[k]) for k in group}, {int(index.columns[k]) for k in group}
        assert len(rows) == 1 or len(columns) == 1
    unused = index.groups[len(used) :]
    assert (unused == -1).all()


@given(masks(), st.integers(0, 99))
def test_moves_in_place(mask: Tensor, seed: int) -> None:
    index = BlockIndex.from_mask(mask)
    order = torch.randperm(mask.numel(), generator=torch.Generator().manual_seed(seed))
    moved = mask.flatten()[order].view_as(mask)
    places = [tensor.data_ptr() for tensor in index]
    index.move_(moved)
    assert [tensor.data_ptr() for tensor in index] == places
    assert all(torch.equal(a, b) for a, b in zip(index, BlockIndex.from_mask(moved), strict=True))


def test_moving_refuses_another_size() -> None:
    index = BlockIndex.from_mask(MASK)
    with pytest.raises(UsageError, match="5 blocks on a grid of 3 x 4, the new mask 12 on 3 x 4"):
        index.move_(torch.ones_like(MASK))


def test_pairs_in_any_order() -> None:
    rows, columns = MASK.nonzero().flip(0).unbind(1)
    index = BlockIndex.from_pairs(rows, columns, (3, 4))
    assert all(torch.equal(a, b) for a, b in zip(index, BlockIndex.from_mask(MASK), strict=True))


def test_duplicates_and_outsiders_are_refused() -> None:
    with pytest.raises(UsageError, match=r"block \(1, 2\) is given twice"):
        BlockIndex.from_pairs(torch.tensor([1, 0, 1]), torch.tensor([2, 0, 2]), (2, 3))
    with pytest.raises(UsageError, match=r"block \(0, 3\) is outside the grid of 2 x 3 blocks"):
        BlockIndex.from_pairs(torch.tensor([1, 0]), torch.tensor([2, 3]), (2, 3))
    with pytest.raises(UsageError, match="at least one block"):
        BlockIndex.from_mask(torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(UsageError, match="bool matrix"):
        BlockIndex.from_mask(torch.ones(2, 2))


def test_tokens_are_cut_only_where_processors_are_idle() -> None:
    assert token_parts(512, 16384, 64, 132) == 1
    assert token_parts(72, 16384, 64, 132) == 3
    assert token_parts(1, 10, 64, 132) == 1
