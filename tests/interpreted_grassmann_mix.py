"""The columns of grassmann_mix's weight on Hopper and back; imported by the process of interpreter.py only."""

import torch

from triton_kernels import grassmann_mix_weight as kernels

kernels.gdc_wait = lambda: None  # one kernel at a time here


def run_case(r, d):
    """{output: error}: the weight and the bias, put in the order of the tiles, and two parts of them summed in theirs."""
    planes = r * (r - 1) // 2
    weight, bias = torch.randn(d, planes).half(), torch.randn(d).half()
    columns, grad_weight, grad_bias = (torch.full(s, float("nan")).half() for s in ((d, 512), (d, planes), (d,)))
    z, frame, none = torch.randn(3, 32).half(), torch.full((66, 8), float("nan")), torch.zeros(8, dtype=torch.int32)
    kernels.grassmann_mix_start[(1 + d,)](
        valid_ptr=none.to(torch.int8), cu_seqlens_ptr=none, offsets_ptr=none, **{f"o{i}": 1 for i in range(8)},
        frame_ptr=frame, z_ptr=z, seen_ptr=torch.zeros(3).half(), history=0, num_tokens=3, length=3, width=32, stride=8,
        num_offsets=1, has_valid=0, num_sequences=0, search_steps=0, weight_ptr=weight, bias_ptr=bias, has_bias=1,
        columns_ptr=columns, r=r, HEAD_DIM=32, BLOCK_T=4,
    )  # fmt: skip
    parts = columns.float().mT * torch.tensor([0.5, 0.0, 1.5])[:, None, None]
    kernels.grassmann_mix_bwd_weight_sum[(512 // 4, -(-d // 16))](
        parts.contiguous(), grad_weight, grad_bias, 3, d, r, BLOCK_C=4, BLOCK_D=16, AT_ONCE=2
    )
    u = z.double() / z.double().norm(dim=1, keepdim=True)
    return {
        "columns": (columns != 0).sum(1).sub(planes + 1).abs().max().item(),
        "weight": (grad_weight - 2 * weight).abs().max().item(),
        "bias": (grad_bias - 2 * bias).abs().max().item(),
        "frame": (frame[:32, :3].mT - u).abs().max().item(),
    }
