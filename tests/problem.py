"""Drawing attention problems, evaluating them three times (op, plain torch, truth) and judging the difference."""

import itertools
from dataclasses import dataclass

import reference
import torch

NAMES = ("q", "k1", "k2", "v1", "v2")

DTYPES = {"cpu": [torch.float32, torch.float64, torch.bfloat16]}
if torch.cuda.is_available():
    DTYPES["cuda"] = [torch.bfloat16, torch.float16, torch.float32]

# What rounding alone may cost, relative to the largest element (or the norm) of the truth: half a unit in the last
# place of the low-precision formats, which even the exact result has; some thirty in fp32, for sums of thousands of
# terms. fp64 has no wider truth to measure plain torch against, so this is its whole allowance.
FLOOR = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 4e-6, torch.float64: 1e-12}


def assert_close_to_truth(actual, plain, truth, dtype, what="", atol=0.0):
    """The 2x rule: |actual - truth| <= 2 |plain - truth| + FLOOR |truth| + atol, both in the largest element and in the
    root mean square (which sees a small error everywhere, as the maximum sees a large one somewhere). `plain` is plain
    torch in the dtype of the problem; `dtype` sets the floor. NaN or infinity in `actual` never passes."""
    assert actual.shape == truth.shape, f"{what}: shape {list(actual.shape)}, expected {list(truth.shape)}"
    if truth.numel() == 0:
        return
    actual, plain, truth = (x.detach().double() for x in (actual, plain, truth))
    norms = {"max": lambda x: x.abs().max().item(), "rms": lambda x: x.square().mean().sqrt().item()}
    for name, norm in norms.items():
        error, allowed = norm(actual - truth), 2 * norm(plain - truth) + FLOOR[dtype] * norm(truth) + atol
        assert error <= allowed, (
            f"{what}: {name} error {error:.3e}, allowed {allowed:.3e} "
            f"(plain torch {norm(plain - truth):.3e}, truth {norm(truth):.3e})"
        )


def contiguous(x):
    return x.contiguous()


