"""The mean Plücker vector of Grassmann mixing (arXiv 2512.19428): portable Triton kernels, forward and backward.

All planes of a token's mean contain the token, so they add up to one plane u ^ Y: u the unit token, Y the mean of unit
vectors normal to it. Two kernels work on these frames, one token after another: `plucker_mean_frame` finds them, `_bwd_token`
leads their gradient back to z. Two work on the packed coordinates, which grow with the square of r: `_fwd` and `_bwd_frame`.

The gradient of a token has a part from its own mean and one from each later token that it is paired with: gathered,
without atomics, so that the result does not depend on timing.

What lies between the kernels has a row for each coordinate and a column for each token, so that threads side by side read
and write tokens side by side, whichever plane they are at:

    frame [2 * width + 2, stride]   u, Y, N and 1 / |z|
    pairs [3 * offsets, stride]     for each offset the cosine, 1 / sine and what _normal() needs besides, of unit vectors
    pbar, its gradient [P, stride]
    turn [2 * width, stride]        Om u / N and Om Y, with Om the antisymmetric matrix of the gradient of pbar

`width` is r, padded with zeros to a multiple of 8, as are the rows of z; `stride` the number of tokens, padded to one as well,
so that 16 bytes load at once. What stands in the columns past the tokens is never looked at.
"""

import itertools

import triton
import triton.language as tl

from triton_kernels.variant import Variant

SMALLEST_SINE = tl.constexpr(1e-6)  # csrc/plucker_mean.h: kSmallestSine
SMALLEST_NORMAL = tl.constexpr(1.17549435e-38)


@triton.jit
def plucker_mean_offsets(
    offsets_ptr: "*i32:16", first: "i32",
    o0: "i32", o1: "i32", o2: "i32", o3: "i32", o4: "i32", o5: "i32", o6: "i32", o7: "i32",
):
    """Eight of the offsets, where there are more than the other kernels take as arguments."""
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
def _offset(offsets_ptr, k, num_offsets, o0, o1, o2, o3, o4, o5, o6, o7):
    offset = tl.where(k == 0, o0, tl.where(k == 1, o1, tl.where(k == 2, o2, o3)))
    offset = tl.where(k < 4, offset, tl.where(k == 4, o4, tl.where(k == 5, o5, tl.where(k == 6, o6, o7))))
    if num_offsets > 8:
        offset = tl.load(offsets_ptr + k)
    return offset


