"""2-simplicial attention on Hopper for few heads per kv head, down to one: a FlashAttention loop for each short offset.

As in two_simplicial_attention.py a row (t, head) multiplies by its OWN short key t - o at offset o, so the short axis wastes
nothing at any ratio of heads:

    A = q * k_short[t - o]        S = A @ k_long^T        acc = P @ v_long        out += v_short[t - o] * acc

Offsets are outside and the long window inside, so what belongs to an offset, A and acc, stays in registers through the whole
window. A helper warpgroup fetches tiles of K and V (TMA) and the rows' short keys and values (cp.async, a gather); two
warpgroups of 64 rows each multiply. The tiles are walked from the newest to the oldest: the first one holds every row's own
key, whose logit is where a row's reference comes from. References and the second try: two_simplicial_scaled.py.
"""

import itertools

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate

from triton_kernels.scaled_tiles import (
    ROWS,
    _columns,
    _in_range,
    _lane_sums,
    _load_queries,
    _new_ring,
    _over_columns,
    _row_ptrs,
    _store,
    _weights,
)
from triton_kernels.variant import Variant


@aggregate
class Short:
    """The short keys and values of a block's rows at one offset."""

    k: gl.shared_memory_descriptor  # [2, 64, HEAD_DIM]
    v: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor  # barriers
    k_empty: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    v_empty: gl.shared_memory_descriptor


@aggregate
class Band:
    """What a block walks: num_offsets of the short axis, and for each num_tiles of the long one, down from key end_n - 1."""

    end_n: gl.tensor
    num_tiles: gl.tensor
    num_offsets: gl.tensor
    w_long: gl.tensor
    w_short: gl.tensor

    @gluon.jit
    def own_tiles(self, first_pos, last_pos, BLOCK_N: gl.constexpr):
        """Of the tiles, those that positions first_pos to last_pos see: how many come before, and how many they are."""
        newest = (self.end_n - 1 - last_pos) // BLOCK_N
        oldest = (self.end_n - 1 - gl.maximum(first_pos - self.w_long + 1, 0)) // BLOCK_N
        empty = last_pos < first_pos  # no rows
        return gl.where(empty, 0, newest), gl.where(empty, 0, oldest - newest + 1)


