"""The operators `sparseift::cell_linear` and `cell_linear_backward`: linear layers of r x c cells in the C++ kernels.

Each has a fake for torch.compile and a FLOP formula; `cell_linear` has its gradient and autocast. An index that is rewritten in
place (`BlockIndex.move_`) compiles nothing anew. Threads are as many as `torch.get_num_threads()`, and the results
are the same bits for any number of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ...errors import UsageError
from ..index import BlockIndex
from ..ops import flops, register_autocast
from ..watch import notify
from .library import CELLS, address, library

DTYPES = (torch.float32, torch.bfloat16)
"""Of input, values and bias. Products are summed in float32."""


def cell_linear(x: Tensor, values: Tensor, index: BlockIndex, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, for a weight W [R * r, C * c] of which the cells r x c in `index` are stored.

    Args:
        x: [..., C * c], on the CPU, float32 or bfloat16.
        values: [n, r, c], the stored cells by row, then by column; of the dtype of x, or of any under autocast. The
            sizes of cells are `CELLS`; [n] is the same as [n, 1, 1].
        index: where the cells are, `BlockIndex.from_mask(mask, block=1)` of a bool mask [R, C].
        bias: [R * r] or None.

    Returns:
        [..., R * r].

    Raises:
        UsageError: other shapes, dtypes, devices or cells; or the kernels cannot be compiled here.
    """
    cells = values.view(-1, 1, 1) if values.dim() == 1 else values
    y = torch.ops.sparseift.cell_linear(x.reshape(-1, x.shape[-1]), cells, bias, list(index))
    return y.view(*x.shape[:-1], y.shape[-1])


def why_not(cell: tuple[int, int], dtype: torch.dtype) -> str | None:
    """Why these kernels do not take cells (r, c) of `dtype`, whatever the machine; None where they do.

    >>> why_not((4, 4), torch.float32), why_not((2, 4), torch.float32)
    (None, 'CPU kernels have cells of 1x1, 4x1, 4x4, 8x8, 16x16, not 2x4')
    """
    if cell not in CELLS:
        sizes = ", ".join(f"{rows}x{columns}" for rows, columns in CELLS)
        return f"CPU kernels have cells of {sizes}, not {cell[0]}x{cell[1]}"
    return None if dtype in DTYPES else f"CPU kernels compute in float32 or bfloat16, not {dtype}"


def _require_shapes(x: Tensor, values: Tensor, index: BlockIndex, *outputs: Tensor | None) -> None:
    """Refuse what is not x [T, C * c], values [n, r, c] and outputs or bias [.., R * r] of one dtype.

    Raises:
        UsageError: another shape, several dtypes, or cells without a kernel.
    """
    if values.dim() != 3 or len(values) != index.num_blocks:
        raise UsageError(f"values are [{index.num_blocks}, r, c] for this index, not {list(values.shape)}")
    rows, columns = index.grid
    if reason := why_not((values.shape[1], values.shape[2]), x.dtype):
        raise UsageError(reason)
    if x.dim() != 2 or x.shape[1] != columns * values.shape[2]:
        raise UsageError(f"the input of these cells is [tokens, {columns * values.shape[2]}], not {list(x.shape)}")
    for output in outputs:
        if output is not None and output.shape[-1] != rows * values.shape[1]:
            raise UsageError(f"the outputs of these cells are {rows * values.shape[1]}, not {list(output.shape)}")
    kinds = {t.dtype for t in (x, values, *outputs) if t is not None}
    if len(kinds) > 1:
        raise UsageError(f"input, values and bias are of one dtype, not {', '.join(sorted(map(str, kinds)))}")


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous float32 of the same shape."""
    return tensor.float().contiguous()


def _sizes(values: Tensor, index: BlockIndex) -> tuple[int, int, int, int]:
    """(r, c, R, C) for values [n, r, c]."""
    return values.shape[1], values.shape[2], *index.grid


@torch.library.custom_op("sparseift::cell_linear", mutates_args=(), device_types="cpu")
def _linear(x: Tensor, values: Tensor, bias: Tensor | None, index: Sequence[Tensor]) -> Tensor:
    """x W^T + bias [T, R * r]."""
    where = BlockIndex(*index)
    _require_shapes(x, values, where, bias)
    y = x.new_empty(x.shape[0], where.grid[0] * values.shape[1], dtype=torch.float32)
    rows, cells, offset = _plain(x), _plain(values), None if bias is None else _plain(bias)
    library().sparseift_forward(
        *_sizes(values, where),
        *(address(tensor, torch.int32) for tensor in (where.row_offsets, where.columns)),
        *(address(tensor) for tensor in (cells, offset, rows, y)),
        len(x),
        torch.get_num_threads(),
    )
    return y.to(x.dtype)


@torch.library.custom_op("sparseift::cell_linear_backward", mutates_args=(), device_types="cpu")
def _linear_backward(
    grad: Tensor, x: Tensor, values: Tensor, index: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [T, C * c], dvalues [n, r, c], dbias [R * r]); each is [0] where `needs`, of three, says that nothing needs it."""
    where = BlockIndex(*index)
    _require_shapes(x, values, where, grad)
    if needs[1]:
        notify(where.columns, lambda: grad.t() @ x)
    shapes = (x.shape, values.shape, grad.shape[1:])
    made = [
        x.new_empty(shape, dtype=torch.float32) if need else None for shape, need in zip(shapes, needs, strict=True)
    ]
    rows, cells, outputs = _plain(x), _plain(values), _plain(grad)
    library().sparseift_backward(
        *_sizes(values, where),
        *(address(tensor, torch.int32) for tensor in (where.column_offsets, where.column_rows, where.column_order)),
        *(address(tensor) for tensor in (cells, outputs, rows, *made)),
        len(x),
        torch.get_num_threads(),
    )
    dx, dvalues, dbias = (x.new_empty(0) if tensor is None else tensor.to(x.dtype) for tensor in made)
    return dx, dvalues, dbias


@_linear.register_fake
def _(x: Tensor, values: Tensor, bias: Tensor | None, index: Sequence[Tensor]) -> Tensor:
    return x.new_empty(x.shape[0], (index[0].shape[0] - 1) * values.shape[1])


@_linear_backward.register_fake
def _(
    grad: Tensor, x: Tensor, values: Tensor, index: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (x.shape, values.shape, grad.shape[1:])
    dx, dvalues, dbias = (x.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))
    return dx, dvalues, dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, bias, index = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, values, *index)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, values, *index = ctx.saved_tensors
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    needs[2] = needs[2] and ctx.has_bias
    found = torch.ops.sparseift.cell_linear_backward(grad, x, values, index, needs)
    return *(tensor if need else None for tensor, need in zip(found, needs, strict=True)), [None] * len(index)


_linear.register_autograd(_backward, setup_context=_setup_context)
register_autocast("cell_linear")


@register_flop_formula(torch.ops.sparseift.cell_linear)
def _(x_shape: Any, values_shape: Any, *args: Any, **kwargs: Any) -> int:
    return flops(x_shape[0], values_shape)


@register_flop_formula(torch.ops.sparseift.cell_linear_backward)
def _(
    grad_shape: Any, x_shape: Any, values_shape: Any, index: Any, needs: Sequence[bool], *args: Any, **kwargs: Any
) -> int:
    return flops(grad_shape[0], values_shape) * sum(needs[:2])
