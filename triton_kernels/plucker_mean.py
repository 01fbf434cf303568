"""The mean Plücker vector of Grassmann mixing (arXiv 2512.19428): portable Triton kernels, forward and backward.

All planes of a token's mean contain the token, so they add up to one plane u ^ Y: u the unit token, Y the mean of unit
vectors normal to it. Two kernels work on these frames, one token a row: `plucker_mean_frame` finds them, `_bwd_token` leads
their gradient back to z. Two work on the packed coordinates, which grow with the square of r: `_fwd` and `_bwd_frame`.

The gradient of a token has a part from its own mean and one from each later token that it is paired with: gathered,
without atomics, so that the result does not depend on timing.

Rows of z and of frames are `width` elements long: r, padded with zeros to a multiple of 8, so that 16 bytes load at once.
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
def _store_rows(ptr, token, width, mask, x, R: tl.constexpr):
    d = tl.arange(0, R)
    at = token.to(tl.int64)[:, None] * width + d[None, :]
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=mask[:, None] & (d < width)[None, :])


@triton.jit
def _scale(z):
    """z divided by its largest element, so that no square overflows, the element, and the length of what is left.

    The length is 0 for a token of 0.
    """
    largest = tl.max(tl.abs(z), 1)
    total = tl.sum(z, 1)
    zero = (largest < SMALLEST_NORMAL) & (total == total)  # a GPU's maximum passes over NaN: a token of NaN is not 0
    x = z * tl.where(zero, 0.0, 1.0 / tl.where(zero, 1.0, largest))[:, None]
    return x, tl.where(zero, 1.0, largest), tl.sqrt(tl.sum(x * x, 1))


@triton.jit
def _unit(x, norm):
    return x * (1.0 / tl.where(norm == 0, 1.0, norm))[:, None]


@triton.jit
def _angle(u, v, norm):
    """Cosine and 1 / sine between the unit vector u and v, of length `norm`, and a vector normal to u in their plane with
    the factor that gives it length 1. Where there is no plane both factors are 0."""
    cosine = tl.sum(u * v, 1)
    w = tl.fma(-cosine[:, None], u, v)
    # Once more: where the angle is small the first subtraction leaves rounding errors along u.
    w = tl.fma(-tl.sum(u * w, 1)[:, None], u, w)
    length = tl.sqrt(tl.sum(w * w, 1))
    spans = ~(length <= SMALLEST_SINE * norm)  # true for NaN, which must not vanish
    factor = tl.where(spans, 1.0 / tl.where(spans, length, 1.0), 0.0)
    return cosine, factor, w


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
    z_ptr: "*dtype:16", valid_ptr: "*i8:16", cu_seqlens_ptr: "*i32:16", offsets_ptr: "*i32:16",
    o0: "i32", o1: "i32", o2: "i32", o3: "i32", o4: "i32", o5: "i32", o6: "i32", o7: "i32",
    frame_ptr: "*fp32:16", count_ptr: "*fp32:16",
    history: "i32", num_tokens: "i32", length: "i32", width: "i32:8", num_offsets: "i32",
    has_valid: "i32", num_sequences: "i32", search_steps: "i32",
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """u, Y [2, width] and N of all tokens but the first `history` of each row."""
    output = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_ok = output < num_tokens
    token = output + (output // (length - history) + 1) * history
    x, _largest, norm = _scale(_rows(z_ptr, token, width, token_ok, HEAD_DIM))
    u = _unit(x, norm)
    active = _is_valid(valid_ptr, token, token_ok, has_valid)
    first, _end = _sequence(cu_seqlens_ptr, token, token_ok, length, num_sequences, search_steps)
    mean = tl.zeros_like(u)
    count = tl.zeros_like(tl.sum(u, 1))
    for k in range(0, num_offsets):
        offset = _offset(offsets_ptr, k, num_offsets, o0, o1, o2, o3, o4, o5, o6, o7)
        pairs = _is_valid(valid_ptr, token - offset, active & (token - first >= offset), has_valid)
        v, _largest, norm = _scale(_rows(z_ptr, token - offset, width, pairs, HEAD_DIM))
        _cosine, factor, w = _angle(u, v, norm)
        mean = tl.fma(w, factor[:, None], mean)  # plus 0 where the pair is not one: v is 0 there
        count += tl.where(pairs, 1.0, 0.0)
    _store_rows(frame_ptr, 2 * output, width, token_ok, u, HEAD_DIM)
    _store_rows(frame_ptr, 2 * output + 1, width, token_ok, mean / tl.maximum(count, 1.0)[:, None], HEAD_DIM)
    tl.store(count_ptr + output, count, mask=token_ok)


@triton.jit
def plucker_mean_fwd(
    frame_ptr: "*fp32:16", count_ptr: "*fp32:16", pbar_ptr: "*dtype:16", seen_ptr: "*dtype:16",
    num_tokens: "i32", r: "i32", width: "i32:8",
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """pbar = u ^ Y, of which a program has BLOCK_P elements, and whether there is anything to it.

    Consecutive threads write consecutive elements: whole rows of the triangle i < j would share their 32 bytes of memory.
    """
    plane = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    planes = r * (r - 1) // 2
    plane_ok = plane < planes
    # The row i that starts at i (2 r - 1 - i) / 2 or before; the square root is rounded.
    odd = 2 * r - 1
    root = tl.sqrt(tl.maximum(odd * odd - 8 * plane, 0).to(tl.float32))
    i = ((odd.to(tl.float32) - root) * 0.5).to(tl.int32)
    i = tl.where(i * (odd - i) // 2 > plane, i - 1, i)
    i = tl.where((i + 1) * (odd - i - 1) // 2 <= plane, i + 1, i)
    j = plane - i * (odd - i) // 2 + i + 1
    begin = tl.program_id(0) * BLOCK_T
    for step in range(0, tl.minimum(BLOCK_T, num_tokens - begin)):
        token = begin.to(tl.int64) + step
        u = frame_ptr + token * (2 * width)
        mean = u + width
        u_i, u_j = tl.load(u + i, mask=plane_ok, other=0.0), tl.load(u + j, mask=plane_ok, other=0.0)
        mean_i, mean_j = tl.load(mean + i, mask=plane_ok, other=0.0), tl.load(mean + j, mask=plane_ok, other=0.0)
        pbar = (u_i * mean_j - mean_i * u_j).to(pbar_ptr.dtype.element_ty)
        tl.store(pbar_ptr + token * planes + plane, pbar, mask=plane_ok)
    if tl.program_id(1) == 0:
        tokens = begin + tl.arange(0, BLOCK_T)
        count = tl.load(count_ptr + tokens, mask=tokens < num_tokens, other=0.0)
        seen = tl.where(count > 0, 1.0, 0.0).to(seen_ptr.dtype.element_ty)
        tl.store(seen_ptr + tokens, seen, mask=tokens < num_tokens)


@triton.jit
def plucker_mean_bwd_frame(
    frame_ptr: "*fp32:16", count_ptr: "*fp32:16", grad_pbar_ptr: "*dtype:16", turn_ptr: "*fp32:16",
    num_tokens: "i32", r: "i32", width: "i32:8",
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Om u / N and Om Y [2, width], with Om the antisymmetric matrix of the gradient of pbar: BLOCK_R of their elements."""
    rows = 0 if HEAD_DIM == BLOCK_R else tl.program_id(1)
    d = tl.arange(0, BLOCK_R)
    i = rows * BLOCK_R + d
    begin = tl.program_id(0) * BLOCK_T
    for step in range(0, tl.minimum(BLOCK_T, num_tokens - begin)):
        token = begin.to(tl.int64) + step
        count = tl.load(count_ptr + token)
        frame = frame_ptr + token * (2 * width)
        grad = grad_pbar_ptr + token * (r * (r - 1) // 2)
        h = tl.zeros((BLOCK_R,), tl.float32)
        own = tl.zeros((BLOCK_R,), tl.float32)
        if count > 0:
            for columns in range(0, HEAD_DIM // BLOCK_R):
                # A tile of the triangle p < q.
                p = (tl.minimum(rows, columns) * BLOCK_R + d)[:, None]
                q = (tl.maximum(rows, columns) * BLOCK_R + d)[None, :]
                plane = p * r - p * (p + 1) // 2 + q - p - 1
                upper = tl.load(grad + plane, mask=(p < q) & (q < r), other=0.0)
                # A thread gets a row of the transposed tile, hence of om: the sums need no other thread.
                lower = tl.trans(upper).to(tl.float32)
                if HEAD_DIM == BLOCK_R:
                    om = upper.to(tl.float32) - lower
                else:
                    om = tl.where(rows <= columns, upper.to(tl.float32), 0.0) - tl.where(rows >= columns, lower, 0.0)
                j = columns * BLOCK_R + d
                u = tl.load(frame + j, mask=j < width, other=0.0)
                mean = tl.load(frame + width + j, mask=j < width, other=0.0)
                h += tl.sum(om * u[None, :], 1)
                own += tl.sum(om * mean[None, :], 1)
        turn = turn_ptr + token * (2 * width)
        tl.store(turn + i, h / tl.maximum(count, 1.0), mask=i < width)
        tl.store(turn + width + i, own, mask=i < width)


@triton.jit
def plucker_mean_bwd_token(
    z_ptr: "*dtype:16", valid_ptr: "*i8:16", cu_seqlens_ptr: "*i32:16", offsets_ptr: "*i32:16",
    o0: "i32", o1: "i32", o2: "i32", o3: "i32", o4: "i32", o5: "i32", o6: "i32", o7: "i32",
    frame_ptr: "*fp32:16", turn_ptr: "*fp32:16", grad_z_ptr: "*dtype:16",
    num_tokens: "i32", length: "i32", width: "i32:8", num_offsets: "i32",
    has_valid: "i32", num_sequences: "i32", search_steps: "i32",
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """dz: what a token's own mean tells it, and what the later tokens of its pairs do."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_ok = token < num_tokens
    x, largest, norm = _scale(_rows(z_ptr, token, width, token_ok, HEAD_DIM))
    u = _unit(x, norm)
    active = _is_valid(valid_ptr, token, token_ok, has_valid)
    first, end = _sequence(cu_seqlens_ptr, token, token_ok, length, num_sequences, search_steps)
    h = _rows(turn_ptr, 2 * token, width, token_ok, HEAD_DIM)
    grad = _rows(turn_ptr, 2 * token + 1, width, token_ok, HEAD_DIM)
    for k in range(0, num_offsets):
        offset = _offset(offsets_ptr, k, num_offsets, o0, o1, o2, o3, o4, o5, o6, o7)
        pairs = _is_valid(valid_ptr, token - offset, active & (token - first >= offset), has_valid)
        v = _rows(frame_ptr, 2 * (token - offset), width, pairs, HEAD_DIM)
        cosine, factor, w = _angle(u, v, 1.0)
        # beta u + cot (h - beta w), w of length 1: nothing where there is no plane, the factor is 0 then
        beta = tl.sum(w * h, 1) * factor
        cot = cosine * factor
        grad = tl.fma(beta[:, None], u, grad)
        grad = tl.fma(cot[:, None], tl.fma(-(beta * factor)[:, None], w, h), grad)

        pairs = _is_valid(valid_ptr, token + offset, active & (offset < end - token), has_valid)
        v = _rows(frame_ptr, 2 * (token + offset), width, pairs, HEAD_DIM)
        share = _rows(turn_ptr, 2 * (token + offset), width, pairs, HEAD_DIM)
        _cosine, factor, w = _angle(v, u, 1.0)
        beta = tl.sum(w * share, 1) * factor
        grad = tl.fma(-factor[:, None], tl.fma(-(beta * factor)[:, None], w, share), grad)
    zero = norm == 0
    grad = tl.where(zero[:, None], 0.0, grad * (1.0 / tl.where(zero, 1.0, norm))[:, None] / largest[:, None])
    _store_rows(grad_z_ptr, token, width, token_ok, grad, HEAD_DIM)


def _tile(kernel, head_dim: int) -> dict[str, int]:
    if kernel is plucker_mean_bwd_frame:
        return {"BLOCK_T": 1, "BLOCK_R": 32, "num_warps": 1}
    return {"BLOCK_T": 512 // head_dim, "num_warps": 2}


ARCHS = ("sm80", "sm90a", "sm100f", "sm120f")
DTYPES = ("bf16", "fp16", "fp32")
VARIANTS = [Variant(plucker_mean_offsets, arch, {}, {"num_warps": 1}) for arch in ARCHS]
VARIANTS += [
    Variant(plucker_mean_fwd, arch, {"dtype": dtype}, {"BLOCK_T": 8, "BLOCK_P": 512, "num_warps": 4})
    for arch, dtype in itertools.product(ARCHS, DTYPES)
]
VARIANTS += [
    Variant(kernel, arch, {"dtype": dtype, "HEAD_DIM": head_dim}, _tile(kernel, head_dim))
    for arch, dtype, head_dim, kernel in itertools.product(
        ARCHS, DTYPES, (32, 64, 128), (plucker_mean_frame, plucker_mean_bwd_frame, plucker_mean_bwd_token)
    )
]