@gluon.jit
def _band_of(first_row, num_rows, group, past, w_long, w_short, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    end_n = (first_row + BLOCK_M - 1) // group + past + 1  # of a full block, so that a tile holds the own keys of 64 rows
    begin_n = gl.maximum(first_row // group + past - w_long + 1, 0)
    last_pos = (gl.minimum(first_row + BLOCK_M, num_rows) - 1) // group + past
    return Band(end_n, gl.cdiv(end_n - begin_n, BLOCK_N), gl.minimum(w_short, last_pos + 1), w_long, w_short)


@gluon.jit
def _block_of(program, num_blocks, num_heads):
    """The block and head of a program. Blocks of 8 heads at a time: 132 windows of as many heads would not fit the L2 cache."""
    first_head = program // (8 * num_blocks) * 8
    heads = gl.minimum(num_heads - first_head, 8)
    local = program % (8 * num_blocks)
    return num_blocks - 1 - local // heads, first_head + local % heads  # the most work first


@gluon.jit
def _gather(smem, ptr, stride, first_row, group, shift, num_keys, head_dim):
    """Rows first_row .. of a block: each one's row of ptr at its token + shift, zeros where there is none."""
    HEAD_DIM: gl.constexpr = smem.shape[2]
    CHUNK: gl.constexpr = 1024 // HEAD_DIM  # rows that the threads load at once, 16 bytes each: more take too many registers
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    for half in gl.static_range(2):
        for chunk in gl.static_range(ROWS // CHUNK):
            row = first_row + half * ROWS + chunk * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(1, layout))
            key = row // group + shift
            mask = ((key >= 0) & (key < num_keys))[:, None] & (d < head_dim)[None, :]
            async_copy.async_load(smem.index(half).slice(chunk * CHUNK, CHUNK), _row_ptrs(ptr, key, stride, d), mask=mask)


@gluon.jit
def _load_tiles(ring, band, stage, phase, k_desc, v_desc, batch, kv_head):
    """The tiles of an offset."""
    box: gl.constexpr = k_desc.block_shape
    for tile in range(1, band.num_tiles + 1):
        mbarrier.wait(ring.empty.index(stage), phase)
        full = ring.full.index(stage)
        at = [batch, band.end_n - tile * box[1], kv_head, 0]
        mbarrier.expect(full, k_desc.nbytes_per_cta + v_desc.nbytes_per_cta)
        tma.async_load(k_desc, at, full, ring.k.index(stage).reshape(box))
        tma.async_load(v_desc, at, full, ring.v.index(stage).reshape(box))
        stage, phase = ring.advance(stage, phase)
    return stage, phase


@gluon.jit
def _fetch(ring, short, band, k_desc, v_desc, k_short_ptr, v_short_ptr, stride_ksn, stride_vsn, batch, kv_head, first_row, group,
           past, num_keys, head_dim, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, MAY_REDO: gl.constexpr):  # fmt: skip
    """The helper: tiles and short rows, in the order in which the warpgroups take them."""
    stage = 0
    phase = 1
    short_phase = 1
    attempts = 1
    attempt = 0
    while attempt < attempts:
        for offset in range(band.num_offsets):
            mbarrier.wait(short.k_empty, short_phase)
            _gather(short.k, k_short_ptr, stride_ksn, first_row, group, past - offset, num_keys, head_dim)
            async_copy.mbarrier_arrive(short.k_full, increment_count=False)
            stage, phase = _load_tiles(ring, band, stage, phase, k_desc, v_desc, batch, kv_head)
            # These the warpgroups give back at the end of an offset only: asked for earlier, they would hold up the tiles.
            mbarrier.wait(short.v_empty, short_phase)
            _gather(short.v, v_short_ptr, stride_vsn, first_row, group, past - offset, num_keys, head_dim)
            async_copy.mbarrier_arrive(short.v_full, increment_count=False)
            short_phase ^= 1
        attempt += 1
        if MAY_REDO:
            if attempt == 1:
                attempts += ring.is_out_of_range()


@gluon.jit
def _sums(ring, short, band, stage, phase, short_phase, q_smem, warpgroup, pos, first_pos, last_pos, to_exponent,
          HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, EXACT: gl.constexpr):  # fmt: skip
    """A warpgroup's sums of P @ V and P over all pairs, relative to a reference of each row. EXACT: its running maximum."""
    s_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, s_mma, 2)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_mma, 2)
    ref = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_mma))
    zero_s = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, s_mma)
    row_sum = _lane_sums(zero_s)
    out = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, o_mma)
    before, own_num = band.own_tiles(first_pos, last_pos, BLOCK_N)
    for offset in range(band.num_offsets):
        seen = pos >= offset
        since = gl.maximum(pos - band.w_long, -1)
        mbarrier.wait(short.k_full, short_phase)
        a = q_smem.index(warpgroup).load(a_layout) * short.k.index(warpgroup).load(a_layout)
        mbarrier.arrive(short.k_empty)
        stage, phase = ring.skip(before, stage, phase)
        acc = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, o_mma)
        rescale = gl.full([ROWS], 1.0, gl.float32, gl.SliceLayout(1, s_mma))
        if own_num > 0:
            start = band.end_n - (before + 1) * BLOCK_N
            at_edge = (start + BLOCK_N - 1 > first_pos) | (start <= gl.maximum(last_pos - band.w_long, -1))
            mbarrier.wait(ring.full.index(stage), phase)
            s = warpgroup_mma(a, ring.k.index(stage).permute((1, 0)), zero_s, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=(s,))
            n = _columns(start, s)
            p, ref, row_sum, rescale = _weights(
                s, ref, row_sum, to_exponent, n, pos, since, at_edge, seen, seen, True, EXACT)  # fmt: skip
            p = gl.convert_layout(p.to(a.dtype), p_layout)
            v_stage = stage
            stage, phase = ring.advance(stage, phase)
            mbarrier.wait(ring.full.index(stage), phase, pred=own_num > 1)
            for i in range(1, own_num):
                start -= BLOCK_N
                at_edge = (start + BLOCK_N - 1 > first_pos) | (start <= gl.maximum(last_pos - band.w_long, -1))
                # P @ V of the tile before runs while the weights of this one are computed.
                s_next = warpgroup_mma(a, ring.k.index(stage).permute((1, 0)), zero_s, use_acc=False, is_async=True)
                acc_next = warpgroup_mma(p, ring.v.index(v_stage), acc, is_async=True)
                s = warpgroup_mma_wait(1, deps=(s_next,))
                n = _columns(start, s)
                p_next, ref, row_sum, alpha = _weights(
                    s, ref, row_sum, to_exponent, n, pos, since, at_edge, seen, seen, EXACT, EXACT)  # fmt: skip
                done_stage = v_stage
                v_stage = stage
                stage, phase = ring.advance(stage, phase)
                # Waited for here and not at the top: see two_simplicial_scaled.py.
                mbarrier.wait(ring.full.index(stage), phase, pred=i + 1 < own_num)
                acc = warpgroup_mma_wait(0, deps=(acc_next,))
                mbarrier.arrive(ring.empty.index(done_stage))
                if EXACT:
                    rescale *= alpha
                    acc = acc * _over_columns(alpha, acc)
                p = gl.convert_layout(p_next.to(a.dtype), p_layout)
            acc_next = warpgroup_mma(p, ring.v.index(v_stage), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc_next,))
            mbarrier.arrive(ring.empty.index(v_stage))
        stage, phase = ring.skip(band.num_tiles - before - own_num, stage, phase)
        mbarrier.wait(short.v_full, short_phase)
        v_short = short.v.index(warpgroup).load(o_mma).to(gl.float32)
        out = gl.fma(v_short, acc, out * _over_columns(rescale, out))
        mbarrier.arrive(short.v_empty)
        short_phase ^= 1
    return out, gl.convert_layout(gl.sum(row_sum, 1), gl.SliceLayout(1, s_mma)), ref, stage, phase, short_phase


