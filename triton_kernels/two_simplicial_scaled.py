"""2-simplicial attention on Hopper: the tiles of the long axis are scaled by the short rows, not the queries.

For one short key j, two_simplicial_attention.py's A = q * k_short[j] can be moved to the other factor of each product:

    S = q @ (k_long * k_short[j])^T        out += P @ (v_long * v_short[j])

Then every query that sees j shares the scaled tiles, q never changes, and out is summed inside the tensor cores: no product
P @ v_long of its own, no multiply-add on it. One warpgroup holds a tile of K and V in registers and writes their scaled
copies, one pair for each short key, into a ring in shared memory; two warpgroups of 64 rows each turn them into products.

The softmax has no running maximum. A row's exponents are relative to a reference, raised once per tile of the long axis; the
weights of later pairs may exceed 1, which bf16 and fp32 hold up to 2^127. A warpgroup whose sums left that range (or, in
fp16, fell below what its weights resolve) has the block done again with the running maximum, so the result is right for every
input and only its time depends on the logits.
"""

import itertools

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from triton_kernels.scaled_tiles import (
    LOG2E,
    ROWS,
    _as_pairs,
    _keys_of,
    _new_ring,
    _own_steps,
    _pairs,
    _row_ptrs,
    _scale_tiles,
    _skip,
)
from triton_kernels.variant import Variant

LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _lane_sums(p):
    """Sums over the columns that a thread holds; the four lanes of a row are added at the end."""
    return gl.sum(gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def _over_columns(x, like):
    return gl.convert_layout(x, gl.SliceLayout(1, like.type.layout))[:, None]


@gluon.jit
def _weights(s, ref, row_sum, to_exponent, a, pos, w_a, at_edge, b, w_b, REBASE: gl.constexpr, EXACT: gl.constexpr):
    """P = exp2(S - ref), a reference and sums to go on with, and the factor that earlier sums of P @ V need for it."""
    seen = (pos >= b) & (pos < b + w_b)
    if EXACT or at_edge:
        valid = (a[None, :] <= pos[:, None]) & (a[None, :] > pos[:, None] - w_a)
        s = gl.where(valid & seen[:, None] if EXACT else valid, s, float("-inf"))
    alpha = ref
    if REBASE:
        # Without EXACT any logit of the past will do, seen or not: rows that this takes out of range are done again.
        new_ref = gl.maximum(ref, gl.where(pos >= b, gl.max(s, 1) * to_exponent, float("-inf")))
        # A row without a logit so far: 0 avoids -inf - -inf.
        finite_ref = gl.where(new_ref == float("-inf"), 0.0, new_ref)
        alpha = gl.exp2(ref - finite_ref)
        row_sum = row_sum * _over_columns(alpha, row_sum)
        ref = new_ref if EXACT else finite_ref
    shift = gl.where(seen, gl.where(ref == float("-inf"), 0.0, -ref) if EXACT else -ref, float("-inf"))
    p = gl.exp2(gl.fma(s, gl.full_like(s, to_exponent), gl.broadcast(shift[:, None], s)[0]))
    return p, ref, row_sum + _lane_sums(p), alpha


@gluon.jit
def _sums(ring, keys, stage, phase, q, pos, first_pos, last_pos, to_exponent,
          HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, EXACT: gl.constexpr):  # fmt: skip
    """A warpgroup's sums of P @ V and P over all pairs, relative to a reference of each row. EXACT: its running maximum."""
    s_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_mma, 2)
    ref = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_mma))
    zero_s = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, s_mma)
    row_sum = _lane_sums(zero_s)
    o = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, o_mma)
    for part in range(2):
        first_a, num_tiles, w_a, first_b, num_b, w_b = keys.part(part, BLOCK_N)
        own_first, own_num = _own_steps(first_pos, last_pos, first_b, num_b, w_b)
        for tile in range(num_tiles):
            stage, phase = _skip(ring.full, ring.empty, own_first, stage, phase)
            start = first_a + tile * BLOCK_N
            a = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_mma))
            at_edge = (start + BLOCK_N - 1 > first_pos) | (start <= last_pos - w_a)
            if own_num > 0:
                b = first_b + own_first
                mbarrier.wait(ring.full.index(stage), phase)
                s = warpgroup_mma(q, ring.k.index(stage).permute((1, 0)), zero_s, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(0, deps=(s,))
                p, ref, row_sum, alpha = _weights(s, ref, row_sum, to_exponent, a, pos, w_a, at_edge, b, w_b, True, EXACT)
                o = o * _over_columns(alpha, o)
                p = gl.convert_layout(p.to(q.dtype), p_layout)
                v_stage = stage
                stage, phase = ring.advance(stage, phase)
                mbarrier.wait(ring.full.index(stage), phase, pred=own_num > 1)
                for i in range(1, own_num):
                    b += 1
                    # P @ V of the step before runs while the weights of this one are computed.
                    s_next = warpgroup_mma(q, ring.k.index(stage).permute((1, 0)), zero_s, use_acc=False, is_async=True)
                    o_next = warpgroup_mma(p, ring.v.index(v_stage), o, is_async=True)
                    s = warpgroup_mma_wait(1, deps=(s_next,))
                    p_next, ref, row_sum, alpha = _weights(
                        s, ref, row_sum, to_exponent, a, pos, w_a, at_edge, b, w_b, EXACT, EXACT)  # fmt: skip
                    done_stage = v_stage
                    v_stage = stage
                    stage, phase = ring.advance(stage, phase)
                    # The next tiles are waited for here and not at the top: without something in between, ptxas moves the
                    # end of P @ V in front of the exponentials, and nothing overlaps.
                    mbarrier.wait(ring.full.index(stage), phase, pred=i + 1 < own_num)
                    o = warpgroup_mma_wait(0, deps=(o_next,))
                    mbarrier.arrive(ring.empty.index(done_stage))
                    if EXACT:
                        o = o * _over_columns(alpha, o)
                    p = gl.convert_layout(p_next.to(q.dtype), p_layout)
                o_next = warpgroup_mma(p, ring.v.index(v_stage), o, is_async=True)
                o = warpgroup_mma_wait(0, deps=(o_next,))
                mbarrier.arrive(ring.empty.index(v_stage))
            stage, phase = _skip(ring.full, ring.empty, num_b - own_first - own_num, stage, phase)
    return o, gl.convert_layout(gl.sum(row_sum, 1), gl.SliceLayout(1, s_mma)), ref, stage, phase


@gluon.jit
def _store(o, row_sum, ref, out_ptr, lse_ptr, row, mask, group, num_queries, out_stride, head_dim, dtype: gl.constexpr):
    HEAD_DIM: gl.constexpr = o.shape[1]
    o_rows: gl.constexpr = gl.SliceLayout(1, o.type.layout)
    gl.store(lse_ptr + (row % group).to(gl.int64) * num_queries + row // group, (ref + gl.log2(row_sum)) * LN2, mask=mask)
    row = gl.convert_layout(row, o_rows)
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, o.type.layout))
    out_ptrs = _row_ptrs(out_ptr, (row // group).to(gl.int64) * out_stride + row % group, head_dim, d)
    out_mask = gl.convert_layout(mask, o_rows)[:, None] & (d < head_dim)[None, :]
    gl.store(out_ptrs, (o / _over_columns(row_sum, o)).to(dtype), mask=out_mask)


@gluon.jit
def _attend(ring, keys, q_smem, warpgroup, q_ptr, out_ptr, lse_ptr, stride_qn, stride_qh, out_stride, num_queries, num_rows, group,
            past, first_row, head_dim, scale, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr):  # fmt: skip
    """One of the two warpgroups that multiply: 64 rows from q to out and lse."""
    s_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    rows: gl.constexpr = gl.SliceLayout(1, s_mma)
    PAIRS: gl.constexpr = HEAD_DIM // 2
    pairs: gl.constexpr = gl.BlockedLayout([1, 4], [128 // PAIRS, PAIRS // 4], [4, 1], [1, 0])
    dtype: gl.constexpr = q_ptr.dtype.element_ty

    first_row += warpgroup * ROWS
    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, pairs))
    d = gl.arange(0, PAIRS, gl.SliceLayout(0, pairs))
    q_ptrs = _row_ptrs(_pairs(q_ptr), row // group, stride_qn // 2, d) + (row % group)[:, None] * (stride_qh // 2)
    q = gl.load(q_ptrs, mask=(row < num_rows)[:, None] & (d < head_dim // 2)[None, :], other=0)
    # The sign of scale goes to q (both halves' sign bits), so that the maximum of S is the maximum of the logits. A scale
    # of 0 becomes one that is 0 to every finite logit but keeps -inf * scale == -inf.
    q = q ^ gl.where(scale < 0, -0x7FFF8000, 0)
    to_exponent = gl.maximum(gl.maximum(scale, -scale) * LOG2E, 1e-30)
    _as_pairs(q_smem).index(warpgroup).store(q)
    gl.barrier()
    q = q_smem.index(warpgroup).load(gl.DotOperandLayout(0, s_mma, 2))

    row = first_row + gl.arange(0, ROWS, rows)
    pos = row // group + past
    first_pos = first_row // group + past
    last_pos = (gl.minimum(first_row + ROWS, num_rows) - 1) // group + past  # before first_pos where there are no rows
    begin = gl.to_tensor(0)
    o, row_sum, ref, stage, phase = _sums(
        ring, keys, begin, begin, q, pos, first_pos, last_pos, to_exponent, HEAD_DIM, BLOCK_N, False)  # fmt: skip

    # Weights overflow far above the reference. Far below it, fp16 ones lose bits (2^-25 each at most, so that 2^-12 of the sum
    # may be lost) and bf16 ones do not.
    least = gl.full_like(row_sum, 1e-20)
    if dtype == gl.float16:
        pairs = gl.minimum(pos + 1, keys.w_long).to(gl.float32) * gl.minimum(pos + 1, keys.w_short).to(gl.float32)
        least = gl.maximum(pairs * 2.0**-13, 0.5)
    in_range = (row_sum >= least) & (row_sum + gl.convert_layout(gl.sum(o * 0.0, 1), rows) < float("inf"))
    bad = (row < num_rows) & (in_range == 0)
    flag: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    ring.redo.index(warpgroup).store(gl.full([1], 0, gl.int32, flag) + gl.max(bad.to(gl.int32), 0))
    mbarrier.arrive(ring.verdict)
    # Only bad rows take what the second try says: bits of the others must not depend on their neighbours.
    _store(o, row_sum, ref, out_ptr, lse_ptr, row, (row < num_rows) & in_range, group, num_queries, out_stride, head_dim, dtype)
    if ring.is_out_of_range():
        o, row_sum, ref, stage, phase = _sums(
            ring, keys, stage, phase, q, pos, first_pos, last_pos, to_exponent, HEAD_DIM, BLOCK_N, True)  # fmt: skip
        _store(o, row_sum, ref, out_ptr, lse_ptr, row, bad, group, num_queries, out_stride, head_dim, dtype)


@gluon.jit
def two_simplicial_fwd_scaled(
    q_ptr: "*dtype:16", k_long_ptr: "*dtype:16", v_long_ptr: "*dtype:16", k_short_ptr: "*dtype:16",
    v_short_ptr: "*dtype:16",
    out_ptr: "*dtype:16", lse_ptr: "*fp32:16",
    stride_qb: "i64:8", stride_qn: "i64:8", stride_qh: "i64:8",
    stride_klb: "i64:8", stride_kln: "i64:8", stride_klh: "i64:8",
    stride_vlb: "i64:8", stride_vln: "i64:8", stride_vlh: "i64:8",
    stride_ksb: "i64:8", stride_ksn: "i64:8", stride_ksh: "i64:8",
    stride_vsb: "i64:8", stride_vsn: "i64:8", stride_vsh: "i64:8",
    num_queries: "i32", num_keys: "i32", kv_heads: "i32", group: "i32", head_dim: "i32:8",
    w_long: "i32", w_short: "i32", scale: "fp32",
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    num_rows = num_queries * group
    num_blocks = gl.cdiv(num_rows, BLOCK_M)
    num_heads = gl.num_programs(0) // num_blocks
    # The last tokens see the most pairs: they go first, and the short work fills the gaps at the end.
    first_row = (num_blocks - 1 - gl.program_id(0) // num_heads) * BLOCK_M
    batch_head = gl.program_id(0) % num_heads
    batch = (batch_head // kv_heads).to(gl.int64)
    kv_head = (batch_head % kv_heads).to(gl.int64)
    k_long_ptr += batch * stride_klb + kv_head * stride_klh
    v_long_ptr += batch * stride_vlb + kv_head * stride_vlh
    k_short_ptr += batch * stride_ksb + kv_head * stride_ksh
    v_short_ptr += batch * stride_vsb + kv_head * stride_vsh
    q_heads = kv_heads * group
    q_ptr += batch * stride_qb + kv_head * group * stride_qh
    out_ptr += (batch * num_queries * q_heads + kv_head * group) * head_dim
    lse_ptr += (batch * q_heads + kv_head * group) * num_queries

    past = num_keys - num_queries
    keys = _keys_of(first_row, num_rows, group, past, w_long, w_short, BLOCK_M)

    ring = _new_ring(dtype, STAGES, BLOCK_N, HEAD_DIM)
    q_smem = gl.allocate_shared_memory(
        dtype, [2, ROWS, HEAD_DIM], gl.NVMMASharedLayout.get_default_for([ROWS, HEAD_DIM], dtype))  # fmt: skip
    for i in gl.static_range(STAGES):
        mbarrier.init(ring.full.index(i), count=1)
        mbarrier.init(ring.empty.index(i), count=2)
    mbarrier.init(ring.verdict, count=2)
    fence_async_shared()

    gl.warp_specialize(
        [
            (_attend, (ring, keys, q_smem, 0, q_ptr, out_ptr, lse_ptr, stride_qn, stride_qh, q_heads, num_queries, num_rows,
                       group, past, first_row, head_dim, scale, HEAD_DIM, BLOCK_N)),
            (_attend, (ring, keys, q_smem, 1, q_ptr, out_ptr, lse_ptr, stride_qn, stride_qh, q_heads, num_queries, num_rows,
                       group, past, first_row, head_dim, scale, HEAD_DIM, BLOCK_N)),
            (_scale_tiles, (ring, keys, k_long_ptr, v_long_ptr, k_short_ptr, v_short_ptr, stride_kln, stride_vln, stride_ksn,
                            stride_vsn, head_dim, HEAD_DIM, BLOCK_N, True)),
        ],
        [4, 4],
        [192, 120],  # registers; the first partition gets what is left of 504: as much as the second
    )  # fmt: skip


# Measured on an H100: docs/kernels.md.
VARIANTS = [
    Variant(
        two_simplicial_fwd_scaled,
        "sm90a",
        {"dtype": dtype, "HEAD_DIM": head_dim},
        {"BLOCK_M": 128, "BLOCK_N": 64, "STAGES": 3 if head_dim == 128 else 6, "num_warps": 4},
    )
    for dtype, head_dim in itertools.product(("bf16", "fp16"), (64, 128))
]
