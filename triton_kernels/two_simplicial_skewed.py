"""2-simplicial attention on Hopper for few heads per kv head, down to one: a FlashAttention loop for each short offset.

As in two_simplicial_attention.py a row (t, head) multiplies by its OWN short key t - o at offset o, so the short axis wastes
nothing at any ratio of heads:

    A = q * k_short[t - o]        S = A @ k_long^T        acc = P @ v_long        out += v_short[t - o] * acc

Offsets are outside and the long window inside, so what belongs to an offset, A and acc, stays in registers through the whole
window. A helper warp fetches, by TMA, tiles of K and V and the short keys and values of the rows' tokens; two warpgroups of 64
rows each multiply. The tiles are walked from the newest to the oldest: the first one holds every row's own key, whose logit is
where a row's reference comes from. References and the second try: two_simplicial_scaled.py.
"""

import itertools

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
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
    _as_pairs,
    _columns,
    _in_range,
    _lane_sums,
    _load_queries,
    _multiply_pairs,
    _new_ring,
    _opaque,
    _over_columns,
    _start_of,
    _store,
    _weights,
)
from triton_kernels.variant import Variant


@aggregate
class Short:
    """The short keys and values of each warpgroup's tokens at one offset."""

    k: gl.shared_memory_descriptor  # [2, 64, HEAD_DIM]: 64 rows are of 64 tokens at most
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
    bounds_ptr: gl.tensor
    num_bounds: gl.tensor

    @gluon.jit
    def start_of(self, pos):
        """The first position of pos' sequence; past the last position, of that one's."""
        return _start_of(gl.minimum(pos, gl.maximum(self.num_bounds - 1, 0)), self.bounds_ptr, self.num_bounds)

    @gluon.jit
    def since(self, pos):
        """The last key before those that pos sees."""
        return gl.maximum(pos - self.w_long, self.start_of(pos) - 1)

    @gluon.jit
    def own_tiles(self, first_pos, last_pos, BLOCK_N: gl.constexpr):
        """Of the tiles, those that positions first_pos to last_pos see: how many come before, and how many they are."""
        newest = (self.end_n - 1 - last_pos) // BLOCK_N
        # At most the last: wrong cu_seqlens, whose starts may descend, must not make it wait for a tile that nobody fetches.
        oldest = gl.minimum((self.end_n - 2 - self.since(first_pos)) // BLOCK_N, self.num_tiles - 1)
        return newest, oldest - newest + 1


@gluon.jit
def _band_of(first_row, num_rows, num_keys, group, past, w_long, w_short, bounds_ptr, packed,
             BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):  # fmt: skip
    end_n = (first_row + BLOCK_M - 1) // group + past + 1  # of a full block, so that a tile holds the own keys of 64 rows
    num_bounds = gl.where(packed != 0, num_keys, 0)
    first_pos = first_row // group + past
    begin_n = gl.maximum(first_pos - w_long + 1, _start_of(first_pos, bounds_ptr, num_bounds))
    last_pos = (gl.minimum(first_row + BLOCK_M, num_rows) - 1) // group + past
    warp: gl.constexpr = gl.BlockedLayout([BLOCK_M // 32], [32], [gl.num_warps()], [0])
    pos = gl.minimum(first_pos + gl.arange(0, BLOCK_M, warp), last_pos)  # as many tokens as rows, at most
    oldest = gl.max(pos - _start_of(pos, bounds_ptr, num_bounds), 0)
    num_offsets = gl.minimum(w_short, oldest + 1)
    return Band(end_n, gl.cdiv(end_n - begin_n, BLOCK_N), num_offsets, w_long, w_short, bounds_ptr, num_bounds)


@gluon.jit
def _block_of(program, num_blocks, num_heads):
    """The block and head of a program. Blocks of 8 heads at a time: 132 windows of as many heads would not fit the L2 cache."""
    first_head = program // (8 * num_blocks) * 8
    heads = gl.minimum(num_heads - first_head, 8)
    local = program % (8 * num_blocks)
    return num_blocks - 1 - local // heads, first_head + local % heads  # the most work first


@gluon.jit
def _load_short(smem, full, desc, batch, kv_head, first_row, group, shift):
    """For each warpgroup, the rows of desc at its tokens + shift; zeros where there is none."""
    box: gl.constexpr = desc.block_shape
    mbarrier.expect(full, 2 * desc.nbytes_per_cta)
    for half in gl.static_range(2):
        at = [batch, (first_row + half * ROWS) // group + shift, kv_head, 0]
        tma.async_load(desc, at, full, smem.index(half).reshape(box))


@gluon.jit
def _of_tokens(tokens, token, layout: gl.constexpr):
    """Each row's row of `tokens`. All in pairs of elements."""
    # Opaque: addresses made before the loop would not find room in the registers.
    index = gl.broadcast(_opaque(token)[:, None], gl.full([ROWS, tokens.shape[1]], 0, gl.int32, layout))[0]
    return tokens.gather(index, 0)


@gluon.jit
def _unpair(x, dtype: gl.constexpr, layout: gl.constexpr):
    """The elements of pairs. Each stays in its register."""
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [x], dtype=(gl.int16, gl.int16), is_pure=True, pack=1)  # fmt: skip
    x = gl.join(low, high).reshape([x.shape[0], 2 * x.shape[1]]).to(dtype, bitcast=True)
    return gl.convert_layout(x, layout, assert_trivial=True)


@gluon.jit
def _operand(q_smem, short, warpgroup, token, phase, pred, layout: gl.constexpr):
    """A of an offset."""
    pairs: gl.constexpr = gl.DotOperandLayout(0, layout.parent, 1)
    mbarrier.wait(short.k_full, phase, pred=pred)
    k_short = _of_tokens(_as_pairs(short.k).index(warpgroup), token, pairs)
    a = _multiply_pairs(_as_pairs(q_smem).index(warpgroup).load(pairs), k_short, q_smem.dtype)
    mbarrier.arrive(short.k_empty, pred=pred)
    return _unpair(a, q_smem.dtype, layout)


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
def _fetch(ring, short, band, k_desc, v_desc, k_short, v_short, batch, kv_head, first_row, group, past):
    """The helper: tiles and short rows, in the order in which the warpgroups take them."""
    stage = 0
    phase = 1
    short_phase = 1
    attempts = 1
    attempt = 0
    while attempt < attempts:
        for offset in range(band.num_offsets):
            mbarrier.wait(short.k_empty, short_phase)
            _load_short(short.k, short.k_full, k_short, batch, kv_head, first_row, group, past - offset)
            stage, phase = _load_tiles(ring, band, stage, phase, k_desc, v_desc, batch, kv_head)
            # These the warpgroups give back at the end of an offset only: asked for earlier, they would hold up the tiles.
            mbarrier.wait(short.v_empty, short_phase)
            _load_short(short.v, short.v_full, v_short, batch, kv_head, first_row, group, past - offset)
            short_phase ^= 1
        attempt += 1
        if attempt == 1:
            attempts += ring.is_out_of_range()


@gluon.jit
def _sums(ring, short, band, stage, phase, short_phase, q_smem, warpgroup, pos, age, first_pos, last_pos, to_exponent,
          HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, EXACT: gl.constexpr):  # fmt: skip
    """A warpgroup's sums of P @ V and P over all pairs, relative to a reference of each row. EXACT: its running maximum."""
    s_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, s_mma, 2)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_mma, 2)
    pairs: gl.constexpr = gl.DotOperandLayout(0, s_mma, 1)
    dtype: gl.constexpr = q_smem.dtype
    token = gl.convert_layout(pos - first_pos, gl.SliceLayout(1, pairs), assert_trivial=True)
    ref = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_mma))
    zero_s = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, s_mma)
    row_sum = _lane_sums(zero_s)
    out = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, o_mma)
    before, own_num = band.own_tiles(first_pos, last_pos, BLOCK_N)
    # It skips the others' tiles while it holds one and waits for one: where sequences begin, more than the ring has may be left.
    own_num = gl.maximum(own_num, band.num_tiles - (ring.full.shape[0] - 2))
    last_since = band.since(last_pos)
    a = _operand(q_smem, short, warpgroup, token, short_phase, True, a_layout)
    stage, phase = ring.skip(before, stage, phase)
    mbarrier.wait(ring.full.index(stage), phase)
    s = warpgroup_mma(a, ring.k.index(stage).permute((1, 0)), zero_s, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    for offset in range(band.num_offsets):
        seen = age >= offset
        since = pos - gl.minimum(band.w_long, _opaque(age) + 1)
        start = band.end_n - (before + 1) * BLOCK_N
        at_edge = (start + BLOCK_N - 1 > first_pos) | (start <= last_since)
        n = _columns(start, s)
        p, ref, row_sum, rescale = _weights(
            s, ref, row_sum, to_exponent, n, pos, since, at_edge, seen, seen, True, EXACT)  # fmt: skip
        p = gl.convert_layout(p.to(dtype), p_layout)
        acc = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, o_mma)
        v_stage = stage
        stage, phase = ring.advance(stage, phase)
        mbarrier.wait(ring.full.index(stage), phase, pred=own_num > 1)
        for i in range(1, own_num):
            start -= BLOCK_N
            at_edge = (start + BLOCK_N - 1 > first_pos) | (start <= last_since)
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
            p = gl.convert_layout(p_next.to(dtype), p_layout)
        # A of the next offset is made beside the last P @ V, and its S beside the sum; after the last offset nobody reads them.
        acc_next = warpgroup_mma(p, ring.v.index(v_stage), acc, is_async=True)
        more = offset + 1 < band.num_offsets
        a = _operand(q_smem, short, warpgroup, token, short_phase ^ 1, more, a_layout)
        stage, phase = ring.skip(band.num_tiles - before - own_num + gl.where(more, before, 0), stage, phase)
        mbarrier.wait(ring.full.index(stage), phase, pred=more)
        s_next = warpgroup_mma(a, ring.k.index(stage).permute((1, 0)), zero_s, use_acc=False, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc_next,))
        mbarrier.arrive(ring.empty.index(v_stage))
        mbarrier.wait(short.v_full, short_phase)
        v_short = _unpair(_of_tokens(_as_pairs(short.v).index(warpgroup), token, pairs), dtype, o_mma).to(gl.float32)
        out = gl.fma(v_short, acc, out * _over_columns(rescale, out))
        mbarrier.arrive(short.v_empty)
        s = warpgroup_mma_wait(0, deps=(s_next,))
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
    age = pos - band.start_of(pos)
    first_pos = first_row // group + past
    last_pos = (first_row + ROWS - 1) // group + past
    begin = gl.to_tensor(0)
    out, row_sum, ref, stage, phase, short_phase = _sums(
        ring, short, band, begin, begin, begin, q_smem, warpgroup, pos, age, first_pos, last_pos, to_exponent, HEAD_DIM, BLOCK_N,
        False)  # fmt: skip
    in_range = _in_range(ring, warpgroup, out, row_sum, age, row < num_rows, band.w_long, band.w_short, dtype)
    # Only bad rows take what the second try says: bits of the others must not depend on their neighbours.
    _store(out, row_sum, ref, out_ptr, lse_ptr, row, (row < num_rows) & in_range, group, num_queries, out_stride, head_dim, dtype)
    if ring.is_out_of_range():
        out, row_sum, ref, stage, phase, short_phase = _sums(
            ring, short, band, stage, phase, short_phase, q_smem, warpgroup, pos, age, first_pos, last_pos, to_exponent, HEAD_DIM, BLOCK_N,
            True)  # fmt: skip
        mask = (row < num_rows) & (in_range == 0)
        _store(out, row_sum, ref, out_ptr, lse_ptr, row, mask, group, num_queries, out_stride, head_dim, dtype)


