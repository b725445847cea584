# pyright: reportMissingParameterType=false, reportMissingImports=false, reportIndexIssue=false, reportInvalidTypeForm=false
"""The kernels of `blocks` in Gluon, for Hopper and 16-bit numbers: persistent programs whose warps have different tasks.

One warp loads tiles (TMA) into a ring of shared memory, across the borders of output tiles, so that the ring is full when an
output tile begins. Two groups of four warps each compute half of the tokens of the tile and share the tile of weights; while
one writes its output, the other goes on computing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .absent import absent
from .index import BlockIndex

if TYPE_CHECKING:
    from .blocks import Epilogue

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
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ModuleNotFoundError:
    gluon = gl = fence_async_shared = mbarrier = tma = warpgroup_mma = warpgroup_mma_wait = TensorDescriptor = absent

TOKENS, DEPTH = 128, 64  # tokens that four warps compute, and the K of one step
GRADIENT_TOKENS = 32  # tokens, which are the K of the weight gradient, of one step
_ELEMENT = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
OUTSIDE = gl.constexpr(1 << 30)  # a row and a column that no matrix has


@gluon.jit
def _barriers(STAGES: gl.constexpr):
    """(full, empty): a stage is full when its loads have arrived, and empty when both groups of warps have used it."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    return full, empty


@gluon.jit
def _place(tile, offsets, num_token_tiles, num_lines, GROUP: gl.constexpr, TOKENS: gl.constexpr):
    """(first token, line, position of its first block, of its last + 1) of an output tile."""
    tile = gl.minimum(tile, num_token_tiles * num_lines - 1)  # the tile after the last is asked for, and not computed
    first = tile // (GROUP * num_lines) * GROUP
    size = gl.minimum(num_token_tiles - first, GROUP)
    inside = tile % (GROUP * num_lines)
    line = inside // size
    return (first + inside % size) * (2 * TOKENS), line, gl.load(offsets + line), gl.load(offsets + line + 1)


