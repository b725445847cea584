# pyright: reportMissingParameterType=false, reportMissingImports=false, reportIndexIssue=false, reportInvalidTypeForm=false
"""The functions of a backend in Triton for convolutions: forward, dX and dW as implicit matrix products.

A tile of positions is one pixel of many images, not many pixels of one image. Then taps, strides and borders are arithmetic
on scalars: a tap outside the image is not computed, dX of a stride visits the taps that reach a pixel and no others, and a
tile is a rectangle of the matrix [N, H * W * C] that a channels_last tensor is, so that tensor descriptors (TMA) load it as
in `blocks`. Where there are few images, a tile is some pixels of a row of each, gathered through pointers.

Sums are float32 and in a fixed order. Compiled in are the block size, dtype and window: not the pattern, nor the images.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from .absent import absent
from .blocks import OUTSIDE, _aligned, _Device, _device, _hopper_kernels, _load, _operand, _summed
from .index import BlockIndex
from .reference import ConvWindow

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:
    triton = tl = absent


@triton.jit
def _load_positions(
    source,
    image,
    y,
    x,
    channel,
    num_images,
    size,
    IMAGES: tl.constexpr,
    PIXELS: tl.constexpr,
    STEP: tl.constexpr,
    CHANNELS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """[PIXELS * IMAGES, CHANNELS] of [N, H, W, C]: pixels (y, x), (y, x + STEP).. of IMAGES images; outside the row zero.

    A size, here and below, is (H, W, C / 32): that rows of C elements are aligned is what a compiler must see.
    """
    height, width, channels = size[0], size[1], size[2] * 32
    if DESCRIPTORS:
        tile = source.load([image, (y * width + x) * channels + channel])
    else:
        rows = tl.arange(0, PIXELS * IMAGES)
        images, pixels = image + rows % IMAGES, x + rows // IMAGES * STEP
        places = (images.to(tl.int64) * height + y) * (width * channels) + pixels * channels + channel
        inside = (images < num_images) & (pixels >= 0) & (pixels < width)
        tile = tl.load(source + places[:, None] + tl.arange(0, CHANNELS)[None, :], mask=inside[:, None], other=0.0)
    return tile


@triton.jit
def _store_positions(
    target,
    tile,
    image,
    y,
    x,
    channel,
    num_images,
    size,
    IMAGES: tl.constexpr,
    PIXELS: tl.constexpr,
    STEP: tl.constexpr,
    CHANNELS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Write a tile [PIXELS * IMAGES, CHANNELS] where `_load_positions` loads it; what is outside is left out."""
    height, width, channels = size[0], size[1], size[2] * 32
    if DESCRIPTORS:
        target.store([image, (y * width + x) * channels + channel], tile.to(target.dtype))
    else:
        rows = tl.arange(0, PIXELS * IMAGES)
        images, pixels = image + rows % IMAGES, x + rows // IMAGES * STEP
        places = (images.to(tl.int64) * height + y) * (width * channels) + pixels * channels + channel
        inside = (images < num_images) & (pixels < width)
        places = places[:, None] + tl.arange(0, CHANNELS)[None, :]
        tl.store(target + places, tile.to(target.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _output_place(
    y_size, num_tiles, num_lines, GROUP: tl.constexpr, SPREAD: tl.constexpr, IMAGES: tl.constexpr, PIXELS: tl.constexpr
):
    """(line, row, first pixel, first image) of the tile of this program."""
    # GROUP tiles of positions take all output blocks before the next: their input stays in L2 while it is used again.
    program = tl.program_id(0)
    first = program // (GROUP * num_lines) * GROUP
    size = tl.minimum(num_tiles - first, GROUP)
    inside = program % (GROUP * num_lines)
    tile = first + inside % size
    height, width, _ = y_size
    row_tiles = tl.cdiv(width, SPREAD * PIXELS) * SPREAD
    place = tile % row_tiles
    rows = tile // row_tiles
    return inside // size, rows % height, place // SPREAD * (SPREAD * PIXELS) + place % SPREAD, rows // height * IMAGES


@triton.jit
def _taps(
    place,
    size,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """(first tap, number of taps, what the first one reads) along one axis, at the output or, TRANSPOSED, input `place`.

    Taps that read outside [0, size) are counted unless INSIDE.
    """
    if TRANSPOSED:  # an input is read by the outputs (place + PADDING - tap) / STRIDE
        far = place + PADDING
        first = far % STRIDE
        last = KERNEL
        if INSIDE:
            first = tl.maximum(far - (size - 1) * STRIDE, first)
            last = tl.minimum(far + 1, KERNEL)
        count = (last - first + STRIDE - 1) // STRIDE
        source = (far - first) // STRIDE
    else:
        first = tl.maximum(PADDING - place * STRIDE, 0) if INSIDE else 0
        source = place * STRIDE + first - PADDING
        count = tl.minimum(KERNEL - first, size - source) if INSIDE else KERNEL
    return first, tl.maximum(count, 0), source


@triton.jit
def _next_tap(block, at_y, at_x, count_y, count_x, move):
    """Where the step after this one is, if `move` is 1: the next tap along x, then along y, then the next block."""
    at_x += move
    at_y += tl.where(at_x == count_x, 1, 0)
    at_x = tl.where(at_x == count_x, 0, at_x)
    return block + tl.where(at_y == count_y, 1, 0), tl.where(at_y == count_y, 0, at_y), at_x


@triton.jit(do_not_specialize=["counts", "y_size", "x_size"])
def _convolve(
    x,
    values,
    bias,
    y,
    walk,
    counts,
    y_size,
    x_size,
    WINDOW: tl.constexpr,
    B: tl.constexpr,
    IMAGES: tl.constexpr,
    PIXELS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """y [N, OH, OW, R * B] from x [N, H, W, C * B]; TRANSPOSED, the gradient at the input from the one at the output."""
    num_images, values_rows, num_tiles, num_lines = counts
    STEPS: tl.constexpr = B // DEPTH
    STEP_Y: tl.constexpr = WINDOW[2] if TRANSPOSED else 1  # between two taps; below, between what they read
    STEP_X: tl.constexpr = WINDOW[3] if TRANSPOSED else 1
    BACK: tl.constexpr = -1 if TRANSPOSED else 1
    REACH: tl.constexpr = 1 if TRANSPOSED else WINDOW[3]
    # The pixels of a tile are so far apart that the same taps reach all of them.
    line, row, column, image = _output_place(y_size, num_tiles, num_lines, GROUP, STEP_X, IMAGES, PIXELS)
    tap_y, count_y, from_y = _taps(row, x_size[0], WINDOW[0], WINDOW[2], WINDOW[4], TRANSPOSED, True)
    tap_x, count_x, from_x = _taps(column, x_size[1], WINDOW[1], WINDOW[3], WINDOW[5], TRANSPOSED, PIXELS == 1)
    offsets, indices, order = walk
    k, end = tl.load(offsets + line), tl.load(offsets + line + 1)
    steps = (end - k) * count_y * count_x * STEPS
    # As in `blocks._output_tile`: one step on nothing where there is nothing, and the index of a step one step ahead.
    some = steps > 0
    steps = tl.maximum(steps, 1)
    tl.assume(steps > 0)
    ROWS: tl.constexpr = WINDOW[0] * WINDOW[1] * B  # of values, in a block
    read = tl.where(some, image, OUTSIDE)
    far = tl.load(indices + k, mask=some, other=0) * B
    near = tl.where(some, tl.load(order + k, mask=some, other=0) * ROWS if TRANSPOSED else k * ROWS, OUTSIDE)
    at_y, at_x = 0, 0
    acc = tl.zeros((PIXELS * IMAGES, B), dtype=tl.float32)
    for step in range(steps):
        depth = (step % STEPS) * DEPTH
        pixel_y, pixel_x = from_y + at_y * BACK, from_x + at_x * BACK
        a = _load_positions(
            x, read, pixel_y, pixel_x, far + depth, num_images, x_size, IMAGES, PIXELS, REACH, DEPTH, DESCRIPTORS
        )
        tap = near + ((tap_y + at_y * STEP_Y) * WINDOW[1] + tap_x + at_x * STEP_X) * B
        if TRANSPOSED:
            w = _load(values, tap + depth, 0, values_rows, B, DEPTH, B, DESCRIPTORS)
        else:
            w = _load(values, tap, depth, values_rows, B, B, DEPTH, DESCRIPTORS).T
        k, at_y, at_x = _next_tap(k, at_y, at_x, count_y, count_x, (step + 1) // STEPS - step // STEPS)
        far = tl.load(indices + k, mask=k < end, other=0) * B
        near = (tl.load(order + k, mask=k < end, other=0) if TRANSPOSED else k) * ROWS
        acc = tl.dot(a, w, acc)  # [PIXELS * IMAGES, DEPTH] times [DEPTH, B]
    if bias is not None:
        acc += tl.load(bias + line * B + tl.arange(0, B)).to(tl.float32)[None, :]
    _store_positions(y, acc, image, row, column, line * B, num_images, y_size, IMAGES, PIXELS, STEP_X, B, DESCRIPTORS)


@triton.jit
def _reading_rows(dy, y_height, x_height, STRIDE: tl.constexpr, PADDING: tl.constexpr):
    """The rows, from the first to before the second, of the output that read a row of the input at tap dy."""
    first = tl.maximum(PADDING - dy + STRIDE - 1, 0) // STRIDE
    return first, tl.minimum(tl.maximum(x_height + PADDING - dy + STRIDE - 1, 0) // STRIDE, y_height)


@triton.jit
def _next_position(image, row, column, low, high, width, IMAGES: tl.constexpr, PIXELS: tl.constexpr):
    """The position after this one: along the row, then down to row `high`, then in the next images."""
    column += PIXELS
    row += tl.where(column >= width, 1, 0)
    column = tl.where(column >= width, 0, column)
    return image + tl.where(row == high, IMAGES, 0), tl.where(row == high, low, row), column


@triton.jit(do_not_specialize=["counts", "y_size", "x_size"])
def _weight_gradient(
    grad,
    x,
    out,
    rows,
    columns,
    counts,
    y_size,
    x_size,
    WINDOW: tl.constexpr,
    B: tl.constexpr,
    IMAGES: tl.constexpr,
    PIXELS: tl.constexpr,
    TAPS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """TAPS neighbouring taps of one block, which share the tile of grad, over one part; out is [parts, n, taps, B, B]."""
    num_images, steps_each, num_blocks = counts
    GROUPS: tl.constexpr = (WINDOW[1] + TAPS - 1) // TAPS
    block = tl.program_id(0) // (WINDOW[0] * GROUPS)
    dy = tl.program_id(0) // GROUPS % WINDOW[0]
    dx = tl.program_id(0) % GROUPS * TAPS
    part = tl.program_id(1)
    to_channel = tl.load(rows + block) * B
    from_channel = tl.load(columns + block) * B
    low, high = _reading_rows(dy, y_size[0], x_size[0], WINDOW[2], WINDOW[4])
    row_tiles = tl.cdiv(y_size[1], PIXELS)
    each = tl.maximum(high - low, 0) * row_tiles  # steps of one tile of images
    begin = part * steps_each
    end = tl.minimum(begin + steps_each, each * tl.cdiv(num_images, IMAGES))
    each = tl.maximum(each, 1)
    image, row, column = begin // each * IMAGES, low + begin % each // row_tiles, begin % each % row_tiles * PIXELS
    a0 = tl.zeros((B, B), dtype=tl.float32)
    a1, a2 = a0, a0
    for _ in range(begin, end):
        left = _load_positions(
            grad, image, row, column, to_channel, num_images, y_size, IMAGES, PIXELS, 1, B, DESCRIPTORS
        ).T
        pixel_y, pixel_x = row * WINDOW[2] + dy - WINDOW[4], column * WINDOW[3] + dx - WINDOW[5]
        for tap in tl.static_range(TAPS):
            # A descriptor knows no borders between pixels: what is outside the row is taken from an image that is not.
            at = pixel_x + tap
            read = tl.where((at >= 0) & (at < x_size[1]), image, OUTSIDE) if DESCRIPTORS else image
            right = _load_positions(
                x, read, pixel_y, at, from_channel, num_images, x_size, IMAGES, PIXELS, WINDOW[3], B, DESCRIPTORS
            )
            if tap == 0:
                a0 = tl.dot(left, right, a0)
            elif tap == 1:
                a1 = tl.dot(left, right, a1)
            else:
                a2 = tl.dot(left, right, a2)
        image, row, column = _next_position(image, row, column, low, high, y_size[1], IMAGES, PIXELS)
    tap = (part.to(tl.int64) * num_blocks + block) * (WINDOW[0] * WINDOW[1]) + dy * WINDOW[1] + dx
    out += tap * (B * B) + tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
    tl.store(out, a0.to(out.dtype.element_ty))
    if TAPS > 1 and dx + 1 < WINDOW[1]:
        tl.store(out + B * B, a1.to(out.dtype.element_ty))
    if TAPS > 2 and dx + 2 < WINDOW[1]:
        tl.store(out + 2 * B * B, a2.to(out.dtype.element_ty))


@dataclass(frozen=True)
class ConvTile:
    """How `_convolve` is cut: positions a program, K a step, tiles of positions that share L2, warps, stages."""

    positions: int
    depth: int
    group: int
    warps: int
    stages: int


@dataclass(frozen=True)
class ConvGradientTile:
    """How `_weight_gradient` is cut: positions a step, taps a program, warps, stages."""

    positions: int
    taps: int
    warps: int
    stages: int


def conv_tile(block: int, itemsize: int, hopper: bool) -> ConvTile:
    """The fastest cut that was measured (tests/benchmarks/kernels.md), for `itemsize` bytes an element."""
    if not hopper or itemsize == 4:
        return ConvTile(128, 32, 8, 4, 3)
    return ConvTile(128, min(64, block), 8, 4, 4)


def conv_gradient_tile(block: int, itemsize: int, hopper: bool) -> ConvGradientTile:
    """As `conv_tile`, for the weight gradient."""
    taps, warps = (1, 8) if block == 128 else (3, 4)
    if not hopper or itemsize == 4:
        return ConvGradientTile(32, taps, warps, 2)
    return ConvGradientTile(64, taps, warps, 3)


def images_in_tile(positions: int, images: int, width: int) -> int:
    """How many images a tile of `positions` takes from; it takes positions / this of a row of `width` pixels of each.

    One pixel of each where that leaves few places unused, as it does where there are many images.

    >>> images_in_tile(128, images=256, width=14), images_in_tile(128, images=200, width=14), images_in_tile(128, 1, 14)
    (128, 128, 8)
    """

    def used(size: int) -> float:
        pixels = positions // size
        return images * width / (-(-images // size) * size * -(-width // pixels) * pixels)

    if used(positions) >= 0.7:
        return positions
    return max((size for size in (8, 16, 32, 64, 128) if size <= positions), key=lambda size: (used(size), size))


def gradient_parts(programs: int, steps: int, places: int, overhead: int) -> int:
    """Into how many parts `steps` are cut, so that programs x parts fill `places` well.

    Each part costs about as much time as `overhead` steps.

    >>> gradient_parts(programs=192, steps=196, places=264, overhead=4), gradient_parts(12, 3136, 264, 4)
    (4, 22)
    """

    def cost(parts: int) -> float:
        waves = -(-programs * parts // places)
        return waves * (-(-steps // parts) + overhead)

    return min(range(1, max(1, min(64, steps // 8)) + 1), key=cost)


def _specialised(device: _Device) -> ModuleType | None:
    """The module of kernels for exactly this device, or None."""
    return import_module(".conv_hopper", __package__) if device.hopper and _hopper_kernels() else None


def _convolution(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    y: Tensor,
    walk: tuple[Tensor, Tensor, Tensor],
    window: ConvWindow,
    transposed: bool,
    tile: ConvTile | None,
    descriptors: bool | None,
) -> Tensor:
    """Run `_convolve` on x and y, both [N, height, width, channels]; `walk` is what `hopper.multiply` says."""
    if not y.numel() or not x.numel():
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    device, side, lines = _device(x.device), values.shape[-1], len(walk[0]) - 1
    x, values = _aligned(x), _aligned(values)
    kernels = _specialised(device) if tile is None and descriptors is None else None
    if kernels and kernels.fits(side, x.dtype, len(x)):
        with torch.cuda.device(x.device):
            kernels.convolve(x, values, bias, y, walk, window, transposed)
        return y
    tile = tile or conv_tile(side, x.element_size(), device.descriptors)
    count, height, width, channels = y.shape
    images = images_in_tile(tile.positions, count, width)
    pixels = tile.positions // images
    descriptors = (device.descriptors if descriptors is None else descriptors) and pixels == 1
    spread = window.stride_x if transposed else 1
    tiles = triton.cdiv(count, images) * height * triton.cdiv(width, spread * pixels) * spread
    depth = min(tile.depth, side)
    flat = values.view(-1, side)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _convolve[(tiles * lines,)](
            _operand(x.view(count, -1), images, depth, descriptors),
            _operand(flat, *((depth, side) if transposed else (side, depth)), descriptors),
            bias,
            _operand(y.view(count, -1), images, side, descriptors),
            walk,
            (count, len(flat), tiles, lines),
            (height, width, channels // 32),
            (*x.shape[1:3], x.shape[3] // 32),
            WINDOW=tuple(window),
            B=side,
            IMAGES=images,
            PIXELS=pixels,
            DEPTH=depth,
            GROUP=tile.group,
            TRANSPOSED=transposed,
            DESCRIPTORS=descriptors,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return y


def conv2d(
    x: Tensor,
    values: Tensor,
    index: BlockIndex,
    window: ConvWindow,
    bias: Tensor | None = None,
    *,
    tile: ConvTile | None = None,
    descriptors: bool | None = None,
) -> Tensor:
    """The convolution [N, OH, OW, R * B] of contiguous x [N, H, W, C * B] with values [n, taps, B, B].

    `tile` and `descriptors` replace what is chosen for the device.
    """
    y = x.new_empty(len(x), *window.output(x.shape[1], x.shape[2]), index.grid[0] * values.shape[-1])
    walk = (index.row_offsets, index.columns, index.columns)
    return _convolution(x, values, bias, y, walk, window, False, tile, descriptors)


def conv2d_input_gradient(
    grad: Tensor,
    values: Tensor,
    index: BlockIndex,
    window: ConvWindow,
    size: tuple[int, int],
    *,
    tile: ConvTile | None = None,
    descriptors: bool | None = None,
) -> Tensor:
    """The gradient [N, H, W, C * B] at an input of `size` (H, W), for contiguous grad [N, OH, OW, R * B].

    `tile` and `descriptors` replace what is chosen for the device.
    """
    dx = grad.new_empty(len(grad), *size, index.grid[1] * values.shape[-1])
    walk = (index.column_offsets, index.column_rows, index.column_order)
    return _convolution(grad, values, None, dx, walk, window, True, tile, descriptors)


def conv2d_weight_gradient(
    grad: Tensor,
    x: Tensor,
    index: BlockIndex,
    window: ConvWindow,
    *,
    tile: ConvGradientTile | None = None,
    parts: int | None = None,
    descriptors: bool | None = None,
) -> Tensor:
    """[n, taps, B, B]: the stored blocks of the gradient at the weight, for grad [N, OH, OW, R * B], x [N, H, W, C * B].

    Both are contiguous. `tile`, `parts` and `descriptors` replace what is chosen for the device.
    """
    images, height, width, channels = grad.shape
    side, count = channels // index.grid[0], index.num_blocks
    if not images:
        return x.new_zeros(count, window.taps, side, side)
    device = _device(x.device)
    grad, x = _aligned(grad), _aligned(x)
    kernels = _specialised(device) if tile is None and descriptors is None else None
    if kernels and kernels.fits_gradient(side, x.dtype, images, window):
        with torch.cuda.device(x.device):
            out = kernels.weight_gradient(grad, x, index, window, parts, device.processors)
            return out[0] if len(out) == 1 else _summed(out, x.dtype)
    tile = tile or conv_gradient_tile(side, x.element_size(), device.descriptors)
    together = images_in_tile(tile.positions, images, width)
    pixels = tile.positions // together
    descriptors = (device.descriptors if descriptors is None else descriptors) and pixels == 1
    taps = min(tile.taps, window.kernel_x)
    programs = count * window.kernel_y * triton.cdiv(window.kernel_x, taps)
    steps = triton.cdiv(images, together) * height * triton.cdiv(width, pixels)
    parts = parts or gradient_parts(programs, steps, device.processors * (8 // tile.warps), 4)
    out = x.new_empty(parts, count, window.taps, side, side, dtype=x.dtype if parts == 1 else torch.float32)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _weight_gradient[(programs, parts)](
            _operand(grad.view(images, -1), together, side, descriptors),
            _operand(x.view(images, -1), together, side, descriptors),
            out,
            index.rows,
            index.columns,
            (images, triton.cdiv(steps, parts), count),
            (height, width, channels // 32),
            (*x.shape[1:3], x.shape[3] // 32),
            WINDOW=tuple(window),
            B=side,
            IMAGES=together,
            PIXELS=pixels,
            TAPS=taps,
            DESCRIPTORS=descriptors,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        return out[0] if parts == 1 else _summed(out, x.dtype)
