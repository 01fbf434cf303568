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
    ROWS,
    _in_range,
    _keys_of,
    _lane_sums,
    _load_queries,
    _new_ring,
    _over_columns,
    _own_steps,
    _scale_tiles,
    _start_of,
    _store,
    _weights,
)
from triton_kernels.variant import Variant


@gluon.jit
def _since(pos, begin, b, w_a):
    """The last key that a row does not see any more, of those it meets together with key b of the other axis: itself where b is
    of an earlier sequence. begin: where the row's sequence begins."""
    return gl.where(begin <= b, gl.maximum(pos - w_a, begin - 1), pos)


@gluon.jit
def _sums(ring, keys, stage, phase, q, pos, begin, first_pos, last_pos, first_start, last_start, to_exponent,
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
        own_first, own_num = _own_steps(first_pos, last_pos, first_start, first_b, num_b, w_b)
        for tile in range(num_tiles):
            stage, phase = ring.skip(own_first, stage, phase)
            start = first_a + tile * BLOCK_N
            a = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_mma))
            # Elsewhere all rows are of one sequence, as a and b are.
            at_edge = (start + BLOCK_N - 1 > first_pos) | (start <= gl.maximum(last_pos - w_a, last_start - 1))
            if own_num > 0:
                b = first_b + own_first
                mbarrier.wait(ring.full.index(stage), phase)
                s = warpgroup_mma(q, ring.k.index(stage).permute((1, 0)), zero_s, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(0, deps=(s,))
                seen = (pos >= b) & (pos < b + w_b)
                since = _since(pos, begin, b, w_a)
                p, ref, row_sum, alpha = _weights(
                    s, ref, row_sum, to_exponent, a, pos, since, at_edge, seen, pos >= b, True, EXACT)  # fmt: skip
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
                    seen = (pos >= b) & (pos < b + w_b)
                    since = _since(pos, begin, b, w_a)
                    p_next, ref, row_sum, alpha = _weights(
                        s, ref, row_sum, to_exponent, a, pos, since, at_edge, seen, pos >= b, EXACT, EXACT)  # fmt: skip
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
            stage, phase = ring.skip(num_b - own_first - own_num, stage, phase)
    return o, gl.convert_layout(gl.sum(row_sum, 1), gl.SliceLayout(1, s_mma)), ref, stage, phase


@gluon.jit
def _attend(ring, keys, q_smem, warpgroup, q_ptr, out_ptr, lse_ptr, stride_qn, stride_qh, out_stride, num_queries, num_rows, group,
            past, first_row, head_dim, scale, bounds_ptr, num_bounds, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr):  # fmt: skip
    """One of the two warpgroups that multiply: 64 rows from q to out and lse."""
    s_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    rows: gl.constexpr = gl.SliceLayout(1, s_mma)
    dtype: gl.constexpr = q_ptr.dtype.element_ty

    first_row += warpgroup * ROWS
    to_exponent = _load_queries(q_smem, warpgroup, q_ptr, stride_qn, stride_qh, first_row, num_rows, group, head_dim, scale)
    q = q_smem.index(warpgroup).load(gl.DotOperandLayout(0, s_mma, 2))

    row = first_row + gl.arange(0, ROWS, rows)
    pos = row // group + past
    first_pos = first_row // group + past
    last_pos = (gl.minimum(first_row + ROWS, num_rows) - 1) // group + past  # before first_pos where there are no rows
    begin = _start_of(pos, bounds_ptr, num_bounds)
    first_start = _start_of(first_pos, bounds_ptr, num_bounds)
    last_start = _start_of(last_pos, bounds_ptr, num_bounds)
    zero = gl.to_tensor(0)
    o, row_sum, ref, stage, phase = _sums(
        ring, keys, zero, zero, q, pos, begin, first_pos, last_pos, first_start, last_start, to_exponent, HEAD_DIM, BLOCK_N,
        False)  # fmt: skip

    in_range = _in_range(ring, warpgroup, o, row_sum, pos - begin, row < num_rows, keys.w_long, keys.w_short, dtype)
    # Only bad rows take what the second try says: bits of the others must not depend on their neighbours.
    _store(o, row_sum, ref, out_ptr, lse_ptr, row, (row < num_rows) & in_range, group, num_queries, out_stride, head_dim, dtype)
    if ring.is_out_of_range():
        o, row_sum, ref, stage, phase = _sums(
            ring, keys, stage, phase, q, pos, begin, first_pos, last_pos, first_start, last_start, to_exponent, HEAD_DIM, BLOCK_N,
            True)  # fmt: skip
        mask = (row < num_rows) & (in_range == 0)
        _store(o, row_sum, ref, out_ptr, lse_ptr, row, mask, group, num_queries, out_stride, head_dim, dtype)


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
    w_long: "i32", w_short: "i32", scale: "fp32", bounds_ptr: "*i32:16", packed: "i32",
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
    num_bounds = gl.where(packed != 0, num_keys, 0)
    keys = _keys_of(first_row, num_rows, group, past, w_long, w_short, bounds_ptr, num_bounds, BLOCK_M)

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
                       group, past, first_row, head_dim, scale, bounds_ptr, num_bounds, HEAD_DIM, BLOCK_N)),
            (_attend, (ring, keys, q_smem, 1, q_ptr, out_ptr, lse_ptr, stride_qn, stride_qh, q_heads, num_queries, num_rows,
                       group, past, first_row, head_dim, scale, bounds_ptr, num_bounds, HEAD_DIM, BLOCK_N)),
            (_scale_tiles, (ring, None, keys, k_long_ptr, v_long_ptr, k_short_ptr, v_short_ptr, stride_kln, stride_vln, stride_ksn,
                            stride_vsn, head_dim, HEAD_DIM, BLOCK_N, True)),
        ],
        [4, 4],
        [192, 120],  # registers; the first partition gets what is left of 504: as much as the second
    )  # fmt: skip


# Measured on an H100: docs/kernel_trials.md. 32 keys a tile are for windows that reach no further.
VARIANTS = [
    Variant(
        two_simplicial_fwd_scaled,
        "sm90a",
        {"dtype": dtype, "HEAD_DIM": head_dim, "BLOCK_N": block_n},
        {"BLOCK_M": 128, "STAGES": 3 if head_dim == 128 else 6, "num_warps": 4},
    )
    for dtype, head_dim, block_n in itertools.product(("bf16", "fp16"), (64, 128), (32, 64))
]
