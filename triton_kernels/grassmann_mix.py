"""Grassmann mixing on Hopper without pbar in memory, for r padded to 32: its tiles are made in the registers that feed wgmma.

The planes (i, j) of 32 coordinates, four blocks of 8, are put in another order, of 512 columns: 64 for each pair of blocks
(a, b), column 8 i + j of it for the plane of coordinate i of a and j of b. Planes inside a block share 64 columns with those
of another block: j > i of the former, j < i of the latter. A thread of a warpgroup has the same two j of each 8 columns, in
the operand and in the sums of wgmma alike: it needs the frames' coordinates j as they lie in its registers anyway and those
of i from shared memory, four threads the same. Of the 16 columns j = i that are left one has the bias as its weight, and as
its pbar 1 where the token is paired and 0 elsewhere; the others have 0.

These kernels start while the one before still runs (launch_pdl), and may touch no memory before gdc_wait; grassmann_mix_frame.py
says why it may.
"""

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
def _load_frames(frame_desc, full, boxes, PER_WARPGROUP: gl.constexpr):
    """u and Y by blocks and what comes after them, of 64 tokens for each of two warpgroups."""
    mbarrier.expect(full, 2 * 9 * 8 * ROWS * 4)
    for i in gl.static_range(2):
        for block in gl.static_range(9):
            row = (gl.program_id(0) * 2 + i) * FRAME + 8 * block
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
    _load_frames(frame_desc, frame_full.index(0), _boxes(memory), BLOCK_N // 16)
    gl.warp_specialize(
        [
            (_mix, (weights, memory, frame_full, 0, g_desc, first_token, first_row, bias_everywhere, BLOCK_N, STAGES)),
            (_mix, (weights, memory, frame_full, 1, g_desc, first_token, first_row, bias_everywhere, BLOCK_N, STAGES)),
            (_load_weights, (weights, weight_desc, first_row)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


VARIANTS = [
    Variant(grassmann_mix_fwd, "sm90a", {"dtype": dtype}, {"BLOCK_N": 256, "STAGES": 5, "num_warps": 4, "launch_pdl": True})
    for dtype in ("bf16", "fp16")
]
