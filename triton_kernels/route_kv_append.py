"""Keys and values of routed tokens into a compact cache (arXiv 2511.21408): portable Triton kernels.

`route_kv_append_rows` is a program per slot, which computes the angles of its position once for all heads;
`route_kv_append_count`, after it, a program per sequence. A cache that is full takes no more, and a slot that is empty moves
nothing.
"""

import triton
import triton.language as tl

from triton_kernels.variant import Variant


@triton.jit
def route_kv_append_rows(
    k_ptr: "*dtype:16", v_ptr: "*dtype:16", positions_ptr: "*i32:16", count_ptr: "*i32", frequencies_ptr: "*fp32:16",
    keys_ptr: "*dtype:16", values_ptr: "*dtype:16", slots: "i32", capacity: "i32", row: "i32:8", half: "i32", rotates: "i32",
    BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    sequence = slot // slots
    position = tl.load(positions_ptr + slot)
    into = tl.load(count_ptr + sequence) + (slot % slots).to(tl.int32)
    if (position >= 0) & (into < capacity):
        k_ptr += slot * row
        v_ptr += slot * row
        to = (sequence * capacity + into) * row
        keys_ptr += to
        values_ptr += to
        if rotates != 0:
            for start in range(0, half, BLOCK_H):
                d = start + tl.arange(0, BLOCK_H)
                inside = d < half
                angle = position.to(tl.float32) * tl.load(frequencies_ptr + d, mask=inside, other=0.0)
                cosine = tl.cos(angle)
                sine = tl.sin(angle)
                for head in range(0, row, 2 * half):
                    # Element d of a head's first half turns with d + half.
                    a = tl.load(k_ptr + head + d, mask=inside, other=0.0).to(tl.float32)
                    b = tl.load(k_ptr + head + half + d, mask=inside, other=0.0).to(tl.float32)
                    tl.store(keys_ptr + head + d, (a * cosine - b * sine).to(keys_ptr.dtype.element_ty), mask=inside)
                    tl.store(keys_ptr + head + half + d, (a * sine + b * cosine).to(keys_ptr.dtype.element_ty), mask=inside)
        for start in range(0, row, BLOCK):
            i = start + tl.arange(0, BLOCK)
            tl.store(values_ptr + i, tl.load(v_ptr + i, mask=i < row, other=0.0), mask=i < row)
            if rotates == 0:
                tl.store(keys_ptr + i, tl.load(k_ptr + i, mask=i < row, other=0.0), mask=i < row)


@triton.jit
def route_kv_append_count(
    positions_ptr: "*i32:16", count_ptr: "*i32", slots: "i32", capacity: "i32",
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    filled = tl.load(count_ptr + sequence)
    for start in range(0, slots, BLOCK):
        s = start + tl.arange(0, BLOCK)
        position = tl.load(positions_ptr + sequence * slots + s, mask=s < slots, other=-1)
        filled += tl.sum((position >= 0).to(tl.int32))
    tl.store(count_ptr + sequence, tl.minimum(filled, capacity))


# Not measured yet.
def _variants() -> list[Variant]:
    table = []
    for arch in ("sm80", "sm90a", "sm100f", "sm120f"):
        for dtype in ("bf16", "fp16", "fp32"):
            table.append(Variant(route_kv_append_rows, arch, {"dtype": dtype}, {"BLOCK_H": 64, "BLOCK": 1024, "num_warps": 1}))
        table.append(Variant(route_kv_append_count, arch, {}, {"BLOCK": 1024, "num_warps": 4}))
    return table


VARIANTS = _variants()
