"""grassmann_blend: accuracy by the 2x rule, its errors, and the op inside torch."""

import re
from contextlib import nullcontext

import pytest
import reference
import torch
from grassmann import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from problem import LAYOUTS, assert_close_to_truth, assert_same_bits
from torch._subclasses.fake_tensor import FakeTensorMode

import simplex_ops

op = simplex_ops.grassmann_blend
NAMES = ("h", "g", "logits", "grad_out")
LAYOUTS_3D = [layout for layout in LAYOUTS if layout.__name__ not in ("heads_first", "fused")]  # those are 4-d


def draw(shape, dtype, device, spread=2.0, layout=lambda x: x):
    """h, g, logits, grad_out; a large spread of the logits closes or opens gates for good."""
    scales = (1, 1, spread, 1)
    return [layout((s * torch.randn(shape, device=device)).to(dtype)) for s in scales]


def evaluate(function, tensors, dtype=None):
    *inputs, grad = (x.detach().to(dtype or x.dtype) for x in tensors)
    inputs = [x.requires_grad_() for x in inputs]
    out = function(*inputs)
    gradients = torch.autograd.grad(out, inputs, grad)
    return {"out": out} | {f"grad_{name}": x for name, x in zip(NAMES, gradients, strict=False)}


def check(tensors):
    actual, truth = evaluate(op, tensors), evaluate(reference.grassmann_blend, tensors, torch.float64)
    plain = evaluate(reference.grassmann_blend, tensors)
    for name, x in actual.items():
        assert x.dtype == tensors[0].dtype, name
        assert_close_to_truth(x, plain[name], truth[name], x.dtype, name, 1e-30)


@pytest.mark.parametrize("layout", LAYOUTS_3D, ids=lambda layout: layout.__name__)
def test_accuracy(device, layout):
    for dtype in DTYPES[device]:
        for shape in ((3, 5, 7), (1, 1, 1), (2, 64, 256), (0, 4, 8), (2, 0, 3), (1, 1025, 1)):
            check(draw(shape, dtype, device, layout=layout))


def test_ranks(device):
    for shape in ((), (9,), (2, 3, 4, 5)):
        check(draw(shape, torch.float32, device))


def test_closed_and_open_gates(device):
    """Nothing overflows, and where the gate is decided out is one of the inputs."""
    for dtype in DTYPES[device]:
        tensors = draw((5, 40), dtype, device, spread=30)
        check(tensors)
        h, g, _, grad = tensors
        for logit, expected in ((6e4, h), (-6e4, g)):
            results = evaluate(op, [h, g, torch.full_like(h, logit), grad])
            assert_same_bits(results["out"], expected)
            assert not results["grad_logits"].any()
            assert_same_bits(results["grad_h" if logit > 0 else "grad_g"], grad)


@settings(max_examples=100)
@given(
    st.lists(st.integers(0, 9), max_size=4), st.sampled_from(DTYPES["cpu"]), st.sampled_from([0.1, 2, 50]), st.data()
)
def test_drawn_problems(shape, dtype, spread, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    check(draw(tuple(shape), dtype, "cpu", spread))


def test_gradcheck():
    assert torch.autograd.gradcheck(op, [x.requires_grad_() for x in draw((3, 4), torch.float64, "cpu")[:3]])


def test_two_runs_and_threads_change_no_bit(device):
    tensors = draw((300, 257), torch.float32, device)
    threads = torch.get_num_threads()
    first = evaluate(op, tensors)
    torch.set_num_threads(3)
    second = evaluate(op, tensors)
    torch.set_num_threads(threads)
    for name in first:
        assert_same_bits(first[name], second[name], name)


BAD = {
    "g": ({"g": (2, 5)}, "expected g to have shape [2, 6] (that of h), got [2, 5]"),
    "no broadcast": ({"g": (6,)}, "expected g to have shape [2, 6] (that of h), got [6]"),
    "logits": ({"logits": (1, 6)}, "expected logits to have shape [2, 6] (that of h), got [1, 6]"),
    "dtype of g": ({"g": torch.bfloat16}, "expected g to have the dtype of h (Float), got BFloat16"),
    "dtype of logits": ({"logits": torch.int64}, "expected logits to have the dtype of h (Float), got Long"),
    "integers": ({"h": torch.int32}, "expected h to be float32, .* on {device}, got Int"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("fake", [False, True])
def test_bad_input(device, fake, case):
    changes, error = BAD[case]
    pattern = re.escape(f"grassmann_blend: {error.format(device=device)}").replace(r"\.\*", ".*")
    with FakeTensorMode() if fake else nullcontext():
        tensors = []
        for name in NAMES[:3]:
            change = changes.get(name)
            shape = change if isinstance(change, tuple) else (2, 6)
            dtype = change if isinstance(change, torch.dtype) else torch.float32
            tensors.append(torch.zeros(shape, dtype=dtype, device=device))
        with pytest.raises((RuntimeError, ValueError), match=pattern):
            op(*tensors)


def test_bad_input_of_backward(device):
    x = torch.zeros(2, 6, device=device)
    with pytest.raises(RuntimeError, match=r"grassmann_blend_backward: expected grad_out to have shape \[2, 6\]"):
        torch.ops.simplex.grassmann_blend_backward(x[:1], x, x, x)


def test_opcheck(device):
    *inputs, grad = draw((3, 5), torch.float32, device)
    torch.library.opcheck(torch.ops.simplex.grassmann_blend.default, tuple(x.requires_grad_() for x in inputs))
    backward = torch.ops.simplex.grassmann_blend_backward.default
    torch.library.opcheck(backward, (grad, *(x.detach() for x in inputs)))


def test_compile(device):
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, dynamic=True)
    for shape in ((2, 9), (5, 17)):
        tensors = draw(shape, torch.float32, device)
        truth = evaluate(reference.grassmann_blend, tensors, torch.float64)
        for name, x in evaluate(compiled, tensors).items():
            torch.testing.assert_close(x.double(), truth[name], rtol=1e-5, atol=1e-5)


def test_autocast(device):
    h, g, logits, _ = draw((4, 8), torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = op(h, g.bfloat16(), logits)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), reference.grassmann_blend(h, g, logits), rtol=0.02, atol=0.05)


@pytest.mark.parametrize(
    ("numel", "dtype", "row"),
    [(100, "float32", 0), (64, "float16", 0), (5, "float32", 0), (71, "float32", 0), (120, "float32", 24)],
)
def test_kernels_in_the_interpreter(numel, dtype, row, interpreter):
    """Whole programs, the last elements by themselves, and only those; gradients of the logits in rows of a wider matrix."""
    case = dict(numel=numel, block=32, dtype=dtype, row=row)
    for output, error in interpreter("interpreted_grassmann_blend", case).items():
        assert error < (1e-3 if dtype == "float16" else 1e-6), f"{output}: {error:.1e}"  # NaN fails too


def test_flops():
    h, g, logits, _ = (x.requires_grad_() for x in draw((3, 5), torch.float32, "cpu"))
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        op(h, g, logits).sum().backward()
    assert counter.get_total_flops() == 15 * (8 + 11)
