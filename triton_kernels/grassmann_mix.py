"""Grassmann mixing on Hopper without pbar in memory, for r padded to 32: its tiles are made in the registers that feed wgmma.

The planes (i, j) of 32 coordinates, four blocks of 8, are put in another order, of 512 columns: 64 for each pair of blocks
(a, b), column 8 i + j of it for the plane of coordinate i of a and j of b. Planes inside a block share 64 columns with those
of another block: j > i of the former, j < i of the latter. A thread of a warpgroup has the same two j of each 8 columns, in
the operand and in the sums of wgmma alike: it needs the frames' coordinates j as they lie in its registers anyway and those
of i from shared memory, four threads the same. Of the 16 columns j = i that are left one has the bias as its weight, and as
its pbar 1 where the token is paired and 0 elsewhere; the others have 0.

These kernels start while the one before still runs (launch_pdl), and may touch no memory before gdc_wait; grassmann_mix_bwd_frame
says why it may.
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
from triton.language.extra.cuda import gdc_wait

from triton_kernels.scaled_tiles import ROWS, _advance
from triton_kernels.variant import Variant

TILES = gl.constexpr(8)
FRAME = gl.constexpr(66)  # rows of 64 tokens: u, Y, N and 1 / |z|
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
def _new_block(dtype: gl.constexpr, STAGES: gl.constexpr, BLOCK_N: gl.constexpr, LOADS: gl.constexpr):
    """What a program begins with: the weight's ring, 64 x BLOCK_N elements for each of two warpgroups, and a barrier for each of
    LOADS."""
    weights = Weights(
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, 64], gl.NVMMASharedLayout.get_default_for([BLOCK_N, 64], dtype)),
        mbarrier.allocate_mbarrier(batch=STAGES),
        mbarrier.allocate_mbarrier(batch=STAGES),
    )
    memory = gl.allocate_shared_memory(dtype, [2, ROWS, BLOCK_N], gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_N], dtype))
    loads = mbarrier.allocate_mbarrier(batch=LOADS)
    for i in gl.static_range(STAGES):
        mbarrier.init(weights.full.index(i), count=1)
        mbarrier.init(weights.empty.index(i), count=2)
    for i in gl.static_range(LOADS):
        mbarrier.init(loads.index(i), count=1)
    fence_async_shared()
    return weights, memory, loads


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
def _planes(frame, tile: gl.constexpr, bias_everywhere):
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
            # Row 0 of the last box is N: it lies in the threads of j = 0, where it is wanted.
            count = gl.expand_dims(frame.index(8).permute((1, 0)).load(OF_J), 1)
            seen = gl.where((count > 0) | (bias_everywhere != 0), 1.0, 0.0)
            pbar = gl.where((i == 0) & (j == 0), seen, pbar)
        return pbar


@gluon.jit
def _boxes(memory):
    """The same memory, by 8 coordinates of 64 tokens."""
    BOXES: gl.constexpr = memory.shape[2] // 8
    return memory.reinterpret(gl.float32, [BOXES, 8, ROWS], gl.NVMMASharedLayout.get_default_for([8, ROWS], gl.float32))


@gluon.jit
def _load_frames(frame_desc, first_token, full, boxes, PER_WARPGROUP: gl.constexpr):
    """u and Y by blocks and what comes after them, of 64 tokens for each of two warpgroups."""
    mbarrier.expect(full, 2 * 9 * 8 * ROWS * 4)
    for i in gl.static_range(2):
        for block in gl.static_range(9):
            row = (first_token // ROWS + i) * FRAME + 8 * block
            tma.async_load(frame_desc, [row, 0], full, boxes.index(i * PER_WARPGROUP + block))


@gluon.jit
def _mix(weights, memory, frame_full, warpgroup, g_desc, first_token, first_row, bias_everywhere,
         BLOCK_N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """A warpgroup: 64 tokens."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    dtype: gl.constexpr = weights.tiles.dtype
    frame = _boxes(memory).slice(warpgroup * BLOCK_N // 16, 9)
    mbarrier.wait(frame_full.index(0), 0)
    g = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, mma)
    for tile in gl.static_range(TILES):
        pbar = gl.convert_layout(_planes(frame, tile, bias_everywhere).reshape([ROWS, 64]).to(dtype), operand, assert_trivial=True)
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
    frame_desc: "tensordesc<fp32[8,64]>", weight_desc: "tensordesc<dtype[BLOCK_N,64]>",
    g_desc: "tensordesc<dtype[64,BLOCK_N]>", bias_everywhere: "i32",
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """g of 128 tokens and BLOCK_N rows of the weight."""
    dtype: gl.constexpr = weight_desc.dtype
    first_token = gl.program_id(0) * 2 * ROWS
    first_row = gl.program_id(1) * BLOCK_N
    # In `memory` a warpgroup's frame, then its g.
    weights, memory, frame_full = _new_block(dtype, STAGES, BLOCK_N, 1)
    gdc_wait()
    _load_frames(frame_desc, first_token, frame_full.index(0), _boxes(memory), BLOCK_N // 16)
    gl.warp_specialize(
        [
            (_mix, (weights, memory, frame_full, 0, g_desc, first_token, first_row, bias_everywhere, BLOCK_N, STAGES)),
            (_mix, (weights, memory, frame_full, 1, g_desc, first_token, first_row, bias_everywhere, BLOCK_N, STAGES)),
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
def _turn(weights, memory, frames, full, warpgroup, turn_desc, first_token, BLOCK_N: gl.constexpr):
    """A warpgroup: 64 tokens."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    frame = frames.slice(warpgroup * 9, 9)
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
    row = gl.arange(0, 8, gl.SliceLayout(0, OF_J))[None, :]
    count = gl.sum(gl.where(row == 0, frame.index(8).permute((1, 0)).load(OF_J), 0.0), 1)[:, None]
    for block in range(8):
        x = sums.index(block).permute((1, 0))
        scaled = x.load(OF_J) * gl.where(block < 4, 1.0 / gl.maximum(count, 1.0), 1.0)
        x.store(gl.where(count > 0, scaled, 0.0))
    fence_async_shared()
    gl.barrier()
    for block in range(8):
        tma.async_store(turn_desc, [first_token + warpgroup * ROWS + 8 * block, 0], sums.index(block))
    tma.store_wait(0)


@gluon.jit
def grassmann_mix_bwd_frame(
    frame_desc: "tensordesc<fp32[8,64]>", weight_desc: "tensordesc<dtype[BLOCK_N,64]>",
    grad_g_desc: "tensordesc<dtype[64,BLOCK_N]>", turn_desc: "tensordesc<fp32[8,64]>",
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """h / N and k of 128 tokens (plucker_mean_bwd_frame), from the gradient of g, which has BLOCK_N columns at most.

    Runs beside grassmann_mix_bwd_weight, of which it needs nothing: that one lets it start when the frames are there, and this
    one waits for it at its end, so that what follows may rely on both.
    """
    dtype: gl.constexpr = weight_desc.dtype
    first_token = gl.program_id(0) * 2 * ROWS
    weights, memory, full = _new_block(dtype, STAGES, BLOCK_N, 2)
    frames = gl.allocate_shared_memory(gl.float32, [18, 8, ROWS], gl.NVMMASharedLayout.get_default_for([8, ROWS], gl.float32))
    mbarrier.expect(full.index(0), 2 * ROWS * BLOCK_N * 2)
    for i in gl.static_range(2):
        tma.async_load(grad_g_desc, [first_token + i * ROWS, 0], full.index(0), memory.index(i))
    _load_frames(frame_desc, first_token, full.index(1), frames, 9)
    gl.warp_specialize(
        [
            (_turn, (weights, memory, frames, full, 0, turn_desc, first_token, BLOCK_N)),
            (_turn, (weights, memory, frames, full, 1, turn_desc, first_token, BLOCK_N)),
            (_load_weights, (weights, weight_desc, 0)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
    gdc_wait()


VARIANTS = [
    Variant(kernel, "sm90a", {"dtype": dtype}, {"BLOCK_N": 256, "STAGES": stages, "num_warps": 4, "launch_pdl": True})
    for dtype, (kernel, stages) in itertools.product(
        ("bf16", "fp16"), {grassmann_mix_fwd: 5, grassmann_mix_bwd_frame: 3}.items()
    )
]