@gluon.jit
def _attend(ring, short, band, q_smem, warpgroup, q_ptr, out_ptr, lse_ptr, stride_qn, stride_qh, out_stride, num_queries, num_rows,
            group, past, first_row, head_dim, scale, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr):  # fmt: skip
    """One of the two warpgroups that multiply: 64 rows from q to out and lse."""
    s_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    rows: gl.constexpr = gl.SliceLayout(1, s_mma)
    dtype: gl.constexpr = q_ptr.dtype.element_ty

    first_row += warpgroup * ROWS
    to_exponent = _load_queries(q_smem, warpgroup, q_ptr, stride_qn, stride_qh, first_row, num_rows, group, head_dim, scale)
    row = first_row + gl.arange(0, ROWS, rows)
    pos = row // group + past
    first_pos = first_row // group + past
    last_pos = (gl.minimum(first_row + ROWS, num_rows) - 1) // group + past  # before first_pos where there are no rows
    begin = gl.to_tensor(0)
    out, row_sum, ref, stage, phase, short_phase = _sums(
        ring, short, band, begin, begin, begin, q_smem, warpgroup, pos, first_pos, last_pos, to_exponent, HEAD_DIM, BLOCK_N,
        False)  # fmt: skip
    in_range = _in_range(ring, warpgroup, out, row_sum, pos, row < num_rows, band.w_long, band.w_short, dtype)
    # Only bad rows take what the second try says: bits of the others must not depend on their neighbours.
    _store(out, row_sum, ref, out_ptr, lse_ptr, row, (row < num_rows) & in_range, group, num_queries, out_stride, head_dim, dtype)
    if ring.is_out_of_range():
        out, row_sum, ref, stage, phase, short_phase = _sums(
            ring, short, band, stage, phase, short_phase, q_smem, warpgroup, pos, first_pos, last_pos, to_exponent, HEAD_DIM, BLOCK_N,
            True)  # fmt: skip
        mask = (row < num_rows) & (in_range == 0)
        _store(out, row_sum, ref, out_ptr, lse_ptr, row, mask, group, num_queries, out_stride, head_dim, dtype)


