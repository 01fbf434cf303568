"""The surprise gate (arXiv 2511.21408): portable Triton kernels, forward and backward.

`surprise_gate_rows` reads the rows of x once, a program each, and leaves two statistics per token; `surprise_gate_fwd` turns
them into the gate, a program for a block of tokens of one sequence. Backward goes the other way, with the sums for the four
parameters taken block by block and then in order: no atomics, so that two runs give the same bits.
"""

import itertools

import triton
import triton.language as tl

from triton_kernels.variant import Variant


@triton.jit
def _deltas(x_in_ptr, x_post_ptr, x_prior_ptr, first, d, mask):
    x = tl.load(x_in_ptr + first + d, mask=mask, other=0.0).to(tl.float32)
    delta = tl.load(x_post_ptr + first + d, mask=mask, other=0.0).to(tl.float32) - x
    prior_delta = tl.load(x_prior_ptr + first + d, mask=mask, other=0.0).to(tl.float32) - x
    return delta, prior_delta


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _moving_average(x_ptr, t, last, window, mask):
    """The mean of the last `window` values up to t, x[0] standing in for those before the first; `last` is the last t."""
    terms = tl.minimum(window, last + 1)
    total = tl.zeros(t.shape, tl.float32)
    for back in range(0, terms):
        total += tl.load(x_ptr + tl.maximum(t - back, 0), mask=mask, other=0.0)
    if window > terms:  # not 0 * x[0], which is NaN for an infinite x[0]
        total += tl.load(x_ptr) * (window - terms)
    return total / window


