"""Accuracy of two_simplicial_attention: output, lse and all five gradients against the fp64 truth, by the 2x rule."""

from functools import partial

import pytest
import reference
import torch
from covering import covering
from hypothesis import given, settings
from hypothesis import strategies as st
from problem import DTYPES, FLOOR, LAYOUTS, NAMES, Problem, assert_is_product, assert_same_bits, check, draw, evaluate

import simplex_ops

op = partial(simplex_ops.two_simplicial_attention, return_lse=True)

RATIOS = [1, 2, 3, 4, 8, 12, 64, 128]
DIMS = [8, 24, 32, 64, 80, 96, 128, 256]
WINDOWS = [(1, 1), (512, 32), (32, 512), (128, 16), (128, 128), (16, 128), (2000, 2000), (7, 1), (1, 9), (33, 30)]
# Multiply-adds of one forward pass: what the references can afford in about a second.
BUDGET = {"cpu": 1e8, "cuda": 4e9}


def cost_of_query(case):
    w1, w2 = (min(w, case["n"]) for w in case["windows"])
    elementwise = 8  # what the products with k1 and v1, bound by memory, cost beside one of w2 multiply-adds
    return case["batch"] * case["kv_heads"] * case["ratio"] * w1 * (w2 + elementwise) * case["dim"]


def cases(device):
    """Every pair of the values that acceptance lists. Where all N queries would be too many, the last ones that the
    budget allows attend to the N keys; a case is only accepted if those are at least 5."""
    factors = {
        "dtype": DTYPES[device], "n": [17, 127, 128, 129, 1000], "batch": [1, 3], "kv_heads": [1, 2], "ratio": RATIOS,
        "dim": DIMS, "windows": WINDOWS, "layout": LAYOUTS, "grad_lse": [True, False], "scale": [None, 0.2],
    }  # fmt: skip
    for case in covering(factors, lambda case: cost_of_query(case) <= BUDGET[device] / 5):
        n_q = min(case["n"], int(BUDGET[device] / cost_of_query(case)))
        yield pytest.param(
            device, case | {"n_q": n_q}, marks=[pytest.mark.gpu] * (device == "cuda"),
            id="-".join([device, *(getattr(v, "__name__", str(v).removeprefix("torch.")) for v in case.values())]),
        )  # fmt: skip


@pytest.mark.parametrize(("device", "case"), [case for device in DTYPES for case in cases(device)])
def test_accuracy(device, case):
    w1, w2 = case["windows"]
    names = ("dtype", "batch", "kv_heads", "ratio", "dim", "layout", "grad_lse", "scale", "n_q")
    check(op, draw(device=device, n_k=case["n"], w1=w1, w2=w2, **{name: case[name] for name in names}))


@pytest.mark.parametrize(("w1", "w2"), [(128, 16), (32, 512)])
def test_accuracy_of_a_thousand_queries(device, w1, w2):
    """No query is left out here, so that every tile boundary of N = 1000 is crossed."""
    check(op, draw(batch=1, n_k=1000, ratio=1, dim=8, w1=w1, w2=w2, device=device))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("ratio", [1, 3, 128])
def test_one_token(device, ratio, dim):
    """N = 1: out is v1 * v2 and lse the only logit."""
    for dtype in DTYPES[device]:
        drawn = draw(batch=3, n_k=1, kv_heads=2, ratio=ratio, dim=dim, w1=4, w2=7, dtype=dtype, device=device)
        got = check(op, drawn)
        _, _, _, v1, v2 = drawn.inputs
        assert_is_product(got["out"], v1, v2, ratio)


@pytest.mark.parametrize(("n_q", "n_k"), [(1, 40), (5, 40), (39, 40), (64, 100), (3, 3)])
@pytest.mark.parametrize(("w1", "w2"), [(9, 4), (4, 9), (300, 300)])
def test_fewer_queries_than_keys(device, n_q, n_k, w1, w2):
    for dtype in DTYPES[device]:
        check(op, draw(n_q=n_q, n_k=n_k, w1=w1, w2=w2, kv_heads=2, ratio=3, dtype=dtype, device=device))


@pytest.mark.parametrize(("w1", "w2"), [(16, 48), (48, 8)])
def test_large_logits(device, w1, w2):
    """max |A| = 30: exp(30) is far past fp16's range, and a wrong base or a lost maximum shows at once."""
    for dtype in DTYPES[device]:
        drawn = draw(n_k=48, ratio=4, dim=32, w1=w1, w2=w2, dtype=dtype, device=device)
        q, k1, k2 = (x.double() for x in drawn.inputs[:3])
        a = torch.einsum("bihd,bjd,bkd->bhijk", q, k1[:, :, 0], k2[:, :, 0]) * q.shape[-1] ** -0.5
        i = torch.arange(48, device=device)
        seen = [(i[:, None] >= i) & (i[:, None] - w < i) for w in (w1, w2)]
        largest = a[:, :, seen[0][:, :, None] & seen[1][:, None, :]].abs().max().item()
        drawn.inputs[0] = (drawn.inputs[0].float() * (30 / largest)).to(dtype)
        got = check(op, drawn)
        assert got["lse"].max() > 15, "the logits are not as large as this test means them to be"


