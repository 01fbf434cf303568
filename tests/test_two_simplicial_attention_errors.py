"""Every bad input is refused by an error that names argument, value and expectation: the same on CPU, GPU and for fake
tensors, so that torch.compile and torch.export fail with the words that eager code fails with."""

import itertools
import re
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from problem import DTYPES, assert_same_bits
from torch._subclasses.fake_tensor import FakeTensorMode

import simplex_ops

OP = "two_simplicial_attention: "
SHAPES = {"q": (2, 16, 4, 64)} | dict.fromkeys(("k1", "k2", "v1", "v2"), (2, 16, 2, 64))
PLACES = [*DTYPES, *(f"fake {device}" for device in ("cpu", "cuda"))]

# name: (what differs from a good call, the error). A value that is a tuple is a shape, a dtype replaces that of the
# tensor, "all" that of every tensor, anything else is the argument itself.
BAD = {
    "q of rank 3": (
        {"q": (16, 4, 64)},
        "expected q to be 4-dimensional [batch, length, heads, head_dim], got 3 dimensions",
    ),
    "q of rank 5": ({"q": (1, 2, 16, 4, 64)}, "expected q to be 4-dimensional .*, got 5 dimensions"),
    "k1 of rank 3": ({"k1": (16, 2, 64)}, "expected k1 to be 4-dimensional .*, got 3 dimensions"),
    "rank 0": ({"q": ()}, "expected q to be 4-dimensional .*, got 0 dimensions"),
    "heads do not divide": (
        {"q": (2, 16, 5, 64)},
        "expected the heads of q to be a multiple of the heads of k1 (2), got 5",
    ),
    "fewer heads than kv heads": (
        {"q": (2, 16, 1, 64)},
        "expected the heads of q to be a multiple of the heads of k1 (2), got 1",
    ),
    "no kv head": (
        dict.fromkeys(("k1", "k2", "v1", "v2"), (2, 16, 0, 64)),
        "expected the heads of q to be a multiple of the heads of k1 (0), got 4",
    ),
    "more queries than keys": ({"q": (2, 17, 4, 64)}, "expected the length of q to be at most that of k1 (16), got 17"),
    "w1 = 0": ({"w1": 0}, "expected w1 to be at least 1, got 0"),
    "w2 = 0": ({"w2": 0}, "expected w2 to be at least 1, got 0"),
    "w1 < 0": ({"w1": -3}, "expected w1 to be at least 1, got -3"),
    "w2 < 0": ({"w2": -(2**62)}, f"expected w2 to be at least 1, got -{2**62}"),
    "scale NaN": ({"scale": float("nan")}, "expected scale to be finite, got -?nan"),
    "scale infinite": ({"scale": float("inf")}, "expected scale to be finite, got inf"),
    "scale beyond fp32": ({"scale": -1e39}, "expected scale to be within the range of float32, got -1e+39"),
    "packed and a batch": ({"cu_seqlens": (3,)}, "expected the batch of q to be 1 with cu_seqlens, got 2"),
    "one start": ({"cu_seqlens": (1,)}, "expected cu_seqlens to hold at least 2 values, got 1"),
    "starts of rank 2": (
        {"cu_seqlens": (1, 3)},
        "expected cu_seqlens to be 1-dimensional [sequences + 1], got 2 dimensions",
    ),
    "long starts": ({"cu_seqlens": torch.int64}, "expected cu_seqlens to have dtype Int, got Long"),
    "packed with a past": (
        {"cu_seqlens": (3,), "q": (1, 9, 4, 64)} | dict.fromkeys(("k1", "k2", "v1", "v2"), (1, 16, 2, 64)),
        "expected the length of q to be that of k1 (16) with cu_seqlens, got 9",
    ),
    "integers": ({"all": torch.int64}, "expected q to be float32, .* on {device}, got Long"),
    "bytes": ({"all": torch.int8}, "expected q to be float32, .* on {device}, got Char"),
    "booleans": ({"all": torch.bool}, "expected q to be float32, .* on {device}, got Bool"),
    "complex": ({"all": torch.complex64}, "expected q to be float32, .* on {device}, got ComplexFloat"),
}
for n in ("k1", "k2", "v1", "v2"):
    BAD |= {
        f"batch of {n}": ({n: (3, 16, 2, 64)}, f"expected {n} to have shape [2, 16, 2, 64] .*, got [3, 16, 2, 64]"),
        f"head_dim of {n}": ({n: (2, 16, 2, 32)}, f"expected {n} to have shape [2, 16, 2, 64] .*, got [2, 16, 2, 32]"),
        f"{n} half": ({n: torch.float16}, f"expected {n} to have the dtype of q (Float), got Half"),
        f"{n} integer": ({n: torch.int64}, f"expected {n} to have the dtype of q (Float), got Long"),
    }
