"""2-simplicial attention (arXiv 2507.02754): portable Triton kernels, forward and backward.

Every kernel works on *rows*: a row is one (query token, query head) pair of one kv head, and row r of a kv head is token
r // group, head r % group, so that any Hq / Hkv ratio fills its tiles. Of the two windows the host calls the shorter one
"short". The short axis is walked by its OFFSET: at offset o, row (t, g) multiplies by its own short key t - o,

    A = q * k_short[t - o]        S = scale * A @ k_long^T        out += v_short[t - o] * (P @ v_long)

which wastes nothing on the short axis at any ratio. SHARE, a divisor of group, is a number of consecutive rows that surely
belong to one token, so that they share one short row: 64 is all of a tile, 1 promises nothing.

Packed sequences: a row sees keys from the start of its sequence on. bounds holds where the sequence of each position starts and
ends (sequence_bounds.py); tiles and offsets that no row sees are passed over.

The backward pass recomputes P from lse without atomics. `two_simplicial_bwd_dq` walks query tiles: dq, and the short gradients
summed into a private buffer per chunk of tiles. `two_simplicial_bwd_dkv` walks tiles of the long axis. What programs leave in
parts is added up by two_simplicial_partial_sums.py, in an order that does not depend on timing.
"""

import itertools

import triton
import triton.language as tl

