"""surprise_gate against its equations in fp64: every output, all seven gradients, every layout; what it may not see."""

import itertools
import re
from contextlib import nullcontext

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problem import DTYPES as PROBLEM_DTYPES
from problem import assert_close_to_truth, assert_same_bits, expanded, last_dim_strided, odd_offset, padded_rows
from torch._subclasses.fake_tensor import FakeTensorMode

import simplex_ops

OUTPUTS = ("g", "d_st", "ce", "cu")
INPUTS = ("x_in", "x_post", "x_prior", "beta_ce", "beta_cu", "o_ce", "m_cu")
DTYPES = {device: [*dict.fromkeys([*dtypes, torch.float16])] for device, dtypes in PROBLEM_DTYPES.items()}
PLACES = [*DTYPES, "fake cpu", "fake cuda"]
op = torch.ops.simplex.surprise_gate.default


def draw(
    batch, length, dim, dtype=torch.float32, device="cpu", layout=lambda x: x, parameters=(0.55, 0.44, 1.025, 1.1)
):
    x_in = torch.randn(batch, length, dim, device=device)
    rows = (x_in, x_in + torch.randn_like(x_in), x_in + 0.7 * torch.randn_like(x_in))
    numbers = [torch.tensor(p, dtype=reference.wide(dtype), device=device) for p in parameters]
    return [*(layout(x.to(dtype)) for x in rows), *numbers]


def evaluate(function, inputs, window, grad_g, dtype=None):
    """The outputs and the gradients of all inputs, computed in `dtype` (default: as given)."""
    leaves = [x.detach().to(reference.wide(dtype) if dtype and x.dim() == 0 else dtype or x.dtype) for x in inputs]
    leaves = [x.requires_grad_() for x in leaves]
    outputs = function(*leaves, window)
    grads = torch.autograd.grad(outputs[0], leaves, grad_g.to(outputs[0].dtype))
    return dict(zip(OUTPUTS, outputs, strict=True)) | {f"grad_{n}": g for n, g in zip(INPUTS, grads, strict=True)}


def check(inputs, window=100):
    grad_g = torch.randn(inputs[0].shape[:2], device=inputs[0].device)
    dtype = inputs[0].dtype
    actual = evaluate(simplex_ops.surprise_gate, inputs, window, grad_g)
    truth = evaluate(reference.surprise_gate, inputs, window, grad_g, torch.float64)
    plain = evaluate(reference.surprise_gate, inputs, window, grad_g)
    for name, x in actual.items():
        wanted = dtype if name.removeprefix("grad_") in INPUTS[:3] else reference.wide(dtype)
        assert x.dtype == wanted, name
        # ce and cu are differences, and the parameters' gradients sums of either sign, whose terms are of order 1
        terms = 1 if name in OUTPUTS else grad_g.numel() ** 0.5
        relative, of_rows = (1e-12, 1e-15) if dtype == torch.float64 else (4e-6, 1e-12)
        slack = of_rows if name.startswith("grad_x") else terms * relative
        assert_close_to_truth(x, plain[name], truth[name], x.dtype, name, slack)
    return actual


@pytest.mark.parametrize("length", [1, 2, 99, 100, 101, 1024])
def test_against_the_equations(device, length):
    for dtype in DTYPES[device]:
        check(draw(2, length, 40, dtype, device))


def test_a_long_sequence(device):
    check(draw(1, 65536, 8, torch.float32, device))


@pytest.mark.parametrize("window", [1, 2, 7, 12, 13, 14, 100, 2**31 - 1])
def test_window(device, window):
    check(draw(3, 13, 8, torch.float32, device), window)


def test_layouts(device):
    for layout, dtype in itertools.product((odd_offset, padded_rows, last_dim_strided, expanded), DTYPES[device]):
        check(draw(3, 5, 24, dtype, device, layout))


@pytest.mark.parametrize("dim", [1, 3, 7, 9])
def test_odd_dims(dim):
    check(draw(2, 6, dim))


@pytest.mark.parametrize("parameters", [(0.0, 0.0, 1.0, 0.0), (-3.0, 50.0, 0.0, 2.0), (100.0, 100.0, 4.0, 1.0)])
def test_extreme_parameters(device, parameters):
    check(draw(2, 33, 16, torch.float32, device, parameters=parameters))


def test_nothing(device):
    for shape in ((0, 5, 8), (2, 0, 8)):
        inputs = [x.requires_grad_() for x in draw(*shape, device=device)]
        outputs = simplex_ops.surprise_gate(*inputs)
        assert [x.shape for x in outputs] == [shape[:2]] * 4
        grads = torch.autograd.grad(outputs[0], inputs, torch.ones_like(outputs[0]))
        assert [g.shape for g in grads] == [x.shape for x in inputs]
        assert all(g.sum() == 0 for g in grads)


def test_no_row_sees_another_and_no_token_a_later_one(device):
    inputs = draw(3, 150, 16, device=device)
    before = op(*inputs, 20)
    changed = [x.clone() for x in inputs]
    for x in changed[:3]:
        x[1] = torch.nan
        x[:, 90:] += 5
    after = op(*changed, 20)
    for a, b in zip(before, after, strict=True):
        assert_same_bits(a[::2, :90], b[::2, :90])
        assert not torch.equal(a[0, 90:], b[0, 90:])


