"""The gate of Grassmann mixing (arXiv 2512.19428): portable Triton kernels, element by element, forward and backward.

The last numel % 8 elements go by themselves: a mask that ends anywhere would cost the others their 16-byte loads.
"""

import itertools

import triton
import triton.language as tl

from triton_kernels.variant import Variant


@triton.jit
def _read(ptr, at, mask):
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _gate(logits_ptr, at, mask):
    return 1.0 / (1.0 + tl.exp(-_read(logits_ptr, at, mask)))


@triton.jit
def _blend(h_ptr, g_ptr, logits_ptr, out_ptr, at, mask):
    alpha = _gate(logits_ptr, at, mask)
    out = alpha * _read(h_ptr, at, mask) + (1.0 - alpha) * _read(g_ptr, at, mask)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _blend_backward(grad_out_ptr, h_ptr, g_ptr, logits_ptr, grad_h_ptr, grad_g_ptr, grad_logits_ptr, at, to, mask):
    alpha = _gate(logits_ptr, at, mask)
    grad = _read(grad_out_ptr, at, mask)
    grad_h = alpha * grad
    grad_logits = grad_h * (1.0 - alpha) * (_read(h_ptr, at, mask) - _read(g_ptr, at, mask))
    dtype = h_ptr.dtype.element_ty
    tl.store(grad_h_ptr + at, grad_h.to(dtype), mask=mask)
    tl.store(grad_g_ptr + at, ((1.0 - alpha) * grad).to(dtype), mask=mask)
    tl.store(grad_logits_ptr + to, grad_logits.to(dtype), mask=mask)


@triton.jit
def grassmann_blend_fwd(
    h_ptr: "*dtype:16", g_ptr: "*dtype:16", logits_ptr: "*dtype:16", out_ptr: "*dtype:16", numel: "i64",
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    whole = numel // 8 * 8
    _blend(h_ptr, g_ptr, logits_ptr, out_ptr, at, at < whole)
    if tl.program_id(0) == 0:
        rest = whole + tl.arange(0, 8)
        _blend(h_ptr, g_ptr, logits_ptr, out_ptr, rest, rest < numel)


@triton.jit
def grassmann_blend_bwd(
    grad_out_ptr: "*dtype:16", h_ptr: "*dtype:16", g_ptr: "*dtype:16", logits_ptr: "*dtype:16", grad_h_ptr: "*dtype:16",
    grad_g_ptr: "*dtype:16", grad_logits_ptr: "*dtype:16", row_chunks: "i32", stride: "i64:8", numel: "i64",
    BLOCK: tl.constexpr,
):
    """grad_logits has rows of 8 * row_chunks elements, `stride` apart; what is in one piece is one row."""
    chunk = tl.program_id(0) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    eight = tl.arange(0, 8)[None, :]
    at = chunk.to(tl.int64)[:, None] * 8 + eight
    to = (chunk // row_chunks).to(tl.int64)[:, None] * stride + (chunk % row_chunks).to(tl.int64)[:, None] * 8 + eight
    whole = numel // 8 * 8
    _blend_backward(grad_out_ptr, h_ptr, g_ptr, logits_ptr, grad_h_ptr, grad_g_ptr, grad_logits_ptr, at, to, at < whole)
    if tl.program_id(0) == 0:
        rest = whole + tl.arange(0, 8)
        _blend_backward(
            grad_out_ptr, h_ptr, g_ptr, logits_ptr, grad_h_ptr, grad_g_ptr, grad_logits_ptr, rest, rest, rest < numel
        )


# Not measured: 8 elements a thread, one 16-byte load of bf16 from each tensor.
VARIANTS = [
    Variant(kernel, arch, {"dtype": dtype}, {"BLOCK": 1024, "num_warps": 4})
    for arch, dtype, kernel in itertools.product(
        ("sm80", "sm90a", "sm100f", "sm120f"), ("bf16", "fp16", "fp32"), (grassmann_blend_fwd, grassmann_blend_bwd)
    )
]
