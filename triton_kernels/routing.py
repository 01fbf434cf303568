"""Routing tokens to a layer (arXiv 2511.21408): portable Triton kernels.

`route_topk` is a program per sequence. Its threshold is the k-th largest score, found from the top bit down of an integer that
sorts as scores do, by counting the scores at or above a candidate: no sort. A sequence that fits a block stays in registers
meanwhile, and each round settles two bits. What reaches the threshold is then written in the order of time, ties from the left.

The moves read and write every row once. Gathering goes from the first row to the last, because what made the scores came from the
other end, and adding back from the last to the first, because the block ended with the last: each finds in the L2 what was just
there. Adding back goes by the rows of the result: `route_slots` leaves
for each row which slot it takes, so that untouched rows are copied on the way. An index outside [0, length) moves nothing, so
that none corrupts memory.
"""

import triton
import triton.language as tl

from triton_kernels.variant import Variant


@triton.jit
def _score(image):
    """The score of an int32 that sorts as scores do: NaN, which no score reaches, above inf, and -inf below its own image."""
    image = tl.maximum(image, -2139095041)
    return (image ^ ((image >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _load_scores(scores_ptr, t, length):
    """-inf for NaN, and NaN, which reaches nothing, behind the end."""
    score = tl.load(scores_ptr + t, mask=t < length, other=0.0)
    return tl.where(t < length, tl.where(score != score, float("-inf"), score), float("nan"))


@triton.jit
def _count_from(scores_ptr, least, length, BLOCK: tl.constexpr):
    """How many scores are at least `least`."""
    count = tl.full([], 0, tl.int32)
    for start in range(0, length, BLOCK):
        count += tl.sum((_load_scores(scores_ptr, start + tl.arange(0, BLOCK), length) >= least).to(tl.int32))
    return count


@triton.jit
def _kth_of_block(score, k, THREADS: tl.constexpr):
    """The image of the k-th largest score, two bits a round by three counts.

    A thread counts its scores, at most 127, in a float with 7 bits for each count: a compare and a multiply-add for each score
    and bar, where integers take twice as long. A block's counts are at most 2^15, and one sum takes two words of two.
    """
    score = tl.reshape(score, [score.shape[0] // THREADS, THREADS])
    least = tl.full([], -2147483648, tl.int32)
    for i in range(0, 16):
        step = tl.full([], 1, tl.int32) << (30 - 2 * i)
        one = (score >= _score(least + step)).to(tl.float32)
        two = (score >= _score(least + step + step)).to(tl.float32)
        three = (score >= _score(least + step + step + step)).to(tl.float32)
        counts = tl.sum(tl.fma(three, 16384.0, tl.fma(two, 128.0, one)), 0).to(tl.int32)
        words = tl.sum(tl.join((counts & 0x7F) | (counts & 0x3F80) << 9, counts >> 14), 0)
        least += step * tl.sum(((words & 0xFFFF) >= k).to(tl.int32) + ((words >> 16) >= k).to(tl.int32))
    return least


@triton.jit
def _kth(scores_ptr, length, k, BLOCK: tl.constexpr):
    """The same for a sequence of any length, a bit a round."""
    least = tl.full([], -2147483648, tl.int64)
    for i in range(0, 32):
        candidate = least + (tl.full([], 1, tl.int64) << (31 - i))
        count = _count_from(scores_ptr, _score(candidate.to(tl.int32)), length, BLOCK)
        least = tl.where(count >= k, candidate, least)
    return least.to(tl.int32)


@triton.jit
def _place(score, t, bar, ties_wanted, ties, placed, idx_ptr, mask_ptr, length):
    """Writes what a block chooses behind the `placed` before it; how many ties and choices there are by now."""
    # Higher scores and ties are counted in one scan, 16 bits each: a block has fewer than 2^15 tokens.
    kind = (score > bar).to(tl.int32) + ((score == bar).to(tl.int32) << 16)
    upto = tl.cumsum(kind, 0)
    taken = tl.minimum(ties, ties_wanted)
    rank = (upto & 0xFFFF) + tl.minimum(ties + (upto >> 16), ties_wanted) - taken  # chosen ones up to this token
    chosen = (score > bar) | (score == bar) & (ties + (upto >> 16) <= ties_wanted)
    tl.store(idx_ptr + placed + rank - 1, t, mask=chosen)
    tl.store(mask_ptr + t, chosen.to(tl.int8), mask=t < length)
    total = tl.sum(kind)
    placed += (total & 0xFFFF) + tl.minimum(ties + (total >> 16), ties_wanted) - taken
    return ties + (total >> 16), placed


@triton.jit
def route_topk(
    scores_ptr: "*fp32:16", idx_ptr: "*i32:16", mask_ptr: "*i8:16", lowest_ptr: "*fp32:16", length: "i32", k: "i32",
    has_lowest: "i32", BLOCK: tl.constexpr, THREADS: tl.constexpr,
):
    """lowest: the k-th score of each sequence, for `route_calibrate`."""
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * length
    idx_ptr += row * k
    mask_ptr += row * length
    ties = tl.full([], 0, tl.int32)
    placed = tl.full([], 0, tl.int32)
    if length <= BLOCK:
        t = tl.arange(0, BLOCK)
        score = _load_scores(scores_ptr, t, length)
        bar = _score(_kth_of_block(score, k, THREADS))
        ties_wanted = k - tl.sum((score > bar).to(tl.int32))
        _place(score, t, bar, ties_wanted, ties, placed, idx_ptr, mask_ptr, length)
    else:
        image = _kth(scores_ptr, length, k, BLOCK)
        bar = _score(image)
        ties_wanted = k - _count_from(scores_ptr, _score(image + 1), length, BLOCK)
        for start in range(0, length, BLOCK):
            t = start + tl.arange(0, BLOCK)
            score = _load_scores(scores_ptr, t, length)
            ties, placed = _place(score, t, bar, ties_wanted, ties, placed, idx_ptr, mask_ptr, length)
    if has_lowest != 0:
        tl.store(lowest_ptr + row, bar)


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
def route_calibrate(
    threshold_ptr: "*fp32", calibrations_ptr: "*fp32", lowest_ptr: "*fp32:16", batch: "i32",
    BLOCK: tl.constexpr,
):
    total = tl.zeros([], tl.float32)
    for start in range(0, batch, BLOCK):
        row = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(lowest_ptr + row, mask=row < batch, other=0.0))
    lowest = total / batch
    calibrations = tl.load(calibrations_ptr) + 1
    tl.store(calibrations_ptr, calibrations)
    before = tl.load(threshold_ptr)
    after = before + tl.maximum(1 / calibrations, 0.02) * (lowest - before)
    tl.store(threshold_ptr, tl.where(tl.abs(lowest) < float("inf"), after, before))


@triton.jit
def route_gather_rows(
    from_ptr: "*dtype:16", idx_ptr: "*i32:16", to_ptr: "*dtype:16", length: "i32", slots: "i32", total: "i32", dim: "i32:8",
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """total: the slots of all sequences."""
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.load(idx_ptr + slot, mask=slot < total, other=-1)
    row = (slot // slots).to(tl.int64) * length + t
    present = ((t >= 0) & (t < length))[:, None]
    wanted = (slot < total)[:, None]
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        # A mask of its own for the columns: only in this form does the compiler see whole vectors.
        x = tl.load(from_ptr + row[:, None] * dim + d, mask=present & (d < dim), other=0.0)
        tl.store(to_ptr + slot.to(tl.int64)[:, None] * dim + d, x, mask=wanted & (d < dim))


@triton.jit
def route_slots(
    idx_ptr: "*i32:16", slot_of_ptr: "*i32:16", length: "i32", slots: "i32",
    BLOCK: tl.constexpr,
):
    """slot_of [rows]: the slot that each routed row takes, counted over all sequences, or -1. A program per sequence, so that
    its barrier is all that has to come between."""
    row = tl.program_id(0).to(tl.int64)
    idx_ptr += row * slots
    slot_of_ptr += row * length
    for start in range(0, length, BLOCK):
        t = start + tl.arange(0, BLOCK)
        tl.store(slot_of_ptr + t, tl.full([BLOCK], -1, tl.int32), mask=t < length)
    tl.debug_barrier()
    for start in range(0, slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        t = tl.load(idx_ptr + slot, mask=slot < slots, other=-1)
        tl.store(slot_of_ptr + t, tl.program_id(0) * slots + slot, mask=(t >= 0) & (t < length))


@triton.jit
def route_scatter_add_rows(
    base_ptr: "*dtype:16", y_ptr: "*dtype:16", slot_of_ptr: "*i32:16", gate_ptr: "*fp32:16", out_ptr: "*dtype:16",
    rows: "i32", dim: "i32:8", has_base: "i32", has_gate: "i32", replaces: "i32",
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """rows: of all sequences. Adds y to the base, or puts it in its place; without a base, in the place of zeros. The gate is
    one number for each slot, and for each row where y replaces."""
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slot_of_ptr + row, mask=row < rows, other=-1)
    of_gate = tl.where(replaces != 0, row, slot)
    gate = tl.load(gate_ptr + of_gate, mask=tl.where(has_gate != 0, slot, -1) >= 0, other=1.0)[:, None]
    routed = (slot >= 0)[:, None]
    wanted = (row < rows)[:, None]
    whole = replaces > has_gate  # y itself: what it replaces is not read
    based = ((row < rows * has_base) & (tl.where(whole, slot, -1) < 0))[:, None]
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        at = row.to(tl.int64)[:, None] * dim + d
        base = tl.load(base_ptr + at, mask=based & (d < dim), other=0.0).to(tl.float32)
        y = tl.load(y_ptr + slot.to(tl.int64)[:, None] * dim + d, mask=routed & (d < dim), other=0.0).to(tl.float32)
        # Neither base + 0 nor base + (y - base): both would change bits.
        new = base + gate * tl.where(replaces != 0, y - base, y)
        new = tl.where(routed, tl.where(whole, y, new), base)
        tl.store(out_ptr + at, new.to(out_ptr.dtype.element_ty), mask=wanted & (d < dim))


@triton.jit
def _slot(idx_ptr, length, slots, dim):
    """This program's slot, the row of the token in it, and how many elements to move: none if it is empty."""
    slot = tl.program_id(0).to(tl.int64)
    t = tl.load(idx_ptr + slot)
    return slot, slot // slots * length + t, tl.where((t >= 0) & (t < length), dim, 0)


@triton.jit
def route_scatter_add_bwd(
    grad_out_ptr: "*dtype:16", base_ptr: "*dtype:16", y_ptr: "*dtype:16", idx_ptr: "*i32:16", gate_ptr: "*fp32:16",
    grad_base_ptr: "*dtype:16", grad_y_ptr: "*dtype:16", grad_gate_ptr: "*fp32:16",
    length: "i32", slots: "i32", dim: "i32:8", has_gate: "i32", replaces: "i32",
    BLOCK_D: tl.constexpr,
):
    """grad_base holds grad_out; rows that were replaced get what their gate left of them. grad_gate holds zeros then."""
    slot, row, present = _slot(idx_ptr, length, slots, dim)
    replaced = tl.where(replaces != 0, present, 0)
    of_gate = tl.where(replaces != 0, row, slot)
    gate = tl.load(gate_ptr + of_gate, mask=tl.where(has_gate != 0, present, 0) > 0, other=1.0)
    dot = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        grad = tl.load(grad_out_ptr + row * dim + d, mask=d < present, other=0.0).to(tl.float32)
        change = tl.load(y_ptr + slot * dim + d, mask=d < present, other=0.0).to(tl.float32)
        change -= tl.load(base_ptr + row * dim + d, mask=d < replaced, other=0.0).to(tl.float32)
        dot += grad * change
        of_base = tl.where(has_gate != 0, (1 - gate) * grad, 0.0)
        tl.store(grad_base_ptr + row * dim + d, of_base.to(grad_base_ptr.dtype.element_ty), mask=d < replaced)
        tl.store(grad_y_ptr + slot * dim + d, (gate * grad).to(grad_y_ptr.dtype.element_ty), mask=d < dim)
    if has_gate != 0:
        tl.store(grad_gate_ptr + of_gate, tl.sum(dot), mask=tl.where(replaces != 0, present, 1) > 0)


# On the H100, 8 x 4096 x 2048 bf16, half of the tokens, tiles of 1 to 4 rows gather in 47 to 48 us behind the kernel of the logits, in
# 49 to 50 from the other end, and add back in 110 to 113 (16 rows: 127).
# Scores of 8 x 4096 tokens, right behind matrix products: 10.7 us with 16 warps, 14.1 with 32; with a sum for each word 11.3, 13.0 with
# 8 warps and 17.1 with 4. A bit a round 12.5, the bars along a dimension 13.1 and, for 3 bits a round, 12.7. With integer images and 4
# warps 24, half of it in `_place`: instructions that run once come from memory, so that few a thread is what counts. Placing in a loop
# of 1024 tokens: 11.6 with 8 warps, 12.8 with 16.
def _variants() -> list[Variant]:
    table = []
    for arch in ("sm80", "sm90a", "sm100f", "sm120f"):
        table.append(Variant(route_topk, arch, {}, {"BLOCK": 4096, "THREADS": 512, "num_warps": 16}))
        table.append(Variant(route_threshold, arch, {}, {"BLOCK": 4096, "num_warps": 8}))
        table.append(Variant(route_slots, arch, {}, {"BLOCK": 4096, "num_warps": 8}))
        table.append(Variant(route_calibrate, arch, {}, {"BLOCK": 128, "num_warps": 1}))
        for dtype in ("bf16", "fp16", "fp32"):
            rows = {"ROWS": 1, "BLOCK_D": 1024 if dtype == "fp32" else 2048, "num_warps": 4}
            if dtype != "bf16":  # a plain move takes fp16 for all that is two bytes wide
                table.append(Variant(route_gather_rows, arch, {"dtype": dtype}, rows))
            table.append(Variant(route_scatter_add_rows, arch, {"dtype": dtype}, rows))
            table.append(Variant(route_scatter_add_bwd, arch, {"dtype": dtype}, {"BLOCK_D": 1024, "num_warps": 4}))
    return table


VARIANTS = _variants()
