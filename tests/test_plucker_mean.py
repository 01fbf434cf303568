"""plucker_mean: accuracy by the 2x rule against the naive form, and what its equation promises."""

import itertools
from functools import partial

import grassmann
import pytest
import reference
import torch
from covering import covering
from grassmann import DTYPES, Problem, check, draw, evaluate
from hypothesis import given, settings
from hypothesis import strategies as st
from problem import LAYOUTS, assert_same_bits

import simplex_ops

op = simplex_ops.plucker_mean

RANKS = [2, 7, 16, 32, 33, 64, 128]
LENGTHS = [0, 1, 2, 5, 17, 64, 513]
OFFSETS = [grassmann.PAPER_OFFSETS, (1,), (3,), (1, 1, 2, 2, 4), (5, 600, 2**40), (1, 7, 16, 63), (64, 512), (600,)]
LAYOUTS_OF_TOKENS = [layout for layout in LAYOUTS if layout.__name__ not in ("heads_first", "fused")]  # those are 4-d


def cases(device):
    factors = {
        "dtype": DTYPES[device], "r": RANKS, "length": LENGTHS, "offsets": OFFSETS, "batch": [0, 1, 3],
        "kind": ["normal", "degenerate", "scaled"], "masked": [False, True], "packed": [False, True],
        "layout": LAYOUTS_OF_TOKENS,
    }  # fmt: skip
    for case in covering(factors, lambda case: case["r"] ** 2 * case["length"] * max(1, case["batch"]) < 1e7):
        yield pytest.param(
            device, case, marks=[pytest.mark.gpu] * (device == "cuda"),
            id="-".join([device, *(getattr(v, "__name__", str(v).removeprefix("torch.")) for v in case.values())]),
        )  # fmt: skip


@pytest.mark.parametrize(("device", "case"), [case for device in DTYPES for case in cases(device)])
def test_accuracy(device, case):
    check(op, draw(device=device, mix=False, **case))


def test_gradcheck():
    for r, offsets in ((2, (1, 3)), (3, (1, 1, 2)), (8, (1, 2, 50))):
        z = torch.randn(2, 6, r, dtype=torch.float64, requires_grad=True)
        valid = torch.rand(2, 6) < 0.8
        for mask in (None, valid):
            assert torch.autograd.gradcheck(partial(op, offsets=offsets, valid=mask), [z])
        packed = partial(op, offsets=offsets, cu_seqlens=torch.tensor([0, 4, 4, 6], dtype=torch.int32))
        assert torch.autograd.gradcheck(packed, [z[:1].detach().requires_grad_()])


@st.composite
def drawn_problems(draw_from):
    def integers(least, most):
        return draw_from(st.integers(least, most))

    offsets = tuple(draw_from(st.lists(st.integers(1, 40) | st.just(2**62), min_size=1, max_size=9)))
    case = dict(
        batch=integers(0, 3), length=integers(0, 40), r=integers(2, 40), offsets=offsets, mix=False,
        dtype=draw_from(st.sampled_from(DTYPES["cpu"])), masked=draw_from(st.booleans()), packed=draw_from(st.booleans()),
        kind=draw_from(st.sampled_from(["normal", "degenerate", "scaled"])),
        layout=draw_from(st.sampled_from(LAYOUTS_OF_TOKENS)),
    )  # fmt: skip
    torch.manual_seed(integers(0, 2**31))
    return draw(**case)


@settings(max_examples=300)
@given(drawn_problems())
def test_drawn_problems(problem):
    # Plain torch can be exact by luck on a handful of numbers; a near parallel pair then leaves nothing to compare with.
    check(op, problem, atol=1e-10 if problem.grad.dtype == torch.float64 else 1e-4)


def test_order_of_the_coordinates(device):
    z = torch.tensor([[[1.0, 0, 0, 0], [0, 0, -5, 0], [0, 2, 0, 0]]], device=device)
    expected = torch.zeros(1, 3, 6, device=device)
    expected[0, 1, 1] = 1  # planes are (0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)
    expected[0, 2, 3] = -1
    assert torch.equal(op(z, [1]), expected)


