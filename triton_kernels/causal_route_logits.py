"""The causal router's logits (arXiv 2511.21408): portable Triton kernels, forward and backward.

Forward is a warp for a few tokens, which reads the weight once for all of them, each row and, where dim_before, the columns of the
row before that count, is not 0, the row before it, which it finds in the L1. It goes from the last row to the first: the L2 still
holds the last rows of what was just written, and then the first ones for `route_gather_rows`. Backward is a program per block of
tokens of one sequence: it writes the rows' gradients and its share of the weight's.
"""

import itertools

import triton
import triton.language as tl

from triton_kernels.variant import Variant


@triton.jit
def _add_products(total, rows_ptr, weight_ptr, present, d, dim):
    """total + w * x at columns d of some rows."""
    weight = tl.load(weight_ptr + d, mask=d < dim, other=0.0)[None, :]
    x = tl.load(rows_ptr + d[None, :], mask=present & (d < dim)[None, :], other=0.0).to(tl.float32)
    return tl.fma(x, tl.broadcast_to(weight, x.shape), total)


@triton.jit
def causal_route_logits_fwd(
    x_ptr: "*dtype:16", weight_ptr: "*fp32:16", prev_ptr: "*dtype:16", logits_ptr: "*fp32:16",
    rows: "i32", length: "i32", dim: "i32:8", dim_before: "i32:8", has_prev: "i32",
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """rows: of all sequences."""
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    present = (row < rows)[:, None]
    first = (row % length == 0)[:, None]
    own_ptr = x_ptr + (row.to(tl.int64) * dim)[:, None]
    before_ptr = tl.where(first, prev_ptr + ((row // length).to(tl.int64) * dim)[:, None], own_ptr - dim)
    before_ptr = tl.multiple_of(before_ptr, (16, 16))  # which the compiler forgets where pointers are chosen
    known = present & (tl.where(first, has_prev, 1) != 0)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        total = _add_products(total, own_ptr, weight_ptr, present, d, dim)
        if dim_before != 0:
            total = _add_products(total, before_ptr, weight_ptr + dim, known, d, dim)
    tl.store(logits_ptr + row, tl.sum(total, 1), mask=row < rows)


@triton.jit
def causal_route_logits_bwd(
    grad_logits_ptr: "*fp32:16", x_ptr: "*dtype:16", weight_ptr: "*fp32:16", prev_ptr: "*dtype:16",
    grad_x_ptr: "*dtype:16", grad_prev_ptr: "*dtype:16", parts_ptr: "*fp32:16",
    length: "i32", dim: "i32:8", dim_before: "i32:8", has_prev: "i32",
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """parts [programs, dim + dim_before]: what the tokens of a block add to the weight's gradient, whose sum is the host's."""
    blocks = tl.cdiv(length, BLOCK_T)
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    start_t = tl.program_id(0) % blocks * BLOCK_T
    t = start_t + tl.arange(0, BLOCK_T)
    grad_logits_ptr += sequence * length
    own = tl.load(grad_logits_ptr + t, mask=t < length, other=0.0)[:, None]
    following = tl.load(grad_logits_ptr + t + 1, mask=t + 1 < length, other=0.0)[:, None]
    first = tl.load(grad_logits_ptr)  # the first token's gradient reaches what came before it
    of_prev = tl.where((start_t == 0) & (has_prev != 0), dim, 0)
    parts_ptr += tl.program_id(0).to(tl.int64) * (dim + dim_before)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = d < dim
        row = (sequence * length + t)[:, None] * dim + d[None, :]
        mask = (t < length)[:, None] & inside[None, :]
        now = tl.load(weight_ptr + d, mask=inside, other=0.0)
        before = tl.load(weight_ptr + dim + d, mask=d < dim_before, other=0.0)
        grad = own * now[None, :] + following * before[None, :]
        tl.store(grad_x_ptr + row, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
        x = tl.load(x_ptr + row, mask=mask, other=0.0).to(tl.float32)
        prev = tl.load(prev_ptr + sequence * dim + d, mask=d < of_prev, other=0.0).to(tl.float32)
        tl.store(parts_ptr + d, tl.sum(own * x, 0), mask=inside)
        tl.store(parts_ptr + dim + d, tl.sum(following * x, 0) + first * prev, mask=d < dim_before)
        grad_prev = (first * before).to(grad_x_ptr.dtype.element_ty)
        tl.store(grad_prev_ptr + sequence * dim + d, grad_prev, mask=d < of_prev)


# Forward on the H100, 8 x 4096 x 2048 bf16, right behind a dense block, us without and with a row before, by (ROWS, BLOCK_D, num_warps):
# (4, 512, 1) 47.5 and 53.9, (8, 256, 1) 49.5 and 59.2, (4, 256, 1) 51.2 and 56.1, (2, 1024, 1) 52.5 and 60.2, (8, 512, 2) 50.8 and 59.2,
# (32, 256, 4) 50.2 and 58.9; first all rows, then all rows before, 48.3 and 62.5; a program of two warps per token 49.2 and 66.2.
# Unrolled twice 55.7, through shared memory in 2 or 3 stages 50.3 and 49.0. x marked as evicted first: 42.7 and 64.4, but then the
# gather behind it takes 44.4 instead of 40.7 (what was written before stays in the L2 and is written back later).
# Backward: not measured.
def _variants() -> list[Variant]:
    table = []
    for arch, dtype in itertools.product(("sm80", "sm90a", "sm100f", "sm120f"), ("bf16", "fp16", "fp32")):
        rows = {"ROWS": 4, "BLOCK_D": 256 if dtype == "fp32" else 512, "num_warps": 1}
        table.append(Variant(causal_route_logits_fwd, arch, {"dtype": dtype}, rows))
        tile = {"BLOCK_T": 32, "BLOCK_D": 64, "num_warps": 4}
        table.append(Variant(causal_route_logits_bwd, arch, {"dtype": dtype}, tile))
    return table


VARIANTS = _variants()
