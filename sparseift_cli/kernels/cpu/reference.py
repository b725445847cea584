"""What the kernels compute, in plain PyTorch through the dense weight: the definition of what is right."""

from __future__ import annotations

import torch
from torch import Tensor

from ..index import BlockIndex


def dense_weight(values: Tensor, index: BlockIndex) -> Tensor:
    """The weight [R * r, C * c] with the cells `values` [n, r, c] and zeros elsewhere."""
    rows, columns = index.grid
    grid = values.new_zeros(rows, columns, *values.shape[1:])
    grid = grid.index_put((index.rows.long(), index.columns.long()), values)
    return grid.transpose(1, 2).flatten(2).flatten(0, 1)


def cells_of(weight: Tensor, index: BlockIndex) -> Tensor:
    """The cells [n, r, c] of a dense weight [R * r, C * c]: the inverse of `dense_weight`."""
    rows, columns = index.grid
    cells = weight.unflatten(1, (columns, -1)).unflatten(0, (rows, -1)).transpose(1, 2)
    return cells[index.rows.long(), index.columns.long()]


def linear(x: Tensor, values: Tensor, index: BlockIndex, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias [T, R * r] for x [T, C * c], values [n, r, c] and bias [R * r]; sums in float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.to(dtype) @ dense_weight(values.to(dtype), index).T
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)


def gradients(grad: Tensor, x: Tensor, values: Tensor, index: BlockIndex) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [T, C * c], dvalues [n, r, c], dbias [R * r]) for grad [T, R * r], x [T, C * c] and values [n, r, c]."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide, tall = grad.to(dtype), x.to(dtype)
    dx = wide @ dense_weight(values.to(dtype), index)
    return dx.to(x.dtype), cells_of(wide.T @ tall, index).to(values.dtype), wide.sum(0).to(x.dtype)