@gluon.jit
def two_simplicial_fwd_skewed(
    q_ptr: "*dtype:16", k_long: "tensordesc<dtype[1,BLOCK_N,1,HEAD_DIM]>",
    v_long: "tensordesc<dtype[1,BLOCK_N,1,HEAD_DIM]>", k_short_ptr: "*dtype:16",
    v_short_ptr: "*dtype:16",
    out_ptr: "*dtype:16", lse_ptr: "*fp32:16",
    stride_qb: "i64:8", stride_qn: "i64:8", stride_qh: "i64:8",
    stride_ksb: "i64:8", stride_ksn: "i64:8", stride_ksh: "i64:8",
    stride_vsb: "i64:8", stride_vsn: "i64:8", stride_vsh: "i64:8",
    num_queries: "i32", num_keys: "i32", kv_heads: "i32", group: "i32", head_dim: "i32:8",
    w_long: "i32", w_short: "i32", scale: "fp32",
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    num_rows = num_queries * group
    num_blocks = gl.cdiv(num_rows, BLOCK_M)
    num_heads = gl.num_programs(0) // num_blocks
    block, batch_head = _block_of(gl.program_id(0), num_blocks, num_heads)
    first_row = block * BLOCK_M
    batch = batch_head // kv_heads
    kv_head = batch_head % kv_heads
    k_short_ptr += batch.to(gl.int64) * stride_ksb + kv_head.to(gl.int64) * stride_ksh
    v_short_ptr += batch.to(gl.int64) * stride_vsb + kv_head.to(gl.int64) * stride_vsh
    q_heads = kv_heads * group
    q_ptr += batch.to(gl.int64) * stride_qb + kv_head.to(gl.int64) * group * stride_qh
    out_ptr += (batch.to(gl.int64) * num_queries * q_heads + kv_head * group) * head_dim
    lse_ptr += (batch.to(gl.int64) * q_heads + kv_head * group) * num_queries
    past = num_keys - num_queries
    band = _band_of(first_row, num_rows, group, past, w_long, w_short, BLOCK_M, BLOCK_N)

    ring = _new_ring(dtype, STAGES, BLOCK_N, HEAD_DIM)
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, HEAD_DIM], dtype)
    q_smem = gl.allocate_shared_memory(dtype, [2, ROWS, HEAD_DIM], tile)
    short = Short(
        gl.allocate_shared_memory(dtype, [2, ROWS, HEAD_DIM], tile),
        gl.allocate_shared_memory(dtype, [2, ROWS, HEAD_DIM], tile),
        mbarrier.allocate_mbarrier(),
        mbarrier.allocate_mbarrier(),
        mbarrier.allocate_mbarrier(),
        mbarrier.allocate_mbarrier(),
    )
    for i in gl.static_range(STAGES):
        mbarrier.init(ring.full.index(i), count=1)
        mbarrier.init(ring.empty.index(i), count=2)
    mbarrier.init(ring.verdict, count=2)
    mbarrier.init(short.k_full, count=128)  # each of the helper's threads, when its copies are done
    mbarrier.init(short.v_full, count=128)
    mbarrier.init(short.k_empty, count=2)
    mbarrier.init(short.v_empty, count=2)
    fence_async_shared()

    gl.warp_specialize(
        [
            (_attend, (ring, short, band, q_smem, 0, q_ptr, out_ptr, lse_ptr, stride_qn, stride_qh, q_heads, num_queries, num_rows,
                       group, past, first_row, head_dim, scale, HEAD_DIM, BLOCK_N)),
            (_attend, (ring, short, band, q_smem, 1, q_ptr, out_ptr, lse_ptr, stride_qn, stride_qh, q_heads, num_queries, num_rows,
                       group, past, first_row, head_dim, scale, HEAD_DIM, BLOCK_N)),
            (_fetch, (ring, short, band, k_long, v_long, k_short_ptr, v_short_ptr, stride_ksn, stride_vsn, batch, kv_head, first_row,
                      group, past, num_keys, head_dim, HEAD_DIM, BLOCK_N, True)),
        ],
        [4, 4],
        [232, 40],
    )  # fmt: skip


# Measured on an H100: docs/kernels.md.
VARIANTS = [
    Variant(
        two_simplicial_fwd_skewed,
        "sm90a",
        {"dtype": dtype, "HEAD_DIM": head_dim},
        {"BLOCK_M": 128, "BLOCK_N": 64, "STAGES": 3 if head_dim == 128 else 6, "num_warps": 4},
    )
    for dtype, head_dim in itertools.product(("bf16", "fp16"), (64, 128))
]
