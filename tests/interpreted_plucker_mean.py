"""The Triton kernels of plucker_mean and their errors; imported by the process of interpreter.py only."""

import torch
from grassmann import draw, truth_of

from triton_kernels import plucker_mean as kernels


def run(problem, head_dim, block, history):
    """pbar, seen and, without a history, dz, by the launches that csrc/plucker_mean.cpp makes."""
    z, valid = problem.inputs["z"], problem.valid
    batch, length, r = z.shape
    kept = [offset for offset in problem.offsets if offset < length]
    offsets = torch.full((-(-len(kept) // 8) * 8,), -1, dtype=torch.int32)
    for first in range(0, len(kept), 8):
        group = (kept[first : first + 8] + [0] * 8)[:8]
        kernels.plucker_mean_offsets[(1,)](offsets, first, **{f"o{i}": offset for i, offset in enumerate(group)})
    starts = problem.cu_seqlens
    sequences = 0 if starts is None else len(starts) - 1
    shared = dict(
        z_ptr=z, cu_seqlens_ptr=z if starts is None else starts, num_sequences=sequences,
        search_steps=max(0, sequences - 1).bit_length(), valid_ptr=z if valid is None else valid.to(torch.int8),
        offsets_ptr=offsets, num_tokens=batch * length, length=length, r=r, num_offsets=len(kept),
        has_valid=int(valid is not None), HEAD_DIM=head_dim, BLOCK_T=block,
    )  # fmt: skip
    grid = (-(-batch * length // block),)

    def nan(*shape, dtype=torch.float32):
        return torch.full(shape, float("nan"), dtype=dtype)

    outputs = length - history
    pbar, seen = nan(batch, outputs, r * (r - 1) // 2, dtype=z.dtype), nan(batch, outputs, dtype=z.dtype)
    few = {"num_tokens": batch * outputs, "history": history}
    kernels.plucker_mean_fwd[(-(-batch * outputs // block),)](pbar_ptr=pbar, seen_ptr=seen, **(shared | few))
    if history > 0:
        return pbar, seen, None
    own, share, grad_z = nan(*z.shape), nan(*z.shape), nan(*z.shape, dtype=z.dtype)
    kernels.plucker_mean_bwd_token[grid](grad_pbar_ptr=problem.grad, own_ptr=own, share_ptr=share, **shared)
    kernels.plucker_mean_bwd_gather[grid](own_ptr=own, share_ptr=share, grad_z_ptr=grad_z, **shared)
    return pbar, seen, grad_z


def run_case(block, head_dim=16, dtype="float32", history=0, **case):
    """{output: relative error}."""
    problem = draw(mix=False, dtype=getattr(torch, dtype), **case)
    pbar, seen, grad_z = run(problem, head_dim, block, history)
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
