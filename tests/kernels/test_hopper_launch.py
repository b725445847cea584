"""The arguments with which the kernels for Hopper are launched, without such a GPU and without triton: only names and shapes."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseift_cli.kernels import blocks, hopper
from sparseift_cli.kernels.index import BlockIndex
from tests.kernels.cases import mask_of

TOKENS = 300


class Kernel:
    """Takes the place of a kernel: binds the arguments of each launch to the parameters of the kernel."""

    def __init__(self, kernel: Any) -> None:
        self._signature = inspect.signature(getattr(kernel, "fn", kernel))
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, num_warps: int, **constants: Any) -> None:
            bound = self._signature.bind(*arguments, **constants).arguments
            self.launches.append(bound)

        return launch


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> tuple[Kernel, Kernel]:
    """The kernels of products and of the weight gradient, on a CPU that passes for a Hopper GPU."""
    device = SimpleNamespace(descriptors=True, processors=132, hopper=True)
    found = Kernel(hopper.multiply_kernel), Kernel(hopper.weight_gradient_kernel)
    monkeypatch.setattr(hopper, "multiply_kernel", found[0])
    monkeypatch.setattr(hopper, "weight_gradient_kernel", found[1])
    monkeypatch.setattr(hopper, "_descriptor", lambda matrix, rows, columns: (tuple(matrix.shape), rows, columns))
    monkeypatch.setattr(blocks, "triton", SimpleNamespace(cdiv=lambda a, b: -(-a // b)))
    monkeypatch.setattr(blocks, "_device", lambda _: device)
    monkeypatch.setattr(blocks, "_hopper_kernels", lambda: hopper)
    return found


def draw(*shape: int) -> Tensor:
    """Zeros of bfloat16."""
    return torch.zeros(*shape, dtype=torch.bfloat16)


@pytest.mark.parametrize("block", [128, 64])
def test_products(kernels: tuple[Kernel, Kernel], block: int) -> None:
    index = BlockIndex.from_mask(mask_of("an empty row and an empty column"), block)
    (rows, columns), tiles = index.grid, 2
    x, grad, values = draw(TOKENS, columns * block), draw(TOKENS, rows * block), draw(index.num_blocks, block, block)
    y, slope = blocks.multiply(x, values, index, False, draw(rows * block), "gelu", True)
    assert y.shape == slope.shape == grad.shape
    assert blocks.multiply(grad, values, index, True)[0].shape == x.shape
    dz, total = blocks.gradient_before(grad, values, index, x)
    assert dz.shape == x.shape and total.shape == (columns * block,) and total.dtype == torch.float32
    blocks.gradient_before(grad, values, index, x, False)
    launches = kernels[0].launches
    assert [launch["SLOPE"] for launch in launches] == ["keep", "none", "sum", "read"]
    assert [launch["ACTIVATION"] for launch in launches] == ["gelu", "none", "none", "none"]
    assert [launch["BIAS"] for launch in launches] == [True, False, False, False]
    assert [launch["num_token_tiles"] for launch in launches] == [tiles] * 4
    assert [launch["num_lines"] for launch in launches] == [rows, columns, columns, columns]
    for launch, width in zip(launches, (rows, columns, columns, columns), strict=True):
        assert launch["y"] == ((TOKENS, width * block), hopper.TOKENS, block // 2)
        assert launch["width"] == width * block
    assert launches[0]["slope"] == launches[0]["y"]
    assert launches[2]["slope"] == launches[3]["slope"] == (tuple(x.shape), hopper.TOKENS, hopper.DEPTH)
    assert launches[2]["sums"].shape == (hopper.parts_of_sums(TOKENS), columns * block) == (8 * tiles, columns * block)


def test_weight_gradient(kernels: tuple[Kernel, Kernel]) -> None:
    index = BlockIndex.from_mask(torch.ones(50, 2, dtype=torch.bool), 64)
    grad, x = draw(TOKENS, 50 * 64), draw(TOKENS, 2 * 64)
    assert index.groups.shape[1] == 8
    assert blocks.weight_gradient(grad, x, index).shape == (100, 64, 64)
    (launch,) = kernels[1].launches
    assert launch["num_groups"] == len(index.groups) and launch["num_blocks"] == 100 and launch["tokens"] == TOKENS
