"""The causal router's logits: value and every gradient against the equation, bits that no length changes, every error."""

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
from torch.utils.flop_counter import FlopCounterMode

from simplex_ops import causal_route_logits

op, backward = torch.ops.simplex.causal_route_logits.default, torch.ops.simplex.causal_route_logits_backward.default
DTYPES = {device: [*dict.fromkeys([*dtypes, torch.float16])] for device, dtypes in PROBLEM_DTYPES.items()}


def draw(batch, length, dim, dtype, device, layout=lambda x: x):
    """x, weight, prev"""
    x = layout(torch.randn(batch, length, dim, device=device).to(dtype))
    weight = torch.randn(2 * dim, device=device).to(reference.wide(dtype)) / max(dim, 1) ** 0.5
    return x, weight, torch.randn(batch, dim, device=device).to(dtype)


def evaluate(function, tensors, incoming, dtype=None):
    leaves = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, [x for x in leaves if x is not None], incoming.to(out.dtype))]


def check(x, weight, prev):
    incoming = torch.randn(x.shape[:2], device=x.device)
    actual = evaluate(causal_route_logits, (x, weight, prev), incoming)
    plain = evaluate(reference.causal_route_logits, (x, weight, prev), incoming)
    truth = evaluate(reference.causal_route_logits, (x, weight, prev), incoming, torch.float64)
    for name, a, p, t in zip(("logits", "x", "weight", "prev"), actual, plain, truth, strict=False):
        assert a.dtype == (reference.wide(x.dtype) if name in ("logits", "weight") else x.dtype)
        # Sums in fp32 of a few thousand products near 1 that may cancel.
        assert_close_to_truth(a, p, t, a.dtype, name, 1e-5 if a.dtype == torch.float32 else 0.0)


@pytest.mark.parametrize("length", [1, 2, 99, 100, 101, 1024, 65536])
def test_is_its_equation(device, length):
    for dtype in DTYPES[device]:
        for dim in (8, 200) if length < 65536 else (8,):
            x, weight, prev = draw(2, length, dim, dtype, device)
            check(x, weight, prev)
            check(x, weight, None)
            check(x, weight[:dim], None)


def test_wide_rows_and_many_blocks(device):
    for dtype in DTYPES[device]:
        x, weight, prev = draw(1, 70, 2056, dtype, device)
        check(x, weight, prev)
        check(x, weight[:2056], None)


def test_layouts(device):
    for layout in (odd_offset, padded_rows, last_dim_strided, expanded):
        x, weight, prev = draw(3, 9, 16, torch.float32, device, layout)
        check(x, odd_offset(weight), prev.t().contiguous().t())


def test_nothing_to_score(device):
    for shape in ((0, 5, 8), (2, 0, 8), (2, 5, 0)):
        x, weight, prev = draw(*shape, torch.float32, device)
        for before in (prev, None):
            out, grad_x, grad_weight, *rest = evaluate(
                causal_route_logits, (x, weight, before), torch.ones(shape[:2], device=device)
            )
            assert (out.shape, grad_x.shape) == (shape[:2], shape)
            assert out.abs().sum() == 0
            assert grad_weight.abs().sum() == 0
            assert all(g.abs().sum() == 0 for g in rest)


def test_a_token_alone_has_the_bits_of_its_sequence(device):
    for dtype in DTYPES[device]:
        x, weight, prev = draw(3, 37, 200, dtype, device)
        whole = causal_route_logits(x, weight, prev)
        for t in range(37):
            alone = causal_route_logits(x[:, t : t + 1], weight, x[:, t - 1] if t else prev)
            assert_same_bits(alone, whole[:, t : t + 1].contiguous())
        assert_same_bits(causal_route_logits(x[1:2, :20], weight, prev[1:2]), whole[1:2, :20].contiguous())


