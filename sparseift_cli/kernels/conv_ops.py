"""The operators `sparseift::block_conv2d`, `block_conv2d_input_gradient` and `block_conv2d_weight_gradient`.

As those of `ops`, for convolutions. Tensors are [N, H, W, channels] and contiguous: the memory of a channels_last tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight
from torch.utils.flop_counter import register_flop_formula

from ..errors import UsageError
from .index import BlockIndex
from .reference import ConvWindow
from .registry import ConvFunctions, LayerRequest, choose
from .watch import notify


def block_conv2d(
    x: Tensor,
    values: Tensor,
    index: BlockIndex,
    window: ConvWindow,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The convolution of x with a weight [R * B, C * B, kh, kw] of which the blocks in `index` are stored, all taps of each.

    Args:
        x: [N, C * B, H, W]; copied unless it is channels_last.
        values: [n, taps, B, B], the stored blocks by row, then by column; of the dtype of x, or of any under autocast.
        index: where the blocks are.
        window: size, stride and padding of the kernel.
        bias: [R * B] or None.
        backend: a name in `KERNELS`, or auto.

    Returns:
        [N, R * B, OH, OW], channels_last.

    Raises:
        UsageError: the shapes or dtypes do not fit, or the kernel is larger than the padded input.
    """
    y = torch.ops.sparseift.block_conv2d(x.permute(0, 2, 3, 1), values, bias, list(index), list(window), backend)
    return y.permute(0, 3, 1, 2)


def _functions(backend: str, x: Tensor, block: int) -> ConvFunctions:
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
    dtype = str(x.dtype).removeprefix("torch.")
    return choose(backend, LayerRequest(block, dtype, x.device.type, capability, "conv2d")).conv_functions()


def _require_shapes(x: Tensor, values: Tensor, bias: Tensor | None, index: BlockIndex, window: ConvWindow) -> None:
    down, across = index.grid
    side = values.shape[-1]
    if values.shape != (index.num_blocks, window.taps, side, side):
        raise UsageError(f"values are [{index.num_blocks}, {window.taps}, B, B] here, not {list(values.shape)}")
    if x.dim() != 4 or x.shape[3] != across * side:
        raise UsageError(f"the input of these blocks has {across * side} channels, not the shape {list(x.shape)}")
    if bias is not None and bias.shape != (down * side,):
        raise UsageError(f"the bias of these blocks is [{down * side}], not {list(bias.shape)}")
    kinds = {t.dtype for t in (x, values, bias) if t is not None}
    if len(kinds) > 1:
        raise UsageError(f"input, values and bias are of one dtype, not {', '.join(sorted(map(str, kinds)))}")
    if min(window.output(x.shape[1], x.shape[2])) < 1:
        raise UsageError(
            f"a kernel of {window.kernel_y} x {window.kernel_x} does not fit an input of {x.shape[1]} x {x.shape[2]} "
            f"padded by {window.padding_y} and {window.padding_x}"
        )


@torch.library.custom_op("sparseift::block_conv2d", mutates_args=())
def _conv2d(
    x: Tensor, values: Tensor, bias: Tensor | None, index: Sequence[Tensor], window: Sequence[int], backend: str
) -> Tensor:
    """[N, OH, OW, R * B]."""
    where, kernel = BlockIndex(*index), ConvWindow(*window)
    _require_shapes(x, values, bias, where, kernel)
    functions = _functions(backend, x, values.shape[-1])
    return functions.conv2d(x.contiguous(), values.contiguous(), where, kernel, bias)


@torch.library.custom_op("sparseift::block_conv2d_input_gradient", mutates_args=())
def _input_gradient(
    grad: Tensor,
    values: Tensor,
    index: Sequence[Tensor],
    window: Sequence[int],
    height: int,
    width: int,
    backend: str,
) -> Tensor:
    """[N, height, width, C * B]."""
    where, kernel = BlockIndex(*index), ConvWindow(*window)
    functions = _functions(backend, grad, values.shape[-1])
    return functions.conv2d_input_gradient(grad.contiguous(), values.contiguous(), where, kernel, (height, width))


