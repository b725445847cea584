"""`sparseift::block_feedforward`: two block-sparse layers with an activation between them, as one operator.

What it saves is passes over the widest tensor of a transformer, [tokens, hidden]: the activation is applied while the product
is in registers, and so is its derivative in the backward pass, where the bias gradient of the first layer is summed as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .index import BlockIndex
from .ops import flops, functions_for, register_autocast, require_shapes

_FIELDS = len(BlockIndex._fields)


@torch.library.custom_op("sparseift::block_feedforward", mutates_args=())
def _feedforward(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    index: Sequence[Tensor],
    activation: str,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, hidden, slope): y [T, out] = W_down hidden + bias, hidden = activation(W_up x + bias), for x [T, in].

    `index` is the fields of both indices, one after the other. hidden and slope, the derivative of the activation, are
    [0] unless `keep`.
    """
    first, second = BlockIndex(*index[:_FIELDS]), BlockIndex(*index[_FIELDS:])
    require_shapes(x, up, up_bias, first, transposed=False)
    functions = functions_for(backend, x, up.shape[-1])
    hidden, slope = functions.multiply(x.contiguous(), up.contiguous(), first, False, up_bias, activation, keep)
    require_shapes(hidden, down, down_bias, second, transposed=False)
    functions = functions_for(backend, x, down.shape[-1])
    y, _ = functions.multiply(hidden, down.contiguous(), second, False, down_bias)
    return y, hidden if keep else x.new_empty(0), slope


@_feedforward.register_fake
def _(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    index: Sequence[Tensor],
    activation: str,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, outputs = (index[0].shape[0] - 1) * up.shape[-1], (index[_FIELDS].shape[0] - 1) * down.shape[-1]
    kept = [x.new_empty(x.shape[0], hidden) if keep else x.new_empty(0) for _ in range(2)]
    return x.new_empty(x.shape[0], outputs), kept[0], kept[1]


@torch.library.custom_op("sparseift::block_gradient_before", mutates_args=())
def _gradient_before(
    grad: Tensor,
    values: Tensor,
    slope: Tensor,
    index: Sequence[Tensor],
    with_sum: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(dz, its sum over tokens, of the dtype of slope): dz [T, C * B] = (grad W) times slope."""
    where = BlockIndex(*index)
    require_shapes(grad, values, None, where, transposed=True)
    functions = functions_for(backend, grad, values.shape[-1])
    grad, values, slope = grad.contiguous(), values.contiguous(), slope.contiguous()
    if hasattr(functions, "gradient_before"):
        dz, total = functions.gradient_before(grad, values, where, slope, with_sum)
    else:
        dz = functions.multiply(grad, values, where, True)[0] * slope
        total = dz.sum(0) if with_sum else slope.new_empty(0)
    return dz, total.to(slope.dtype)


@_gradient_before.register_fake
def _(
    grad: Tensor,
    values: Tensor,
    slope: Tensor,
    index: Sequence[Tensor],
    with_sum: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(slope), slope.new_empty(slope.shape[1] if with_sum else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, up, up_bias, down, down_bias, index, _, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.biases = up_bias is not None, down_bias is not None
    ctx.save_for_backward(x, up, down, output[1], output[2], *index)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    x, up, down, hidden, slope, *index = ctx.saved_tensors
    first, second = index[:_FIELDS], index[_FIELDS:]
    nothing = [None] * len(index), None, None, None
    if grad is None:
        return None, None, None, None, None, *nothing
    needs_x, needs_up, needs_up_bias, needs_down, needs_down_bias = ctx.needs_input_grad[:5]
    ours = torch.ops.sparseift
    has_up_bias, has_down_bias = ctx.biases
    sums = has_up_bias and needs_up_bias
    dz, total = ours.block_gradient_before(grad, down, slope, second, sums, ctx.backend)
    return (
        ours.block_multiply(dz, up, first, True, ctx.backend) if needs_x else None,
        ours.block_weight_gradient(dz, x, first, ctx.backend) if needs_up else None,
        total if sums else None,
        ours.block_weight_gradient(grad, hidden, second, ctx.backend) if needs_down else None,
        grad.sum(0) if has_down_bias and needs_down_bias else None,
        *nothing,
    )


_feedforward.register_autograd(_backward, setup_context=_setup_context)
register_autocast("block_feedforward")


@register_flop_formula(torch.ops.sparseift.block_feedforward)
def _(x_shape: Any, up_shape: Any, up_bias_shape: Any, down_shape: Any, *args: Any, **kwargs: Any) -> int:
    return flops(x_shape[0], up_shape) + flops(x_shape[0], down_shape)


@register_flop_formula(torch.ops.sparseift.block_gradient_before)
def _(grad_shape: Any, values_shape: Any, *args: Any, **kwargs: Any) -> int:
    return flops(grad_shape[0], values_shape)
