"""The functions of a backend in plain PyTorch, a product for every block: slow, and the definition of what is right."""

from __future__ import annotations

from collections.abc import Callable

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
        y [T, R * B] ([T, C * B] transposed), and z of the same shape, before the activation, if `keep`; otherwise z is [0].
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
    return ACTIVATIONS[activation](z).to(x.dtype), z.to(x.dtype) if keep else x.new_empty(0)


def weight_gradient(grad: Tensor, x: Tensor, index: BlockIndex) -> Tensor:
    """[n, B, B]: the stored blocks of grad^T x, for grad [T, R * B] and x [T, C * B]. Sums as `multiply` does."""
    side = grad.shape[1] // index.grid[0]
    dtype = torch.promote_types(x.dtype, torch.float32)
    tall, wide = grad.to(dtype).unflatten(1, (-1, side)), x.to(dtype).unflatten(1, (-1, side))
    blocks = [tall[:, r].T @ wide[:, c] for r, c in zip(index.rows.tolist(), index.columns.tolist(), strict=True)]
    return torch.stack(blocks).to(x.dtype)