@gluon.jit
def two_simplicial_fwd_skewed(
    q_ptr: "*dtype:16", k_long: "tensordesc<dtype[1,BLOCK_N,1,HEAD_DIM]>",
    v_long: "tensordesc<dtype[1,BLOCK_N,1,HEAD_DIM]>", k_short: "tensordesc<dtype[1,64,1,HEAD_DIM]>",
    v_short: "tensordesc<dtype[1,64,1,HEAD_DIM]>",
    out_ptr: "*dtype:16", lse_ptr: "*fp32:16",
    stride_qb: "i64:8", stride_qn: "i64:8", stride_qh: "i64:8",
    num_queries: "i32", num_keys: "i32", kv_heads: "i32", group: "i32", head_dim: "i32:8",
    w_long: "i32", w_short: "i32", scale: "fp32", bounds_ptr: "*i32:16", packed: "i32",
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
    q_heads = kv_heads * group
    q_ptr += batch.to(gl.int64) * stride_qb + kv_head.to(gl.int64) * group * stride_qh
    out_ptr += (batch.to(gl.int64) * num_queries * q_heads + kv_head * group) * head_dim
    lse_ptr += (batch.to(gl.int64) * q_heads + kv_head * group) * num_queries
    past = num_keys - num_queries
    band = _band_of(first_row, num_rows, num_keys, group, past, w_long, w_short, bounds_ptr, packed, BLOCK_M, BLOCK_N)

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
    mbarrier.init(short.k_full, count=1)
    mbarrier.init(short.v_full, count=1)
    mbarrier.init(short.k_empty, count=2)
    mbarrier.init(short.v_empty, count=2)
    fence_async_shared()

    gl.warp_specialize(
        [
            (_attend, (ring, short, band, q_smem, 0, q_ptr, out_ptr, lse_ptr, stride_qn, stride_qh, q_heads, num_queries, num_rows,
                       group, past, first_row, head_dim, scale, HEAD_DIM, BLOCK_N)),
            (_attend, (ring, short, band, q_smem, 1, q_ptr, out_ptr, lse_ptr, stride_qn, stride_qh, q_heads, num_queries, num_rows,
                       group, past, first_row, head_dim, scale, HEAD_DIM, BLOCK_N)),
            (_fetch, (ring, short, band, k_long, v_long, k_short, v_short, batch, kv_head, first_row, group, past)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


# Measured on an H100: docs/kernel_trials.md.
VARIANTS = [
    Variant(
        two_simplicial_fwd_skewed,
        "sm90a",
        {"dtype": dtype, "HEAD_DIM": head_dim},
        {"BLOCK_M": 128, "BLOCK_N": 64, "STAGES": 4 if head_dim == 128 else 6, "num_warps": 4},
    )
    for dtype, head_dim in itertools.product(("bf16", "fp16"), (64, 128))
]
