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
from triton_kernels.scaled_tiles import ROWS
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
    gdc_wait()
    gdc_launch_dependents()  # what follows has one program a processor: no crowd on those that are done first
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
    """The gradient of g and the frames of 64 tokens at a time; in the memory of the former, later, tiles of the weight."""

    grad_g: gl.shared_memory_descriptor  # [stages, 64, BLOCK_N]
    frame: gl.shared_memory_descriptor  # [9 stages, 8, 64]: u, Y, and what comes after them
    full: gl.shared_memory_descriptor  # [stages] barriers
    empty: gl.shared_memory_descriptor

    @gluon.jit
    def stage(self, n):
        """Of what is loaded n-th, and the phase that is waited for there."""
        STAGES: gl.constexpr = self.full.shape[0]
        return n % STAGES, n // STAGES % 2


@gluon.jit
def _load_grad_g(tokens, grad_g_desc, first_tile, n, pred):
    stage, _phase = tokens.stage(n)
    full = tokens.full.index(stage)
    mbarrier.expect(full, ROWS * (7 * 8 * 4 + tokens.grad_g.shape[2] * 2), pred=pred)
    tma.async_load(grad_g_desc, [(first_tile + n) * ROWS, 0], full, tokens.grad_g.index(stage), pred=pred)


@gluon.jit
def _load_tokens(tokens, frame_desc, grad_g_desc, first_tile, num_tiles):
    group = gl.program_id(0) % 4
    not_needed = gl.where(group == 3, 0, gl.where(group == 2, 2, 3))  # the fourth block
    STAGES: gl.constexpr = tokens.full.shape[0]
    for n in range(gl.minimum(num_tiles, STAGES)):
        _load_grad_g(tokens, grad_g_desc, first_tile, n, True)
    gdc_wait()
    for n in range(num_tiles):
        stage, phase = tokens.stage(n)
        full = tokens.full.index(stage)
        mbarrier.wait(tokens.empty.index(stage), phase ^ 1)
        _load_grad_g(tokens, grad_g_desc, first_tile, n, n >= STAGES)
        row = (first_tile + n) * FRAME
        tma.async_load(frame_desc, [row + 64, 0], full, tokens.frame.index(stage * 9 + 8))
        for i in gl.static_range(3):
            block = i + (i >= not_needed).to(gl.int32)
            tma.async_load(frame_desc, [row + block * 8, 0], full, tokens.frame.index(stage * 9 + block))
            tma.async_load(frame_desc, [row + 32 + block * 8, 0], full, tokens.frame.index(stage * 9 + 4 + block))


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
def _sum_planes(tokens, part_ptr, tile, a, b, num_tiles, d, bias_everywhere, INSIDE: gl.constexpr):
    """A warpgroup: a tile of 64 planes."""
    BLOCK_N: gl.constexpr = tokens.grad_g.shape[2]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    sums = gl.full([64, BLOCK_N], 0.0, gl.float32, mma)
    mbarrier.wait(tokens.full.index(0), 0)
    pbar = _planes_by_token(tokens, 0, a, b, bias_everywhere, INSIDE, operand)
    for n in range(num_tiles):
        stage, _phase = tokens.stage(n)
        sums_next = warpgroup_mma(pbar, tokens.grad_g.index(stage), sums, is_async=True)
        next_stage, next_phase = tokens.stage(n + 1)
        mbarrier.wait(tokens.full.index(next_stage), next_phase, pred=n + 1 < num_tiles)
        pbar_next = _planes_by_token(tokens, next_stage, a, b, bias_everywhere, INSIDE, operand)
        sums = warpgroup_mma_wait(0, deps=(sums_next,))
        mbarrier.arrive(tokens.empty.index(stage))
        pbar = pbar_next
    row = tile * 64 + gl.arange(0, 64, gl.SliceLayout(1, mma))
    column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, mma))
    to = part_ptr + (column // 8 * (512 * 8) + column % 8)[None, :] + row[:, None] * 8
    gl.store(to, sums, mask=(column < d)[None, :])


@gluon.jit
def _sum_tile(tokens, warpgroup: gl.constexpr, part_ptr, num_tiles, d, bias_everywhere):
    """A warpgroup: a tile of 64 planes. pbar^T @ grad_g of the tokens, a part of the sum: [d / 8, 512, 8], so that a warp writes 256
    bytes side by side."""
    # Tiles 6 and 0, 3 and 1, 4 and 2, 7 and 5: planes of three blocks at most. Those inside blocks take longer and more registers.
    group = gl.program_id(0) % 4
    part_ptr += (gl.program_id(0) // 4).to(gl.int64) * 512 * d
    if warpgroup == 0:
        if (group == 0) | (group == 3):
            tile = gl.where(group == 0, 6, 7)
            a = 2 * tile - 12
            _sum_planes(tokens, part_ptr, tile, a, a + 1, num_tiles, d, bias_everywhere, True)
        else:
            _sum_planes(tokens, part_ptr, group + 2, 1, group + 1, num_tiles, d, bias_everywhere, False)
    else:
        a = gl.where(group == 3, 2, 0)
        b = gl.where(group == 3, 3, group + 1)
        _sum_planes(tokens, part_ptr, gl.where(group == 3, 5, group), a, b, num_tiles, d, bias_everywhere, False)


@triton.jit
def grassmann_mix_finish(
    valid_ptr: "*i8:16", cu_seqlens_ptr: "*i32:16", offsets_ptr: "*i32:16",
    o0: "i32", o1: "i32", o2: "i32", o3: "i32", o4: "i32", o5: "i32", o6: "i32", o7: "i32",
    frame_ptr: "*fp32", pairs_ptr: "*fp32", turn_ptr: "*fp32", grad_z_ptr: "*dtype:16", grad_stride: "i32:8",
    num_tokens: "i32", length: "i32", width: "i32:8", num_offsets: "i32",
    has_valid: "i32", num_sequences: "i32", search_steps: "i32",
    part_ptr: "*fp32:16", grad_weight_ptr: "*dtype:16", grad_bias_ptr: "*dtype:16", num_parts: "i32", d: "i32:8", r: "i32",
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_C: tl.constexpr, PARTS_AT_ONCE: tl.constexpr,
):  # fmt: skip
    """plucker_mean_bwd_token, which computes, and by further programs the gradients of the weight and of the bias, from partial
    sums [num_parts, d / 8, 512, 8], which takes memory's time."""
    gdc_wait()
    num_blocks = tl.cdiv(num_tokens, COLUMNS) * (COLUMNS // BLOCK_T)
    if tl.program_id(0) < num_blocks:
        plucker_mean_bwd_token(
            valid_ptr, cu_seqlens_ptr, offsets_ptr, o0, o1, o2, o3, o4, o5, o6, o7, frame_ptr, pairs_ptr, turn_ptr, grad_z_ptr,
            grad_stride, num_tokens, length, width, num_offsets, has_valid, num_sequences, search_steps, HEAD_DIM, BLOCK_T,
            AT_ONCE,
        )  # fmt: skip
    else:
        block = tl.program_id(0) - num_blocks
        column = block % (512 // BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
        row = block // (512 // BLOCK_C) * 8 + tl.arange(0, 8)
        part = tl.arange(0, PARTS_AT_ONCE)
        at = part_ptr + (part * 512 * d)[:, None, None] + (column * 8)[None, :, None] + (row // 8 * (512 * 8) + row % 8)[None, None, :]
        sums = tl.zeros((BLOCK_C, 8), tl.float32)
        for first in range(0, num_parts, PARTS_AT_ONCE):
            sums += tl.sum(tl.load(at, mask=(first + part < num_parts)[:, None, None], other=0.0), 0)
            at += PARTS_AT_ONCE * 512 * d
        plane, ok = _plane_of(column, r)
        to = grad_weight_ptr + row.to(tl.int64)[None, :] * (r * (r - 1) // 2) + plane[:, None]
        sums = sums.to(grad_weight_ptr.dtype.element_ty)
        tl.store(to, sums, mask=ok[:, None])
        tl.store(grad_bias_ptr + row[None, :] + 0 * column[:, None], sums, mask=(column == BIAS)[:, None])


VARIANTS = [
    Variant(kernel, "sm90a", {"dtype": dtype}, tile)
    for dtype in ("bf16", "fp16")
    for kernel, tile in (
        (grassmann_mix_start, {"HEAD_DIM": 32, "BLOCK_T": 32, "AT_ONCE": 2, "num_warps": 2, "launch_pdl": True}),
        (
            grassmann_mix_finish,
            {"HEAD_DIM": 32, "BLOCK_T": 32, "AT_ONCE": 2, "BLOCK_C": 32, "PARTS_AT_ONCE": 16, "num_warps": 2, "launch_pdl": True},
        ),
    )
]
