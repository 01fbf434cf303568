"""Grassmann mixing on Hopper without pbar in memory, for r padded to 32: its tiles are made in the registers that feed wgmma.

The planes (i, j) of 32 coordinates, four blocks of 8, are put in another order, of 512 columns: 64 for each pair of blocks
(a, b), column 8 i + j of it for the plane of coordinate i of a and j of b. Planes inside a block share 64 columns with those
of another block: j > i of the former, j < i of the latter. A thread of a warpgroup has the same two j of each 8 columns, in
the operand and in the sums of wgmma alike: it needs the frames' coordinates j as they lie in its registers anyway and those
of i from shared memory, four threads the same. Of the 16 columns j = i that are left one has the bias as its weight, and as
its pbar 1 where the token is paired and 0 elsewhere; the others have 0.
"""

import itertools

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate

from triton_kernels.scaled_tiles import ROWS, _advance
from triton_kernels.variant import Variant

TILES = gl.constexpr(8)
# 64 rows of tokens, i and j of 64 columns, as an operand and as an accumulator of wgmma have them.
PLANES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1], [8, 0, 0], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0]],
        [],
        [64, 8, 8],
    )
)
# The same without the two j that a thread has of each four threads' eight.
PARTS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[8, 0, 0], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [[0, 0, 1], [0, 0, 2], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0]],
        [],
        [64, 8, 4],
    )
)
OF_I = gl.constexpr(gl.SliceLayout(2, PLANES.value))
OF_J = gl.constexpr(gl.SliceLayout(1, PLANES.value))


@gluon.constexpr_function
def _blocks(tile):
    """Those that the pairs of a tile are of; of the last two tiles each block's planes are its own."""
    return ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3), (0, 1), (2, 3))[tile]


@aggregate
class Weights:
    """Tiles of 64 columns of the weight on their way to the warpgroups."""

    tiles: gl.shared_memory_descriptor  # [stages, 256, 64]
    full: gl.shared_memory_descriptor  # [stages] barriers
    empty: gl.shared_memory_descriptor

    advance = _advance


@gluon.jit
def _new_weights(dtype: gl.constexpr, STAGES: gl.constexpr, BLOCK_N: gl.constexpr):
    weights = Weights(
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, 64], gl.NVMMASharedLayout.get_default_for([BLOCK_N, 64], dtype)),
        mbarrier.allocate_mbarrier(batch=STAGES),
        mbarrier.allocate_mbarrier(batch=STAGES),
    )
    for i in gl.static_range(STAGES):
        mbarrier.init(weights.full.index(i), count=1)
        mbarrier.init(weights.empty.index(i), count=2)
    return weights


@gluon.jit
def _load_weights(weights, weight_desc, first_row):
    """The helper."""
    stage = 0
    phase = 1
    for tile in range(TILES):
        mbarrier.wait(weights.empty.index(stage), phase)
        mbarrier.expect(weights.full.index(stage), weights.tiles.shape[1] * 128)
        tma.async_load(weight_desc, [first_row, tile * 64], weights.full.index(stage), weights.tiles.index(stage))
        stage, phase = weights.advance(stage, phase)


@gluon.jit
def _coordinates(frame, block, OF: gl.constexpr):
    """u and Y of the 8 coordinates of a block, [64, 8, 8], by i or by j."""
    u = frame.index(block).permute((1, 0)).load(OF)
    y = frame.index(4 + block).permute((1, 0)).load(OF)
    axis: gl.constexpr = OF.dim
    return gl.expand_dims(u, axis), gl.expand_dims(y, axis)


@gluon.jit
def _wedge(a, b, x, y):
    """a x - b y"""
    a, x = gl.broadcast(a, x)
    b, y = gl.broadcast(b, y)
    return gl.fma(a, x, -(b * y))


