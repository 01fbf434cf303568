"""How the skewed dq kernel handles the rows of a warpgroup where offsets change: who reads, multiplies and adds up what.

A thread has four consecutive rows and an access touches whole sectors of a row. (In the layout of the products an access
touches 32 bytes of each of 8 rows.) Elements come in chunks of 32 columns, [64, CHUNKS, 32], or 16 pairs: a chunk is a constant
away from the one before, which the compiler knows, so that a row takes one address.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate

from triton_kernels.scaled_tiles import ROWS, _opaque, _pairs, _row_ptrs

# The same without chunks, for shared memory.
RUNS = gl.constexpr(gl.BlockedLayout([4, 4], [4, 8], [4, 1], [1, 0]))
PAIR_RUNS = gl.constexpr(gl.BlockedLayout([4, 2], [4, 8], [4, 1], [1, 0]))


@gluon.constexpr_function
def _chunk_layout(head_dim, width, rows=4):
    """`rows` rows of a thread, `width` elements of each of their chunks."""
    return gl.BlockedLayout([rows, head_dim // 32, width], [4, 1, 8], [4, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def _row_layout(layout):
    return gl.SliceLayout(1, gl.SliceLayout(2, layout))


@aggregate
class Rows:
    """The 64 rows of a warpgroup: rows rest, rest + 1, ... of token first_token on."""

    first_token: gl.tensor
    rest: gl.tensor
    num: gl.tensor  # that exist
    group: gl.tensor
    inverse: gl.tensor

    @gluon.jit
    def tokens(self, layout: gl.constexpr):
        """Each row's token from the first on, head, and whether there is such a row."""
        i = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        # Opaque: what is computed before the loop fills the registers, and is spilled.
        row = i + _opaque(self.rest)
        # row // group for row < group + 64: divisions would take as long as the loads.
        token = gl.where(self.group < 64, row * self.inverse >> 16, (row >= self.group).to(gl.int32))
        return token, row - token * self.group, i < self.num


@gluon.jit
def _rows_from(first_row, num_rows, group):
    first_token = first_row // group
    return Rows(first_token, first_row - first_token * group, num_rows - first_row, group, 65536 // group + 1)


@gluon.jit
def _as_chunks(x, layout: gl.constexpr):
    CHUNKS: gl.constexpr = layout.size_per_thread[1]
    return gl.convert_layout(x.reshape([x.shape[0], CHUNKS, x.shape[1] // CHUNKS]), layout, assert_trivial=True)


@gluon.jit
def _as_rows(x, layout: gl.constexpr):
    return gl.convert_layout(x.reshape([x.shape[0], x.shape[1] * x.shape[2]]), layout, assert_trivial=True)


@gluon.jit
def _floats(x, dtype: gl.constexpr, layout: gl.constexpr):
    """The elements of pairs in fp32."""
    if dtype == gl.bfloat16:
        low, high = gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;", "=f,=f,r", [x], dtype=(gl.float32, gl.float32), is_pure=True,
            pack=1)  # fmt: skip
    else:
        low, high = gl.inline_asm_elementwise(
            "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }", "=f,=f,r", [x],
            dtype=(gl.float32, gl.float32), is_pure=True, pack=1)  # fmt: skip
    x = gl.join(low, high).reshape([x.shape[0], x.shape[1], 2 * x.shape[2]])
    return gl.convert_layout(x, layout, assert_trivial=True)


@gluon.jit
def _chunk_ptrs(ptr, row_offset, layout: gl.constexpr):
    """Where rows are, and the column of each element."""
    CHUNKS: gl.constexpr = layout.size_per_thread[1]
    WIDTH: gl.constexpr = 8 * layout.size_per_thread[2]
    row_offset = gl.convert_layout(row_offset, _row_layout(layout), assert_trivial=True)
    d = gl.arange(0, WIDTH, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    chunk = (gl.arange(0, CHUNKS, gl.SliceLayout(0, gl.SliceLayout(2, layout))) * WIDTH)[None, :, None]
    return ptr + row_offset[:, None, None] + d + chunk, d + chunk


@gluon.jit
def _load_pairs(ptr, row_offset, row_ok, whole, head_dim, layout: gl.constexpr):
    ptrs, column = _chunk_ptrs(_pairs(ptr), row_offset, layout)
    row_ok = gl.convert_layout(row_ok, _row_layout(layout), assert_trivial=True)
    if whole:
        x = gl.load(ptrs)
    else:
        x = gl.load(ptrs, mask=row_ok[:, None, None] & (column < head_dim // 2), other=0)
    return x


@gluon.jit
def _clear(ptr, num_rows, head_dim, HEAD_DIM: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [128 // HEAD_DIM, HEAD_DIM // 4], [4, 1], [1, 0])
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    for start in range(0, num_rows, ROWS):
        row = start + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        zeros = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, layout)
        gl.store(_row_ptrs(ptr, row, head_dim, d), zeros, mask=(row < num_rows)[:, None] & (d < head_dim)[None, :])


@gluon.jit
def _add_run(ptr, x, part_row, turn_start, head_dim, run, turns, RUN: gl.constexpr):
    """The sums of RUN rows each, by turns."""
    CHUNKS: gl.constexpr = x.shape[1]
    layout: gl.constexpr = _chunk_layout(32 * CHUNKS, 4, 4 // RUN)
    if RUN > 1:
        x = gl.sum(x.reshape([ROWS // RUN, RUN, CHUNKS, 32]), 1)
        part_row = gl.min(part_row.reshape([ROWS // RUN, RUN]), 1)
        turn_start = gl.max(turn_start.reshape([ROWS // RUN, RUN]), 1)
    x = gl.convert_layout(x, layout, assert_trivial=True)
    turn_start = gl.convert_layout(turn_start, _row_layout(layout), assert_trivial=True)
    ptrs, column = _chunk_ptrs(ptr, part_row * head_dim, layout)
    for i in range(turns):
        gl.atomic_add(ptrs, x, mask=(turn_start == i * run)[:, None, None] & (column < head_dim), sem="relaxed")
        if i + 1 < turns:
            gl.barrier()


@gluon.jit
def _add_rows(ptr, x, rows, offset, w_short, head_dim):
    """Rows of ptr += x, where `run` consecutive rows of x and then `turns` such runs share one.

    By reductions in L2, which nobody waits for. Those to one address come from one thread or have a barrier between them: they
    are added in this order.
    """
    token, head, ok = rows.tokens(RUNS)
    run = gl.minimum(rows.group & -rows.group, 4)
    turns = gl.cdiv(gl.minimum(rows.group, ROWS), run)
    i = gl.arange(0, ROWS, gl.SliceLayout(1, RUNS))
    turn_start = gl.where((head % run == 0) & ok, gl.minimum(head, i), -1)
    part_row = token + (w_short - 1 - offset)  # of what sees no key: one that nobody reads
    if run >= 4:
        _add_run(ptr, x, part_row, turn_start, head_dim, run, turns, 4)
    else:
        if run >= 2:
            _add_run(ptr, x, part_row, turn_start, head_dim, run, turns, 2)
        else:
            _add_run(ptr, x, part_row, turn_start, head_dim, run, turns, 1)
