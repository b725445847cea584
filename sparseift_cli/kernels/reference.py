"""The functions of a backend in plain PyTorch, a product for every block: slow, and the definition of what is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .index import BlockIndex

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}


def slope_of(z: Tensor, activation: str) -> Tensor:
    """The derivative of an activation at z, a tensor of any shape."""
    aten, ones = torch.ops.aten, torch.ones_like(z)
    if activation == "relu":
        return aten.threshold_backward(ones, z, 0)
    if activation == "silu":
        return aten.silu_backward(ones, z)
    if activation == "none":
        return ones
    return aten.gelu_backward(ones, z, approximate="tanh" if activation == "gelu_tanh" else "none")


class ConvWindow(NamedTuple):
    """The kernel of a convolution: its size, stride and zero padding, in pixels. Dilation is 1."""

    kernel_y: int
    kernel_x: int
    stride_y: int
    stride_x: int
    padding_y: int
    padding_x: int

    @property
    def taps(self) -> int:
        """The number of taps; tap dy * kernel_x + dx is the weight at (dy, dx)."""
        return self.kernel_y * self.kernel_x

    def output(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output, as nn.Conv2d's; 0 or less where the kernel does not fit.

        >>> ConvWindow(3, 3, 2, 2, 1, 1).output(56, 55)
        (28, 28)
        """
        return (
            (height + 2 * self.padding_y - self.kernel_y) // self.stride_y + 1,
            (width + 2 * self.padding_x - self.kernel_x) // self.stride_x + 1,
        )


def multiply(
    x: Tensor,
    values: Tensor,
    index: BlockIndex,
    transposed: bool = False,
    bias: Tensor | None = None,
    activation: str = "none",
    keep: bool = False,
) -> tuple[Tensor, Tensor]:
    """y = activation(x W^T + bias) for x [T, C * B], or x W for x [T, R * B] when `transposed`.

    Sums in float32, or in float64 for float64 inputs.

    Returns:
        y [T, R * B] ([T, C * B] transposed), and the derivative of the activation, of the same shape, if `keep`; otherwise [0].
    """
    side = values.shape[-1]
    across = index.grid[1] if transposed else index.grid[0]
    z = x.new_zeros(len(x), across * side, dtype=torch.promote_types(x.dtype, torch.float32))
    for block, row, column in zip(values.to(z.dtype), index.rows.tolist(), index.columns.tolist(), strict=True):
        out, into = slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side)
        if transposed:
            z[:, into] += x[:, out].to(z.dtype) @ block
        else:
            z[:, out] += x[:, into].to(z.dtype) @ block.T
    if bias is not None:
        z += bias
    return ACTIVATIONS[activation](z).to(x.dtype), slope_of(z, activation).to(x.dtype) if keep else x.new_empty(0)


def weight_gradient(grad: Tensor, x: Tensor, index: BlockIndex) -> Tensor:
    """[n, B, B]: the stored blocks of grad^T x, for grad [T, R * B] and x [T, C * B]. Sums as `multiply` does."""
    side = grad.shape[1] // index.grid[0]
    dtype = torch.promote_types(x.dtype, torch.float32)
    tall, wide = grad.to(dtype).unflatten(1, (-1, side)), x.to(dtype).unflatten(1, (-1, side))
    blocks = [tall[:, r].T @ wide[:, c] for r, c in zip(index.rows.tolist(), index.columns.tolist(), strict=True)]
    return torch.stack(blocks).to(x.dtype)


def _inputs_by_tap(x: Tensor, window: ConvWindow) -> Iterator[Tensor]:
    """For each tap, a view [N, OH, OW, C] of a padded x [N, H + 2 py, W + 2 px, C]: what every output position reads there."""
    height, width = window._replace(padding_y=0, padding_x=0).output(x.shape[1], x.shape[2])
    for dy in range(window.kernel_y):
        for dx in range(window.kernel_x):
            rows = slice(dy, dy + (height - 1) * window.stride_y + 1, window.stride_y)
            yield x[:, rows, dx : dx + (width - 1) * window.stride_x + 1 : window.stride_x]


def _padded(x: Tensor, window: ConvWindow) -> Tensor:
    """x [N, H, W, C] with its padding, in the dtype of the sums."""
    border = (0, 0, window.padding_x, window.padding_x, window.padding_y, window.padding_y)
    return F.pad(x.to(torch.promote_types(x.dtype, torch.float32)), border)


def conv2d(x: Tensor, values: Tensor, index: BlockIndex, window: ConvWindow, bias: Tensor | None = None) -> Tensor:
    """The convolution [N, OH, OW, R * B] of x [N, H, W, C * B] with values [n, taps, B, B]: a product for every tap."""
    taps = [
        multiply(tap.flatten(0, 2), values[:, t].to(tap.dtype), index)[0].unflatten(0, tap.shape[:3])
        for t, tap in enumerate(_inputs_by_tap(_padded(x, window), window))
    ]
    y = torch.stack(taps).sum(0)
    return (y if bias is None else y + bias).to(x.dtype)


def conv2d_input_gradient(
    grad: Tensor, values: Tensor, index: BlockIndex, window: ConvWindow, size: tuple[int, int]
) -> Tensor:
    """The gradient [N, H, W, C * B] at the input of `size` (H, W), from grad [N, OH, OW, R * B]."""
    height, width = size
    features = index.grid[1] * values.shape[-1]
    dx = _padded(grad.new_zeros(len(grad), height, width, features), window)
    rows = grad.to(dx.dtype).flatten(0, 2)
    for t, tap in enumerate(_inputs_by_tap(dx, window)):
        tap += multiply(rows, values[:, t].to(dx.dtype), index, transposed=True)[0].view(tap.shape)
    inside = dx[:, window.padding_y : window.padding_y + height, window.padding_x : window.padding_x + width]
    return inside.to(grad.dtype).contiguous()


def conv2d_weight_gradient(grad: Tensor, x: Tensor, index: BlockIndex, window: ConvWindow) -> Tensor:
    """[n, taps, B, B]: the stored blocks of the gradient at the weight, for grad [N, OH, OW, R * B] and x [N, H, W, C * B]."""
    rows = grad.flatten(0, 2)
    taps = [weight_gradient(rows, tap.flatten(0, 2), index) for tap in _inputs_by_tap(_padded(x, window), window)]
    return torch.stack(taps, 1).to(x.dtype)
