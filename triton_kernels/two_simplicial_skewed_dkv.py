"""dk_long and dv_long on Hopper, for few heads per kv head: the scaled rows of two_simplicial_skewed.py, keys on the left.

A block owns 128 long keys. Every row that sees one of them, (t, head), comes once per offset o, as

    A = q * k_short[t - o]    B = dO * v_short[t - o]

which are right operands of two products each:

    S^T = k_long @ A^T    dP^T = v_long @ B^T    dS^T = P^T * (dP^T - delta)    dv_long += P^T @ B    dk_long += dS^T @ A

A helper warpgroup writes A and B into a ring in shared memory, 64 columns of S^T at a time: BLOCK_M rows at 64 / BLOCK_M
offsets. Few rows take few of its registers, and the short rows of their tokens are in L1 when the next offsets come. Two
warpgroups of 64 keys each multiply.
"""

import itertools

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate

from triton_kernels.scaled_tiles import (
    LOG2E,
    ROWS,
    _advance,
    _as_pairs,
    _end_of,
    _multiply_pairs,
    _pairs,
    _row_ptrs,
    _skip,
    _start_of,
)
from triton_kernels.variant import Variant


@aggregate
class Ring:
    """Scaled rows on their way to the warpgroups, and what belongs to them."""

    a: gl.shared_memory_descriptor  # [stages, 64, HEAD_DIM]
    b: gl.shared_memory_descriptor
    statistics: gl.shared_memory_descriptor  # [2 * stages, 64]: -lse as an exponent of 2 and -delta
    pos: gl.shared_memory_descriptor  # [stages, 64], doubled, + 1 where a row sees one pair; -2: no row, or no short key
    full: gl.shared_memory_descriptor  # [stages] barriers
    empty: gl.shared_memory_descriptor

    advance = _advance
    skip = _skip


@gluon.jit
def _rows_of(first_n, num_n, num_keys, past, group, w_long, bounds_ptr, num_bounds):
    """First and end row of those that see some of the keys."""
    last_n = gl.minimum(first_n + num_n, num_keys) - 1
    end_n = _end_of(last_n, bounds_ptr, num_bounds, num_keys)
    begin = gl.maximum(first_n - past, 0) * group
    # min before the sum: last_n + w_long may pass 2^31
    end = (last_n - past + 1 + gl.minimum(w_long - 1, end_n - 1 - last_n)) * group
    return begin, gl.maximum(begin, end)


@gluon.jit
def _num_offsets(first_row, end, group, past, w_short, bounds_ptr, num_bounds, BLOCK_M: gl.constexpr):
    """Offsets at which rows from first_row on may have a short key, and those at which all do if they are of one sequence."""
    first_pos = first_row // group + past
    last_pos = (gl.minimum(first_row + BLOCK_M, end) - 1) // group + past
    start = _start_of(first_pos, bounds_ptr, num_bounds)
    return gl.minimum(w_short, last_pos - start + 1), gl.minimum(w_short, first_pos - start + 1)


