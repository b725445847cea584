# pyright: reportMissingParameterType=false, reportMissingImports=false, reportIndexIssue=false, reportInvalidTypeForm=false
"""The functions of a backend in Triton: forward, dX and dW of a block-sparse linear layer.

Two kernels. `_multiply` computes a tile of tokens x B of the output and walks the blocks of one row of blocks (forward) or,
through a permutation, of one column (dX). `_weight_gradient` computes the blocks of one group, which share an operand, and
walks the tokens. Nothing is gathered: the K coordinate of a tile load comes from the index. Every sum is float32 and in a
fixed order, so equal inputs give equal bits. Nothing but the block size, dtype and epilogue is compiled in: not the pattern,
not the number of blocks, not the number of tokens.

On Hopper and newer, tiles are loaded and stored through tensor descriptors (TMA), elsewhere through pointers.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .absent import absent
from .index import BlockIndex, balanced_groups, shares_columns, token_parts

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ModuleNotFoundError:
    triton = tl = TensorDescriptor = absent

OUTSIDE = tl.constexpr(1 << 30)  # a row and a column that no matrix has


@triton.jit
def _load(source, row, column, num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """A tile [ROWS, COLUMNS] of a matrix [num_rows, width] at (row, column); what is outside the matrix is zero."""
    if DESCRIPTORS:
        tile = source.load([row, column])
    else:
        rows = row + tl.arange(0, ROWS)
        columns = column + tl.arange(0, COLUMNS)
        places = rows[:, None].to(tl.int64) * width + columns[None, :]
        tile = tl.load(source + places, mask=(rows < num_rows)[:, None] & (columns < width)[None, :], other=0.0)
    return tile


@triton.jit
def _store(
    target, tile, row, column, num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """Write a tile [ROWS, COLUMNS] to a matrix [num_rows, width] at (row, column); rows past the end are left out."""
    if DESCRIPTORS:
        target.store([row, column], tile.to(target.dtype))
    else:
        rows = row + tl.arange(0, ROWS)
        places = rows[:, None].to(tl.int64) * width + (column + tl.arange(0, COLUMNS))[None, :]
        tl.store(target + places, tile.to(target.dtype.element_ty), mask=(rows < num_rows)[:, None])


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """(the activation of z, its derivative there), in float32; what is not used of it costs nothing."""
    if ACTIVATION == "relu":
        y = tl.maximum(z, 0.0)
        slope = tl.where(z > 0.0, 1.0, 0.0)
    elif ACTIVATION == "silu":
        sigmoid = tl.sigmoid(z)
        y = z * sigmoid
        slope = sigmoid + y * (1.0 - sigmoid)
    elif ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.math.erf(z * 0.7071067811865476))
        y = z * share
        slope = share + 0.3989422804014327 * z * tl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh u) = sigmoid(2 u), u = sqrt(2 / pi) (z + 0.044715 z^3)
        share = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        y = z * share
        slope = share + y * (1.0 - share) * (1.5957691216057308 + 0.21406444881780076 * z * z)
    else:
        y = z
        slope = z * 0.0 + 1.0
    return y, slope


@triton.jit
def _output_tile(
    x,
    values,
    bias,
    y,
    slope,
    sums,
    offsets,
    indices,
    order,
    token,
    line,
    tokens,
    values_rows,
    x_width,
    y_width,
    B: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Tokens `token` to `token + TOKENS` of output block `line`: the sum over the blocks of that row (or column)."""
    STEPS: tl.constexpr = B // DEPTH
    acc = tl.zeros((TOKENS, B), dtype=tl.float32)
    begin = tl.load(offsets + line)
    end = tl.load(offsets + line + 1)
    # A line without blocks runs one step on tiles outside both matrices, which are zero. A loop that always runs needs no
    # branch around it; with one, ptxas finds zeros that meet the accumulators there and makes the tensor cores wait.
    some = begin < end
    first = begin * STEPS
    last = tl.where(some, end * STEPS, first + 1)
    tl.assume(first < last)
    # The index of a step is loaded one step ahead, into a variable that the loop carries. Loaded where it is used, it would
    # count as a level of indirection, for which the compiler halves the number of tiles that are in flight.
    far = tl.load(indices + begin, mask=some, other=OUTSIDE // B) * B
    near = (
        tl.load(order + begin, mask=some, other=OUTSIDE // B) * B if TRANSPOSED else tl.where(some, begin * B, OUTSIDE)
    )
    for step in range(first, last):
        depth = (step % STEPS) * DEPTH
        a = _load(x, token, far + depth, tokens, x_width, TOKENS, DEPTH, DESCRIPTORS)
        if TRANSPOSED:
            w = _load(values, near + depth, 0, values_rows, B, DEPTH, B, DESCRIPTORS)
        else:
            w = _load(values, near, depth, values_rows, B, B, DEPTH, DESCRIPTORS).T
        ahead = (step + 1) // STEPS
        far = tl.load(indices + ahead, mask=step + 1 < last, other=0) * B
        if TRANSPOSED:
            near = tl.load(order + ahead, mask=step + 1 < last, other=0) * B
        else:
            near = ahead * B
        acc = tl.dot(a, w, acc)  # [TOKENS, DEPTH] times [DEPTH, B]
    _finish(acc, bias, y, slope, sums, token, line, tokens, y_width, B, TOKENS, BIAS, ACTIVATION, SLOPE, DESCRIPTORS)


@triton.jit
def _finish(
    acc,
    bias,
    y,
    slope,
    sums,
    token,
    line,
    tokens,
    y_width,
    B: tl.constexpr,
    TOKENS: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """What happens to an output tile before and while it is stored."""
    if BIAS:
        acc += tl.load(bias + line * B + tl.arange(0, B)).to(tl.float32)[None, :]
    if SLOPE == "read" or SLOPE == "sum":
        acc *= _load(slope, token, line * B, tokens, y_width, TOKENS, B, DESCRIPTORS).to(tl.float32)
    if SLOPE == "sum":
        part = (token // TOKENS).to(tl.int64) * y_width + line * B
        tl.store(sums + part + tl.arange(0, B), tl.sum(acc, axis=0))
    acc, derivative = _activate(acc, ACTIVATION)
    if SLOPE == "keep":
        _store(slope, derivative, token, line * B, tokens, y_width, TOKENS, B, DESCRIPTORS)
    _store(y, acc, token, line * B, tokens, y_width, TOKENS, B, DESCRIPTORS)


@triton.jit(do_not_specialize=["tokens", "values_rows", "num_token_tiles", "num_lines"])
def _multiply(
    x,
    values,
    bias,
    y,
    slope,
    sums,
    offsets,
    indices,
    order,
    tokens,
    values_rows,
    x_width,
    y_width,
    num_token_tiles,
    num_lines,
    B: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """y = activation(x W^T + bias), or x W when TRANSPOSED; `order` is where the values of a walk are in `values`.

    SLOPE: the derivative of the activation is kept in `slope`; or y is multiplied by it; or also summed over each tile of tokens.
    """
    # GROUP tiles of tokens take all output blocks before the next: their input stays in L2 while it is used again.
    program = tl.program_id(0)
    first = program // (GROUP * num_lines) * GROUP
    size = tl.minimum(num_token_tiles - first, GROUP)
    inside = program % (GROUP * num_lines)
    _output_tile(
        x,
        values,
        bias,
        y,
        slope,
        sums,
        offsets,
        indices,
        order,
        (first + inside % size) * TOKENS,
        inside // size,
        tokens,
        values_rows,
        x_width,
        y_width,
        B,
        TOKENS,
        DEPTH,
        TRANSPOSED,
        BIAS,
        ACTIVATION,
        SLOPE,
        DESCRIPTORS,
    )


@triton.jit
def _gradient_step(
    grad,
    x,
    acc,
    token,
    row,
    column,
    tokens,
    grad_width,
    x_width,
    shared,
    B: tl.constexpr,
    TOKENS: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """acc + grad^T x for TOKENS tokens of one block; `shared` is the tile that all blocks of the group use."""
    if BY_COLUMN:
        return tl.dot(_load(grad, token, row * B, tokens, grad_width, TOKENS, B, DESCRIPTORS).T, shared, acc)
    return tl.dot(shared.T, _load(x, token, column * B, tokens, x_width, TOKENS, B, DESCRIPTORS), acc)


@triton.jit(do_not_specialize=["tokens", "tokens_each", "num_blocks"])
def _weight_gradient(
    grad,
    x,
    out,
    groups,
    rows,
    columns,
    tokens,
    tokens_each,
    num_blocks,
    grad_width,
    x_width,
    B: tl.constexpr,
    TOKENS: tl.constexpr,
    SIZE: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """SIZE blocks of a group of grad^T x, over part program_id(1) of the tokens; out is [parts, n, B, B]."""
    part = tl.program_id(1)
    entry = groups + tl.program_id(0) * SIZE
    k0 = tl.load(entry)
    if k0 < 0:  # an unused group
        return
    k1, k2, k3 = tl.load(entry + 1 % SIZE), tl.load(entry + 2 % SIZE), tl.load(entry + 3 % SIZE)
    r0, c0 = tl.load(rows + k0), tl.load(columns + k0)
    r1, c1 = tl.load(rows + k1), tl.load(columns + k1)
    r2, c2 = tl.load(rows + k2), tl.load(columns + k2)
    r3, c3 = tl.load(rows + k3), tl.load(columns + k3)
    a0 = tl.zeros((B, B), dtype=tl.float32)
    a1, a2, a3 = a0, a0, a0
    for token in range(part * tokens_each, tl.minimum(tokens, (part + 1) * tokens_each), TOKENS):
        if BY_COLUMN:
            shared = _load(x, token, c0 * B, tokens, x_width, TOKENS, B, DESCRIPTORS)
        else:
            shared = _load(grad, token, r0 * B, tokens, grad_width, TOKENS, B, DESCRIPTORS)
        a0 = _gradient_step(
            grad, x, a0, token, r0, c0, tokens, grad_width, x_width, shared, B, TOKENS, BY_COLUMN, DESCRIPTORS
        )
        if SIZE > 1:
            a1 = _gradient_step(
                grad, x, a1, token, r1, c1, tokens, grad_width, x_width, shared, B, TOKENS, BY_COLUMN, DESCRIPTORS
            )
        if SIZE > 2:
            a2 = _gradient_step(
                grad, x, a2, token, r2, c2, tokens, grad_width, x_width, shared, B, TOKENS, BY_COLUMN, DESCRIPTORS
            )
            a3 = _gradient_step(
                grad, x, a3, token, r3, c3, tokens, grad_width, x_width, shared, B, TOKENS, BY_COLUMN, DESCRIPTORS
            )
    inside = tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
    out += part.to(tl.int64) * num_blocks * B * B
    # A group that is not full repeats its first block: the same values are written to the same place again.
    tl.store(out + k0.to(tl.int64) * B * B + inside, a0.to(out.dtype.element_ty))
    if SIZE > 1:
        tl.store(out + k1.to(tl.int64) * B * B + inside, a1.to(out.dtype.element_ty))
    if SIZE > 2:
        tl.store(out + k2.to(tl.int64) * B * B + inside, a2.to(out.dtype.element_ty))
        tl.store(out + k3.to(tl.int64) * B * B + inside, a3.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["num_parts"])
def _sum_parts(parts, out, size, num_parts, CHUNK: tl.constexpr):
    """out [size] = the sum of parts [num_parts, size], from first to last."""
    places = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    total = tl.load(parts + places)
    for _ in range(1, num_parts):
        parts += size
        total += tl.load(parts + places)
    tl.store(out + places, total.to(out.dtype.element_ty))


@dataclass(frozen=True)
class MultiplyTile:
    """How `_multiply` is cut: tokens a program, K a step, tiles of tokens that share L2, warps, stages."""

    tokens: int
    depth: int
    group: int
    warps: int
    stages: int


@dataclass(frozen=True)
class GradientTile:
    """How `_weight_gradient` is cut: tokens a step, warps, stages."""

    tokens: int
    warps: int
    stages: int


def multiply_tile(block: int, itemsize: int, hopper: bool) -> MultiplyTile:
    """The fastest cut that was measured (tests/benchmarks/kernels.md), for `itemsize` bytes an element."""
    if not hopper or itemsize == 4:
        return MultiplyTile(128, 32, 8, 4, 3)
    return {
        128: MultiplyTile(128, 64, 8, 4, 3),
        64: MultiplyTile(128, 64, 8, 4, 4),
        32: MultiplyTile(256, 32, 8, 4, 4),
    }[block]


def gradient_tile(block: int, itemsize: int, hopper: bool) -> GradientTile:
    """As `multiply_tile`, for the weight gradient."""
    warps = 8 if block == 128 else 4
    if not hopper or itemsize == 4:
        return GradientTile(32, warps, 3)
    return GradientTile(64, warps, 4 if block == 128 else 3)


@lru_cache(maxsize=1)
def _hopper_kernels() -> ModuleType | None:
    """The kernels for Hopper, or None where this triton is older than they are."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        return None
    return import_module(".hopper", __package__)


@dataclass(frozen=True)
class _Device:
    """A device: does it have tensor descriptors, its number of multiprocessors, is it Hopper."""

    descriptors: bool
    processors: int
    hopper: bool


@lru_cache(maxsize=16)
def _device(device: torch.device) -> _Device:
    if device.type != "cuda":
        return _Device(True, 4, False)
    properties = torch.cuda.get_device_properties(device)
    return _Device(properties.major >= 9, properties.multi_processor_count, properties.major == 9)


def _specialised(device: _Device, side: int, dtype: torch.dtype) -> ModuleType | None:
    """The module of kernels for exactly this device, block and dtype, or None."""
    fits = device.hopper and side in (128, 64) and dtype in (torch.bfloat16, torch.float16)
    return _hopper_kernels() if fits else None


def _operand(matrix: Tensor, rows: int, columns: int, descriptors: bool) -> Any:
    """`matrix` [.., ..] as the kernels take it: a descriptor of its tiles [rows, columns], or itself."""
    return TensorDescriptor.from_tensor(matrix, [rows, columns]) if descriptors else matrix


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where its memory does not begin at 16 bytes, as descriptors need; any shape."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@dataclass(frozen=True)
class Epilogue:
    """What happens to an output tile: y = activation(product + bias), with its derivative to `slope` [T, width of y].

    `gradient`: y = product times `slope`, which is read instead of written; `sums` [parts, width of y] float32 get sums of y
    over tokens.
    """

    bias: Tensor | None = None
    activation: str = "none"
    slope: Tensor | None = None
    gradient: bool = False
    sums: Tensor | None = None

    @property
    def use_of_slope(self) -> str:
        """SLOPE of the kernels: none, keep, read, or sum (and read)."""
        if self.slope is None:
            return "none"
        return "keep" if not self.gradient else "read" if self.sums is None else "sum"


def multiply(
    x: Tensor,
    values: Tensor,
    index: BlockIndex,
    transposed: bool = False,
    bias: Tensor | None = None,
    activation: str = "none",
    keep: bool = False,
    *,
    tile: MultiplyTile | None = None,
    descriptors: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """y = activation(x W^T + bias) for x [T, C * B], or x W for x [T, R * B] when `transposed`; both contiguous.

    `tile` and `descriptors` replace what is chosen for the device.

    Returns:
        y [T, R * B] ([T, C * B] transposed), and the derivative of the activation, of the same shape, if `keep`; otherwise [0].
    """
    y = x.new_empty(len(x), index.grid[1 if transposed else 0] * values.shape[-1])
    slope = torch.empty_like(y) if keep else None
    if len(x):
        tile, descriptors, kernels = _cut(x, values.shape[-1], tile, descriptors)
        epilogue = Epilogue(bias, activation, slope)
        _launch_multiply(x, values, y, _walk(index, transposed), transposed, epilogue, tile, descriptors, kernels)
    return y, x.new_empty(0) if slope is None else slope


def gradient_before(
    grad: Tensor,
    values: Tensor,
    index: BlockIndex,
    slope: Tensor,
    with_sum: bool = True,
    *,
    tile: MultiplyTile | None = None,
    descriptors: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """(dz, its sum): dz = (grad W) times slope [T, C * B], for grad [T, R * B]; all contiguous.

    `tile` and `descriptors` replace what is chosen for the device.

    Returns:
        dz [T, C * B], and its sum over the tokens [C * B] float32 if `with_sum`, otherwise [0].
    """
    dz = torch.empty_like(slope)
    sums = grad.new_zeros(0, dtype=torch.float32)
    if not len(grad):
        return dz, sums.new_zeros(slope.shape[1]) if with_sum else sums
    tile, descriptors, kernels = _cut(grad, values.shape[-1], tile, descriptors)
    if with_sum:
        parts = kernels.parts_of_sums(len(grad)) if kernels else triton.cdiv(len(grad), tile.tokens)
        sums = sums.new_empty(parts, slope.shape[1])
    epilogue = Epilogue(slope=_aligned(slope), gradient=True, sums=sums if with_sum else None)
    _launch_multiply(grad, values, dz, _walk(index, True), True, epilogue, tile, descriptors, kernels)
    return dz, sums.sum(0) if with_sum else sums


def _cut(
    x: Tensor, side: int, tile: MultiplyTile | None, descriptors: bool | None
) -> tuple[MultiplyTile, bool, ModuleType | None]:
    """How products of x [T, ..] with blocks of `side` are cut, with descriptors or not, and the special kernels or None."""
    device = _device(x.device)
    kernels = _specialised(device, side, x.dtype) if tile is None and descriptors is None else None
    tile = tile or multiply_tile(side, x.element_size(), device.descriptors)
    return tile, device.descriptors if descriptors is None else descriptors, kernels


def _walk(index: BlockIndex, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks by line: offsets, other coordinate, position in `values` (`hopper.multiply` says more)."""
    if transposed:
        return index.column_offsets, index.column_rows, index.column_order
    return index.row_offsets, index.columns, index.columns


def _launch_multiply(
    x: Tensor,
    values: Tensor,
    y: Tensor,
    walk: tuple[Tensor, Tensor, Tensor],
    transposed: bool,
    epilogue: Epilogue,
    tile: MultiplyTile,
    descriptors: bool,
    kernels: ModuleType | None,
) -> None:
    """Write y [T, ..] from x [T, ..] and values [n, B, B], by the special kernels where given."""
    x, values = _aligned(x), _aligned(values)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        if kernels:
            kernels.multiply(x, values, y, walk, transposed, epilogue, _device(x.device).processors)
        else:
            _launch_triton(x, values, y, walk, transposed, epilogue, tile, descriptors)


def _launch_triton(
    x: Tensor,
    values: Tensor,
    y: Tensor,
    walk: tuple[Tensor, Tensor, Tensor],
    transposed: bool,
    epilogue: Epilogue,
    tile: MultiplyTile,
    descriptors: bool,
) -> None:
    """As `_launch_multiply`, by `_multiply`."""
    side, lines = values.shape[-1], len(walk[0]) - 1
    depth = min(tile.depth, side)
    flat = values.view(-1, side)
    num_token_tiles = triton.cdiv(len(x), tile.tokens)
    target, slope = _operand(y, tile.tokens, side, descriptors), epilogue.slope
    _multiply[(num_token_tiles * lines,)](
        _operand(x, tile.tokens, depth, descriptors),
        _operand(flat, *((depth, side) if transposed else (side, depth)), descriptors),
        y if epilogue.bias is None else epilogue.bias,
        target,
        target if slope is None else _operand(slope, tile.tokens, side, descriptors),
        y if epilogue.sums is None else epilogue.sums,
        *walk,
        len(x),
        len(flat),
        x.shape[1],
        y.shape[1],
        num_token_tiles,
        lines,
        B=side,
        TOKENS=tile.tokens,
        DEPTH=depth,
        GROUP=tile.group,
        TRANSPOSED=transposed,
        BIAS=epilogue.bias is not None,
        ACTIVATION=epilogue.activation,
        SLOPE=epilogue.use_of_slope,
        DESCRIPTORS=descriptors,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _summed(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum [n, B, B] of `parts` [parts, n, B, B], as `dtype`."""
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    _sum_parts[(out.numel() // 1024,)](parts, out, out.numel(), len(parts), CHUNK=1024)
    return out


def weight_gradient(
    grad: Tensor,
    x: Tensor,
    index: BlockIndex,
    *,
    tile: GradientTile | None = None,
    parts: int | None = None,
    descriptors: bool | None = None,
) -> Tensor:
    """[n, B, B]: the stored blocks of grad^T x, for contiguous grad [T, R * B] and x [T, C * B].

    `tile`, `parts` and `descriptors` replace what is chosen for the device.
    """
    (down, across), tokens = index.grid, len(x)
    side = grad.shape[1] // down
    count, size = index.num_blocks, index.groups.shape[1]
    if not tokens:
        return x.new_zeros(count, side, side)
    device = _device(x.device)
    grad, x = _aligned(grad), _aligned(x)
    by_column = shares_columns(down, across, count, size)
    kernels = _specialised(device, side, x.dtype) if size == 8 and tile is None and descriptors is None else None
    tile = tile or gradient_tile(side, x.element_size(), device.descriptors)
    descriptors = device.descriptors if descriptors is None else descriptors
    pieces = size if kernels else min(size, 4 if side == 32 else 2)  # what one program computes of a group
    programs = device.processors * (1 if kernels or side == 128 else 3)
    expected = balanced_groups(across if by_column else down, count, size) * size // pieces
    parts = parts or token_parts(expected, tokens, tile.tokens, programs)
    each = triton.cdiv(triton.cdiv(tokens, parts), tile.tokens) * tile.tokens
    out = x.new_empty(parts, count, side, side, dtype=x.dtype if parts == 1 else torch.float32)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        if kernels:
            kernels.weight_gradient(grad, x, out, index, each=each, by_column=by_column, programs=programs)
        else:
            _weight_gradient[(index.groups.numel() // pieces, parts)](
                _operand(grad, tile.tokens, side, descriptors),
                _operand(x, tile.tokens, side, descriptors),
                out,
                index.groups,
                index.rows,
                index.columns,
                tokens,
                each,
                count,
                grad.shape[1],
                x.shape[1],
                B=side,
                TOKENS=tile.tokens,
                SIZE=pieces,
                BY_COLUMN=by_column,
                DESCRIPTORS=descriptors,
                num_warps=tile.warps,
                num_stages=tile.stages,
            )
        return out[0] if parts == 1 else _summed(out, x.dtype)
