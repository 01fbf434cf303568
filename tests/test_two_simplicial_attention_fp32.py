"""fp32 on tensor cores is made of bf16 or tf32 products: numbers of any size and infinities must not show it."""

from functools import partial

import pytest
import reference
import torch
from problem import assert_close_to_truth, check, draw, evaluate

import simplex_ops

op = partial(simplex_ops.two_simplicial_attention, return_lse=True)
SIZES = {
    "large keys": (1e-30, 1e15, 1e15, 1, 1),
    "small keys": (1e30, 1e-15, 1e-15, 1, 1),
    "large values": (1, 1, 1, 1e15, 1e18),
    "small values": (1, 1, 1, 1e-15, 1e-15),
    "one tiny value": (1, 1, 1, 1e-30, 1),
    "one tiny key": (1, 1e-30, 1, 1, 1e-25),
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("ratio", "w"), [(64, (40, 9)), (3, (9, 40))])
def test_numbers_of_any_size(device, ratio, w, sizes):
    """Output and gradients; none of the products that they need leaves fp32's range."""
    problem = draw(batch=1, n_k=70, ratio=ratio, dim=64, w1=w[0], w2=w[1], device=device)
    problem.inputs = [x * size for x, size in zip(problem.inputs, SIZES[sizes], strict=True)]
    check(op, problem)


@pytest.mark.parametrize("dim", [64, 128])
def test_sums_of_thousands_of_terms_of_one_sign(device, dim):
    """The tensor cores cut off what fp32 would round: in a long sum that would always take away."""
    problem = draw(batch=1, n_k=200, ratio=2, dim=dim, w1=200, w2=50, device=device, grad_lse=False)
    problem.inputs[3:] = [torch.full_like(x, 1.1) for x in problem.inputs[3:]]
    problem.grad_out = torch.ones_like(problem.grad_out)
    actual, plain = evaluate(op, problem), evaluate(reference.two_simplicial_attention, problem)
    truth = evaluate(reference.two_simplicial_attention, problem, torch.float64)
    for name in ("out", "grad_v1", "grad_v2"):  # those of q and k are rounding alone: all values are equal
        assert_close_to_truth(actual[name], plain[name], truth[name], torch.float32, name)


@pytest.mark.parametrize("name", [3, 4], ids=("v1", "v2"))
def test_values_next_to_the_smallest_number(device, name):
    """Parts below 2^-133 may vanish: a hundredth of the smallest normal number of fp32."""
    problem = draw(batch=1, n_k=70, ratio=64, dim=64, w1=40, w2=9, device=device)
    problem.inputs[name] *= 1e-36
    out, _ = op(*problem.inputs, 40, 9)
    truth, _ = reference.two_simplicial_attention(*(x.double() for x in problem.inputs), 40, 9)
    torch.testing.assert_close(out.double(), truth, atol=2.0**-130, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize(("ratio", "w"), [(64, (40, 9)), (3, (9, 40))])
def test_a_key_of_minus_infinity_is_not_attended_to(ratio, w, axis):
    """All its logits are -inf, as fp32 has it; its parts would give NaN (inf - inf, 0 * inf)."""
    problem = draw(batch=1, n_k=70, ratio=ratio, dim=64, w1=w[0], w2=w[1], device="cuda")
    problem.inputs[:3] = [x.abs() + 0.1 for x in problem.inputs[:3]]
    problem.inputs[axis][:, 30, :, 5] = -torch.inf
    truth = reference.two_simplicial_attention(*(x.double() for x in problem.inputs), *w)
    plain = reference.two_simplicial_attention(*problem.inputs, *w)
    assert truth[0].isfinite().all()
    for name, x, p, t in zip(("out", "lse"), op(*problem.inputs, *w), plain, truth, strict=True):
        assert_close_to_truth(x, p, t, torch.float32, name)


@pytest.mark.gpu
@pytest.mark.parametrize("value", [torch.inf, torch.nan, -torch.nan])
@pytest.mark.parametrize("name", range(5), ids=("q", "k1", "k2", "v1", "v2"))
def test_what_is_not_finite_stays_so(name, value):
    """Where plain torch in fp32 has no finite number there is none, and elsewhere the right one (or none)."""
    problem = draw(batch=1, n_k=70, ratio=8, dim=64, w1=30, w2=9, device="cuda")
    problem.inputs[name][:, 20, :, 3] = value
    out, lse = op(*problem.inputs, 30, 9)
    plain = reference.two_simplicial_attention(*problem.inputs, 30, 9)
    assert not plain[0].isfinite().all()
    for x, p in zip((out, lse), plain, strict=True):
        assert not (x.isfinite() & ~p.isfinite()).any()
        both = x.isfinite() & p.isfinite()
        torch.testing.assert_close(x[both], p[both], atol=1e-5, rtol=1e-5)
    assert out[:, :20].isfinite().any()
