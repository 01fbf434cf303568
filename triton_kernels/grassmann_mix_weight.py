"""The weight of Grassmann mixing in the order of columns that grassmann_mix.py multiplies in, and its gradient back from it."""

import triton
import triton.language as tl

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
def grassmann_mix_weight(
    weight_ptr: "*dtype:16", bias_ptr: "*dtype:16", has_bias: "i32", columns_ptr: "*dtype:16", r: "i32", BLOCK: tl.constexpr
):  # fmt: skip
    """Row by row: [d, r (r - 1) / 2] and [d] to [d, 512]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    plane, ok = _plane_of(column, r)
    x = tl.load(weight_ptr + row * (r * (r - 1) // 2) + plane, mask=ok, other=0.0)
    x = tl.where(column == BIAS, tl.load(bias_ptr + row, mask=has_bias != 0, other=0.0), x)
    tl.store(columns_ptr + row * 512 + column, x)


@triton.jit
def grassmann_mix_bwd_weight_sum(
    part_ptr: "*fp32:16", grad_weight_ptr: "*dtype:16", grad_bias_ptr: "*dtype:16", num_parts: "i32", d: "i32:8", r: "i32",
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The gradients of the weight and of the bias, from partial sums [num_parts, 512, d]."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    at = part_ptr + column[:, None] * d + row[None, :]
    mask = (row < d)[None, :]
    sums = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    for _ in tl.range(0, num_parts, loop_unroll_factor=UNROLL):
        sums += tl.load(at, mask=mask, other=0.0)
        at += 512 * d
    plane, ok = _plane_of(column, r)
    to = grad_weight_ptr + row.to(tl.int64)[None, :] * (r * (r - 1) // 2) + plane[:, None]
    sums = sums.to(grad_weight_ptr.dtype.element_ty)
    tl.store(to, sums, mask=mask & ok[:, None])
    tl.store(grad_bias_ptr + row[None, :] + 0 * column[:, None], sums, mask=mask & (column == BIAS)[:, None])


VARIANTS = [
    Variant(kernel, "sm90a", {"dtype": dtype}, tile)
    for dtype in ("bf16", "fp16")
    for kernel, tile in (
        (grassmann_mix_weight, {"BLOCK": 512, "num_warps": 4}),
        (grassmann_mix_bwd_weight_sum, {"BLOCK_C": 8, "BLOCK_D": 64, "UNROLL": 8, "num_warps": 4}),
    )
]
