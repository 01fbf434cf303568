"""The gradients of the keys and values of 2-simplicial attention on Hopper (two_simplicial_scaled_dq.py has that of q).

A block holds a tile of the long axis and takes the short keys two by two, each of its two warpgroups one of them, j, with the
scaled tiles k_j and v_j (where the tile has 32 or 16 keys: two or four of them, one below the other, so that all of the 64 rows
that the tensor cores want are of use). The sums over all rows that see both,

    G = dS^T @ q    H = P^T @ dO

stay in the tensor cores, and give all four gradients once per short key:

    dk_long += k_short[j] * G    dk_short[j] += sum_n k_long[n] * G[n]    (the values alike, with H)

So with dq's three products there are seven in all instead of eight, and the short gradients cost none. Partial sums are added
up in a fixed order by two_simplicial_bwd_sum (long) and two_simplicial_bwd_merge (short): no atomics between threads.
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

from triton_kernels.scaled_rows import Stream, _rows_of, _stream_rows
from triton_kernels.scaled_tiles import (
    LOG2E,
    ROWS,
    _as_pairs,
    _columns,
    _end_of,
    _multiply_pairs,
    _opaque,
    _pairs,
    _row_ptrs,
    _start_of,
)
from triton_kernels.skewed_rows import _clear
from triton_kernels.variant import Variant


@gluon.jit
def _short_rows(like, ptr, j, end_j, stride, row_length, BLOCK_N: gl.constexpr):
    """The short row of each line of a tile: j's, and in tiles of fewer keys than lines those after it, before end_j."""
    parts = like.reshape([ROWS // BLOCK_N, BLOCK_N, like.shape[1]])
    rows: gl.constexpr = gl.SliceLayout(1, parts.type.layout)
    d = gl.arange(0, like.shape[1], gl.SliceLayout(0, rows))
    short = gl.minimum(j + gl.arange(0, ROWS // BLOCK_N, gl.SliceLayout(1, rows)), end_j - 1)
    row = gl.load(_row_ptrs(ptr, short, stride, d), mask=(d < row_length)[None, :], other=0)
    every = gl.zeros_like(parts).to(row.dtype)
    return gl.convert_layout(gl.broadcast(row[:, None, :], every)[0].reshape(like.shape), like.type.layout)


@gluon.jit
def _add_long(desc, staging, gradient, is_first, first_row, BLOCK_N: gl.constexpr):
    """A warpgroup's own fp32 rows += gradient, added up over the tile's short keys, through `staging`, which is in use until the
    next store_wait."""
    HEAD_DIM: gl.constexpr = gradient.shape[1]
    staging.store(gradient)
    if BLOCK_N < ROWS:
        gl.barrier()
        lines = staging.load(gl.BlockedLayout([1, 4], [128 // HEAD_DIM, HEAD_DIM // 4], [4, 1], [1, 0]))
        gradient = gl.sum(lines.reshape([ROWS // BLOCK_N, BLOCK_N, HEAD_DIM]), 0)
        gl.barrier()
        staging = staging.slice(0, BLOCK_N)
        staging.store(gradient)
    fence_async_shared()
    gl.barrier()
    if is_first:
        tma.async_store(desc, [first_row, 0], staging)
    else:
        tma.async_atomic_add(desc, [first_row, 0], staging)


@gluon.jit
def _store_short(ptr, exchange, tile, gradient, j, end_j, head_dim, BLOCK_N: gl.constexpr):
    """dk_short or dv_short of this tile's keys, the row of the first one at ptr. A warp adds up its 16 lines, a thread the warps'
    sums of a column, which meet in `exchange`, the same memory as the staging."""
    HEAD_DIM: gl.constexpr = gradient.shape[1]
    lines = tile.load(gradient.type.layout).to(gl.float32) * gradient
    of_warps = gl.sum(lines.reshape([4, ROWS // 4, HEAD_DIM]), 1)
    tma.store_wait(0)
    gl.barrier()  # all warps are done with what was in staging
    exchange.store(of_warps)
    gl.barrier()
    of_warps = exchange.load(gl.BlockedLayout([4, 1], [1, 32], [1, 4], [1, 0]))
    sums = gl.sum(of_warps.reshape([ROWS // BLOCK_N, BLOCK_N // 16, HEAD_DIM]), 1)
    i = gl.arange(0, ROWS // BLOCK_N, gl.SliceLayout(1, sums.type.layout))
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, sums.type.layout))
    gl.store(_row_ptrs(ptr, i, head_dim, d), sums, mask=(j + i < end_j)[:, None] & (d < head_dim)[None, :])
    gl.barrier()


@gluon.jit
def _hide(p, ds, minus_delta, row, last, count, varied):
    """0 in place of P and dS where the row is none of the `count` up to `last`, and minus_delta in place of dS where it is none of
    the last `varied` of these. See scaled_tiles._hide."""
    row = gl.broadcast(row[None, :], p)[0]
    last = gl.broadcast(last[:, None], p)[0]
    count = gl.broadcast(count[:, None], p)[0]
    varied = gl.broadcast(varied[:, None], p)[0]
    return gl.inline_asm_elementwise(
        "{ .reg .pred p, q; .reg .u32 age; .reg .f32 ds; sub.u32 age, $6, $5; setp.lt.u32 p, age, $7; setp.lt.u32 q, age, $8; "
        "selp.f32 ds, $3, $4, q; selp.f32 $0, $2, 0f00000000, p; selp.f32 $1, ds, 0f00000000, p; }",
        "=f,=f,f,f,f,r,r,r,r", [p, ds, minus_delta, row, last, count, varied], dtype=(gl.float32, gl.float32), is_pure=True,
        pack=1)  # fmt: skip


@gluon.jit
def _clear_short(part_ks_ptr, part_vs_ptr, first_j, end_j, head_dim, HEAD_DIM: gl.constexpr):
    part = first_j.to(gl.int64) * head_dim
    _clear(part_ks_ptr + part, end_j - first_j, head_dim, HEAD_DIM)
    _clear(part_vs_ptr + part, end_j - first_j, head_dim, HEAD_DIM)


@gluon.jit
def _key_gradients(stream, tiles, scaled, warpgroup, k_short_ptr, v_short_ptr, part_k_desc, part_v_desc, first_part, part_ks_ptr,
                   part_vs_ptr, stride_ksn, stride_vsn, first_j, end_j, first_n, first_end, end_pos, past, group, head_dim,
                   w_long, w_short, scale, bounds_ptr, num_bounds, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr):  # fmt: skip
    """One of the two warpgroups that multiply: the long keys' gradients by its short keys of each turn, and those of these."""
    s_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    o_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_mma, 2)
    columns: gl.constexpr = gl.SliceLayout(0, s_mma)
    PAIRS: gl.constexpr = HEAD_DIM // 2
    pairs: gl.constexpr = gl.BlockedLayout([1, 4], [128 // PAIRS, PAIRS // 4], [4, 1], [1, 0])
    dtype: gl.constexpr = k_short_ptr.dtype.element_ty
    SHORT: gl.constexpr = ROWS // BLOCK_N  # short keys at a time: line i of a tile is long key i % BLOCK_N with the (i // BLOCK_N)th
    k_tile = tiles.index(0)
    v_tile = tiles.index(1)
    k_scaled = scaled.index(2 * warpgroup)
    v_scaled = scaled.index(2 * warpgroup + 1)
    staging = scaled.reinterpret(gl.float32, [2, ROWS, HEAD_DIM], gl.NVMMASharedLayout.get_default_for([ROWS, HEAD_DIM], gl.float32))
    staging = staging.index(warpgroup)
    exchange = scaled.reinterpret(gl.float32, [ROWS // 2, 4, HEAD_DIM], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    exchange = exchange.index(warpgroup * (ROWS // 4))

    line = gl.arange(0, ROWS, gl.SliceLayout(1, s_mma))
    n = first_n + line % BLOCK_N
    n_start = _start_of(n, bounds_ptr, num_bounds)
    n_end = _end_of(n, bounds_ptr, num_bounds, end_pos)
    to_exponent = scale * LOG2E
    zero_s = gl.full([ROWS, ROWS], 0.0, gl.float32, s_mma)
    statistics = stream.statistics.reinterpret(gl.float32, [stream.statistics.shape[0], ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    if end_j <= first_j:  # a split without short keys: its sums are 0
        nothing = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, o_mma)
        _add_long(part_k_desc, staging, nothing, True, first_part, BLOCK_N)
        tma.async_store(part_v_desc, [first_part, 0], staging.slice(0, BLOCK_N))
    for turn_j in range(first_j, end_j, 2 * SHORT):
        j = turn_j + warpgroup * SHORT  # WG 1 may have none at the end, and then has no rows either
        k = _as_pairs(tiles).index(0).load(pairs)
        v = _as_pairs(tiles).index(1).load(pairs)
        k_row = _short_rows(k, _pairs(k_short_ptr), j, end_j, stride_ksn // 2, head_dim // 2, BLOCK_N)
        v_row = _short_rows(v, _pairs(v_short_ptr), j, end_j, stride_vsn // 2, head_dim // 2, BLOCK_N)
        tma.store_wait(0, read_only=False)  # what was added is added: the next addition comes second
        gl.barrier()  # all warps are done with the scaled tiles of the short key before, which staged dv_long last
        _as_pairs(scaled).index(2 * warpgroup).store(_multiply_pairs(k, k_row, dtype))
        _as_pairs(scaled).index(2 * warpgroup + 1).store(_multiply_pairs(v, v_row, dtype))
        fence_async_shared()
        gl.barrier()

        grad_k = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, o_mma)
        grad_v = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, o_mma)
        first, end = _rows_of(turn_j, gl.minimum(turn_j + 2 * SHORT, end_j) - 1, first_n, end_pos, past, group, w_short)
        last_j = gl.minimum(j + SHORT, end_j) - 1
        # The rows that see some of its pairs; and all of them (none where the share ends within them).
        own_from = (gl.maximum(first_n, j) - past) * group
        own_until = gl.minimum((last_j + w_short - past) * group, end)
        all_from = (gl.maximum(first_n + BLOCK_N - 1, j + SHORT - 1) - past) * group
        # j is not in a sequence before first_n's.
        all_until = gl.minimum((gl.minimum(gl.minimum(first_n + w_long, j + w_short), first_end) - past) * group, end)
        all_until = gl.where(j + SHORT <= end_j, all_until, 0)
        all_count = gl.maximum(all_until - all_from - ROWS + 1, 0)
        # And of each line: how many, and the last, counted from all_from. As numbers of rows: to divide those by the group
        # instead would take longer than the products.
        short = j + line // BLOCK_N
        sees_from = (gl.maximum(n, short) - past) * group
        sees_until = gl.minimum((gl.minimum(gl.minimum(n + w_long, short + w_short), n_end) - past) * group, end)
        sees_last = sees_until - 1 - all_from
        sees_count = gl.where((short < end_j) & (n_start <= short), gl.maximum(sees_until - sees_from, 0), 0)
        # Marked by the sign: the rows of the first token see one pair only, whose dS is dlse and nothing else. (Opaque, or ptxas
        # finds no uniform registers for what the products of tiles of 16 keys take.)
        single = (n == short) & ((n == n_start) | (w_long + w_short == 2))
        sees_count = _opaque(sees_count) | gl.where(single, -0x80000000, 0)
        own_first = gl.minimum(gl.maximum(own_from - first, 0), end - first) // ROWS
        own_num = gl.where(j < end_j, gl.maximum(gl.cdiv(own_until - first, ROWS) - own_first, 0), 0)
        stage, phase = stream.skip(own_first, stage, phase)
        if own_num > 0:
            mbarrier.wait(stream.full.index(stage), phase)
            s = warpgroup_mma(k_scaled, stream.q.index(stage).permute((1, 0)), zero_s, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=(s,))
            own_from = first + own_first * ROWS - all_from
            own_until = own_from + own_num * ROWS
            for start in range(own_from, own_until, ROWS):
                # S is there already.
                q = stream.q.index(stage)
                grad_out = stream.grad_out.index(stage)
                dp_next = warpgroup_mma(v_scaled, grad_out.permute((1, 0)), zero_s, use_acc=False, is_async=True)
                minus_lse = gl.broadcast(statistics.index(2 * stage).load(columns)[None, :], zero_s)[0]
                p = gl.exp2(gl.fma(s, gl.full_like(s, to_exponent), minus_lse))
                next_stage, next_phase = stream.advance(stage, phase)
                # The next rows are waited for here and not below: without something in between, ptxas moves the end of dP
                # in front of the exponentials. After the last rows S is of whatever is there, and nobody takes it.
                more = start + ROWS < own_until
                mbarrier.wait(stream.full.index(next_stage), next_phase, pred=more)
                dp = warpgroup_mma_wait(0, deps=(dp_next,))
                minus_delta = gl.broadcast(statistics.index(2 * stage + 1).load(columns)[None, :], zero_s)[0]
                ds = p * (dp + minus_delta)
                # Where not all lines see all rows, which is also where a row sees one pair only.
                if start.to(gl.uint32, bitcast=True) >= all_count.to(gl.uint32, bitcast=True):
                    marked = _opaque(sees_count)  # two counts, made before the loop, would find no registers
                    count = marked & 0x7FFFFFFF
                    varied = count - gl.where(marked < 0, group, 0)
                    p, ds = _hide(p, ds, minus_delta, _columns(start, s), sees_last, count, varied)
                p = gl.convert_layout(p.to(dtype), p_layout)
                ds = gl.convert_layout(ds.to(dtype), p_layout)
                grad_v_next = warpgroup_mma(p, grad_out, grad_v, is_async=True)
                grad_k_next = warpgroup_mma(ds, q, grad_k, is_async=True)
                q_next = stream.q.index(next_stage).permute((1, 0))
                s_next = warpgroup_mma(k_scaled, q_next, zero_s, use_acc=False, is_async=True)
                s, grad_k, grad_v = warpgroup_mma_wait(0, deps=(s_next, grad_k_next, grad_v_next))
                mbarrier.arrive(stream.empty.index(stage))
                stage, phase = next_stage, next_phase
        stage, phase = stream.skip(gl.cdiv(end - first, ROWS) - own_first - own_num, stage, phase)

        if (j < end_j) | (turn_j == first_j):
            gl.barrier()  # all warps are done with the scaled tiles
            part = j.to(gl.int64) * head_dim
            _store_short(part_ks_ptr + part, exchange, k_tile, grad_k, j, end_j, head_dim, BLOCK_N)
            row = _short_rows(grad_k, k_short_ptr, j, end_j, stride_ksn, head_dim, BLOCK_N).to(gl.float32)
            _add_long(part_k_desc, staging, grad_k * row, turn_j == first_j, first_part, BLOCK_N)
            _store_short(part_vs_ptr + part, exchange, v_tile, grad_v, j, end_j, head_dim, BLOCK_N)
            row = _short_rows(grad_v, v_short_ptr, j, end_j, stride_vsn, head_dim, BLOCK_N).to(gl.float32)
            _add_long(part_v_desc, staging, grad_v * row, turn_j == first_j, first_part, BLOCK_N)
    tma.store_wait(0, read_only=False)


@gluon.jit
def two_simplicial_bwd_dkv_scaled(
    q_desc: "tensordesc<dtype[1,1,8,64]>", grad_out_desc: "tensordesc<dtype[1,1,8,64]>", statistics_desc: "tensordesc<fp32[1,64]>",
    k_long_ptr: "*dtype:16", v_long_ptr: "*dtype:16", k_short_ptr: "*dtype:16", v_short_ptr: "*dtype:16",
    part_k_desc: "tensordesc<fp32[BLOCK_N,HEAD_DIM]>", part_v_desc: "tensordesc<fp32[BLOCK_N,HEAD_DIM]>",
    part_ks_ptr: "*fp32:16", part_vs_ptr: "*fp32:16",
    stride_klb: "i64:8", stride_kln: "i64:8", stride_klh: "i64:8",
    stride_vlb: "i64:8", stride_vln: "i64:8", stride_vlh: "i64:8",
    stride_ksb: "i64:8", stride_ksn: "i64:8", stride_ksh: "i64:8",
    stride_vsb: "i64:8", stride_vsn: "i64:8", stride_vsh: "i64:8",
    num_queries: "i32", num_keys: "i32", kv_heads: "i32", group: "i32", head_dim: "i32:8",
    w_long: "i32", w_short: "i32", scale: "fp32", bounds_ptr: "*i32:16", packed: "i32",
    num_splits: "i32", share: "i32", together: "i32", copy_rows: "i32",
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Partial sums: of dk_long, dv_long twice for each of num_splits programs of a block of keys, which take `share` of its
    short keys each; of dk_short, dv_short for each block, rows first of its keys - w_short + 1 ..
    last + w_long - 1 (of those that there are)."""
    dtype: gl.constexpr = k_long_ptr.dtype.element_ty
    past = num_keys - num_queries
    num_blocks = gl.cdiv(num_keys, BLOCK_N)
    # Programs that run at the same time walk the same short keys where a share is a number of blocks: their rows are then
    # in the L2 cache once.
    # The middle shares (of `together` blocks) first, then outwards: those at the ends have fewer rows.
    rank = gl.program_id(0) // together % num_splits
    block_head = gl.program_id(0) // (num_splits * together) * together + gl.program_id(0) % together
    split = num_splits // 2 + gl.where(rank % 2 == 1, -((rank + 1) // 2), rank // 2)
    block = (block_head + split * (num_blocks - share // BLOCK_N % num_blocks)) % num_blocks
    batch_head = block_head // num_blocks
    batch = (batch_head // kv_heads).to(gl.int64)
    kv_head = (batch_head % kv_heads).to(gl.int64)
    k_long_ptr += batch * stride_klb + kv_head * stride_klh
    v_long_ptr += batch * stride_vlb + kv_head * stride_vlh
    k_short_ptr += batch * stride_ksb + kv_head * stride_ksh
    v_short_ptr += batch * stride_vsb + kv_head * stride_vsh
    first_part = ((batch_head * num_blocks + block) * num_splits + split) * 2 * BLOCK_N
    first_short = (batch_head.to(gl.int64) * num_blocks + block) * (BLOCK_N + w_long + w_short - 2) * head_dim

    first_n = block * BLOCK_N
    last_n = gl.minimum(first_n + BLOCK_N, num_keys) - 1
    first_j = first_n - w_short + 1 + split * share
    end_j = gl.minimum(gl.minimum(first_j + share, first_n + BLOCK_N + w_long - 1), num_keys)
    first_j = gl.maximum(first_j, 0)
    # Packed sequences leave of these those from the first one of first_n's on, to the last one of last_n's. Rows of the others
    # are merged, too.
    num_bounds = gl.where(packed != 0, num_keys, 0)
    first_end = _end_of(first_n, bounds_ptr, num_bounds, num_keys)
    end_pos = gl.minimum(_end_of(last_n, bounds_ptr, num_bounds, num_keys), last_n + w_long)
    first_own = gl.minimum(gl.maximum(first_j, _start_of(first_n, bounds_ptr, num_bounds)), end_j)
    end_own = gl.maximum(gl.minimum(end_j, end_pos), first_own)
    first_short -= (first_n - w_short + 1).to(gl.int64) * head_dim  # of short key 0 now
    _clear_short(part_ks_ptr + first_short, part_vs_ptr + first_short, first_j, first_own, head_dim, HEAD_DIM)
    _clear_short(part_ks_ptr + first_short, part_vs_ptr + first_short, end_own, end_j, head_dim, HEAD_DIM)

    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, HEAD_DIM], dtype)
    stream = Stream(
        gl.allocate_shared_memory(dtype, [STAGES, ROWS, HEAD_DIM], tile),
        gl.allocate_shared_memory(dtype, [STAGES, ROWS, HEAD_DIM], tile),
        gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, ROWS], gl.NVMMASharedLayout.get_default_for([1, ROWS], gl.float32)),
        mbarrier.allocate_mbarrier(batch=STAGES),
        mbarrier.allocate_mbarrier(batch=STAGES),
    )
    tiles = gl.allocate_shared_memory(dtype, [2, ROWS, HEAD_DIM], tile)
    scaled = gl.allocate_shared_memory(dtype, [4, ROWS, HEAD_DIM], tile)
    for i in gl.static_range(STAGES):
        mbarrier.init(stream.full.index(i), count=1)
        mbarrier.init(stream.empty.index(i), count=2)
    PAIRS: gl.constexpr = HEAD_DIM // 2
    pairs: gl.constexpr = gl.BlockedLayout([1, 4], [128 // PAIRS, PAIRS // 4], [4, 1], [1, 0])
    n = first_n + gl.arange(0, ROWS, gl.SliceLayout(1, pairs)) % BLOCK_N
    pair = gl.arange(0, PAIRS, gl.SliceLayout(0, pairs))
    mask = (n < num_keys)[:, None] & (pair < head_dim // 2)[None, :]
    _as_pairs(tiles).index(0).store(gl.load(_row_ptrs(_pairs(k_long_ptr), n, stride_kln // 2, pair), mask=mask, other=0))
    _as_pairs(tiles).index(1).store(gl.load(_row_ptrs(_pairs(v_long_ptr), n, stride_vln // 2, pair), mask=mask, other=0))
    fence_async_shared()
    gl.warp_specialize(
        [
            (_key_gradients, (stream, tiles, scaled, 0, k_short_ptr, v_short_ptr, part_k_desc, part_v_desc, first_part,
                              part_ks_ptr + first_short, part_vs_ptr + first_short, stride_ksn, stride_vsn, first_own, end_own, first_n,
                              first_end, end_pos, past, group, head_dim, w_long, w_short, scale, bounds_ptr, num_bounds,
                              HEAD_DIM, BLOCK_N)),
            (_key_gradients, (stream, tiles, scaled, 1, k_short_ptr, v_short_ptr, part_k_desc, part_v_desc, first_part + BLOCK_N,
                              part_ks_ptr + first_short, part_vs_ptr + first_short, stride_ksn, stride_vsn, first_own, end_own, first_n,
                              first_end, end_pos, past, group, head_dim, w_long, w_short, scale, bounds_ptr, num_bounds,
                              HEAD_DIM, BLOCK_N)),
            (_stream_rows, (stream, q_desc, grad_out_desc, statistics_desc, batch_head // kv_heads, batch_head % kv_heads * group,
                            batch_head, statistics_desc.shape[0] // 2, first_own, end_own, first_n, end_pos, past, group,
                            w_short, copy_rows, HEAD_DIM, BLOCK_N)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


# Measured on an H100: docs/kernel_trials.md. The shorter the long window and the longer the short one, the fewer long keys.
VARIANTS = [
    Variant(
        two_simplicial_bwd_dkv_scaled,
        "sm90a",
        {"dtype": dtype, "HEAD_DIM": head_dim, "BLOCK_N": block_n},
        {"STAGES": 4, "num_warps": 4},
    )
    for dtype, head_dim, block_n in itertools.product(("bf16", "fp16"), (64, 128), (16, 32, 64))
]
