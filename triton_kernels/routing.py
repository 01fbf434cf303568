"""Routing tokens to a layer (arXiv 2511.21408): portable Triton kernels.

`route_topk` is a program per sequence. Its threshold is the k-th largest score, found bit by bit on an integer image of the
scores that sorts as they do: 32 counts of the scores at or above a candidate, and no sort. What reaches the threshold is then
written in the order of time, ties from the left.

The moves are a program per routed token. An index outside [0, length) moves nothing, so that none corrupts memory.
"""

import itertools

import triton
import triton.language as tl

from triton_kernels.variant import Variant


@triton.jit
def _image(score):
    """An int32 that sorts as the score does, NaN with -inf and -0 with 0."""
    score = tl.where(score != score, float("-inf"), score)
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _load_images(scores_ptr, t, length):
    return _image(tl.load(scores_ptr + t, mask=t < length, other=0.0))


@triton.jit
def _count_from(scores_ptr, least, length, BLOCK: tl.constexpr):
    """How many images are at least `least`."""
    count = tl.full([], 0, tl.int32)
    for start in range(0, length, BLOCK):
        t = start + tl.arange(0, BLOCK)
        reaches = (_load_images(scores_ptr, t, length) >= least) & (t < length)
        count += tl.sum(reaches.to(tl.int32))
    return count


@triton.jit
def route_topk(
    scores_ptr: "*fp32:16", idx_ptr: "*i32:16", mask_ptr: "*i8:16", length: "i32", k: "i32",
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * length
    least = tl.full([], -2147483648, tl.int64)
    for i in range(0, 32):
        candidate = least + (tl.full([], 1, tl.int64) << (31 - i))
        count = _count_from(scores_ptr, candidate.to(tl.int32), length, BLOCK)
        least = tl.where(count >= k, candidate, least)
    bar = least.to(tl.int32)
    # No score's image is the largest int32 (that would be a NaN), so bar + 1 fits.
    ties_wanted = k - _count_from(scores_ptr, bar + 1, length, BLOCK)
    ties = tl.full([], 0, tl.int32)
    placed = tl.full([], 0, tl.int32)
    for start in range(0, length, BLOCK):
        t = start + tl.arange(0, BLOCK)
        image = _load_images(scores_ptr, t, length)
        tie = ((image == bar) & (t < length)).to(tl.int32)
        chosen = (image > bar) & (t < length) | (tie != 0) & (ties + tl.cumsum(tie, 0) <= ties_wanted)
        slot = placed + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(idx_ptr + row * k + slot, t, mask=chosen)
        tl.store(mask_ptr + row * length + t, chosen.to(tl.int8), mask=t < length)
        ties += tl.sum(tie)
        placed += tl.sum(chosen.to(tl.int32))


@triton.jit
def route_threshold(
    scores_ptr: "*fp32:16", idx_ptr: "*i32:16", count_ptr: "*i32:16", length: "i32", cap: "i32", threshold: "fp32",
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    placed = tl.full([], 0, tl.int32)
    for start in range(0, length, BLOCK):
        t = start + tl.arange(0, BLOCK)
        score = tl.load(scores_ptr + row * length + t, mask=t < length, other=0.0)
        chosen = (score >= threshold) & (t < length)
        slot = placed + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(idx_ptr + row * cap + slot, t, mask=chosen & (slot < cap))
        placed += tl.sum(chosen.to(tl.int32))
    placed = tl.minimum(placed, cap)
    for start in range(0, cap, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        tl.store(idx_ptr + row * cap + slot, tl.full([BLOCK], -1, tl.int32), mask=(slot >= placed) & (slot < cap))
    tl.store(count_ptr + row, placed)


@triton.jit
def _slot(idx_ptr, length, slots, dim):
    """This program's slot, the row of the token in it, and how many elements to move: none if it is empty."""
    slot = tl.program_id(0).to(tl.int64)
    t = tl.load(idx_ptr + slot)
    return slot, slot // slots * length + t, tl.where((t >= 0) & (t < length), dim, 0)


@triton.jit
def route_gather_rows(
    from_ptr: "*dtype:16", idx_ptr: "*i32:16", to_ptr: "*dtype:16", length: "i32", slots: "i32", dim: "i32:8",
    BLOCK_D: tl.constexpr,
):
    slot, row, present = _slot(idx_ptr, length, slots, dim)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(from_ptr + row * dim + d, mask=d < present, other=0.0)
        tl.store(to_ptr + slot * dim + d, x, mask=d < dim)


@triton.jit
def route_scatter_rows(
    from_ptr: "*dtype:16", idx_ptr: "*i32:16", to_ptr: "*dtype:16", length: "i32", slots: "i32", dim: "i32:8",
    BLOCK_D: tl.constexpr,
):
    slot, row, present = _slot(idx_ptr, length, slots, dim)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = tl.load(from_ptr + slot * dim + d, mask=d < present, other=0.0)
        tl.store(to_ptr + row * dim + d, x, mask=d < present)


@triton.jit
def route_scatter_add_rows(
    out_ptr: "*dtype:16", y_ptr: "*dtype:16", idx_ptr: "*i32:16", gate_ptr: "*fp32:16",
    length: "i32", slots: "i32", dim: "i32:8", has_gate: "i32",
    BLOCK_D: tl.constexpr,
):
    slot, row, present = _slot(idx_ptr, length, slots, dim)
    gate = tl.load(gate_ptr + slot, mask=has_gate != 0, other=1.0)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = d < present
        base = tl.load(out_ptr + row * dim + d, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + slot * dim + d, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * dim + d, (base + gate * y).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def route_scatter_add_bwd(
    grad_out_ptr: "*dtype:16", y_ptr: "*dtype:16", idx_ptr: "*i32:16", gate_ptr: "*fp32:16",
    grad_y_ptr: "*dtype:16", grad_gate_ptr: "*fp32:16",
    length: "i32", slots: "i32", dim: "i32:8", has_gate: "i32",
    BLOCK_D: tl.constexpr,
):
    slot, row, present = _slot(idx_ptr, length, slots, dim)
    gate = tl.load(gate_ptr + slot, mask=has_gate != 0, other=1.0)
    dot = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        grad = tl.load(grad_out_ptr + row * dim + d, mask=d < present, other=0.0).to(tl.float32)
        dot += grad * tl.load(y_ptr + slot * dim + d, mask=d < present, other=0.0).to(tl.float32)
        tl.store(grad_y_ptr + slot * dim + d, (gate * grad).to(grad_y_ptr.dtype.element_ty), mask=d < dim)
    if has_gate != 0:
        tl.store(grad_gate_ptr + slot, tl.sum(dot))


# Not measured yet: the scores of 4096 tokens are one block of 8 warps, a row of 2048 bf16 two rounds of 4 warps.
def _variants() -> list[Variant]:
    table = []
    rows = {"BLOCK_D": 1024, "num_warps": 4}
    for arch in ("sm80", "sm90a", "sm100f", "sm120f"):
        for kernel in (route_topk, route_threshold):
            table.append(Variant(kernel, arch, {}, {"BLOCK": 4096, "num_warps": 8}))
        # Moves take fp16 for all that is two bytes wide.
        for kernel, dtype in itertools.product((route_gather_rows, route_scatter_rows), ("fp16", "fp32")):
            table.append(Variant(kernel, arch, {"dtype": dtype}, rows))
        for kernel, dtype in itertools.product((route_scatter_add_rows, route_scatter_add_bwd), ("bf16", "fp16", "fp32")):
            table.append(Variant(kernel, arch, {"dtype": dtype}, rows))
    return table


VARIANTS = _variants()
