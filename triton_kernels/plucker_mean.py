"""The mean Plücker vector of Grassmann mixing (arXiv 2512.19428): portable Triton kernels, forward and backward.

A program holds BLOCK_T tokens, one a row, and walks the offsets. All planes of a token's mean contain the token, so they
add up as the unit vectors normal to it, to one plane u ^ mean; what grows with the square of r is read or written once.

The gradient of a token has a part from its own mean (`plucker_mean_bwd_token`) and one from each later token that it is
paired with (`plucker_mean_bwd_gather`): gathered, without atomics, so that the result does not depend on timing.
"""

import itertools

import triton
import triton.language as tl

from triton_kernels.variant import Variant

SMALLEST_SINE = tl.constexpr(1e-6)  # csrc/plucker_mean.h: kSmallestSine
SMALLEST_NORMAL = tl.constexpr(1.17549435e-38)


@triton.jit
def plucker_mean_offsets(
    offsets_ptr: "*i32:16",
    first: "i32",
    o0: "i32",
    o1: "i32",
    o2: "i32",
    o3: "i32",
    o4: "i32",
    o5: "i32",
    o6: "i32",
    o7: "i32",
):
    """Eight of the offsets that the other kernels read."""
    to = offsets_ptr + first
    tl.store(to, o0)
    tl.store(to + 1, o1)
    tl.store(to + 2, o2)
    tl.store(to + 3, o3)
    tl.store(to + 4, o4)
    tl.store(to + 5, o5)
    tl.store(to + 6, o6)
    tl.store(to + 7, o7)