@triton.jit
def _rows(ptr, token, width, mask, R: tl.constexpr):
    """Rows [BLOCK_T, R] in fp32, zeros past the width and where the mask is off."""
    d = tl.arange(0, R)
    at = token.to(tl.int64)[:, None] * width + d[None, :]
    return tl.load(ptr + at, mask=mask[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _columns(first, token, stride, R: tl.constexpr):
    """Where the R rows from row `first` of a matrix have the columns of tokens: [BLOCK_T, R]."""
    return (first + tl.arange(0, R)).to(tl.int64)[None, :] * stride + token[:, None]


@triton.jit
def _scale(z):
    """z divided by its largest element, so that no square overflows, the element, and the length of what is left.

    The length is 0 for a token of 0.
    """
    largest = tl.max(tl.abs(z), 1)
    zero = largest < SMALLEST_NORMAL  # a GPU's maximum passes over NaN, which no factor makes vanish
    x = z * tl.where(zero, 0.0, 1.0 / tl.where(zero, 1.0, largest))[:, None]
    return x, tl.where(zero, 1.0, largest), tl.sqrt(tl.sum(x * x, 1))


@triton.jit
def _unit(x, norm):
    return x * (1.0 / tl.where(norm == 0, 1.0, norm))[:, None]


@triton.jit
def _normal(u, v, cosine, rest):
    """The part of v normal to u, a unit vector."""
    # Twice: where the angle is small the first subtraction leaves rounding errors along u.
    return tl.fma(-rest[:, None], u, tl.fma(-cosine[:, None], u, v))


@triton.jit
def _angle(u, v, norm):
    """Cosine and 1 / sine between the unit vector u and v, of length `norm`, and what _normal() needs besides, in units of that length,
    and that part of v. Where there is no plane the second is 0."""
    cosine = tl.sum(u * v, 1)
    rest = tl.sum(u * tl.fma(-cosine[:, None], u, v), 1)
    w = _normal(u, v, cosine, rest)
    length = tl.sqrt(tl.sum(w * w, 1))
    spans = ~(length <= SMALLEST_SINE * norm)  # true for NaN, which must not vanish
    return cosine, tl.where(spans, 1.0 / tl.where(spans, length, 1.0), 0.0), rest, w


@triton.jit
def _pair(pairs_ptr, k, token, stride, mask):
    """Cosine, 1 / sine and the rest of the pairs of tokens and offset number k, unit vectors; 0 where they are none."""
    at = pairs_ptr + 3 * tl.cast(k, tl.int64) * stride + token
    cosine, factor = tl.load(at, mask=mask, other=0.0), tl.load(at + stride, mask=mask, other=0.0)
    return cosine, factor, tl.load(at + 2 * tl.cast(stride, tl.int64), mask=mask, other=0.0)


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
def plucker_mean_frame(
    valid_ptr: "*i8:16", cu_seqlens_ptr: "*i32:16", offsets_ptr: "*i32:16",
    o0: "i32", o1: "i32", o2: "i32", o3: "i32", o4: "i32", o5: "i32", o6: "i32", o7: "i32",
    frame_ptr: "*fp32:16", pairs_ptr: "*fp32:16", keeps_pairs: "i32", z_ptr: "*dtype:16", seen_ptr: "*dtype:16", history: "i32",
    num_tokens: "i32", length: "i32", width: "i32:8", stride: "i32:8", num_offsets: "i32",
    has_valid: "i32", num_sequences: "i32", search_steps: "i32",
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The frames of all tokens but the first `history` of each row, and 1 where a token is paired, 0 elsewhere. For the backward
    pass the angles of all pairs are kept."""
    output = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_ok = output < num_tokens
    token = output + (output // (length - history) + 1) * history
    x, largest, own_norm = _scale(_rows(z_ptr, token, width, token_ok, HEAD_DIM))
    u = _unit(x, own_norm)
    active = _is_valid(valid_ptr, token, token_ok, has_valid)
    first, _end = _sequence(cu_seqlens_ptr, token, token_ok, length, num_sequences, search_steps)
    mean = tl.zeros_like(u)
    count = tl.zeros_like(own_norm)
    for k in range(0, num_offsets):
        offset = _offset(offsets_ptr, k, num_offsets, o0, o1, o2, o3, o4, o5, o6, o7)
        pairs = _is_valid(valid_ptr, token - offset, active & (token - first >= offset), has_valid)
        v, _largest, norm = _scale(_rows(z_ptr, token - offset, width, pairs, HEAD_DIM))
        if keeps_pairs != 0:  # of the unit vectors that the backward pass has, so that w is as normal to u there as here
            v = _unit(v, norm)
            norm = tl.zeros_like(norm) + 1.0
        cosine, factor, rest, w = _angle(u, v, norm)
        mean = tl.fma(w, factor[:, None], mean)  # plus 0 where the pair is not one: v is 0 there
        if keeps_pairs != 0:
            at = pairs_ptr + 3 * tl.cast(k, tl.int64) * stride + output
            tl.store(at, cosine, mask=token_ok)
            tl.store(at + stride, factor, mask=token_ok)
            tl.store(at + 2 * tl.cast(stride, tl.int64), rest, mask=token_ok)
        count += tl.where(pairs, 1.0, 0.0)
    mean = mean / tl.maximum(count, 1.0)[:, None]
    inverse = tl.where(own_norm == 0, 0.0, 1.0 / (tl.where(own_norm == 0, 1.0, own_norm) * largest))
    mask = token_ok[:, None] & (tl.arange(0, HEAD_DIM) < width)[None, :]
    tl.store(frame_ptr + _columns(0, output, stride, HEAD_DIM), u, mask=mask)
    tl.store(frame_ptr + _columns(width, output, stride, HEAD_DIM), mean, mask=mask)
    last = frame_ptr + 2 * width.to(tl.int64) * stride
    tl.store(last + output, count, mask=token_ok)
    tl.store(last + stride + output, inverse, mask=token_ok)
    tl.store(seen_ptr + output, tl.where(count > 0, 1.0, 0.0).to(seen_ptr.dtype.element_ty), mask=token_ok)


@triton.jit
def plucker_mean_fwd(
    frame_ptr: "*fp32:16", pbar_ptr: "*dtype:16", r: "i32", width: "i32:8", stride: "i32:8",
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """pbar = u ^ Y: planes (i, j) with BLOCK_R of the j; the programs of a j and a token take the i in turns."""
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[None, :]
    j = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    ok = token < stride
    mask = (j < r) & ok
    mean_ptr = frame_ptr + width.to(tl.int64) * stride
    at = j.to(tl.int64) * stride + token
    u, mean = tl.load(frame_ptr + at, mask=mask, other=0.0), tl.load(mean_ptr + at, mask=mask, other=0.0)
    last = tl.minimum(r, (tl.program_id(1) + 1) * BLOCK_R) - 1
    for i in range(tl.program_id(2), last, tl.num_programs(2)):
        row = tl.cast(i, tl.int64) * stride + token
        u_i, mean_i = tl.load(frame_ptr + row, mask=ok, other=0.0), tl.load(mean_ptr + row, mask=ok, other=0.0)
        pbar = (u_i * mean - mean_i * u).to(pbar_ptr.dtype.element_ty)
        before = i * (2 * r - 1 - i) // 2 - i - 1  # plane (i, j) is number before + j
        tl.store(pbar_ptr + tl.cast(before, tl.int64) * stride + at, pbar, mask=mask & (j > i))


@triton.jit
def plucker_mean_bwd_frame(
    frame_ptr: "*fp32:16", grad_pbar_ptr: "*dtype:16", turn_ptr: "*fp32:16", r: "i32", width: "i32:8", stride: "i32:8",
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Om u / N and Om Y, of which a program has BLOCK_R rows: it walks the columns of Om, no sum needs another thread."""
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[None, :]
    j = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    ok = token < stride
    mean_ptr = frame_ptr + width.to(tl.int64) * stride
    h = tl.zeros((BLOCK_R, BLOCK_T), tl.float32)
    own = tl.zeros((BLOCK_R, BLOCK_T), tl.float32)
    for i in tl.range(0, r, loop_unroll_factor=UNROLL):
        row = tl.cast(i, tl.int64) * stride + token
        u_i, mean_i = tl.load(frame_ptr + row, mask=ok, other=0.0), tl.load(mean_ptr + row, mask=ok, other=0.0)
        low, high = tl.minimum(i, j), tl.maximum(i, j)
        at = (low * (2 * r - 1 - low) // 2 + high - low - 1).to(tl.int64) * stride + token
        grad = tl.load(grad_pbar_ptr + at, mask=(j < r) & (j != i) & ok, other=0.0).to(tl.float32)
        om = tl.where(j < i, grad, -grad)
        h = tl.fma(om, tl.broadcast_to(u_i, om.shape), h)
        own = tl.fma(om, tl.broadcast_to(mean_i, om.shape), own)
    count = tl.load(mean_ptr + width.to(tl.int64) * stride + token, mask=ok, other=0.0)
    to, mask = turn_ptr + j.to(tl.int64) * stride + token, (j < width) & ok
    tl.store(to, tl.where(count > 0, h / tl.maximum(count, 1.0), 0.0), mask=mask)
    tl.store(to + width.to(tl.int64) * stride, tl.where(count > 0, own, 0.0), mask=mask)


@triton.jit
def plucker_mean_bwd_token(
    valid_ptr: "*i8:16", cu_seqlens_ptr: "*i32:16", offsets_ptr: "*i32:16",
    o0: "i32", o1: "i32", o2: "i32", o3: "i32", o4: "i32", o5: "i32", o6: "i32", o7: "i32",
    frame_ptr: "*fp32:16", pairs_ptr: "*fp32:16", turn_ptr: "*fp32:16", grad_z_ptr: "*dtype:16", grad_stride: "i32:8",
    num_tokens: "i32", length: "i32", width: "i32:8", stride: "i32", num_offsets: "i32",
    has_valid: "i32", num_sequences: "i32", search_steps: "i32",
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """dz: what a token's own mean tells it, and what the later tokens of its pairs do.

    A thread has single tokens, of which columns at any distance load as well: hence a stride of which nothing is promised.
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_ok = token < num_tokens
    row_ok = (tl.arange(0, HEAD_DIM) < width)[None, :]
    active = _is_valid(valid_ptr, token, token_ok, has_valid)
    first, end = _sequence(cu_seqlens_ptr, token, token_ok, length, num_sequences, search_steps)
    at, mask = _columns(0, token, stride, HEAD_DIM), token_ok[:, None] & row_ok
    u, h = tl.load(frame_ptr + at, mask=mask, other=0.0), tl.load(turn_ptr + at, mask=mask, other=0.0)
    grad = tl.load(turn_ptr + _columns(width, token, stride, HEAD_DIM), mask=mask, other=0.0)
    of_u, of_h = tl.zeros((BLOCK_T,), tl.float32), tl.zeros((BLOCK_T,), tl.float32)
    for k in range(0, num_offsets):
        offset = _offset(offsets_ptr, k, num_offsets, o0, o1, o2, o3, o4, o5, o6, o7)
        pairs = _is_valid(valid_ptr, token - offset, active & (token - first >= offset), has_valid)
        v = tl.load(frame_ptr + at - offset, mask=pairs[:, None] & row_ok, other=0.0)
        cosine, factor, rest = _pair(pairs_ptr, k, token, stride, pairs)
        w = _normal(u, v, cosine, rest)
        # beta u + cot (h - beta w), w of length 1: nothing where there is no plane, the factor is 0 then
        beta = tl.sum(w * h, 1) * factor
        cot = cosine * factor
        of_u += beta
        of_h += cot
        grad = tl.fma(-(cot * beta * factor)[:, None], w, grad)
    grad = tl.fma(of_u[:, None], u, tl.fma(of_h[:, None], h, grad))
    for k in range(0, num_offsets):
        offset = _offset(offsets_ptr, k, num_offsets, o0, o1, o2, o3, o4, o5, o6, o7)
        pairs = _is_valid(valid_ptr, token + offset, active & (offset < end - token), has_valid)
        mask = pairs[:, None] & row_ok
        v = tl.load(frame_ptr + at + offset, mask=mask, other=0.0)
        share = tl.load(turn_ptr + at + offset, mask=mask, other=0.0)
        cosine, factor, rest = _pair(pairs_ptr, k, token + offset, stride, pairs)
        w = _normal(v, u, cosine, rest)
        beta = tl.sum(w * share, 1) * factor
        grad = tl.fma(-factor[:, None], tl.fma(-(beta * factor)[:, None], w, share), grad)
    inverse = tl.load(frame_ptr + (2 * width + 1).to(tl.int64) * stride + token, mask=token_ok, other=0.0)[:, None]
    grad = tl.where(inverse == 0, 0.0, grad * inverse)
    to = grad_z_ptr + token.to(tl.int64)[:, None] * grad_stride + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(to, grad.to(grad_z_ptr.dtype.element_ty), mask=token_ok[:, None] & row_ok)


# Measured for bf16 and r = 32 on an H100 (docs/grassmann.md); larger r have as many elements a thread.
def _tile(kernel, head_dim: int) -> dict[str, int]:
    if kernel is plucker_mean_bwd_token:
        return {"BLOCK_T": 512 // head_dim, "num_warps": 1}
    return {"BLOCK_T": 1024 // head_dim, "num_warps": 4}


ARCHS = ("sm80", "sm90a", "sm100f", "sm120f")
DTYPES = ("bf16", "fp16", "fp32")
OF_PLANES = {
    plucker_mean_fwd: {"BLOCK_T": 64, "BLOCK_R": 32, "num_warps": 4},
    plucker_mean_bwd_frame: {"BLOCK_T": 64, "BLOCK_R": 32, "UNROLL": 4, "num_warps": 4},
}
VARIANTS = [Variant(plucker_mean_offsets, arch, {}, {"num_warps": 1}) for arch in ARCHS]
VARIANTS += [
    Variant(kernel, arch, {"dtype": dtype}, tile)
    for arch, dtype, (kernel, tile) in itertools.product(ARCHS, DTYPES, OF_PLANES.items())
]
VARIANTS += [
    Variant(kernel, arch, {"dtype": dtype, "HEAD_DIM": head_dim}, _tile(kernel, head_dim))
    for arch, dtype, head_dim, kernel in itertools.product(
        ARCHS, DTYPES, (32, 64, 128), (plucker_mean_frame, plucker_mean_bwd_token)
    )
]
