"""grassmann_step: decoding in any pieces equals one full pass; its errors; the op inside torch."""

import re
from contextlib import nullcontext

import pytest
import reference
import torch
from grassmann import DTYPES, PAPER_OFFSETS
from hypothesis import given, settings
from hypothesis import strategies as st
from problem import FLOOR, assert_same_bits
from torch._subclasses.fake_tensor import FakeTensorMode

import simplex_ops

op = simplex_ops.grassmann_step


def draw(batch, length, r, d, dtype, device):
    shapes = ((batch, length, r), (d, r * (r - 1) // 2), (d,))
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def decode(z, weight, bias, offsets, chunks, slots, **options):
    ring = torch.full(
        (z.shape[0], slots, z.shape[2]), torch.nan, dtype=z.dtype, device=z.device
    )  # the start is not read
    position, outputs = 0, []
    for count in chunks:
        chunk = z[:, position : position + count]
        outputs.append(op(chunk, ring, weight, bias, offsets, position, **options))
        position += count
    assert position == z.shape[1]
    held = torch.arange(max(0, position - slots), position, device=z.device)
    assert_same_bits(ring[:, held % slots], z[:, held])
    return torch.cat(outputs, 1)


def check(z, weight, bias, offsets, chunks, slots, **options):
    got = decode(z, weight, bias, offsets, chunks, slots, **options)
    wide = [x if x is None else x.double() for x in (z, weight, bias)]
    truth = reference.grassmann_mix(*wide, offsets, **options)
    size = truth.abs().max().item() if truth.numel() else 0
    torch.testing.assert_close(got.double(), truth, rtol=0, atol=8 * FLOOR[z.dtype] * (1 + size))


@pytest.mark.parametrize("chunks", [[1] * 40, [40], [5, 1, 1, 20, 1, 0, 12], [6, 1, 7, 1, 25], [17, 17, 6]], ids=str)
@pytest.mark.parametrize("offsets", [(1,), PAPER_OFFSETS, (7, 7, 3), (50, 2)], ids=str)
def test_pieces_equal_the_whole(device, chunks, offsets):
    for dtype in DTYPES[device]:
        for slots in (max(offsets), max(offsets) + 3):
            check(*draw(2, 40, 8, 5, dtype, device), offsets, chunks, slots)


@pytest.mark.parametrize("r", [2, 7, 32, 33, 128])
def test_ranks(device, r):
    check(*draw(3, 21, r, 24, torch.float32, device), PAPER_OFFSETS, [9, *[1] * 12], 16)


def test_tokens_without_a_pair(device):
    """Those before the smallest offset have no bias, unless asked for, however the text is cut."""
    z, weight, bias = draw(1, 12, 4, 3, torch.float32, device)
    for chunks in ([12], [1] * 12, [2, 10], [3, 9], [5, 7]):
        got = decode(z, weight, bias, (4, 6), chunks, 6)
        assert torch.count_nonzero(got[:, :4]) == 0
        got = decode(z, weight, bias, (4, 6), chunks, 6, bias_everywhere=True)
        torch.testing.assert_close(got[:, :4], bias.expand(1, 4, 3))
        check(z, weight, None, (4, 6), chunks, 6)


def test_nothing(device):
    for batch, count, d in ((0, 3, 5), (2, 0, 5), (2, 3, 0)):
        z, weight, bias = draw(batch, count, 4, d, torch.float32, device)
        ring = torch.ones(batch, 2, 4, device=device)
        assert op(z, ring, weight, bias, [2], 7).shape == (batch, count, d)
        assert count == 0 or torch.equal(ring[:, [(7 + count - 1) % 2]], z[:, -1:])


@settings(max_examples=100)
@given(st.data())
def test_drawn_problems(data):
    def integers(least, most):
        return data.draw(st.integers(least, most))

    offsets = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=6))
    chunks = data.draw(st.lists(st.integers(0, 12), max_size=8))
    torch.manual_seed(integers(0, 2**31))
    dtype = data.draw(st.sampled_from(DTYPES["cpu"]))
    tensors = draw(integers(0, 3), sum(chunks), integers(2, 20), integers(0, 9), dtype, "cpu")
    if chunks:
        check(*tensors, offsets, chunks, max(offsets) + integers(0, 4), bias_everywhere=data.draw(st.booleans()))


def test_a_step_is_independent_of_the_length(device):
    """Position 2^40 costs what position 16 does, and gives the same."""
    z, weight, bias = draw(2, 1, 8, 5, torch.float32, device)
    ring = torch.randn(2, 16, 8, device=device)
    first, later = ring.clone(), ring.clone()
    assert_same_bits(
        op(z, first, weight, bias, PAPER_OFFSETS, 16), op(z, later, weight, bias, PAPER_OFFSETS, 2**40)
    )  # fmt: skip
    assert_same_bits(first, later)


