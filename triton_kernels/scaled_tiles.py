"""What the Hopper kernels of 2-simplicial attention share: which keys a block walks, and the ring of scaled tiles.

two_simplicial_scaled.py says what scaled tiles are for.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.core import _aggregate as aggregate

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
ROWS = gl.constexpr(64)  # of a warpgroup


# Methods of every ring with `full` and `empty` barriers.
@gluon.jit
def _advance(ring, stage, phase):
    """The stage that follows, and the phase that is waited for there."""
    last = stage == ring.full.shape[0] - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _skip(ring, count, stage, phase):
    """Lets `count` stages pass, which are for the other warpgroup."""
    for _ in range(count):
        mbarrier.wait(ring.full.index(stage), phase)
        mbarrier.arrive(ring.empty.index(stage))
        stage, phase = _advance(ring, stage, phase)
    return stage, phase


@aggregate
class Keys:
    """The keys that the rows of a block see: num_n from first_n on the long axis, num_j from first_j on the short one."""

    first_n: gl.tensor
    num_n: gl.tensor
    w_long: gl.tensor
    first_j: gl.tensor
    num_j: gl.tensor
    w_short: gl.tensor

    @gluon.jit
    def part(self, index, BLOCK_N: gl.constexpr):
        """What is cut into tiles, and what is walked step by step: (first key, tiles, window), (first key, steps, window).

        Part 0: tiles of the long axis, a step for each short key. Part 1, the long keys that fill no tile: tiles of the short
        axis and a step for each of those long keys, where these are fewer steps than one more tile of part 0.
        """
        left = self.num_n % BLOCK_N
        short_tiles = gl.cdiv(self.num_j, BLOCK_N)
        swap = left * short_tiles < self.num_j
        if index == 0:
            tiles = gl.where(swap, self.num_n // BLOCK_N, gl.cdiv(self.num_n, BLOCK_N))
            return self.first_n, tiles, self.w_long, self.first_j, self.num_j, self.w_short
        else:
            tiles = gl.where(swap & (left > 0), short_tiles, 0)
            return self.first_j, tiles, self.w_short, self.first_n + self.num_n - left, left, self.w_long


# Packed sequences: bounds [2, num_bounds] (sequence_bounds.py). num_bounds is 0 where there is one sequence, and nothing is read.
@gluon.jit
def _start_of(pos, bounds_ptr, num_bounds):
    """The first position of the sequence that pos is in."""
    return gl.load(bounds_ptr + pos, mask=pos < num_bounds, other=0)


@gluon.jit
def _end_of(pos, bounds_ptr, num_bounds, num_keys):
    """The position after the last one of the sequence that pos is in."""
    return gl.load(bounds_ptr + num_bounds + pos, mask=pos < num_bounds, other=num_keys)


@gluon.jit
def _keys_of(first_row, num_rows, group, past, w_long, w_short, bounds_ptr, num_bounds, BLOCK_M: gl.constexpr):
    first_pos = first_row // group + past
    last_pos = (gl.minimum(first_row + BLOCK_M, num_rows) - 1) // group + past
    first_key = _start_of(first_pos, bounds_ptr, num_bounds)
    first_n = gl.maximum(first_pos - w_long + 1, first_key)
    first_j = gl.maximum(first_pos - w_short + 1, first_key)
    return Keys(first_n, last_pos + 1 - first_n, w_long, first_j, last_pos + 1 - first_j, w_short)


@aggregate
class Ring:
    """The scaled tiles on their way to the two warpgroups that multiply, and the verdict of these on their sums."""

    k: gl.shared_memory_descriptor  # [stages, BLOCK_N, HEAD_DIM]
    v: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor  # [stages] barriers
    empty: gl.shared_memory_descriptor
    verdict: gl.shared_memory_descriptor  # barrier
    redo: gl.shared_memory_descriptor  # [2] flags

    @gluon.jit
    def is_out_of_range(self):
        """1 if a warpgroup wants the block to be done again, else 0; waits for both."""
        mbarrier.wait(self.verdict, 0)
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        return gl.max(self.redo.index(0).load(layout) | self.redo.index(1).load(layout), 0)

    advance = _advance
    skip = _skip


@gluon.jit
def _new_ring(dtype: gl.constexpr, STAGES: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Its memory; the barriers are to be initialised."""
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, HEAD_DIM], dtype)
    return Ring(
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], tile),
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], tile),
        mbarrier.allocate_mbarrier(batch=STAGES),
        mbarrier.allocate_mbarrier(batch=STAGES),
        mbarrier.allocate_mbarrier(),
        gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])),
    )


