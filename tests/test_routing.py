"""Routing ops: the choice bit by bit against a stable sort, the moves against plain torch, every gradient, every error."""

import itertools
import re
from contextlib import nullcontext

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problem import DTYPES as PROBLEM_DTYPES
from problem import assert_same_bits, expanded, last_dim_strided, odd_offset, padded_rows
from routes import check_gather, check_scatter, draw, of_op
from torch._subclasses.fake_tensor import FakeTensorMode

import simplex_ops
from simplex_ops import (
    route_gather,
    route_replace,
    route_scatter_add,
    threshold_route,
    topk_route,
    topk_route_calibrate_,
)

ops = torch.ops.simplex
DTYPES = {device: [*dict.fromkeys([*dtypes, torch.float16])] for device, dtypes in PROBLEM_DTYPES.items()}
PLACES = [*DTYPES, "fake cpu", "fake cuda"]
LENGTHS = [1, 2, 99, 100, 101, 1024, 65536]
LAYOUTS = (odd_offset, padded_rows, last_dim_strided, expanded)

# Ties, both zeros, NaN and infinities in one sequence or alone.
SPECIAL = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1.0, 1.0, -1.0, 1e-45, -1e-45, 3.4e38, -3.4e38])
SCORES = {
    "normal": lambda *size: torch.randn(size),
    "coarse": lambda *size: torch.randn(size).round(),
    "constant": lambda *size: torch.full(size, 0.757),
    "negative": lambda *size: torch.full(size, -2.5),
    "all NaN": lambda *size: torch.full(size, torch.nan),
    "all -inf": lambda *size: torch.full(size, -torch.inf),
    "all inf": lambda *size: torch.full(size, torch.inf),
    "special": lambda *size: SPECIAL[torch.randint(len(SPECIAL), size)],
    "few valid": lambda *size: torch.where(torch.rand(size) < 0.1, torch.randn(size), -torch.inf),
    "gates": lambda *size: 0.757 + 1e-7 * torch.randn(size),
}


