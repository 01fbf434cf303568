"""The weight of Grassmann mixing in the order of columns that grassmann_mix.py multiplies in, and its gradient back from it."""

import triton
import triton.language as tl
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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from triton_kernels.grassmann_mix import FRAME, _wedge
from triton_kernels.plucker_mean import COLUMNS, plucker_mean_bwd_token, plucker_mean_frame
from triton_kernels.scaled_tiles import ROWS, _advance
from triton_kernels.variant import Variant


@triton.jit
def _plane_of(column, r):
    """The plane of a column of the 512, as a number from 0 on, and whether there is one."""
    tile = column // 64
    i = column // 8 % 8
    j = column % 8
    a = (tile > 2).to(tl.int32) + (tile > 4).to(tl.int32)
    b = tl.where(tile < 3, tile + 1, tl.where(tile < 5, tile - 1, 3))
    own = 2 * tile - 12 + (j < i).to(tl.int32)  # the block whose planes these are
    low = tl.where(tile < 6, 8 * a + i, 8 * own + tl.minimum(i, j))
    high = tl.where(tile < 6, 8 * b + j, 8 * own + tl.maximum(i, j))
    return low * (2 * r - 1 - low) // 2 + high - low - 1, (low < high) & (high < r)


BIAS = tl.constexpr(384)  # the column of the bias


