"""The mean Plücker vector of Grassmann mixing (arXiv 2512.19428): portable Triton kernels, forward and backward.

All planes of a token's mean contain the token, so they add up to one plane u ^ Y: u the unit token, Y the mean of unit
vectors normal to it. Two kernels work on these frames, one token after another: `plucker_mean_frame` finds them, `_bwd_token`
leads their gradient back to z. Two work on the packed coordinates, which grow with the square of r: `_fwd` and `_bwd_frame`.

The gradient of a token has a part from its own mean and one from each later token that it is paired with: gathered,
without atomics, so that the result does not depend on timing.

What lies between the kernels has a row for each coordinate and a column for each token, so that threads side by side read
and write tokens side by side, whichever plane they are at. What the token kernels share comes in blocks of 64 tokens, so that
rows are a constant apart: one address a token serves them all.

    frame [blocks, 2 * rows + 2, 64]   u, Y, N and 1 / |z|; all 0 in the columns past the tokens
    pairs [blocks, 3 * offsets, 64]    for each offset the cosine, 1 / sine and what _normal() needs besides
    turn  [blocks, 2 * rows, 64]       Om u / N and Om Y, with Om the antisymmetric matrix of the gradient of pbar
    pbar, its gradient [P, stride]

`rows` is HEAD_DIM of the token kernels, r padded with zeros. The rows of z are padded to `width`, a multiple of 8, and `stride` is
the number of tokens, padded to one as well, so that 16 bytes load at once. What stands in the columns of pbar past the tokens is
never looked at.

A thread of the token kernels has all coordinates of a token (r = 32, 16 bits; a half or a quarter of them elsewhere): sums over
coordinates then need no other thread.
"""

import itertools

import triton
import triton.language as tl

from triton_kernels.variant import Variant

SMALLEST_SINE = tl.constexpr(1e-6)  # csrc/plucker_mean.h: kSmallestSine
SMALLEST_NORMAL = tl.constexpr(1.17549435e-38)
COLUMNS = tl.constexpr(64)  # csrc/plucker_mean.h: kBlockColumns
PARTS = tl.constexpr(4)


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


# Coordinates of tokens are tensors [PARTS, R / PARTS, BLOCK_T]: 16 bytes of a row of z are a part at r = 32, and a thread has all
# parts of a token.


@triton.jit
def _coordinate(R: tl.constexpr):
    PART: tl.constexpr = R // PARTS
    return (tl.arange(0, PARTS) * PART)[:, None, None] + tl.arange(0, PART)[None, :, None]


@triton.jit
def _rows(ptr, token, width, mask, R: tl.constexpr):
    """Rows of z in fp32, zeros past the width and where the mask is off."""
    d = _coordinate(R)
    at = token.to(tl.int64) * width
    return tl.load(ptr + at[None, None, :] + d, mask=mask[None, None, :] & (d < width), other=0.0).to(tl.float32)


@triton.jit
def _columns(token, num_rows):
    """Where the columns of tokens begin in a matrix by blocks of so many rows."""
    return (token >> 6).to(tl.int64) * (num_rows * COLUMNS) + (token & (COLUMNS - 1))


@triton.jit
def _at(ptr, columns, first, R: tl.constexpr):
    """The R rows from row `first` on."""
    return ptr + (columns + first * COLUMNS)[None, None, :] + _coordinate(R) * COLUMNS


@triton.jit
def _dot(a, b):
    # In fused multiply-adds over the parts.
    a_even, a_odd = tl.split(tl.permute(a, (1, 2, 0)).reshape(a.shape[1], a.shape[2], 2, 2))
    b_even, b_odd = tl.split(tl.permute(b, (1, 2, 0)).reshape(a.shape[1], a.shape[2], 2, 2))
    a_0, a_2 = tl.split(a_even)
    b_0, b_2 = tl.split(b_even)
    a_1, a_3 = tl.split(a_odd)
    b_1, b_3 = tl.split(b_odd)
    return tl.sum(tl.fma(a_0, b_0, tl.fma(a_1, b_1, tl.fma(a_2, b_2, a_3 * b_3))), 0)


@triton.jit
def _unit(z):
    """z / |z|, and 1 / |z|; both 0 for a token of 0. Divided by the largest element first, so that no square overflows."""
    largest = tl.max(tl.max(tl.abs(z), 0), 0)
    zero = largest < SMALLEST_NORMAL  # a GPU's maximum passes over NaN, which no factor makes vanish
    inverse = tl.where(zero, 0.0, 1.0 / tl.where(zero, 1.0, largest))
    x = z * inverse[None, None, :]
    square = _dot(x, x)
    factor = tl.rsqrt(tl.where(square == 0, 1.0, square))
    return x * factor[None, None, :], inverse * factor