@pytest.mark.parametrize("factor", [0.0, 1.0, -1.0, 3.0, 0.1])
def test_a_pair_without_a_plane_is_zero_and_counts(device, factor):
    for dtype in DTYPES[device]:
        z = torch.randn(1, 3, 33, device=device).to(dtype)
        z[0, 1] = (factor * z[0, 0]) if factor in (0, 1, -1) or dtype.itemsize >= 4 else 2 * z[0, 0]
        assert torch.count_nonzero(op(z, [1])[:, :2]) == 0
        alone = op(z, [2])
        torch.testing.assert_close(op(z, [2, 1])[0, 2] * 2, alone[0, 2] + op(z, [1])[0, 2], rtol=1e-2, atol=1e-2)
        z.requires_grad_()
        op(z, [1])[:, :2].float().square().sum().backward()
        assert torch.count_nonzero(z.grad) == 0


def test_scale_invariance(device):
    """Powers of two change no bit, however large."""
    for dtype in DTYPES[device]:
        z = torch.randn(2, 33, 16, device=device).to(dtype)
        limit = 10 if dtype == torch.float16 else 60
        z = torch.where(z.abs() < 2**-3, 2**-3, z)
        power = torch.randint(-limit, limit, (2, 33, 1), device=device)
        if dtype == torch.float16:
            power = power.clamp(-6, 10)
        assert_same_bits(op(z * (2.0**power).to(dtype), [1, 2, 5]), op(z, [1, 2, 5]))