@triton.jit
def surprise_gate_rows(
    x_in_ptr: "*dtype:16", x_post_ptr: "*dtype:16", x_prior_ptr: "*dtype:16", o_ce_ptr: "*fp32",
    d_st_ptr: "*fp32:16", ce_ptr: "*fp32:16", dim: "i32:8",
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    change = tl.zeros([BLOCK_D], tl.float32)
    expected = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        delta, prior_delta = _deltas(x_in_ptr, x_post_ptr, x_prior_ptr, row * dim, d, d < dim)
        change += delta * delta
        expected += prior_delta * (2 * delta - prior_delta)
    tl.store(d_st_ptr + row, tl.sum(change) / dim)
    tl.store(ce_ptr + row, tl.sum(expected) / dim + tl.log(tl.load(o_ce_ptr) + 1e-10))


@triton.jit
def surprise_gate_fwd(
    d_st_ptr: "*fp32:16", ce_ptr: "*fp32:16", beta_ce_ptr: "*fp32", beta_cu_ptr: "*fp32", m_cu_ptr: "*fp32",
    cu_ptr: "*fp32:16", g_ptr: "*fp32:16", length: "i32", window: "i32",
    BLOCK_T: tl.constexpr,
):
    blocks = tl.cdiv(length, BLOCK_T)
    first = (tl.program_id(0) // blocks).to(tl.int64) * length
    start = tl.program_id(0) % blocks * BLOCK_T
    t = start + tl.arange(0, BLOCK_T)
    mask = t < length
    average = _moving_average(d_st_ptr + first, t, tl.minimum(start + BLOCK_T, length) - 1, window, mask)
    cu = tl.load(d_st_ptr + first + t, mask=mask, other=0.0) - tl.load(m_cu_ptr) * average
    z_ce = tl.load(beta_ce_ptr) * tl.load(ce_ptr + first + t, mask=mask, other=0.0)
    z_cu = tl.load(beta_cu_ptr) * cu
    tl.store(cu_ptr + first + t, cu, mask=mask)
    tl.store(g_ptr + first + t, _sigmoid(z_ce) + _sigmoid(-z_ce) * _sigmoid(z_cu), mask=mask)


@triton.jit
def surprise_gate_bwd(
    grad_g_ptr: "*fp32:16", d_st_ptr: "*fp32:16", ce_ptr: "*fp32:16", cu_ptr: "*fp32:16",
    beta_ce_ptr: "*fp32", beta_cu_ptr: "*fp32",
    grad_ce_ptr: "*fp32:16", grad_cu_ptr: "*fp32:16", parts_ptr: "*fp32:16", length: "i32", window: "i32",
    BLOCK_T: tl.constexpr,
):
    """Gradients of ce and cu, and this block's share of the four sums over tokens: parts [4, programs]."""
    blocks = tl.cdiv(length, BLOCK_T)
    first = (tl.program_id(0) // blocks).to(tl.int64) * length
    start = tl.program_id(0) % blocks * BLOCK_T
    t = start + tl.arange(0, BLOCK_T)
    mask = t < length
    average = _moving_average(d_st_ptr + first, t, tl.minimum(start + BLOCK_T, length) - 1, window, mask)
    ce = tl.load(ce_ptr + first + t, mask=mask, other=0.0)
    cu = tl.load(cu_ptr + first + t, mask=mask, other=0.0)
    beta_ce = tl.load(beta_ce_ptr)
    beta_cu = tl.load(beta_cu_ptr)
    grad_g = tl.load(grad_g_ptr + first + t, mask=mask, other=0.0)
    k = grad_g * _sigmoid(-beta_ce * ce) * _sigmoid(-beta_cu * cu)  # grad_g (1 - g)
    k_ce = k * _sigmoid(beta_ce * ce)
    k_cu = k * _sigmoid(beta_cu * cu)
    tl.store(grad_ce_ptr + first + t, beta_ce * k_ce, mask=mask)
    tl.store(grad_cu_ptr + first + t, beta_cu * k_cu, mask=mask)
    parts_ptr += tl.program_id(0)
    tl.store(parts_ptr, tl.sum(k_ce * ce))
    tl.store(parts_ptr + tl.num_programs(0), tl.sum(k_cu * cu))
    tl.store(parts_ptr + 2 * tl.num_programs(0), tl.sum(beta_ce * k_ce))
    tl.store(parts_ptr + 3 * tl.num_programs(0), -tl.sum(tl.where(mask, beta_cu * k_cu * average, 0.0)))


@triton.jit
def _sum_of_parts(ptr, num_parts, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_parts, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(ptr + i, mask=i < num_parts, other=0.0)
    return tl.sum(total)


@triton.jit
def surprise_gate_bwd_sum(
    parts_ptr: "*fp32:16", o_ce_ptr: "*fp32", grad_beta_ce_ptr: "*fp32", grad_beta_cu_ptr: "*fp32",
    grad_o_ce_ptr: "*fp32", grad_m_cu_ptr: "*fp32", num_parts: "i32",
    BLOCK: tl.constexpr,
):
    tl.store(grad_beta_ce_ptr, _sum_of_parts(parts_ptr, num_parts, BLOCK))
    tl.store(grad_beta_cu_ptr, _sum_of_parts(parts_ptr + num_parts, num_parts, BLOCK))
    grad_log = _sum_of_parts(parts_ptr + 2 * num_parts, num_parts, BLOCK)
    tl.store(grad_o_ce_ptr, grad_log / (tl.load(o_ce_ptr) + 1e-10))
    tl.store(grad_m_cu_ptr, _sum_of_parts(parts_ptr + 3 * num_parts, num_parts, BLOCK))


@triton.jit
def surprise_gate_bwd_rows(
    x_in_ptr: "*dtype:16", x_post_ptr: "*dtype:16", x_prior_ptr: "*dtype:16", grad_ce_ptr: "*fp32:16",
    grad_cu_ptr: "*fp32:16", grad_in_ptr: "*dtype:16", grad_post_ptr: "*dtype:16", grad_prior_ptr: "*dtype:16", dim: "i32:8",
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    of_expected = tl.load(grad_ce_ptr + row) * 2 / dim
    of_change = tl.load(grad_cu_ptr + row) * 2 / dim
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        delta, prior_delta = _deltas(x_in_ptr, x_post_ptr, x_prior_ptr, row * dim, d, d < dim)
        grad_post = of_change * delta + of_expected * prior_delta
        grad_prior = of_expected * (delta - prior_delta)
        dtype = x_in_ptr.dtype.element_ty
        tl.store(grad_post_ptr + row * dim + d, grad_post.to(dtype), mask=d < dim)
        tl.store(grad_prior_ptr + row * dim + d, grad_prior.to(dtype), mask=d < dim)
        tl.store(grad_in_ptr + row * dim + d, (-(grad_post + grad_prior)).to(dtype), mask=d < dim)


# On the H100, 8 x 4096 x 2048 bf16, the rows' kernels run at a copy's bandwidth with any BLOCK_D from 256 to 2048 and 1 to 8 warps.
def _variants() -> list[Variant]:
    table = []
    for arch in ("sm80", "sm90a", "sm100f", "sm120f"):
        for kernel, dtype in itertools.product((surprise_gate_rows, surprise_gate_bwd_rows), ("bf16", "fp16", "fp32")):
            table.append(Variant(kernel, arch, {"dtype": dtype}, {"BLOCK_D": 1024, "num_warps": 4}))
        for kernel in (surprise_gate_fwd, surprise_gate_bwd):
            table.append(Variant(kernel, arch, {}, {"BLOCK_T": 128, "num_warps": 4}))
        table.append(Variant(surprise_gate_bwd_sum, arch, {}, {"BLOCK": 1024, "num_warps": 4}))
    return table


VARIANTS = _variants()
