"""The operators `sparseift::block_linear`, `block_multiply` and `block_weight_gradient`, as torch.library knows them.

Each has a fake for torch.compile and a FLOP formula; `block_linear` has its gradient and autocast. An operator is opaque to
the compiler: no graph break, whatever backend computes it, and index tensors rewritten in place cause no recompilation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..errors import UsageError
from .index import BlockIndex
from .reference import ACTIVATIONS
from .registry import Functions, LayerRequest, choose
from .watch import notify


def block_linear(
    x: Tensor,
    values: Tensor,
    index: BlockIndex,
    bias: Tensor | None = None,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    """activation(x W^T + bias), for a weight W [R * B, C * B] of which the blocks in `index` are stored.

    Args:
        x: [..., C * B].
        values: [n, B, B], the stored blocks by row, then by column; of the dtype of x, or of any under autocast.
        index: where the blocks are.
        bias: [R * B] or None.
        activation: none, relu, gelu (by erf), gelu_tanh or silu; computed while the product is still in registers.
        backend: a name in `KERNELS`, or auto.

    Returns:
        [..., R * B].
    """
    keep = activation != "none" and torch.is_grad_enabled()
    rows = x.reshape(-1, x.shape[-1])
    y, _ = torch.ops.sparseift.block_linear(rows, values, bias, list(index), activation, keep, backend)
    return y.view(*x.shape[:-1], y.shape[-1])


def functions_for(backend: str, x: Tensor, block: int) -> Functions:
    """The functions of the backend called `backend` for x [..] of its dtype and device, and blocks of `block`."""
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
    dtype = str(x.dtype).removeprefix("torch.")
    return choose(backend, LayerRequest(block, dtype, x.device.type, capability)).functions()


def require_shapes(x: Tensor, values: Tensor, bias: Tensor | None, index: BlockIndex, transposed: bool) -> None:
    """Refuse operands that are not x [T, C * B] ([T, R * B] when `transposed`), values [n, B, B] and bias [R * B].

    Raises:
        UsageError: another shape, or several dtypes.
    """
    down, across = index.grid
    side = values.shape[-1]
    if values.shape != (index.num_blocks, side, side):
        raise UsageError(f"values are [{index.num_blocks}, B, B] for this index, not {list(values.shape)}")
    features = (down if transposed else across) * side
    if x.dim() != 2 or x.shape[1] != features:
        raise UsageError(f"the input of these blocks is [tokens, {features}], not {list(x.shape)}")
    if bias is not None and bias.shape != (down * side,):
        raise UsageError(f"the bias of these blocks is [{down * side}], not {list(bias.shape)}")
    kinds = {t.dtype for t in (x, values, bias) if t is not None}
    if len(kinds) > 1:
        raise UsageError(f"input, values and bias are of one dtype, not {', '.join(sorted(map(str, kinds)))}")


@torch.library.custom_op("sparseift::block_linear", mutates_args=())
def _linear(
    x: Tensor, values: Tensor, bias: Tensor | None, index: Sequence[Tensor], activation: str, keep: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """(y, slope), both [T, R * B]; slope, the derivative of the activation, is [0] unless `keep`."""
    where = BlockIndex(*index)
    require_shapes(x, values, bias, where, transposed=False)
    if activation not in ACTIVATIONS:
        raise UsageError(f"unknown activation {activation!r}", hint=f"known: {', '.join(ACTIVATIONS)}")
    functions = functions_for(backend, x, values.shape[-1])
    return functions.multiply(x.contiguous(), values.contiguous(), where, False, bias, activation, keep)


@torch.library.custom_op("sparseift::block_multiply", mutates_args=())
def _multiply(x: Tensor, values: Tensor, index: Sequence[Tensor], transposed: bool, backend: str) -> Tensor:
    """x W^T [T, R * B], or x W [T, C * B] when `transposed`."""
    where = BlockIndex(*index)
    require_shapes(x, values, None, where, transposed)
    return functions_for(backend, x, values.shape[-1]).multiply(x.contiguous(), values.contiguous(), where, transposed)[
        0
    ]


@torch.library.custom_op("sparseift::block_weight_gradient", mutates_args=())
def _weight_gradient(grad: Tensor, x: Tensor, index: Sequence[Tensor], backend: str) -> Tensor:
    """The stored blocks [n, B, B] of grad^T x."""
    where = BlockIndex(*index)
    side = grad.shape[1] // where.grid[0]
    notify(where.columns, lambda: grad.t() @ x)
    return functions_for(backend, x, side).weight_gradient(grad.contiguous(), x.contiguous(), where)


@_linear.register_fake
def _(
    x: Tensor, values: Tensor, bias: Tensor | None, index: Sequence[Tensor], activation: str, keep: bool, backend: str
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape[0], (index[0].shape[0] - 1) * values.shape[-1])
    return y, torch.empty_like(y) if keep else x.new_empty(0)


@_multiply.register_fake
def _(x: Tensor, values: Tensor, index: Sequence[Tensor], transposed: bool, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], (index[3 if transposed else 0].shape[0] - 1) * values.shape[-1])


@_weight_gradient.register_fake
def _(grad: Tensor, x: Tensor, index: Sequence[Tensor], backend: str) -> Tensor:
    side = grad.shape[1] // (index[0].shape[0] - 1)
    return x.new_empty(index[1].shape[0], side, side)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, values, bias, index, ctx.activation, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, values, output[1], *index)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    x, values, slope, *index = ctx.saved_tensors
    if grad is None:
        return None, None, None, [None] * len(index), None, None, None
    dz: Tensor = grad if ctx.activation == "none" else grad * slope
    needs_x, needs_values, needs_bias = ctx.needs_input_grad[:3]
    ours = torch.ops.sparseift
    return (
        ours.block_multiply(dz, values, index, True, ctx.backend) if needs_x else None,
        ours.block_weight_gradient(dz, x, index, ctx.backend) if needs_values else None,
        dz.sum(0) if ctx.has_bias and needs_bias else None,
        [None] * len(index),
        None,
        None,
        None,
    )


_linear.register_autograd(_backward, setup_context=_setup_context)

_LIBRARY = torch.library.Library("sparseift", "FRAGMENT")


def register_autocast(name: str) -> None:
    """Make `sparseift::name` cast its floating point arguments to the dtype of the surrounding autocast, as nn.Linear does.

    torch's own register_autocast knows one fixed dtype.
    """
    for device, key in (("cuda", "AutocastCUDA"), ("cpu", "AutocastCPU")):
        _LIBRARY.impl(name, partial(_cast_and_call, name, device), key)


def _cast_and_call(name: str, device: str, *arguments: Any) -> Any:
    dtype = torch.get_autocast_dtype(device)
    cast = [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    with torch.autocast(device, enabled=False):
        return getattr(torch.ops.sparseift, name)(*cast)


register_autocast("block_linear")


def flops(tokens: int, values: Sequence[int]) -> int:
    """FLOPs (2 a MAC) of a product of `tokens` rows with the blocks `values` (n, B, B)."""
    return 2 * tokens * values[0] * values[1] * values[2]


@register_flop_formula(torch.ops.sparseift.block_linear)
def _(x_shape: Any, values_shape: Any, *args: Any, **kwargs: Any) -> int:
    return flops(x_shape[0], values_shape)


@register_flop_formula(torch.ops.sparseift.block_multiply)
def _(x_shape: Any, values_shape: Any, *args: Any, **kwargs: Any) -> int:
    return flops(x_shape[0], values_shape)


@register_flop_formula(torch.ops.sparseift.block_weight_gradient)
def _(grad_shape: Any, x_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return flops(grad_shape[0], out_shape)