from triton_kernels.tile_rows import (
    _expand,
    _row_ptrs,
    _sees_one_pair,
    _short_rows,
    _start_of,
    _sum_runs,
    _tile_rows,
    _until,
)
from triton_kernels.variant import Variant

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def two_simplicial_fwd(
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
    HEAD_DIM: tl.constexpr, SHARE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    num_rows = num_queries * group
    num_bounds = packed * num_keys
    num_tiles = tl.cdiv(num_rows, BLOCK_M)
    batch_head = tl.program_id(0) // num_tiles
    batch = (batch_head // kv_heads).to(tl.int64)
    kv_head = (batch_head % kv_heads).to(tl.int64)
    k_long_ptr += batch * stride_klb + kv_head * stride_klh
    v_long_ptr += batch * stride_vlb + kv_head * stride_vlh
    k_short_ptr += batch * stride_ksb + kv_head * stride_ksh
    v_short_ptr += batch * stride_vsb + kv_head * stride_vsh
    q_ptr += batch * stride_qb + kv_head * group * stride_qh

    first_row = tl.program_id(0) % num_tiles * BLOCK_M
    past = num_keys - num_queries
    token, head, pos, row_ok, first_pos, last_pos = _tile_rows(first_row, num_rows, group, past, BLOCK_M)
    starts = _start_of(pos, bounds_ptr, num_bounds)
    since = tl.maximum(pos - w_long, starts - 1)
    first_start, last_start = _start_of(first_pos, bounds_ptr, num_bounds), _start_of(last_pos, bounds_ptr, num_bounds)
    last_since = tl.maximum(last_pos - w_long, last_start - 1)
    d = tl.arange(0, HEAD_DIM)
    d_ok = (d < head_dim)[None, :]
    row_mask = row_ok[:, None] & d_ok
    q = tl.load(_row_ptrs(q_ptr, token, stride_qn, d) + head[:, None] * stride_qh, mask=row_mask, other=0.0)  # [BLOCK_M, HEAD_DIM]
    # The sign of scale goes to q (exact), so that the maximum of S is the maximum of the logits. A scale of 0 becomes one
    # that is 0 to every finite logit but keeps -inf * scale == -inf.
    q = tl.where(scale < 0, -q, q)
    to_exponent = tl.maximum(tl.abs(scale) * LOG2E, 1e-30)
    short, _ = _short_rows(first_row, group, past, SHARE, BLOCK_M)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for start in range(tl.maximum(first_pos - w_long + 1, first_start), last_pos + 1, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        n_mask = (n <= last_pos)[:, None] & d_ok
        k = tl.load(_row_ptrs(k_long_ptr, n, stride_kln, d), mask=n_mask, other=0.0)  # [BLOCK_N, HEAD_DIM]
        v = tl.load(_row_ptrs(v_long_ptr, n, stride_vln, d), mask=n_mask, other=0.0)  # [BLOCK_N, HEAD_DIM]
        at_edge = (start + BLOCK_N - 1 > first_pos) | (start <= last_since)
        for offset in range(0, tl.minimum(w_short, last_pos - first_start + 1)):
            # The first row's start, one number for all: what a later row does not see is hidden from its S.
            short_mask = ((short - offset >= first_start) & (short < num_keys))[:, None] & d_ok
            k_short = tl.load(_row_ptrs(k_short_ptr, short - offset, stride_ksn, d), mask=short_mask, other=0.0)  # [runs, HEAD_DIM]
            s = tl.dot(q * _expand(k_short, BLOCK_M), tl.trans(k), input_precision="tf32x3")  # [BLOCK_M, BLOCK_N]
            if at_edge | (offset > first_pos - last_start):
                valid = (n[None, :] <= pos[:, None]) & (n[None, :] > since[:, None]) & (pos - offset >= starts)[:, None]
                s = tl.where(valid, s, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(s, 1) * to_exponent)
            # A row that has seen no valid pair yet keeps a maximum of -inf; 0 in its place avoids -inf - -inf.
            safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.exp2(tl.fma(s, to_exponent, -safe_max[:, None]))
            alpha = tl.exp2(row_max - safe_max)
            row_sum = row_sum * alpha + tl.sum(p, 1)
            row_max = new_max
            pv = tl.dot(p.to(v.dtype), v, input_precision="tf32x3")  # [BLOCK_M, HEAD_DIM]
            v_short = tl.load(_row_ptrs(v_short_ptr, short - offset, stride_vsn, d), mask=short_mask, other=0.0)
            acc = tl.fma(pv, _expand(v_short, BLOCK_M).to(tl.float32), acc * alpha[:, None])

    q_head = batch * kv_heads * group + kv_head * group + head
    out_ptrs = _row_ptrs(out_ptr, (batch * num_queries + token) * kv_heads * group + kv_head * group + head, head_dim, d)
    tl.store(out_ptrs, (acc / row_sum[:, None]).to(q.dtype), mask=row_mask)
    tl.store(lse_ptr + q_head * num_queries + token, (row_max + tl.log2(row_sum)) * LN2, mask=row_ok)


@triton.jit
def two_simplicial_bwd_dq(
    q_ptr: "*dtype:16", k_long_ptr: "*dtype:16", v_long_ptr: "*dtype:16", k_short_ptr: "*dtype:16",
    v_short_ptr: "*dtype:16",
    out_ptr: "*dtype:16", lse_ptr: "*fp32:16", grad_out_ptr: "*dtype:16", grad_lse_ptr: "*fp32:16",
    grad_q_ptr: "*dtype:16", delta_ptr: "*fp32:16", part_k_ptr: "*fp32:16", part_v_ptr: "*fp32:16",
    stride_qb: "i64:8", stride_qn: "i64:8", stride_qh: "i64:8",
    stride_klb: "i64:8", stride_kln: "i64:8", stride_klh: "i64:8",
    stride_vlb: "i64:8", stride_vln: "i64:8", stride_vlh: "i64:8",
    stride_ksb: "i64:8", stride_ksn: "i64:8", stride_ksh: "i64:8",
    stride_vsb: "i64:8", stride_vsn: "i64:8", stride_vsh: "i64:8",
    stride_gb: "i64:8", stride_gn: "i64:8", stride_gh: "i64:8",
    num_queries: "i32", num_keys: "i32", kv_heads: "i32", group: "i32", head_dim: "i32:8",
    w_long: "i32", w_short: "i32", scale: "fp32", bounds_ptr: "*i32:16", packed: "i32",
    has_grad_lse: "i32", chunk_tiles: "i32", chunk_span: "i32",
    HEAD_DIM: tl.constexpr, SHARE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """dq, delta, and this chunk's partial sums of dk_short and dv_short.

    A program walks chunk_tiles consecutive tiles and adds their short gradients into its own fp32 rows: row x of its
    chunk_span rows is position first position of the chunk - w_short + 1 + x.
    """
    num_rows = num_queries * group
    num_bounds = packed * num_keys
    past = num_keys - num_queries
    num_tiles = tl.cdiv(num_rows, BLOCK_M)
    num_chunks = tl.cdiv(num_tiles, chunk_tiles)
    chunk = tl.program_id(0) % num_chunks
    batch_head = tl.program_id(0) // num_chunks
    batch = (batch_head // kv_heads).to(tl.int64)
    kv_head = (batch_head % kv_heads).to(tl.int64)
    k_long_ptr += batch * stride_klb + kv_head * stride_klh
    v_long_ptr += batch * stride_vlb + kv_head * stride_vlh
    k_short_ptr += batch * stride_ksb + kv_head * stride_ksh
    v_short_ptr += batch * stride_vsb + kv_head * stride_vsh
    q_ptr += batch * stride_qb + kv_head * group * stride_qh
    grad_out_ptr += batch * stride_gb + kv_head * group * stride_gh
    part_k_ptr += tl.program_id(0).to(tl.int64) * chunk_span * head_dim
    part_v_ptr += tl.program_id(0).to(tl.int64) * chunk_span * head_dim
    part_start = chunk * chunk_tiles * BLOCK_M // group + past - w_short + 1

    RUN: tl.constexpr = SHARE if SHARE < BLOCK_M else BLOCK_M
    d = tl.arange(0, HEAD_DIM)
    d_ok = (d < head_dim)[None, :]
    to_exponent = scale * LOG2E

    zero_rows = tl.arange(0, BLOCK_M)
    for start in range(0, chunk_span, BLOCK_M):
        zero_mask = (start + zero_rows < chunk_span)[:, None] & d_ok
        tl.store(_row_ptrs(part_k_ptr, start + zero_rows, head_dim, d), tl.zeros([BLOCK_M, HEAD_DIM], tl.float32), mask=zero_mask)
        tl.store(_row_ptrs(part_v_ptr, start + zero_rows, head_dim, d), tl.zeros([BLOCK_M, HEAD_DIM], tl.float32), mask=zero_mask)
    tl.debug_barrier()

    for tile in range(chunk * chunk_tiles, tl.minimum((chunk + 1) * chunk_tiles, num_tiles)):
        token, head, pos, row_ok, first_pos, last_pos = _tile_rows(tile * BLOCK_M, num_rows, group, past, BLOCK_M)
        starts = _start_of(pos, bounds_ptr, num_bounds)
        since = tl.maximum(pos - w_long, starts - 1)
        first_start, last_start = _start_of(first_pos, bounds_ptr, num_bounds), _start_of(last_pos, bounds_ptr, num_bounds)
        last_since = tl.maximum(last_pos - w_long, last_start - 1)
        row_mask = row_ok[:, None] & d_ok
        q = tl.load(_row_ptrs(q_ptr, token, stride_qn, d) + head[:, None] * stride_qh, mask=row_mask, other=0.0)
        grad_out = tl.load(_row_ptrs(grad_out_ptr, token, stride_gn, d) + head[:, None] * stride_gh, mask=row_mask, other=0.0)
        out_row = (batch * num_queries + token) * kv_heads * group + kv_head * group + head
        lse_row = (batch * kv_heads * group + kv_head * group + head) * num_queries + token
        out = tl.load(_row_ptrs(out_ptr, out_row, head_dim, d), mask=row_mask, other=0.0)
        single = _sees_one_pair(pos, starts, w_long, w_short)
        delta = tl.where(single, 0.0, tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1))
        if has_grad_lse != 0:
            delta -= tl.load(grad_lse_ptr + lse_row, mask=row_ok, other=0.0)
        tl.store(delta_ptr + lse_row, delta, mask=row_ok)
        lse2 = tl.load(lse_ptr + lse_row, mask=row_ok, other=float("inf")) * LOG2E  # inf: P of a row past the end is 0
        short, turn_of = _short_rows(tile * BLOCK_M, group, past, SHARE, BLOCK_M)
        grad_q = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
        for offset in range(0, tl.minimum(w_short, last_pos - first_start + 1)):
            short_mask = ((short - offset >= first_start) & (short < num_keys))[:, None] & d_ok
            k_short = tl.load(_row_ptrs(k_short_ptr, short - offset, stride_ksn, d), mask=short_mask, other=0.0)  # [runs, HEAD_DIM]
            v_short = tl.load(_row_ptrs(v_short_ptr, short - offset, stride_vsn, d), mask=short_mask, other=0.0)
            qk = q * _expand(k_short, BLOCK_M)
            gv = grad_out * _expand(v_short, BLOCK_M)
            ds_k = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
            p_v = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
            for start in range(tl.maximum(first_pos - w_long + 1, first_start), last_pos + 1, BLOCK_N):
                n = start + tl.arange(0, BLOCK_N)
                n_mask = (n <= last_pos)[:, None] & d_ok
                k = tl.load(_row_ptrs(k_long_ptr, n, stride_kln, d), mask=n_mask, other=0.0)  # [BLOCK_N, HEAD_DIM]
                v = tl.load(_row_ptrs(v_long_ptr, n, stride_vln, d), mask=n_mask, other=0.0)
                s = tl.dot(qk, tl.trans(k), input_precision="tf32x3")  # [BLOCK_M, BLOCK_N]
                dp = tl.dot(gv, tl.trans(v), input_precision="tf32x3")
                p = tl.exp2(tl.fma(s, to_exponent, -lse2[:, None]))
                ds = p * (dp - delta[:, None])
                if (start + BLOCK_N - 1 > first_pos) | (start <= last_since) | (offset > first_pos - last_start):
                    valid = (n[None, :] <= pos[:, None]) & (n[None, :] > since[:, None]) & (pos - offset >= starts)[:, None]
                    p = tl.where(valid, p, 0.0)
                    ds = tl.where(valid, tl.where(single[:, None], -delta[:, None], ds), 0.0)
                ds_k = tl.dot(ds.to(k.dtype), k, ds_k, input_precision="tf32x3")
                p_v = tl.dot(p.to(v.dtype), v, p_v, input_precision="tf32x3")
            grad_q = tl.fma(_expand(k_short, BLOCK_M).to(tl.float32), ds_k, grad_q)
            # These products must be rounded before they are added up (see build.py on fusion): every lane that holds a sum
            # then holds the same bits.
            part_dk = _sum_runs(q.to(tl.float32) * ds_k, short.shape[0])
            part_dv = _sum_runs(grad_out.to(tl.float32) * p_v, short.shape[0])
            part_k_ptrs = _row_ptrs(part_k_ptr, short - offset - part_start, head_dim, d)
            part_v_ptrs = _row_ptrs(part_v_ptr, short - offset - part_start, head_dim, d)
            # Short rows of one token add to the same partial row, so they take turns.
            for turn in range(0, tl.minimum(group, BLOCK_M) // RUN):
                mask = (turn_of == turn)[:, None] & short_mask
                tl.store(part_k_ptrs, tl.load(part_k_ptrs, mask=mask, other=0.0) + part_dk, mask=mask)
                tl.store(part_v_ptrs, tl.load(part_v_ptrs, mask=mask, other=0.0) + part_dv, mask=mask)
                tl.debug_barrier()
        tl.store(_row_ptrs(grad_q_ptr, out_row, head_dim, d), (grad_q * scale).to(q.dtype), mask=row_mask)


@triton.jit
def two_simplicial_bwd_dkv(
    q_ptr: "*dtype:16", k_long_ptr: "*dtype:16", v_long_ptr: "*dtype:16", k_short_ptr: "*dtype:16",
    v_short_ptr: "*dtype:16",
    lse_ptr: "*fp32:16", grad_out_ptr: "*dtype:16", delta_ptr: "*fp32:16", grad_k_ptr: "*dtype:16",
    grad_v_ptr: "*dtype:16",
    part_k_ptr: "*fp32:16", part_v_ptr: "*fp32:16",
    stride_qb: "i64:8", stride_qn: "i64:8", stride_qh: "i64:8",
    stride_klb: "i64:8", stride_kln: "i64:8", stride_klh: "i64:8",
    stride_vlb: "i64:8", stride_vln: "i64:8", stride_vlh: "i64:8",
    stride_ksb: "i64:8", stride_ksn: "i64:8", stride_ksh: "i64:8",
    stride_vsb: "i64:8", stride_vsn: "i64:8", stride_vsh: "i64:8",
    stride_gb: "i64:8", stride_gn: "i64:8", stride_gh: "i64:8",
    num_queries: "i32", num_keys: "i32", kv_heads: "i32", group: "i32", head_dim: "i32:8",
    w_long: "i32", w_short: "i32", scale: "fp32", bounds_ptr: "*i32:16", packed: "i32", num_splits: "i32",
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """dk_long and dv_long of BLOCK_N keys: every row that sees one of them, at every offset, transposed.

    Where the blocks of keys are too few to fill the GPU, num_splits programs share the rows of a block and leave fp32
    partial sums for two_simplicial_bwd_sum.
    """
    # fp32: six bf16 products where wgmma multiplies, which takes 64 keys and 16 rows, else three tf32 ones.
    PRECISION: tl.constexpr = "bf16x6" if BLOCK_N == 64 else "tf32x3"
    num_rows = num_queries * group
    num_bounds = packed * num_keys
    past = num_keys - num_queries
    num_blocks = tl.cdiv(num_keys, BLOCK_N)
    split = tl.program_id(0) % num_splits
    block = tl.program_id(0) // num_splits % num_blocks
    batch_head = tl.program_id(0) // num_splits // num_blocks
    batch = (batch_head // kv_heads).to(tl.int64)
    kv_head = (batch_head % kv_heads).to(tl.int64)
    k_short_ptr += batch * stride_ksb + kv_head * stride_ksh
    v_short_ptr += batch * stride_vsb + kv_head * stride_vsh
    q_ptr += batch * stride_qb + kv_head * group * stride_qh
    grad_out_ptr += batch * stride_gb + kv_head * group * stride_gh

    d = tl.arange(0, HEAD_DIM)
    d_ok = (d < head_dim)[None, :]
    first_n = block * BLOCK_N
    last_n = tl.minimum(first_n + BLOCK_N, num_keys) - 1
    n = first_n + tl.arange(0, BLOCK_N)
    n_mask = (n < num_keys)[:, None] & d_ok
    k = tl.load(_row_ptrs(k_long_ptr + batch * stride_klb + kv_head * stride_klh, n, stride_kln, d), mask=n_mask, other=0.0)
    v = tl.load(_row_ptrs(v_long_ptr + batch * stride_vlb + kv_head * stride_vlh, n, stride_vln, d), mask=n_mask, other=0.0)
    to_exponent = scale * LOG2E

    grad_k = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    grad_v = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    begin = tl.maximum(first_n - past, 0) * group
    # A row that sees a key is of the same sequence, so the keys' bounds say all; there are fewer of them in a thread.
    first_start, last_start = _start_of(first_n, bounds_ptr, num_bounds), _start_of(last_n, bounds_ptr, num_bounds)
    first_until = _until(first_n, w_long, num_keys, bounds_ptr, num_bounds)
    end = (_until(last_n, w_long, num_keys, bounds_ptr, num_bounds) - past) * group
    share = tl.cdiv(tl.cdiv(end - begin, BLOCK_M), num_splits) * BLOCK_M
    begin += split * share
    for first_row in range(begin, tl.minimum(end, begin + share), BLOCK_M):
        token, head, pos, row_ok, first_pos, last_pos = _tile_rows(first_row, num_rows, group, past, BLOCK_M)
        row_starts = _start_of(pos, bounds_ptr, num_bounds)
        row_mask = row_ok[:, None] & d_ok
        q = tl.load(_row_ptrs(q_ptr, token, stride_qn, d) + head[:, None] * stride_qh, mask=row_mask, other=0.0)
        grad_out = tl.load(_row_ptrs(grad_out_ptr, token, stride_gn, d) + head[:, None] * stride_gh, mask=row_mask, other=0.0)
        lse_row = (batch * kv_heads * group + kv_head * group + head) * num_queries + token
        lse2 = tl.load(lse_ptr + lse_row, mask=row_ok, other=float("inf")) * LOG2E
        delta = tl.load(delta_ptr + lse_row, mask=row_ok, other=0.0)
        at_edge = (last_n > first_pos) | (last_pos >= first_until) | _sees_one_pair(first_pos, last_start, w_long, w_short)
        for offset in range(0, tl.minimum(w_short, last_pos - first_start + 1)):
            # Each row's own start: 0 times q * k_short of two sequences, which may overflow, would be NaN in grad_k.
            short_mask = ((pos - offset >= row_starts) & (pos < num_keys))[:, None] & d_ok
            k_short = tl.load(_row_ptrs(k_short_ptr, pos - offset, stride_ksn, d), mask=short_mask, other=0.0)  # [BLOCK_M, HEAD_DIM]
            v_short = tl.load(_row_ptrs(v_short_ptr, pos - offset, stride_vsn, d), mask=short_mask, other=0.0)
            qk = q * k_short
            gv = grad_out * v_short
            s_t = tl.dot(k, tl.trans(qk), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
            dp_t = tl.dot(v, tl.trans(gv), input_precision=PRECISION)
            p_t = tl.exp2(tl.fma(s_t, to_exponent, -lse2[None, :]))
            ds_t = p_t * (dp_t - delta[None, :])
            if at_edge | (offset > first_pos - last_start):
                starts, until = _start_of(n, bounds_ptr, num_bounds), _until(n, w_long, num_keys, bounds_ptr, num_bounds)
                seen = (pos[None, :] >= n[:, None]) & (pos[None, :] < until[:, None])
                valid = seen & (pos[None, :] - offset >= starts[:, None])
                p_t = tl.where(valid, p_t, 0.0)
                single = _sees_one_pair(pos[None, :], starts[:, None], w_long, w_short)
                ds_t = tl.where(valid, tl.where(single, -delta[None, :], ds_t), 0.0)
            grad_k = tl.dot(ds_t.to(q.dtype), qk, grad_k, input_precision=PRECISION)
            grad_v = tl.dot(p_t.to(q.dtype), gv, grad_v, input_precision=PRECISION)

    if num_splits > 1:
        part_row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(_row_ptrs(part_k_ptr, part_row, head_dim, d), grad_k, mask=n_mask)
        tl.store(_row_ptrs(part_v_ptr, part_row, head_dim, d), grad_v, mask=n_mask)
        return
    row = (batch * num_keys + n) * kv_heads + kv_head
    tl.store(_row_ptrs(grad_k_ptr, row, head_dim, d), (grad_k * scale).to(q_ptr.dtype.element_ty), mask=n_mask)
    tl.store(_row_ptrs(grad_v_ptr, row, head_dim, d), grad_v.to(q_ptr.dtype.element_ty), mask=n_mask)


# Measured on an H100 (docs/kernel_trials.md: what else was tried; tiles.py has more); elsewhere chosen by registers, spills and the
# 99 KiB of shared memory of 8.6, 8.9 and 12.0, which every tile of sm80 and sm120f fits. A product of fp32 is three tf32
# ones (or six bf16 ones), with operands and code to match.
def _tile(kernel, arch: str, dtype: str, head_dim: int, share: int = 1) -> dict[str, int]:
    mma_sync = arch in ("sm80", "sm120f")  # no wgmma or tcgen05: accumulators of a warp, not of a warpgroup
    if dtype == "fp32":
        tiles = {
            two_simplicial_fwd: (16, 16, 4, 1) if head_dim == 256 else (32, min(64, 4096 // head_dim), 4, 1),
            two_simplicial_bwd_dq: (8, 16, 8, 1) if head_dim == 256 else (16, 32, 4, 1),
            two_simplicial_bwd_dkv: (8, 16, 8, 1) if head_dim == 256 else (16, 32, 8, 1),
        }
        if arch == "sm90a" and head_dim <= 128:
            tiles[two_simplicial_bwd_dkv] = (16 if head_dim == 128 else 32, 64, 4, 1)  # 64 rows: wgmma
    elif head_dim == 256:
        tiles = {
            two_simplicial_fwd: (32, 64, 8 if mma_sync else 4, 1),
            two_simplicial_bwd_dq: (16, 32, 8, 1),
            two_simplicial_bwd_dkv: (16, 32, 4, 1),
        }
    else:
        tiles = {
            two_simplicial_fwd: (64, 128, 8 if mma_sync else 4, 1),
            two_simplicial_bwd_dq: (64, 32, 4, 2) if share > 1 else (64, 32 if mma_sync else 64, 8, 1),
            two_simplicial_bwd_dkv: (32, 64, 8, 2) if mma_sync else (32, 64, 4, 1),
        }
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), tiles[kernel], strict=True))


def _variants() -> list[Variant]:
    table = []
    for arch, dtype, head_dim in itertools.product(
        ("sm80", "sm90a", "sm100f", "sm120f"), ("bf16", "fp16", "fp32"), (32, 64, 128, 256)
    ):
        key = {"dtype": dtype, "HEAD_DIM": head_dim}
        shares = [1]
        if dtype != "fp32" and arch == "sm90a" and head_dim >= 64:
            shares = [1, 8, 64]  # as measured to pay
        elif dtype != "fp32" and head_dim in (64, 128):
            shares = [1, 64]
        for kernel, share in itertools.product((two_simplicial_fwd, two_simplicial_bwd_dq), shares):
            if (arch, dtype) == ("sm90a", "fp32") and head_dim <= 128 and kernel is two_simplicial_fwd:
                continue  # two_simplicial_fp32.py
            table.append(Variant(kernel, arch, key | {"SHARE": share}, _tile(kernel, arch, dtype, head_dim, share)))
        # dkv passes the short rows through shared memory anyway: one load for many rows would save it nothing.
        table.append(Variant(two_simplicial_bwd_dkv, arch, key, _tile(two_simplicial_bwd_dkv, arch, dtype, head_dim)))
    return table


VARIANTS = _variants()