@gluon.jit
def _load_tiles(
    operands,
    B: gl.constexpr,
    TOKENS: gl.constexpr,
    DEPTH: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    SLOPE: gl.constexpr,
):
    """The warp that loads; where slopes are read, their tile follows the operands of an output tile through the same ring."""
    x, values, slope, offsets, indices, order, left, right, weights, full, empty, num_token_tiles, num_lines = operands
    STEPS: gl.constexpr = B // DEPTH
    turn = 0
    token, line, begin, end = _place(gl.program_id(0), offsets, num_token_tiles, num_lines, GROUP, TOKENS)
    far = gl.load(indices + begin, mask=begin < end, other=OUTSIDE // B)
    near = gl.load(order + begin, mask=begin < end, other=OUTSIDE // B) if TRANSPOSED else begin
    for tile in range(gl.program_id(0), num_token_tiles * num_lines, gl.num_programs(0)):
        # Index loads take longer than a step: those of the next tile, and of the next block, are begun ahead of their use.
        token_next, line_next, begin_next, end_next = _place(
            tile + gl.num_programs(0), offsets, num_token_tiles, num_lines, GROUP, TOKENS
        )
        if begin == end:
            near = OUTSIDE // B
        for k in range(begin, gl.maximum(end, begin + 1)):
            last = k + 1 >= end
            ahead = gl.where(last, begin_next, k + 1)
            some = ahead < gl.where(last, end_next, end)
            far_next = gl.load(indices + ahead, mask=some, other=OUTSIDE // B)
            near_next = gl.load(order + ahead, mask=some, other=OUTSIDE // B) if TRANSPOSED else ahead
            for part in gl.static_range(STEPS):
                stage = turn % STAGES
                mbarrier.wait(empty.index(stage), ((turn // STAGES) & 1) ^ 1)
                ready = full.index(stage)
                mbarrier.expect(ready, (2 * TOKENS + B) * DEPTH * x.dtype.primitive_bitwidth // 8)
                tma.async_copy_global_to_shared(x, [token, far * B + part * DEPTH], ready, left.index(stage))
                tma.async_copy_global_to_shared(x, [token + TOKENS, far * B + part * DEPTH], ready, right.index(stage))
                if TRANSPOSED:
                    tma.async_copy_global_to_shared(values, [near * B + part * DEPTH, 0], ready, weights.index(stage))
                else:
                    tma.async_copy_global_to_shared(values, [near * B, part * DEPTH], ready, weights.index(stage))
                turn += 1
            far, near = far_next, near_next
        if SLOPE == "read" or SLOPE == "sum":
            for part in gl.static_range(STEPS):
                stage = turn % STAGES
                mbarrier.wait(empty.index(stage), ((turn // STAGES) & 1) ^ 1)
                ready = full.index(stage)
                mbarrier.expect(ready, 2 * TOKENS * DEPTH * x.dtype.primitive_bitwidth // 8)
                column = line * B + part * DEPTH
                tma.async_copy_global_to_shared(slope, [token, column], ready, left.index(stage))
                tma.async_copy_global_to_shared(slope, [token + TOKENS, column], ready, right.index(stage))
                turn += 1
        token, line, begin, end = token_next, line_next, begin_next, end_next


@gluon.jit
def _tanh(u):
    """tanh by one instruction, off by 5e-4 of its value at most: less than rounding to 16 bits costs."""
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _activate(z, ACTIVATION: gl.constexpr):
    """(the activation of z, its derivative there), in float32; what is not used of it costs nothing."""
    if ACTIVATION == "relu":
        y = gl.maximum(z, 0.0)
        slope = gl.where(z > 0.0, 1.0, 0.0)
    elif ACTIVATION == "silu":
        sigmoid = 0.5 + 0.5 * _tanh(0.5 * z)
        y = z * sigmoid
        slope = sigmoid + y * (1.0 - sigmoid)
    elif ACTIVATION == "gelu":
        share = 0.5 + 0.5 * gl.erf(z * 0.7071067811865476)
        y = z * share
        slope = share + 0.3989422804014327 * z * gl.exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_tanh":
        square = z * z
        t = _tanh(z * (0.7978845608028654 + 0.035677408136300125 * square))
        share = 0.5 + 0.5 * t
        y = z * share
        slope = share + (1.0 - t * t) * z * (0.3989422804014327 + 0.053516112204450186 * square)
    else:
        y = z
        slope = z * 0.0 + 1.0
    return y, slope


@gluon.jit
def _write(target, tile, stage, token, column):
    """Store a tile through shared memory; the copy to device memory goes on after this returns."""
    tma.store_wait(0)
    stage.store(tile.to(target.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(target, [token, column], stage)


@gluon.jit
def _halves(tile):
    """The left and the right half of a tile [rows, columns], each in registers that hold it already."""
    ROWS: gl.constexpr = tile.shape[0]
    COLUMNS: gl.constexpr = tile.shape[1] // 2
    return gl.split(tile.reshape([ROWS, 2, COLUMNS]).permute([0, 2, 1]))


@gluon.jit
def _write_half(y, slope, tile, stage, token, column, ACTIVATION: gl.constexpr, SLOPE: gl.constexpr):
    """Store the activation of a tile, and its derivative where that is kept."""
    tile, derivative = _activate(tile, ACTIVATION)
    if SLOPE == "keep":
        _write(slope, derivative, stage, token, column)
    _write(y, tile, stage, token, column)


@gluon.jit
def _scaled(grad, slope, sums, place, width, SLOPE: gl.constexpr):
    """grad times slope; where that is summed, sums over the rows of each warp go to four rows of `sums` from `place` on."""
    grad = grad * slope
    if SLOPE == "sum":
        # Rows of four warps are 2 x 4 x 16: added up inside of a warp, they need neither shared memory nor a barrier.
        COLUMNS: gl.constexpr = grad.shape[1]
        parts = gl.sum(gl.sum(grad.reshape([grad.shape[0] // 64, 4, 16, COLUMNS]), axis=2), axis=0)
        layout: gl.constexpr = parts.type.layout
        warps = gl.arange(0, 4, layout=gl.SliceLayout(1, layout)).expand_dims(1)
        columns = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout)).expand_dims(0)
        gl.store(sums + place + warps * width + columns, parts)
    return grad


@gluon.jit
def _take(source, turn, full, empty, STAGES: gl.constexpr, layout: gl.constexpr):
    """The tile of a stage, as float32 in registers; the stage is free after that."""
    stage = turn % STAGES
    mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
    tile = source.index(stage).load(layout)
    mbarrier.arrive(empty.index(stage), count=1)
    return tile.to(gl.float32)


@gluon.jit
def _compute(
    operands,
    HALF: gl.constexpr,
    B: gl.constexpr,
    TOKENS: gl.constexpr,
    DEPTH: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    SLOPE: gl.constexpr,
):
    """Four warps that compute one half of the tokens of each output tile."""
    epilogue, offsets, mine, weights, stage_y, full, empty, num_token_tiles, num_lines = operands
    y, slope, bias, sums, width = epilogue
    STEPS: gl.constexpr = B // DEPTH
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, B, 16])
    turn = 0
    token, line, begin, end = _place(gl.program_id(0), offsets, num_token_tiles, num_lines, GROUP, TOKENS)
    for tile in range(gl.program_id(0), num_token_tiles * num_lines, gl.num_programs(0)):
        token_next, line_next, begin_next, end_next = _place(
            tile + gl.num_programs(0), offsets, num_token_tiles, num_lines, GROUP, TOKENS
        )
        acc = gl.zeros((TOKENS, B), gl.float32, layout)
        steps = gl.maximum(end - begin, 1) * STEPS
        gl.assume(steps > 0)
        for step in range(steps):
            stage = turn % STAGES
            mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
            weight = weights.index(stage) if TRANSPOSED else weights.index(stage).permute([1, 0])
            acc = warpgroup_mma(mine.index(stage), weight, acc, is_async=True)
            # At most this product is still running: the stage of the one before is free.
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES), count=1, pred=step > 0)
            turn += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES), count=1)
        if BIAS:
            places = gl.arange(0, B, layout=gl.SliceLayout(0, layout))
            acc += gl.load(bias + line * B + places).to(gl.float32).expand_dims(0)
        mine_begins, column = token + HALF * TOKENS, line * B
        low, high = _halves(acc)
        half: gl.constexpr = low.type.layout
        place = (mine_begins // TOKENS * 4).to(gl.int64) * width + column
        if SLOPE == "read" or SLOPE == "sum":
            if STEPS == 1:
                acc = _scaled(acc, _take(mine, turn, full, empty, STAGES, layout), sums, place, width, SLOPE)
                low, high = _halves(acc)
            else:
                low = _scaled(low, _take(mine, turn, full, empty, STAGES, half), sums, place, width, SLOPE)
        _write_half(y, slope, low, stage_y, mine_begins, column, ACTIVATION, SLOPE)
        if SLOPE == "read" or SLOPE == "sum":
            if STEPS == 2:
                factors = _take(mine, turn + 1, full, empty, STAGES, half)
                high = _scaled(high, factors, sums, place + DEPTH, width, SLOPE)
            turn += STEPS
        _write_half(y, slope, high, stage_y, mine_begins, column + B // 2, ACTIVATION, SLOPE)
        token, line, begin, end = token_next, line_next, begin_next, end_next
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_token_tiles", "num_lines"])
def multiply_kernel(
    x,
    values,
    bias,
    y,
    slope,
    sums,
    offsets,
    indices,
    order,
    width,
    num_token_tiles,
    num_lines,
    B: gl.constexpr,
    TOKENS: gl.constexpr,
    DEPTH: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    SLOPE: gl.constexpr,
):
    """As `blocks._multiply`, over 2 * TOKENS tokens a tile; `sums` has a row for every warp of every TOKENS tokens."""
    left = gl.allocate_shared_memory(x.dtype, [STAGES, TOKENS, DEPTH], x.layout)
    right = gl.allocate_shared_memory(x.dtype, [STAGES, TOKENS, DEPTH], x.layout)
    weights = gl.allocate_shared_memory(
        x.dtype, [STAGES, values.block_type.shape[0], values.block_type.shape[1]], values.layout
    )
    stage_left = gl.allocate_shared_memory(x.dtype, y.block_type.shape, y.layout)
    stage_right = gl.allocate_shared_memory(x.dtype, y.block_type.shape, y.layout)
    full, empty = _barriers(STAGES)
    epilogue = (y, slope, bias, sums, width)
    one = (epilogue, offsets, left, weights, stage_left, full, empty, num_token_tiles, num_lines)
    other = (epilogue, offsets, right, weights, stage_right, full, empty, num_token_tiles, num_lines)
    loads = (x, values, slope, offsets, indices, order, left, right, weights, full, empty, num_token_tiles, num_lines)
    gl.warp_specialize(
        [
            (_compute, (one, 0, B, TOKENS, DEPTH, GROUP, STAGES, TRANSPOSED, BIAS, ACTIVATION, SLOPE)),
            (_compute, (other, 1, B, TOKENS, DEPTH, GROUP, STAGES, TRANSPOSED, BIAS, ACTIVATION, SLOPE)),
            (_load_tiles, (loads, B, TOKENS, DEPTH, GROUP, STAGES, TRANSPOSED, SLOPE)),
        ],
        [4, 1],
        [208, 40],
    )


@gluon.jit
def _load_tokens(
    matrices,
    operands,
    B: gl.constexpr,
    TOKENS: gl.constexpr,
    OTHERS: gl.constexpr,
    STAGES: gl.constexpr,
    BY_COLUMN: gl.constexpr,
):
    """The warp that loads: of each step, the tile that a group shares and those of its blocks."""
    grad, x, groups, rows, columns = matrices
    first, second, shared, full, empty, tokens, tokens_each, num_groups, num_parts = operands
    turn = 0
    for item in range(gl.program_id(0), num_groups * num_parts, gl.num_programs(0)):
        entry = groups + item % num_groups * (2 * OTHERS)
        k = gl.load(entry)
        part = item // num_groups
        if k >= 0:
            common = gl.load((columns if BY_COLUMN else rows) + k) * B
            for token in range(part * tokens_each, gl.minimum(tokens, (part + 1) * tokens_each), TOKENS):
                stage = turn % STAGES
                mbarrier.wait(empty.index(stage), ((turn // STAGES) & 1) ^ 1)
                ready = full.index(stage)
                mbarrier.expect(ready, (2 * OTHERS + 1) * TOKENS * B * x.dtype.primitive_bitwidth // 8)
                tma.async_copy_global_to_shared(x if BY_COLUMN else grad, [token, common], ready, shared.index(stage))
                for i in gl.static_range(OTHERS):
                    own = gl.load((rows if BY_COLUMN else columns) + gl.load(entry + i)) * B
                    tma.async_copy_global_to_shared(
                        grad if BY_COLUMN else x, [token, own], ready, first.index(stage * OTHERS + i)
                    )
                    own = gl.load((rows if BY_COLUMN else columns) + gl.load(entry + OTHERS + i)) * B
                    tma.async_copy_global_to_shared(
                        grad if BY_COLUMN else x, [token, own], ready, second.index(stage * OTHERS + i)
                    )
                turn += 1


@gluon.jit
def _sum_tokens(
    operands,
    HALF: gl.constexpr,
    B: gl.constexpr,
    TOKENS: gl.constexpr,
    OTHERS: gl.constexpr,
    STAGES: gl.constexpr,
    BY_COLUMN: gl.constexpr,
):
    """Four warps that compute half of the blocks of each group: [B, OTHERS * B], the shared tile transposed times the others."""
    out, groups, mine, shared, full, empty, tokens, tokens_each, num_blocks, num_groups, num_parts = operands
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, OTHERS * B, 16])
    turn = 0
    for item in range(gl.program_id(0), num_groups * num_parts, gl.num_programs(0)):
        entry = groups + item % num_groups * (2 * OTHERS)
        k = gl.load(entry)
        part = item // num_groups
        if k >= 0:
            begin = part * tokens_each
            steps = gl.maximum((gl.minimum(tokens, begin + tokens_each) - begin + TOKENS - 1) // TOKENS, 0)
            acc = gl.zeros((B, OTHERS * B), gl.float32, layout)
            for step in range(steps):
                stage = turn % STAGES
                mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
                acc = warpgroup_mma(shared.index(stage).permute([1, 0]), mine.index(stage), acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=[acc])
                mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES), count=1, pred=step > 0)
                turn += 1
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES), count=1, pred=steps > 0)
            common = gl.arange(0, B, layout=gl.SliceLayout(1, layout)).expand_dims(1)
            own = gl.arange(0, OTHERS * B, layout=gl.SliceLayout(0, layout))
            block = gl.load(entry + HALF * OTHERS + own // B).to(gl.int64).expand_dims(0)
            own = (own % B).expand_dims(0)
            inside = own * B + common if BY_COLUMN else common * B + own
            places = (part.to(gl.int64) * num_blocks + block) * (B * B) + inside
            gl.store(out + places, acc.to(out.dtype.element_ty))


@gluon.jit(do_not_specialize=["tokens", "tokens_each", "num_blocks", "num_groups", "num_parts"])
def weight_gradient_kernel(
    grad,
    x,
    out,
    groups,
    rows,
    columns,
    tokens,
    tokens_each,
    num_blocks,
    num_groups,
    num_parts,
    B: gl.constexpr,
    TOKENS: gl.constexpr,
    OTHERS: gl.constexpr,
    STAGES: gl.constexpr,
    BY_COLUMN: gl.constexpr,
):
    """As `blocks._weight_gradient`, for groups of 2 * OTHERS blocks: each group of warps computes OTHERS of them."""
    # The tiles of OTHERS blocks are neighbours in memory, so that one instruction takes them as one matrix.
    wide: gl.constexpr = gl.NVMMASharedLayout(grad.layout.swizzle_byte_width, grad.layout.element_bitwidth, 2)
    first = gl.allocate_shared_memory(x.dtype, [STAGES, TOKENS, OTHERS * B], wide)
    second = gl.allocate_shared_memory(x.dtype, [STAGES, TOKENS, OTHERS * B], wide)
    first_tiles = first._reinterpret(x.dtype, [STAGES * OTHERS, TOKENS, B], grad.layout)
    second_tiles = second._reinterpret(x.dtype, [STAGES * OTHERS, TOKENS, B], grad.layout)
    shared = gl.allocate_shared_memory(x.dtype, [STAGES, TOKENS, B], grad.layout)
    full, empty = _barriers(STAGES)
    one = (out, groups, first, shared, full, empty, tokens, tokens_each, num_blocks, num_groups, num_parts)
    other = (out, groups, second, shared, full, empty, tokens, tokens_each, num_blocks, num_groups, num_parts)
    matrices = (grad, x, groups, rows, columns)
    loads = (first_tiles, second_tiles, shared, full, empty, tokens, tokens_each, num_groups, num_parts)
    gl.warp_specialize(
        [
            (_sum_tokens, (one, 0, B, TOKENS, OTHERS, STAGES, BY_COLUMN)),
            (_sum_tokens, (other, 1, B, TOKENS, OTHERS, STAGES, BY_COLUMN)),
            (_load_tokens, (matrices, loads, B, TOKENS, OTHERS, STAGES, BY_COLUMN)),
        ],
        [4, 1],
        [208, 40],
    )


def parts_of_sums(tokens: int) -> int:
    """Into how many parts `multiply` divides the tokens where it sums over them."""
    return 8 * -(-tokens // (2 * TOKENS))


def multiply(
    x: Tensor,
    values: Tensor,
    y: Tensor,
    walk: tuple[Tensor, Tensor, Tensor],
    transposed: bool,
    epilogue: Epilogue,
    programs: int,
) -> None:
    """Write y [T, lines * B] from x [T, ..] and values [n, B, B].

    `walk` is the offsets [lines + 1], the other coordinate [n] and the position in `values` [n] of the blocks of each line.
    """
    side, lines = values.shape[-1], len(walk[0]) - 1
    tiles = -(-len(x) // (2 * TOKENS))
    bias, slope, sums, use = epilogue.bias, epilogue.slope, epilogue.sums, epilogue.use_of_slope
    target = _descriptor(y, TOKENS, side // 2)
    multiply_kernel[(min(programs, tiles * lines),)](
        _descriptor(x, TOKENS, DEPTH),
        _descriptor(values.view(-1, side), *((DEPTH, side) if transposed else (side, DEPTH))),
        y if bias is None else bias,
        target,
        target if slope is None else _descriptor(slope, TOKENS, side // 2 if use == "keep" else DEPTH),
        y if sums is None else sums,
        *walk,
        y.shape[1],
        tiles,
        lines,
        B=side,
        TOKENS=TOKENS,
        DEPTH=DEPTH,
        GROUP=2,
        STAGES={128: 4, 64: 5}[side],
        TRANSPOSED=transposed,
        BIAS=bias is not None,
        ACTIVATION=epilogue.activation,
        SLOPE=use,
        num_warps=4,
    )


def weight_gradient(
    grad: Tensor, x: Tensor, out: Tensor, index: BlockIndex, *, each: int, by_column: bool, programs: int
) -> None:
    """Write out [parts, n, B, B]: the stored blocks of grad^T x over `each` tokens a part, for groups of 8 blocks of 64."""
    parts, count, side = out.shape[:3]
    groups = index.groups
    weight_gradient_kernel[(min(programs, len(groups) * parts),)](
        _descriptor(grad, GRADIENT_TOKENS, side),
        _descriptor(x, GRADIENT_TOKENS, side),
        out,
        groups,
        index.rows,
        index.columns,
        len(x),
        each,
        count,
        len(groups),
        parts,
        B=side,
        TOKENS=GRADIENT_TOKENS,
        OTHERS=groups.shape[1] // 2,
        STAGES=6,
        BY_COLUMN=by_column,
        num_warps=4,
    )


def _descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], _ELEMENT[matrix.dtype])
    return TensorDescriptor.from_tensor(matrix, [rows, columns], layout)