@gluon.jit
def _planes(frame, tile: gl.constexpr, seen):
    """pbar of the columns of a tile."""
    A: gl.constexpr = _blocks(tile)[0]
    B: gl.constexpr = _blocks(tile)[1]
    u_i, y_i = _coordinates(frame, A, OF_I)
    u_j, y_j = _coordinates(frame, B, OF_J)
    if tile < 6:
        return _wedge(u_i, y_i, y_j, u_j)
    else:
        i = gl.arange(0, 8, gl.SliceLayout(0, OF_I))[None, :, None]
        j = gl.arange(0, 8, gl.SliceLayout(0, OF_J))[None, None, :]
        of_b_u, of_b_y = _coordinates(frame, B, OF_I)
        of_a_u, of_a_y = _coordinates(frame, A, OF_J)
        pbar = gl.where(j > i, _wedge(u_i, y_i, of_a_y, of_a_u), _wedge(of_b_y, of_b_u, u_j, y_j))
        if tile == 6:
            pbar = gl.where((i == 0) & (j == 0), seen, pbar)
        return pbar


@gluon.jit
def _boxes(memory):
    """The same memory, by 8 coordinates of 64 tokens."""
    BOXES: gl.constexpr = memory.shape[2] // 8
    return memory.reinterpret(gl.float32, [BOXES, 8, ROWS], gl.NVMMASharedLayout.get_default_for([8, ROWS], gl.float32))


