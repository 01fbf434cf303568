"""2-simplicial attention of fp32 on Hopper: every product is six of bf16 ones on wgmma, as accurate as fp32.

A bf16 number has 8 of fp32's 24 binary digits and all of its exponents, so that x = x0 + x1 + x2. Of the nine products of
parts, the three below 2^-23 of the result are left out:

    x @ y = x0 @ y0 + (x0 @ y1 + x1 @ y0 + x1 @ y1 + x0 @ y2 + x2 @ y0)

The tensor cores cut off what fp32 would round, which a sum over thousands of keys would show. So every product starts from
zero, takes the small terms first or apart, and is added to what came before by fp32 instructions.

The kernels take the places of those of two_simplicial_attention.py (same names, arguments, rows and offsets), the forward one for
every ratio, the one for dq where a tile of rows is of one token. Tiles of the long axis are outside, offsets inside, so that
the long keys are cut into parts once for all offsets; per offset only A = q * k_short is, in registers.
"""

import itertools

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from triton_kernels.scaled_tiles import LOG2E, _row_ptrs, _sees_one_pair
from triton_kernels.variant import Variant

LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _split(x):
    """x0, x1, x2. The first is cut off, not rounded: rounding would take the largest numbers to infinity."""
    x0 = (x.to(gl.int32, bitcast=True) & -0x10000).to(gl.float32, bitcast=True)
    x1 = (x - x0).to(gl.bfloat16)
    x2 = ((x - x0) - x1.to(gl.float32)).to(gl.bfloat16)
    return x0.to(gl.bfloat16), x1, x2


@gluon.jit
def _split_left(x, layout: gl.constexpr):
    x0, x1, x2 = _split(x)
    return gl.convert_layout(x0, layout), gl.convert_layout(x1, layout), gl.convert_layout(x2, layout)


@gluon.jit
def _product(x, y, zero):
    """x @ y, the small products first. Where y is infinite it is NaN (inf - inf, 0 * inf)."""
    sums = warpgroup_mma(x[2], y[0], zero, use_acc=False, is_async=True)
    sums = warpgroup_mma(x[0], y[2], sums, is_async=True)
    sums = warpgroup_mma(x[1], y[1], sums, is_async=True)
    sums = warpgroup_mma(x[1], y[0], sums, is_async=True)
    sums = warpgroup_mma(x[0], y[1], sums, is_async=True)
    sums = warpgroup_mma(x[0], y[0], sums, is_async=True)
    return warpgroup_mma_wait(0, deps=(sums,))


@gluon.jit
def _rows(ptr, row, row_ok, stride, head_dim, c: gl.constexpr, CHUNK: gl.constexpr):
    """Chunk c of rows, [rows, CHUNK] in the layout of `row`, zeros where they are not ok."""
    d = c * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(0, row.type.layout.parent))
    return gl.load(_row_ptrs(ptr, row, stride, d), mask=row_ok[:, None] & (d < head_dim)[None, :], other=0.0)


@gluon.jit
def _row(ptr, row, stride, head_dim, c: gl.constexpr, CHUNK: gl.constexpr, layout: gl.constexpr):
    """Chunk c of one row, [1, CHUNK]."""
    d = c * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(0, layout))
    return gl.load(ptr + row.to(gl.int64) * stride + d, mask=d < head_dim, other=0.0)[None, :]


@gluon.jit
def _start_of(pos, bounds_ptr, num_bounds):
    """Where the sequence of each position starts. Only packed sequences have bounds, num_keys of them; others start at 0."""
    return gl.load(bounds_ptr + pos, mask=pos < num_bounds, other=0)


@gluon.jit
def _short_rows(ptr, pos, first_pos, first_start, offset, num_keys, stride, head_dim, c: gl.constexpr, CHUNK: gl.constexpr,
                ONE_TOKEN: gl.constexpr):  # fmt: skip
    """The short rows at this offset: each row's, or the one of all; none from before the first row's sequence."""
    if ONE_TOKEN:
        return _row(ptr, first_pos - offset, stride, head_dim, c, CHUNK, pos.type.layout.parent)
    else:
        return _rows(ptr, pos - offset, (pos - offset >= first_start) & (pos < num_keys), stride, head_dim, c, CHUNK)