@triton.jit
def _normal(u, v, cosine, rest):
    """The part of v normal to u, a unit vector."""
    # Twice: where the angle is small the first subtraction leaves rounding errors along u.
    return tl.fma(-rest[None, None, :], u, tl.fma(-cosine[None, None, :], u, v))


@triton.jit
def _angle(u, v):
    """Cosine and 1 / sine between the unit vectors u and v, what _normal() needs besides, and that part of v. Where there is no plane
    1 / sine is 0."""
    cosine = _dot(u, v)
    rest = _dot(u, tl.fma(-cosine[None, None, :], u, v))
    w = _normal(u, v, cosine, rest)
    square = _dot(w, w)
    spans = ~(square <= SMALLEST_SINE * SMALLEST_SINE)  # true for NaN, which must not vanish
    return cosine, tl.where(spans, tl.rsqrt(tl.where(spans, square, 1.0)), 0.0), rest, w


@triton.jit
def _pair(pairs_ptr, k, column, mask):
    """Cosine, 1 / sine and the rest of pairs with offset number k; 0 where they are none."""
    at = pairs_ptr + column + 3 * COLUMNS * k
    cosine, factor = tl.load(at, mask=mask, other=0.0), tl.load(at + COLUMNS, mask=mask, other=0.0)
    return cosine, factor, tl.load(at + 2 * COLUMNS, mask=mask, other=0.0)


@triton.jit
def _turns(BLOCK_T: tl.constexpr, AT_ONCE: tl.constexpr):
    """Tokens of a program, each AT_ONCE times, and which of the offsets, by turns, are whose: as many warps work on a token."""
    column = tl.arange(0, BLOCK_T * AT_ONCE)
    return column % BLOCK_T, column // BLOCK_T


