"""Packed sequences: the op with cu_seqlens is so many calls, and nothing passes from one sequence to another."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problem import DTYPES, assert_same_bits, assert_truth, check, draw, evaluate, small

import simplex_ops

op = partial(simplex_ops.two_simplicial_attention, return_lse=True)

LENGTHS = {
    "one": [61],
    "short ones": [1] * 5 + [2, 3, 0, 0, 5, 1, 7] + [2] * 20,
    "around tiles": [63, 1, 64, 65, 16, 15, 17, 33],
    "longer than the windows": [150, 40, 90],
    "empty at both ends": [0, 30, 0, 47, 0],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("ratio", "dim", "w1", "w2"), [(1, 16, 9, 5), (4, 64, 33, 20), (64, 128, 5, 40)])
def test_accuracy(device, lengths, ratio, dim, w1, w2):
    for dtype in DTYPES[device]:
        check(op, draw(lengths=lengths, ratio=ratio, dim=dim, w1=w1, w2=w2, dtype=dtype, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[300, 1, 257, 64, 3, 500], [20] * 40, [700, 5]])
@pytest.mark.parametrize("ratio", [1, 3, 8, 16, 64, 128])
@pytest.mark.parametrize("dim", [64, 128])
def test_accuracy_of_large_tiles(lengths, ratio, dim):
    for dtype, w1, w2 in [(torch.bfloat16, 200, 24), (torch.float16, 16, 130), (torch.bfloat16, 32, 32)]:
        check(op, draw(lengths=lengths, ratio=ratio, dim=dim, w1=w1, w2=w2, dtype=dtype, device="cuda"))


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(any),
    ratio=st.sampled_from([1, 2, 5, 8, 64]),
    dim=st.sampled_from([8, 64, 72]),
    w1=st.integers(1, 50),
    w2=st.integers(1, 20),
)
def test_hypothesis(lengths, ratio, dim, w1, w2):
    for device, dtypes in DTYPES.items():
        dtype = dtypes[sum(lengths) % len(dtypes)]
        problem = draw(
            lengths=lengths, ratio=ratio, kv_heads=1 + ratio % 2, dim=dim, w1=w1, w2=w2, dtype=dtype, device=device
        )
        check(op, problem, atol=2e-3 if device == "cuda" else 0.0)


@pytest.mark.parametrize("ratio", [1, 8, 64])
def test_other_sequences_change_no_bit(device, ratio):
    """Values, large ones too, gradients included, as long as they are finite; where a sequence lies decides its tiles, so its
    place stays."""
    dtype = DTYPES[device][0]
    problem = draw(lengths=[70, 41, 130], ratio=ratio, dim=64, w1=50, w2=20, dtype=dtype, device=device)
    before = evaluate(op, problem)
    for factor in (3, 10):
        for x in (*problem.inputs, problem.grad_out):
            x[:, :70] *= factor
            x[:, 111:] *= -factor
        after = evaluate(op, problem)
        for name, x in after.items():
            length = 2 if name == "lse" else 1
            assert_same_bits(x.narrow(length, 70, 41), before[name].narrow(length, 70, 41), name)


@pytest.mark.parametrize(("ratio", "w1", "w2"), [(1, 1, 9), (1, 3, 3), (2, 5, 2), (8, 4, 4)])
def test_nan_stays_in_its_sequence(ratio, w1, w2):
    """On the CPU tokens of few pairs share a matrix product, where a mask would be a product with 0."""
    problem = draw(lengths=[5, 7, 4], ratio=ratio, dim=16, w1=w1, w2=w2, device="cpu")
    before = evaluate(op, problem)
    for x in (*problem.inputs, problem.grad_out):
        x[:, :5] = x[:, 12:] = torch.nan
    for name, x in evaluate(op, problem).items():
        length = 2 if name == "lse" else 1
        assert_same_bits(x.narrow(length, 5, 7), before[name].narrow(length, 5, 7), name)


@pytest.mark.parametrize("ratio", [1, 8, 64])
def test_two_runs_are_bitwise_equal(device, ratio):
    problem = draw(
        lengths=LENGTHS["around tiles"], ratio=ratio, dim=64, w1=40, w2=12, dtype=DTYPES[device][0], device=device
    )
    first, second = evaluate(op, problem), evaluate(op, problem)
    for name, x in first.items():
        assert_same_bits(x, second[name], name)


def test_one_sequence_is_no_packing(device):
    for dtype in DTYPES[device]:
        problem = draw(lengths=[90], ratio=8, dim=64, w1=40, w2=12, dtype=dtype, device=device)
        packed = evaluate(op, problem)
        problem.cu_seqlens = None
        for name, x in evaluate(op, problem).items():
            assert_same_bits(packed[name], x, name)


def test_first_tokens_see_one_pair(device):
    """Of each sequence, as at position 0: out is the product of its values, and no gradient reaches its query."""
    lengths = [17, 1, 30, 2]
    problem = draw(
        lengths=lengths, ratio=8, dim=64, w1=20, w2=9, dtype=DTYPES[device][0], device=device, grad_lse=False
    )
    grad_q = evaluate(op, problem)["grad_q"]
    first = problem.cu_seqlens[:-1].long()
    assert torch.count_nonzero(grad_q[:, first]) == 0
    assert torch.count_nonzero(grad_q) > 0


def test_compile(device):
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True)
    for lengths in ([5, 0, 8], [3, 4, 2, 10]):
        problem = small(device, lengths=lengths)
        assert_truth(evaluate(compiled, problem), problem)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ([1, 6], "to ascend from 0, got 1 at 0"),
        ([0, 5, 4, 6], "to ascend from 0, got 4 at 2"),
        ([0, 3, 5], r"to end with the length of q \(6\), got 5"),
    ],
)
def test_bad_starts(values, error):
    q, k1, k2, v1, v2 = small("cpu", lengths=[6]).inputs
    with pytest.raises(RuntimeError, match=f"two_simplicial_attention: expected cu_seqlens {error}"):
        op(q, k1, k2, v1, v2, 3, 3, cu_seqlens=torch.tensor(values, dtype=torch.int32))


@pytest.mark.gpu
@pytest.mark.parametrize("ratio", [1, 8, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bad_starts_read_no_foreign_memory(ratio, dtype):
    """CUDA cannot refuse them without waiting; compute-sanitizer runs this too."""
    problem = draw(lengths=[60], ratio=ratio, dim=64, w1=30, w2=9, dtype=dtype, device="cuda")
    for values in ([0, 2**31 - 1], [-(2**31), 60], [50, 10, 40, -3, 2**30], [7, 7]):
        problem.cu_seqlens = torch.tensor(values, dtype=torch.int32, device="cuda")
        evaluate(op, problem)
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("ratio", [1, 64])
def test_cuda_graph(ratio):
    """Other sequences in the same buffer, replayed."""
    problem = draw(lengths=[30, 50, 20], ratio=ratio, dim=64, w1=30, w2=9, dtype=torch.bfloat16, device="cuda")
    evaluate(op, problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = evaluate(op, problem)
    problem.cu_seqlens.copy_(torch.tensor([0, 1, 77, 100], dtype=torch.int32))
    graph.replay()
    for name, x in evaluate(op, problem).items():
        assert_same_bits(captured[name], x, name)