def assert_topk(scores, k):
    idx, mask = topk_route(scores, k)
    expected_idx, expected_mask = reference.topk_route(scores, k)
    assert idx.dtype == torch.int32
    assert torch.equal(idx, expected_idx)
    assert torch.equal(mask, expected_mask)


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("length", LENGTHS)
def test_topk_is_a_stable_sort(device, kind, length):
    scores = SCORES[kind](2, length).to(device)
    for k in {1, max(1, length // 2), length}:
        assert_topk(scores, k)
        if device == "cpu":
            assert_topk(scores.double(), k)


@pytest.mark.gpu
def test_the_gpu_chooses_as_the_cpu_does():
    for kind, length in itertools.product(SCORES, (1, 101, 4096, 5000)):
        scores = SCORES[kind](3, length)
        for function, how in ((topk_route, (length + 1) // 2), (lambda s, cap: threshold_route(s, 0.3, cap), length)):
            for a, b in zip(function(scores.cuda(), how), function(scores, how), strict=True):
                assert_same_bits(a.cpu(), b, f"{kind} {length}")


def test_topk_of_strided_scores(device):
    scores = torch.randn(40, 3, device=device)
    assert_topk(scores.t(), 7)
    assert_topk(scores[:, 1:][:, ::2].t(), 40)
    assert_topk(odd_offset(scores), 2)


def test_topk_chooses_each_sequence_by_itself(device):
    scores = torch.randn(5, 301, device=device)
    idx, _ = topk_route(scores, 100)
    scores[[0, 1, 3, 4]] = torch.nan
    assert_same_bits(topk_route(scores, 100)[0][2], idx[2])


def test_no_sequence(device):
    idx, mask = topk_route(torch.zeros(0, 7, device=device), 3)
    assert (idx.shape, idx.dtype, mask.shape, mask.dtype) == ((0, 3), torch.int32, (0, 7), torch.bool)
    idx, count = threshold_route(torch.zeros(0, 7, device=device), 0.5, 3)
    assert (idx.shape, count.shape, count.dtype) == ((0, 3), (0,), torch.int32)
    idx, count = threshold_route(torch.zeros(2, 0, device=device), 0.5, 3)
    assert (idx.tolist(), count.tolist()) == ([[-1] * 3] * 2, [0, 0])


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("length", [*LENGTHS, 5000])
def test_threshold(device, kind, length):
    scores = SCORES[kind](3, length).to(device)
    for threshold in (0.0, 0.757, -torch.inf, torch.inf, 1e-45):
        for cap in (1, length // 2 + 1, length + 5):
            for actual, expected in zip(
                threshold_route(scores, threshold, cap), reference.threshold_route(scores, threshold, cap), strict=True
            ):
                assert_same_bits(actual, expected)


def test_threshold_is_causal(device):
    scores = torch.rand(2, 60, device=device)
    idx, _ = threshold_route(scores, 0.5, 60)
    scores[:, 30:] = torch.rand(2, 30, device=device)
    again, _ = threshold_route(scores, 0.5, 60)
    for a, b in zip(idx, again, strict=True):
        assert a[(a >= 0) & (a < 30)].tolist() == b[(b >= 0) & (b < 30)].tolist()


@pytest.mark.parametrize("kind", SCORES)
def test_calibration(device, kind):
    """From the first one, the plain average, to the moving one; what is not finite counts but moves nothing."""
    for batch, length, k in ((1, 1, 1), (3, 100, 30), (200, 4096, 2048), (9, 5000, 2500)):
        threshold, calibrations = torch.tensor(0.3, device=device), torch.zeros((), device=device)
        for _ in range(3):
            scores = SCORES[kind](batch, length).to(device)
            truth = reference.topk_route_calibrate(scores.double(), k, threshold.double(), calibrations)
            actual = (*topk_route_calibrate_(scores, k, threshold, calibrations), threshold, calibrations)
            assert all(torch.equal(a, t) for a, t in zip(actual[:2], truth[:2], strict=True))
            torch.testing.assert_close(threshold.double(), truth[2], rtol=1e-5, atol=1e-6)
            assert calibrations == truth[3]
    strided = torch.randn(6, 4, device=device).t()
    calibrations.fill_(1000)
    topk_route_calibrate_(strided, 6, threshold.fill_(0), calibrations)
    assert threshold.item() == pytest.approx(0.02 * strided.amin(1).mean().item(), rel=1e-5)
    topk_route_calibrate_(strided[:0], 2, threshold, calibrations)
    assert calibrations == 1001


# Moves


@pytest.mark.parametrize("length", LENGTHS)
def test_moves(device, length):
    for dtype in DTYPES[device]:
        for slots in {1, max(1, length // 2), length}:
            base, y, idx, gate = draw(2, length, slots, 8, dtype, device, empty=slots // 4)
            check_gather(base, idx)
            check_scatter(base, y, idx, gate)
            check_scatter(base, y, idx, None)


def test_wide_rows(device):
    for dtype in DTYPES[device]:
        base, y, idx, gate = draw(1, 5, 3, 2056, dtype, device)
        check_gather(base, idx)
        check_scatter(base, y, idx, gate)


def test_layouts(device):
    for layout in LAYOUTS:
        base, y, idx, gate = draw(3, 9, 4, 16, torch.float32, device, layout=layout)
        check_gather(base, idx)
        check_scatter(base, y, idx.t().contiguous().t(), odd_offset(gate))


def test_other_rows_keep_their_bits(device):
    for dtype in DTYPES[device]:
        base, y, idx, gate = draw(2, 9, 4, 16, dtype, device, empty=1)
        base[:] = SPECIAL.to(dtype).repeat(12)[:144].view(9, 16)
        mask = torch.zeros(2, 9, dtype=torch.bool, device=device).scatter(1, idx[:, :3].long(), True)
        for function in (route_scatter_add, route_replace):
            assert_same_bits(function(base, y, idx, of_op(function, gate, idx))[~mask], base[~mask])


def test_replaced_rows_are_the_new_ones_bit_by_bit(device):
    for dtype in DTYPES[device]:
        base, y, idx, _ = draw(2, 9, 4, 16, dtype, device)
        base[:, ::2], y[:] = torch.nan, SPECIAL[~SPECIAL.isnan()].to(dtype).repeat(6)[:64].view(4, 16)
        assert_same_bits(route_gather(route_replace(base, y, idx), idx), y)


def test_nothing_to_move(device):
    for shape in ((0, 5, 2, 8), (2, 5, 0, 8), (2, 0, 0, 8), (2, 5, 2, 0)):
        base, y, idx, gate = draw(*shape, torch.float32, device)
        check_gather(base, idx)
        check_scatter(base, y, idx, gate)


@pytest.mark.gpu
def test_an_index_out_of_range_moves_nothing_on_cuda():
    idx = torch.tensor([[-7, 2, 2**31 - 1, 4]], dtype=torch.int32, device="cuda")
    x = torch.randn(1, 4, 8, device="cuda")
    y = route_gather(x, idx)
    assert_same_bits(y[0, 1], x[0, 2])
    assert y[0, [0, 2, 3]].abs().sum() == 0
    out = route_scatter_add(x, torch.ones(1, 4, 8, device="cuda"), idx)
    assert_same_bits(out[0, [0, 1, 3]], x[0, [0, 1, 3]])


@pytest.mark.parametrize("value", [-2, 4, 2**31 - 1, -(2**31)])
def test_an_index_out_of_range_is_refused_on_the_cpu(value):
    idx = torch.tensor([[0, value]], dtype=torch.int32)
    for name, call in {
        "x": lambda x: route_gather(x, idx),
        "base": lambda x: route_replace(x, x[:, :2], idx),
    }.items():
        with pytest.raises(
            RuntimeError, match=rf"expected idx to be -1 or an index below the length of {name} \(4\), got {value}$"
        ):
            call(torch.randn(1, 4, 8))


def test_gradcheck():
    base, y, idx, gate = (
        x.requires_grad_() if x.is_floating_point() else x for x in draw(2, 5, 3, 4, torch.float64, "cpu", 1)
    )
    assert torch.autograd.gradcheck(route_gather, (base, idx))
    for function in (route_scatter_add, route_replace):
        assert torch.autograd.gradcheck(function, (base, y, idx, of_op(function, gate, idx)))
        assert torch.autograd.gradcheck(function, (base, y, idx))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, requires_grad):
    base, y, idx, gate = draw(2, 7, 3, 8, torch.float32, device, 1)
    torch.library.opcheck(ops.topk_route.default, (torch.randn(2, 9, device=device).requires_grad_(requires_grad), 4))
    torch.library.opcheck(ops.threshold_route.default, (torch.randn(2, 9, device=device), 0.3, 4))
    torch.library.opcheck(ops.route_gather_backward.default, (y, base, idx))
    torch.library.opcheck(ops.route_scatter_add_backward.default, (base, y, idx, gate[:, :3]))
    torch.library.opcheck(ops.route_scatter_add_backward.default, (base, y, idx))
    torch.library.opcheck(ops.route_replace_backward.default, (base, base, y, idx, gate))
    numbers = torch.tensor([0.5, 3.0], device=device).unbind()
    torch.library.opcheck(ops.topk_route_calibrate_.default, (gate, 4, *numbers))
    base, y, gate = (x.requires_grad_(requires_grad) for x in (base, y, gate))
    torch.library.opcheck(ops.route_gather.default, (base, idx))
    torch.library.opcheck(ops.route_scatter_add.default, (base, y, idx, gate[:, :3]))
    torch.library.opcheck(ops.route_scatter_add.default, (base, y, idx))
    torch.library.opcheck(ops.route_replace.default, (base, y, idx, gate))


def routed(x, scores, k):
    """A whole route, with a stand-in for the layer, put back both ways."""
    idx, _ = topk_route(scores, k)
    y = torch.tanh(route_gather(x, idx))
    return route_scatter_add(route_replace(x, y, idx, scores), y, idx, scores.gather(1, idx.long()))


def test_compile(device):
    compiled = torch.compile(routed, fullgraph=True, dynamic=True)
    for batch, length, k in ((2, 7, 3), (3, 12, 5)):
        x = torch.randn(batch, length, 16, device=device, requires_grad=True)
        scores = torch.rand(batch, length, device=device, requires_grad=True)
        results = [
            (out, *torch.autograd.grad(out.square().sum(), (x, scores)))
            for out in (compiled(x, scores, k), routed(x, scores, k))
        ]
        torch.testing.assert_close(*results)


@pytest.mark.gpu
def test_cuda_graph():
    x, scores = torch.randn(2, 50, 16, device="cuda"), torch.rand(2, 50, device="cuda")
    numbers = torch.tensor([0.55, 0.44, 1.025, 1.1], device="cuda").unbind()

    def step():
        out = routed(x, scores, 20)
        gate = simplex_ops.surprise_gate(x, out, x, *numbers)[0]
        return out, gate, threshold_route(scores, 0.5, 30)[0], simplex_ops.causal_route_logits(x, scores[0, :32])

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        x.copy_(torch.randn(2, 50, 16))
        scores.copy_(torch.rand(2, 50))
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b)


def test_export(device):
    class Routed(torch.nn.Module):
        def forward(self, x, scores):
            out = routed(x, scores, scores.shape[1] // 2)
            idx, count = threshold_route(scores, 0.5, 4)
            return out, route_gather(x, idx), count

    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=4)
    arguments = [
        (torch.randn(b, n, 8, device=device), torch.rand(b, n, device=device)) for b, n in ((2, 6), (1, 4), (5, 131))
    ]
    shapes = ({0: batch, 1: length}, {0: batch, 1: length})
    program = torch.export.export(Routed(), arguments[0], dynamic_shapes=shapes).module()
    for case in arguments:
        torch.testing.assert_close(program(*case), Routed()(*case))


def test_autocast_leaves_dtypes_alone(device):
    x, scores = torch.randn(2, 9, 16, device=device), 0.757 + 1e-6 * torch.rand(2, 9, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = routed(x, scores, 4)
    assert_same_bits(out, routed(x, scores, 4))


# Errors: (function of the op's module, what differs from a good call, the error)
GOOD = {
    "topk_route": {"scores": (2, 5), "k": 3},
    "threshold_route": {"scores": (2, 5), "threshold": 0.5, "cap": 3},
    "route_gather": {"x": (2, 5, 8), "idx": (2, 3)},
    "route_gather_backward": {"grad_y": (2, 3, 8), "x": (2, 5, 8), "idx": (2, 3)},
    "route_scatter_add": {"base": (2, 5, 8), "y": (2, 3, 8), "idx": (2, 3), "gate": (2, 3)},
    "route_scatter_add_backward": {"grad_out": (2, 5, 8), "y": (2, 3, 8), "idx": (2, 3), "gate": (2, 3)},
    "route_replace": {"base": (2, 5, 8), "y": (2, 3, 8), "idx": (2, 3), "gate": (2, 5)},
    "route_replace_backward": {"grad_out": (2, 5, 8), "base": (2, 5, 8), "y": (2, 3, 8), "idx": (2, 3), "gate": (2, 5)},
    "topk_route_calibrate_": {"scores": (2, 5), "k": 3, "threshold": (), "calibrations": ()},
}
BAD = [
    ("topk_route", {"scores": (5,)}, "scores to be 2-dimensional [batch, length], got 1 dimensions"),
    ("topk_route", {"scores": torch.bfloat16}, "scores to be float32"),
    ("topk_route", {"k": 0}, "k to be from 1 to the length of scores (5), got 0"),
    ("topk_route", {"k": -1}, "k to be from 1 to the length of scores (5), got -1"),
    ("topk_route", {"k": 6}, "k to be from 1 to the length of scores (5), got 6"),
    ("topk_route", {"scores": (2, 0)}, "k to be from 1 to the length of scores (0), got 3"),
    ("threshold_route", {"scores": (2, 5, 1)}, "scores to be 2-dimensional [batch, length], got 3 dimensions"),
    ("threshold_route", {"threshold": float("nan")}, "threshold to be a number, got nan"),
    ("threshold_route", {"cap": 0}, "cap to be at least 1, got 0"),
    ("threshold_route", {"cap": 2**31}, "cap to be below 2^31, got 2147483648"),
    ("route_gather", {"x": (5, 8)}, "x to be 3-dimensional [batch, length, dim], got 2 dimensions"),
    ("route_gather", {"x": torch.int32}, "x to be float32"),
    ("route_gather", {"idx": (3,)}, "idx to be 2-dimensional [batch, slots], got 1 dimensions"),
    ("route_gather", {"idx": (3, 3)}, "idx to have shape [2, 3] (batch, slots), got [3, 3]"),
    ("route_gather", {"idx": torch.int64}, "idx to have dtype Int, got Long"),
    ("route_gather_backward", {"grad_y": (2, 4, 8)}, "grad_y to have shape [2, 3, 8] (batch, slots of idx, last dim of x), got [2, 4, 8]"),
    ("route_gather_backward", {"grad_y": torch.float16}, "grad_y to have the dtype of x (Float), got Half"),
    ("route_scatter_add", {"y": (2, 3, 9)}, "y to have shape [2, 3, 8] (batch, slots of idx, dim), got [2, 3, 9]"),
    ("route_scatter_add", {"y": torch.bfloat16}, "y to have the dtype of base (Float), got BFloat16"),
    ("route_scatter_add", {"gate": (2, 3, 1)}, "gate to have shape [2, 3] (that of idx), got [2, 3, 1]"),
    ("route_scatter_add", {"gate": torch.bfloat16}, "gate to have dtype Float, got BFloat16"),
    ("route_scatter_add_backward", {"y": (2, 4, 8)}, "y to have shape [2, 3, 8] (batch, slots of idx, dim), got [2, 4, 8]"),
    ("route_replace", {"y": (2, 3, 9)}, "y to have shape [2, 3, 8] (batch, slots of idx, dim), got [2, 3, 9]"),
    ("route_replace", {"gate": (2, 3)}, "gate to have shape [2, 5] (batch, length), got [2, 3]"),
    ("topk_route_calibrate_", {"scores": (5,)}, "scores to be 2-dimensional [batch, length], got 1 dimensions"),
    ("topk_route_calibrate_", {"k": 6}, "k to be from 1 to the length of scores (5), got 6"),
    ("topk_route_calibrate_", {"threshold": (1,)}, "threshold to have shape [] (one number), got [1]"),
    ("topk_route_calibrate_", {"calibrations": torch.float16}, "calibrations to have dtype Float, got Half"),
    ("route_replace_backward", {"base": (2, 6, 8)}, "base to have shape [2, 5, 8] (that of grad_out), got [2, 6, 8]"),
    ("route_replace_backward", {"base": torch.float16}, "base to have the dtype of grad_out (Float), got Half"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "changes", "error"), BAD)
@pytest.mark.parametrize("place", [pytest.param(p, marks=[pytest.mark.gpu] * (p == "cuda")) for p in PLACES])
def test_bad_input(place, op, changes, error):
    def call():
        given = dict(GOOD[op])
        for name, value in given.items():
            if isinstance(value, tuple):
                change = changes.get(name)
                dtype = torch.int32 if name == "idx" else torch.float32
                dtype = change if isinstance(change, torch.dtype) else dtype
                shape = change if isinstance(change, tuple) else value
                given[name] = torch.zeros(shape, dtype=dtype, device=place.split()[-1])
            else:
                given[name] = changes.get(name, value)
        getattr(ops, op)(**given)

    with (
        FakeTensorMode() if place.startswith("fake") else nullcontext(),
        pytest.raises((RuntimeError, ValueError)) as info,
    ):
        call()
    assert re.search(re.escape(f"{op}: expected {error}"), str(info.value)), info.value


@given(
    batch=st.integers(0, 3), length=st.integers(1, 200), share=st.floats(0, 1), kind=st.sampled_from([*SCORES]),
    seed=st.integers(0, 2**32),
)  # fmt: skip
@settings(max_examples=300)
def test_any_choice(batch, length, share, kind, seed):
    torch.manual_seed(seed)
    scores = SCORES[kind](batch, length)
    assert_topk(scores, max(1, int(share * length)))
    actual, expected = (f.threshold_route(scores, 0.5, length) for f in (simplex_ops, reference))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@given(
    batch=st.integers(0, 3), length=st.integers(1, 20), share=st.floats(0, 1), dim=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES["cpu"]), gated=st.booleans(), seed=st.integers(0, 2**32),
)  # fmt: skip
@settings(max_examples=300)
def test_any_move(batch, length, share, dim, dtype, gated, seed):
    torch.manual_seed(seed)
    slots = int(share * length)
    base, y, idx, gate = draw(batch, length, slots, dim, dtype, "cpu", empty=slots // 3)
    check_gather(base, idx)
    check_scatter(base, y, idx, gate if gated else None)
