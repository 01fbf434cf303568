"""dq of 2-simplicial attention on Hopper, with scaled tiles as in two_simplicial_scaled.py.

With k_j = k_long * k_short[j] and v_j = v_long * v_short[j] for one short key j,

    S = q @ k_j^T    dP = dO @ v_j^T    dS = P * (dP - delta)    dq += (dS @ k_long) * k_short[j]

three products, the last with the tile as it is: k_j is rounded, and the portable kernel does not round there. The gradients of
the keys are two_simplicial_scaled_dkv.py's.
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
    _lse_and_delta,
    _new_plain,
    _new_ring,
    _own_steps,
    _pairs,
    _row_ptrs,
    _scale_tiles,
    _score_gradients,
    _sees_one_pair,
    _start_of,
    _store_rows,
)
from triton_kernels.variant import Variant


@gluon.jit
def _query_gradients(ring, plain, keys, qg_smem, warpgroup, q_ptr, out_ptr, lse_ptr, grad_out_ptr, grad_lse_ptr, has_grad_lse,
                     grad_q_ptr, minus_lse_ptr, minus_delta_ptr, stride_qn, stride_qh, stride_gn, stride_gh, out_stride, num_queries,
                     num_rows, group, past, first_row, head_dim, scale, bounds_ptr, num_bounds, HEAD_DIM: gl.constexpr,
                     BLOCK_N: gl.constexpr):  # fmt: skip
    """One of the two warpgroups that multiply: dq, and what dkv needs to know of 64 rows."""
    s_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    ds_layout: gl.constexpr = gl.DotOperandLayout(0, o_mma, 2)
    rows: gl.constexpr = gl.SliceLayout(1, s_mma)
    PAIRS: gl.constexpr = HEAD_DIM // 2
    pairs: gl.constexpr = gl.BlockedLayout([1, 4], [128 // PAIRS, PAIRS // 4], [4, 1], [1, 0])
    dtype: gl.constexpr = q_ptr.dtype.element_ty

    first_row += warpgroup * ROWS
    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, pairs))
    d = gl.arange(0, PAIRS, gl.SliceLayout(0, pairs))
    mask = (row < num_rows)[:, None] & (d < head_dim // 2)[None, :]
    q_ptrs = _row_ptrs(_pairs(q_ptr), row // group, stride_qn // 2, d) + (row % group)[:, None] * (stride_qh // 2)
    g_ptrs = _row_ptrs(_pairs(grad_out_ptr), row // group, stride_gn // 2, d) + (row % group)[:, None] * (stride_gh // 2)
    _as_pairs(qg_smem).index(warpgroup).store(gl.load(q_ptrs, mask=mask, other=0))
    # Where a row sees one pair, dS is dlse: no dO, no dP.
    pos = row // group + past
    mask &= (_sees_one_pair(pos - _start_of(pos, bounds_ptr, num_bounds), keys.w_long, keys.w_short) == 0)[:, None]
    _as_pairs(qg_smem).index(2 + warpgroup).store(gl.load(g_ptrs, mask=mask, other=0))
    fence_async_shared()
    gl.barrier()
    q = qg_smem.index(warpgroup)
    if HEAD_DIM > 64:  # at 64 ptxas (12.9, 13.4) lets dS overwrite a q in registers: wrong from the second step on
        q = q.load(gl.DotOperandLayout(0, s_mma, 2))
    grad_out = qg_smem.index(2 + warpgroup)

    row = first_row + gl.arange(0, ROWS, rows)
    pos = row // group + past
    begin = _start_of(pos, bounds_ptr, num_bounds)
    single = _sees_one_pair(pos - begin, keys.w_long, keys.w_short)
    lse2, delta = _lse_and_delta(grad_out.load(o_mma), first_row, single, out_ptr, lse_ptr, grad_lse_ptr, has_grad_lse, out_stride,
                                 num_queries, num_rows, group, head_dim)  # fmt: skip
    to_exponent = scale * LOG2E
    gl.store(minus_lse_ptr + row, -lse2, mask=row < num_rows)
    gl.store(minus_delta_ptr + row, -delta, mask=row < num_rows)

    first_pos = first_row // group + past
    last_pos = (gl.minimum(first_row + ROWS, num_rows) - 1) // group + past  # before first_pos where there are no rows
    first_start = _start_of(first_pos, bounds_ptr, num_bounds)
    last_start = _start_of(last_pos, bounds_ptr, num_bounds)
    zero_s = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, s_mma)
    zero_q = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, o_mma)
    grad_q = zero_q
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    slot = gl.to_tensor(0)
    for part in range(2):
        first_a, num_tiles, w_a, first_b, num_b, w_b = keys.part(part, BLOCK_N)
        own_first, own_num = _own_steps(first_pos, last_pos, first_start, first_b, num_b, w_b)
        for tile in range(num_tiles):
            stage, phase = ring.skip(own_first, stage, phase)
            start = first_a + tile * BLOCK_N
            # Elsewhere all rows are of one sequence, as a and b are.
            at_edge = (start + BLOCK_N - 1 > first_pos) | (start <= gl.maximum(last_pos - w_a, last_start - 1))
            for b in range(first_b + own_first, first_b + own_first + own_num):
                mbarrier.wait(ring.full.index(stage), phase)
                s = warpgroup_mma(q, ring.k.index(stage).permute((1, 0)), zero_s, use_acc=False, is_async=True)
                dp = warpgroup_mma(grad_out, ring.v.index(stage).permute((1, 0)), zero_s, use_acc=False, is_async=True)
                s, dp = warpgroup_mma_wait(0, deps=(s, dp))
                seen = (pos >= b) & (pos < b + w_b)
                ds = _score_gradients(s, dp, lse2, delta, to_exponent, start, pos, w_a, at_edge, seen, b, begin)
                ds = gl.convert_layout(ds.to(dtype), ds_layout)
                u_next = warpgroup_mma(ds, plain.tiles.index(slot), zero_q, use_acc=False, is_async=True)
                u = warpgroup_mma_wait(0, deps=(u_next,))
                factor = plain.rows.index(stage).load(gl.SliceLayout(0, o_mma))
                mbarrier.arrive(ring.empty.index(stage))
                grad_q = gl.fma(u, gl.broadcast(factor[None, :], u)[0], grad_q)
                stage, phase = ring.advance(stage, phase)
            stage, phase = ring.skip(num_b - own_first - own_num, stage, phase)
            # Not before a step of this tile was waited for: a warpgroup without steps of its own would give back the tile after
            # next, which lies in the same place, while the other one still multiplies with this.
            mbarrier.arrive(plain.empty.index(slot))
            slot ^= 1
    _store_rows(grad_q_ptr, (grad_q * scale).to(dtype), first_row, out_stride, num_rows, group, head_dim)


@gluon.jit
def two_simplicial_bwd_dq_scaled(
    q_ptr: "*dtype:16", k_long_ptr: "*dtype:16", v_long_ptr: "*dtype:16", k_short_ptr: "*dtype:16",
    v_short_ptr: "*dtype:16",
    out_ptr: "*dtype:16", lse_ptr: "*fp32:16", grad_out_ptr: "*dtype:16", grad_lse_ptr: "*fp32:16",
    grad_q_ptr: "*dtype:16", statistics_ptr: "*fp32:16",
    stride_qb: "i64:8", stride_qn: "i64:8", stride_qh: "i64:8",
    stride_klb: "i64:8", stride_kln: "i64:8", stride_klh: "i64:8",
    stride_vlb: "i64:8", stride_vln: "i64:8", stride_vlh: "i64:8",
    stride_ksb: "i64:8", stride_ksn: "i64:8", stride_ksh: "i64:8",
    stride_vsb: "i64:8", stride_vsn: "i64:8", stride_vsh: "i64:8",
    stride_gb: "i64:8", stride_gn: "i64:8", stride_gh: "i64:8",
    num_queries: "i32", num_keys: "i32", kv_heads: "i32", group: "i32", head_dim: "i32:8",
    w_long: "i32", w_short: "i32", scale: "fp32", bounds_ptr: "*i32:16", packed: "i32", has_grad_lse: "i32",
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    num_rows = num_queries * group
    num_blocks = gl.cdiv(num_rows, BLOCK_M)
    num_heads = gl.num_programs(0) // num_blocks
    first_row = (num_blocks - 1 - gl.program_id(0) // num_heads) * BLOCK_M  # the most work first
    batch_head = gl.program_id(0) % num_heads
    batch = (batch_head // kv_heads).to(gl.int64)
    kv_head = (batch_head % kv_heads).to(gl.int64)
    k_long_ptr += batch * stride_klb + kv_head * stride_klh
    v_long_ptr += batch * stride_vlb + kv_head * stride_vlh
    k_short_ptr += batch * stride_ksb + kv_head * stride_ksh
    v_short_ptr += batch * stride_vsb + kv_head * stride_vsh
    q_heads = kv_heads * group
    q_ptr += batch * stride_qb + kv_head * group * stride_qh
    grad_out_ptr += batch * stride_gb + kv_head * group * stride_gh
    first_out = (batch * num_queries * q_heads + kv_head * group) * head_dim
    first_lse = (batch * q_heads + kv_head * group) * num_queries

    # Row by row, as two_simplicial_bwd_dkv_scaled takes them: what it adds to S and dP.
    minus_lse_ptr = statistics_ptr + batch_head.to(gl.int64) * num_rows
    minus_delta_ptr = minus_lse_ptr + num_heads.to(gl.int64) * num_rows

    past = num_keys - num_queries
    num_bounds = gl.where(packed != 0, num_keys, 0)
    keys = _keys_of(first_row, num_rows, group, past, w_long, w_short, bounds_ptr, num_bounds, BLOCK_M)

    ring = _new_ring(dtype, STAGES, BLOCK_N, HEAD_DIM)
    plain = _new_plain(dtype, STAGES, BLOCK_N, HEAD_DIM)
    qg_smem = gl.allocate_shared_memory(
        dtype, [4, ROWS, HEAD_DIM], gl.NVMMASharedLayout.get_default_for([ROWS, HEAD_DIM], dtype))  # fmt: skip
    for i in gl.static_range(STAGES):
        mbarrier.init(ring.full.index(i), count=1)
        mbarrier.init(ring.empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(plain.empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_query_gradients, (ring, plain, keys, qg_smem, 0, q_ptr, out_ptr + first_out, lse_ptr + first_lse, grad_out_ptr,
                                grad_lse_ptr + first_lse, has_grad_lse, grad_q_ptr + first_out, minus_lse_ptr, minus_delta_ptr,
                                stride_qn, stride_qh, stride_gn, stride_gh, q_heads, num_queries, num_rows, group, past, first_row,
                                head_dim, scale, bounds_ptr, num_bounds, HEAD_DIM, BLOCK_N)),
            (_query_gradients, (ring, plain, keys, qg_smem, 1, q_ptr, out_ptr + first_out, lse_ptr + first_lse, grad_out_ptr,
                                grad_lse_ptr + first_lse, has_grad_lse, grad_q_ptr + first_out, minus_lse_ptr, minus_delta_ptr,
                                stride_qn, stride_qh, stride_gn, stride_gh, q_heads, num_queries, num_rows, group, past, first_row,
                                head_dim, scale, bounds_ptr, num_bounds, HEAD_DIM, BLOCK_N)),
            (_scale_tiles, (ring, plain, keys, k_long_ptr, v_long_ptr, k_short_ptr, v_short_ptr, stride_kln, stride_vln, stride_ksn,
                            stride_vsn, head_dim, HEAD_DIM, BLOCK_N, False)),
        ],
        [4, 4],
        [192, 120],
    )  # fmt: skip


# Measured on an H100: docs/kernel_trials.md. 32 keys a tile are for windows that reach no further.
VARIANTS = [
    Variant(
        two_simplicial_bwd_dq_scaled,
        "sm90a",
        {"dtype": dtype, "HEAD_DIM": head_dim, "BLOCK_N": block_n},
        {"BLOCK_M": 128, "STAGES": 3, "num_warps": 4},
    )
    for dtype, head_dim, block_n in itertools.product(("bf16", "fp16"), (64, 128), (32, 64))
]