@gluon.jit
def _load_frames(frame_desc, first_token, full, boxes, PER_WARPGROUP: gl.constexpr):
    mbarrier.expect(full, 2 * 64 * ROWS * 4)
    for i in gl.static_range(16):
        token = first_token + i // 8 * ROWS
        tma.async_load(frame_desc, [i % 8 * 8, token], full, boxes.index(i // 8 * PER_WARPGROUP + i % 8))


@gluon.jit
def _mix(weights, memory, frame_full, warpgroup, count_ptr, g_desc, first_token, first_row, stride, bias_everywhere,
         BLOCK_N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """A warpgroup: 64 tokens."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    dtype: gl.constexpr = weights.tiles.dtype
    token = first_token + warpgroup * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, OF_I))
    count = gl.load(count_ptr + token, mask=token < stride, other=0.0)
    seen = gl.where((count > 0) | (bias_everywhere != 0), 1.0, 0.0)[:, None, None]
    frame = _boxes(memory).slice(warpgroup * BLOCK_N // 16, 8)
    mbarrier.wait(frame_full, 0)
    g = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, mma)
    for tile in gl.static_range(TILES):
        pbar = gl.convert_layout(_planes(frame, tile, seen).reshape([ROWS, 64]).to(dtype), operand, assert_trivial=True)
        mbarrier.wait(weights.full.index(tile % STAGES), tile // STAGES % 2)
        g = warpgroup_mma(pbar, weights.tiles.index(tile % STAGES).permute((1, 0)), g, use_acc=tile > 0, is_async=True)
        if tile > 0:
            g, pbar = warpgroup_mma_wait(1, deps=(g, pbar))
            mbarrier.arrive(weights.empty.index((tile - 1) % STAGES))
    g = warpgroup_mma_wait(0, deps=(g,))
    gl.barrier()  # all warps are done with the frame
    staging = memory.index(warpgroup)
    staging.store(g.to(dtype))
    fence_async_shared()
    gl.barrier()
    tma.async_store(g_desc, [first_token + warpgroup * ROWS, first_row], staging)
    tma.store_wait(0)


@gluon.jit
def grassmann_mix_fwd(
    frame_desc: "tensordesc<fp32[8,64]>", count_ptr: "*fp32:16", weight_desc: "tensordesc<dtype[BLOCK_N,64]>",
    g_desc: "tensordesc<dtype[64,BLOCK_N]>", stride: "i32:8", bias_everywhere: "i32",
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """g of 128 tokens and BLOCK_N rows of the weight."""
    dtype: gl.constexpr = weight_desc.dtype
    first_token = gl.program_id(0) * 2 * ROWS
    first_row = gl.program_id(1) * BLOCK_N
    weights = _new_weights(dtype, STAGES, BLOCK_N)
    # A warpgroup's frame, then its g.
    memory = gl.allocate_shared_memory(dtype, [2, ROWS, BLOCK_N], gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_N], dtype))
    frame_full = mbarrier.allocate_mbarrier()
    mbarrier.init(frame_full, count=1)
    fence_async_shared()
    _load_frames(frame_desc, first_token, frame_full, _boxes(memory), BLOCK_N // 16)
    gl.warp_specialize(
        [
            (_mix, (weights, memory, frame_full, 0, count_ptr, g_desc, first_token, first_row, stride, bias_everywhere, BLOCK_N, STAGES)),
            (_mix, (weights, memory, frame_full, 1, count_ptr, g_desc, first_token, first_row, stride, bias_everywhere, BLOCK_N, STAGES)),
            (_load_weights, (weights, weight_desc, first_row)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _over_i(sums, grad, x):
    """sums_j + sum_i grad_ij x_i, [64, 8]: a thread has all i of its j. One after another, in fused multiply-adds."""
    I: gl.constexpr = grad.shape[1]
    if I == 1:
        grad = gl.convert_layout(grad.reshape([ROWS, 8]), OF_J, assert_trivial=True)
        return gl.fma(grad, gl.convert_layout(x.reshape([ROWS, 8]), OF_J, assert_trivial=True), sums)
    else:
        first, second = gl.split(grad.reshape([ROWS, 2, I // 2, 8]).permute((0, 2, 3, 1)))
        x_first, x_second = gl.split(x.reshape([ROWS, 2, I // 2, 8]).permute((0, 2, 3, 1)))
        return _over_i(_over_i(sums, first, x_first), second, x_second)


@gluon.jit
def _halves(x):
    first, second = gl.split(x.reshape([ROWS, 8, 4, 2]))
    return gl.convert_layout(first, PARTS, assert_trivial=True), gl.convert_layout(second, PARTS, assert_trivial=True)


@gluon.jit
def _over_j(sums, grad, x):
    """sums_i + sum_j grad_ij x_j, of the two j that a thread has: [64, 8, 4]."""
    first, second = _halves(grad)
    x_first, x_second = _halves(gl.broadcast(x, grad)[0])
    return gl.fma(second, x_second, gl.fma(first, x_first, sums))


@gluon.jit
def _as_of_j(sums):
    """What four threads have of the sums over j, each for all i: added up, each for two i, as coordinates are by j."""
    turned: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 1, 0], [8, 0, 0]],
        [[0, 2, 0], [0, 4, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0]],
        [],
        [64, 8, 4],
    )
    return gl.convert_layout(gl.sum(gl.convert_layout(sums, turned), 2), OF_J, assert_trivial=True)


@gluon.jit
def _add(sums, block, x):
    """x, [64, 8] by j, to the sums of a block: a thread adds to what is its own."""
    rows = sums.index(block).permute((1, 0))
    rows.store(rows.load(OF_J) + x)


@gluon.jit
def _add_pair(sums, frame, grad, part_h, part_k, a, b):
    """What planes of blocks a, by i, and b, by j, add to Om u and Om Y: of b, and of a in part."""
    u_j, y_j = _coordinates(frame, b, OF_J)
    part_h = _over_j(part_h, grad, u_j)
    part_k = _over_j(part_k, grad, y_j)
    u_i, y_i = _coordinates(frame, a, OF_I)
    none = gl.full([ROWS, 8], 0.0, gl.float32, OF_J)
    minus = -grad
    _add(sums, b, _over_i(none, minus, gl.broadcast(u_i, grad)[0]))
    _add(sums, 4 + b, _over_i(none, minus, gl.broadcast(y_i, grad)[0]))
    return part_h, part_k


@gluon.jit
def _grad_pbar(weights, grad_g, stage, phase):
    """The gradient of pbar, of the columns of the next tile."""
    mma: gl.constexpr = grad_g.type.layout.parent
    zero = gl.full([ROWS, 64], 0.0, gl.float32, mma)
    mbarrier.wait(weights.full.index(stage), phase)
    grad = warpgroup_mma(grad_g, weights.tiles.index(stage), zero, use_acc=False, is_async=True)
    grad = warpgroup_mma_wait(0, deps=(grad,))
    mbarrier.arrive(weights.empty.index(stage))
    stage, phase = weights.advance(stage, phase)
    return gl.convert_layout(grad.reshape([ROWS, 8, 8]), PLANES, assert_trivial=True), stage, phase


@gluon.jit
def _turn(weights, memory, frames, full, warpgroup, count_ptr, turn_ptr, first_token, stride, BLOCK_N: gl.constexpr):
    """A warpgroup: 64 tokens."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    frame = frames.slice(warpgroup * 8, 8)
    mbarrier.wait(full.index(0), 0)
    mbarrier.wait(full.index(1), 0)
    grad_g = memory.index(warpgroup).load(gl.DotOperandLayout(0, mma, 2))
    # The sums of h, then of k, where the gradient of g was.
    sums = _boxes(memory).slice(warpgroup * BLOCK_N // 16, 8)
    gl.barrier()  # all warps have loaded it
    for i in range(8):
        sums.index(i).permute((1, 0)).store(gl.full([ROWS, 8], 0.0, gl.float32, OF_J))
    none = gl.full([ROWS, 8, 4], 0.0, gl.float32, PARTS)
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for a in range(3):
        part_h = none
        part_k = none
        for b in range(a + 1, 4):
            grad, stage, phase = _grad_pbar(weights, grad_g, stage, phase)
            part_h, part_k = _add_pair(sums, frame, grad, part_h, part_k, a, b)
        _add(sums, a, _as_of_j(part_h))
        _add(sums, 4 + a, _as_of_j(part_k))
    i = gl.arange(0, 8, gl.SliceLayout(0, OF_I))[None, :, None]
    j = gl.arange(0, 8, gl.SliceLayout(0, OF_J))[None, None, :]
    for a in range(0, 4, 2):
        grad, stage, phase = _grad_pbar(weights, grad_g, stage, phase)
        for b in range(2):
            own = gl.where(b == 0, gl.where(j > i, grad, 0.0), gl.where(j < i, -grad, 0.0))
            part_h, part_k = _add_pair(sums, frame, own, none, none, a + b, a + b)
            _add(sums, a + b, _as_of_j(part_h))
            _add(sums, 4 + a + b, _as_of_j(part_k))
    token = first_token + warpgroup * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, OF_J))
    count = gl.load(count_ptr + token, mask=token < stride, other=0.0)[:, None]
    mask = (token < stride)[:, None]
    row = gl.arange(0, 8, gl.SliceLayout(0, OF_J))
    at = turn_ptr + row.to(gl.int64)[None, :] * stride + token[:, None]
    for block in range(8):
        x = sums.index(block).permute((1, 0)).load(OF_J) * gl.where(block < 4, 1.0 / gl.maximum(count, 1.0), 1.0)
        gl.store(at, gl.where(count > 0, x, 0.0), mask=mask)
        at += 8 * stride.to(gl.int64)


@gluon.jit
def grassmann_mix_bwd_frame(
    frame_desc: "tensordesc<fp32[8,64]>", count_ptr: "*fp32:16", weight_desc: "tensordesc<dtype[BLOCK_N,64]>",
    grad_g_desc: "tensordesc<dtype[64,BLOCK_N]>", turn_ptr: "*fp32:16", stride: "i32:8",
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """h / N and k of 128 tokens (plucker_mean_bwd_frame), from the gradient of g, which has BLOCK_N columns at most."""
    dtype: gl.constexpr = weight_desc.dtype
    first_token = gl.program_id(0) * 2 * ROWS
    weights = _new_weights(dtype, STAGES, BLOCK_N)
    memory = gl.allocate_shared_memory(dtype, [2, ROWS, BLOCK_N], gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_N], dtype))
    frames = gl.allocate_shared_memory(gl.float32, [16, 8, ROWS], gl.NVMMASharedLayout.get_default_for([8, ROWS], gl.float32))
    full = mbarrier.allocate_mbarrier(batch=2)
    mbarrier.init(full.index(0), count=1)
    mbarrier.init(full.index(1), count=1)
    fence_async_shared()
    mbarrier.expect(full.index(0), 2 * ROWS * BLOCK_N * 2)
    for i in gl.static_range(2):
        tma.async_load(grad_g_desc, [first_token + i * ROWS, 0], full.index(0), memory.index(i))
    _load_frames(frame_desc, first_token, full.index(1), frames, 8)
    gl.warp_specialize(
        [
            (_turn, (weights, memory, frames, full, 0, count_ptr, turn_ptr, first_token, stride, BLOCK_N)),
            (_turn, (weights, memory, frames, full, 1, count_ptr, turn_ptr, first_token, stride, BLOCK_N)),
            (_load_weights, (weights, weight_desc, 0)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


# Planes (i, j) as the rows of an operand, 64 tokens as its columns.
PLANES_BY_TOKEN = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1], [1, 0, 0], [0, 0, 8], [0, 0, 16], [0, 0, 32]],
        [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [[2, 0, 0], [4, 0, 0]],
        [],
        [8, 8, 64],
    )
)
ROWS_I = gl.constexpr(gl.SliceLayout(1, PLANES_BY_TOKEN.value))
ROWS_J = gl.constexpr(gl.SliceLayout(0, PLANES_BY_TOKEN.value))


@aggregate
class Tokens:
    """The gradient of g and the frames of 64 tokens at a time."""

    grad_g: gl.shared_memory_descriptor  # [stages, 64, BLOCK_N]
    frame: gl.shared_memory_descriptor  # [9 stages, 8, 64]: u, Y, and the two rows after them
    full: gl.shared_memory_descriptor  # [stages] barriers
    empty: gl.shared_memory_descriptor

    advance = _advance


@gluon.jit
def _load_tokens(tokens, frame_desc, grad_g_desc, first_token, end_token):
    """The helper."""
    stage = 0
    phase = 1
    for token in range(first_token, end_token, ROWS):
        mbarrier.wait(tokens.empty.index(stage), phase)
        full = tokens.full.index(stage)
        mbarrier.expect(full, ROWS * (9 * 8 * 4 + tokens.grad_g.shape[2] * 2))
        tma.async_load(grad_g_desc, [token, 0], full, tokens.grad_g.index(stage))
        for i in gl.static_range(9):
            tma.async_load(frame_desc, [i * 8, token], full, tokens.frame.index(stage * 9 + i))
        stage, phase = tokens.advance(stage, phase)


@gluon.jit
def _rows(frame, block, OF: gl.constexpr):
    """u and Y of the 8 coordinates of a block, [8, 8, 64], by i or by j."""
    axis: gl.constexpr = OF.dim
    return gl.expand_dims(frame.index(block).load(OF), axis), gl.expand_dims(frame.index(4 + block).load(OF), axis)


@gluon.jit
def _planes_by_token(tokens, stage, a, b, bias_everywhere, INSIDE: gl.constexpr, operand: gl.constexpr):
    """pbar of 64 planes, of blocks a and b, and of 64 tokens."""
    frame = tokens.frame
    u_i, y_i = _rows(frame, stage * 9 + a, ROWS_I)
    u_j, y_j = _rows(frame, stage * 9 + b, ROWS_J)
    if INSIDE:
        i = gl.arange(0, 8, gl.SliceLayout(1, gl.SliceLayout(2, PLANES_BY_TOKEN)))[:, None, None]
        j = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, PLANES_BY_TOKEN)))[None, :, None]
        of_b_u, of_b_y = _rows(frame, stage * 9 + b, ROWS_I)
        of_a_u, of_a_y = _rows(frame, stage * 9 + a, ROWS_J)
        pbar = gl.where(j > i, _wedge(u_i, y_i, of_a_y, of_a_u), _wedge(of_b_y, of_b_u, u_j, y_j))
        # Row 0 of the box is N: in the threads of j = 0, where it is wanted.
        count = gl.expand_dims(frame.index(stage * 9 + 8).load(ROWS_J), 0)
        seen = gl.where((count > 0) | (bias_everywhere != 0), 1.0, 0.0)
        pbar = gl.where((i == 0) & (j == 0) & (a == 0), seen, pbar)
    else:
        pbar = _wedge(u_i, y_i, y_j, u_j)
    return gl.convert_layout(pbar.reshape([64, ROWS]).to(tokens.grad_g.dtype), operand, assert_trivial=True)