@gluon.jit
def _new_parts(BLOCK_N: gl.constexpr, CHUNKS: gl.constexpr, CHUNK: gl.constexpr):
    """Shared memory for the parts of a tile of keys: three for each chunk of the head dim."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, CHUNK], gl.bfloat16)
    return gl.allocate_shared_memory(gl.bfloat16, [3 * CHUNKS, BLOCK_N, CHUNK], layout)


@gluon.jit
def _split_tile(ptr, stride, first, last, head_dim, parts):
    """Cuts rows from `first` on, zeros after `last`."""
    CHUNKS: gl.constexpr = parts.shape[0] // 3
    CHUNK: gl.constexpr = parts.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [128 // CHUNK, CHUNK // 4], [gl.num_warps(), 1], [1, 0])
    n = first + gl.arange(0, parts.shape[1], gl.SliceLayout(1, layout))
    for c in gl.static_range(CHUNKS):
        # The sum makes every NaN one that is a NaN in its upper half too.
        x = _split(_rows(ptr, n, n <= last, stride, head_dim, c, CHUNK) + 0.0)
        for i in gl.static_range(3):
            parts.index(3 * c + i).store(x[i])


@gluon.jit
def _split_keys(k_ptr, v_ptr, stride_k, stride_v, first, last, head_dim, k_parts, v_parts):
    gl.barrier()  # the tile before has been read
    _split_tile(k_ptr, stride_k, first, last, head_dim, k_parts)
    _split_tile(v_ptr, stride_v, first, last, head_dim, v_parts)
    fence_async_shared()
    gl.barrier()


@gluon.jit
def _parts(parts, c: gl.constexpr):
    return parts.index(3 * c), parts.index(3 * c + 1), parts.index(3 * c + 2)


@gluon.jit
def _scores(a_smem, short_ptr, pos, first_pos, first_start, offset, num_keys, stride, head_dim, parts, s_mma: gl.constexpr,
            ONE_TOKEN: gl.constexpr):  # fmt: skip
    """(a * short) @ keys^T, infinite where fp32's is: NaN of the small products is dropped, the first product decides."""
    CHUNKS: gl.constexpr = parts.shape[0] // 3
    CHUNK: gl.constexpr = parts.shape[2]
    layout: gl.constexpr = gl.DotOperandLayout(0, s_mma, 2)
    large = gl.full([a_smem.shape[1], parts.shape[1]], 0.0, gl.float32, s_mma)
    small = large
    for c in gl.static_range(CHUNKS):
        short = _short_rows(short_ptr, pos, first_pos, first_start, offset, num_keys, stride, head_dim, c, CHUNK, ONE_TOKEN)
        x = _split(a_smem.index(c).load(layout) * short)
        y0, y1, y2 = _parts(parts, c)
        large = warpgroup_mma(x[0], y0.permute((1, 0)), large, use_acc=c > 0, is_async=True)
        small = warpgroup_mma(x[2], y0.permute((1, 0)), small, use_acc=c > 0, is_async=True)
        small = warpgroup_mma(x[0], y2.permute((1, 0)), small, is_async=True)
        small = warpgroup_mma(x[1], y1.permute((1, 0)), small, is_async=True)
        small = warpgroup_mma(x[1], y0.permute((1, 0)), small, is_async=True)
        small = warpgroup_mma(x[0], y1.permute((1, 0)), small, is_async=True)
    large, small = warpgroup_mma_wait(0, deps=(large, small))
    return large + gl.where(small == small, small, 0.0)


