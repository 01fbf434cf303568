"""dq and the gradients of the short keys and values on Hopper, for few heads per kv head: two_simplicial_skewed.py's walk.

At offset o a row (t, head) has A = q * k_short[t - o] and B = dO * v_short[t - o], and over the whole long window

    S = A @ k_long^T    dP = B @ v_long^T    dS = P * (dP - delta)    U = dS @ k_long    W = P @ v_long

U and W stay in registers through the window, and give three gradients once per offset:

    dq += k_short[t - o] * U        dk_short[t - o] += q * U        dv_short[t - o] += dO * W

dq is summed in shared memory. The rows of the short gradients are added to fp32 rows of this warpgroup's own, one offset and one
turn of a token's heads after the other, and two_simplicial_bwd_merge adds those of all warpgroups in a fixed order.
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
    _columns,
    _lse_and_delta,
    _multiply_pairs,
    _new_ring,
    _pairs,
    _row_ptrs,
    _sees_one_pair,
    _store_rows,
)
from triton_kernels.skewed_rows import (
    PAIR_RUNS,
    RUNS,
    _add_rows,
    _as_chunks,
    _as_rows,
    _chunk_layout,
    _clear,
    _floats,
    _load_pairs,
    _rows_from,
)
from triton_kernels.two_simplicial_skewed import _band_of, _block_of, _load_tiles
from triton_kernels.variant import Variant


@gluon.jit
def _fetch_tiles(ring, band, k_desc, v_desc, batch, kv_head):
    stage = 0
    phase = 1
    for _ in range(band.num_offsets):
        stage, phase = _load_tiles(ring, band, stage, phase, k_desc, v_desc, batch, kv_head)


@gluon.jit
def _store_operands(q, ab, k_short, v_short, grad_out, dtype: gl.constexpr):
    """A = q * k_short and B = dO * v_short of an offset, in pairs."""
    ab.index(0).store(_multiply_pairs(q.load(PAIR_RUNS), _as_rows(k_short, PAIR_RUNS), dtype))
    ab.index(1).store(_multiply_pairs(_as_rows(grad_out, PAIR_RUNS), _as_rows(v_short, PAIR_RUNS), dtype))
    fence_async_shared()
    gl.barrier()


@gluon.jit
def _first_operands(q, ab, rows, k_short_ptr, v_short_ptr, grad_out_ptr, stride_ksn, stride_vsn, stride_gn, stride_gh, past, head_dim,
                    dtype: gl.constexpr):  # fmt: skip
    """Those of offset 0."""
    HEAD_DIM: gl.constexpr = 2 * q.shape[1]
    pairs: gl.constexpr = _chunk_layout(HEAD_DIM, 2)
    token, head, ok = rows.tokens(RUNS)
    token = (token + rows.first_token).to(gl.int64)
    key = token + past
    k_short = _load_pairs(k_short_ptr, key * (stride_ksn // 2), ok, False, head_dim, pairs)
    v_short = _load_pairs(v_short_ptr, key * (stride_vsn // 2), ok, False, head_dim, pairs)
    grad_out = _load_pairs(grad_out_ptr, token * (stride_gn // 2) + head * (stride_gh // 2), ok, False, head_dim, pairs)
    gl.barrier()
    _store_operands(q, ab, k_short, v_short, grad_out, dtype)


@gluon.jit
def _change_offset(u, w, staging, q, ab, dq, rows, k_short_ptr, v_short_ptr, grad_out_ptr, part_k_ptr, part_v_ptr, stride_ksn, stride_vsn,
                   stride_gn, stride_gh, offset, past, w_short, head_dim, dtype: gl.constexpr):  # fmt: skip
    """What U and W of an offset add to dq and to the rows of the short gradients, through `staging`, the memory of A and B; and
    A and B of the next offset."""
    HEAD_DIM: gl.constexpr = u.shape[1]
    pairs: gl.constexpr = _chunk_layout(HEAD_DIM, 2)
    chunks: gl.constexpr = _chunk_layout(HEAD_DIM, 4)
    whole = (head_dim == HEAD_DIM) & (rows.first_token + past > offset) & (rows.num >= ROWS)
    token, head, ok = rows.tokens(RUNS)
    key = token + (rows.first_token + past - offset)
    k_short = _load_pairs(k_short_ptr, key.to(gl.int64) * (stride_ksn // 2), ok & (key >= 0), whole, head_dim, pairs)
    gl.barrier()  # all warps are done with A and B
    staging.store(u)
    gl.barrier()
    u = staging.load(RUNS)
    gl.barrier()
    staging.store(w)
    sums = gl.fma(u, _as_rows(_floats(k_short, dtype, chunks), RUNS), dq.load(RUNS))
    gl.barrier()
    dq.store(sums)
    u = _as_chunks(u, chunks) * _floats(_as_chunks(q.load(PAIR_RUNS), pairs), dtype, chunks)
    _add_rows(part_k_ptr, u, rows, offset, w_short, head_dim)

    g_row = (token + rows.first_token).to(gl.int64) * (stride_gn // 2) + head * (stride_gh // 2)
    grad_out = _load_pairs(grad_out_ptr, g_row, ok, whole, head_dim, pairs)
    w = _as_chunks(staging.load(RUNS), chunks)
    token, head, ok = rows.tokens(RUNS)
    key = token + (rows.first_token + past - offset - 1)
    next_k = _load_pairs(k_short_ptr, key.to(gl.int64) * (stride_ksn // 2), ok & (key >= 0), whole, head_dim, pairs)
    next_v = _load_pairs(v_short_ptr, key.to(gl.int64) * (stride_vsn // 2), ok & (key >= 0), whole, head_dim, pairs)
    w = w * _floats(grad_out, dtype, chunks)
    gl.barrier()
    _store_operands(q, ab, next_k, next_v, grad_out, dtype)
    _add_rows(part_v_ptr, w, rows, offset, w_short, head_dim)


@gluon.jit
def _hide(exponent, dp, n, last, count):
    """-inf in place of the exponent and 0 in place of dP where the column is none of the `count` up to `last`: see scaled_tiles._hide."""
    n = gl.broadcast(n[None, :], exponent)[0]
    last = gl.broadcast(last[:, None], exponent)[0]
    count = gl.broadcast(count[:, None], exponent)[0]
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .u32 age; sub.u32 age, $5, $4; setp.lt.u32 p, age, $6; selp.f32 $0, $2, 0fFF800000, p; "
        "selp.f32 $1, $3, 0f00000000, p; }",
        "=f,=f,f,f,r,r,r", [exponent, dp, n, last, count], dtype=(gl.float32, gl.float32), is_pure=True, pack=1)  # fmt: skip


@gluon.jit
def _score_gradients(s, dp, lse2, delta, to_exponent, n, pos, since, at_edge, one_pair, seen, single):
    """P and dS, 0 for pairs that are not seen."""
    shift = gl.where(seen, -lse2, float("-inf"))
    exponent = gl.fma(s, gl.full_like(s, to_exponent), gl.broadcast(shift[:, None], s)[0])
    if at_edge:  # the exponent, not S: a negative scale would make inf of -inf
        exponent, dp = _hide(exponent, dp, n, pos, pos - since)
        if one_pair:  # which a window or a sequence ends beside
            exponent = gl.where(single[:, None] & (exponent > float("-inf")), 0.0, exponent)
            dp = gl.where(single[:, None], 0.0, dp)
    p = gl.exp2(exponent)
    return p, p * (dp - delta[:, None])


@gluon.jit
def _query_gradients(ring, band, q_smem, ab_smem, dq_smem, warpgroup, q_ptr, k_short_ptr, v_short_ptr, out_ptr, lse_ptr, grad_out_ptr,
                     grad_lse_ptr, has_grad_lse, grad_q_ptr, delta_ptr, part_k_ptr, part_v_ptr, stride_qn, stride_qh, stride_ksn,
                     stride_vsn, stride_gn, stride_gh, out_stride, num_queries, num_rows, group, past, first_row, head_dim, scale,
                     chunk_span, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr):  # fmt: skip
    """One of the two warpgroups that multiply: 64 rows."""
    s_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_mma, 2)
    rows: gl.constexpr = gl.SliceLayout(1, s_mma)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_mma)
    PAIRS: gl.constexpr = HEAD_DIM // 2
    pairs: gl.constexpr = gl.BlockedLayout([1, 4], [128 // PAIRS, PAIRS // 4], [4, 1], [1, 0])
    pair_rows: gl.constexpr = gl.SliceLayout(1, pairs)
    dtype: gl.constexpr = q_ptr.dtype.element_ty

    first_row += warpgroup * ROWS
    row = first_row + gl.arange(0, ROWS, pair_rows)
    pair = gl.arange(0, PAIRS, gl.SliceLayout(0, pairs))
    pair_ok = pair < head_dim // 2
    mask = (row < num_rows)[:, None] & pair_ok[None, :]
    q_ptrs = _row_ptrs(_pairs(q_ptr), row // group, stride_qn // 2, pair) + (row % group)[:, None] * (stride_qh // 2)
    _as_pairs(q_smem).index(warpgroup).store(gl.load(q_ptrs, mask=mask, other=0))

    row = first_row + gl.arange(0, ROWS, o_rows)
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, o_mma))
    o_mask = (row < num_rows)[:, None] & (d < head_dim)[None, :]
    grad_out_ptrs = _row_ptrs(grad_out_ptr, row // group, stride_gn, d) + (row % group)[:, None] * stride_gh
    grad_out = gl.load(grad_out_ptrs, mask=o_mask, other=0.0)
    s_row = first_row + gl.arange(0, ROWS, rows)
    pos = s_row // group + past
    age = pos - band.start_of(pos)
    single = _sees_one_pair(age, band.w_long, band.w_short)
    lse2, delta = _lse_and_delta(grad_out, first_row, single, out_ptr, lse_ptr, grad_lse_ptr, has_grad_lse, out_stride, num_queries,
                                 num_rows, group, head_dim)  # fmt: skip
    gl.store(delta_ptr + (s_row % group).to(gl.int64) * num_queries + s_row // group, delta, mask=s_row < num_rows)
    to_exponent = scale * LOG2E
    a_smem = ab_smem.index(2 * warpgroup)
    b_smem = ab_smem.index(2 * warpgroup + 1)
    staging = ab_smem.reinterpret(gl.float32, [2, ROWS, HEAD_DIM], gl.SwizzledSharedLayout(8, 1, 8, [1, 0])).index(warpgroup)
    dq_smem.index(warpgroup).store(gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, RUNS))

    first_pos = first_row // group + past
    last_pos = (gl.minimum(first_row + ROWS, num_rows) - 1) // group + past
    one_pair = _sees_one_pair(gl.maximum(first_pos - band.start_of(last_pos), 0), band.w_long, band.w_short)
    last_since = band.since(last_pos)
    zero_s = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, s_mma)
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    if last_pos < first_pos:  # no rows
        stage, phase = ring.skip(band.num_offsets * band.num_tiles, stage, phase)
    else:
        before, own_num = band.own_tiles(first_pos, last_pos, BLOCK_N)
        _clear(part_k_ptr, chunk_span, head_dim, HEAD_DIM)
        _clear(part_v_ptr, chunk_span, head_dim, HEAD_DIM)
        rows_of = _rows_from(first_row, num_rows, group)
        gl.assume(own_num > 0)
        _first_operands(_as_pairs(q_smem).index(warpgroup), _as_pairs(ab_smem).slice(2 * warpgroup, 2), rows_of, k_short_ptr, v_short_ptr,
                        grad_out_ptr, stride_ksn, stride_vsn, stride_gn, stride_gh, past, head_dim, dtype)  # fmt: skip
        for offset in range(band.num_offsets):
            seen = age >= offset
            since = pos - gl.minimum(band.w_long, age + 1)
            stage, phase = ring.skip(before, stage, phase)
            u = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, o_mma)
            w = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, o_mma)
            for tile in range(before, before + own_num):
                start = band.end_n - (tile + 1) * BLOCK_N
                at_edge = (start + BLOCK_N - 1 > first_pos) | (start <= last_since)
                mbarrier.wait(ring.full.index(stage), phase)
                s_next = warpgroup_mma(
                    a_smem, ring.k.index(stage).permute((1, 0)), zero_s, use_acc=False, is_async=True)
                dp_next = warpgroup_mma(
                    b_smem, ring.v.index(stage).permute((1, 0)), zero_s, use_acc=False, is_async=True)
                s, dp = warpgroup_mma_wait(0, deps=(s_next, dp_next))
                n = _columns(start, s)
                p, ds = _score_gradients(s, dp, lse2, delta, to_exponent, n, pos, since, at_edge, one_pair, seen, single)
                p = gl.convert_layout(p.to(dtype), p_layout)
                ds = gl.convert_layout(ds.to(dtype), p_layout)
                w_next = warpgroup_mma(p, ring.v.index(stage), w, is_async=True)
                u_next = warpgroup_mma(ds, ring.k.index(stage), u, is_async=True)
                w, u = warpgroup_mma_wait(0, deps=(w_next, u_next))
                mbarrier.arrive(ring.empty.index(stage))
                stage, phase = ring.advance(stage, phase)
            stage, phase = ring.skip(band.num_tiles - before - own_num, stage, phase)

            _change_offset(u, w, staging, _as_pairs(q_smem).index(warpgroup), _as_pairs(ab_smem).slice(2 * warpgroup, 2),
                           dq_smem.index(warpgroup), rows_of, k_short_ptr, v_short_ptr, grad_out_ptr, part_k_ptr, part_v_ptr, stride_ksn,
                           stride_vsn, stride_gn, stride_gh, offset, past, band.w_short, head_dim, dtype)  # fmt: skip
    grad_q = dq_smem.index(warpgroup).load(RUNS) * scale
    _store_rows(grad_q_ptr, grad_q.to(dtype), first_row, out_stride, num_rows, group, head_dim)


@gluon.jit
def two_simplicial_bwd_dq_skewed(
    q_ptr: "*dtype:16", k_long: "tensordesc<dtype[1,BLOCK_N,1,HEAD_DIM]>",
    v_long: "tensordesc<dtype[1,BLOCK_N,1,HEAD_DIM]>", k_short_ptr: "*dtype:16",
    v_short_ptr: "*dtype:16",
    out_ptr: "*dtype:16", lse_ptr: "*fp32:16", grad_out_ptr: "*dtype:16", grad_lse_ptr: "*fp32:16",
    grad_q_ptr: "*dtype:16", delta_ptr: "*fp32:16", part_k_ptr: "*fp32:16", part_v_ptr: "*fp32:16",
    stride_qb: "i64:8", stride_qn: "i64:8", stride_qh: "i64:8",
    stride_ksb: "i64:8", stride_ksn: "i64:8", stride_ksh: "i64:8",
    stride_vsb: "i64:8", stride_vsn: "i64:8", stride_vsh: "i64:8",
    stride_gb: "i64:8", stride_gn: "i64:8", stride_gh: "i64:8",
    num_queries: "i32", num_keys: "i32", kv_heads: "i32", group: "i32", head_dim: "i32:8",
    w_long: "i32", w_short: "i32", scale: "fp32", bounds_ptr: "*i32:16", packed: "i32", has_grad_lse: "i32", chunk_span: "i32",
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dq, delta, and for each 64 rows partial sums of dk_short and dv_short, chunk_span rows from the first position that they
    see on."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    num_rows = num_queries * group
    num_blocks = gl.cdiv(num_rows, BLOCK_M)
    num_heads = gl.num_programs(0) // num_blocks
    block, batch_head = _block_of(gl.program_id(0), num_blocks, num_heads)
    first_row = block * BLOCK_M
    batch = batch_head // kv_heads
    kv_head = batch_head % kv_heads
    k_short_ptr += batch.to(gl.int64) * stride_ksb + kv_head.to(gl.int64) * stride_ksh
    v_short_ptr += batch.to(gl.int64) * stride_vsb + kv_head.to(gl.int64) * stride_vsh
    q_heads = kv_heads * group
    q_ptr += batch.to(gl.int64) * stride_qb + kv_head.to(gl.int64) * group * stride_qh
    grad_out_ptr += batch.to(gl.int64) * stride_gb + kv_head.to(gl.int64) * group * stride_gh
    first_out = (batch.to(gl.int64) * num_queries * q_heads + kv_head * group) * head_dim
    first_lse = (batch.to(gl.int64) * q_heads + kv_head * group) * num_queries
    chunk = batch_head.to(gl.int64) * gl.cdiv(num_rows, ROWS) + first_row // ROWS
    part_size = chunk_span.to(gl.int64) * head_dim
    part_k_ptr += chunk * part_size
    part_v_ptr += chunk * part_size
    past = num_keys - num_queries
    band = _band_of(first_row, num_rows, num_keys, group, past, w_long, w_short, bounds_ptr, packed, BLOCK_M, BLOCK_N)

    ring = _new_ring(dtype, STAGES, BLOCK_N, HEAD_DIM)
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, HEAD_DIM], dtype)
    q_smem = gl.allocate_shared_memory(dtype, [2, ROWS, HEAD_DIM], tile)
    ab_smem = gl.allocate_shared_memory(dtype, [4, ROWS, HEAD_DIM], tile)
    dq_smem = gl.allocate_shared_memory(gl.float32, [2, ROWS, HEAD_DIM], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    for i in gl.static_range(STAGES):
        mbarrier.init(ring.full.index(i), count=1)
        mbarrier.init(ring.empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_query_gradients, (ring, band, q_smem, ab_smem, dq_smem, 0, q_ptr, k_short_ptr, v_short_ptr, out_ptr + first_out,
                                lse_ptr + first_lse, grad_out_ptr, grad_lse_ptr + first_lse, has_grad_lse, grad_q_ptr + first_out,
                                delta_ptr + first_lse, part_k_ptr, part_v_ptr, stride_qn, stride_qh, stride_ksn, stride_vsn, stride_gn,
                                stride_gh, q_heads, num_queries, num_rows, group, past, first_row, head_dim, scale, chunk_span,
                                HEAD_DIM, BLOCK_N)),
            (_query_gradients, (ring, band, q_smem, ab_smem, dq_smem, 1, q_ptr, k_short_ptr, v_short_ptr, out_ptr + first_out,
                                lse_ptr + first_lse, grad_out_ptr, grad_lse_ptr + first_lse, has_grad_lse, grad_q_ptr + first_out,
                                delta_ptr + first_lse, part_k_ptr + part_size, part_v_ptr + part_size, stride_qn, stride_qh, stride_ksn,
                                stride_vsn, stride_gn, stride_gh, q_heads, num_queries, num_rows, group, past, first_row, head_dim, scale,
                                chunk_span, HEAD_DIM, BLOCK_N)),
            (_fetch_tiles, (ring, band, k_long, v_long, batch, kv_head)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


# Measured on an H100: docs/kernel_trials.md.
VARIANTS = [
    Variant(
        two_simplicial_bwd_dq_skewed,
        "sm90a",
        {"dtype": dtype, "HEAD_DIM": head_dim},
        {"BLOCK_M": 128, "BLOCK_N": 64, "STAGES": 2 if head_dim == 128 else 4, "num_warps": 4},
    )
    for dtype, head_dim in itertools.product(("bf16", "fp16"), (64, 128))
]