@gluon.jit
def _sum_planes(tokens, part_ptr, tile, a, b, first_token, end_token, d, bias_everywhere, INSIDE: gl.constexpr):
    """A warpgroup: a tile of 64 planes."""
    BLOCK_N: gl.constexpr = tokens.grad_g.shape[2]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    sums = gl.full([64, BLOCK_N], 0.0, gl.float32, mma)
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    mbarrier.wait(tokens.full.index(0), 0, pred=first_token < end_token)
    pbar = _planes_by_token(tokens, stage, a, b, bias_everywhere, INSIDE, operand)
    for token in range(first_token, end_token, ROWS):
        sums_next = warpgroup_mma(pbar, tokens.grad_g.index(stage), sums, is_async=True)
        next_stage, next_phase = tokens.advance(stage, phase)
        mbarrier.wait(tokens.full.index(next_stage), next_phase, pred=token + ROWS < end_token)
        pbar_next = _planes_by_token(tokens, next_stage, a, b, bias_everywhere, INSIDE, operand)
        sums = warpgroup_mma_wait(0, deps=(sums_next,))
        mbarrier.arrive(tokens.empty.index(stage))
        stage, phase, pbar = next_stage, next_phase, pbar_next
    row = tile * 64 + gl.arange(0, 64, gl.SliceLayout(1, mma))
    column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, mma))
    gl.store(part_ptr + row[:, None] * d + column[None, :], sums, mask=(column < d)[None, :])


