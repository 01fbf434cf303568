"""The Triton kernel of grassmann_layer and its errors; imported by the process of interpreter.py only."""

import reference
import torch

from triton_kernels import grassmann_layer as kernels


def run_case(tokens, dim, block, dtype):
    """{output: relative error}; memory starts as NaN."""
    dtype = getattr(torch, dtype)
    x, g = (torch.randn(tokens, dim).to(dtype) for _ in range(2))
    w_x, w_g = (torch.randn(dim, dim).div(dim**0.5).to(dtype) for _ in range(2))
    bias = torch.randn(dim).to(dtype)
    logits, out = (torch.full_like(x, float("nan")) for _ in range(2))
    kernels.grassmann_layer_gate[(-(-tokens // block) * (dim // block),)](
        x, g, w_x, w_g, bias, out, logits, tokens, dim, BLOCK_M=block, BLOCK_N=block, BLOCK_K=16
    )
    x, g, w_x, w_g, bias = (t.double() for t in (x, g, w_x, w_g, bias))
    want = {"logits": x @ w_x.T + g @ w_g.T + bias}
    want["out"] = reference.grassmann_blend(x, g, want["logits"])
    actual = {"logits": logits, "out": out}
    return {name: ((actual[name].double() - want[name]).norm() / want[name].norm()).item() for name in want}