def test_properties(device):
    """z . dz = 0, because |z| does not matter; |pbar| <= 1, and 1 for one offset; the order of offsets does not matter."""
    z = torch.randn(2, 64, 32, device=device, requires_grad=True)
    pbar = op(z, [1, 2, 4, 8])
    (grad,) = torch.autograd.grad(pbar, z, torch.randn_like(pbar))
    assert grad.norm(dim=-1).min() > 1e-2
    assert (z * grad).sum(-1).abs().max() < 1e-5
    assert pbar.norm(dim=-1).max() <= 1 + 1e-6
    torch.testing.assert_close(op(z, [3]).norm(dim=-1)[:, 3:], torch.ones(2, 61, device=device))
    torch.testing.assert_close(op(z, [8, 1, 4, 2]), pbar, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(op(z, [1, 2, 4, 8, 64, 10**9]), pbar, rtol=0, atol=0)


def test_the_mean_is_one_plane(device):
    """The limit of what the op can express: pbar = u ^ Y is decomposable, its antisymmetric matrix has rank 2."""
    pbar = op(torch.randn(1, 40, 8, device=device), grassmann.PAPER_OFFSETS)[0, 20:]
    matrix = torch.zeros(20, 8, 8, device=device)
    i, j = torch.triu_indices(8, 8, 1)
    matrix[:, i, j], matrix[:, j, i] = pbar, -pbar
    singular = torch.linalg.svdvals(matrix.cpu())
    assert singular[:, 1].min() > 0.05
    assert singular[:, 2].max() < 1e-6


def test_offsets_are_not_told_apart(device):
    """The other limit: which of the earlier tokens is at which offset does not matter, nor how long each is."""
    z = torch.randn(1, 20, 8, device=device)
    mixed = z.clone()
    earlier = 19 - torch.tensor(grassmann.PAPER_OFFSETS, device=device)
    mixed[0, earlier] = torch.rand(6, 1, device=device) * z[0, earlier.flip(0)]
    first, second = (op(x, grassmann.PAPER_OFFSETS)[0, 19] for x in (z, mixed))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_causality(device):
    for dtype in DTYPES[device]:
        z = torch.randn(2, 70, 33, device=device).to(dtype)
        before = op(z, grassmann.PAPER_OFFSETS)
        z[:, 41] = torch.randn(2, 33).to(z)
        after = op(z, grassmann.PAPER_OFFSETS)
        assert_same_bits(after[:, :41], before[:, :41])
        changed = (after != before).any(-1).all(0).nonzero().flatten().tolist()
        assert changed == [41, *(41 + offset for offset in grassmann.PAPER_OFFSETS)]


def test_packed_sequences_are_so_many_calls(device):
    """To the last bit, gradients included; nothing of a sequence, NaN neither, reaches another one."""
    for dtype in DTYPES[device]:
        problem = draw(length=90, r=16, offsets=(1, 2, 7, 30), dtype=dtype, device=device, mix=False, packed=True)
        bounds = [0, 1, 1, 40, 41, 88, 90]
        problem.cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
        problem.inputs["z"][:, 41:88] = torch.nan
        whole = evaluate(op, problem)
        for begin, end in itertools.pairwise(bounds):
            part = Problem(
                {"z": problem.inputs["z"][:, begin:end]}, problem.offsets, problem.grad[:, begin:end], options={}
            )
            for name, x in evaluate(op, part).items():
                assert_same_bits(x, whole[name][:, begin:end], name)
                assert x.isnan().any() == (begin == 41)


def test_two_runs_are_bitwise_equal(device):
    for dtype in DTYPES[device]:
        problem = draw(length=300, r=32, dtype=dtype, device=device, mix=False)
        first, second = evaluate(op, problem), evaluate(op, problem)
        for name in first:
            assert_same_bits(first[name], second[name], name)


def test_threads_change_no_bit():
    problem = draw(length=300, r=32, mix=False)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(evaluate(op, problem))
    torch.set_num_threads(threads)
    for other in results[1:]:
        for name, x in other.items():
            assert_same_bits(x, results[0][name], name)


def test_nan_is_not_hidden(device):
    z = torch.randn(1, 6, 5, device=device)
    z[0, 2, 1] = torch.nan
    nan = op(z, [1]).isnan().any(-1)[0]
    assert nan.tolist() == [False, False, True, True, False, False]


def test_small_angles_are_accurate():
    """The Lagrange identity |p|^2 = |z|^2 |z'|^2 - (z . z')^2 would be 4 % off at 1e-3 and negative at 1e-4."""
    u, v = torch.eye(8, dtype=torch.float64)[:2]
    for angle in (1e-2, 1e-3, 1e-4, 1e-5):
        z = torch.stack([u, u + angle * v])[None]
        exact = reference.plucker_mean(z, [1])
        torch.testing.assert_close(op(z.float(), [1]).double(), exact, rtol=1e-6 / angle, atol=0)


INTERPRETED = {
    "two blocks of tokens": dict(length=29, r=13, block=16),
    "more coordinates than a part has": dict(length=6, r=33, block=8, head_dim=64),
    "r fills the tile": dict(length=9, r=16, block=8),
    "ten offsets, some beyond": dict(length=12, r=5, block=16, at_once=4, offsets=(1, 1, 2, 3, 4, 5, 6, 7, 40, 8, 11)),
    "nothing pairs": dict(length=3, r=5, block=16, offsets=(3,)),
    "packed": dict(length=21, r=6, block=16, packed=True, masked=True, offsets=(1, 2, 5)),
    "packed, each offset by itself": dict(length=9, r=5, block=16, at_once=1, packed=True, offsets=(1, 2)),
    "a past without output": dict(length=19, r=6, block=16, history=5, offsets=(1, 2, 7)),
    "masked": dict(length=15, r=7, block=16, masked=True, offsets=(1, 2, 5)),
    "degenerate": dict(length=20, r=9, block=8, kind="degenerate", offsets=(1, 2, 3)),
    "scaled": dict(length=12, r=9, block=8, kind="scaled"),
    "r = 2, fp16": dict(length=12, r=2, block=16, dtype="float16", head_dim=8),
    "fp16": dict(length=12, r=11, block=16, dtype="float16"),
}


@pytest.mark.parametrize("name", INTERPRETED)
def test_kernels_in_the_interpreter(name, interpreter):
    """The bodies of the Triton kernels against the fp64 truth; memory starts as NaN."""
    for output, error in interpreter("interpreted_plucker_mean", INTERPRETED[name]).items():
        assert error < (2e-3 if "fp16" in name else 3e-6), f"{output}: {error:.1e}"  # NaN fails too
