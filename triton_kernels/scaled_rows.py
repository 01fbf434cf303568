"""The rows that two_simplicial_scaled_dkv.py streams past its keys: which they are, and the warp that fetches them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.core import _aggregate as aggregate

from triton_kernels.scaled_tiles import ROWS, _advance, _skip


@aggregate
class Stream:
    """Rows of q and dO on their way to the warpgroups, 64 at a time."""

    q: gl.shared_memory_descriptor  # [stages, 64, HEAD_DIM]
    grad_out: gl.shared_memory_descriptor
    statistics: gl.shared_memory_descriptor  # [2 * stages, 1, 64]: where the products of S and dP start
    full: gl.shared_memory_descriptor  # [stages] barriers
    empty: gl.shared_memory_descriptor

    advance = _advance
    skip = _skip


@gluon.jit
def _rows_of(j, last_j, first_n, end_pos, past, group, w_short):
    """First and end row of those that see some of the long keys and some of the short keys j to last_j.
    end_pos: where the last sequence, or window, of the long keys ends."""
    first_pos = gl.maximum(gl.maximum(j, first_n), past)
    last_pos = gl.minimum(last_j + w_short, end_pos) - 1
    first = (first_pos - past) * group
    return first, gl.maximum((last_pos + 1 - past) * group, first)


@gluon.jit
def _boxes(tiles):
    """The same shared memory as [boxes of 8 rows and 64 columns]: of a tile first those of its first 64 columns."""
    BOXES: gl.constexpr = tiles.shape[0] * (ROWS // 8) * (tiles.shape[2] // 64)
    dtype: gl.constexpr = tiles.dtype
    return tiles.reinterpret(dtype, [BOXES, 1, 1, 8, 64], gl.NVMMASharedLayout.get_default_for([1, 1, 8, 64], dtype))


@gluon.jit
def _stream_rows(stream, q_desc, grad_out_desc, statistics_desc, batch, first_head, batch_head, num_batch_heads, first_j, end_j, first_n,
                 end_pos, past, group, w_short, copy_rows, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr):  # fmt: skip
    """The helper, a warp: the rows of the short keys of each turn, in the order in which the warpgroups take them."""
    TURN: gl.constexpr = 2 * ROWS // BLOCK_N
    COLUMNS: gl.constexpr = HEAD_DIM // 64
    BYTES: gl.constexpr = 2 * ROWS * (2 * HEAD_DIM + 4)
    q = _boxes(stream.q)
    grad_out = _boxes(stream.grad_out)
    stage = 0
    phase = 1
    for j in range(first_j, end_j, TURN):
        first, end = _rows_of(j, gl.minimum(j + TURN, end_j) - 1, first_n, end_pos, past, group, w_short)
        for start in range(first, end, ROWS):
            mbarrier.wait(stream.empty.index(stage), phase)
            full = stream.full.index(stage)
            mbarrier.expect(full, BYTES)
            tma.async_load(statistics_desc, [batch_head, start], full, stream.statistics.index(2 * stage))
            tma.async_load(statistics_desc, [num_batch_heads + batch_head, start], full, stream.statistics.index(2 * stage + 1))
            for i in range(0, ROWS, copy_rows):  # the host made q_desc and grad_out_desc such that a copy brings so many
                token = (start + i) // group
                head = first_head + start + i - token * group
                for c in gl.static_range(COLUMNS):
                    box = (stage * COLUMNS + c) * (ROWS // 8) + i // 8
                    tma.async_load(q_desc, [batch, token, head, c * 64], full, q.index(box))
                    tma.async_load(grad_out_desc, [batch, token, head, c * 64], full, grad_out.index(box))
            stage, phase = stream.advance(stage, phase)
