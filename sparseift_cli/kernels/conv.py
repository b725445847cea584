"""`BlockConv2d`: a convolution whose parameter is the stored blocks of its weight."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .conv_ops import block_conv2d
from .layer import BlockLayer
from .ops import block_linear
from .reference import ConvWindow


class BlockConv2d(BlockLayer):
    """nn.Conv2d with the blocks of its weight [out, in, kh, kw] where `mask` is True, all taps of each, and zero elsewhere.

    The parameter `values` is [n, kh * kw, B, B], ordered by row of blocks, then by column. Inputs are best channels_last; others
    are copied. A kernel of 1 x 1 without padding is computed as a linear layer on the positions that the stride leaves.

    Args:
        mask: bool [out / B, in / B].
        block: B, the side of a block.
        kernel_size: kh and kw, or one number for both; so are stride and padding.
        padding: zeros on each side, "valid" for none, or "same" where the kernel is odd and the stride 1.
        bias: whether to add a bias [out].
        backend: a name in `KERNELS`, or auto.

    Raises:
        UsageError: a padding that nn.Conv2d has and this layer has not.
    """

    def __init__(
        self,
        mask: Tensor,
        block: int,
        kernel_size: int | tuple[int, int],
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        bias: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        size, step = _pair(kernel_size), _pair(stride)
        super().__init__(mask, block, size, bias=bias, backend=backend, device=device, dtype=dtype)
        self.out_channels, self.in_channels = self.weight_shape[:2]
        self.kernel_size, self.stride = size, step
        self.padding = _padding(padding, size, step)
        self.window = ConvWindow(*self.kernel_size, *self.stride, *self.padding)

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor, bias: Tensor | None = None, **options: Any) -> Self:
        """A layer with the values of a dense `weight` [out, in, kh, kw] at the blocks of `mask` [R, C].

        `options` are stride, padding and backend.

        Raises:
            UsageError: the weight does not consist of R x C square blocks, or has non-zeros outside the mask.
        """
        return super().from_dense(weight, mask, bias, kernel_size=tuple(weight.shape[2:]), **options)

    @staticmethod
    def why_not(conv: nn.Module) -> str | None:
        """The reason for which this layer cannot stand for a convolution of torch, or None where it can."""
        if not isinstance(conv, nn.Conv2d):
            return f"it is a {type(conv).__name__}, not a Conv2d"
        if conv.groups != 1:
            return f"its channels are in {conv.groups} groups"
        if any(step != 1 for step in conv.dilation):
            return f"its kernel is dilated by {' x '.join(map(str, conv.dilation))}"
        if conv.padding_mode != "zeros":
            return f"its padding mode is {conv.padding_mode}, not zeros"
        try:
            _padding(conv.padding, _pair(conv.kernel_size), _pair(conv.stride))
        except UsageError as error:
            return str(error)
        return None

    @staticmethod
    def window_of(conv: nn.Conv2d) -> ConvWindow:
        """Size, stride and padding of the kernel of a convolution of torch.

        Raises:
            UsageError: a padding that this layer has not.
        """
        size, step = _pair(conv.kernel_size), _pair(conv.stride)
        return ConvWindow(*size, *step, *_padding(conv.padding, size, step))

    @staticmethod
    def is_linear(conv: nn.Module) -> bool:
        """Whether a convolution of torch, or of this class, is a linear layer on the positions that its stride leaves."""
        return conv.kernel_size == (1, 1) and conv.padding in ((0, 0), "valid", "same")

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, OH, OW] channels_last, or both without N."""
        if x.dim() == 3:
            return self(x[None])[0]
        if self.is_linear(self):
            rows = x[:, :, :: self.stride[0], :: self.stride[1]].permute(0, 2, 3, 1)
            y = block_linear(rows, self.values.flatten(0, 1), self.index, self.bias, "none", self.backend)
            return y.permute(0, 3, 1, 2)
        return block_conv2d(x, self.values, self.index, self.window, self.bias, self.backend)

    def empty_dense_form(self) -> nn.Module:
        """A convolution on meta."""
        sizes = (self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding)
        return nn.Conv2d(*sizes, bias=self.bias is not None, device="meta")

    def extra_repr(self) -> str:
        """What print(model) shows in the brackets."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, bias={self.bias is not None}, {self._describe_blocks()}"
        )


def _pair(size: int | tuple[int, ...]) -> tuple[int, int]:
    y, x = (size, size) if isinstance(size, int) else size
    return y, x


def _padding(padding: int | tuple[int, ...] | str, kernel: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int]:
    """The zeros above and left of an input (as many are below and right)."""
    if not isinstance(padding, str):
        return _pair(padding)
    if padding == "valid":
        return 0, 0
    if padding != "same" or stride != (1, 1) or kernel[0] % 2 == 0 or kernel[1] % 2 == 0:
        raise UsageError(
            f"padding {padding!r} of a kernel of {kernel[0]} x {kernel[1]} is not the same number of zeros on two sides"
        )
    return kernel[0] // 2, kernel[1] // 2
