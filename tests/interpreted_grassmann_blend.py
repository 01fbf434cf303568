"""The Triton kernels of grassmann_blend and their errors; imported by the process of interpreter.py only."""

import reference
import torch

from triton_kernels import grassmann_blend as kernels


def run_case(numel, block, dtype="float32", row=0):
    """{output: relative error}; memory starts as NaN, and what lies behind it must stay NaN.

    With a `row`, the gradient of the logits has rows of so many elements, with a gap of 8 behind each.
    """
    h, g, logits, grad = (torch.randn(numel).to(getattr(torch, dtype)) for _ in range(4))
    inputs = dict(h_ptr=h, g_ptr=g, logits_ptr=logits)
    names = ("out", "grad_h", "grad_g", "grad_logits")
    outputs = {name: torch.full((3 * numel + block,), torch.nan, dtype=h.dtype) for name in names}
    grid = (-(-numel // block),)
    kernels.grassmann_blend_fwd[grid](**inputs, out_ptr=outputs["out"], numel=numel, BLOCK=block)
    pointers = {f"{name}_ptr": outputs[name] for name in names[1:]}
    rows = dict(row_chunks=row // 8 if row else 2**31 - 1, stride=row + 8 if row else 0)
    kernels.grassmann_blend_bwd[grid](grad_out_ptr=grad, **inputs, **pointers, **rows, numel=numel, BLOCK=block)
    if row:
        gapped = outputs["grad_logits"][: numel // row * (row + 8)].view(-1, row + 8)
        assert gapped[:, row:].isnan().all()
        outputs["grad_logits"][:numel] = gapped[:, :row].flatten()
        outputs["grad_logits"][numel:] = torch.nan

    wide = [x.double().requires_grad_() for x in (h, g, logits)]
    out = reference.grassmann_blend(*wide)
    truth = dict(zip(names, (out, *torch.autograd.grad(out, wide, grad.double())), strict=True))
    errors = {
        name: ((x[:numel].double() - truth[name]).norm() / truth[name].norm()).item() for name, x in outputs.items()
    }
    return errors | {"behind": max(float(not x[numel:].isnan().all()) for x in outputs.values())}
