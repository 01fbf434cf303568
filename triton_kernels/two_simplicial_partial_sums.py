"""2-simplicial attention, backward: what every variant's programs leave in fp32, added up in an order that does not depend on
timing. Portable, and the same for the portable and the Hopper kernels.
"""

import itertools

import triton
import triton.language as tl

from triton_kernels.tile_rows import _row_ptrs
from triton_kernels.variant import Variant


@triton.jit
def two_simplicial_bwd_merge(
    part_k_ptr: "*fp32:16", part_v_ptr: "*fp32:16", grad_k_ptr: "*dtype:16", grad_v_ptr: "*dtype:16",
    num_queries: "i32", num_keys: "i32", kv_heads: "i32", group: "i32", head_dim: "i32:8",
    w_short: "i32", scale: "fp32", chunk_rows: "i32", chunk_span: "i32", reach: "i32",
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """dk_short and dv_short: the chunks' partial rows, added in the order of the chunks.

    A chunk has a row for each position from its first - w_short + 1 to its last + reach.
    """
    num_blocks = tl.cdiv(num_keys, BLOCK_N)
    batch_head = (tl.program_id(0) // num_blocks).to(tl.int64)
    num_rows = num_queries * group
    num_chunks = tl.cdiv(num_rows, chunk_rows)
    past = num_keys - num_queries
    n = tl.program_id(0) % num_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, HEAD_DIM)
    d_ok = (d < head_dim)[None, :]
    first_n = tl.program_id(0) % num_blocks * BLOCK_N
    # The queries that see a key of this block: positions first_n .. last key + w_short - 1.
    first_chunk = tl.maximum(first_n - reach - past, 0) * group // chunk_rows
    last_pos = tl.minimum(first_n + BLOCK_N - 1, num_keys - 1) + w_short - 1
    end_row = tl.minimum(tl.minimum(last_pos, num_keys - 1) - past + 1, num_queries) * group
    grad_k = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    grad_v = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    for chunk in range(first_chunk, tl.cdiv(tl.maximum(end_row, 0), chunk_rows)):
        chunk_first = chunk * chunk_rows // group + past
        chunk_last = (tl.minimum((chunk + 1) * chunk_rows, num_rows) - 1) // group + past
        part_row = n - (chunk_first - w_short + 1)
        mask = ((part_row >= 0) & (n <= chunk_last + reach) & (n < num_keys))[:, None] & d_ok
        base = (batch_head * num_chunks + chunk) * chunk_span
        grad_k += tl.load(_row_ptrs(part_k_ptr, base + part_row, head_dim, d), mask=mask, other=0.0)
        grad_v += tl.load(_row_ptrs(part_v_ptr, base + part_row, head_dim, d), mask=mask, other=0.0)
    batch = batch_head // kv_heads
    row = (batch * num_keys + n) * kv_heads + batch_head % kv_heads
    mask = (n < num_keys)[:, None] & d_ok
    tl.store(_row_ptrs(grad_k_ptr, row, head_dim, d), (grad_k * scale).to(grad_k_ptr.dtype.element_ty), mask=mask)
    tl.store(_row_ptrs(grad_v_ptr, row, head_dim, d), grad_v.to(grad_v_ptr.dtype.element_ty), mask=mask)


@triton.jit
def two_simplicial_bwd_sum(
    part_k_ptr: "*fp32:16", part_v_ptr: "*fp32:16", grad_k_ptr: "*dtype:16", grad_v_ptr: "*dtype:16",
    num_keys: "i32", kv_heads: "i32", head_dim: "i32:8", scale: "fp32", num_splits: "i32", block_keys: "i32",
    HEAD_DIM: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):
    """dk_long and dv_long of one key: the splits' partial sums of two_simplicial_bwd_dkv (blocks of block_keys), added in an
    order that only their number decides."""
    batch_head = (tl.program_id(0) // num_keys).to(tl.int64)
    n = tl.program_id(0) % num_keys
    d = tl.arange(0, HEAD_DIM)
    d_ok = d < head_dim
    first_part = (batch_head * tl.cdiv(num_keys, block_keys) + n // block_keys) * num_splits
    grad_k = tl.zeros([BLOCK_SPLITS, HEAD_DIM], tl.float32)
    grad_v = tl.zeros([BLOCK_SPLITS, HEAD_DIM], tl.float32)
    for first_split in range(0, num_splits, BLOCK_SPLITS):
        split = first_split + tl.arange(0, BLOCK_SPLITS)
        part_row = (first_part + split) * block_keys + n % block_keys
        mask = (split < num_splits)[:, None] & d_ok[None, :]
        grad_k += tl.load(_row_ptrs(part_k_ptr, part_row, head_dim, d), mask=mask, other=0.0)
        grad_v += tl.load(_row_ptrs(part_v_ptr, part_row, head_dim, d), mask=mask, other=0.0)
    row = (batch_head // kv_heads * num_keys + n) * kv_heads + batch_head % kv_heads
    grad_k = (tl.sum(grad_k, 0) * scale).to(grad_k_ptr.dtype.element_ty)
    tl.store(grad_k_ptr + row * head_dim + d, grad_k, mask=d_ok)
    tl.store(grad_v_ptr + row * head_dim + d, tl.sum(grad_v, 0).to(grad_v_ptr.dtype.element_ty), mask=d_ok)


VARIANTS = [
    Variant(kernel, arch, {"dtype": dtype, "HEAD_DIM": head_dim}, tile | {"num_warps": 4})
    for arch, dtype, head_dim in itertools.product(
        ("sm80", "sm90a", "sm100f", "sm120f"), ("bf16", "fp16", "fp32"), (32, 64, 128, 256)
    )
    for kernel, tile in ((two_simplicial_bwd_merge, {"BLOCK_N": 16}), (two_simplicial_bwd_sum, {"BLOCK_SPLITS": 8}))
]
