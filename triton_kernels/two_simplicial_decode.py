"""2-simplicial attention of few queries over many keys, as in decoding: the pairs of a query are spread over programs.

There are too few rows to fill tiles or multiprocessors, but many short keys. So a tile's lines are the OFFSETS short keys of a
row, HEADS rows of one token at a time, and along the long axis it is a FlashAttention loop: for line (head h, offset o) of token t

    A = q[h] * k_short[t - o]        S = scale * A @ k_long^T        acc = P @ v_long

and at the end out[h] is the sum of v_short[t - o] * acc over the offsets. A program takes OFFSETS of the short window and a
share of the long one, its *part*; two_simplicial_fwd_merge joins the parts of a row by their lse. Products are rounded where
two_simplicial_attention.py rounds them, whose backward pass serves this forward pass, too.
"""

import itertools

import triton
import triton.language as tl

from triton_kernels.tile_rows import _row_ptrs
from triton_kernels.two_simplicial_attention import LN2, LOG2E
from triton_kernels.variant import Variant


@triton.jit
def two_simplicial_fwd_decode(
    q_ptr: "*dtype:16", k_long_ptr: "*dtype:16", v_long_ptr: "*dtype:16", k_short_ptr: "*dtype:16",
    v_short_ptr: "*dtype:16",
    out_ptr: "*dtype:16", lse_ptr: "*fp32:16", part_out_ptr: "*fp32:16", part_lse_ptr: "*fp32:16",
    stride_qb: "i64:8", stride_qn: "i64:8", stride_qh: "i64:8",
    stride_klb: "i64:8", stride_kln: "i64:8", stride_klh: "i64:8",
    stride_vlb: "i64:8", stride_vln: "i64:8", stride_vlh: "i64:8",
    stride_ksb: "i64:8", stride_ksn: "i64:8", stride_ksh: "i64:8",
    stride_vsb: "i64:8", stride_vsn: "i64:8", stride_vsh: "i64:8",
    num_queries: "i32", num_keys: "i32", kv_heads: "i32", group: "i32", head_dim: "i32:8",
    w_long: "i32", w_short: "i32", scale: "fp32", num_parts: "i32", share: "i32",
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, OFFSETS: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """out and lse, or where num_parts > 1 those of each part, in fp32: [row, part, head_dim] and [row, part], rows as in lse.

    Part i takes chunk i % chunks of the short window and keys i // chunks * share and on, share of them, of the long one.
    """
    part = tl.program_id(0) % num_parts
    blocks = num_queries * group // HEADS
    first_row = tl.program_id(0) // num_parts % blocks * HEADS
    batch_head = tl.program_id(0) // num_parts // blocks
    batch = (batch_head // kv_heads).to(tl.int64)
    kv_head = (batch_head % kv_heads).to(tl.int64)
    k_long_ptr += batch * stride_klb + kv_head * stride_klh
    v_long_ptr += batch * stride_vlb + kv_head * stride_vlh
    k_short_ptr += batch * stride_ksb + kv_head * stride_ksh
    v_short_ptr += batch * stride_vsb + kv_head * stride_vsh

    token = first_row // group
    head = kv_head * group + first_row % group
    pos = token + num_keys - num_queries
    chunks = tl.cdiv(w_short, OFFSETS)
    line = tl.arange(0, HEADS * OFFSETS)
    offset = part % chunks * OFFSETS + line % OFFSETS
    line_ok = (offset < w_short) & (offset <= pos)
    d = tl.arange(0, HEAD_DIM)
    d_ok = (d < head_dim)[None, :]
    line_mask = line_ok[:, None] & d_ok
    q_ptr += batch * stride_qb + token.to(tl.int64) * stride_qn
    q = tl.load(_row_ptrs(q_ptr, head + line // OFFSETS, stride_qh, d), mask=line_mask, other=0.0)  # [lines, HEAD_DIM]
    k_short = tl.load(_row_ptrs(k_short_ptr, pos - offset, stride_ksn, d), mask=line_mask, other=0.0)
    # See two_simplicial_fwd for the sign and for a scale of 0.
    a = tl.where(scale < 0, -q, q) * k_short
    to_exponent = tl.maximum(tl.abs(scale) * LOG2E, 1e-30)

    line_max = tl.full([HEADS * OFFSETS], float("-inf"), tl.float32)
    line_sum = tl.zeros([HEADS * OFFSETS], tl.float32)
    acc = tl.zeros([HEADS * OFFSETS, HEAD_DIM], tl.float32)
    first_n = tl.maximum(pos - w_long + 1, 0) + part // chunks * share
    end_n = tl.minimum(first_n + share, pos + 1)
    for start in range(first_n, end_n, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        n_mask = (n < end_n)[:, None] & d_ok
        k = tl.load(_row_ptrs(k_long_ptr, n, stride_kln, d), mask=n_mask, other=0.0)  # [BLOCK_N, HEAD_DIM]
        v = tl.load(_row_ptrs(v_long_ptr, n, stride_vln, d), mask=n_mask, other=0.0)
        s = tl.dot(a, tl.trans(k), input_precision="tf32x3")  # [lines, BLOCK_N]
        s = tl.where((n < end_n)[None, :] & line_ok[:, None], s, float("-inf"))
        new_max = tl.maximum(line_max, tl.max(s, 1) * to_exponent)
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(tl.fma(s, to_exponent, -safe_max[:, None]))
        alpha = tl.exp2(line_max - safe_max)
        line_sum = line_sum * alpha + tl.sum(p, 1)
        line_max = new_max
        acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v, input_precision="tf32x3")

    v_short = tl.load(_row_ptrs(v_short_ptr, pos - offset, stride_vsn, d), mask=line_mask, other=0.0)
    row_max = tl.max(tl.reshape(line_max, [HEADS, OFFSETS]), 1)
    safe_max = tl.where(row_max == float("-inf"), 0.0, row_max)  # a part without a pair: out 0, lse -inf
    factor = tl.exp2(tl.reshape(line_max, [HEADS, OFFSETS]) - safe_max[:, None])
    row_sum = tl.sum(tl.reshape(line_sum, [HEADS, OFFSETS]) * factor, 1)
    acc *= v_short.to(tl.float32) * tl.reshape(factor, [HEADS * OFFSETS])[:, None]
    out = tl.sum(tl.reshape(acc, [HEADS, OFFSETS, HEAD_DIM]), 1) / tl.where((row_sum == 0.0) & (num_parts > 1), 1.0, row_sum)[:, None]
    lse = (safe_max + tl.log2(row_sum)) * LN2

    h = tl.arange(0, HEADS)
    q_heads = kv_heads * group
    lse_row = (batch * q_heads + head + h) * num_queries + token
    if num_parts == 1:
        out_row = (batch * num_queries + token) * q_heads + head + h
        tl.store(_row_ptrs(out_ptr, out_row, head_dim, d), out.to(out_ptr.dtype.element_ty), mask=d_ok)
        tl.store(lse_ptr + lse_row, lse)
    else:
        tl.store(_row_ptrs(part_out_ptr, lse_row * num_parts + part, head_dim, d), out, mask=d_ok)
        tl.store(part_lse_ptr + lse_row * num_parts + part, lse)


@triton.jit
def two_simplicial_fwd_merge(
    part_out_ptr: "*fp32:16", part_lse_ptr: "*fp32:16", out_ptr: "*dtype:16", lse_ptr: "*fp32:16",
    num_queries: "i32", heads: "i32", head_dim: "i32:8", num_parts: "i32",
    HEAD_DIM: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):
    """out and lse of one row of lse, [batch, heads, num_queries], from its parts."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, HEAD_DIM)
    d_ok = d < head_dim
    part_max = tl.full([BLOCK_PARTS], float("-inf"), tl.float32)
    part_sum = tl.zeros([BLOCK_PARTS], tl.float32)
    acc = tl.zeros([BLOCK_PARTS, HEAD_DIM], tl.float32)
    for first_part in range(0, num_parts, BLOCK_PARTS):
        part = first_part + tl.arange(0, BLOCK_PARTS)
        lse = tl.load(part_lse_ptr + row * num_parts + part, mask=part < num_parts, other=float("-inf")) * LOG2E
        mask = (part < num_parts)[:, None] & d_ok[None, :]
        out = tl.load(_row_ptrs(part_out_ptr, row * num_parts + part, head_dim, d), mask=mask, other=0.0)
        new_max = tl.maximum(part_max, lse)
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        alpha = tl.exp2(part_max - safe_max)
        weight = tl.exp2(lse - safe_max)
        part_sum = part_sum * alpha + weight
        acc = acc * alpha[:, None] + out * weight[:, None]
        part_max = new_max
    row_max = tl.max(part_max, 0)  # of a row that sees at least its own pair
    weight = tl.exp2(part_max - row_max)
    row_sum = tl.sum(part_sum * weight, 0)
    batch = row // (heads * num_queries)
    out_row = (batch * num_queries + row % num_queries) * heads + row // num_queries % heads
    out = tl.sum(acc * weight[:, None], 0) / row_sum
    tl.store(out_ptr + out_row * head_dim + d, out.to(out_ptr.dtype.element_ty), mask=d_ok)
    tl.store(lse_ptr + row, (row_max + tl.log2(row_sum)) * LN2)


def _variants() -> list[Variant]:
    table = []
    for arch, dtype, head_dim in itertools.product(
        ("sm80", "sm90a", "sm100f", "sm120f"), ("bf16", "fp16"), (64, 128, 256)
    ):
        key = {"dtype": dtype, "HEAD_DIM": head_dim}
        for heads, offsets in ((1, 32), (4, 16)):
            warps = 8 if head_dim == 256 or ((heads, head_dim) == (4, 128) and arch != "sm90a") else 4
            tile = {"OFFSETS": offsets, "BLOCK_N": 32 if head_dim == 256 else 64, "num_warps": warps, "num_stages": 2}
            table.append(Variant(two_simplicial_fwd_decode, arch, key | {"HEADS": heads}, tile))
        table.append(Variant(two_simplicial_fwd_merge, arch, key, {"BLOCK_PARTS": 8, "num_warps": 4}))
    return table


VARIANTS = _variants()
