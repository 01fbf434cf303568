"""Where the sequence of each token begins and ends, for kernels that meet a token often."""

import triton
import triton.language as tl

from triton_kernels.plucker_mean import ARCHS, _sequence
from triton_kernels.variant import Variant


@triton.jit
def sequence_bounds(
    cu_seqlens_ptr: "*i32:16", bounds_ptr: "*i32:16", num_tokens: "i32", num_sequences: "i32", search_steps: "i32",
    BLOCK: tl.constexpr,
):  # fmt: skip
    """bounds [2, num_tokens]: the first position of each position's sequence, and the one after its last."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = token < num_tokens
    first, end = _sequence(cu_seqlens_ptr, token, mask, num_tokens, num_sequences, search_steps)
    # Whatever cu_seqlens holds, a token sees itself and no later one.
    tl.store(bounds_ptr + token, tl.minimum(first, token), mask=mask)
    tl.store(bounds_ptr + num_tokens + token, tl.maximum(end, token + 1), mask=mask)


VARIANTS = [Variant(sequence_bounds, arch, {}, {"BLOCK": 128, "num_warps": 4}) for arch in ARCHS]