@gluon.jit
def two_simplicial_fwd(
    q_ptr: "*dtype:16", k_long_ptr: "*dtype:16", v_long_ptr: "*dtype:16", k_short_ptr: "*dtype:16",
    v_short_ptr: "*dtype:16",
    out_ptr: "*dtype:16", lse_ptr: "*fp32:16",
    stride_qb: "i64:8", stride_qn: "i64:8", stride_qh: "i64:8",
    stride_klb: "i64:8", stride_kln: "i64:8", stride_klh: "i64:8",
    stride_vlb: "i64:8", stride_vln: "i64:8", stride_vlh: "i64:8",
    stride_ksb: "i64:8", stride_ksn: "i64:8", stride_ksh: "i64:8",
    stride_vsb: "i64:8", stride_vsn: "i64:8", stride_vsh: "i64:8",
    num_queries: "i32", num_keys: "i32", kv_heads: "i32", group: "i32", head_dim: "i32:8",
    w_long: "i32", w_short: "i32", scale: "fp32", bounds_ptr: "*i32:16", packed: "i32",
    HEAD_DIM: gl.constexpr, SHARE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    ONE_TOKEN: gl.constexpr = SHARE == BLOCK_M
    CHUNK: gl.constexpr = min(HEAD_DIM, 64)
    CHUNKS: gl.constexpr = HEAD_DIM // CHUNK
    s_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    o_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, CHUNK, 16])
    io: gl.constexpr = gl.BlockedLayout([1, 4], [128 // CHUNK, CHUNK // 4], [gl.num_warps(), 1], [1, 0])
    s_rows: gl.constexpr = gl.SliceLayout(1, s_mma)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_mma)

    num_rows = num_queries * group
    num_tiles = gl.cdiv(num_rows, BLOCK_M)
    batch_head = gl.program_id(0) // num_tiles
    batch = (batch_head // kv_heads).to(gl.int64)
    kv_head = (batch_head % kv_heads).to(gl.int64)
    k_long_ptr += batch * stride_klb + kv_head * stride_klh
    v_long_ptr += batch * stride_vlb + kv_head * stride_vlh
    k_short_ptr += batch * stride_ksb + kv_head * stride_ksh
    v_short_ptr += batch * stride_vsb + kv_head * stride_vsh
    q_ptr += batch * stride_qb + kv_head * group * stride_qh

    first_row = gl.program_id(0) % num_tiles * BLOCK_M
    past = num_keys - num_queries
    first_pos = first_row // group + past
    last_pos = (gl.minimum(first_row + BLOCK_M, num_rows) - 1) // group + past

    k_parts = _new_parts(BLOCK_N, CHUNKS, CHUNK)
    v_parts = _new_parts(BLOCK_N, CHUNKS, CHUNK)
    q_smem = gl.allocate_shared_memory(gl.float32, [CHUNKS, BLOCK_M, CHUNK], gl.SwizzledSharedLayout(8, 1, CHUNK // 8, [1, 0]))
    row = first_row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, io))
    for c in gl.static_range(CHUNKS):
        d = c * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(0, io))
        q_ptrs = _row_ptrs(q_ptr, row // group, stride_qn, d) + (row % group)[:, None] * stride_qh
        q = gl.load(q_ptrs, mask=(row < num_rows)[:, None] & (d < head_dim)[None, :], other=0.0)
        # The sign of scale goes to q (exact), so that the maximum of S is the maximum of the logits. A scale of 0 becomes
        # one that is 0 to every finite logit but keeps -inf * scale == -inf.
        q_smem.index(c).store(gl.where(scale < 0, -q, q))
    to_exponent = gl.maximum(gl.maximum(scale, -scale) * LOG2E, 1e-30)

    row = first_row + gl.arange(0, BLOCK_M, s_rows)
    pos = row // group + past
    a_pos = gl.convert_layout(pos, gl.SliceLayout(1, gl.DotOperandLayout(0, s_mma, 2)))
    o_pos = gl.convert_layout(pos, o_rows)
    num_bounds = packed * num_keys
    starts = _start_of(pos, bounds_ptr, num_bounds)
    since = gl.maximum(pos - w_long, starts - 1)
    first_start, last_start = _start_of(first_pos, bounds_ptr, num_bounds), _start_of(last_pos, bounds_ptr, num_bounds)
    last_since = gl.maximum(last_pos - w_long, last_start - 1)
    row_max = gl.full([BLOCK_M], float("-inf"), gl.float32, s_rows)
    row_sum = gl.full([BLOCK_M], 0.0, gl.float32, s_rows)
    zero = gl.full([BLOCK_M, CHUNK], 0.0, gl.float32, o_mma)
    acc = (zero,) * CHUNKS
    for start in range(gl.maximum(first_pos - w_long + 1, first_start), last_pos + 1, BLOCK_N):
        _split_keys(k_long_ptr, v_long_ptr, stride_kln, stride_vln, start, last_pos, head_dim, k_parts, v_parts)
        n = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_mma))
        at_edge = (start + BLOCK_N - 1 > first_pos) | (start <= last_since)
        for offset in range(0, gl.minimum(w_short, last_pos - first_start + 1)):
            s = _scores(q_smem, k_short_ptr, a_pos, first_pos, first_start, offset, num_keys, stride_ksn, head_dim, k_parts, s_mma,
                        ONE_TOKEN)  # fmt: skip
            if at_edge | (offset > first_pos - last_start):
                valid = (n[None, :] <= pos[:, None]) & (n[None, :] > since[:, None]) & (pos - offset >= starts)[:, None]
                s = gl.where(valid, s, float("-inf"))
            new_max = gl.maximum(row_max, gl.max(s, 1) * to_exponent)
            # A row that has seen no valid pair yet keeps a maximum of -inf; 0 in its place avoids -inf - -inf.
            shift = gl.where(new_max == float("-inf"), 0.0, -new_max)
            p = gl.exp2(gl.fma(s, gl.full_like(s, to_exponent), gl.broadcast(shift[:, None], s)[0]))
            alpha = gl.exp2(row_max + shift)
            row_sum = row_sum * alpha + gl.sum(p, 1)
            row_max = new_max
            alpha = gl.convert_layout(alpha, o_rows)[:, None]
            p = _split_left(p, gl.DotOperandLayout(0, o_mma, 2))
            new_acc = ()
            for c in gl.static_range(CHUNKS):
                pv = _product(p, _parts(v_parts, c), zero)
                v_short = _short_rows(v_short_ptr, o_pos, first_pos, first_start, offset, num_keys, stride_vsn, head_dim, c, CHUNK,
                                      ONE_TOKEN)  # fmt: skip
                new_acc += (gl.fma(pv, gl.broadcast(v_short, pv)[0], acc[c] * alpha),)
            acc = new_acc

    q_head = batch * kv_heads * group + kv_head * group + row % group
    gl.store(lse_ptr + q_head * num_queries + row // group, (row_max + gl.log2(row_sum)) * LN2, mask=row < num_rows)
    row_sum = gl.convert_layout(row_sum, o_rows)[:, None]
    row = gl.convert_layout(row, o_rows)
    out_row = (batch * num_queries + row // group) * kv_heads * group + kv_head * group + row % group
    for c in gl.static_range(CHUNKS):
        d = c * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(0, o_mma))
        gl.store(_row_ptrs(out_ptr, out_row, head_dim, d), acc[c] / row_sum, mask=(row < num_rows)[:, None] & (d < head_dim)[None, :])


@gluon.jit
def _add_sum(ptr, row, x, head_dim, c: gl.constexpr):
    """Adds the sum of the rows of x to chunk c of one row in memory. Two calls for one row need a barrier between them."""
    CHUNK: gl.constexpr = x.shape[1]
    d = c * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(0, x.type.layout))
    ptrs = ptr + row.to(gl.int64) * head_dim + d
    gl.store(ptrs, gl.load(ptrs, mask=d < head_dim, other=0.0) + gl.sum(x, 0), mask=d < head_dim)


