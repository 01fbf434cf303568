"""The backward pass of grassmann_mix.py, one kernel: a part of the gradient of the weight, then the gradient of the frames.

That of pbar never leaves the registers that wgmma sums it up in. What the second half reads is under way while the first one ends.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from triton_kernels.grassmann_mix import FRAME, OF_I, OF_J, PLANES, TILES, _boxes, _coordinates
from triton_kernels.grassmann_mix_weight import Tokens, _load_tokens, _sum_tile
from triton_kernels.scaled_tiles import ROWS
from triton_kernels.variant import Variant

# PLANES without the two j that a thread has of each four threads' eight.
PARTS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[8, 0, 0], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [[0, 0, 1], [0, 0, 2], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0]],
        [],
        [64, 8, 4],
    )
)


@gluon.jit
def _over_i(sums, grad, x):
    """sums_j + sum_i grad_ij x_i, [64, 8]: a thread has all i of its j. One after another, in fused multiply-adds."""
    I: gl.constexpr = grad.shape[1]
    if I == 1:
        grad = gl.convert_layout(grad.reshape([ROWS, 8]), OF_J, assert_trivial=True)
        return gl.fma(grad, gl.convert_layout(x.reshape([ROWS, 8]), OF_J, assert_trivial=True), sums)
    else:
        first, second = gl.split(grad.reshape([ROWS, 2, I // 2, 8]).permute((0, 2, 3, 1)))
        x_first, x_second = gl.split(x.reshape([ROWS, 2, I // 2, 8]).permute((0, 2, 3, 1)))
        return _over_i(_over_i(sums, first, x_first), second, x_second)


@gluon.jit
def _halves(x):
    first, second = gl.split(x.reshape([ROWS, 8, 4, 2]))
    return gl.convert_layout(first, PARTS, assert_trivial=True), gl.convert_layout(second, PARTS, assert_trivial=True)


@gluon.jit
def _over_j(sums, grad, x):
    """sums_i + sum_j grad_ij x_j, of the two j that a thread has: [64, 8, 4]."""
    first, second = _halves(grad)
    x_first, x_second = _halves(gl.broadcast(x, grad)[0])
    return gl.fma(second, x_second, gl.fma(first, x_first, sums))


@gluon.jit
def _as_of_j(sums):
    """What four threads have of the sums over j, each for all i: added up, each for two i, as coordinates are by j."""
    turned: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 1, 0], [8, 0, 0]],
        [[0, 2, 0], [0, 4, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0]],
        [],
        [64, 8, 4],
    )
    return gl.convert_layout(gl.sum(gl.convert_layout(sums, turned), 2), OF_J, assert_trivial=True)


@gluon.jit
def _add(sums, block, x):
    """x, [64, 8] by j, to the sums of a block: a thread adds to what is its own."""
    rows = sums.index(block).permute((1, 0))
    rows.store(rows.load(OF_J) + x)


@gluon.jit
def _add_pair(sums, sum_h, frame, u, grad, part_h, part_k, a, b):
    """What planes of blocks a, by i, and b, by j, add to Om u and Om Y: of b, and of a in part. `sum_h` and `u` are the first boxes
    of h and of u."""
    u_j, y_j = _coordinates(frame, u + b, OF_J)
    part_h = _over_j(part_h, grad, u_j)
    part_k = _over_j(part_k, grad, y_j)
    u_i, y_i = _coordinates(frame, u + a, OF_I)
    none = gl.full([ROWS, 8], 0.0, gl.float32, OF_J)
    minus = -grad
    _add(sums, sum_h + b, _over_i(none, minus, gl.broadcast(u_i, grad)[0]))
    _add(sums, sum_h + 4 + b, _over_i(none, minus, gl.broadcast(y_i, grad)[0]))
    return part_h, part_k


# The second half has the ring's stages out of order, so their phases are the bits of a number.
@gluon.jit
def _phases(ring, n):
    """Those that are waited for next, of each stage, after n in order."""
    STAGES: gl.constexpr = ring.full.shape[0]
    stage, phase = ring.stage(n)
    return gl.where(phase == 0, 0, (1 << STAGES) - 1) ^ ((1 << stage) - 1)


@gluon.jit
def _await(barriers, stage, phases):
    mbarrier.wait(barriers.index(stage), (phases >> stage) & 1)
    return phases ^ (1 << stage)


@gluon.jit
def _following(ring, stage, count: gl.constexpr):
    STAGES: gl.constexpr = ring.full.shape[0]
    return (stage + count) % STAGES


@gluon.jit
def _weights(ring):
    """The memory of the gradient of g, as tiles of 64 columns of the weight."""
    STAGES: gl.constexpr = ring.full.shape[0]
    BLOCK_N: gl.constexpr = ring.grad_g.shape[2]
    dtype: gl.constexpr = ring.grad_g.dtype
    return ring.grad_g.reinterpret(dtype, [STAGES, BLOCK_N, ROWS], gl.NVMMASharedLayout.get_default_for([BLOCK_N, ROWS], dtype))


@gluon.jit
def _load(ring, frame_desc, grad_g_desc, weight_desc, first_tile, num_tiles, num_blocks):
    """The helper."""
    BLOCK_N: gl.constexpr = ring.grad_g.shape[2]
    _load_tokens(ring, frame_desc, grad_g_desc, first_tile, num_tiles)
    stage, _phase = ring.stage(num_tiles)
    STAGES: gl.constexpr = ring.full.shape[0]
    phases = _phases(ring, num_tiles) ^ ((1 << STAGES) - 1)
    weights = _weights(ring)
    for block in range(gl.program_id(0), num_blocks, gl.num_programs(0)):
        for i in gl.static_range(2):
            at = _following(ring, stage, i)
            phases = _await(ring.empty, at, phases)
            full = ring.full.index(at)
            mbarrier.expect(full, ROWS * (9 * 8 * 4 + BLOCK_N * 2))
            tma.async_load(grad_g_desc, [(block * 2 + i) * ROWS, 0], full, ring.grad_g.index(at))
            for box in gl.static_range(9):
                tma.async_load(frame_desc, [(block * 2 + i) * FRAME + 8 * box, 0], full, ring.frame.index(at * 9 + box))
        for tile in range(TILES):
            at = (stage + 2 + tile % 2) % 4
            phases = _await(ring.empty, at, phases)
            mbarrier.expect(ring.full.index(at), ROWS * BLOCK_N * 2)
            tma.async_load(weight_desc, [0, tile * ROWS], ring.full.index(at), weights.index(at))


@gluon.jit
def _grad_pbar(ring, weights, grad_g, stage, tile, phases):
    """The gradient of pbar, of the columns of the next tile."""
    mma: gl.constexpr = grad_g.type.layout.parent
    zero = gl.full([ROWS, 64], 0.0, gl.float32, mma)
    at = (stage + 2 + tile % 2) % 4
    phases = _await(ring.full, at, phases)
    grad = warpgroup_mma(grad_g, weights.index(at), zero, use_acc=False, is_async=True)
    grad = warpgroup_mma_wait(0, deps=(grad,))
    mbarrier.arrive(ring.empty.index(at))
    return gl.convert_layout(grad.reshape([ROWS, 8, 8]), PLANES, assert_trivial=True), tile + 1, phases


@gluon.jit
def _turn(ring, warpgroup: gl.constexpr, turn_desc, block, stage, phases):
    """A warpgroup: h / N and k of 64 tokens (plucker_mean_bwd_frame), from the gradient of g."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    BLOCK_N: gl.constexpr = ring.grad_g.shape[2]
    weights = _weights(ring)
    mine = _following(ring, stage, warpgroup)
    other = _following(ring, stage, 1 - warpgroup)
    phases = _await(ring.full, other, phases)
    mbarrier.arrive(ring.empty.index(other))
    phases = _await(ring.full, mine, phases)
    grad_g = ring.grad_g.index(mine).load(gl.DotOperandLayout(0, mma, 2))
    frame = ring.frame
    u = mine * 9
    # The sums of h, then of k, where the gradient of g was.
    sums = _boxes(ring.grad_g)
    sum_h = mine * (BLOCK_N * ROWS // (2 * 8 * ROWS))
    gl.barrier()  # all warps have loaded it
    for i in range(8):
        sums.index(sum_h + i).permute((1, 0)).store(gl.full([ROWS, 8], 0.0, gl.float32, OF_J))
    none = gl.full([ROWS, 8, 4], 0.0, gl.float32, PARTS)
    tile = gl.to_tensor(0)
    for a in range(3):
        part_h = none
        part_k = none
        for b in range(a + 1, 4):
            grad, tile, phases = _grad_pbar(ring, weights, grad_g, stage, tile, phases)
            part_h, part_k = _add_pair(sums, sum_h, frame, u, grad, part_h, part_k, a, b)
        _add(sums, sum_h + a, _as_of_j(part_h))
        _add(sums, sum_h + 4 + a, _as_of_j(part_k))
    i = gl.arange(0, 8, gl.SliceLayout(0, OF_I))[None, :, None]
    j = gl.arange(0, 8, gl.SliceLayout(0, OF_J))[None, None, :]
    for a in range(0, 4, 2):
        grad, tile, phases = _grad_pbar(ring, weights, grad_g, stage, tile, phases)
        for b in range(2):
            own = gl.where(b == 0, gl.where(j > i, grad, 0.0), gl.where(j < i, -grad, 0.0))
            part_h, part_k = _add_pair(sums, sum_h, frame, u, own, none, none, a + b, a + b)
            _add(sums, sum_h + a + b, _as_of_j(part_h))
            _add(sums, sum_h + 4 + a + b, _as_of_j(part_k))
    row = gl.arange(0, 8, gl.SliceLayout(0, OF_J))[None, :]
    count = gl.sum(gl.where(row == 0, frame.index(u + 8).permute((1, 0)).load(OF_J), 0.0), 1)[:, None]
    for i in range(8):
        x = sums.index(sum_h + i).permute((1, 0))
        scaled = x.load(OF_J) * gl.where(i < 4, 1.0 / gl.maximum(count, 1.0), 1.0)
        x.store(gl.where(count > 0, scaled, 0.0))
    fence_async_shared()
    gl.barrier()
    for i in range(8):
        tma.async_store(turn_desc, [(block * 2 + warpgroup) * ROWS + 8 * i, 0], sums.index(sum_h + i))
    tma.store_wait(0)
    mbarrier.arrive(ring.empty.index(mine))
    return phases


@gluon.jit
def _backward(ring, warpgroup: gl.constexpr, part_ptr, turn_desc, num_tiles, num_blocks, d, bias_everywhere):
    """A warpgroup."""
    _sum_tile(ring, warpgroup, part_ptr, num_tiles, d, bias_everywhere)
    stage, _phase = ring.stage(num_tiles)
    phases = _phases(ring, num_tiles)
    for block in range(gl.program_id(0), num_blocks, gl.num_programs(0)):
        phases = _turn(ring, warpgroup, turn_desc, block, stage, phases)


@gluon.jit
def grassmann_mix_bwd(
    frame_desc: "tensordesc<fp32[8,64]>", grad_g_desc: "tensordesc<dtype[64,BLOCK_N]>",
    weight_desc: "tensordesc<dtype[BLOCK_N,64]>", turn_desc: "tensordesc<fp32[8,64]>", part_ptr: "*fp32:16",
    num_tokens: "i32", share: "i32", d: "i32:8", bias_everywhere: "i32", BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The gradients of the weight, of which a program has 128 planes and sums over `share` tiles of 64 tokens, and of the
    frames, of 128 tokens at a time. The gradient of g has BLOCK_N columns at most."""
    dtype: gl.constexpr = grad_g_desc.dtype
    first_tile = gl.program_id(0) // 4 * share
    num_tiles = gl.minimum(gl.cdiv(num_tokens, ROWS) - first_tile, share)
    num_blocks = gl.cdiv(num_tokens, 2 * ROWS)
    ring = Tokens(
        gl.allocate_shared_memory(dtype, [STAGES, ROWS, BLOCK_N], gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_N], dtype)),
        gl.allocate_shared_memory(gl.float32, [9 * STAGES, 8, ROWS], gl.NVMMASharedLayout.get_default_for([8, ROWS], gl.float32)),
        mbarrier.allocate_mbarrier(batch=STAGES),
        mbarrier.allocate_mbarrier(batch=STAGES),
    )
    for i in gl.static_range(STAGES):
        mbarrier.init(ring.full.index(i), count=1)
        mbarrier.init(ring.empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_backward, (ring, 0, part_ptr, turn_desc, num_tiles, num_blocks, d, bias_everywhere)),
            (_backward, (ring, 1, part_ptr, turn_desc, num_tiles, num_blocks, d, bias_everywhere)),
            (_load, (ring, frame_desc, grad_g_desc, weight_desc, first_tile, num_tiles, num_blocks)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


VARIANTS = [
    Variant(grassmann_mix_bwd, "sm90a", {"dtype": dtype}, {"BLOCK_N": 256, "STAGES": 4, "num_warps": 4, "launch_pdl": True})
    for dtype in ("bf16", "fp16")
]
