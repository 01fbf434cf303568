"""The gradients of the keys and values of 2-simplicial attention on Hopper (two_simplicial_scaled_dq.py has that of q).

A block holds a tile of the long axis and takes one short key j after the other, with its scaled tiles k_j and v_j. The sums
over all rows that see both,

    G = dS^T @ q    H = P^T @ dO

stay in the tensor cores, and give all four gradients once per short key:

    dk_long += k_short[j] * G    dk_short[j] += sum_n k_long[n] * G[n]    (the values alike, with H)

So with dq's three products there are seven in all instead of eight, and the short gradients cost none. Partial sums are added
up in a fixed order by two_simplicial_bwd_sum (long) and two_simplicial_bwd_merge (short): no atomics between threads.
"""

import itertools

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate

from triton_kernels.scaled_tiles import (
    LOG2E,
    ROWS,
    _advance,
    _as_pairs,
    _multiply_pairs,
    _pairs,
    _row_ptrs,
    _sees_one_pair,
)
from triton_kernels.variant import Variant


@aggregate
class Stream:
    """Rows of q and dO on their way to the warpgroups, 64 at a time."""

    q: gl.shared_memory_descriptor  # [stages, 64, HEAD_DIM]
    grad_out: gl.shared_memory_descriptor
    lse: gl.shared_memory_descriptor  # [stages, 64]
    delta: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor  # [stages] barriers
    empty: gl.shared_memory_descriptor

    @gluon.jit
    def advance(self, stage, phase):
        return _advance(self.full, stage, phase)


@gluon.jit
def _rows_of(j, first_n, last_n, num_keys, past, group, w_long, w_short):
    """First and end row of those that see short key j and some of the long keys."""
    first_pos = gl.maximum(gl.maximum(j, first_n), past)
    last_pos = gl.minimum(gl.minimum(j + w_short, last_n + w_long), num_keys) - 1
    first = (first_pos - past) * group
    return first, gl.maximum((last_pos + 1 - past) * group, first)


@gluon.jit
def _stream_rows(stream, q_ptr, grad_out_ptr, lse_ptr, delta_ptr, stride_qn, stride_qh, stride_gn, stride_gh, first_j, end_j, first_n,
                 last_n, num_queries, num_keys, past, group, head_dim, w_long, w_short, HEAD_DIM: gl.constexpr):  # fmt: skip
    """The helper: the rows of every short key, in the order in which the warpgroups take them."""
    CHUNK: gl.constexpr = 1024 // HEAD_DIM  # rows that the threads load at once, 16 bytes each: more take too many registers
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    line: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    stage = 0
    phase = 1
    before = -1
    for j in range(first_j, end_j):
        first, end = _rows_of(j, first_n, last_n, num_keys, past, group, w_long, w_short)
        for start in range(first, end, ROWS):
            mbarrier.wait(stream.empty.index(stage), phase)
            # Rows past the end become zeros, which add nothing to any gradient.
            line_row = start + gl.arange(0, ROWS, line)
            lse_row = (line_row % group).to(gl.int64) * num_queries + line_row // group
            async_copy.async_load(stream.lse.index(stage), lse_ptr + lse_row, mask=line_row < end)
            async_copy.async_load(stream.delta.index(stage), delta_ptr + lse_row, mask=line_row < end)
            for chunk in gl.static_range(ROWS // CHUNK):
                row = start + chunk * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(1, layout))
                mask = (row < end)[:, None] & (d < head_dim)[None, :]
                token = row // group
                head = (row - token * group)[:, None]
                q_ptrs = _row_ptrs(q_ptr, token, stride_qn, d) + head * stride_qh
                async_copy.async_load(stream.q.index(stage).slice(chunk * CHUNK, CHUNK), q_ptrs, mask=mask)
                g_ptrs = _row_ptrs(grad_out_ptr, token, stride_gn, d) + head * stride_gh
                async_copy.async_load(stream.grad_out.index(stage).slice(chunk * CHUNK, CHUNK), g_ptrs, mask=mask)
            async_copy.commit_group()
            if before >= 0:
                async_copy.wait_group(1)
                fence_async_shared()
                mbarrier.arrive(stream.full.index(before))
            before = stage
            stage, phase = stream.advance(stage, phase)
    if before >= 0:
        async_copy.wait_group(0)
        fence_async_shared()
        mbarrier.arrive(stream.full.index(before))