@gluon.jit
def _scale(smem, rows, ptr, stride, key, pair, mask, dtype: gl.constexpr):
    short = gl.load(_row_ptrs(_pairs(ptr), key, stride // 2, pair), mask=mask, other=0)
    smem.store(_multiply_pairs(rows, short, dtype))


@gluon.jit
def _scale_rows(ring, q_ptr, k_short_ptr, v_short_ptr, lse_ptr, grad_out_ptr, delta_ptr, stride_qn, stride_qh, stride_ksn, stride_vsn,
                stride_gn, stride_gh, begin, end, num_queries, group, past, head_dim, w_short,
                bounds_ptr, num_bounds, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr):  # fmt: skip
    """The helper."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    PAIRS: gl.constexpr = HEAD_DIM // 2
    OFFSETS: gl.constexpr = ROWS // BLOCK_M
    pairs: gl.constexpr = gl.BlockedLayout([1, 4], [128 // PAIRS, PAIRS // 4], [4, 1], [1, 0])
    columns: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    a_smem = _as_pairs(ring.a)
    b_smem = _as_pairs(ring.b)
    pair = gl.arange(0, PAIRS, gl.SliceLayout(0, pairs))
    pair_ok = pair < head_dim // 2
    column = gl.arange(0, ROWS, columns)
    stage = 0
    phase = 1
    for first_row in range(begin, end, BLOCK_M):
        row = first_row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, pairs))
        token = row // group
        head = row - token * group
        mask = (row < end)[:, None] & pair_ok[None, :]
        q_ptrs = _row_ptrs(_pairs(q_ptr), token, stride_qn // 2, pair) + (head.to(gl.int64) * (stride_qh // 2))[:, None]
        g_ptrs = _row_ptrs(_pairs(grad_out_ptr), token, stride_gn // 2, pair) + (head.to(gl.int64) * (stride_gh // 2))[:, None]
        q = gl.load(q_ptrs, mask=mask, other=0)
        grad_out = gl.load(g_ptrs, mask=mask, other=0)

        c_row = first_row + column % BLOCK_M
        c_token = c_row // group
        c_ok = c_row < end
        lse_row = (c_row - c_token * group).to(gl.int64) * num_queries + c_token
        minus_lse = gl.load(lse_ptr + lse_row, mask=c_ok, other=0.0) * -LOG2E
        minus_delta = -gl.load(delta_ptr + lse_row, mask=c_ok, other=0.0)
        c_pos = c_token + past
        c_age = c_pos - _start_of(c_pos, bounds_ptr, num_bounds)
        c_code = 2 * c_pos + (c_age == 0)
        c_left = gl.where(c_ok, gl.minimum(c_age + 1, w_short), 0) - column // BLOCK_M
        key = token + past
        left = gl.where(row < end, gl.minimum(key - _start_of(key, bounds_ptr, num_bounds) + 1, w_short), 0)
        for _ in range(0, _num_offsets(first_row, end, group, past, w_short, bounds_ptr, num_bounds, BLOCK_M)[0], OFFSETS):
            mbarrier.wait(ring.empty.index(stage), phase)
            for i in gl.static_range(OFFSETS):
                mask = (left > i)[:, None] & pair_ok[None, :]
                _scale(a_smem.index(stage).slice(i * BLOCK_M, BLOCK_M), q, k_short_ptr, stride_ksn, key - i, pair, mask, dtype)
                _scale(b_smem.index(stage).slice(i * BLOCK_M, BLOCK_M), grad_out, v_short_ptr, stride_vsn, key - i, pair, mask, dtype)
            ring.statistics.index(2 * stage).store(gl.where(c_left > 0, minus_lse, float("-inf")))
            ring.statistics.index(2 * stage + 1).store(minus_delta)
            ring.pos.index(stage).store(gl.where(c_left > 0, c_code, -2))
            fence_async_shared()
            mbarrier.arrive(ring.full.index(stage))
            key -= OFFSETS
            left -= OFFSETS
            c_left -= OFFSETS
            stage, phase = ring.advance(stage, phase)


@gluon.jit
def _store_keys(part_ptr, grad_ptr, x, part_row, row, mask, head_dim, num_splits, factor):
    """A warpgroup's rows of a gradient, or of a partial sum of it."""
    d = gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))
    mask = mask[:, None] & (d < head_dim)[None, :]
    if num_splits > 1:
        gl.store(_row_ptrs(part_ptr, part_row, head_dim, d), x, mask=mask)
    else:
        gl.store(_row_ptrs(grad_ptr, row, head_dim, d), (x * factor).to(grad_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def _key_gradients(ring, keys, warpgroup, grad_k_ptr, grad_v_ptr, part_k_ptr, part_v_ptr, first_n, first_part, first_out, kv_heads,
                   num_splits, begin, end, num_keys, group, past, head_dim, w_long, w_short, scale,
                   bounds_ptr, num_bounds, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr):  # fmt: skip
    """One of the two warpgroups that multiply: 64 keys."""
    s_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    o_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_mma, 2)
    columns: gl.constexpr = gl.SliceLayout(0, s_mma)
    OFFSETS: gl.constexpr = ROWS // BLOCK_M
    dtype: gl.constexpr = grad_k_ptr.dtype.element_ty
    k_long = keys.index(warpgroup)
    v_long = keys.index(2 + warpgroup)
    first_n += warpgroup * ROWS
    first_part += warpgroup * ROWS
    n = first_n + gl.arange(0, ROWS, gl.SliceLayout(1, s_mma))
    own_begin, own_end = _rows_of(first_n, ROWS, num_keys, past, group, w_long, bounds_ptr, num_bounds)
    first_key = gl.minimum(first_n, num_keys - 1)
    first_end = _end_of(first_key, bounds_ptr, num_bounds, num_keys)
    count = gl.minimum(_end_of(n, bounds_ptr, num_bounds, num_keys) - n, w_long)  # positions that see a key, from its own on
    to_exponent = scale * LOG2E
    zero_s = gl.full([ROWS, ROWS], 0.0, gl.float32, s_mma)
    grad_k = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, o_mma)
    grad_v = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, o_mma)
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for first_row in range(begin, end, BLOCK_M):
        num_offsets, common_offsets = _num_offsets(first_row, end, group, past, w_short, bounds_ptr, num_bounds, BLOCK_M)
        own = (first_row + BLOCK_M > own_begin) & (first_row < own_end)
        stage, phase = ring.skip(gl.where(own, 0, gl.cdiv(num_offsets, OFFSETS)), stage, phase)
        first_pos = first_row // group + past
        last_pos = (first_row + BLOCK_M - 1) // group + past
        at_edge = (first_n + ROWS - 1 > first_pos) | (first_n <= last_pos - w_long) | (first_row + BLOCK_M > end)
        at_edge |= last_pos >= first_end
        for offset in range(0, gl.where(own, num_offsets, 0), OFFSETS):
            mbarrier.wait(ring.full.index(stage), phase)
            a = ring.a.index(stage)
            b = ring.b.index(stage)
            s_next = warpgroup_mma(k_long, a.permute((1, 0)), zero_s, use_acc=False, is_async=True)
            dp_next = warpgroup_mma(v_long, b.permute((1, 0)), zero_s, use_acc=False, is_async=True)
            s, dp = warpgroup_mma_wait(0, deps=(s_next, dp_next))
            minus_lse = gl.broadcast(ring.statistics.index(2 * stage).load(columns)[None, :], s)[0]
            exponent = gl.fma(s, gl.full_like(s, to_exponent), minus_lse)
            if at_edge | (offset + OFFSETS > common_offsets):
                pos = ring.pos.index(stage).load(columns)
                single = ((pos & 1) != 0)[None, :]  # P is 1 whatever the logit, and dS exactly dlse
                exponent = gl.where(single, 0.0, exponent)
                dp = gl.where(single, 0.0, dp)
                twice_age = (pos[None, :] - 2 * n[:, None]).to(gl.uint32, bitcast=True)
                valid = twice_age < (2 * count).to(gl.uint32, bitcast=True)[:, None]
                exponent = gl.where(valid, exponent, float("-inf"))
            p = gl.exp2(exponent)
            minus_delta = gl.broadcast(ring.statistics.index(2 * stage + 1).load(columns)[None, :], s)[0]
            ds = p * (dp + minus_delta)
            p = gl.convert_layout(p.to(dtype), p_layout)
            ds = gl.convert_layout(ds.to(dtype), p_layout)
            grad_v_next = warpgroup_mma(p, b, grad_v, is_async=True)
            grad_k_next = warpgroup_mma(ds, a, grad_k, is_async=True)
            grad_v, grad_k = warpgroup_mma_wait(0, deps=(grad_v_next, grad_k_next))
            mbarrier.arrive(ring.empty.index(stage))
            stage, phase = ring.advance(stage, phase)
    i = gl.arange(0, ROWS, gl.SliceLayout(1, o_mma))
    row = first_out + (first_n + i).to(gl.int64) * kv_heads
    mask = first_n + i < num_keys
    _store_keys(part_k_ptr, grad_k_ptr, grad_k, first_part + i, row, mask, head_dim, num_splits, scale)
    _store_keys(part_v_ptr, grad_v_ptr, grad_v, first_part + i, row, mask, head_dim, num_splits, 1.0)