@gluon.jit
def _sum_tile(tokens, part_ptr, tile, first_token, end_token, d, bias_everywhere):
    if tile < 6:
        a = (tile > 2).to(gl.int32) + (tile > 4).to(gl.int32)
        b = gl.where(tile < 3, tile + 1, gl.where(tile < 5, tile - 1, 3))
        _sum_planes(tokens, part_ptr, tile, a, b, first_token, end_token, d, bias_everywhere, False)
    else:
        a = 2 * tile - 12
        _sum_planes(tokens, part_ptr, tile, a, a + 1, first_token, end_token, d, bias_everywhere, True)


@gluon.jit
def grassmann_mix_bwd_weight(
    frame_desc: "tensordesc<fp32[8,64]>", grad_g_desc: "tensordesc<dtype[64,BLOCK_N]>", part_ptr: "*fp32:16",
    num_tokens: "i32", share: "i32", d: "i32:8", bias_everywhere: "i32", BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """pbar^T @ grad_g of 128 planes, summed over `share` tokens, a multiple of 64: [splits, 512, d]."""
    dtype: gl.constexpr = grad_g_desc.dtype
    first_token = gl.program_id(1) * share
    end_token = gl.minimum(first_token + share, num_tokens)
    tile = gl.program_id(0) * 2
    part_ptr += gl.program_id(1).to(gl.int64) * 512 * d
    tokens = Tokens(
        gl.allocate_shared_memory(dtype, [STAGES, ROWS, BLOCK_N], gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_N], dtype)),
        gl.allocate_shared_memory(gl.float32, [9 * STAGES, 8, ROWS], gl.NVMMASharedLayout.get_default_for([8, ROWS], gl.float32)),
        mbarrier.allocate_mbarrier(batch=STAGES),
        mbarrier.allocate_mbarrier(batch=STAGES),
    )
    for i in gl.static_range(STAGES):
        mbarrier.init(tokens.full.index(i), count=1)
        mbarrier.init(tokens.empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_sum_tile, (tokens, part_ptr, tile, first_token, end_token, d, bias_everywhere)),
            (_sum_tile, (tokens, part_ptr, tile + 1, first_token, end_token, d, bias_everywhere)),
            (_load_tokens, (tokens, frame_desc, grad_g_desc, first_token, end_token)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


VARIANTS = [
    Variant(kernel, "sm90a", {"dtype": dtype}, {"BLOCK_N": 256, "STAGES": stages, "num_warps": 4})
    for dtype, (kernel, stages) in itertools.product(
        ("bf16", "fp16"), {grassmann_mix_fwd: 5, grassmann_mix_bwd_frame: 3, grassmann_mix_bwd_weight: 4}.items()
    )
]
