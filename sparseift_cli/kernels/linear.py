"""`BlockLinear`: a linear layer whose parameter is the stored blocks of its weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .index import BlockIndex
from .ops import block_linear


class BlockLinear(nn.Module):
    """y = activation(x W^T + bias), with the blocks of W [out_features, in_features] where `mask` is True, and zero elsewhere.

    The parameter `values` is [n, B, B], ordered by row of blocks, then by column.

    Args:
        mask: bool [out_features / B, in_features / B].
        block: B, the side of a block.
        bias: whether to add a bias [out_features].
        activation: none, relu, gelu, gelu_tanh or silu.
        backend: a name in `KERNELS`, or auto.
    """

    values: Tensor
    bias: Tensor | None
    row_offsets: Tensor
    columns: Tensor
    rows: Tensor
    column_offsets: Tensor
    column_rows: Tensor
    column_order: Tensor
    groups: Tensor

    def __init__(
        self,
        mask: Tensor,
        block: int,
        *,
        bias: bool = True,
        activation: str = "none",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.block, self.activation, self.backend = block, activation, backend
        index = BlockIndex.from_mask(mask.to(device), block)
        for name, tensor in index._asdict().items():
            self.register_buffer(name, tensor, persistent=name in ("row_offsets", "columns"))
        rows, columns = index.grid
        self.out_features, self.in_features = rows * block, columns * block
        self.values = nn.Parameter(torch.empty(index.num_blocks, block, block, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype)) if bias else None
        self.register_load_state_dict_post_hook(_rebuild_index)
        self.reset_parameters()

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor, bias: Tensor | None = None, **options: Any) -> BlockLinear:
        """A layer with the values of a dense `weight` [out_features, in_features] at the blocks of `mask` [R, C].

        Raises:
            UsageError: the weight does not consist of R x C square blocks, or has non-zeros outside the mask.
        """
        block = weight.shape[0] // mask.shape[0]
        if weight.shape != (mask.shape[0] * block, mask.shape[1] * block):
            raise UsageError(f"a weight {list(weight.shape)} does not consist of {list(mask.shape)} square blocks")
        layer = cls(mask, block, bias=bias is not None, device=weight.device, dtype=weight.dtype, **options)
        with torch.no_grad():
            layer.values.copy_(_blocks(weight, block)[layer.rows.long(), layer.columns.long()])
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        if layer.values.count_nonzero() != weight.count_nonzero():
            raise UsageError("the dense weight has non-zeros outside the blocks of the mask")
        return layer

    def reset_parameters(self) -> None:
        """Draw the values uniformly, with the variance that nn.Linear would give a layer of the mean number of inputs."""
        inputs = len(self.values) * self.block**2 / self.out_features
        bound = 1 / math.sqrt(inputs)
        with torch.no_grad():
            self.values.uniform_(-bound, bound)
            if self.bias is not None:
                self.bias.uniform_(-bound, bound)

    @property
    def index(self) -> BlockIndex:
        """Where the blocks are: the buffers of this module, so that `index.move_(mask)` moves its blocks."""
        return BlockIndex(
            self.row_offsets,
            self.columns,
            self.rows,
            self.column_offsets,
            self.column_rows,
            self.column_order,
            self.groups,
        )

    def dense(self) -> Tensor:
        """The weight [out_features, in_features] with its zeros."""
        weight = self.values.new_zeros(self.out_features, self.in_features)
        _blocks(weight, self.block)[self.rows.long(), self.columns.long()] = self.values.detach()
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return block_linear(x, self.values, self.index, self.bias, self.activation, self.backend)

    def extra_repr(self) -> str:
        """What print(model) shows in the brackets."""
        rows, columns = self.index.grid
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"blocks={len(self.values)} of {rows * columns}, {self.block} x {self.block}, activation={self.activation}"
        )


def _blocks(weight: Tensor, block: int) -> Tensor:
    """A view [R, C, B, B] of a weight [R * B, C * B]."""
    return weight.unflatten(0, (-1, block)).unflatten(2, (-1, block)).transpose(1, 2)


def _rebuild_index(layer: BlockLinear, _: object) -> None:
    """Derive the buffers that a state dict does not hold from `row_offsets` and `columns`."""
    counts = layer.row_offsets.diff().long()
    rows = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    shape = (len(counts), layer.in_features // layer.block)
    loaded = BlockIndex.from_pairs(rows, layer.columns, shape, layer.block)
    for old, new in zip(layer.index, loaded, strict=True):
        old.copy_(new)
