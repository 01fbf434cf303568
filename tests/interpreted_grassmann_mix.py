"""The columns of grassmann_mix's weight on Hopper, and the token kernels beside; imported by the process of interpreter.py only."""

import torch

from triton_kernels import grassmann_mix_weight as kernels

kernels.gdc_wait = kernels.gdc_launch_dependents = lambda: None  # one kernel at a time here


def run_case(r, d):
    """{output: error}: the weight and the bias in the order of the tiles, frames, and dz."""
    planes = r * (r - 1) // 2
    weight, bias = torch.randn(d, planes).half(), torch.randn(d).half()
    columns = torch.full((d, 512), float("nan")).half()
    z, frame, none = torch.randn(3, 32).half(), torch.full((1, 66, 64), float("nan")), torch.zeros(8, dtype=torch.int32)
    pairs = torch.full((1, 3, 64), float("nan"))
    kernels.grassmann_mix_start[(2 + d,)](
        valid_ptr=none.to(torch.int8), cu_seqlens_ptr=none, offsets_ptr=none, **{f"o{i}": 1 for i in range(8)},
        frame_ptr=frame, pairs_ptr=pairs, keeps_pairs=1, z_ptr=z, seen_ptr=torch.zeros(3).half(), history=0, num_tokens=3,
        length=3, width=32, num_offsets=1, has_valid=0, num_sequences=0, search_steps=0, weight_ptr=weight, bias_ptr=bias,
        has_bias=1, columns_ptr=columns, r=r, HEAD_DIM=32, BLOCK_T=32, AT_ONCE=2,
    )  # fmt: skip
    turn, grad_z = torch.zeros(1, 64, 64), torch.full((3, 32), float("nan")).half()
    kernels.grassmann_mix_finish[(2,)](
        valid_ptr=none.to(torch.int8), cu_seqlens_ptr=none, offsets_ptr=none, **{f"o{i}": 1 for i in range(8)},
        frame_ptr=frame, pairs_ptr=pairs, turn_ptr=turn, grad_z_ptr=grad_z, grad_stride=32, num_tokens=3, length=3, width=32,
        num_offsets=1, has_valid=0, num_sequences=0, search_steps=0, HEAD_DIM=32, BLOCK_T=32, AT_ONCE=2,
    )  # fmt: skip
    u = z.double() / z.double().norm(dim=1, keepdim=True)
    return {
        "columns": (columns != 0).sum(1).sub(planes + 1).abs().max().item(),
        "weight, bias": (columns.double().sum(1) - weight.double().sum(1) - bias.double()).abs().max().item(),
        "grad_z": grad_z.abs().max().item(),  # of a turn of 0
        "frame": (frame[0, :32, :3].mT - u).abs().max().item(),
    }
