"""grassmann_layer: accuracy by the 2x rule, its errors, and the op inside torch."""

import re
from contextlib import nullcontext

import pytest
import reference
import torch
from grassmann import DTYPES, starts
from problem import LAYOUTS, assert_close_to_truth, assert_same_bits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import simplex_ops

op = simplex_ops.grassmann_layer
NAMES = (
    "x", "reduce_weight", "reduce_bias", "expand_weight", "expand_bias", "gate_x_weight", "gate_g_weight", "gate_bias",
)  # fmt: skip
OFFSETS = (1, 2, 4, 30)


def sizes(batch, length, dim, r):
    planes = r * (r - 1) // 2
    return (batch, length, dim), (r, dim), (r,), (dim, planes), (dim,), (dim, dim), (dim, dim), (dim,)


def draw(dtype, device, batch=2, length=19, dim=24, r=9, layout=lambda x: x):
    """The inputs, every product of order 1, and the incoming gradient."""
    tensors = [torch.randn(shape, device=device) / shape[-1] ** 0.5 for shape in sizes(batch, length, dim, r)]
    tensors[0] *= dim**0.5
    tensors.append(torch.randn_like(tensors[0]))
    tensors = [x.to(dtype) for x in tensors]
    return [layout(tensors[0]), *tensors[1:-1], layout(tensors[-1])]


def evaluate(function, tensors, dtype=None, **options):
    *inputs, grad = (x.detach().to(dtype or x.dtype) for x in tensors)
    inputs = [x.requires_grad_() for x in inputs]
    out = function(*inputs, OFFSETS, **options)
    gradients = torch.autograd.grad(out, inputs, grad)
    return {"out": out.detach()} | {f"grad_{name}": x for name, x in zip(NAMES, gradients, strict=True)}


def check(tensors, **options):
    actual = evaluate(op, tensors, **options)
    truth = evaluate(reference.grassmann_layer, tensors, torch.float64, **options)
    plain = evaluate(reference.grassmann_layer, tensors, **options)
    for name, x in actual.items():
        assert x.dtype == tensors[0].dtype, name
        assert_close_to_truth(x, plain[name], truth[name], x.dtype, name, 1e-30)
    return actual


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.__name__ not in ("heads_first", "fused")])
def test_accuracy(device, layout):
    for dtype in DTYPES[device]:
        shapes = (
            (2, 19, 24, 9),
            (1, 1, 8, 2),
            (3, 40, 64, 32),
            (0, 4, 8, 3),
            (2, 0, 8, 3),
            (1, 70, 16, 33),
            (1, 150, 128, 8),
        )
        for shape in shapes:
            check(draw(dtype, device, *shape, layout=layout))


def test_masked_and_packed(device):
    for dtype in DTYPES[device]:
        check(draw(dtype, device), valid=torch.rand(2, 19, device=device) < 0.7)
        check(draw(dtype, device, batch=1, length=50), cu_seqlens=starts(50, device))


def test_is_its_parts(device):
    """The output to the last bit; the gradients round their sums in another order."""
    for dtype in DTYPES[device]:
        tensors = draw(dtype, device, dim=64, r=16)
        x, w_reduce, b_reduce, w_expand, b_expand, *_ = tensors
        z = torch.nn.functional.linear(x, w_reduce, b_reduce)
        _, saved_z, g, logits = torch.ops.simplex.grassmann_layer(*tensors[:-1], OFFSETS)
        assert_same_bits(saved_z, z)
        assert_same_bits(g, simplex_ops.grassmann_mix(z, w_expand, b_expand, OFFSETS))
        assert_same_bits(op(*tensors[:-1], OFFSETS), simplex_ops.grassmann_blend(x, g, logits))


def test_gradcheck():
    inputs = [x.requires_grad_() for x in draw(torch.float64, "cpu", 1, 5, 3, 4)[:-1]]
    assert torch.autograd.gradcheck(lambda *inputs: op(*inputs, OFFSETS), inputs)


def test_causality_and_repeatability(device):
    for dtype in DTYPES[device]:
        tensors = draw(dtype, device, length=60)
        first, second = evaluate(op, tensors), evaluate(op, tensors)
        for name in first:
            assert_same_bits(first[name], second[name], name)
        tensors[0][:, 41] += 1
        assert_same_bits(op(*tensors[:-1], OFFSETS)[:, :41], first["out"][:, :41])


