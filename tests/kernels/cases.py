"""What the tests of kernels share: masks with corner cases, and the dense layer that every kernel must equal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparseift_cli.kernels.conv import BlockConv2d
from sparseift_cli.kernels.index import BlockIndex
from sparseift_cli.kernels.reference import ACTIVATIONS, ConvWindow

MASKS = {
    "an empty row and an empty column": [[1, 0, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1], [0, 0, 1, 1], [1, 0, 0, 0]],
    "one block": [[0, 0], [0, 1], [0, 0]],
    "all blocks": [[1, 1, 1], [1, 1, 1]],
    "one row": [[1, 0, 1, 1, 1]],
    "one column": [[1], [0], [1]],
}


def mask_of(name: str) -> Tensor:
    """Bool [R, C]."""
    return torch.tensor(MASKS[name], dtype=torch.bool)


def relative(found: Tensor, wanted: Tensor) -> float:
    """Frobenius norm of the difference over that of `wanted`, in float64; NaN and infinity where `found` has any."""
    found, wanted = found.double(), wanted.double()
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


@dataclass
class Case:
    """Random operands of one layer and, in float64, what comes out of the dense layer with the same weight."""

    index: BlockIndex
    x: Tensor
    values: Tensor
    bias: Tensor
    grad: Tensor
    z: Tensor
    dx: Tensor
    dvalues: Tensor

    @classmethod
    def draw(
        cls, mask: Tensor, block: int, tokens: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
    ) -> Case:
        """Operands of `dtype` for the blocks of `mask` [R, C]."""
        rows, columns = mask.shape
        generator = torch.Generator().manual_seed(seed)
        index = BlockIndex.from_mask(mask.to(device), block)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        x, grad = normal(tokens, columns * block), normal(tokens, rows * block)
        values = normal(index.num_blocks, block, block) * block**-0.5
        bias = normal(rows * block)
        at = index.rows.long(), index.columns.long()
        weight = torch.zeros(rows, columns, block, block, dtype=torch.float64, device=device)
        weight[at] = values.double()
        weight = weight.transpose(1, 2).reshape(rows * block, columns * block)
        full = (grad.double().T @ x.double()).view(rows, block, columns, block).transpose(1, 2)
        z = F.linear(x.double(), weight, bias.double())
        return cls(index, x, values, bias, grad, z, grad.double() @ weight, full[at])

    def y(self, activation: str) -> Tensor:
        """activation(x W^T + bias) in float64."""
        return ACTIVATIONS[activation](self.z)


def window_of(
    kernel: int | tuple[int, int], stride: int | tuple[int, int], padding: int | tuple[int, int]
) -> ConvWindow:
    """A window of square or other size."""
    sizes = [(size, size) if isinstance(size, int) else size for size in (kernel, stride, padding)]
    return ConvWindow(*sizes[0], *sizes[1], *sizes[2])


@dataclass
class ConvCase:
    """As `Case`, for a convolution; images are [N, H, W, channels], `values` [n, taps, B, B]."""

    index: BlockIndex
    window: ConvWindow
    x: Tensor
    values: Tensor
    bias: Tensor
    grad: Tensor
    y: Tensor
    dx: Tensor
    dvalues: Tensor

    @classmethod
    def draw(
        cls,
        mask: Tensor,
        block: int,
        images: tuple[int, int, int],
        window: ConvWindow,
        dtype: torch.dtype,
        device: str = "cpu",
        seed: int = 0,
    ) -> ConvCase:
        """Operands of `dtype` for the blocks of `mask` [R, C] and `images` (N, H, W)."""
        generator = torch.Generator().manual_seed(seed)
        scale = (window.taps * block) ** -0.5
        layer = BlockConv2d(mask, block, window[:2], stride=window[2:4], padding=window[4:], device=device, dtype=dtype)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device, dtype)

        x = normal(*images, layer.in_channels)
        with torch.no_grad():
            layer.values.copy_(normal(*layer.values.shape) * scale)
            layer.bias.copy_(normal(layer.out_channels))
        weight = layer.double().dense().requires_grad_()
        twin = x.double().permute(0, 3, 1, 2).requires_grad_()
        y = F.conv2d(twin, weight, layer.bias.detach(), window[2:4], window[4:])
        grad = normal(*y.permute(0, 2, 3, 1).shape)
        dx, dweight = torch.autograd.grad(y, (twin, weight), grad.double().permute(0, 3, 1, 2))
        values, bias = layer.values.detach().to(dtype), layer.bias.detach().to(dtype)
        found = (y.detach().permute(0, 2, 3, 1), dx.permute(0, 2, 3, 1), layer.blocks_of(dweight))
        return cls(layer.index, window, x, values, bias, grad, *found)

    def layer(self) -> BlockConv2d:
        """The layer of this case."""
        window = self.window
        options = {"stride": window[2:4], "padding": window[4:], "device": self.x.device, "dtype": self.x.dtype}
        layer = BlockConv2d(self.index.mask(), self.values.shape[-1], window[:2], **options)
        with torch.no_grad():
            layer.values.copy_(self.values)
            layer.bias.copy_(self.bias)
        return layer