def test_the_average_forgets(device):
    """An outlier, infinity included, leaves the window without a trace."""
    inputs = draw(1, 64, 8, device=device)
    inputs[1][0, 20] = torch.inf
    clean = draw(1, 64, 8, device=device)
    clean[:3] = [x.clone() for x in inputs[:3]]
    clean[1][0, 20] = 0
    a, b = (op(*x[:3], *inputs[3:], 10)[3][0, 30:] for x in (inputs, clean))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_deterministic(device):
    inputs = draw(4, 300, 64, device=device)
    grad = torch.randn(4, 300, device=device)
    first, second = (evaluate(simplex_ops.surprise_gate, inputs, 100, grad) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


def test_gradcheck(device):
    if device != "cpu":
        pytest.skip("fp64 is on the CPU only")
    # m_cu and the average: the average is constant to autograd but not to finite differences, so window gradients of x are
    # checked with m_cu = 0, and m_cu itself with x fixed.
    inputs = draw(2, 5, 3, torch.float64, parameters=(0.5, 0.4, 1.0, 0.0))
    inputs = [x.requires_grad_() for x in inputs[:6]] + inputs[6:]
    assert torch.autograd.gradcheck(lambda *x: simplex_ops.surprise_gate(*x, 3)[0], inputs)
    inputs = [x.detach() for x in inputs]
    inputs[6] = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: simplex_ops.surprise_gate(*x, 3)[0], inputs)


def test_statistics_are_not_differentiable(device):
    outputs = simplex_ops.surprise_gate(*(x.requires_grad_() for x in draw(1, 4, 8, device=device)))
    assert [x.requires_grad for x in outputs] == [True, False, False, False]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, requires_grad):
    inputs = [x.requires_grad_(requires_grad) for x in draw(2, 7, 16, device=device)]
    torch.library.opcheck(op, (*inputs, 3))
    g, d_st, ce, cu = (x.detach() for x in op(*inputs, 3))
    backward = torch.ops.simplex.surprise_gate_backward.default
    torch.library.opcheck(backward, (torch.ones_like(g), *(x.detach() for x in inputs), d_st, ce, cu, 3))


def test_compile(device):
    compiled = torch.compile(
        lambda *x: simplex_ops.surprise_gate(*x, 4)[0].square().sum(), fullgraph=True, dynamic=True
    )
    for batch, length in ((2, 7), (3, 9)):
        inputs = [x.requires_grad_() for x in draw(batch, length, 16, device=device)]
        expected = simplex_ops.surprise_gate(*inputs, 4)[0].square().sum()
        got = compiled(*inputs)
        torch.testing.assert_close(got, expected)
        for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
            torch.testing.assert_close(a, b)


def test_export(device):
    class Gate(torch.nn.Module):
        def forward(self, *x):
            return simplex_ops.surprise_gate(*x)

    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1)
    shapes = ((*[{0: batch, 1: length}] * 3, *[{}] * 4),)
    program = torch.export.export(Gate(), tuple(draw(2, 6, 16, device=device)), dynamic_shapes=shapes).module()
    for size in ((1, 1), (5, 130)):
        inputs = draw(*size, 16, device=device)
        torch.testing.assert_close(tuple(program(*inputs)), op(*inputs))


def test_autocast_keeps_float32(device):
    inputs = draw(2, 8, 16, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        g = simplex_ops.surprise_gate(*inputs)[0]
    assert_same_bits(g, op(*inputs)[0])


BAD = {
    "rank": ({"x_in": (4, 8)}, "expected x_in to be 3-dimensional [batch, length, dim], got 2 dimensions"),
    "x_post": ({"x_post": (2, 5, 8)}, "expected x_post to have shape [2, 4, 8] (that of x_in), got [2, 5, 8]"),
    "x_prior": ({"x_prior": (2, 4)}, "expected x_prior to have shape [2, 4, 8] (that of x_in), got [2, 4]"),
    "dtype": ({"x_prior": torch.bfloat16}, "expected x_prior to have the dtype of x_in (Float), got BFloat16"),
    "integers": ({"all": torch.int32}, "expected x_in to be float32, "),
    "no dim": (dict.fromkeys(INPUTS[:3], (2, 4, 0)), "expected the last dim of x_in to be at least 1, got 0"),
    "vector": ({"o_ce": (1,)}, "expected o_ce to have shape [] (one number), got [1]"),
    "low": ({"beta_cu": torch.bfloat16}, "expected beta_cu to have dtype Float, got BFloat16"),
    "window 0": ({"window": 0}, "expected window to be at least 1, got 0"),
    "window 2^31": ({"window": 2**31}, "expected window to be below 2^31, got 2147483648"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("place", [pytest.param(p, marks=[pytest.mark.gpu] * (p == "cuda")) for p in PLACES])
def test_bad_input(place, name):
    changes, error = BAD[name]

    def call():
        given = []
        for argument in INPUTS:
            change = changes.get(argument)
            dtype = changes.get("all", torch.float32) if argument in INPUTS[:3] else torch.float32
            dtype = change if isinstance(change, torch.dtype) else dtype
            shape = (2, 4, 8) if argument in INPUTS[:3] else ()
            shape = change if isinstance(change, tuple) else shape
            given.append(torch.zeros(shape, dtype=dtype, device=place.split()[-1]))
        op(*given, changes.get("window", 5))

    with (
        FakeTensorMode() if place.startswith("fake") else nullcontext(),
        pytest.raises((RuntimeError, ValueError)) as error_info,
    ):
        call()
    assert re.search(re.escape(f"surprise_gate: {error}"), str(error_info.value)), error_info.value


@given(
    batch=st.integers(0, 3), length=st.integers(1, 40), dim=st.integers(1, 40), window=st.integers(1, 60),
    dtype=st.sampled_from(DTYPES["cpu"]), seed=st.integers(0, 2**32),
)  # fmt: skip
@settings(max_examples=300)
def test_any_shape(batch, length, dim, window, dtype, seed):
    torch.manual_seed(seed)
    check(draw(batch, length, dim, dtype), window)
