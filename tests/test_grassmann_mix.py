"""grassmann_mix: accuracy by the 2x rule against the naive form, its promises, its errors, and the op inside torch."""

import itertools
import re
from contextlib import nullcontext

import pytest
import reference
import torch
from covering import covering
from grassmann import DTYPES, PAPER_OFFSETS, check, draw, evaluate, truth_of
from hypothesis import given, settings
from hypothesis import strategies as st
from problem import LAYOUTS, assert_same_bits
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import simplex_ops

op = simplex_ops.grassmann_mix
OPS = {"plucker_mean": simplex_ops.plucker_mean, "grassmann_mix": op}
# The most precise dtype of each device, so that a wrong gradient cannot hide behind rounding.
PRECISE = {"cpu": torch.float64, "cuda": torch.float32}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.05}
LAYOUTS_OF_TOKENS = [layout for layout in LAYOUTS if layout.__name__ not in ("heads_first", "fused")]  # those are 4-d


def cases(device):
    factors = {
        "dtype": DTYPES[device], "r": [2, 7, 16, 32, 33, 64, 128], "length": [0, 1, 2, 5, 17, 64, 513], "d": [0, 1, 24, 33],
        "offsets": [PAPER_OFFSETS, (1,), (3,), (1, 1, 2, 2, 4), (5, 600, 2**40), (64, 512), (600,)], "batch": [0, 1, 3],
        "kind": ["normal", "degenerate", "scaled"], "masked": [False, True], "packed": [False, True], "bias": [False, True],
        "options": [{}, {"bias_everywhere": True}], "layout": LAYOUTS_OF_TOKENS,
    }  # fmt: skip
    names = list(factors)
    factors["options"] = [0, 1]  # hashable
    for case in covering(factors, lambda case: case["r"] ** 2 * case["length"] * max(1, case["batch"]) < 1e7):
        case["options"] = {"bias_everywhere": bool(case["options"])}
        yield pytest.param(
            device, case, marks=[pytest.mark.gpu] * (device == "cuda"),
            id="-".join([device, *(getattr(case[n], "__name__", str(case[n]).removeprefix("torch.")) for n in names)]),
        )  # fmt: skip


@pytest.mark.parametrize(("device", "case"), [case for device in DTYPES for case in cases(device)])
def test_accuracy(device, case):
    check(op, draw(device=device, **case))


