"""Masks as words give what the masks themselves give, however they lie in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparseift_cli.base.randomness import generator_for
from sparseift_cli.sparsity.gpu.primitives import as_words, count, invert_

SHAPES = [(0,), (7,), (8,), (72,), (3, 5), (40, 50), (16, 8, 3, 3), (5, 3, 3, 3), (256, 1024)]


def masks(shape: tuple[int, ...], last: bool, density: float = 0.5) -> list[Tensor]:
    made = [torch.rand(shape, generator=generator_for(seed)) < density for seed in range(2)]
    return [m.to(memory_format=torch.channels_last) for m in made] if last and len(shape) == 4 else made


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_operations_are_those_of_the_masks(shape: tuple[int, ...], last: bool) -> None:
    a, b = masks(shape, last)
    x, y = as_words(a, b)
    assert x.dtype == (torch.int64 if a.numel() % 8 == 0 else torch.uint8)
    assert int(count(x & (x ^ y))) == int((a & ~b).count_nonzero())
    expected = ~(a | b)
    x |= y
    invert_(x)
    assert torch.equal(a, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_place_may_be_true(shape: tuple[int, ...]) -> None:
    (full,) = as_words(torch.ones(shape, dtype=torch.bool))
    assert int(count(full)) == full.numel() * full.element_size()


def test_masks_that_do_not_lie_alike_go_byte_by_byte() -> None:
    a, b = masks((16, 8, 3, 3), last=False)
    for other in (b.to(memory_format=torch.channels_last), b.transpose(0, 1).contiguous().transpose(0, 1)):
        x, y = as_words(a, other)
        assert x.dtype == torch.uint8
        assert int(count(x & y)) == int((a & b).count_nonzero())
    (x,) = as_words(torch.cat([a.view(-1)] * 2)[3:])  # no whole words from there
    assert x.dtype == torch.uint8
