# pyright: reportMissingParameterType=false, reportMissingImports=false, reportIndexIssue=false, reportInvalidTypeForm=false
"""The kernels of `conv_blocks` in Gluon, for Hopper, 16-bit numbers and many images; the programs are like those of `hopper`.

Forward and dX: a program computes one pixel of 256 images for one row of blocks, and a step is one tap of one block. dW: three
groups of warps compute the three rows of taps of a block, and what a step loads serves all nine taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import conv_blocks
from .absent import absent
from .hopper import _ELEMENT, _barriers, _descriptor, _halves, _write
from .index import BlockIndex
from .reference import ConvWindow

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )

    # The same arithmetic for both languages.
    _taps = gluon.jit(conv_blocks._taps.fn)  # pyright: ignore[reportFunctionMemberAccess]
    _next_position = gluon.jit(conv_blocks._next_position.fn)  # pyright: ignore[reportFunctionMemberAccess]
except ModuleNotFoundError:
    gluon = gl = fence_async_shared = mbarrier = tma = warpgroup_mma = warpgroup_mma_wait = absent
    _taps = _next_position = absent

IMAGES, DEPTH = 128, 64  # images that four warps compute, and the K of one step
GRADIENT_IMAGES, GRADIENT_PIXELS = 32, 2  # of the weight gradient: images, and pixels of a row of each, of one step
OUTSIDE = gl.constexpr(1 << 30)  # a row that no matrix has


@gluon.jit
def _place(offsets, counts, y_size, x_size, WINDOW: gl.constexpr, CUT: gl.constexpr):
    """Of this program's output tile: line, row, column, image, its first block and last + 1, has it any, `_taps` along y and x.

    A tile with no block or no tap has one block and one tap, of images that are not.
    """
    _, num_tiles, num_lines = counts
    first = gl.program_id(0) // (CUT[2] * num_lines) * CUT[2]
    size = gl.minimum(num_tiles - first, CUT[2])
    inside = gl.program_id(0) % (CUT[2] * num_lines)
    line = inside // size
    pixel = first + inside % size
    column = pixel % y_size[1]
    row = pixel // y_size[1] % y_size[0]
    image = pixel // y_size[1] // y_size[0] * (2 * CUT[1])
    begin, end = gl.load(offsets + line), gl.load(offsets + line + 1)
    tap_y, count_y, from_y = _taps(row, x_size[0], WINDOW[0], WINDOW[2], WINDOW[4], CUT[3], True)
    tap_x, count_x, from_x = _taps(column, x_size[1], WINDOW[1], WINDOW[3], WINDOW[5], CUT[3], True)
    some = (end - begin) * count_y * count_x > 0
    end, count_y, count_x = gl.where(some, end, begin + 1), gl.where(some, count_y, 1), gl.where(some, count_x, 1)
    return line, row, column, image, begin, end, some, (tap_y, count_y, from_y), (tap_x, count_x, from_x)


@gluon.jit
def _load_tiles(operands, counts, y_size, x_size, WINDOW: gl.constexpr, CUT: gl.constexpr, STAGES: gl.constexpr):
    """The warp that loads."""
    x, values, offsets, indices, order, left, right, weights, full, empty = operands
    B: gl.constexpr = CUT[0]
    IMAGES: gl.constexpr = CUT[1]
    TRANSPOSED: gl.constexpr = CUT[3]
    DEPTH: gl.constexpr = CUT[4]
    STEP_Y: gl.constexpr = WINDOW[2] if TRANSPOSED else 1
    STEP_X: gl.constexpr = WINDOW[3] if TRANSPOSED else 1
    BACK: gl.constexpr = -1 if TRANSPOSED else 1
    turn = 0
    _, _, _, image, begin, end, some, along_y, along_x = _place(offsets, counts, y_size, x_size, WINDOW, CUT)
    image = gl.where(some, image, OUTSIDE)
    far = gl.load(indices + begin, mask=some, other=0)
    near = gl.load(order + begin, mask=some, other=0) if TRANSPOSED else begin
    for k in range(begin, end):
        # An index load takes longer than a step: that of the next block is begun ahead of its use.
        any_ahead = some & (k + 1 < end)
        far_next = gl.load(indices + k + 1, mask=any_ahead, other=0)
        near_next = gl.load(order + k + 1, mask=any_ahead, other=0) if TRANSPOSED else k + 1
        for i in range(along_y[1]):
            row = (along_y[2] + i * BACK) * x_size[1]
            tap_row = (near * WINDOW[0] + along_y[0] + i * STEP_Y) * WINDOW[1]
            for j in range(along_x[1]):
                channel = (row + along_x[2] + j * BACK) * (x_size[2] * 32) + far * B
                tap = gl.where(some, (tap_row + along_x[0] + j * STEP_X) * B, OUTSIDE)
                for part in gl.static_range(B // DEPTH):
                    stage = turn % STAGES
                    mbarrier.wait(empty.index(stage), ((turn // STAGES) & 1) ^ 1)
                    ready = full.index(stage)
                    mbarrier.expect(ready, (2 * IMAGES + B) * DEPTH * x.dtype.primitive_bitwidth // 8)
                    depth = channel + part * DEPTH
                    tma.async_copy_global_to_shared(x, [image, depth], ready, left.index(stage))
                    tma.async_copy_global_to_shared(x, [image + IMAGES, depth], ready, right.index(stage))
                    at = [tap + part * DEPTH, 0] if TRANSPOSED else [tap, part * DEPTH]
                    tma.async_copy_global_to_shared(values, at, ready, weights.index(stage))
                    turn += 1
        far, near = far_next, near_next


@gluon.jit
def _compute(
    operands, counts, y_size, x_size, HALF: gl.constexpr, WINDOW: gl.constexpr, CUT: gl.constexpr, STAGES: gl.constexpr
):
    """Four warps that compute one half of the images of each output tile."""
    y, bias, offsets, mine, weights, stage_y, full, empty = operands
    B: gl.constexpr = CUT[0]
    IMAGES: gl.constexpr = CUT[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, B, 16])
    line, row, column, image, begin, end, _, along_y, along_x = _place(offsets, counts, y_size, x_size, WINDOW, CUT)
    acc = gl.zeros((IMAGES, B), gl.float32, layout)
    steps = (end - begin) * along_y[1] * along_x[1] * (B // CUT[4])
    gl.assume(steps > 0)
    for turn in range(steps):
        stage = turn % STAGES
        mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
        weight = weights.index(stage) if CUT[3] else weights.index(stage).permute([1, 0])
        acc = warpgroup_mma(mine.index(stage), weight, acc, is_async=True)
        # At most this product is still running: the stage of the one before is free.
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES), count=1, pred=turn > 0)
    acc = warpgroup_mma_wait(0, deps=[acc])
    if bias is not None:
        places = gl.arange(0, B, layout=gl.SliceLayout(0, layout))
        acc += gl.load(bias + line * B + places).to(gl.float32).expand_dims(0)
    channel = (row * y_size[1] + column) * (y_size[2] * 32) + line * B
    low, high = _halves(acc)
    _write(y, low, stage_y, image + HALF * IMAGES, channel)
    _write(y, high, stage_y, image + HALF * IMAGES, channel + B // 2)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["counts", "y_size", "x_size"])
def convolve_kernel(
    x,
    values,
    bias,
    y,
    walk,
    counts,
    y_size,
    x_size,
    WINDOW: gl.constexpr,
    CUT: gl.constexpr,
    STAGES: gl.constexpr,
):
    """As `conv_blocks._convolve`; CUT is B, images of a half, tiles that share L2, whether it is transposed, K of a step."""
    IMAGES: gl.constexpr = CUT[1]
    DEPTH: gl.constexpr = CUT[4]
    left = gl.allocate_shared_memory(x.dtype, [STAGES, IMAGES, DEPTH], x.layout)
    right = gl.allocate_shared_memory(x.dtype, [STAGES, IMAGES, DEPTH], x.layout)
    weights = gl.allocate_shared_memory(
        x.dtype, [STAGES, values.block_type.shape[0], values.block_type.shape[1]], values.layout
    )
    stage_left = gl.allocate_shared_memory(x.dtype, y.block_type.shape, y.layout)
    stage_right = gl.allocate_shared_memory(x.dtype, y.block_type.shape, y.layout)
    full, empty = _barriers(STAGES)
    offsets, indices, order = walk
    one = (y, bias, offsets, left, weights, stage_left, full, empty)
    other = (y, bias, offsets, right, weights, stage_right, full, empty)
    loads = (x, values, offsets, indices, order, left, right, weights, full, empty)
    gl.warp_specialize(
        [
            (_compute, (one, counts, y_size, x_size, 0, WINDOW, CUT, STAGES)),
            (_compute, (other, counts, y_size, x_size, 1, WINDOW, CUT, STAGES)),
            (_load_tiles, (loads, counts, y_size, x_size, WINDOW, CUT, STAGES)),
        ],
        [4, 1],
        [200, 56],
    )


@gluon.jit
def _load_positions(operands, counts, y_size, x_size, WINDOW: gl.constexpr, CUT: gl.constexpr, STAGES: gl.constexpr):
    """The warp that loads: of each step, PIXELS tiles of the gradient and, for each row of taps, all that they meet."""
    grad, x, rows, columns, grads, inputs, full, empty = operands
    num_images, steps_each, num_items, num_blocks = counts
    B: gl.constexpr = CUT[0]
    IMAGES: gl.constexpr = CUT[1]
    PIXELS: gl.constexpr = CUT[2]
    ACROSS: gl.constexpr = (PIXELS - 1) * WINDOW[3] + 3
    row_tiles = gl.cdiv(y_size[1], PIXELS)
    each = y_size[0] * row_tiles
    turn = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        to_channel = gl.load(rows + item % num_blocks) * B
        from_channel = gl.load(columns + item % num_blocks) * B
        begin = item // num_blocks * steps_each
        image, row, column = begin // each * IMAGES, begin % each // row_tiles, begin % row_tiles * PIXELS
        for _ in range(begin, gl.minimum(begin + steps_each, each * gl.cdiv(num_images, IMAGES))):
            stage = turn % STAGES
            mbarrier.wait(empty.index(stage), ((turn // STAGES) & 1) ^ 1)
            ready = full.index(stage)
            mbarrier.expect(ready, (PIXELS + 3 * ACROSS) * IMAGES * B * x.dtype.primitive_bitwidth // 8)
            for p in gl.static_range(PIXELS):
                channel = (row * y_size[1] + column + p) * (y_size[2] * 32) + to_channel
                read = gl.where(column + p < y_size[1], image, OUTSIDE)
                tma.async_copy_global_to_shared(grad, [read, channel], ready, grads.index(stage * PIXELS + p))
            for dy in gl.static_range(3):
                y = row * WINDOW[2] + dy - WINDOW[4]
                for j in gl.static_range(ACROSS):
                    at = column * WINDOW[3] + j - WINDOW[5]
                    inside = (y >= 0) & (y < x_size[0]) & (at >= 0) & (at < x_size[1])
                    channel = (y * x_size[1] + at) * (x_size[2] * 32) + from_channel
                    tile = inputs.index((stage * 3 + dy) * ACROSS + j)
                    tma.async_copy_global_to_shared(x, [gl.where(inside, image, OUTSIDE), channel], ready, tile)
            turn += 1
            image, row, column = _next_position(image, row, column, 0, y_size[0], y_size[1], IMAGES, PIXELS)


@gluon.jit
def _sum_positions(
    operands, counts, y_size, DY: gl.constexpr, WINDOW: gl.constexpr, CUT: gl.constexpr, STAGES: gl.constexpr
):
    """Four warps that compute the three taps of row DY of each block."""
    out, grads, inputs, full, empty = operands
    num_images, steps_each, num_items, num_blocks = counts
    B: gl.constexpr = CUT[0]
    PIXELS: gl.constexpr = CUT[2]
    ACROSS: gl.constexpr = (PIXELS - 1) * WINDOW[3] + 3
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, B, 16])
    places = gl.arange(0, B, layout=gl.SliceLayout(1, layout)).expand_dims(1) * B
    places += gl.arange(0, B, layout=gl.SliceLayout(0, layout)).expand_dims(0)
    total = y_size[0] * gl.cdiv(y_size[1], PIXELS) * gl.cdiv(num_images, CUT[1])
    turn = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        begin = item // num_blocks * steps_each
        a0 = gl.zeros((B, B), gl.float32, layout)
        a1 = gl.zeros((B, B), gl.float32, layout)
        a2 = gl.zeros((B, B), gl.float32, layout)
        steps = gl.minimum(begin + steps_each, total) - begin
        for step in range(steps):
            stage = turn % STAGES
            mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
            for p in gl.static_range(PIXELS):
                left = grads.index(stage * PIXELS + p).permute([1, 0])
                first = (stage * 3 + DY) * ACROSS + p * WINDOW[3]
                a0 = warpgroup_mma(left, inputs.index(first), a0, is_async=True)
                a1 = warpgroup_mma(left, inputs.index(first + 1), a1, is_async=True)
                a2 = warpgroup_mma(left, inputs.index(first + 2), a2, is_async=True)
            # At most the products of this step are still running: the stage of the one before is free.
            a0, a1, a2 = warpgroup_mma_wait(3 * PIXELS, deps=[a0, a1, a2])
            mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES), count=1, pred=step > 0)
            turn += 1
        a0, a1, a2 = warpgroup_mma_wait(0, deps=[a0, a1, a2])
        mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES), count=1, pred=steps > 0)
        target = out + (gl.cast(item, gl.int64) * 9 + DY * 3) * (B * B)
        gl.store(target + places, a0.to(out.dtype.element_ty))
        gl.store(target + B * B + places, a1.to(out.dtype.element_ty))
        gl.store(target + 2 * B * B + places, a2.to(out.dtype.element_ty))


@gluon.jit(do_not_specialize=["counts", "y_size", "x_size"])
def weight_gradient_kernel(
    grad,
    x,
    out,
    rows,
    columns,
    counts,
    y_size,
    x_size,
    WINDOW: gl.constexpr,
    CUT: gl.constexpr,
    STAGES: gl.constexpr,
):
    """out [parts, n, 9, B, B]; CUT is B, and the images and the pixels of a row of each that a step takes."""
    ACROSS: gl.constexpr = (CUT[2] - 1) * WINDOW[3] + 3
    grads = gl.allocate_shared_memory(grad.dtype, [STAGES * CUT[2], CUT[1], CUT[0]], grad.layout)
    inputs = gl.allocate_shared_memory(x.dtype, [STAGES * 3 * ACROSS, CUT[1], CUT[0]], x.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=3)
    fence_async_shared()
    sums = (out, grads, inputs, full, empty)
    loads = (grad, x, rows, columns, grads, inputs, full, empty)
    gl.warp_specialize(
        [
            (_sum_positions, (sums, counts, y_size, 0, WINDOW, CUT, STAGES)),
            (_sum_positions, (sums, counts, y_size, 1, WINDOW, CUT, STAGES)),
            (_sum_positions, (sums, counts, y_size, 2, WINDOW, CUT, STAGES)),
            (_load_positions, (loads, counts, y_size, x_size, WINDOW, CUT, STAGES)),
        ],
        [4, 4, 1],
        [152, 152, 56],
    )


def convolve(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    y: Tensor,
    walk: tuple[Tensor, Tensor, Tensor],
    window: ConvWindow,
    transposed: bool,
) -> None:
    """Write y [N, height, width, lines * B] from x [N, H, W, ..] and values [n, taps, B, B]; `walk` as for `hopper.multiply`."""
    side, lines = values.shape[-1], len(walk[0]) - 1
    count, height, width, channels = y.shape
    tiles = -(-count // (2 * IMAGES)) * height * width
    convolve_kernel[(tiles * lines,)](
        _descriptor(x.view(count, -1), IMAGES, DEPTH),
        _descriptor(values.view(-1, side), *((DEPTH, side) if transposed else (side, DEPTH))),
        bias,
        _descriptor(y.view(count, -1), IMAGES, side // 2),
        walk,
        (count, tiles, lines),
        (height, width, channels // 32),
        (*x.shape[1:3], x.shape[3] // 32),
        WINDOW=tuple(window),
        CUT=(side, IMAGES, 2, transposed, DEPTH),
        STAGES={128: 4, 64: 5}[side],
        num_warps=4,
    )


def weight_gradient(
    grad: Tensor, x: Tensor, index: BlockIndex, window: ConvWindow, parts: int | None, programs: int
) -> Tensor:
    """[parts, n, 9, B, B]: the stored blocks of the gradient over each part of the positions; in float32 if there are parts."""
    images, height, width, channels = grad.shape
    side, count = channels // index.grid[0], index.num_blocks
    steps = -(-images // GRADIENT_IMAGES) * height * -(-width // GRADIENT_PIXELS)
    parts = parts or conv_blocks.gradient_parts(count, steps, programs, 16)
    out = x.new_empty(parts, count, 9, side, side, dtype=x.dtype if parts == 1 else torch.float32)
    weight_gradient_kernel[(min(programs, count * parts),)](
        _descriptor(grad.view(images, -1), GRADIENT_IMAGES, side),
        _descriptor(x.view(images, -1), GRADIENT_IMAGES, side),
        out,
        index.rows,
        index.columns,
        (images, -(-steps // parts), count * parts, count),
        (height, width, channels // 32),
        (*x.shape[1:3], x.shape[3] // 32),
        WINDOW=tuple(window),
        CUT=(side, GRADIENT_IMAGES, GRADIENT_PIXELS),
        STAGES=4 if window.stride_x == 1 else 3,
        num_warps=4,
    )
    return out


def fits(block: int, dtype: torch.dtype, images: int) -> bool:
    """Is `convolve` the kernel for blocks of this size, this dtype and so many images, on Hopper?"""
    return block in (128, 64) and dtype in _ELEMENT and _filled(images, 2 * IMAGES)


def fits_gradient(block: int, dtype: torch.dtype, images: int, window: ConvWindow) -> bool:
    """As `fits`, for `weight_gradient` and this window."""
    three = window[:2] == (3, 3) and window.stride_x in (1, 2)
    return block == 64 and three and dtype in _ELEMENT and _filled(images, GRADIENT_IMAGES)


def _filled(images: int, size: int) -> bool:
    """Do tiles of `size` images leave few places unused?"""
    return images >= 0.7 * size * -(-images // size)