@aggregate
class Plain:
    """Tiles of K as they are, two by turns, and for each step the row that scales what is multiplied with them."""

    tiles: gl.shared_memory_descriptor  # [2, BLOCK_N, HEAD_DIM], full with the first stage of their steps
    empty: gl.shared_memory_descriptor  # [2] barriers
    rows: gl.shared_memory_descriptor  # [stages, HEAD_DIM] in fp32, full and empty with a stage of the ring


@gluon.jit
def _new_plain(dtype: gl.constexpr, STAGES: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Its memory; the barriers are to be initialised."""
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, HEAD_DIM], dtype)
    return Plain(
        gl.allocate_shared_memory(dtype, [2, BLOCK_N, HEAD_DIM], tile),
        mbarrier.allocate_mbarrier(batch=2),
        gl.allocate_shared_memory(gl.float32, [STAGES, HEAD_DIM], gl.SwizzledSharedLayout(1, 1, 1, [0])),
    )


# 16-bit elements are loaded, scaled and stored as the two halves of an int32: one by one they would not stay packed in
# registers, and a helper that spills is too slow.
@gluon.jit
def _multiply_pairs(a, b, dtype: gl.constexpr):
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise("mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1)
    else:
        return gl.inline_asm_elementwise("mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _pairs(ptr):
    return ptr.to(gl.pointer_type(gl.int32))


@gluon.jit
def _as_pairs(tiles):
    """The same shared memory; a swizzle depends on bytes, not on the type."""
    TILES: gl.constexpr = tiles.shape[0]
    N: gl.constexpr = tiles.shape[1]
    PAIRS: gl.constexpr = tiles.shape[2] // 2
    return tiles.reinterpret(gl.int32, [TILES, N, PAIRS], gl.NVMMASharedLayout.get_default_for([N, PAIRS], gl.int32))


@gluon.jit
def _row_ptrs(ptr, row, stride, d):
    return ptr + row.to(gl.int64)[:, None] * stride + d[None, :]


@gluon.jit
def _scale_tiles(ring, plain, keys, k_long_ptr, v_long_ptr, k_short_ptr, v_short_ptr, stride_kln, stride_vln, stride_ksn, stride_vsn,
                 head_dim, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, MAY_REDO: gl.constexpr):  # fmt: skip
    """The helper: scaled tiles of K and V, in the order in which the warpgroups take them, and what is in `plain` if not None."""
    dtype: gl.constexpr = k_long_ptr.dtype.element_ty
    PAIRS: gl.constexpr = HEAD_DIM // 2
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [128 // PAIRS, PAIRS // 4], [gl.num_warps(), 1], [1, 0])
    k_smem = _as_pairs(ring.k)
    v_smem = _as_pairs(ring.v)
    d = gl.arange(0, PAIRS, gl.SliceLayout(0, layout))
    d_ok = d < head_dim // 2
    column = gl.arange(0, HEAD_DIM, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    stage = 0
    phase = 1
    slot = 0
    slot_phase = 1
    attempts = 1
    attempt = 0
    while attempt < attempts:
        for part in range(2):
            first_a, num_tiles, _, first_b, num_b, _ = keys.part(part, BLOCK_N)
            ka_ptr = _pairs(k_long_ptr) if part == 0 else _pairs(k_short_ptr)
            va_ptr = _pairs(v_long_ptr) if part == 0 else _pairs(v_short_ptr)
            kb_ptr = _pairs(k_short_ptr) if part == 0 else _pairs(k_long_ptr)
            vb_ptr = _pairs(v_short_ptr) if part == 0 else _pairs(v_long_ptr)
            stride_ka = (stride_kln if part == 0 else stride_ksn) // 2
            stride_va = (stride_vln if part == 0 else stride_vsn) // 2
            stride_kb = (stride_ksn if part == 0 else stride_kln) // 2
            stride_vb = (stride_vsn if part == 0 else stride_vln) // 2
            for tile in range(num_tiles):
                a = first_a + tile * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout))
                mask = (a < keys.first_n + keys.num_n)[:, None] & d_ok[None, :]  # the last key that a row sees, on both axes
                k = gl.load(_row_ptrs(ka_ptr, a, stride_ka, d), mask=mask, other=0)
                v = gl.load(_row_ptrs(va_ptr, a, stride_va, d), mask=mask, other=0)
                if plain is not None:
                    row_ptr = (k_short_ptr if part == 0 else k_long_ptr) + first_b.to(gl.int64) * stride_kb * 2 + column
                    mbarrier.wait(plain.empty.index(slot), slot_phase)
                    async_copy.async_load(_as_pairs(plain.tiles).index(slot), _row_ptrs(ka_ptr, a, stride_ka, d), mask=mask)
                    async_copy.commit_group()
                    async_copy.wait_group(0)
                k_row = kb_ptr + first_b.to(gl.int64) * stride_kb + d
                v_row = vb_ptr + first_b.to(gl.int64) * stride_vb + d
                k_b = gl.load(k_row, mask=d_ok, other=0)
                v_b = gl.load(v_row, mask=d_ok, other=0)
                for i in range(num_b):
                    k_row += stride_kb
                    v_row += stride_vb
                    more = d_ok & (i + 1 < num_b)
                    next_k = gl.load(k_row, mask=more, other=0)
                    next_v = gl.load(v_row, mask=more, other=0)
                    if plain is not None:
                        row = gl.load(row_ptr, mask=column < head_dim, other=0.0)
                        row_ptr += stride_kb * 2
                    mbarrier.wait(ring.empty.index(stage), phase)
                    k_smem.index(stage).store(_multiply_pairs(k, gl.broadcast(k_b[None, :], k)[0], dtype))
                    v_smem.index(stage).store(_multiply_pairs(v, gl.broadcast(v_b[None, :], v)[0], dtype))
                    if plain is not None:
                        plain.rows.index(stage).store(row.to(gl.float32))
                    fence_async_shared()
                    mbarrier.arrive(ring.full.index(stage))
                    k_b, v_b = next_k, next_v
                    stage, phase = ring.advance(stage, phase)
                slot_phase ^= slot
                slot ^= 1
        attempt += 1
        if MAY_REDO:
            if attempt == 1:
                attempts += ring.is_out_of_range()


@gluon.jit
def _own_steps(first_pos, last_pos, first_start, first_b, num_b, w_b):
    """Of num_b steps from key first_b on, those whose key rows from first_pos to last_pos see: the first, and how many.
    first_start: the first position of first_pos' sequence."""
    own_first = gl.minimum(gl.maximum(gl.maximum(first_pos - w_b + 1, first_start) - first_b, 0), num_b)
    return own_first, gl.maximum(gl.minimum(last_pos + 1 - first_b, num_b) - own_first, 0)


@gluon.jit
def _sees_one_pair(age, w_long, w_short):
    """Where P is 1 whatever the logit: dS is exactly dlse there, which delta holds (negated). age: the position in its sequence."""
    return (age == 0) | (w_long + w_short == 2)


@gluon.jit
def _lane_sums(p):
    """Sums over the columns that a thread holds; the four lanes of a row are added at the end."""
    return gl.sum(gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def _over_columns(x, like):
    return gl.convert_layout(x, gl.SliceLayout(1, like.type.layout))[:, None]


@gluon.jit
def _opaque(x):
    """x, which the compiler does not know any more: what it computes from x before a loop fills the registers, and is spilled."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _columns(start, like):
    """The columns of a tile, counted anew at each call: in a loop's registers they, or masks made of them, would have no room."""
    return _opaque(start) + gl.arange(0, like.shape[1], gl.SliceLayout(0, like.type.layout))


@gluon.jit
def _hide(s, a, last, count, HIDDEN: gl.constexpr = "0fFF800000"):
    """-inf, or HIDDEN, in place of s where the column is none of the `count` up to `last`. In one piece, so that no predicate
    outlives it."""
    a = gl.broadcast(a[None, :], s)[0]
    last = gl.broadcast(last[:, None], s)[0]
    count = gl.broadcast(count[:, None], s)[0]
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .u32 age; sub.u32 age, $3, $2; setp.lt.u32 p, age, $4; selp.f32 $0, $1, " + HIDDEN + ", p; }",
        "=f,f,r,r,r", [s, a, last, count], dtype=gl.float32, is_pure=True, pack=1)  # fmt: skip


