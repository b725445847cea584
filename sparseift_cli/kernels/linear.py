"""`BlockLinear`: a linear layer whose parameter is the stored blocks of its weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import UsageError
from .layer import BlockLayer
from .ops import block_linear


class BlockLinear(BlockLayer):
    """y = activation(x W^T + bias), with the blocks of W [out_features, in_features] where `mask` is True, and zero elsewhere.

    The parameter `values` is [n, B, B], ordered by row of blocks, then by column.

    Args:
        mask: bool [out_features / B, in_features / B].
        block: B, the side of a block.
        bias: whether to add a bias [out_features].
        activation: none, relu, gelu, gelu_tanh or silu.
        options: backend, transposed, device and dtype, as `BlockLayer` has them.
    """

    def __init__(
        self,
        mask: Tensor,
        block: int,
        *,
        bias: bool = True,
        activation: str = "none",
        **options: Any,
    ) -> None:
        super().__init__(mask, block, bias=bias, **options)
        self.activation = activation
        self.out_features, self.in_features = mask.shape[0] * block, mask.shape[1] * block

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return block_linear(x, self.values, self.index, self.bias, self.activation, self.backend)

    def empty_dense_form(self) -> nn.Module:
        """A linear layer on meta."""
        if self.transposed:
            raise UsageError(
                "a transposed layer that replaced none has no ordinary form", hint="make it not transposed"
            )
        return nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")

    def extra_repr(self) -> str:
        """What print(model) shows in the brackets."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self._describe_blocks()}, activation={self.activation}"
        )