@gluon.jit
def _add_long(ptr, gradient, short_row_ptr, is_first, n, d, head_dim, mask):
    """A warpgroup's own fp32 rows += short row * gradient.

    Each element belongs to one thread, whose additions arrive in its order: no race, and nothing waits for the old value.
    """
    short_row = gl.load(short_row_ptr + d, mask=d < head_dim, other=0.0).to(gl.float32)
    ptrs = _row_ptrs(ptr, n, head_dim, d)
    added = gradient * short_row[None, :]
    if is_first:
        gl.store(ptrs, added, mask=mask)
    else:
        gl.atomic_add(ptrs, added, mask=mask, sem="relaxed")


@gluon.jit
def _key_gradients(stream, tiles, scaled, warpgroup, k_long_ptr, v_long_ptr, k_short_ptr, v_short_ptr, part_k_ptr, part_v_ptr,
                   part_ks_ptr, part_vs_ptr, stride_kln, stride_vln, stride_ksn, stride_vsn, first_j, end_j, first_n, last_n, num_keys,
                   past, group, head_dim, w_long, w_short, scale, HEAD_DIM: gl.constexpr):  # fmt: skip
    """One of the two warpgroups that multiply: its 64 long keys' gradients, and what they give to the short keys'."""
    s_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    o_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_mma, 2)
    columns: gl.constexpr = gl.SliceLayout(0, s_mma)
    PAIRS: gl.constexpr = HEAD_DIM // 2
    pairs: gl.constexpr = gl.BlockedLayout([1, 4], [128 // PAIRS, PAIRS // 4], [4, 1], [1, 0])
    dtype: gl.constexpr = k_long_ptr.dtype.element_ty
    k_tile = tiles.index(warpgroup)
    v_tile = tiles.index(2 + warpgroup)
    k_scaled = scaled.index(warpgroup)
    v_scaled = scaled.index(2 + warpgroup)

    own_n = first_n + warpgroup * ROWS
    own_last = gl.minimum(own_n + ROWS, num_keys) - 1  # before own_n where there are no keys
    n = own_n + gl.arange(0, ROWS, gl.SliceLayout(1, pairs))
    pair = gl.arange(0, PAIRS, gl.SliceLayout(0, pairs))
    pair_ok = pair < head_dim // 2
    mask = (n < num_keys)[:, None] & pair_ok[None, :]
    _as_pairs(tiles).index(warpgroup).store(gl.load(_row_ptrs(_pairs(k_long_ptr), n, stride_kln // 2, pair), mask=mask, other=0))
    _as_pairs(tiles).index(2 + warpgroup).store(gl.load(_row_ptrs(_pairs(v_long_ptr), n, stride_vln // 2, pair), mask=mask, other=0))
    gl.barrier()

    n = own_n + gl.arange(0, ROWS, gl.SliceLayout(1, s_mma))
    # The rows that see key n, as numbers of rows: to divide those by the group instead would take longer than the products.
    sees_from = (n - past) * group
    sees_until = (n - past + gl.minimum(w_long, num_keys)) * group
    local_n = warpgroup * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, o_mma))
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, o_mma))
    out_mask = (first_n + local_n < num_keys)[:, None] & (d < head_dim)[None, :]
    # exp(scale * s - lse) as exp2(to_exponent * (s - lse * per_lse)); a scale of 0 becomes one that is 0 to any finite s.
    to_exponent = gl.where(gl.maximum(scale, -scale) * LOG2E < 1e-30, 1e-30, scale * LOG2E)
    per_lse = LOG2E / to_exponent
    zero_s = gl.full([ROWS, ROWS], 0.0, gl.float32, s_mma)
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    if end_j <= first_j:  # a split without short keys: its sums are 0
        nothing = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, o_mma)
        gl.store(_row_ptrs(part_k_ptr, local_n, head_dim, d), nothing, mask=out_mask)
        gl.store(_row_ptrs(part_v_ptr, local_n, head_dim, d), nothing, mask=out_mask)
    for j in range(first_j, end_j):
        k_row = gl.load(_pairs(k_short_ptr) + j.to(gl.int64) * (stride_ksn // 2) + pair, mask=pair_ok, other=0)
        v_row = gl.load(_pairs(v_short_ptr) + j.to(gl.int64) * (stride_vsn // 2) + pair, mask=pair_ok, other=0)
        k = _as_pairs(tiles).index(warpgroup).load(pairs)
        v = _as_pairs(tiles).index(2 + warpgroup).load(pairs)
        gl.barrier()  # all warps are done with the scaled tiles of the short key before
        _as_pairs(scaled).index(warpgroup).store(_multiply_pairs(k, gl.broadcast(k_row[None, :], k)[0], dtype))
        _as_pairs(scaled).index(2 + warpgroup).store(_multiply_pairs(v, gl.broadcast(v_row[None, :], v)[0], dtype))
        fence_async_shared()
        gl.barrier()

        grad_k = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, o_mma)
        grad_v = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, o_mma)
        first, end = _rows_of(j, first_n, last_n, num_keys, past, group, w_long, w_short)
        for start in range(first, end, ROWS):
            first_pos = start // group + past
            last_pos = (gl.minimum(start + ROWS, end) - 1) // group + past
            mbarrier.wait(stream.full.index(stage), phase)
            if (own_n <= last_pos) & (own_last > first_pos - w_long):
                q = stream.q.index(stage)
                grad_out = stream.grad_out.index(stage)
                # lse and delta are where the products start from, which takes no registers of their own.
                minus_lse = gl.broadcast((stream.lse.index(stage).load(columns) * -per_lse)[None, :], zero_s)[0]
                minus_delta = gl.broadcast((-stream.delta.index(stage).load(columns))[None, :], zero_s)[0]
                s_next = warpgroup_mma(k_scaled, q.permute((1, 0)), minus_lse, is_async=True)
                dp_next = warpgroup_mma(v_scaled, grad_out.permute((1, 0)), minus_delta, is_async=True)
                s = warpgroup_mma_wait(1, deps=(s_next,))
                p = gl.exp2(s * to_exponent)
                dp = warpgroup_mma_wait(0, deps=(dp_next,))
                ds = p * dp
                if (own_n + ROWS - 1 > first_pos) | (own_n <= last_pos - w_long) | _sees_one_pair(first_pos, w_long, w_short):
                    row = start + gl.arange(0, ROWS, columns)
                    valid = (row[None, :] >= sees_from[:, None]) & (row[None, :] < sees_until[:, None])
                    p = gl.where(valid, p, 0.0)
                    single = (row < group * (past == 0)) | (w_long + w_short == 2)
                    delta = stream.delta.index(stage).load(columns)
                    ds = gl.where(valid, gl.where(single[None, :], -delta[None, :], ds), 0.0)
                p = gl.convert_layout(p.to(dtype), p_layout)
                ds = gl.convert_layout(ds.to(dtype), p_layout)
                grad_v_next = warpgroup_mma(p, grad_out, grad_v, is_async=True)
                grad_k_next = warpgroup_mma(ds, q, grad_k, is_async=True)
                grad_k, grad_v = warpgroup_mma_wait(0, deps=(grad_k_next, grad_v_next))
            mbarrier.arrive(stream.empty.index(stage))
            stage, phase = stream.advance(stage, phase)

        _add_long(part_k_ptr, grad_k, k_short_ptr + j.to(gl.int64) * stride_ksn, j == first_j, local_n, d, head_dim, out_mask)
        _add_long(part_v_ptr, grad_v, v_short_ptr + j.to(gl.int64) * stride_vsn, j == first_j, local_n, d, head_dim, out_mask)
        short = j - (own_n - w_short + 1)
        if (own_n < num_keys) & (short >= 0) & (short < ROWS + w_long + w_short - 2):
            offset = (short.to(gl.int64) + warpgroup * (ROWS + w_long + w_short - 2)) * head_dim
            sum_k = gl.sum(k_tile.load(o_mma).to(gl.float32) * grad_k, 0)
            gl.store(part_ks_ptr + offset + d, sum_k, mask=d < head_dim)
            sum_v = gl.sum(v_tile.load(o_mma).to(gl.float32) * grad_v, 0)
            gl.store(part_vs_ptr + offset + d, sum_v, mask=d < head_dim)


@gluon.jit
def two_simplicial_bwd_dkv_scaled(
    q_ptr: "*dtype:16", k_long_ptr: "*dtype:16", v_long_ptr: "*dtype:16", k_short_ptr: "*dtype:16",
    v_short_ptr: "*dtype:16",
    lse_ptr: "*fp32:16", grad_out_ptr: "*dtype:16", delta_ptr: "*fp32:16",
    part_k_ptr: "*fp32:16", part_v_ptr: "*fp32:16", part_ks_ptr: "*fp32:16", part_vs_ptr: "*fp32:16",
    stride_qb: "i64:8", stride_qn: "i64:8", stride_qh: "i64:8",
    stride_klb: "i64:8", stride_kln: "i64:8", stride_klh: "i64:8",
    stride_vlb: "i64:8", stride_vln: "i64:8", stride_vlh: "i64:8",
    stride_ksb: "i64:8", stride_ksn: "i64:8", stride_ksh: "i64:8",
    stride_vsb: "i64:8", stride_vsn: "i64:8", stride_vsh: "i64:8",
    stride_gb: "i64:8", stride_gn: "i64:8", stride_gh: "i64:8",
    num_queries: "i32", num_keys: "i32", kv_heads: "i32", group: "i32", head_dim: "i32:8",
    w_long: "i32", w_short: "i32", scale: "fp32", num_splits: "i32",
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Partial sums: of dk_long, dv_long for each of num_splits programs of a block of keys, which share its short keys; of
    dk_short, dv_short for each 64 long keys, rows first of these keys - w_short + 1 .. last + w_long - 1."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    past = num_keys - num_queries
    num_blocks = gl.cdiv(num_keys, BLOCK_N)
    split = gl.program_id(0) % num_splits
    block = gl.program_id(0) // num_splits % num_blocks
    batch_head = gl.program_id(0) // num_splits // num_blocks
    batch = (batch_head // kv_heads).to(gl.int64)
    kv_head = (batch_head % kv_heads).to(gl.int64)
    k_long_ptr += batch * stride_klb + kv_head * stride_klh
    v_long_ptr += batch * stride_vlb + kv_head * stride_vlh
    k_short_ptr += batch * stride_ksb + kv_head * stride_ksh
    v_short_ptr += batch * stride_vsb + kv_head * stride_vsh
    q_ptr += batch * stride_qb + kv_head * group * stride_qh
    grad_out_ptr += batch * stride_gb + kv_head * group * stride_gh
    first_lse = (batch * kv_heads * group + kv_head * group) * num_queries
    first_part = gl.program_id(0).to(gl.int64) * BLOCK_N * head_dim
    first_short = (batch_head.to(gl.int64) * gl.cdiv(num_keys, ROWS) + block * 2) * (ROWS + w_long + w_short - 2) * head_dim

    first_n = block * BLOCK_N
    last_n = gl.minimum(first_n + BLOCK_N, num_keys) - 1
    first_j = gl.maximum(first_n - w_short + 1, 0)
    num_j = gl.minimum(first_n + BLOCK_N + w_long - 1, num_keys) - first_j
    share = gl.cdiv(num_j, num_splits)
    end_j = first_j + gl.minimum((split + 1) * share, num_j)
    first_j += split * share

    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, HEAD_DIM], dtype)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    stream = Stream(
        gl.allocate_shared_memory(dtype, [STAGES, ROWS, HEAD_DIM], tile),
        gl.allocate_shared_memory(dtype, [STAGES, ROWS, HEAD_DIM], tile),
        gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], line),
        gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], line),
        mbarrier.allocate_mbarrier(batch=STAGES),
        mbarrier.allocate_mbarrier(batch=STAGES),
    )
    tiles = gl.allocate_shared_memory(dtype, [4, ROWS, HEAD_DIM], tile)
    scaled = gl.allocate_shared_memory(dtype, [4, ROWS, HEAD_DIM], tile)
    for i in gl.static_range(STAGES):
        mbarrier.init(stream.full.index(i), count=1)
        mbarrier.init(stream.empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_key_gradients, (stream, tiles, scaled, 0, k_long_ptr, v_long_ptr, k_short_ptr, v_short_ptr, part_k_ptr + first_part,
                              part_v_ptr + first_part, part_ks_ptr + first_short, part_vs_ptr + first_short, stride_kln, stride_vln,
                              stride_ksn, stride_vsn, first_j, end_j, first_n, last_n, num_keys, past, group, head_dim, w_long,
                              w_short, scale, HEAD_DIM)),
            (_key_gradients, (stream, tiles, scaled, 1, k_long_ptr, v_long_ptr, k_short_ptr, v_short_ptr, part_k_ptr + first_part,
                              part_v_ptr + first_part, part_ks_ptr + first_short, part_vs_ptr + first_short, stride_kln, stride_vln,
                              stride_ksn, stride_vsn, first_j, end_j, first_n, last_n, num_keys, past, group, head_dim, w_long,
                              w_short, scale, HEAD_DIM)),
            (_stream_rows, (stream, q_ptr, grad_out_ptr, lse_ptr + first_lse, delta_ptr + first_lse, stride_qn, stride_qh, stride_gn,
                            stride_gh, first_j, end_j, first_n, last_n, num_queries, num_keys, past, group, head_dim, w_long, w_short,
                            HEAD_DIM)),
        ],
        [4, 4],
        [232, 40],
    )  # fmt: skip


# Measured on an H100: docs/kernels.md.
VARIANTS = [
    Variant(
        two_simplicial_bwd_dkv_scaled,
        "sm90a",
        {"dtype": dtype, "HEAD_DIM": head_dim},
        {"BLOCK_N": 128, "STAGES": 3, "num_warps": 4},
    )
    for dtype, head_dim in itertools.product(("bf16", "fp16"), (64, 128))
]