@torch.library.custom_op("sparseift::block_conv2d_weight_gradient", mutates_args=())
def _weight_gradient(grad: Tensor, x: Tensor, index: Sequence[Tensor], window: Sequence[int], backend: str) -> Tensor:
    """The stored blocks [n, taps, B, B] of the gradient at the weight."""
    where, kernel = BlockIndex(*index), ConvWindow(*window)
    notify(where.columns, lambda: _dense_weight_gradient(grad, x, kernel))
    functions = _functions(backend, grad, grad.shape[3] // where.grid[0])
    return functions.conv2d_weight_gradient(grad.contiguous(), x.contiguous(), where, kernel)


def _dense_weight_gradient(grad: Tensor, x: Tensor, window: ConvWindow) -> Tensor:
    """The gradient at every weight [out, in, kh, kw], for grad [N, OH, OW, out] and x [N, H, W, in]."""
    shape = (grad.shape[3], x.shape[3], window.kernel_y, window.kernel_x)
    stride: Any = (window.stride_y, window.stride_x)
    padding: Any = (window.padding_y, window.padding_x)
    return conv2d_weight(x.permute(0, 3, 1, 2), shape, grad.permute(0, 3, 1, 2), stride, padding)


@_conv2d.register_fake
def _(
    x: Tensor, values: Tensor, bias: Tensor | None, index: Sequence[Tensor], window: Sequence[int], backend: str
) -> Tensor:
    return x.new_empty(
        x.shape[0], *ConvWindow(*window).output(x.shape[1], x.shape[2]), (index[0].shape[0] - 1) * values.shape[-1]
    )


@_input_gradient.register_fake
def _(
    grad: Tensor,
    values: Tensor,
    index: Sequence[Tensor],
    window: Sequence[int],
    height: int,
    width: int,
    backend: str,
) -> Tensor:
    return grad.new_empty(grad.shape[0], height, width, (index[3].shape[0] - 1) * values.shape[-1])


@_weight_gradient.register_fake
def _(grad: Tensor, x: Tensor, index: Sequence[Tensor], window: Sequence[int], backend: str) -> Tensor:
    side = grad.shape[3] // (index[0].shape[0] - 1)
    return grad.new_empty(index[1].shape[0], ConvWindow(*window).taps, side, side)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, bias, index, ctx.window, ctx.backend = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, values, *index)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, values, *index = ctx.saved_tensors
    needs_x, needs_values, needs_bias = ctx.needs_input_grad[:3]
    ours = torch.ops.sparseift
    size = x.shape[1], x.shape[2]
    return (
        ours.block_conv2d_input_gradient(grad, values, index, ctx.window, *size, ctx.backend) if needs_x else None,
        ours.block_conv2d_weight_gradient(grad, x, index, ctx.window, ctx.backend) if needs_values else None,
        grad.sum((0, 1, 2)) if ctx.has_bias and needs_bias else None,
        [None] * len(index),
        None,
        None,
    )


_conv2d.register_autograd(_backward, setup_context=_setup_context)

_LIBRARY = torch.library.Library("sparseift", "FRAGMENT")


def _register_autocast(device: str, key: str) -> None:
    """As in `ops`: cast to the dtype of the surrounding autocast, as for nn.Conv2d."""

    def cast_and_call(
        x: Tensor, values: Tensor, bias: Tensor | None, index: list[Tensor], window: list[int], backend: str
    ) -> Tensor:
        dtype = torch.get_autocast_dtype(device)
        offset = None if bias is None else bias.to(dtype)
        with torch.autocast(device, enabled=False):
            return torch.ops.sparseift.block_conv2d(x.to(dtype), values.to(dtype), offset, index, window, backend)

    _LIBRARY.impl("block_conv2d", cast_and_call, key)


_register_autocast("cuda", "AutocastCUDA")
_register_autocast("cpu", "AutocastCPU")


def _flops(output: Sequence[int], values: Sequence[int]) -> int:
    """FLOPs (2 a MAC) at the positions of `output` (N, OH, OW, R * B) with the blocks `values` (n, taps, B, B)."""
    return 2 * output[0] * output[1] * output[2] * values[0] * values[1] * values[2] * values[3]


@register_flop_formula(torch.ops.sparseift.block_conv2d)
def _(x_shape: Any, values_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _flops(out_shape, values_shape)


@register_flop_formula(torch.ops.sparseift.block_conv2d_input_gradient)
def _(grad_shape: Any, values_shape: Any, *args: Any, **kwargs: Any) -> int:
    return _flops(grad_shape, values_shape)


@register_flop_formula(torch.ops.sparseift.block_conv2d_weight_gradient)
def _(grad_shape: Any, x_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _flops(grad_shape, out_shape)
