"""The rows of the portable kernels' tiles (two_simplicial_attention.py says what a row is): whose they are and what they see."""

import triton
import triton.language as tl


@triton.jit
def _tile_rows(first_row, num_rows, group, past, BLOCK_M: tl.constexpr):
    """Tokens, heads of the group, absolute positions [BLOCK_M] of a tile's rows, and its first and last position."""
    rows = first_row + tl.arange(0, BLOCK_M)
    token = rows // group
    last_row = tl.minimum(first_row + BLOCK_M, num_rows) - 1
    return token, rows % group, token + past, rows < num_rows, first_row // group + past, last_row // group + past


@triton.jit
def _start_of(pos, bounds_ptr, num_bounds):
    """Where the sequence of each position starts. Only packed sequences have bounds, num_keys of them; others start at 0."""
    return tl.load(bounds_ptr + pos, mask=pos < num_bounds, other=0)


@triton.jit
def _until(n, w_long, num_keys, bounds_ptr, num_bounds):
    """One past the last position that sees each long key."""
    end = tl.load(bounds_ptr + num_keys + n, mask=n < num_bounds, other=num_keys)
    return n + tl.minimum(w_long, end - n)  # in this order: n + w_long may pass 2^31


@triton.jit
def _short_rows(first_row, group, past, SHARE: tl.constexpr, BLOCK_M: tl.constexpr):
    """Positions of the tile's short rows at offset 0, one for each SHARE rows, and whose turn of their token it is.

    A token that has more than one short row in the tile numbers them by turns: 0 .. min(group, BLOCK_M) // SHARE - 1.
    """
    RUN: tl.constexpr = SHARE if SHARE < BLOCK_M else BLOCK_M
    run = first_row // RUN + tl.arange(0, BLOCK_M // RUN)
    runs_of_token = group // RUN
    return run // runs_of_token + past, run % runs_of_token % (BLOCK_M // RUN)


@triton.jit
def _expand(x, BLOCK_M: tl.constexpr):
    """Short rows [BLOCK_M / SHARE, HEAD_DIM] -> the row of every row of the tile (one row broadcasts by itself)."""
    R: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    if R == 1 or R == BLOCK_M:
        return x
    else:
        return tl.reshape(tl.broadcast_to(x[:, None, :], [R, BLOCK_M // R, D]), [BLOCK_M, D])


@triton.jit
def _sum_runs(x, R: tl.constexpr):
    """The inverse: rows [BLOCK_M, HEAD_DIM] -> their sums over each short row's rows."""
    M: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    if R == M:
        return x
    else:
        return tl.sum(tl.reshape(x, [R, M // R, D]), 1)


@triton.jit
def _row_ptrs(ptr, row, stride, d):
    return ptr + row.to(tl.int64)[:, None] * stride + d[None, :]


@triton.jit
def _sees_one_pair(pos, start, w_long, w_short):
    """Where P is 1 whatever the logit: dS is exactly dlse there, which delta is made to hold (negated), not rounding errors."""
    return (pos == start) | (w_long + w_short == 2)
