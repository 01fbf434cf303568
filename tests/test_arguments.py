"""Every tensor argument of every op, backward ops included: a wrong rank, dtype or device is refused by an error that begins with
the op and names the argument, on every device and by the fakes."""

import re
from contextlib import nullcontext

import pytest
import torch
from problem import DTYPES, op_names
from torch._subclasses.fake_tensor import FakeTensorMode

import simplex_ops  # noqa: F401  its ops

GOOD = {  # shapes of floating tensors; a number in a list is a tensor of int32
    "causal_route_logits": ([(1, 4, 8), (16,), (1, 8)], []),
    "grassmann_blend": ([(2, 8)] * 3, []),
    "grassmann_layer": ([(1, 4, 8), (4, 8), (4,), (8, 6), (8,), (8, 8), (8, 8), (8,)], [[1], None, "starts"]),
    "grassmann_mix": ([(1, 4, 4), (8, 6), (8,)], [[1], "valid", "starts"]),
    "grassmann_step": ([(1, 3, 4), (1, 5, 4), (8, 6), (8,)], [[1, 5], 3]),
    "plucker_mean": ([(1, 4, 4)], [[1], "valid", "starts"]),
    "route_gather": ([(1, 4, 8)], ["index"]),
    "route_kv_append_": ([(1, 4, 1, 8), (1, 4, 1, 8), "one", (1, 1, 1, 8), (1, 1, 1, 8), "index", (4,)], []),
    "route_replace": ([(1, 4, 8), (1, 1, 8)], ["index", (1, 4)]),
    "route_scatter_add": ([(1, 4, 8), (1, 1, 8)], ["index", (1, 1)]),
    "surprise_gate": ([(1, 4, 8)] * 3 + [()] * 4, []),
    "threshold_route": ([(2, 5)], [0.5, 3]),
    "topk_route": ([(2, 5)], [3]),
    "topk_route_calibrate_": ([(2, 5)], [3, (), ()]),
    "two_simplicial_attention": ([(1, 4, 2, 8)] + [(1, 4, 1, 8)] * 4, [3, 2]),
}
OTHERS = {
    "index": ([[1]], torch.int32),
    "one": ([0], torch.int32),
    "starts": ([0, 4], torch.int32),
    "valid": ([[True] * 4], torch.bool),
}


def good_call(name, device, larger=False):
    """Arguments by name; those of X_backward as autograd puts them together. `larger`: the rows have 12 elements, not 8."""
    op = getattr(torch.ops.simplex, name.removesuffix("_backward"))

    def make(argument):
        if isinstance(argument, tuple):
            sizes = [{4: 6, 8: 12, 16: 24}.get(size, size) if larger else size for size in argument]
            return torch.rand(sizes, device=device)
        if isinstance(argument, str):
            values, dtype = OTHERS[argument]
            return torch.tensor(values, dtype=dtype, device=device)
        return argument

    values = [make(argument) for part in GOOD[name.removesuffix("_backward")] for argument in part]
    call = dict(zip((a.name for a in op.default._schema.arguments), values, strict=False))
    if not name.endswith("_backward"):
        return call
    outputs = op(**call)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for result, output in zip(op.default._schema.returns, outputs, strict=True):
        call |= {result.name: output, f"grad_{result.name}": torch.ones_like(output)}
    arguments = getattr(torch.ops.simplex, name).default._schema.arguments
    return {a.name: call[a.name] for a in arguments if a.name in call}


def all_ops():
    names = [name.removeprefix("simplex::") for name in op_names()]
    assert {name for name in names if not name.endswith("_backward")} == set(GOOD)
    return names


def refusals(name, device, wrong):
    op = getattr(torch.ops.simplex, name)
    for argument, tensor in good_call(name, device).items():
        if not isinstance(tensor, torch.Tensor):
            continue
        call = good_call(name, device)
        call[argument] = wrong(tensor)
        if call[argument].device != tensor.device and sum(torch.is_tensor(x) for x in call.values()) == 1:
            continue  # it is the others' device that would be wrong
        with pytest.raises((RuntimeError, ValueError)) as error:
            op(**call)
        assert re.match(rf"{name}: expected .*\b{argument}\b", str(error.value)), (argument, str(error.value))


@pytest.mark.parametrize("name", all_ops())
def test_good_calls(device, name):
    getattr(torch.ops.simplex, name)(**good_call(name, device))


@pytest.mark.parametrize("name", all_ops())
@pytest.mark.parametrize("place", [*(pytest.param(d, marks=[pytest.mark.gpu] * (d == "cuda")) for d in DTYPES), "fake"])
def test_rank_and_dtype(place, name):
    with FakeTensorMode() if place == "fake" else nullcontext():
        device = place.replace("fake", "cpu")
        refusals(name, device, lambda x: x[None])
        refusals(name, device, lambda x: x.to(torch.int64))


@pytest.mark.parametrize("name", all_ops())
def test_device(device, name):
    """On the CPU by the fakes, which serve a call with a tensor on the meta device."""
    refusals(name, device, lambda x: x.to("meta") if device == "cpu" else x.cpu())


ROWS_OF_8 = [
    "causal_route_logits",
    "route_gather",
    "route_kv_append_",
    "route_replace",
    "route_scatter_add",
    "surprise_gate",
]


@pytest.mark.parametrize("name", ROWS_OF_8)
@pytest.mark.parametrize("place", [pytest.param("cuda", marks=pytest.mark.gpu), "fake"])
def test_rows_of_whole_vectors_on_cuda(place, name):
    with FakeTensorMode() if place == "fake" else nullcontext():
        call = good_call(name, "cuda", larger=True)
        with pytest.raises(
            (RuntimeError, ValueError), match=rf"^{name}: expected .* to be a multiple of 8 on cuda, got 12"
        ):
            getattr(torch.ops.simplex, name)(**call)


@pytest.mark.parametrize("name", ROWS_OF_8)
def test_any_rows_on_the_cpu(name):
    getattr(torch.ops.simplex, name)(**good_call(name, "cpu", larger=True))