@gluon.jit
def _weights(s, ref, row_sum, to_exponent, a, pos, since, at_edge, seen, past, REBASE: gl.constexpr, EXACT: gl.constexpr):
    """P = exp2(S - ref), a reference and sums to go on with, and the factor that earlier sums of P @ V need for it.

    Along a lie the columns, of which a row sees those after `since` up to pos; the rows with `seen` see the other axis' key,
    those with `past` are not before it.
    """
    if EXACT or at_edge:
        s = _hide(s, a, pos, gl.where(seen, pos - since, 0) if EXACT else pos - since)
    alpha = ref
    if REBASE:
        # Without EXACT any logit of the past will do, seen or not: rows that this takes out of range are done again.
        new_ref = gl.maximum(ref, gl.where(past, gl.max(s, 1) * to_exponent, float("-inf")))
        # A row without a logit so far: 0 avoids -inf - -inf.
        finite_ref = gl.where(new_ref == float("-inf"), 0.0, new_ref)
        alpha = gl.exp2(ref - finite_ref)
        row_sum = row_sum * _over_columns(alpha, row_sum)
        ref = new_ref if EXACT else finite_ref
    shift = gl.where(seen, gl.where(ref == float("-inf"), 0.0, -ref) if EXACT else -ref, float("-inf"))
    p = gl.exp2(gl.fma(s, gl.full_like(s, to_exponent), gl.broadcast(shift[:, None], s)[0]))
    return p, ref, row_sum + _lane_sums(p), alpha