@gluon.jit
def two_simplicial_bwd_dq(
    q_ptr: "*dtype:16", k_long_ptr: "*dtype:16", v_long_ptr: "*dtype:16", k_short_ptr: "*dtype:16",
    v_short_ptr: "*dtype:16",
    out_ptr: "*dtype:16", lse_ptr: "*fp32:16", grad_out_ptr: "*dtype:16", grad_lse_ptr: "*fp32:16",
    grad_q_ptr: "*dtype:16", delta_ptr: "*fp32:16", part_k_ptr: "*fp32:16", part_v_ptr: "*fp32:16",
    stride_qb: "i64:8", stride_qn: "i64:8", stride_qh: "i64:8",
    stride_klb: "i64:8", stride_kln: "i64:8", stride_klh: "i64:8",
    stride_vlb: "i64:8", stride_vln: "i64:8", stride_vlh: "i64:8",
    stride_ksb: "i64:8", stride_ksn: "i64:8", stride_ksh: "i64:8",
    stride_vsb: "i64:8", stride_vsn: "i64:8", stride_vsh: "i64:8",
    stride_gb: "i64:8", stride_gn: "i64:8", stride_gh: "i64:8",
    num_queries: "i32", num_keys: "i32", kv_heads: "i32", group: "i32", head_dim: "i32:8",
    w_long: "i32", w_short: "i32", scale: "fp32", bounds_ptr: "*i32:16", packed: "i32",
    has_grad_lse: "i32", chunk_tiles: "i32", chunk_span: "i32",
    HEAD_DIM: gl.constexpr, SHARE: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """dq, delta, and this chunk's partial sums of dk_short and dv_short. Every tile is of one token."""
    gl.static_assert(SHARE == BLOCK_M)
    CHUNK: gl.constexpr = min(HEAD_DIM, 64)
    CHUNKS: gl.constexpr = HEAD_DIM // CHUNK
    s_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK_N, 16])
    o_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, CHUNK, 16])
    io: gl.constexpr = gl.BlockedLayout([1, 4], [128 // CHUNK, CHUNK // 4], [gl.num_warps(), 1], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    s_rows: gl.constexpr = gl.SliceLayout(1, s_mma)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_mma, 2)

    num_tiles = num_queries * group // BLOCK_M
    past = num_keys - num_queries
    num_chunks = gl.cdiv(num_tiles, chunk_tiles)
    chunk = gl.program_id(0) % num_chunks
    batch_head = gl.program_id(0) // num_chunks
    batch = (batch_head // kv_heads).to(gl.int64)
    kv_head = (batch_head % kv_heads).to(gl.int64)
    k_long_ptr += batch * stride_klb + kv_head * stride_klh
    v_long_ptr += batch * stride_vlb + kv_head * stride_vlh
    k_short_ptr += batch * stride_ksb + kv_head * stride_ksh
    v_short_ptr += batch * stride_vsb + kv_head * stride_vsh
    q_ptr += batch * stride_qb + kv_head * group * stride_qh
    grad_out_ptr += batch * stride_gb + kv_head * group * stride_gh
    part_k_ptr += gl.program_id(0).to(gl.int64) * chunk_span * head_dim
    part_v_ptr += gl.program_id(0).to(gl.int64) * chunk_span * head_dim
    part_start = chunk * chunk_tiles * BLOCK_M // group + past - w_short + 1
    to_exponent = scale * LOG2E

    k_parts = _new_parts(BLOCK_N, CHUNKS, CHUNK)
    v_parts = _new_parts(BLOCK_N, CHUNKS, CHUNK)
    q_smem = gl.allocate_shared_memory(gl.float32, [CHUNKS, BLOCK_M, CHUNK], gl.SwizzledSharedLayout(8, 1, CHUNK // 8, [1, 0]))
    g_smem = gl.allocate_shared_memory(gl.float32, [CHUNKS, BLOCK_M, CHUNK], gl.SwizzledSharedLayout(8, 1, CHUNK // 8, [1, 0]))
    zero = gl.full([BLOCK_M, CHUNK], 0.0, gl.float32, o_mma)

    for start in range(0, chunk_span * head_dim, 512):
        x = start + gl.arange(0, 512, flat)
        gl.store(part_k_ptr + x, gl.full([512], 0.0, gl.float32, flat), mask=x < chunk_span * head_dim)
        gl.store(part_v_ptr + x, gl.full([512], 0.0, gl.float32, flat), mask=x < chunk_span * head_dim)

    for tile in range(chunk * chunk_tiles, gl.minimum((chunk + 1) * chunk_tiles, num_tiles)):
        token = tile * BLOCK_M // group
        first_head = tile * BLOCK_M % group
        pos = token + past
        first_start = _start_of(pos, bounds_ptr, packed * num_keys)
        single = _sees_one_pair(pos - first_start, w_long, w_short)
        heads = (batch * num_queries + token) * kv_heads * group + kv_head * group + first_head  # rows of out before the tile's
        head = gl.arange(0, BLOCK_M, gl.SliceLayout(1, io))
        gl.barrier()  # the tile before has been read
        delta = gl.full([BLOCK_M], 0.0, gl.float32, gl.SliceLayout(1, io))
        for c in gl.static_range(CHUNKS):
            grad_out = _rows(grad_out_ptr + token.to(gl.int64) * stride_gn + first_head * stride_gh, head, head < group,
                             stride_gh, head_dim, c, CHUNK)  # fmt: skip
            out = _rows(out_ptr + heads * head_dim, head, head < group, head_dim, head_dim, c, CHUNK)
            q = _rows(q_ptr + token.to(gl.int64) * stride_qn + first_head * stride_qh, head, head < group,
                      stride_qh, head_dim, c, CHUNK)  # fmt: skip
            delta += gl.sum(grad_out * out, 1)
            g_smem.index(c).store(grad_out)
            q_smem.index(c).store(q)
        delta = gl.where(single, 0.0, gl.convert_layout(delta, s_rows))
        lse_row = batch * kv_heads * group + kv_head * group + first_head + gl.arange(0, BLOCK_M, s_rows)
        lse_row = lse_row * num_queries + token
        if has_grad_lse != 0:
            delta -= gl.load(grad_lse_ptr + lse_row)
        gl.store(delta_ptr + lse_row, delta)
        lse2 = gl.load(lse_ptr + lse_row) * LOG2E

        rows = gl.full([BLOCK_M], 0, gl.int32, gl.SliceLayout(1, gl.DotOperandLayout(0, s_mma, 2)))
        grad_q = (zero,) * CHUNKS
        for start in range(gl.maximum(pos - w_long + 1, first_start), pos + 1, BLOCK_N):
            _split_keys(k_long_ptr, v_long_ptr, stride_kln, stride_vln, start, pos, head_dim, k_parts, v_parts)
            seen = (start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_mma)) <= pos)[None, :]
            for offset in range(0, gl.minimum(w_short, pos - first_start + 1)):
                s = _scores(q_smem, k_short_ptr, rows, pos, first_start, offset, num_keys, stride_ksn, head_dim, k_parts, s_mma, True)
                dp = _scores(g_smem, v_short_ptr, rows, pos, first_start, offset, num_keys, stride_vsn, head_dim, v_parts, s_mma, True)
                p = gl.exp2(gl.fma(s, gl.full_like(s, to_exponent), gl.broadcast(-lse2[:, None], s)[0]))
                ds = gl.where(single, -delta[:, None], p * (dp - delta[:, None]))
                p = _split_left(gl.where(seen, p, 0.0), p_layout)
                ds = _split_left(gl.where(seen, ds, 0.0), p_layout)
                new_grad_q = ()
                for c in gl.static_range(CHUNKS):
                    ds_k = _product(ds, _parts(k_parts, c), zero)
                    k_short = _row(k_short_ptr, pos - offset, stride_ksn, head_dim, c, CHUNK, o_mma)
                    new_grad_q += (gl.fma(ds_k, gl.broadcast(k_short, ds_k)[0], grad_q[c]),)
                    _add_sum(part_k_ptr, pos - offset - part_start, q_smem.index(c).load(o_mma) * ds_k, head_dim, c)
                    p_v = _product(p, _parts(v_parts, c), zero)
                    _add_sum(part_v_ptr, pos - offset - part_start, g_smem.index(c).load(o_mma) * p_v, head_dim, c)
                grad_q = new_grad_q
        head = gl.arange(0, BLOCK_M, gl.SliceLayout(1, o_mma))
        for c in gl.static_range(CHUNKS):
            d = c * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(0, o_mma))
            mask = (head < group)[:, None] & (d < head_dim)[None, :]
            gl.store(_row_ptrs(grad_q_ptr + heads * head_dim, head, head_dim, d), grad_q[c] * scale, mask=mask)


# Measured on an H100: docs/kernel_trials.md.
def _variant(kernel, head_dim: int, share: int) -> Variant:
    tile = {"BLOCK_M": 64, "BLOCK_N": 32 if head_dim == 128 else 64, "num_warps": 4}
    return Variant(kernel, "sm90a", {"dtype": "fp32", "HEAD_DIM": head_dim, "SHARE": share}, tile)


VARIANTS = [
    *(_variant(two_simplicial_fwd, head_dim, 1) for head_dim in (32, 64, 128)),
    *(_variant(kernel, d, 64) for kernel, d in itertools.product((two_simplicial_fwd, two_simplicial_bwd_dq), (64, 128))),
]