for n in ("k2", "v1", "v2"):  # k1 is what they are measured by
    BAD |= {
        f"{n} of rank 3": ({n: (16, 2, 64)}, f"expected {n} to have shape [2, 16, 2, 64] .*, got [16, 2, 64]"),
        f"length of {n}": ({n: (2, 15, 2, 64)}, f"expected {n} to have shape [2, 16, 2, 64] .*, got [2, 15, 2, 64]"),
        f"kv heads of {n}": ({n: (2, 16, 1, 64)}, f"expected {n} to have shape [2, 16, 2, 64] .*, got [2, 16, 1, 64]"),
    }
for dim in (0, 4, 12, 63, 257, 264, 512):
    shapes = {name: (*shape[:3], dim) for name, shape in SHAPES.items()}
    BAD[f"head_dim {dim}"] = (shapes, f"expected the head_dim of q to be a multiple of 8 up to 256, got {dim}")


def arguments(device, changes):
    """A good call with `changes`, on `device`."""
    call = {"w1": 5, "w2": 3}
    for name, shape in SHAPES.items():
        dtype = changes.get("all", torch.float32)
        change = changes.get(name)
        if isinstance(change, tuple):
            shape = change
        elif change is not None:
            dtype = change
        call[name] = torch.zeros(shape, dtype=dtype, device=device)
    call |= {name: change for name, change in changes.items() if name not in SHAPES and name != "all"}
    if change := changes.get("cu_seqlens"):
        shape, dtype = (change, torch.int32) if isinstance(change, tuple) else ((2,), change)
        call["cu_seqlens"] = torch.zeros(shape, dtype=dtype, device=device)
    return call


def pattern(text):
    """The whole error's start as a regex: everything literal but '.*' and '-?'."""
    return "^" + re.escape(OP + text).replace(r"\.\*", ".*").replace(r"\-\?", "-?")


def tensors_at(place):
    return FakeTensorMode() if place.startswith("fake") else nullcontext()


def expect(place, changes, error):
    device = place.split()[-1]
    with tensors_at(place), pytest.raises((RuntimeError, ValueError), match=pattern(error.format(device=device))):
        simplex_ops.two_simplicial_attention(**arguments(device, changes))


def at(places):
    return [pytest.param(p, marks=[pytest.mark.gpu] * (p == "cuda"), id=p) for p in places]


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("place", at(PLACES))
def test_bad_input(place, name):
    expect(place, *BAD[name])


@pytest.mark.parametrize("place", at(["cpu", "fake cpu"]))
@pytest.mark.parametrize(("dtype", "word"), [(torch.float16, "Half"), (torch.float8_e4m3fn, "Float8_e4m3fn")])
def test_dtypes_without_a_cpu_kernel(place, dtype, word):
    expect(place, {"all": dtype}, f"expected q to be float32, float64 or bfloat16 on cpu, got {word}")


@pytest.mark.parametrize("place", at([p for p in PLACES if "cuda" in p]))
@pytest.mark.parametrize(("dtype", "word"), [(torch.float64, "Double"), (torch.float8_e4m3fn, "Float8_e4m3fn")])
def test_dtypes_without_a_cuda_kernel(place, dtype, word):
    expect(place, {"all": dtype}, f"expected q to be float32, float16 or bfloat16 on cuda, got {word}")


