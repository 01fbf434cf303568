"""Random routes, and the moves along them against plain torch."""

import reference
import torch
from problem import assert_close_to_truth

from simplex_ops import route_gather, route_replace, route_scatter_add


def draw_route(batch, length, slots, empty=0, device="cpu"):
    """Ascending unique indices, the last `empty` slots -1."""
    idx = torch.stack([torch.randperm(length)[:slots].sort().values for _ in range(batch)] or [torch.zeros(slots)])[
        :batch
    ]
    idx = idx.to(torch.int32)
    idx[:, slots - empty :] = -1
    return idx.to(device)


def draw(batch, length, slots, dim, dtype, device, empty=0, layout=lambda x: x):
    base = layout(torch.randn(batch, length, dim, device=device).to(dtype))
    y = layout(torch.randn(batch, slots, dim, device=device).to(dtype))
    gate = torch.rand(batch, length, device=device).to(reference.wide(dtype))
    return base, y, draw_route(batch, length, slots, empty, device), gate


def of_op(function, gate, idx):
    """The gate of every token as the op takes it: adding takes those of the slots."""
    return gate if gate is None or function.__name__ == "route_replace" else gate[:, : idx.shape[1]]


def evaluate(function, tensors, idx, incoming, dtype=None):
    """Output and gradients of function(tensors, idx), computed in `dtype`."""
    leaves = [None if x is None else (x.detach().to(dtype) if dtype else x.detach()).requires_grad_() for x in tensors]
    out = function(leaves, idx)
    present = [x for x in leaves if x is not None]
    return [out, *torch.autograd.grad(out, present, incoming.to(out.dtype))]


def check_scatter(base, y, idx, gate):
    """Both ways to put rows back."""
    incoming = torch.randn(base.shape, device=base.device).to(base.dtype)

    def run(function, dtype=None):
        tensors = base, y, of_op(function, gate, idx)
        return evaluate(lambda t, i: function(t[0], t[1], i, t[2]), tensors, idx, incoming, dtype)

    for function in (route_scatter_add, route_replace):
        of_torch = getattr(reference, function.__name__)
        truth, plain = run(of_torch, torch.float64), run(of_torch)
        for name, a, p, t in zip(("out", "base", "y", "gate"), run(function), plain, truth, strict=False):
            assert a.dtype == (reference.wide(base.dtype) if name == "gate" else base.dtype)
            slack = {torch.float32: 1e-5, torch.float64: 1e-14}[a.dtype] if name == "gate" else 0.0
            assert_close_to_truth(a, p, t, a.dtype, f"{function.__name__} {name}", slack)


def check_gather(x, idx):
    incoming = torch.randn(*idx.shape, x.shape[2], device=x.device).to(x.dtype)
    for a, e in zip(
        *(evaluate(lambda t, i, f=f: f(t[0], i), (x,), idx, incoming) for f in (route_gather, reference.route_gather)),
        strict=True,
    ):
        assert torch.equal(a, e)