@triton.jit
def _over_turns(x, AT_ONCE: tl.constexpr):
    """The sum of what they have of a token: [PARTS, R / PARTS, BLOCK_T]."""
    if AT_ONCE == 1:
        return x
    else:  # not tl.sum, which has 40 barriers here
        first, second = tl.split(tl.permute(x.reshape(x.shape[0], x.shape[1], 2, x.shape[2] // 2), (0, 1, 3, 2)))
        return _over_turns(first + second, AT_ONCE // 2)


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
    # No branch: it would keep the loads of one offset from those of the next.
    return mask & (tl.load(valid_ptr + token, mask=tl.where(has_valid != 0, mask, False), other=1) != 0)


@triton.jit
def plucker_mean_frame(
    valid_ptr: "*i8:16", cu_seqlens_ptr: "*i32:16", offsets_ptr: "*i32:16",
    o0: "i32", o1: "i32", o2: "i32", o3: "i32", o4: "i32", o5: "i32", o6: "i32", o7: "i32",
    frame_ptr: "*fp32", pairs_ptr: "*fp32", keeps_pairs: "i32", z_ptr: "*dtype:16", seen_ptr: "*dtype:16", history: "i32",
    num_tokens: "i32", length: "i32", width: "i32:8", num_offsets: "i32",
    has_valid: "i32", num_sequences: "i32", search_steps: "i32",
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The frames of all tokens but the first `history` of each row, and 1 where a token is paired, 0 elsewhere. For the backward
    pass the angles of all pairs are kept."""
    token_of, turn = _turns(BLOCK_T, AT_ONCE)
    output = tl.program_id(0) * BLOCK_T + token_of
    token_ok = output < num_tokens
    token = output + (output // (length - history) + 1) * history
    u, inverse = _unit(_rows(z_ptr, token, width, token_ok, HEAD_DIM))
    active = _is_valid(valid_ptr, token, token_ok, has_valid)
    first, _end = _sequence(cu_seqlens_ptr, token, token_ok, length, num_sequences, search_steps)
    mean = tl.zeros_like(u)
    count = tl.zeros_like(inverse)
    pair_column = _columns(output, 3 * num_offsets)
    for group in range(0, num_offsets, AT_ONCE):
        k = group + turn
        offset = _offset(offsets_ptr, k, num_offsets, o0, o1, o2, o3, o4, o5, o6, o7)
        pairs = _is_valid(valid_ptr, token - offset, active & (token - first >= offset) & (k < num_offsets), has_valid)
        v, _inverse = _unit(_rows(z_ptr, token - offset, width, pairs, HEAD_DIM))
        cosine, factor, rest, w = _angle(u, v)
        mean = tl.fma(w, factor[None, None, :], mean)  # plus 0 where the pair is not one: v is 0 there
        at = pairs_ptr + pair_column + 3 * COLUMNS * k
        keeps = tl.where(keeps_pairs != 0, k < num_offsets, False)
        tl.store(at, cosine, mask=keeps)
        tl.store(at + COLUMNS, factor, mask=keeps)
        tl.store(at + 2 * COLUMNS, rest, mask=keeps)
        count += tl.where(pairs, 1.0, 0.0)
    column = _columns(output, 2 * HEAD_DIM + 2)
    tl.store(_at(frame_ptr, column, 0, HEAD_DIM), u, mask=(turn == 0)[None, None, :])
    tl.store(frame_ptr + column + (2 * HEAD_DIM + 1) * COLUMNS, inverse, mask=turn == 0)
    mean = _over_turns(mean, AT_ONCE)
    count = _over_turns(count[None, None, :], AT_ONCE).reshape(BLOCK_T)
    output = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = _columns(output, 2 * HEAD_DIM + 2)
    tl.store(_at(frame_ptr, column, HEAD_DIM, HEAD_DIM), mean * (1.0 / tl.maximum(count, 1.0))[None, None, :])
    tl.store(frame_ptr + column + 2 * HEAD_DIM * COLUMNS, count)
    tl.store(seen_ptr + output, tl.where(count > 0, 1.0, 0.0).to(seen_ptr.dtype.element_ty), mask=output < num_tokens)


@triton.jit
def plucker_mean_fwd(
    frame_ptr: "*fp32:16", pbar_ptr: "*dtype:16", r: "i32", rows: "i32:32", stride: "i32:8",
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """pbar = u ^ Y: planes (i, j) with BLOCK_R of the j; the programs of a j and a token take the i in turns."""
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[None, :]
    j = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    ok = token < stride
    mask = (j < r) & ok
    frame_ptr += _columns(token, 2 * rows + 2)
    mean_ptr = frame_ptr + rows * COLUMNS
    u, mean = tl.load(frame_ptr + j * COLUMNS, mask=mask, other=0.0), tl.load(mean_ptr + j * COLUMNS, mask=mask, other=0.0)
    last = tl.minimum(r, (tl.program_id(1) + 1) * BLOCK_R) - 1
    for i in range(tl.program_id(2), last, tl.num_programs(2)):
        row = i * COLUMNS
        u_i, mean_i = tl.load(frame_ptr + row, mask=ok, other=0.0), tl.load(mean_ptr + row, mask=ok, other=0.0)
        pbar = (u_i * mean - mean_i * u).to(pbar_ptr.dtype.element_ty)
        before = i * (2 * r - 1 - i) // 2 - i - 1  # plane (i, j) is number before + j
        tl.store(pbar_ptr + (before + j).to(tl.int64) * stride + token, pbar, mask=mask & (j > i))


@triton.jit
def plucker_mean_bwd_frame(
    frame_ptr: "*fp32:16", grad_pbar_ptr: "*dtype:16", turn_ptr: "*fp32:16", r: "i32", rows: "i32:32", stride: "i32:8",
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Om u / N and Om Y, of which a program has BLOCK_R rows: it walks the columns of Om, no sum needs another thread."""
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[None, :]
    j = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    ok = token < stride
    frame_ptr += _columns(token, 2 * rows + 2)
    mean_ptr = frame_ptr + rows * COLUMNS
    h = tl.zeros((BLOCK_R, BLOCK_T), tl.float32)
    own = tl.zeros((BLOCK_R, BLOCK_T), tl.float32)
    for i in tl.range(0, r, loop_unroll_factor=UNROLL):
        row = i * COLUMNS
        u_i, mean_i = tl.load(frame_ptr + row, mask=ok, other=0.0), tl.load(mean_ptr + row, mask=ok, other=0.0)
        low, high = tl.minimum(i, j), tl.maximum(i, j)
        at = (low * (2 * r - 1 - low) // 2 + high - low - 1).to(tl.int64) * stride + token
        grad = tl.load(grad_pbar_ptr + at, mask=(j < r) & (j != i) & ok, other=0.0).to(tl.float32)
        om = tl.where(j < i, grad, -grad)
        h = tl.fma(om, tl.broadcast_to(u_i, om.shape), h)
        own = tl.fma(om, tl.broadcast_to(mean_i, om.shape), own)
    count = tl.load(mean_ptr + rows * COLUMNS, mask=ok, other=0.0)
    to, mask = turn_ptr + _columns(token, 2 * rows) + j * COLUMNS, (j < rows) & ok
    tl.store(to, tl.where(count > 0, h / tl.maximum(count, 1.0), 0.0), mask=mask)
    tl.store(to + rows * COLUMNS, tl.where(count > 0, own, 0.0), mask=mask)


@triton.jit
def plucker_mean_bwd_token(
    valid_ptr: "*i8:16", cu_seqlens_ptr: "*i32:16", offsets_ptr: "*i32:16",
    o0: "i32", o1: "i32", o2: "i32", o3: "i32", o4: "i32", o5: "i32", o6: "i32", o7: "i32",
    frame_ptr: "*fp32", pairs_ptr: "*fp32", turn_ptr: "*fp32", grad_z_ptr: "*dtype:16", grad_stride: "i32:8",
    num_tokens: "i32", length: "i32", width: "i32:8", num_offsets: "i32",
    has_valid: "i32", num_sequences: "i32", search_steps: "i32",
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """dz: what a token's own mean tells it, and what the later tokens of its pairs do.

    A thread has single tokens, of which columns at any distance load as well: hence pointers of which nothing is promised.
    """
    FRAME: tl.constexpr = 2 * HEAD_DIM + 2
    token_of, turn = _turns(BLOCK_T, AT_ONCE)
    token = tl.program_id(0) * BLOCK_T + token_of
    token_ok = token < num_tokens
    active = _is_valid(valid_ptr, token, token_ok, has_valid)
    first, end = _sequence(cu_seqlens_ptr, token, token_ok, length, num_sequences, search_steps)
    column, turn_column = _columns(token, FRAME), _columns(token, 2 * HEAD_DIM)
    mask = token_ok[None, None, :]
    u = tl.load(_at(frame_ptr, column, 0, HEAD_DIM), mask=mask, other=0.0)
    h = tl.load(_at(turn_ptr, turn_column, 0, HEAD_DIM), mask=mask, other=0.0)
    grad = tl.load(_at(turn_ptr, turn_column, HEAD_DIM, HEAD_DIM), mask=mask & (turn == 0)[None, None, :], other=0.0)
    of_u, of_h = tl.zeros_like(token).to(tl.float32), tl.zeros_like(token).to(tl.float32)
    for group in range(0, num_offsets, AT_ONCE):
        k = group + turn
        offset = _offset(offsets_ptr, k, num_offsets, o0, o1, o2, o3, o4, o5, o6, o7)
        candidates = active & (k < num_offsets)
        # The earlier token: beta u + cot (h - beta w), w of length 1; nothing where there is no plane, the factor is 0 then.
        pairs = _is_valid(valid_ptr, token - offset, candidates & (token - first >= offset), has_valid)
        v = tl.load(_at(frame_ptr, _columns(token - offset, FRAME), 0, HEAD_DIM), mask=pairs[None, None, :], other=0.0)
        cosine, factor, rest = _pair(pairs_ptr, k, _columns(token, 3 * num_offsets), pairs)
        w = _normal(u, v, cosine, rest)
        beta = _dot(w, h) * factor
        cot = cosine * factor
        of_u += beta
        of_h += cot
        grad = tl.fma(-(cot * beta * factor)[None, None, :], w, grad)
        # The later one.
        later = token + offset
        pairs = _is_valid(valid_ptr, later, candidates & (offset < end - token), has_valid)
        mask = pairs[None, None, :]
        v = tl.load(_at(frame_ptr, _columns(later, FRAME), 0, HEAD_DIM), mask=mask, other=0.0)
        share = tl.load(_at(turn_ptr, _columns(later, 2 * HEAD_DIM), 0, HEAD_DIM), mask=mask, other=0.0)
        cosine, factor, rest = _pair(pairs_ptr, k, _columns(later, 3 * num_offsets), pairs)
        w = _normal(v, u, cosine, rest)
        beta = _dot(w, share) * factor
        grad = tl.fma(-factor[None, None, :], tl.fma(-(beta * factor)[None, None, :], w, share), grad)
    grad = _over_turns(tl.fma(of_u[None, None, :], u, tl.fma(of_h[None, None, :], h, grad)), AT_ONCE)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = token < num_tokens
    inverse = tl.load(frame_ptr + _columns(token, FRAME) + (FRAME - 1) * COLUMNS, mask=mask, other=0.0)[None, None, :]
    grad = tl.where(inverse == 0, 0.0, grad * inverse)
    d = _coordinate(HEAD_DIM)
    to = grad_z_ptr + (token.to(tl.int64) * grad_stride)[None, None, :] + d
    tl.store(to, grad.to(grad_z_ptr.dtype.element_ty), mask=mask[None, None, :] & (d < width))


# Measured for bf16 and r = 32 on an H100 (docs/grassmann.md); larger r have as many elements a thread.
def _tile(head_dim: int) -> dict[str, int]:
    return {"BLOCK_T": 1024 // head_dim, "AT_ONCE": 2, "num_warps": 2}


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
    Variant(kernel, arch, {"dtype": dtype, "HEAD_DIM": head_dim}, _tile(head_dim))
    for arch, dtype, head_dim, kernel in itertools.product(
        ARCHS, DTYPES, (32, 64, 128), (plucker_mean_frame, plucker_mean_bwd_token)
    )
]
