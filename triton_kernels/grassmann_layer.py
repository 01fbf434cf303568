"""The gate of a layer of Grassmann mixing (arXiv 2512.19428): portable Triton kernel, forward.

Two products into one sum, and the blend before it leaves the registers: torch's products and grassmann_blend after them read
and write the logits three times more.
"""

import itertools

import triton
import triton.language as tl

from triton_kernels.variant import Variant


@triton.jit
def grassmann_layer_gate(
    x_ptr: "*dtype:16", g_ptr: "*dtype:16", w_x_ptr: "*dtype:16", w_g_ptr: "*dtype:16", bias_ptr: "*dtype:16",
    out_ptr: "*dtype:16", logits_ptr: "*dtype:16", num_tokens: "i32", dim: "i32:16",
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """logits = x W_x^T + g W_g^T + bias and their blend, [num_tokens, dim]; dim is a multiple of BLOCK_N and BLOCK_K."""
    tiles = dim // BLOCK_N
    row = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = (row < num_tokens)[:, None]
    row = tl.minimum(row, num_tokens - 1).to(tl.int64)[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, 2 * dim, BLOCK_K):
        of_x = k < dim
        at = tl.where(of_x, k, k - dim) + tl.arange(0, BLOCK_K)
        rows = tl.load(tl.where(of_x, x_ptr, g_ptr) + row * dim + at[None, :])
        weights = tl.load(tl.where(of_x, w_x_ptr, w_g_ptr) + column[None, :] * dim + at[:, None])
        sums = tl.dot(rows, weights, sums)
    dtype = out_ptr.dtype.element_ty
    logits = (sums + tl.load(bias_ptr + column).to(tl.float32)[None, :]).to(dtype)
    alpha = 1.0 / (1.0 + tl.exp(-logits.to(tl.float32)))  # of what is saved, as grassmann_blend has it
    at = row * dim + column[None, :]
    out = alpha * tl.load(x_ptr + at).to(tl.float32) + (1.0 - alpha) * tl.load(g_ptr + at).to(tl.float32)
    tl.store(logits_ptr + at, logits, mask=row_ok)
    tl.store(out_ptr + at, out.to(dtype), mask=row_ok)


# H100, 65,536 tokens, dim 256, bf16: 70 us, other tiles 75 to 103, products and blend one by one 122 (docs/grassmann.md). The
# rest is not measured: what fits the shared memory of every GPU.
def _tile(arch: str) -> dict[str, int]:
    if arch in ("sm90a", "sm100f"):  # on the latter 4 warps spill
        return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4 if arch == "sm90a" else 8, "num_stages": 3}
    return {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}


VARIANTS = [
    Variant(grassmann_layer_gate, arch, {"dtype": dtype}, _tile(arch))
    for arch, dtype in itertools.product(("sm80", "sm90a", "sm100f", "sm120f"), ("bf16", "fp16"))
]
