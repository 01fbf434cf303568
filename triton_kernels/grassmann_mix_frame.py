"""The backward pass of grassmann_mix.py to the frames: the gradient of pbar never leaves the registers that wgmma sums it up in."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from triton_kernels.grassmann_mix import (
    OF_I,
    OF_J,
    PLANES,
    _boxes,
    _coordinates,
    _load_frames,
    _load_weights,
    _new_block,
)
from triton_kernels.grassmann_mix_weight import _sum_parts
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
def _add_pair(sums, frame, grad, part_h, part_k, a, b):
    """What planes of blocks a, by i, and b, by j, add to Om u and Om Y: of b, and of a in part."""
    u_j, y_j = _coordinates(frame, b, OF_J)
    part_h = _over_j(part_h, grad, u_j)
    part_k = _over_j(part_k, grad, y_j)
    u_i, y_i = _coordinates(frame, a, OF_I)
    none = gl.full([ROWS, 8], 0.0, gl.float32, OF_J)
    minus = -grad
    _add(sums, b, _over_i(none, minus, gl.broadcast(u_i, grad)[0]))
    _add(sums, 4 + b, _over_i(none, minus, gl.broadcast(y_i, grad)[0]))
    return part_h, part_k


@gluon.jit
def _grad_pbar(weights, grad_g, stage, phase):
    """The gradient of pbar, of the columns of the next tile."""
    mma: gl.constexpr = grad_g.type.layout.parent
    zero = gl.full([ROWS, 64], 0.0, gl.float32, mma)
    mbarrier.wait(weights.full.index(stage), phase)
    grad = warpgroup_mma(grad_g, weights.tiles.index(stage), zero, use_acc=False, is_async=True)
    grad = warpgroup_mma_wait(0, deps=(grad,))
    mbarrier.arrive(weights.empty.index(stage))
    stage, phase = weights.advance(stage, phase)
    return gl.convert_layout(grad.reshape([ROWS, 8, 8]), PLANES, assert_trivial=True), stage, phase


@gluon.jit
def _turn(weights, memory, frames, full, warpgroup, turn_desc, first_token, BLOCK_N: gl.constexpr):
    """A warpgroup: 64 tokens."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    frame = frames.slice(warpgroup * 9, 9)
    mbarrier.wait(full.index(0), 0)
    mbarrier.wait(full.index(1), 0)
    grad_g = memory.index(warpgroup).load(gl.DotOperandLayout(0, mma, 2))
    # The sums of h, then of k, where the gradient of g was.
    sums = _boxes(memory).slice(warpgroup * BLOCK_N // 16, 8)
    gl.barrier()  # all warps have loaded it
    for i in range(8):
        sums.index(i).permute((1, 0)).store(gl.full([ROWS, 8], 0.0, gl.float32, OF_J))
    none = gl.full([ROWS, 8, 4], 0.0, gl.float32, PARTS)
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for a in range(3):
        part_h = none
        part_k = none
        for b in range(a + 1, 4):
            grad, stage, phase = _grad_pbar(weights, grad_g, stage, phase)
            part_h, part_k = _add_pair(sums, frame, grad, part_h, part_k, a, b)
        _add(sums, a, _as_of_j(part_h))
        _add(sums, 4 + a, _as_of_j(part_k))
    i = gl.arange(0, 8, gl.SliceLayout(0, OF_I))[None, :, None]
    j = gl.arange(0, 8, gl.SliceLayout(0, OF_J))[None, None, :]
    for a in range(0, 4, 2):
        grad, stage, phase = _grad_pbar(weights, grad_g, stage, phase)
        for b in range(2):
            own = gl.where(b == 0, gl.where(j > i, grad, 0.0), gl.where(j < i, -grad, 0.0))
            part_h, part_k = _add_pair(sums, frame, own, none, none, a + b, a + b)
            _add(sums, a + b, _as_of_j(part_h))
            _add(sums, 4 + a + b, _as_of_j(part_k))
    row = gl.arange(0, 8, gl.SliceLayout(0, OF_J))[None, :]
    count = gl.sum(gl.where(row == 0, frame.index(8).permute((1, 0)).load(OF_J), 0.0), 1)[:, None]
    for block in range(8):
        x = sums.index(block).permute((1, 0))
        scaled = x.load(OF_J) * gl.where(block < 4, 1.0 / gl.maximum(count, 1.0), 1.0)
        x.store(gl.where(count > 0, scaled, 0.0))
    fence_async_shared()
    gl.barrier()
    for block in range(8):
        tma.async_store(turn_desc, [first_token + warpgroup * ROWS + 8 * block, 0], sums.index(block))
    tma.store_wait(0)


@gluon.jit
def grassmann_mix_bwd_frame(
    frame_desc: "tensordesc<fp32[8,64]>", weight_desc: "tensordesc<dtype[BLOCK_N,64]>",
    grad_g_desc: "tensordesc<dtype[64,BLOCK_N]>", turn_desc: "tensordesc<fp32[8,64]>",
    part_desc: "tensordesc<fp32[8,128]>", grad_weight_ptr: "*dtype:16", grad_bias_ptr: "*dtype:16",
    num_parts: "i32", d: "i32:8", r: "i32", BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PART_STAGES: gl.constexpr,
):  # fmt: skip
    """h / N and k of 128 tokens (plucker_mean_bwd_frame), from the gradient of g, which has BLOCK_N columns at most; and on the
    side a share of the sums over the parts that grassmann_mix_bwd_weight has left.

    Its products need nothing of that kernel, which lets it start when the frames are there; the helpers that add parts up wait for
    it, and all wait in the end, so that what follows may rely on both.
    """
    dtype: gl.constexpr = weight_desc.dtype
    first_token = gl.program_id(0) * 2 * ROWS
    weights, memory, full = _new_block(dtype, STAGES, BLOCK_N, 2)
    frames = gl.allocate_shared_memory(gl.float32, [18, 8, ROWS], gl.NVMMASharedLayout.get_default_for([8, ROWS], gl.float32))
    parts = gl.allocate_shared_memory(gl.float32, [PART_STAGES, 8, 128], gl.NVMMASharedLayout.get_default_for([8, 128], gl.float32))
    parts_full = mbarrier.allocate_mbarrier(batch=PART_STAGES)
    for i in gl.static_range(PART_STAGES):
        mbarrier.init(parts_full.index(i), count=1)
    fence_async_shared()
    mbarrier.expect(full.index(0), 2 * ROWS * BLOCK_N * 2)
    for i in gl.static_range(2):
        tma.async_load(grad_g_desc, [first_token + i * ROWS, 0], full.index(0), memory.index(i))
    _load_frames(frame_desc, full.index(1), frames, 9)
    gl.warp_specialize(
        [
            (_turn, (weights, memory, frames, full, 0, turn_desc, first_token, BLOCK_N)),
            (_turn, (weights, memory, frames, full, 1, turn_desc, first_token, BLOCK_N)),
            (_load_weights, (weights, weight_desc, 0)),
            (_sum_parts, (parts, parts_full, part_desc, grad_weight_ptr, grad_bias_ptr, num_parts, d, r)),
        ],
        [4, 1, 2],
        [216, 24, 64],
    )  # fmt: skip
    gdc_wait()


VARIANTS = [
    Variant(
        grassmann_mix_bwd_frame,
        "sm90a",
        {"dtype": dtype},
        {"BLOCK_N": 256, "STAGES": 3, "PART_STAGES": 6, "num_warps": 4, "launch_pdl": True},
    )
    for dtype in ("bf16", "fp16")
]