def test_a_wider_ring(device):
    """Under autocast tokens are bfloat16 and the ring, made like the weights, float32."""
    z, weight, bias = draw(2, 20, 8, 5, torch.bfloat16, device)
    ring = torch.zeros(2, 16, 8, device=device)
    got = [op(z[:, t : t + 1], ring, weight, bias, PAPER_OFFSETS, t) for t in range(20)]
    torch.testing.assert_close(
        torch.cat(got, 1), simplex_ops.grassmann_mix(z, weight, bias, PAPER_OFFSETS), rtol=0.02, atol=0.02
    )


def test_autocast_leaves_it_alone(device):
    z, weight, bias = draw(2, 5, 8, 5, torch.float32, device)
    rings = torch.zeros(2, 2, 4, 8, device=device)
    with torch.autocast(device, torch.bfloat16):
        got = op(z, rings[0], weight, bias, [1, 4], 0)
    assert_same_bits(got, op(z, rings[1], weight, bias, [1, 4], 0))


def test_records_no_gradient(device):
    z, weight, bias = (x.requires_grad_() for x in draw(2, 3, 4, 5, torch.float32, device))
    ring = torch.zeros(2, 4, 4, device=device)
    assert not op(z, ring, weight, bias, [1], 2).requires_grad
    assert not ring.requires_grad
    assert torch.is_grad_enabled()


GOOD = {"z": (2, 3, 4), "ring": (2, 5, 4), "weight": (3, 6), "bias": (3,), "offsets": [1, 5], "position": 7}
BAD = {
    "z of rank 2": ({"z": (3, 4)}, "expected z to be 3-dimensional [batch, length, r], got 2 dimensions"),
    "columns of weight": ({"weight": (3, 7)}, "expected weight to have shape [3, 6] .*, got [3, 7]"),
    "offset 0": ({"offsets": [0]}, "expected every offset to be at least 1, got 0"),
    "ring of rank 2": ({"ring": (5, 4)}, "expected ring to be 3-dimensional [batch, slots, r], got 2 dimensions"),
    "batch of ring": ({"ring": (1, 5, 4)}, "expected ring to have shape [2, 5, 4] .*, got [1, 5, 4]"),
    "r of ring": ({"ring": (2, 5, 3)}, "expected ring to have shape [2, 5, 4] .*, got [2, 5, 3]"),
    "slots": (
        {"offsets": [1, 6]},
        "expected ring to have a slot for each token up to the largest offset (6), got 5",
    ),
    "integers": ({"ring": torch.int64}, "expected ring to be float32, .* on {device}, got Long"),
    "position": ({"position": -1}, "expected position to be at least 0, got -1"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("fake", [False, True])
def test_bad_input(device, fake, case):
    changes, error = BAD[case]
    pattern = re.escape(f"grassmann_step: {error.format(device=device)}").replace(r"\.\*", ".*")
    with FakeTensorMode() if fake else nullcontext():
        args = dict(GOOD)
        for name in ("z", "ring", "weight", "bias"):
            change = changes.get(name, GOOD[name])
            dtype, shape = (change, GOOD[name]) if isinstance(change, torch.dtype) else (torch.float32, change)
            args[name] = torch.zeros(shape, dtype=dtype, device=device)
        args |= {name: changes[name] for name in ("offsets", "position") if name in changes}
        with pytest.raises((RuntimeError, ValueError), match=pattern):
            op(**args)


def test_opcheck(device):
    z, weight, bias = draw(2, 3, 4, 5, torch.float32, device)
    for position in (0, 1, 9):
        args = (z, torch.randn(2, 6, 4, device=device), weight, bias, [1, 6], position)
        torch.library.opcheck(torch.ops.simplex.grassmann_step.default, args)


def test_compile(device):
    """The ring is updated through the graph, and a new position is no new graph."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(op, fullgraph=True, dynamic=True)
    z, weight, bias = draw(2, 12, 4, 5, torch.float32, device)
    ring, outputs = torch.zeros(2, 6, 4, device=device), []
    for t in range(2, 12):
        outputs.append(compiled(z[:, t : t + 1], ring, weight, bias, [1, 6], t - 2))
    want = simplex_ops.grassmann_mix(z[:, 2:], weight, bias, [1, 6])
    torch.testing.assert_close(torch.cat(outputs, 1), want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3  # positions 0 and 1 are constants to dynamo


def test_flops():
    z, weight, _ = draw(3, 2, 8, 5, torch.float32, "cpu")
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        op(z, torch.zeros(3, 9, 8), weight, None, [1, 2, 9], 1)
    assert counter.get_total_flops() == 3 * (12 * 8 * (2 + 1) + 2 * 28 * (3 + 10))