@gluon.jit
def _load_queries(q_smem, warpgroup, q_ptr, stride_qn, stride_qh, first_row, num_rows, group, head_dim, scale):
    """64 rows of q to shared memory with the sign of scale, so that the maximum of S is the maximum of the logits; and what takes
    S to an exponent of 2."""
    PAIRS: gl.constexpr = q_smem.shape[2] // 2
    pairs: gl.constexpr = gl.BlockedLayout([1, 4], [128 // PAIRS, PAIRS // 4], [4, 1], [1, 0])
    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, pairs))
    d = gl.arange(0, PAIRS, gl.SliceLayout(0, pairs))
    q_ptrs = _row_ptrs(_pairs(q_ptr), row // group, stride_qn // 2, d) + (row % group)[:, None] * (stride_qh // 2)
    q = gl.load(q_ptrs, mask=(row < num_rows)[:, None] & (d < head_dim // 2)[None, :], other=0)
    _as_pairs(q_smem).index(warpgroup).store(q ^ gl.where(scale < 0, -0x7FFF8000, 0))  # both halves' sign bits
    gl.barrier()
    # A scale of 0 becomes one that is 0 to every finite logit but keeps -inf * scale == -inf.
    return gl.maximum(gl.maximum(scale, -scale) * LOG2E, 1e-30)


@gluon.jit
def _in_range(ring, warpgroup, o, row_sum, age, row_ok, w_long, w_short, dtype: gl.constexpr):
    """The rows whose sums are right, and a word to the others of the block on whether all are. age: a row's position in its
    sequence."""
    # Weights overflow far above the reference. Far below it, fp16 ones lose bits (2^-25 each at most, so that 2^-12 of the sum
    # may be lost) and bf16 ones do not.
    least = gl.full_like(row_sum, 1e-20)
    if dtype == gl.float16:
        pairs = gl.minimum(age + 1, w_long).to(gl.float32) * gl.minimum(age + 1, w_short).to(gl.float32)
        least = gl.maximum(pairs * 2.0**-13, 0.5)
    in_range = (row_sum >= least) & (row_sum + gl.convert_layout(gl.sum(o * 0.0, 1), row_sum.type.layout) < float("inf"))
    bad = row_ok & (in_range == 0)
    flag: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    ring.redo.index(warpgroup).store(gl.full([1], 0, gl.int32, flag) + gl.max(bad.to(gl.int32), 0))
    mbarrier.arrive(ring.verdict)
    return in_range


@gluon.jit
def _store(o, row_sum, ref, out_ptr, lse_ptr, row, mask, group, num_queries, out_stride, head_dim, dtype: gl.constexpr):
    HEAD_DIM: gl.constexpr = o.shape[1]
    o_rows: gl.constexpr = gl.SliceLayout(1, o.type.layout)
    gl.store(lse_ptr + (row % group).to(gl.int64) * num_queries + row // group, (ref + gl.log2(row_sum)) * LN2, mask=mask)
    row = gl.convert_layout(row, o_rows)
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, o.type.layout))
    out_ptrs = _row_ptrs(out_ptr, (row // group).to(gl.int64) * out_stride + row % group, head_dim, d)
    out_mask = gl.convert_layout(mask, o_rows)[:, None] & (d < head_dim)[None, :]
    gl.store(out_ptrs, (o / _over_columns(row_sum, o)).to(dtype), mask=out_mask)


@gluon.jit
def _out_ptrs(ptr, first_row, out_stride, num_rows, group, head_dim, layout: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Where 64 rows of out or dq are, and which there are. out_stride: the heads of all kv heads."""
    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    ptrs = ptr + ((row // group).to(gl.int64) * out_stride + row % group)[:, None] * head_dim + d[None, :]
    return ptrs, (row < num_rows)[:, None] & (d < head_dim)[None, :]


@gluon.jit
def _store_rows(ptr, x, first_row, out_stride, num_rows, group, head_dim):
    ptrs, mask = _out_ptrs(ptr, first_row, out_stride, num_rows, group, head_dim, x.type.layout, x.shape[1])
    gl.store(ptrs, x, mask=mask)


@gluon.jit
def _lse_and_delta(grad_out, first_row, single, out_ptr, lse_ptr, grad_lse_ptr, has_grad_lse, out_stride, num_queries, num_rows, group,
                   head_dim):  # fmt: skip
    """lse as an exponent of 2 and delta = sum(dO * out) - dlse, of 64 rows; `single`: rows that see one pair."""
    ptrs, mask = _out_ptrs(out_ptr, first_row, out_stride, num_rows, group, head_dim, grad_out.type.layout, grad_out.shape[1])
    out = gl.load(ptrs, mask=mask, other=0.0)
    delta = gl.convert_layout(gl.sum(grad_out.to(gl.float32) * out.to(gl.float32), 1), single.type.layout)
    delta = gl.where(single, 0.0, delta)
    row = first_row + gl.arange(0, ROWS, single.type.layout)
    lse_row = (row % group).to(gl.int64) * num_queries + row // group
    if has_grad_lse != 0:
        delta -= gl.load(grad_lse_ptr + lse_row, mask=row < num_rows, other=0.0)
    # inf: P of a row past the end is 0
    return gl.load(lse_ptr + lse_row, mask=row < num_rows, other=float("inf")) * LOG2E, delta


@gluon.jit
def _score_gradients(s, dp, lse2, delta, to_exponent, start, pos, w_a, at_edge, seen, b, begin):
    """dS, 0 for pairs that are not seen: of keys from start on with key b of the other axis, by rows at pos of sequences that begin
    at `begin`."""
    shift = gl.where(seen, -lse2, float("-inf"))
    p = gl.exp2(gl.fma(s, gl.full_like(s, to_exponent), gl.broadcast(shift[:, None], s)[0]))
    ds = p * (dp - delta[:, None])
    if at_edge:
        ds = _hide(ds, _columns(start, s), pos, gl.where(seen & (begin <= b), gl.minimum(w_a, pos - begin + 1), 0), "0f00000000")
    return ds