def test_gradcheck():
    for n_q, w1, w2, scale in [(6, 3, 2, None), (3, 2, 9, -0.7), (6, 1, 4, 0.4)]:
        drawn = draw(n_q=n_q, n_k=6, kv_heads=2, ratio=2, dim=8, w1=w1, w2=w2, dtype=torch.float64)
        inputs = [x.requires_grad_() for x in drawn.inputs]
        function = partial(op, w1=w1, w2=w2, scale=scale)
        assert torch.autograd.gradcheck(function, inputs, fast_mode=n_q != 3)


@st.composite
def drawn_problems(draw_from):
    def pick(*values):
        return draw_from(st.sampled_from(values))

    n_k = draw_from(st.integers(1, 40))
    shape = dict(
        batch=draw_from(st.integers(0, 3)), n_k=n_k, n_q=draw_from(st.integers(1, n_k)),
        kv_heads=draw_from(st.integers(1, 3)), ratio=draw_from(st.integers(1, 9)), dim=8 * draw_from(st.integers(1, 6)),
        w1=draw_from(st.integers(1, 48) | st.just(2**62)), w2=draw_from(st.integers(1, 48) | st.just(2**62)),
        dtype=pick(*DTYPES["cpu"]), layout=pick(*LAYOUTS), grad_lse=pick(True, False), scale=pick(None, 0.3, -1.0, 0.0),
    )  # fmt: skip
    torch.manual_seed(draw_from(st.integers(0, 2**31)))
    return draw(**shape)


@settings(max_examples=300)
@given(drawn_problems())
def test_drawn_problems(drawn):
    # Plain torch can be exact by luck on a handful of numbers; the absolute term (inputs are near 1) is for that.
    check(op, drawn, atol=4 * FLOOR[drawn.dtype])


@pytest.mark.parametrize("ratio", [1, 6, 64])
@pytest.mark.parametrize(
    ("n_q", "n_k", "w1", "w2"),
    [(1, 600, 512, 32), (3, 200, 128, 70), (2, 300, 20, 300), (1, 5, 512, 32), (16, 90, 17, 3)],
)
def test_decoding(device, n_q, n_k, w1, w2, ratio):
    """Few queries: on a GPU their pairs are spread over programs. Twice the same bits, whatever the programs' order."""
    for dtype in DTYPES[device]:
        drawn = draw(n_q=n_q, n_k=n_k, kv_heads=2, ratio=ratio, dim=72, w1=w1, w2=w2, dtype=dtype, device=device)
        first = check(op, drawn)
        for name, x in evaluate(op, drawn).items():
            assert_same_bits(x, first[name], name)


def test_decoding_does_not_depend_on_the_number_of_parts(device):
    """One sequence is spread over more programs than many are: the same numbers up to rounding."""
    for dtype in DTYPES[device]:
        drawn = draw(batch=64, n_q=1, n_k=520, kv_heads=1, ratio=16, dim=64, w1=512, w2=32, dtype=dtype, device=device)
        out, lse = op(*drawn.inputs, drawn.w1, drawn.w2)
        alone, lse_alone = op(*(x[:1] for x in drawn.inputs), drawn.w1, drawn.w2)
        torch.testing.assert_close(out[:1].double(), alone.double(), atol=2 * FLOOR[dtype], rtol=2 * FLOOR[dtype])
        torch.testing.assert_close(lse[:1], lse_alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "shape", [dict(w1=128, w2=16, n_k=129), dict(w1=16, w2=64, n_k=300, n_q=70), dict(w1=33, w2=33, n_k=40)]
)
def test_two_runs_are_bitwise_equal(device, shape):
    for dtype in DTYPES[device]:
        drawn = draw(kv_heads=2, ratio=4, dim=64, dtype=dtype, device=device, **shape)
        first, second = evaluate(op, drawn), evaluate(op, drawn)
        for name in first:
            assert_same_bits(first[name], second[name], name)


def test_default_scale(device):
    """The default is head_dim ** -0.5, as in dot-product attention."""
    drawn = draw(dim=24, device=device)
    default = evaluate(op, drawn)
    drawn.scale = 24**-0.5
    for name, x in evaluate(op, drawn).items():
        assert_same_bits(x, default[name], name)


@pytest.mark.parametrize("wanted", range(5), ids=NAMES)
def test_gradient_of_one_input(device, wanted):
    """Asking for one gradient gives the bits of asking for all five."""
    drawn = draw(device=device)
    inputs = [x.detach().requires_grad_(i == wanted) for i, x in enumerate(drawn.inputs)]
    out, lse = op(*inputs, drawn.w1, drawn.w2)
    (gradient,) = torch.autograd.grad([out, lse], inputs[wanted : wanted + 1], [drawn.grad_out, drawn.grad_lse])
    name = f"grad_{NAMES[wanted]}"
    assert_same_bits(gradient, evaluate(op, drawn)[name], name)


def test_loss_of_lse_alone(device):
    """Merging partial results differentiates lse without out: v gets nothing, q and k the gradient of the softmax."""
    drawn = draw(device=device, kv_heads=2)
    truth = evaluate(
        reference.two_simplicial_attention,
        Problem(drawn.inputs, drawn.w1, drawn.w2, None, torch.zeros_like(drawn.grad_out), drawn.grad_lse),
        torch.float64,
    )
    inputs = [x.detach().requires_grad_() for x in drawn.inputs]
    _, lse = op(*inputs, drawn.w1, drawn.w2)
    gradients = torch.autograd.grad(lse, inputs, drawn.grad_lse, materialize_grads=True)
    for name, gradient in zip(NAMES, gradients, strict=True):
        torch.testing.assert_close(gradient.double(), truth[f"grad_{name}"], atol=1e-5, rtol=1e-5)
