"""The Triton kernels of plucker_mean and their errors; imported by the process of interpreter.py only."""

import torch
from grassmann import draw, truth_of

from triton_kernels import plucker_mean as kernels


def run(problem, head_dim, block, history, at_once):
    """pbar, seen and, without a history, dz, by the launches that csrc/plucker_mean.cpp makes."""
    valid, starts, r = problem.valid, problem.cu_seqlens, problem.inputs["z"].shape[-1]
    z = torch.nn.functional.pad(problem.inputs["z"], (0, -r % 8))
    batch, length, width = z.shape
    kept = [offset for offset in problem.offsets if offset < length]
    few, offsets = dict.fromkeys((f"o{i}" for i in range(8)), -1), z
    if len(kept) <= 8:
        few |= {f"o{i}": offset for i, offset in enumerate(kept)}
    else:
        offsets = torch.full((-(-len(kept) // 8) * 8,), -1, dtype=torch.int32)
        for first in range(0, len(kept), 8):
            group = (kept[first : first + 8] + [0] * 8)[:8]
            kernels.plucker_mean_offsets[(1,)](offsets, first, **{f"o{i}": offset for i, offset in enumerate(group)})
    sequences = 0 if starts is None else len(starts) - 1
    outputs = batch * (length - history)

    def nan(*shape, dtype=torch.float32):
        return torch.full(shape, float("nan"), dtype=dtype)

    stride = -(-outputs // 8) * 8
    blocks = -(-outputs // 64)
    frame, seen = nan(blocks, 2 * head_dim + 2, 64), nan(batch, length - history, dtype=z.dtype)
    angles = nan(blocks, 3 * len(kept), 64)
    pairs = few | dict(
        valid_ptr=z if valid is None else valid.to(torch.int8), cu_seqlens_ptr=z if starts is None else starts,
        offsets_ptr=offsets, frame_ptr=frame, pairs_ptr=angles, num_tokens=outputs, length=length, width=width,
        num_offsets=len(kept), has_valid=int(valid is not None), num_sequences=sequences,
        search_steps=max(0, sequences - 1).bit_length(), HEAD_DIM=head_dim, BLOCK_T=block, AT_ONCE=at_once,
    )  # fmt: skip
    planes = dict(frame_ptr=frame, r=r, rows=head_dim, stride=stride, BLOCK_T=8, BLOCK_R=16)
    kernels.plucker_mean_frame[(blocks * 64 // block,)](
        keeps_pairs=int(history == 0), z_ptr=z, seen_ptr=seen, history=history, **pairs
    )
    assert (frame.transpose(1, 2).flatten(0, 1)[outputs:] == 0).all()  # wgmma multiplies what is there by 0
    by_planes = nan(r * (r - 1) // 2, stride, dtype=z.dtype)
    kernels.plucker_mean_fwd[(stride // 8, -(-r // 16), 3)](pbar_ptr=by_planes, **planes)
    pbar = by_planes[:, :outputs].T.clone().view(batch, length - history, -1)
    if history > 0:
        return pbar, seen, None
    turn, grad_z = nan(blocks, 2 * head_dim, 64), nan(*z.shape, dtype=z.dtype)
    by_planes[:, :outputs] = problem.grad.flatten(0, 1).T
    kernels.plucker_mean_bwd_frame[(stride // 8, -(-head_dim // 16))](
        grad_pbar_ptr=by_planes, turn_ptr=turn, UNROLL=2, **planes
    )
    kernels.plucker_mean_bwd_token[(-(-outputs // block),)](
        turn_ptr=turn, grad_z_ptr=grad_z, grad_stride=width, **pairs
    )
    return pbar, seen, grad_z[..., :r]


def run_case(block, head_dim=16, dtype="float32", history=0, at_once=2, **case):
    """{output: relative error}."""
    problem = draw(mix=False, dtype=getattr(torch, dtype), **case)
    pbar, seen, grad_z = run(problem, head_dim, block, history, at_once)
    rows = problem.inputs["z"].shape[:2]
    position = torch.arange(rows[1])
    if problem.cu_seqlens is not None:
        starts = problem.cu_seqlens
        position = position - starts[torch.searchsorted(starts, position, right=True, out_int32=True) - 1]
    valid = torch.ones(rows, dtype=torch.bool) if problem.valid is None else problem.valid
    counted = torch.zeros_like(valid)
    for offset in problem.offsets:
        counted |= valid & valid.roll(offset, 1) & (position >= offset)
    truth = truth_of(problem)
    errors = {"seen": (seen.double() - counted[:, history:].double()).abs().max().item()}
    truth["out"] = truth["out"][:, history:]
    for name, actual in ({"out": pbar} | ({"grad_z": grad_z} if history == 0 else {})).items():
        # r = 2: pbar is a sign, and its gradient is what rounding leaves of the incoming one.
        size = truth[name].norm() if problem.inputs["z"].shape[-1] > 2 else problem.grad.double().norm()
        errors[name] = ((actual.double() - truth[name]).norm() / (size + 1e-30)).item()
    return errors