@gluon.jit
def two_simplicial_bwd_dkv_skewed(
    q_ptr: "*dtype:16", k_long_ptr: "*dtype:16", v_long_ptr: "*dtype:16", k_short_ptr: "*dtype:16",
    v_short_ptr: "*dtype:16",
    lse_ptr: "*fp32:16", grad_out_ptr: "*dtype:16", delta_ptr: "*fp32:16", grad_k_ptr: "*dtype:16",
    grad_v_ptr: "*dtype:16",
    part_k_ptr: "*fp32:16", part_v_ptr: "*fp32:16",
    stride_qb: "i64:8", stride_qn: "i64:8", stride_qh: "i64:8",
    stride_klb: "i64:8", stride_kln: "i64:8", stride_klh: "i64:8",
    stride_vlb: "i64:8", stride_vln: "i64:8", stride_vlh: "i64:8",
    stride_ksb: "i64:8", stride_ksn: "i64:8", stride_ksh: "i64:8",
    stride_vsb: "i64:8", stride_vsn: "i64:8", stride_vsh: "i64:8",
    stride_gb: "i64:8", stride_gn: "i64:8", stride_gh: "i64:8",
    num_queries: "i32", num_keys: "i32", kv_heads: "i32", group: "i32", head_dim: "i32:8",
    w_long: "i32", w_short: "i32", scale: "fp32", bounds_ptr: "*i32:16", packed: "i32", num_splits: "i32",
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """num_splits programs share the rows of a block, BLOCK_M by BLOCK_M; if more than one, they leave partial sums. w_short: not
    1, where every row of windows 1 x 1 sees one pair only (the host keeps windows out that 64 / BLOCK_M offsets fit badly)."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    past = num_keys - num_queries
    num_blocks = gl.cdiv(num_keys, BLOCK_N)
    # The last keys have the fewest rows: they come last.
    heads = gl.num_programs(0) // num_splits // num_blocks
    split = gl.program_id(0) % num_splits
    batch_head = gl.program_id(0) // num_splits % heads
    block = gl.program_id(0) // num_splits // heads
    batch = (batch_head // kv_heads).to(gl.int64)
    kv_head = (batch_head % kv_heads).to(gl.int64)
    k_long_ptr += batch * stride_klb + kv_head * stride_klh
    v_long_ptr += batch * stride_vlb + kv_head * stride_vlh
    k_short_ptr += batch * stride_ksb + kv_head * stride_ksh
    v_short_ptr += batch * stride_vsb + kv_head * stride_vsh
    q_ptr += batch * stride_qb + kv_head * group * stride_qh
    grad_out_ptr += batch * stride_gb + kv_head * group * stride_gh
    first_lse = (batch * kv_heads * group + kv_head * group) * num_queries
    first_out = batch * num_keys * kv_heads + kv_head
    first_part = ((batch_head * num_blocks + block) * num_splits + split).to(gl.int64) * BLOCK_N

    first_n = block * BLOCK_N
    num_bounds = gl.where(packed != 0, num_keys, 0)
    begin, end = _rows_of(first_n, BLOCK_N, num_keys, past, group, w_long, bounds_ptr, num_bounds)
    share = gl.cdiv(gl.cdiv(end - begin, BLOCK_M), num_splits) * BLOCK_M
    begin += split * share
    end = gl.minimum(end, begin + share)

    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, HEAD_DIM], dtype)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ring = Ring(
        gl.allocate_shared_memory(dtype, [STAGES, ROWS, HEAD_DIM], tile),
        gl.allocate_shared_memory(dtype, [STAGES, ROWS, HEAD_DIM], tile),
        gl.allocate_shared_memory(gl.float32, [2 * STAGES, ROWS], flat),
        gl.allocate_shared_memory(gl.int32, [STAGES, ROWS], flat),
        mbarrier.allocate_mbarrier(batch=STAGES),
        mbarrier.allocate_mbarrier(batch=STAGES),
    )
    keys = gl.allocate_shared_memory(dtype, [4, ROWS, HEAD_DIM], tile)
    for i in gl.static_range(STAGES):
        mbarrier.init(ring.full.index(i), count=1)
        mbarrier.init(ring.empty.index(i), count=2)
    PAIRS: gl.constexpr = HEAD_DIM // 2
    pairs: gl.constexpr = gl.BlockedLayout([1, 4], [128 // PAIRS, PAIRS // 4], [4, 1], [1, 0])
    pair = gl.arange(0, PAIRS, gl.SliceLayout(0, pairs))
    for half in gl.static_range(2):
        n = first_n + half * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, pairs))
        mask = (n < num_keys)[:, None] & (pair < head_dim // 2)[None, :]
        k = gl.load(_row_ptrs(_pairs(k_long_ptr), n, stride_kln // 2, pair), mask=mask, other=0)
        v = gl.load(_row_ptrs(_pairs(v_long_ptr), n, stride_vln // 2, pair), mask=mask, other=0)
        _as_pairs(keys).index(half).store(k)
        _as_pairs(keys).index(2 + half).store(v)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_key_gradients, (ring, keys, 0, grad_k_ptr, grad_v_ptr, part_k_ptr, part_v_ptr, first_n, first_part, first_out, kv_heads,
                              num_splits, begin, end, num_keys, group, past, head_dim, w_long, w_short, scale, bounds_ptr,
                              num_bounds, HEAD_DIM, BLOCK_M)),
            (_key_gradients, (ring, keys, 1, grad_k_ptr, grad_v_ptr, part_k_ptr, part_v_ptr, first_n, first_part, first_out, kv_heads,
                              num_splits, begin, end, num_keys, group, past, head_dim, w_long, w_short, scale, bounds_ptr,
                              num_bounds, HEAD_DIM, BLOCK_M)),
            (_scale_rows, (ring, q_ptr, k_short_ptr, v_short_ptr, lse_ptr + first_lse, grad_out_ptr, delta_ptr + first_lse, stride_qn,
                           stride_qh, stride_ksn, stride_vsn, stride_gn, stride_gh, begin, end, num_queries, group, past, head_dim,
                           w_short, bounds_ptr, num_bounds, HEAD_DIM, BLOCK_M)),
        ],
        [4, 4],
        [224, 56],
    )  # fmt: skip


# Measured on an H100: docs/kernel_trials.md. BLOCK_M: as many rows as the helper loads at once, 16 bytes a thread.
VARIANTS = [
    Variant(
        two_simplicial_bwd_dkv_skewed,
        "sm90a",
        {"dtype": dtype, "HEAD_DIM": head_dim},
        {"BLOCK_M": 1024 // head_dim, "BLOCK_N": 128, "STAGES": 384 // head_dim, "num_warps": 4},
    )
    for dtype, head_dim in itertools.product(("bf16", "fp16"), (64, 128))
]