def test_two_runs_give_the_same_bits(device):
    x, weight, prev = draw(2, 300, 72, torch.float32, device)
    incoming = torch.randn(2, 300, device=device)
    for a, b in zip(*(evaluate(causal_route_logits, (x, weight, prev), incoming) for _ in range(2)), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize(("looks_back", "with_prev"), [(False, False), (True, False), (True, True)])
def test_gradcheck_and_opcheck(device, looks_back, with_prev):
    x, weight, prev = draw(2, 5, 8, torch.float32, device)
    weight, rest = weight if looks_back else weight[:8], (prev,) if with_prev else ()
    torch.library.opcheck(backward, (torch.randn(2, 5, device=device), x, weight, *rest))
    torch.library.opcheck(op, (x, weight, *rest))
    leaves = [t.requires_grad_() for t in (x, weight, *rest)]
    torch.library.opcheck(op, tuple(leaves))
    if device == "cpu":
        assert torch.autograd.gradcheck(
            causal_route_logits, tuple(t.detach().double().requires_grad_() for t in leaves)
        )


def test_compile_export_and_autocast(device):
    class Router(torch.nn.Module):
        def forward(self, x, weight, prev):
            return causal_route_logits(x, weight, prev), causal_route_logits(x, weight)

    compiled = torch.compile(Router(), fullgraph=True, dynamic=True)
    cases = [draw(b, n, 16, torch.float32, device) for b, n in ((2, 6), (3, 9))]
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)
    shapes = {"x": {0: batch, 1: length}, "weight": {}, "prev": {0: batch}}
    exported = torch.export.export(Router(), cases[0], dynamic_shapes=shapes).module()
    for case in cases:
        for function in (compiled, exported):
            torch.testing.assert_close(function(*case), Router()(*case))
    with torch.autocast(device, dtype=torch.bfloat16):
        assert_same_bits(causal_route_logits(*cases[0]), Router()(*cases[0])[0])


def test_flops(device):
    x, weight, prev = (t.requires_grad_() for t in draw(2, 5, 8, torch.float32, device))
    with FlopCounterMode(display=False) as counter:
        causal_route_logits(x, weight, prev).sum().backward()
    assert counter.get_total_flops() == 3 * 4 * 2 * 5 * 8
    with FlopCounterMode(display=False) as counter:
        causal_route_logits(x, weight[:8])
    assert counter.get_total_flops() == 2 * 2 * 5 * 8


GOOD = {"x": (2, 5, 8), "weight": (16,), "prev": (2, 8)}
BAD = [
    ({"x": (5, 8)}, "x to be 3-dimensional [batch, length, dim], got 2 dimensions"),
    ({"x": torch.int32}, "x to be float32"),
    ({"weight": (9,)}, "weight to have shape [16] (twice the last dim of x, or once), got [9]"),
    ({"weight": (1, 8)}, "weight to have shape [16] (twice the last dim of x, or once), got [1, 8]"),
    ({"weight": (8,)}, "no prev with a weight of 8 elements, which looks at no token before"),
    ({"weight": torch.float16}, "weight to have dtype Float, got Half"),
    ({"prev": (2, 9)}, "prev to have shape [2, 8] (batch, last dim of x), got [2, 9]"),
    ({"prev": torch.float16}, "prev to have the dtype of x (Float), got Half"),
    ({"grad_logits": (2, 4)}, "grad_logits to have shape [2, 5] (batch, length of x), got [2, 4]"),
    ({"grad_logits": torch.float64}, "grad_logits to have dtype Float, got Double"),
]
PLACES = [*DTYPES, "fake cpu", "fake cuda"]


@pytest.mark.parametrize(("changes", "error"), BAD)
@pytest.mark.parametrize("place", [pytest.param(p, marks=[pytest.mark.gpu] * (p == "cuda")) for p in PLACES])
def test_bad_input(place, changes, error):
    name = "causal_route_logits_backward" if "grad_logits" in changes else "causal_route_logits"
    shapes = ({"grad_logits": (2, 5)} if name.endswith("backward") else {}) | GOOD

    def make(key, shape):
        change = changes.get(key)
        dtype = change if isinstance(change, torch.dtype) else torch.float32
        return torch.zeros(change if isinstance(change, tuple) else shape, dtype=dtype, device=place.split()[-1])

    with (
        FakeTensorMode() if place.startswith("fake") else nullcontext(),
        pytest.raises((RuntimeError, ValueError)) as info,
    ):
        getattr(torch.ops.simplex, name)(**{key: make(key, shape) for key, shape in shapes.items()})
    assert re.search(re.escape(f"{name}: expected {error}"), str(info.value)), info.value


@given(
    batch=st.integers(0, 3), length=st.integers(0, 40), dim=st.integers(1, 40), dtype=st.sampled_from(DTYPES["cpu"]),
    looks_back=st.booleans(), with_prev=st.booleans(), seed=st.integers(0, 2**32),
)  # fmt: skip
@settings(max_examples=300)
def test_any_size(batch, length, dim, dtype, looks_back, with_prev, seed):
    torch.manual_seed(seed)
    x, weight, prev = draw(batch, length, dim, dtype, "cpu")
    check(x, weight if looks_back else weight[:dim], prev if with_prev and looks_back else None)