@pytest.mark.parametrize("name", ["k1", "k2", "v1", "v2"])
def test_mixed_devices(name):
    """Every pair of devices at hand; `meta` is a second device that every machine has."""
    for fake in (False, True):
        for first, other in itertools.permutations(["cpu", "cuda", "meta"] if fake else [*DTYPES, "meta"], 2):
            error = rf"{OP}expected {name} to (?:have|be on) the device of q \({first}(:0)?\), got {other}(:0)?"
            with tensors_at("fake" if fake else ""), pytest.raises((RuntimeError, ValueError), match=error):
                simplex_ops.two_simplicial_attention(
                    *(torch.zeros(shape, device=other if n == name else first) for n, shape in SHAPES.items()), 5, 3
                )


def test_a_good_call_passes(device):
    """So that no error above comes from the helper: the unchanged call works, and works for fake tensors alike."""
    out, lse = simplex_ops.two_simplicial_attention(**arguments(device, {}), return_lse=True)
    assert torch.count_nonzero(out) == 0
    assert lse.max().item() == pytest.approx(2.70805, abs=1e-4)  # ln(5 * 3)
    with FakeTensorMode():
        fake = simplex_ops.two_simplicial_attention(**arguments(device, {}), return_lse=True)
    for real, imagined in zip((out, lse), fake, strict=True):
        assert (real.shape, real.dtype, real.stride(), real.device.type) == (
            imagined.shape, imagined.dtype, imagined.stride(), imagined.device.type,
        )  # fmt: skip


def test_errors_leave_the_op_usable(device):
    call = arguments(device, {}) | {"q": torch.randn(2, 16, 4, 64, device=device)}
    before = simplex_ops.two_simplicial_attention(**call)
    expect(device, *BAD["w1 = 0"])
    assert_same_bits(simplex_ops.two_simplicial_attention(**call), before)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"grad_out": (2, 16, 4, 32)}, r"expected grad_out to .*\[2, 16, 4, 64\].*got \[2, 16, 4, 32\]"),
        ({"grad_out": torch.float64}, r"expected grad_out to have the dtype of q \(Float\), got Double"),
        ({"grad_lse": (2, 16, 4)}, r"expected grad_lse to .*\[2, 4, 16\].*got \[2, 16, 4\]"),
        ({"lse": (2, 4, 15)}, r"expected lse to .*\[2, 4, 16\].*got \[2, 4, 15\]"),
        ({"out": (2, 16, 4, 65)}, r"expected out to .*\[2, 16, 4, 64\].*got \[2, 16, 4, 65\]"),
        ({"k1": (2, 16, 3, 64)}, r"expected (k2|v1|v2|the heads of q) to .*got "),
        ({"w1": 0}, r"expected w1 to be at least 1, got 0"),
    ],
)
@pytest.mark.parametrize("place", at(PLACES))
def test_bad_input_of_backward(place, changes, error):
    """The backward op can be called by itself (a C++ program does): it checks by itself."""
    shapes = SHAPES | {"grad_out": SHAPES["q"], "out": SHAPES["q"], "lse": (2, 4, 16), "grad_lse": (2, 4, 16)}

    def call():
        device = place.split()[-1]
        given = {"w1": 5, "w2": 3}
        for name, shape in shapes.items():
            change = changes.get(name)
            dtype = change if isinstance(change, torch.dtype) else torch.float32
            given[name] = torch.zeros(change if isinstance(change, tuple) else shape, dtype=dtype, device=device)
        given |= {name: change for name, change in changes.items() if name not in shapes}
        torch.ops.simplex.two_simplicial_attention_backward(**given)

    match = "two_simplicial_attention_backward: " + error
    with tensors_at(place), pytest.raises((RuntimeError, ValueError), match=match):
        call()


@pytest.mark.parametrize("version", ["2.9.1", "1.13.0a0+gitabc"])
def test_torch_older_than_2_10(version, tmp_path):
    """The library's stable ABI starts at 2.10: an older torch must hear that, not an undefined symbol."""
    program = f"import torch; torch.__version__ = torch.torch_version.TorchVersion({version!r}); import simplex_ops"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode != 0, "imported"
    last = run.stderr.strip().splitlines()[-1]
    assert re.search(rf"expected torch .*2\.10.*got {re.escape(version)}", last), last