@triton.jit
def grassmann_mix_start(
    valid_ptr: "*i8:16", cu_seqlens_ptr: "*i32:16", offsets_ptr: "*i32:16",
    o0: "i32", o1: "i32", o2: "i32", o3: "i32", o4: "i32", o5: "i32", o6: "i32", o7: "i32",
    frame_ptr: "*fp32", pairs_ptr: "*fp32", keeps_pairs: "i32", z_ptr: "*dtype:16", seen_ptr: "*dtype:16", history: "i32",
    num_tokens: "i32", length: "i32", width: "i32:8", num_offsets: "i32",
    has_valid: "i32", num_sequences: "i32", search_steps: "i32",
    weight_ptr: "*dtype:16", bias_ptr: "*dtype:16", has_bias: "i32", columns_ptr: "*dtype:16", r: "i32",
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """plucker_mean_frame, and by further programs, one a row, the weight [d, r (r - 1) / 2] and bias [d] as columns [d, 512]."""
    gdc_launch_dependents()  # what follows has one program a processor: no crowd on those that are done first
    gdc_wait()
    num_blocks = tl.cdiv(num_tokens, COLUMNS) * (COLUMNS // BLOCK_T)
    if tl.program_id(0) < num_blocks:
        plucker_mean_frame(
            valid_ptr, cu_seqlens_ptr, offsets_ptr, o0, o1, o2, o3, o4, o5, o6, o7, frame_ptr, pairs_ptr, keeps_pairs, z_ptr,
            seen_ptr, history, num_tokens, length, width, num_offsets, has_valid, num_sequences, search_steps, HEAD_DIM,
            BLOCK_T, AT_ONCE,
        )  # fmt: skip
    else:
        row = (tl.program_id(0) - num_blocks).to(tl.int64)
        column = tl.arange(0, 512)
        plane, ok = _plane_of(column, r)
        x = tl.load(weight_ptr + row * (r * (r - 1) // 2) + plane, mask=ok, other=0.0)
        x = tl.where(column == BIAS, tl.load(bias_ptr + row, mask=has_bias != 0, other=0.0), x)
        tl.store(columns_ptr + row * 512 + column, x)


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
    frame: gl.shared_memory_descriptor  # [9 stages, 8, 64]: u, Y, and what comes after them
    full: gl.shared_memory_descriptor  # [stages] barriers
    empty: gl.shared_memory_descriptor

    advance = _advance


@gluon.jit
def _tile_of(group, warpgroup):
    """0 and 6, 1 and 3, 2 and 4, 5 and 7: planes of three blocks at most, and one tile at most of those inside blocks, which
    take longer."""
    return gl.where(warpgroup == 0, gl.where(group == 3, 5, group), gl.where(group == 0, 6, gl.where(group == 3, 7, group + 2)))


@gluon.jit
def _load_tokens(tokens, frame_desc, grad_g_desc, first_token, end_token):
    """The helper."""
    group = gl.program_id(0)
    not_needed = gl.where(group == 3, 0, gl.where(group == 2, 2, 3))  # the fourth block
    stage = 0
    phase = 1
    for token in range(first_token, end_token, ROWS):
        mbarrier.wait(tokens.empty.index(stage), phase)
        full = tokens.full.index(stage)
        mbarrier.expect(full, ROWS * (7 * 8 * 4 + tokens.grad_g.shape[2] * 2))
        tma.async_load(grad_g_desc, [token, 0], full, tokens.grad_g.index(stage))
        row = token // ROWS * FRAME
        tma.async_load(frame_desc, [row + 64, 0], full, tokens.frame.index(stage * 9 + 8))
        for i in gl.static_range(3):
            block = i + (i >= not_needed).to(gl.int32)
            tma.async_load(frame_desc, [row + block * 8, 0], full, tokens.frame.index(stage * 9 + block))
            tma.async_load(frame_desc, [row + 32 + block * 8, 0], full, tokens.frame.index(stage * 9 + 4 + block))
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
    to = part_ptr + (column // 8 * (512 * 8) + column % 8)[None, :] + row[:, None] * 8
    gl.store(to, sums, mask=(column < d)[None, :])


@gluon.jit
def _sum_tile(tokens, warpgroup, part_ptr, first_token, end_token, d, bias_everywhere):
    """A warpgroup: a tile of 64 planes."""
    tile = _tile_of(gl.program_id(0), warpgroup)
    part_ptr += gl.program_id(1).to(gl.int64) * 512 * d
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
    """pbar^T @ grad_g of 128 planes, summed over `share` tokens, a multiple of 64: [splits, d / 8, 512, 8], so that a warp
    writes 256 bytes side by side."""
    dtype: gl.constexpr = grad_g_desc.dtype
    first_token = gl.program_id(1) * share
    end_token = gl.minimum(first_token + share, num_tokens)
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
    gdc_wait()
    gdc_launch_dependents()  # now: grassmann_mix_bwd_frame relies on it for its inputs
    gl.warp_specialize(
        [
            (_sum_tile, (tokens, 0, part_ptr, first_token, end_token, d, bias_everywhere)),
            (_sum_tile, (tokens, 1, part_ptr, first_token, end_token, d, bias_everywhere)),
            (_load_tokens, (tokens, frame_desc, grad_g_desc, first_token, end_token)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _load_part(tiles, full, stage, part_desc, part, chunk, num_chunks, pred):
    mbarrier.expect(full.index(stage), 8 * 128 * 4, pred=pred)
    tma.async_load(part_desc, [(part * num_chunks + chunk) * 8, 0], full.index(stage), tiles.index(stage), pred=pred)


@gluon.jit
def _sum_parts(tiles, full, part_desc, grad_weight_ptr, grad_bias_ptr, num_parts, d, r):
    """Helpers of grassmann_mix_bwd_frame: the gradients of the weight and of the bias, from partial sums [num_parts, d / 8, 512, 8].
    A program has chunks of 128 columns and 8 rows, which lie side by side."""
    gdc_wait()
    STAGES: gl.constexpr = tiles.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [gl.num_warps(), 1], [1, 0])
    line = gl.arange(0, 8, gl.SliceLayout(1, layout))[:, None]
    place = gl.arange(0, 128, gl.SliceLayout(0, layout))[None, :]
    num_chunks = d // 2
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for chunk in range(gl.program_id(0), num_chunks, gl.num_programs(0)):
        ahead = stage
        for part in range(STAGES):
            _load_part(tiles, full, ahead, part_desc, part, chunk, num_chunks, part < num_parts)
            ahead = gl.where(ahead == STAGES - 1, 0, ahead + 1)
        sums = gl.full([8, 128], 0.0, gl.float32, layout)
        for part in range(num_parts):
            mbarrier.wait(full.index(stage), phase)
            sums += tiles.index(stage).load(layout)
            gl.barrier()  # both warps have it
            _load_part(tiles, full, stage, part_desc, part + STAGES, chunk, num_chunks, part + STAGES < num_parts)
            last = stage == STAGES - 1
            stage, phase = gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)
        column = chunk % 4 * 128 + line * 16 + place // 8
        row = chunk // 4 * 8 + place % 8
        plane, ok = _plane_of(column, r)
        sums = sums.to(grad_weight_ptr.dtype.element_ty)
        gl.store(grad_weight_ptr + row * (r * (r - 1) // 2) + plane, sums, mask=ok)
        gl.store(grad_bias_ptr + row + 0 * column, sums, mask=column == BIAS)


@triton.jit
def grassmann_mix_finish(
    valid_ptr: "*i8:16", cu_seqlens_ptr: "*i32:16", offsets_ptr: "*i32:16",
    o0: "i32", o1: "i32", o2: "i32", o3: "i32", o4: "i32", o5: "i32", o6: "i32", o7: "i32",
    frame_ptr: "*fp32", pairs_ptr: "*fp32", turn_ptr: "*fp32", grad_z_ptr: "*dtype:16", grad_stride: "i32:8",
    num_tokens: "i32", length: "i32", width: "i32:8", num_offsets: "i32",
    has_valid: "i32", num_sequences: "i32", search_steps: "i32",
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """plucker_mean_bwd_token."""
    gdc_wait()
    plucker_mean_bwd_token(
        valid_ptr, cu_seqlens_ptr, offsets_ptr, o0, o1, o2, o3, o4, o5, o6, o7, frame_ptr, pairs_ptr, turn_ptr, grad_z_ptr,
        grad_stride, num_tokens, length, width, num_offsets, has_valid, num_sequences, search_steps, HEAD_DIM, BLOCK_T,
        AT_ONCE,
    )  # fmt: skip


VARIANTS = [
    Variant(kernel, "sm90a", {"dtype": dtype}, tile)
    for dtype in ("bf16", "fp16")
    for kernel, tile in (
        (grassmann_mix_start, {"HEAD_DIM": 32, "BLOCK_T": 32, "AT_ONCE": 2, "num_warps": 2, "launch_pdl": True}),
        (grassmann_mix_bwd_weight, {"BLOCK_N": 256, "STAGES": 4, "num_warps": 4, "launch_pdl": True}),
        (
            grassmann_mix_finish,
            {"HEAD_DIM": 32, "BLOCK_T": 32, "AT_ONCE": 2, "num_warps": 2, "launch_pdl": True},
        ),
    )
]