def test_gradcheck():
    for r, offsets, options in ((2, (1, 3), {}), (5, (2, 2, 3), {"bias_everywhere": True}), (4, (1, 50), {})):
        z, weight, bias = (torch.randn(s, dtype=torch.float64) for s in ((2, 6, r), (3, r * (r - 1) // 2), (3,)))
        inputs = [x.requires_grad_() for x in (z, weight, bias)]
        for valid in (None, torch.rand(2, 6) < 0.8):
            assert torch.autograd.gradcheck(lambda *x, o=offsets, v=valid, k=options: op(*x, o, valid=v, **k), inputs)


@st.composite
def drawn_problems(draw_from):
    def integers(least, most):
        return draw_from(st.integers(least, most))

    offsets = tuple(draw_from(st.lists(st.integers(1, 40) | st.just(2**62), min_size=1, max_size=9)))
    case = dict(
        batch=integers(0, 3), length=integers(0, 40), r=integers(2, 40), d=integers(0, 20), offsets=offsets,
        dtype=draw_from(st.sampled_from(DTYPES["cpu"])), masked=draw_from(st.booleans()), bias=draw_from(st.booleans()),
        packed=draw_from(st.booleans()),
        kind=draw_from(st.sampled_from(["normal", "degenerate", "scaled"])),
        layout=draw_from(st.sampled_from(LAYOUTS_OF_TOKENS)),
        options={"bias_everywhere": draw_from(st.booleans())},
    )  # fmt: skip
    torch.manual_seed(integers(0, 2**31))
    return draw(**case)


@settings(max_examples=300)
@given(drawn_problems())
def test_drawn_problems(problem):
    # Plain torch can be exact by luck on a handful of numbers, of which a weight makes larger ones.
    check(op, problem, atol={torch.float64: 1e-10, torch.float32: 3e-4}.get(problem.grad.dtype, 0.03))


def test_empty_windows(device):
    """No bias where nothing is paired, unless asked for; then it has a gradient there, too."""
    valid = torch.ones(1, 8, dtype=torch.bool, device=device)
    valid[0, 5] = False
    z, weight = torch.randn(1, 8, 4, device=device), torch.randn(3, 6, device=device)
    bias = torch.randn(3, device=device, requires_grad=True)
    for mask, empty in ((None, [0, 1]), (valid, [0, 1, 5, 7])):
        g = op(z, weight, bias, [2], valid=mask)
        assert (g == 0).all(-1)[0].nonzero().flatten().tolist() == empty
        (grad,) = torch.autograd.grad(g.sum(), bias)
        torch.testing.assert_close(grad, torch.full_like(grad, 8 - len(empty)))
        g = op(z, weight, bias, [2], valid=mask, bias_everywhere=True)
        torch.testing.assert_close(g[0, empty], bias.expand(len(empty), 3))
        (grad,) = torch.autograd.grad(g.sum(), bias)
        torch.testing.assert_close(grad, torch.full_like(grad, 8))


def test_properties(device):
    z = torch.randn(2, 64, 16, device=device, requires_grad=True)
    weight, bias = torch.randn(24, 120, device=device), torch.randn(24, device=device)
    g = op(z, weight, bias, PAPER_OFFSETS)
    (grad,) = torch.autograd.grad(g, z, torch.randn_like(g))
    assert grad.norm(dim=-1).min() > 1e-1
    assert (z * grad).sum(-1).abs().max() < 1e-4
    scale = 2.0 ** torch.randint(-9, 9, (2, 64, 1), device=device)
    assert_same_bits(op(z * scale, weight, bias, PAPER_OFFSETS), g)
    torch.testing.assert_close(op(z, weight, bias, PAPER_OFFSETS[::-1]), g, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        g, simplex_ops.plucker_mean(z, PAPER_OFFSETS) @ weight.mT + bias * (g != 0), rtol=1e-4, atol=1e-4
    )


def test_causality(device):
    for dtype, r in itertools.product(DTYPES[device], (16, 32)):
        problem = draw(length=70, r=r, d=8, dtype=dtype, device=device)
        z, weight, bias = problem.inputs.values()
        before = op(z, weight, bias, PAPER_OFFSETS)
        z[:, 41:] = torch.randn(2, 29, r).to(z)
        after = op(z, weight, bias, PAPER_OFFSETS)
        assert_same_bits(after[:, :41], before[:, :41])
        assert (after != before)[:, 41:].any(-1).all()


def test_two_runs_are_bitwise_equal(device):
    for dtype in DTYPES[device]:
        problem = draw(length=300, r=32, d=64, dtype=dtype, device=device, masked=True)
        first, second = evaluate(op, problem), evaluate(op, problem)
        for name in first:
            assert_same_bits(first[name], second[name], name)


# Errors

GOOD = {"z": (2, 6, 4), "weight": (3, 6), "bias": (3,), "offsets": [1, 2]}
BAD = {
    "z of rank 2": ({"z": (6, 4)}, "expected z to be 3-dimensional [batch, length, r], got 2 dimensions"),
    "r = 1": ({"z": (2, 6, 1)}, "expected the last dim of z to be from 2 to 128, got 1"),
    "r = 129": ({"z": (2, 6, 129)}, "expected the last dim of z to be from 2 to 128, got 129"),
    "integers": ({"z": torch.int64}, "expected z to be float32, .* on {device}, got Long"),
    "no offset": ({"offsets": []}, "expected offsets to hold at least one offset, got []"),
    "offset 0": ({"offsets": [1, 0]}, "expected every offset to be at least 1, got 0"),
    "offset < 0": ({"offsets": [-7, 1]}, "expected every offset to be at least 1, got -7"),
    "valid of another shape": (
        {"valid": (2, 5)},
        "expected valid to have shape [2, 6] (batch and length of z), got [2, 5]",
    ),
    "valid of another dtype": ({"valid": (2, 6)}, "expected valid to have dtype Bool, got Float"),
    "starts of rank 2": (
        {"cu_seqlens": (1, 2)},
        "expected cu_seqlens to be 1-dimensional [sequences + 1], got 2 dimensions",
    ),
    "no sequence": ({"cu_seqlens": (1,)}, "expected cu_seqlens to hold at least 2 values, got 1"),
    "starts of another dtype": ({"cu_seqlens": (2,)}, "expected cu_seqlens to have dtype Int, got Float"),
    "packed and a batch": ({"cu_seqlens": torch.int32}, "expected the batch of z to be 1 with cu_seqlens, got 2"),
}
BAD_MIX = {
    "weight of rank 3": (
        {"weight": (1, 3, 6)},
        "expected weight to be 2-dimensional [d, r * (r - 1) / 2], got 3 dimensions",
    ),
    "columns of weight": ({"weight": (3, 7)}, "expected weight to have shape [3, 6] .*, got [3, 7]"),
    "dtype of weight": ({"weight": torch.float64}, "expected weight to have the dtype of z (Float), got Double"),
    "length of bias": ({"bias": (4,)}, "expected bias to have shape [3] (d of weight), got [4]"),
    "dtype of bias": ({"bias": torch.float64}, "expected bias to have the dtype of z (Float), got Double"),
}
ALL_BAD = {("plucker_mean", n): bad for n, bad in BAD.items()}
ALL_BAD |= {("grassmann_mix", n): bad for n, bad in (BAD | BAD_MIX).items()}


def tensor(change, good, device):
    shape = change if isinstance(change, tuple) else good
    return torch.zeros(shape, dtype=change if isinstance(change, torch.dtype) else torch.float32, device=device)


@pytest.mark.parametrize(("name", "case"), ALL_BAD, ids=str)
@pytest.mark.parametrize("fake", [False, True])
def test_bad_input(device, fake, name, case):
    """The same words for real and for fake tensors."""
    changes, error = ALL_BAD[name, case]
    names = ["z"] if name == "plucker_mean" else ["z", "weight", "bias"]
    pattern = re.escape(f"{name}: {error.format(device=device)}").replace(r"\.\*", ".*")
    with FakeTensorMode() if fake else nullcontext():
        tensors = [tensor(changes.get(n), GOOD[n], device) for n in names]
        optional = {n: tensor(changes[n], (2,), device) for n in ("valid", "cu_seqlens") if n in changes}
        with pytest.raises((RuntimeError, ValueError), match=pattern):
            OPS[name](*tensors, changes.get("offsets", GOOD["offsets"]), **optional)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ([1, 6], "to ascend from 0, got 1 at 0"),
        ([-1, 6], "to ascend from 0, got -1 at 0"),
        ([0, 5, 4, 6], "to ascend from 0, got 4 at 2"),
        ([0, 3, 5], r"to end with the length of z \(6\), got 5"),
        ([0, 7], r"to end with the length of z \(6\), got 7"),
    ],
)
def test_bad_starts(values, error):
    with pytest.raises(RuntimeError, match=f"plucker_mean: expected cu_seqlens {error}"):
        simplex_ops.plucker_mean(torch.zeros(1, 6, 4), [1], cu_seqlens=torch.tensor(values, dtype=torch.int32))


@pytest.mark.gpu
def test_bad_starts_read_no_foreign_memory():
    """CUDA cannot refuse them without waiting; compute-sanitizer runs this too."""
    z = torch.randn(1, 60, 4, device="cuda", requires_grad=True)
    for values in ([0, 2**31 - 1], [-(2**31), 60], [50, 10, 40, -3, 2**30], [7, 7]):
        starts = torch.tensor(values, dtype=torch.int32, device="cuda")
        op(z, torch.randn(3, 6, device="cuda"), None, [1, 5], cu_seqlens=starts).sum().backward()
    torch.cuda.synchronize()


def test_bad_input_of_backward(device):
    z, weight, grad = (torch.zeros(shape, device=device) for shape in ((2, 6, 4), (3, 6), (2, 6, 4)))
    with pytest.raises(RuntimeError, match=r"grassmann_mix_backward: expected grad_g to have shape \[2, 6, 3\]"):
        torch.ops.simplex.grassmann_mix_backward(grad, z, weight, [1])
    with pytest.raises(RuntimeError, match=r"plucker_mean_backward: expected grad_pbar to have shape \[2, 6, 6\]"):
        torch.ops.simplex.plucker_mean_backward(grad, z, [1])


# Inside torch


def precise(device, **changes):
    return draw(**{"device": device, "dtype": PRECISE[device], "length": 13, "masked": True, **changes})


def assert_truth(results, problem):
    truth = truth_of(problem)
    for name, x in results.items():
        tolerance = TOLERANCE[x.dtype]
        torch.testing.assert_close(x.double(), truth[name].double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mix", [False, True], ids=["plucker_mean", "grassmann_mix"])
def test_opcheck(device, mix):
    problem = precise(device, mix=mix, packed=True)
    inputs = [x.clone().requires_grad_() for x in problem.inputs.values()]
    forward, backward = (
        getattr(torch.ops.simplex, ("grassmann_mix" if mix else "plucker_mean") + suffix).default
        for suffix in ("", "_backward")
    )
    for rest in ((None, None), (problem.valid, None), (None, problem.cu_seqlens)):
        torch.library.opcheck(forward, (*inputs, problem.offsets, *rest))
        torch.library.opcheck(backward, (problem.grad, *[x.detach() for x in inputs[:2]], problem.offsets, *rest))


def test_saves_its_inputs_only(device):
    problem = precise(device, masked=False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        op(*(x.requires_grad_() for x in problem.inputs.values()), problem.offsets)
    assert saved == [problem.inputs["z"].shape, problem.inputs["weight"].shape]


def test_strided_gradient(device):
    problem = precise(device)
    problem.grad = problem.grad.transpose(1, 2).contiguous().transpose(1, 2)
    assert_truth(evaluate(op, problem), problem)


def test_autocast(device):
    problem = draw(device=device, r=16)
    z, weight, bias = (x.requires_grad_() for x in problem.inputs.values())
    with torch.autocast(device, dtype=torch.bfloat16):
        g = op(z, weight, bias, PAPER_OFFSETS)
        assert g.dtype == torch.bfloat16
        g.backward(problem.grad.bfloat16())  # inside the region: the gradient must not be cast
    truth = truth_of(problem)
    for x, name in ((g, "out"), (z.grad, "grad_z"), (weight.grad, "grad_weight"), (bias.grad, "grad_bias")):
        size = truth[name].abs().max().item()
        torch.testing.assert_close(x.double(), truth[name], rtol=0.05, atol=0.03 * size)
    with torch.autocast(device, dtype=torch.bfloat16):
        grads = torch.ops.simplex.grassmann_mix_backward(problem.grad, z.detach(), weight.detach(), PAPER_OFFSETS)
    assert {x.dtype for x in grads} == {torch.float32}


def test_compile(device):
    """One graph, dynamic in batch and length."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(op, fullgraph=True, dynamic=True)
    for changes in ({"batch": 6}, {"batch": 3, "length": 33}, {"batch": 5, "length": 24}):
        problem = precise(device, **changes)
        assert_truth(evaluate(compiled, problem), problem)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class Mix(torch.nn.Module):
    def forward(self, z: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.ops.simplex.grassmann_mix(z, weight, bias, [1, 2, 30])


def test_torchscript(device, tmp_path):
    torch.jit.script(Mix()).save(tmp_path / "mix.pt")
    loaded = torch.jit.load(tmp_path / "mix.pt", map_location=device)
    for _ in range(3):
        problem = precise(device, masked=False, offsets=(1, 2, 30))
        assert_truth(evaluate(lambda z, weight, bias, *_, **__: loaded(z, weight, bias), problem), problem)


def test_export_and_aot_inductor(device, tmp_path):
    """One program for every batch and length."""
    batch, length = (torch.export.Dim(name, min=1) for name in ("batch", "length"))
    problem = precise(device, masked=False, offsets=(1, 2, 30))
    shapes = ({0: batch, 1: length}, None, None)
    program = torch.export.export(Mix(), tuple(problem.inputs.values()), dynamic_shapes=shapes)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "mix.pt2"))
    for run in (program.module(), torch._inductor.aoti_load_package(package)):
        for size in ((1, 1), (3, 40), (2, 7)):
            problem = precise(device, masked=False, offsets=(1, 2, 30), batch=size[0], length=size[1])
            assert_truth({"out": run(*problem.inputs.values())}, problem)


@pytest.mark.gpu
def test_cuda_graph():
    problem, fresh = (precise("cuda", offsets=(*range(1, 12),)) for _ in range(2))
    op(*problem.inputs.values(), problem.offsets)  # cuBLAS makes its workspace
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = evaluate(op, problem)
    for mine, new in zip(problem.inputs.values(), fresh.inputs.values(), strict=True):
        mine.copy_(new)
    graph.replay()
    fresh.grad, fresh.valid = problem.grad, problem.valid
    assert_truth(results, fresh)


def test_flops():
    z, weight = torch.randn(3, 10, 8, requires_grad=True), torch.randn(5, 28)
    with FlopCounterMode(display=False) as counter:
        g = op(z, weight, None, [1, 4, 50])
    front = 3 * (12 * 8 * (9 + 6) + 3 * 10 * 28)
    assert counter.get_total_flops() == front + 2 * 3 * 10 * 5 * 28
    with FlopCounterMode(display=False) as counter:
        g.sum().backward()
    assert counter.get_total_flops() == 3 * front + 4 * 3 * 10 * 5 * 28


def test_reference_is_the_equation():
    """The naive form above all: one pair, by hand."""
    z = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]], dtype=torch.float64)
    minors = torch.tensor([4 * 2 - 5 * 1, 4 * 3 - 6 * 1, 5 * 3 - 6 * 2], dtype=torch.float64)
    torch.testing.assert_close(reference.plucker_mean(z, [1])[0, 1], minors / minors.norm())


@pytest.mark.parametrize(("r", "d"), [(32, 8), (27, 24)])
def test_order_of_the_columns(r, d, interpreter):
    """Of the weight on Hopper: each plane once, the bias, and back from them."""
    for output, error in interpreter("interpreted_grassmann_mix", dict(r=r, d=d)).items():
        assert error < 1e-6, f"{output}: {error:.1e}"  # NaN fails too


@pytest.mark.gpu
@pytest.mark.parametrize(("r", "d"), [(32, 256), (25, 136), (32, 264)])
def test_pbar_in_registers(r, d):
    """On Hopper: columns of several programs, more than the backward pass takes, tokens by turns, padded r."""
    # Not float16 of degenerate tokens: among so many some are so nearly parallel that fp32 loses the plane of a pair, in every
    # kernel, the CPU's too; plain torch forms differences of products of 11 binary digits, which are exact.
    kinds = ((torch.bfloat16, "degenerate"), (torch.float16, "scaled"))
    for (dtype, kind), (masked, packed) in itertools.product(kinds, ((False, False), (True, True))):
        for bias_everywhere in (False, True):
            options = {"bias_everywhere": bias_everywhere}
            case = dict(r=r, d=d, dtype=dtype, masked=masked, packed=packed, options=options, device="cuda")
            check(op, draw(batch=2, length=333, kind=kind, **case))
    check(op, draw(batch=3, length=1111, r=r, d=d, dtype=torch.bfloat16, device="cuda"))
