# pyright: reportMissingParameterType=false, reportMissingImports=false, reportIndexIssue=false, reportInvalidTypeForm=false
"""The kernels of `blocks` in Gluon, for Hopper and 16-bit numbers: persistent programs whose warps have different tasks.

One warp loads tiles (TMA) into a ring of shared memory, across the borders of output tiles, so that the ring is full when an
output tile begins. Two groups of four warps each compute half of the tokens of the tile and share the tile of weights; while
one writes its output, the other goes on computing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .absent import absent
from .index import BlockIndex

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
):
    """The warp that loads."""
    x, values, offsets, indices, order, left, right, weights, full, empty, num_token_tiles, num_lines = operands
    STEPS: gl.constexpr = B // DEPTH
    turn = 0
    token, _, begin, end = _place(gl.program_id(0), offsets, num_token_tiles, num_lines, GROUP, TOKENS)
    far = gl.load(indices + begin, mask=begin < end, other=OUTSIDE // B)
    near = gl.load(order + begin, mask=begin < end, other=OUTSIDE // B) if TRANSPOSED else begin
    for tile in range(gl.program_id(0), num_token_tiles * num_lines, gl.num_programs(0)):
        # Index loads take longer than a step: those of the next tile, and of the next block, are begun ahead of their use.
        token_next, _, begin_next, end_next = _place(
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
        token, begin, end = token_next, begin_next, end_next


@gluon.jit
def _activate(z, ACTIVATION: gl.constexpr):
    """The activation of z, in float32."""
    if ACTIVATION == "relu":
        z = gl.maximum(z, 0.0)
    elif ACTIVATION == "silu":
        z = z / (1.0 + gl.exp(-z))
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + gl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        z = z / (1.0 + gl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
    return z


@gluon.jit
def _write(target, tile, stage, token, column):
    """Store a tile through shared memory; the copy to device memory goes on after this returns."""
    tma.store_wait(0)
    stage.store(tile.to(target.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(target, [token, column], stage)


@gluon.jit
def _write_tile(target, tile, stage, token, column, ACTIVATION: gl.constexpr):
    """Store activation(tile) in two halves that use the same shared memory in turn: what they save is one more stage."""
    ROWS: gl.constexpr = tile.shape[0]
    COLUMNS: gl.constexpr = tile.shape[1] // 2
    low, high = gl.split(tile.reshape([ROWS, 2, COLUMNS]).permute([0, 2, 1]))
    _write(target, _activate(low, ACTIVATION), stage, token, column)
    _write(target, _activate(high, ACTIVATION), stage, token, column + COLUMNS)


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
    KEEP: gl.constexpr,
):
    """Four warps that compute one half of the tokens of each output tile."""
    y, z, bias, offsets, mine, weights, stage_y, full, empty, num_token_tiles, num_lines = operands
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
        if KEEP:
            _write_tile(z, acc, stage_y, token + HALF * TOKENS, line * B, "none")
        _write_tile(y, acc, stage_y, token + HALF * TOKENS, line * B, ACTIVATION)
        token, line, begin, end = token_next, line_next, begin_next, end_next
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_token_tiles", "num_lines"])
def multiply_kernel(
    x,
    values,
    bias,
    y,
    z,
    offsets,
    indices,
    order,
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
    KEEP: gl.constexpr,
):
    """As `blocks._multiply`, over 2 * TOKENS tokens a tile."""
    left = gl.allocate_shared_memory(x.dtype, [STAGES, TOKENS, DEPTH], x.layout)
    right = gl.allocate_shared_memory(x.dtype, [STAGES, TOKENS, DEPTH], x.layout)
    weights = gl.allocate_shared_memory(
        x.dtype, [STAGES, values.block_type.shape[0], values.block_type.shape[1]], values.layout
    )
    stage_left = gl.allocate_shared_memory(x.dtype, y.block_type.shape, y.layout)
    stage_right = gl.allocate_shared_memory(x.dtype, y.block_type.shape, y.layout)
    full, empty = _barriers(STAGES)
    one = (y, z, bias, offsets, left, weights, stage_left, full, empty, num_token_tiles, num_lines)
    other = (y, z, bias, offsets, right, weights, stage_right, full, empty, num_token_tiles, num_lines)
    loads = (x, values, offsets, indices, order, left, right, weights, full, empty, num_token_tiles, num_lines)
    gl.warp_specialize(
        [
            (_compute, (one, 0, B, TOKENS, DEPTH, GROUP, STAGES, TRANSPOSED, BIAS, ACTIVATION, KEEP)),
            (_compute, (other, 1, B, TOKENS, DEPTH, GROUP, STAGES, TRANSPOSED, BIAS, ACTIVATION, KEEP)),
            (_load_tiles, (loads, B, TOKENS, DEPTH, GROUP, STAGES, TRANSPOSED)),
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


def multiply(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    y: Tensor,
    z: Tensor | None,
    walk: tuple[Tensor, Tensor, Tensor],
    transposed: bool,
    activation: str,
    programs: int,
) -> None:
    """Write y (and z, before the activation, where given) [T, lines * B] from x [T, ..] and values [n, B, B].

    `walk` is the offsets [lines + 1], the other coordinate [n] and the position in `values` [n] of the blocks of each line.
    """
    side, lines = values.shape[-1], len(walk[0]) - 1
    tiles = -(-len(x) // (2 * TOKENS))
    target = _descriptor(y, TOKENS, side // 2)
    multiply_kernel[(min(programs, tiles * lines),)](
        _descriptor(x, TOKENS, DEPTH),
        _descriptor(values.view(-1, side), *((DEPTH, side) if transposed else (side, DEPTH))),
        y if bias is None else bias,
        target,
        target if z is None else _descriptor(z, TOKENS, side // 2),
        *walk,
        tiles,
        lines,
        B=side,
        TOKENS=TOKENS,
        DEPTH=DEPTH,
        GROUP=2,
        STAGES={128: 4, 64: 5}[side],
        TRANSPOSED=transposed,
        BIAS=bias is not None,
        ACTIVATION=activation,
        KEEP=z is not None,
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
