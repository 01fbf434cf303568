"""Drawing problems of Grassmann mixing, evaluating them three times (op, plain torch, truth) and judging the difference."""

from dataclasses import dataclass

import reference
import torch
from problem import FLOOR, assert_close_to_truth, contiguous

DTYPES = {"cpu": [torch.float32, torch.float64, torch.bfloat16, torch.float16]}
if torch.cuda.is_available():
    DTYPES["cuda"] = [torch.bfloat16, torch.float16, torch.float32]
PAPER_OFFSETS = (1, 2, 4, 8, 12, 16)


@dataclass
class Problem:
    inputs: dict  # z, and for grassmann_mix weight and bias or None
    offsets: tuple
    grad: torch.Tensor
    valid: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    options: dict | None = None  # further arguments of the op


def tokens(kind, batch, length, r, device="cpu"):
    """Unit normal tokens; "degenerate": many of them 0 or a multiple of an earlier one, "scaled": of very unequal sizes."""
    z = torch.randn(batch, length, r, device=device)
    if kind == "scaled":
        return z * 10 ** torch.empty(batch, length, 1, device=device).uniform_(-3, 3)
    if kind == "degenerate":
        for t in range(length):
            factor = (0.0, 1.0, -1.0, 0.125, 3.0, None, None)[int(torch.randint(7, ()))]
            if factor is not None and t > 0:
                z[:, t] = factor * z[:, max(0, t - int(torch.randint(1, 4, ())))]
    return z


def draw(
    *, batch=2, length=17, r=7, d=5, offsets=PAPER_OFFSETS, dtype=torch.float32, device="cpu", kind="normal", mix=True,
    bias=True, masked=False, packed=False, layout=contiguous, options=None,
):  # fmt: skip
    def normal(*shape):
        return torch.randn(shape, device=device).to(dtype)

    if packed:
        batch = 1
    planes = r * (r - 1) // 2
    inputs = {"z": layout(tokens(kind, batch, length, r, device).to(dtype))}
    if mix:
        inputs |= {"weight": normal(d, planes), "bias": normal(d) if bias else None}
    valid = torch.rand(batch, length, device=device) < 0.7 if masked else None
    grad = normal(batch, length, d if mix else planes)
    return Problem(inputs, offsets, grad, valid, starts(length, device) if packed else None, options or {})


def starts(length, device):
    """Bounds of about one sequence in eight tokens, some of them without any."""
    inner = torch.randint(length + 1, (length // 8 + 2,))
    return torch.cat([torch.tensor([0, length]), inner, inner[:1]]).sort().values.to(device, torch.int32)


def evaluate(function, problem, dtype=None):
    """{'out', 'grad_z', ...} of function(*inputs, offsets, valid=, cu_seqlens=, **options), computed in `dtype` (default: its own)."""
    inputs = {
        n: x if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for n, x in problem.inputs.items()
    }
    out = function(
        *inputs.values(), problem.offsets, valid=problem.valid, cu_seqlens=problem.cu_seqlens, **problem.options
    )
    given = {name: x for name, x in inputs.items() if x is not None}
    gradients = torch.autograd.grad(out, list(given.values()), problem.grad.to(out.dtype))
    return {"out": out.detach()} | {f"grad_{name}": x for name, x in zip(given, gradients, strict=True)}


def truth_of(problem):
    mix = "weight" in problem.inputs
    return evaluate(reference.grassmann_mix if mix else reference.plucker_mean, problem, torch.float64)


def check(function, problem, atol=0.0):
    """Holds the output and every gradient of `function` to the 2x rule; returns what it computed."""
    actual, truth = evaluate(function, problem), truth_of(problem)
    dtype = problem.grad.dtype
    mix = "weight" in problem.inputs
    plain = truth
    if dtype != torch.float64:
        plain = evaluate(reference.grassmann_mix if mix else reference.plucker_mean, problem)
    for name, x in actual.items():
        assert x.dtype == dtype, f"{name}: {x.dtype}, expected {dtype}"
        slack = _cancelled(problem, truth) if name == "grad_z" else 0
        assert_close_to_truth(x, plain[name], truth[name], dtype, name, atol + FLOOR[dtype] * slack)
    return actual


def _cancelled(problem, truth):
    """The size of what the gradient of z cancels from where r = 2: the mean is a sign then, which z hardly changes."""
    z = problem.inputs["z"].double()
    norms = z.norm(dim=-1)[z.norm(dim=-1) > 0]
    if z.shape[-1] > 2 or norms.numel() == 0 or problem.grad.numel() == 0:
        return 0
    weight = problem.inputs["weight"].double().norm().item() if "weight" in problem.inputs else 1
    return weight * problem.grad.double().norm(dim=-1).max().item() / norms.min().item()
