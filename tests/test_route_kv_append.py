"""The compact cache: rows, counts and rotations slot by slot, what stays untouched, every error."""

import re
from contextlib import nullcontext

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problem import DTYPES as PROBLEM_DTYPES
from problem import FLOOR, assert_same_bits, odd_offset, padded_rows
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from simplex_ops import route_kv_append_

op = torch.ops.simplex.route_kv_append_.default
DTYPES = {device: [*dict.fromkeys([*dtypes, torch.float16])] for device, dtypes in PROBLEM_DTYPES.items()}


def draw(batch, capacity, slots, heads, head_dim, dtype, device, far=50):
    """keys, values, count, k, v, positions, frequencies: each sequence with a count and a number of filled slots of its own."""
    sizes = [(batch, rows, heads, head_dim) for rows in (capacity, capacity, slots, slots)]
    keys, values, k, v = (torch.randn(size, device=device).to(dtype) for size in sizes)
    count = torch.randint(capacity + 1, (batch,), dtype=torch.int32, device=device)
    positions = torch.randint(far, (batch, slots), device=device).sort(1).values.to(torch.int32)
    filled = torch.randint(slots + 1, (batch, 1), device=device)
    positions = torch.where(torch.arange(slots, device=device) < filled, positions, -1).to(torch.int32)
    frequencies = 100.0 ** (-torch.arange(head_dim // 2, device=device) / max(head_dim // 2, 1))
    return keys, values, count, k, v, positions, frequencies.to(reference.wide(dtype))


def check(keys, values, count, k, v, positions, frequencies):
    expected = reference.route_kv_append(keys, values, count, k, v, positions, frequencies)
    before = count.clone()
    assert route_kv_append_(keys, values, count, k, v, positions, frequencies) is None
    assert_same_bits(count, expected[2])
    assert_same_bits(values, expected[1])
    for b in range(len(keys)):  # what was there before, and what is behind the new rows, keeps its bits
        assert_same_bits(keys[b, : before[b]], expected[0][b, : before[b]])
        assert_same_bits(keys[b, count[b] :], expected[0][b, count[b] :])
    if frequencies is None:
        assert_same_bits(keys, expected[0])
    else:
        # One rounding of sums of two products, and cosines that differ in their last bits.
        tolerance = 2 * FLOOR[keys.dtype]
        torch.testing.assert_close(keys, expected[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 8), (2, 64), (5, 8), (3, 200)])
def test_is_its_equation(device, heads, head_dim):
    for dtype in DTYPES[device]:
        for slots in (1, 7):
            problem = draw(4, 9, slots, heads, head_dim, dtype, device)
            check(*problem)
            check(*problem[:6], None)


@pytest.mark.parametrize("slots", [1, 2, 99, 100, 101, 1024, 65536])
def test_lengths(device, slots):
    """More room than slots, as much, and less."""
    for capacity in (slots + 3, slots, slots // 2 + 1):
        check(*draw(2, capacity, slots, 1, 8, torch.float32, device))


def test_far_positions(device):
    """2^20 tokens on, an angle of a million: the same rotation, up to what one rounding of the angle is worth."""
    problem = draw(2, 5, 4, 1, 8, torch.float32, device, far=2**20)
    truth = reference.rotate(problem[3].double(), problem[5], problem[6].double())
    count = problem[2].clone()
    route_kv_append_(*problem)
    for b in range(2):
        written = problem[0][b, count[b] : problem[2][b]]
        torch.testing.assert_close(written.double(), truth[b, : len(written)], rtol=0, atol=0.4)


def test_layouts_of_what_is_appended(device):
    keys, values, count, k, v, positions, frequencies = draw(3, 9, 4, 2, 16, torch.float32, device)
    wide = torch.cat((k, v), -1)
    check(keys, values, count, padded_rows(k), wide[..., 16:], positions.t().contiguous().t(), odd_offset(frequencies))


def test_nothing_to_append(device):
    for shape in ((0, 5, 2, 1, 8), (2, 5, 0, 1, 8), (2, 0, 3, 1, 8), (2, 5, 3, 0, 8)):
        check(*draw(*shape, torch.float32, device))


def test_slot_by_slot_is_all_at_once(device):
    problem = draw(3, 20, 9, 2, 8, torch.float32, device)
    problem[2].clamp_(max=8)
    keys, values, count, k, v, positions, frequencies = problem
    other = [x.clone() for x in (keys, values, count)]
    route_kv_append_(*problem)
    for s in range(9):
        route_kv_append_(*other, k[:, s : s + 1], v[:, s : s + 1], positions[:, s : s + 1], frequencies)
    for a, b in zip(other, (keys, values, count), strict=True):
        assert_same_bits(a, b)


def test_opcheck(device):
    problem = draw(2, 6, 3, 2, 8, torch.float32, device)
    torch.library.opcheck(op, problem)
    torch.library.opcheck(op, problem[:6])


def test_compile(device):
    compiled = torch.compile(lambda *x: (route_kv_append_(*x), x[0] + 1)[1], fullgraph=True, dynamic=True)
    for slots in (3, 5):
        problem = draw(2, 12, slots, 2, 8, torch.float32, device)
        other = [x.clone() for x in problem]
        out = compiled(*problem)
        route_kv_append_(*other)
        assert_same_bits(problem[2], other[2])
        torch.testing.assert_close((*problem[:2], out), (*other[:2], other[0] + 1))


def test_export(device):
    class Append(torch.nn.Module):
        def forward(self, *x):
            return route_kv_append_(*x), x[0] + 1

    slots = torch.export.Dim("slots", min=2)
    shapes = ((*[{}] * 3, {1: slots}, {1: slots}, {1: slots}, {}),)
    program = torch.export.export(
        Append(), tuple(draw(2, 12, 3, 2, 8, torch.float32, device)), dynamic_shapes=shapes
    ).module()
    for count in (2, 7):
        problem = draw(2, 12, count, 2, 8, torch.float32, device)
        other = [x.clone() for x in problem]
        torch.testing.assert_close((program(*problem), *problem[:3]), (Append()(*other), *other[:3]))


@pytest.mark.gpu
def test_cuda_graph():
    problem = draw(2, 12, 3, 2, 8, torch.float32, "cuda")
    problem[2].zero_()
    problem[5][:] = torch.tensor([1, 5, -1], device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        route_kv_append_(*problem)
    for steps in range(1, 8):
        graph.replay()
        assert problem[2].tolist() == [min(12, 2 * steps)] * 2


def test_flops():
    with FlopCounterMode(display=False) as counter:
        route_kv_append_(*draw(2, 6, 3, 2, 8, torch.float32, "cpu"))
    assert counter.get_total_flops() == 3 * 2 * 3 * 2 * 8


def test_the_cpu_refuses_holes_and_false_counts():
    problem = draw(1, 6, 3, 1, 8, torch.float32, "cpu")
    for positions in ([-1, 2, 3], [2, -1, 3]):
        problem[5][0] = torch.tensor(positions)
        with pytest.raises(
            RuntimeError, match=r"expected the empty slots of positions to be the last ones, got -1 before [23]"
        ):
            route_kv_append_(*problem)
    for value in (-1, 7):
        problem[2][0] = value
        with pytest.raises(RuntimeError, match=rf"count to be from 0 to the capacity of keys \(6\), got {value}"):
            route_kv_append_(*problem)


SHAPES = {
    "keys": (2, 6, 2, 8), "values": (2, 6, 2, 8), "count": (2,), "k": (2, 3, 2, 8), "v": (2, 3, 2, 8), "positions": (2, 3),
    "frequencies": (4,),
}  # fmt: skip
BAD = [
    ({"k": (2, 3, 8)}, "k to be 4-dimensional [batch, slots, heads, head_dim], got 3 dimensions"),
    ({"keys": (2, 6, 8)}, "keys to be 4-dimensional [batch, capacity, heads, head_dim], got 3 dimensions"),
    ({"k": torch.int32}, "k to be float32"),
    ({"k": (2, 3, 8, 7)}, "the head_dim of k to be even, got 7"),
    ({"v": (2, 3, 2, 6)}, "v to have shape [2, 3, 2, 8] (that of k), got [2, 3, 2, 6]"),
    ({"v": torch.float16}, "v to have the dtype of k (Float), got Half"),
    ({"keys": (2, 6, 1, 8)}, "keys to have shape [2, 6, 2, 8] (batch of k, the capacity of keys, heads and head_dim of k), got"),
    ({"values": (2, 5, 2, 8)}, "values to have shape [2, 6, 2, 8] (batch of k, the capacity of keys, heads and head_dim of k), got"),
    ({"values": torch.bfloat16}, "values to have the dtype of k (Float), got BFloat16"),
    ({"keys": "strided"}, "keys to be contiguous, got strides that are not"),
    ({"count": "strided"}, "count to be contiguous, got strides that are not"),
    ({"count": (3,)}, "count to have shape [2] (batch of k), got [3]"),
    ({"count": torch.int64}, "count to have dtype Int, got Long"),
    ({"positions": (2, 4)}, "positions to have shape [2, 3] (batch, slots of k), got [2, 4]"),
    ({"positions": torch.int64}, "positions to have dtype Int, got Long"),
    ({"frequencies": (8,)}, "frequencies to have shape [4] (half the head_dim of k), got [8]"),
    ({"frequencies": torch.float64}, "frequencies to have dtype Float, got Double"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error"), BAD)
@pytest.mark.parametrize(
    "place", [pytest.param(p, marks=[pytest.mark.gpu] * (p == "cuda")) for p in [*DTYPES, "fake cpu", "fake cuda"]]
)
def test_bad_input(place, changes, error):
    def make(name, shape):
        change = changes.get(name)
        dtype = torch.int32 if name in ("count", "positions") else torch.float32
        dtype = change if isinstance(change, torch.dtype) else dtype
        shape = change if isinstance(change, tuple) else shape
        if change == "strided":
            strides = (96, 8, 48, 1) if len(shape) == 4 else (2,)
            return torch.empty_strided(shape, strides, dtype=dtype, device=place.split()[-1])
        return torch.zeros(shape, dtype=dtype, device=place.split()[-1])

    with (
        FakeTensorMode() if place.startswith("fake") else nullcontext(),
        pytest.raises((RuntimeError, ValueError)) as info,
    ):
        op(**{name: make(name, shape) for name, shape in SHAPES.items()})
    assert re.search(re.escape(f"route_kv_append_: expected {error}"), str(info.value)), info.value


@given(
    batch=st.integers(0, 3), capacity=st.integers(0, 12), slots=st.integers(0, 8), heads=st.integers(0, 3),
    half=st.integers(0, 9), dtype=st.sampled_from(DTYPES["cpu"]), rotates=st.booleans(), seed=st.integers(0, 2**32),
)  # fmt: skip
@settings(max_examples=300)
def test_any_append(batch, capacity, slots, heads, half, dtype, rotates, seed):
    torch.manual_seed(seed)
    problem = draw(batch, capacity, slots, heads, 2 * half, dtype, "cpu")
    check(*problem[:6], problem[6] if rotates else None)