@triton.jit
def _rows(ptr, token, r, mask, R: tl.constexpr):
    """Rows [BLOCK_T, R] in fp32, zeros past r and where the mask is off."""
    d = tl.arange(0, R)
    at = token.to(tl.int64)[:, None] * r + d[None, :]
    return tl.load(ptr + at, mask=mask[:, None] & (d < r)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _normalize(z):
    """z / |z| and two factors of |z|, neither of which overflows; the second is 0 for a token of 0."""
    largest = tl.max(tl.abs(z), 1)
    total = tl.sum(z, 1)
    zero = (largest < SMALLEST_NORMAL) & (total == total)  # a GPU's maximum passes over NaN: a token of NaN is not 0
    largest = tl.where(zero, 1.0, largest)
    x = tl.where(zero[:, None], 0.0, z / largest[:, None])
    norm = tl.sqrt(tl.sum(x * x, 1))
    return x / tl.where(zero, 1.0, norm)[:, None], largest, norm


@triton.jit
def _angle(u, v):
    """Cosine and sine between the unit vectors u and v, and the unit vector normal to u in their plane (0: no plane)."""
    cosine = tl.sum(u * v, 1)
    w = v - cosine[:, None] * u
    # Once more: where the angle is small the first subtraction leaves rounding errors along u.
    w -= tl.sum(u * w, 1)[:, None] * u
    sine = tl.sqrt(tl.sum(w * w, 1))
    spans = ~(sine <= SMALLEST_SINE)  # true for NaN, which must not vanish
    sine = tl.where(spans, sine, 1.0)
    return cosine, sine, spans, tl.where(spans[:, None], w / sine[:, None], 0.0)


@triton.jit
def _sequence(cu_seqlens_ptr, token, mask, length, num_sequences, search_steps):
    """First token of each token's sequence, and the one after its last."""
    first = token - token % length
    end = first + length
    if num_sequences != 0:  # packed into one row of `length` tokens: the last sequence that starts at or before the token
        low = tl.zeros_like(token)
        high = low + num_sequences
        for _ in range(0, search_steps):
            middle = (low + high) // 2
            before = tl.load(cu_seqlens_ptr + middle, mask=mask, other=0) <= token
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        # Bounded, so that wrong values, which nobody can see without waiting for the GPU, read no foreign memory.
        first = tl.maximum(tl.load(cu_seqlens_ptr + low, mask=mask, other=0), 0)
        end = tl.minimum(tl.load(cu_seqlens_ptr + low + 1, mask=mask, other=0), length)
    return first, end


@triton.jit
def _is_valid(valid_ptr, token, mask, has_valid):
    if has_valid != 0:
        mask = mask & (tl.load(valid_ptr + token, mask=mask, other=0) != 0)
    return mask


@triton.jit
def _mean_direction(
    z_ptr, valid_ptr, offsets_ptr, token, token_ok, u, first, r, num_offsets, has_valid, R: tl.constexpr
):
    """Y [BLOCK_T, R] and N [BLOCK_T]."""
    mean = tl.zeros_like(u)
    count = tl.zeros_like(tl.sum(u, 1))
    for k in range(0, num_offsets):
        offset = tl.load(offsets_ptr + k)
        pairs = _is_valid(valid_ptr, token - offset, token_ok & (token - first >= offset), has_valid)
        v, _, _ = _normalize(_rows(z_ptr, token - offset, r, pairs, R))
        _, _, _, direction = _angle(u, v)
        mean += direction  # 0 where the pair is not one: v is 0 there
        count += tl.where(pairs, 1.0, 0.0)
    return mean / tl.maximum(count, 1.0)[:, None], count


@triton.jit
def _planes(ptr, token, token_ok, r, R: tl.constexpr):
    """Pointers [BLOCK_T, R, R] to the coordinates (i, j), i < j, of packed rows, and their mask."""
    i = tl.arange(0, R)[:, None]
    j = tl.arange(0, R)[None, :]
    plane = i * r - i * (i + 1) // 2 + j - i - 1
    at = token.to(tl.int64)[:, None, None] * (r * (r - 1) // 2) + plane[None, :, :]
    return ptr + at, token_ok[:, None, None] & ((i < j) & (j < r))[None, :, :]


@triton.jit
def plucker_mean_fwd(
    z_ptr: "*dtype:16",
    valid_ptr: "*i8:16",
    cu_seqlens_ptr: "*i32:16",
    offsets_ptr: "*i32:16",
    pbar_ptr: "*dtype:16",
    seen_ptr: "*dtype:16",
    history: "i32",
    num_tokens: "i32",
    length: "i32",
    r: "i32",
    num_offsets: "i32",
    has_valid: "i32",
    num_sequences: "i32",
    search_steps: "i32",
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """pbar = u ^ Y, and whether there is anything to the mean, of all tokens but the first `history` of each row."""
    output = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_ok = output < num_tokens
    token = output + (output // (length - history) + 1) * history
    u, _, _ = _normalize(_rows(z_ptr, token, r, token_ok, HEAD_DIM))
    active = _is_valid(valid_ptr, token, token_ok, has_valid)
    first, _end = _sequence(cu_seqlens_ptr, token, token_ok, length, num_sequences, search_steps)
    mean, count = _mean_direction(
        z_ptr, valid_ptr, offsets_ptr, token, active, u, first, r, num_offsets, has_valid, HEAD_DIM
    )
    pbar = u[:, :, None] * mean[:, None, :] - mean[:, :, None] * u[:, None, :]  # [BLOCK_T, HEAD_DIM, HEAD_DIM]
    to, mask = _planes(pbar_ptr, output, token_ok, r, HEAD_DIM)
    tl.store(to, pbar.to(pbar_ptr.dtype.element_ty), mask=mask)
    tl.store(seen_ptr + output, tl.where(count > 0, 1.0, 0.0).to(seen_ptr.dtype.element_ty), mask=token_ok)


@triton.jit
def plucker_mean_bwd_token(
    z_ptr: "*dtype:16",
    valid_ptr: "*i8:16",
    cu_seqlens_ptr: "*i32:16",
    offsets_ptr: "*i32:16",
    grad_pbar_ptr: "*dtype:16",
    own_ptr: "*fp32:16",
    share_ptr: "*fp32:16",
    num_tokens: "i32",
    length: "i32",
    r: "i32",
    num_offsets: "i32",
    has_valid: "i32",
    num_sequences: "i32",
    search_steps: "i32",
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """What a token's own mean tells it (times |z|), and h / N, which the earlier tokens of its pairs need."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_ok = token < num_tokens
    u, _, _ = _normalize(_rows(z_ptr, token, r, token_ok, HEAD_DIM))
    active = _is_valid(valid_ptr, token, token_ok, has_valid)
    first, _end = _sequence(cu_seqlens_ptr, token, token_ok, length, num_sequences, search_steps)
    mean, count = _mean_direction(
        z_ptr, valid_ptr, offsets_ptr, token, active, u, first, r, num_offsets, has_valid, HEAD_DIM
    )
    at, mask = _planes(grad_pbar_ptr, token, active & (count > 0), r, HEAD_DIM)
    upper = tl.load(at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_T, HEAD_DIM, HEAD_DIM]
    # The products of the antisymmetric matrix upper - upper^T with u and with the mean.
    h = tl.sum(upper * u[:, None, :], 2) - tl.sum(upper * u[:, :, None], 1)
    own = tl.sum(upper * mean[:, None, :], 2) - tl.sum(upper * mean[:, :, None], 1)
    h = h / tl.maximum(count, 1.0)[:, None]
    for k in range(0, num_offsets):
        offset = tl.load(offsets_ptr + k)
        pairs = _is_valid(valid_ptr, token - offset, active & (token - first >= offset), has_valid)
        v, _, _ = _normalize(_rows(z_ptr, token - offset, r, pairs, HEAD_DIM))
        cosine, sine, spans, direction = _angle(u, v)
        beta = tl.sum(direction * h, 1)[:, None]
        turn = beta * u + (cosine / sine)[:, None] * (h - beta * direction)
        own += tl.where((pairs & spans)[:, None], turn, 0.0)
    d = tl.arange(0, HEAD_DIM)
    at = token.to(tl.int64)[:, None] * r + d[None, :]
    mask = token_ok[:, None] & (d < r)[None, :]
    tl.store(own_ptr + at, own, mask=mask)
    tl.store(share_ptr + at, h, mask=mask)


@triton.jit
def plucker_mean_bwd_gather(
    z_ptr: "*dtype:16",
    valid_ptr: "*i8:16",
    cu_seqlens_ptr: "*i32:16",
    offsets_ptr: "*i32:16",
    own_ptr: "*fp32:16",
    share_ptr: "*fp32:16",
    grad_z_ptr: "*dtype:16",
    num_tokens: "i32",
    length: "i32",
    r: "i32",
    num_offsets: "i32",
    has_valid: "i32",
    num_sequences: "i32",
    search_steps: "i32",
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """dz: a token's own part and what the later tokens of its pairs add to it."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_ok = token < num_tokens
    v, largest, norm = _normalize(_rows(z_ptr, token, r, token_ok, HEAD_DIM))
    active = _is_valid(valid_ptr, token, token_ok, has_valid)
    _first, end = _sequence(cu_seqlens_ptr, token, token_ok, length, num_sequences, search_steps)
    grad = _rows(own_ptr, token, r, token_ok, HEAD_DIM)
    for k in range(0, num_offsets):
        offset = tl.load(offsets_ptr + k)
        pairs = _is_valid(valid_ptr, token + offset, active & (offset < end - token), has_valid)
        u, _, _ = _normalize(_rows(z_ptr, token + offset, r, pairs, HEAD_DIM))
        _, sine, spans, direction = _angle(u, v)
        share = _rows(share_ptr, token + offset, r, pairs, HEAD_DIM)
        beta = tl.sum(direction * share, 1)[:, None]
        grad -= tl.where((pairs & spans)[:, None], (share - beta * direction) / sine[:, None], 0.0)
    zero = norm == 0
    grad = tl.where(zero[:, None], 0.0, grad / tl.where(zero, 1.0, norm)[:, None] / largest[:, None])
    d = tl.arange(0, HEAD_DIM)
    at = token.to(tl.int64)[:, None] * r + d[None, :]
    tl.store(grad_z_ptr + at, grad.to(grad_z_ptr.dtype.element_ty), mask=token_ok[:, None] & (d < r)[None, :])


# Not measured: chosen by registers and spills (8 to 16 bytes are left at HEAD_DIM 128 on sm80). What counts is the tile
# [BLOCK_T, HEAD_DIM, HEAD_DIM] of the first two.
def _tile(kernel, arch: str, head_dim: int) -> dict[str, int]:
    if kernel is plucker_mean_bwd_gather:
        return {"BLOCK_T": 512 // head_dim, "num_warps": 4}
    if head_dim == 32:
        return {"BLOCK_T": 4, "num_warps": 4}
    return {"BLOCK_T": 1, "num_warps": 16 if kernel is plucker_mean_bwd_token and arch == "sm90a" else 8}


ARCHS = ("sm80", "sm90a", "sm100f", "sm120f")
VARIANTS = [Variant(plucker_mean_offsets, arch, {}, {"num_warps": 1}) for arch in ARCHS]
VARIANTS += [
    Variant(kernel, arch, {"dtype": dtype, "HEAD_DIM": head_dim}, _tile(kernel, arch, head_dim))
    for arch, dtype, head_dim, kernel in itertools.product(
        ARCHS, ("bf16", "fp16", "fp32"), (32, 128), (plucker_mean_fwd, plucker_mean_bwd_token, plucker_mean_bwd_gather)
    )
]