BAD = {
    "x": ({"x": (2, 8)}, "expected x to be 3-dimensional [batch, length, dim], got 2 dimensions"),
    "integers": ({"x": torch.int32}, "expected x to be float32, .* on {device}, got Int"),
    "reduce_weight": ({"reduce_weight": (4,)}, "expected reduce_weight to be 2-dimensional [r, dim], got 1 dimensions"),
    "dim": ({"reduce_weight": (4, 7)}, "expected reduce_weight to have shape [4, 8] (its own r, dim of x), got [4, 7]"),
    "rank": (
        {"reduce_weight": (1, 8), "expand_weight": (8, 0), "reduce_bias": (1,)},
        "expected the last dim of z to be from 2 to 128, got 1",
    ),
    "reduce_bias": ({"reduce_bias": (5,)}, "expected reduce_bias to have shape [4] (r of reduce_weight), got [5]"),
    "expand_weight": ({"expand_weight": (7, 6)}, "expected expand_weight to have shape [8, 6] .*, got [7, 6]"),
    "expand_bias": ({"expand_bias": torch.float64}, "expected expand_bias to have the dtype of x (Float), got Double"),
    "gate_x_weight": ({"gate_x_weight": (8, 4)}, "expected gate_x_weight to have shape [8, 8] .*, got [8, 4]"),
    "gate_g_weight": ({"gate_g_weight": torch.half}, "expected gate_g_weight to have the dtype of x (Float), got Half"),
    "gate_bias": ({"gate_bias": (1,)}, "expected gate_bias to have shape [8] (dim of x), got [1]"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("fake", [False, True])
def test_bad_input(device, fake, case):
    changes, error = BAD[case]
    pattern = re.escape(f"grassmann_layer: {error.format(device=device)}").replace(r"\.\*", ".*")
    with FakeTensorMode() if fake else nullcontext():
        tensors = []
        for name, shape in zip(NAMES, sizes(2, 6, 8, 4), strict=True):
            change = changes.get(name)
            dtype = change if isinstance(change, torch.dtype) else torch.float32
            tensors.append(torch.zeros(change if isinstance(change, tuple) else shape, dtype=dtype, device=device))
        with pytest.raises((RuntimeError, ValueError), match=pattern):
            op(*tensors, OFFSETS)


@pytest.mark.parametrize("fake", [False, True])
def test_bad_input_of_backward(device, fake):
    device = "meta" if fake else device
    x, w_reduce, _, w_expand, _, w_gate, *_ = (torch.zeros(shape, device=device) for shape in sizes(2, 6, 8, 4))
    z = torch.zeros(2, 6, 4, device=device)
    for grad, this_z, error in (
        (x[:1], z, "expected grad_out to have shape [2, 6, 8] (that of x), got [1, 6, 8]"),
        (x, z[:1], "expected z to have shape [2, 6, 4] (batch and length of x, r of reduce_weight), got [1, 6, 4]"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(f"grassmann_layer_backward: {error}")):
            torch.ops.simplex.grassmann_layer_backward(grad, x, w_reduce, w_expand, w_gate, w_gate, this_z, x, x, [1])


def test_opcheck(device):
    *inputs, grad = draw(torch.float32, device)
    forward, backward = torch.ops.simplex.grassmann_layer.default, torch.ops.simplex.grassmann_layer_backward.default
    torch.library.opcheck(forward, (*(x.requires_grad_() for x in inputs), OFFSETS))
    x, w_reduce, _, w_expand, _, w_gate_x, w_gate_g, _ = inputs = [x.detach() for x in inputs]
    _, *saved = forward(*inputs, OFFSETS)
    torch.library.opcheck(backward, (grad, x, w_reduce, w_expand, w_gate_x, w_gate_g, *saved, OFFSETS))


def test_compile(device):
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, dynamic=True)
    for shape in ((2, 9), (5, 17)):
        tensors = draw(torch.float32, device, *shape)
        truth = evaluate(reference.grassmann_layer, tensors, torch.float64)
        for name, x in evaluate(compiled, tensors).items():
            torch.testing.assert_close(x.double(), truth[name], rtol=1e-3, atol=1e-3)


def test_autocast(device):
    """Backward inside the region, too, where products must not be cast."""
    *inputs, grad = draw(torch.float32, device, r=16)
    inputs = [x.requires_grad_() for x in inputs]
    truth = evaluate(reference.grassmann_layer, [*inputs, grad], torch.float64)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = op(*inputs, OFFSETS)
        assert out.dtype == torch.bfloat16
        out.backward(grad.bfloat16())
    results = {"out": out} | {f"grad_{name}": x.grad for name, x in zip(NAMES, inputs, strict=True)}
    for name, x in results.items():
        assert (x.double() - truth[name]).norm() < 0.05 * truth[name].norm(), name


@pytest.mark.parametrize("tokens", [5, 32, 41])
def test_kernel_in_the_interpreter(tokens, interpreter):
    """Whole tiles and a part of one, two tiles of columns."""
    for output, error in interpreter(
        "interpreted_grassmann_layer", dict(tokens=tokens, dim=64, block=32, dtype="float16")
    ).items():
        assert error < 1e-3, f"{output}: {error:.1e}"  # NaN fails too


def test_flops():
    inputs = [x.requires_grad_() for x in draw(torch.float32, "cpu", 3, 10, 8, 4)[:-1]]
    z = torch.randn(3, 10, 4)
    with FlopCounterMode(display=False) as counter:
        simplex_ops.plucker_mean(z, OFFSETS)
    mean = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        op(*inputs, OFFSETS).sum().backward()
    products = 2 * 30 * 8 * (4 + 6 + 16)
    assert counter.get_total_flops() == 3 * products + 4 * mean + 30 * 8 * (8 + 11)