def heads_first(x):
    """[B, N, H, D] seen through memory laid out as [B, H, N, D]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def fused(x):
    """A slice of one buffer that holds several projections, NaN around it."""
    buffer = x.new_full((*x.shape[:2], 3, *x.shape[2:]), torch.nan)
    buffer[:, :, 1] = x
    return buffer[:, :, 1]


def odd_offset(x):
    """Dense, but one element off any alignment."""
    buffer = x.new_full((x.numel() + 1,), torch.nan)
    buffer[1:] = x.reshape(-1)
    return buffer[1:].view(x.shape)


def padded_rows(x):
    """Rows of D + 3 elements: a stride that no vector load likes."""
    buffer = x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)
    buffer[..., : x.shape[-1]] = x
    return buffer[..., : x.shape[-1]]


def last_dim_strided(x):
    buffer = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
    buffer[..., ::2] = x
    return buffer[..., ::2]


def expanded(x):
    """One item seen by the whole batch, through a stride of 0."""
    return x[:1].expand(x.shape)


LAYOUTS = (contiguous, heads_first, fused, odd_offset, padded_rows, last_dim_strided, expanded)


@dataclass
class Problem:
    """Inputs q, k1, k2, v1, v2 and the gradients that flow in; grad_lse None leaves lse out of the loss."""

    inputs: list
    w1: int
    w2: int
    scale: float | None = None
    grad_out: torch.Tensor | None = None
    grad_lse: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None

    @property
    def dtype(self):
        return self.inputs[0].dtype


def draw(
    *, batch=2, n_q=None, n_k=16, kv_heads=1, ratio=2, dim=16, w1=5, w2=3, dtype=torch.float32, device="cpu",
    scale=None, grad_lse=True, layout=contiguous, lengths=None,
):  # fmt: skip
    """A problem of unit normal inputs. `layout` places every tensor, the incoming gradient included. `lengths`: of packed
    sequences, in place of batch, n_q and n_k."""
    cu_seqlens = None
    if lengths is not None:
        bounds = [0, *itertools.accumulate(lengths)]
        batch, n_q, n_k = 1, bounds[-1], bounds[-1]
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    n_q = n_k if n_q is None else n_q
    heads = kv_heads * ratio

    def normal(*shape):
        return torch.randn(shape, device=device).to(dtype)

    inputs = [layout(normal(batch, n_q, heads, dim))]
    inputs += [layout(normal(batch, n_k, kv_heads, dim)) for _ in range(4)]
    lse_gradient = torch.randn(batch, heads, n_q, device=device).to(reference.wide(dtype)) if grad_lse else None
    return Problem(inputs, w1, w2, scale, layout(normal(batch, n_q, heads, dim)), lse_gradient, cu_seqlens)


def evaluate(function, problem, dtype=None, inputs=None):
    """{'out', 'lse', 'grad_q', ..., 'grad_v2'} of `function`, computed in `dtype` (default: the problem's own)."""
    dtype = dtype or problem.dtype
    inputs = [x.detach().to(dtype).requires_grad_() for x in (inputs or problem.inputs)]
    packing = {} if problem.cu_seqlens is None else {"cu_seqlens": problem.cu_seqlens}
    out, lse = function(*inputs, problem.w1, problem.w2, scale=problem.scale, **packing)
    outputs, incoming = [out], [problem.grad_out.to(dtype)]
    if problem.grad_lse is not None:
        outputs, incoming = [out, lse], [*incoming, problem.grad_lse.to(reference.wide(dtype))]
    gradients = torch.autograd.grad(outputs, inputs, incoming)
    return {"out": out, "lse": lse} | {f"grad_{name}": g for name, g in zip(NAMES, gradients, strict=True)}


def check(function, problem, atol=0.0):
    """Holds the output, lse and all five gradients of `function` to the 2x rule; returns what it computed."""
    actual = evaluate(function, problem)
    truth = evaluate(reference.two_simplicial_attention, problem, torch.float64)
    plain = truth if problem.dtype == torch.float64 else evaluate(reference.two_simplicial_attention, problem)
    for name, x in actual.items():
        expected_dtype = reference.wide(problem.dtype) if name == "lse" else problem.dtype
        assert x.dtype == expected_dtype, f"{name}: {x.dtype}, expected {expected_dtype}"
        # lse is a sum of terms near 1 that may cancel to nothing, so its rounding is absolute
        slack = max(atol, FLOOR[problem.dtype]) if name == "lse" else atol
        assert_close_to_truth(x, plain[name], truth[name], problem.dtype, name, slack)
    return actual


def assert_is_product(out, v1, v2, ratio):
    """What a query with one visible pair returns: v1 * v2, rounded once. On the GPU to the last bit: there the exponent is
    one fused multiply-add, so that P is 1 to fp32's rounding, and fp32 products are made of tf32 ones."""
    expected = (v1 * v2).repeat_interleave(ratio, 2)
    last_bit = {torch.float32: 5e-7, torch.bfloat16: 2**-7, torch.float16: 2**-10}
    torch.testing.assert_close(out, expected, atol=0, rtol=last_bit[out.dtype] if out.is_cuda else 0)


def assert_same_bits(a, b, what=""):
    assert (a.shape, a.dtype) == (b.shape, b.dtype), what
    assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)), f"{what}: bits differ"


# Small problems, for the tests of what surrounds an op

# The most precise dtype of each device, so that a wrong gradient cannot hide behind rounding.
PRECISE = {"cpu": torch.float64, "cuda": torch.float32}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.05}


def small(device, **changes):
    return draw(**{"n_q": 13, "n_k": 19, "kv_heads": 2, "device": device, "dtype": PRECISE[device], **changes})


def op_names():
    """simplex::X of every op, backward ops included."""
    return sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("simplex::"))


def leaves(problem):
    return [x.clone().requires_grad_() for x in problem.inputs]


def truth_of(problem):
    return evaluate(reference.two_simplicial_attention, problem, torch.float64)


def assert_close(actual, expected):
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double().cpu(), expected.double().cpu(), rtol=tolerance, atol=tolerance)


def assert_truth(results, problem):
    """`results` maps some of out, lse, grad_q, ... to what was computed."""
    truth = truth_of(problem)
    assert results
    for name, actual in results.items():
        assert_close(actual, truth[name])


def backward(problem, out, lse):
    torch.autograd.backward([out, lse], [problem.grad_out, problem.grad_lse])


def grads_of(inputs):
    return {f"grad_{name}": x.grad for name, x in zip(NAMES, inputs, strict=True)}
