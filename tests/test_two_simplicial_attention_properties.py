"""What two_simplicial_attention obeys beyond accuracy: windows computed by hand, causality, symmetry, independence."""

import itertools
import math
from functools import partial

import pytest
import reference
import torch
from problem import (
    DTYPES,
    FLOOR,
    NAMES,
    assert_close_to_truth,
    assert_is_product,
    assert_same_bits,
    check,
    draw,
    evaluate,
)

import simplex_ops

op = partial(simplex_ops.two_simplicial_attention, return_lse=True)


def uniform(n, dim, device):
    """Zero queries: every visible pair weighs the same, and out counts what is visible. v1_j is 1 in dimension j alone
    and v2_k is 2^k, so out[i, j] = sum of 2^k over the visible k, / number of visible pairs, if j is visible."""
    zeros = torch.zeros(1, n, 1, dim, device=device)
    v1 = torch.eye(n, dim, device=device).view(1, n, 1, dim)
    v2 = (2.0 ** torch.arange(n, device=device)).view(1, n, 1, 1).expand(1, n, 1, dim).contiguous()
    return zeros, zeros, zeros, v1, v2


@pytest.mark.parametrize(
    ("w1", "w2"), [(1, 1), (1, 2), (2, 1), (2, 3), (3, 2), (5, 5), (6, 6), (7, 4), (6, 100), (2**62, 2**62)]
)
@pytest.mark.parametrize("n_q", [6, 2, 1])
def test_window_holds_exactly_w_keys(device, w1, w2, n_q):
    n, dim = 6, 8
    q, k1, k2, v1, v2 = uniform(n, dim, device)
    out, lse = op(q[:, n - n_q :], k1, k2, v1, v2, w1, w2)
    expected, pairs = torch.zeros(n_q, dim), torch.zeros(n_q)
    for row, i in enumerate(range(n - n_q, n)):
        seen1 = [j for j in range(n) if i - w1 < j <= i]
        seen2 = [k for k in range(n) if i - w2 < k <= i]
        pairs[row] = len(seen1) * len(seen2)
        expected[row, seen1] = sum(2.0**k for k in seen2) / pairs[row]
    torch.testing.assert_close(out.cpu().view(n_q, dim), expected)
    torch.testing.assert_close(lse.cpu().view(n_q), pairs.log(), atol=1e-6, rtol=1e-6)


def test_two_tokens_by_hand(device):
    """q = 1, k1 = (1, 2), k2 = (1, 3) in one dimension, scale 1: query 1 sees A = 1, 3, 2, 6 and the products of
    v1 = (1, 10) and v2 = (1, 100)."""

    def row(*values):  # values in dimension 0 of 8
        x = torch.zeros(1, len(values), 1, 8, device=device)
        x[0, :, 0, 0] = torch.tensor(values, device=device)
        return x

    q, k1, k2, v1, v2 = row(1.0, 1.0), row(1.0, 2.0), row(1.0, 3.0), row(1.0, 10.0), row(1.0, 100.0)
    out, lse = op(q, k1, k2, v1, v2, 2, 2, scale=1.0)
    z = math.exp(1) + math.exp(3) + math.exp(2) + math.exp(6)
    expected = (math.exp(1) * 1 + math.exp(3) * 100 + math.exp(2) * 10 + math.exp(6) * 1000) / z
    torch.testing.assert_close(out[0, :, 0, 0].cpu(), torch.tensor([1.0, expected]), rtol=1e-5, atol=0)
    torch.testing.assert_close(lse[0, 0].cpu(), torch.tensor([1.0, math.log(z)]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("w1", "w2", "one_pair"), [(1, 1, slice(None)), (9, 4, slice(0, 1)), (1, 8, slice(0, 1)), (64, 64, slice(0, 1))]
)
def test_one_visible_pair_has_no_score_gradient(device, w1, w2, one_pair):
    """A softmax over one pair is constant. Zero exactly: rounding noise there would be amplified by an optimizer that
    normalises gradients. And lse is then the logit itself, whose gradient is k1 * k2."""
    for dtype in DTYPES[device]:
        drawn = draw(n_k=20, ratio=4, kv_heads=2, dim=64, w1=w1, w2=w2, dtype=dtype, device=device, grad_lse=False)
        got = evaluate(op, drawn)
        assert torch.count_nonzero(got["grad_q"][:, one_pair]) == 0
        if one_pair == slice(None):
            assert torch.count_nonzero(got["grad_k1"]) == torch.count_nonzero(got["grad_k2"]) == 0
        _, k1, k2, v1, v2 = drawn.inputs
        assert_is_product(got["out"][:, one_pair], v1[:, one_pair], v2[:, one_pair], 4)
        drawn.grad_lse = torch.randn(2, 8, 20, device=device).to(reference.wide(dtype))
        by_lse = evaluate(op, drawn)["grad_q"][:, one_pair].double()
        weight = drawn.grad_lse.transpose(1, 2)[:, one_pair, :, None].double() * 64**-0.5
        expected = weight * (k1.double() * k2.double()).repeat_interleave(4, 2)[:, one_pair]
        torch.testing.assert_close(by_lse, expected, atol=2 * FLOOR[dtype], rtol=2 * FLOOR[dtype])


@pytest.mark.parametrize(("w1", "w2"), [(9, 4), (4, 9), (30, 5), (100, 100), (1, 6)])
def test_symmetric_under_swap_of_the_axes(device, w1, w2):
    """(k1, v1, w1) <-> (k2, v2, w2) is the same function. Both sides are held to the same truth, in every dtype."""
    for dtype in DTYPES[device]:
        drawn = draw(n_k=40, kv_heads=2, ratio=2, w1=w1, w2=w2, dtype=dtype, device=device)
        got = check(op, drawn)
        drawn.inputs = [drawn.inputs[i] for i in (0, 2, 1, 4, 3)]
        drawn.w1, drawn.w2 = w2, w1
        swapped = check(op, drawn)
        if dtype == torch.float64:
            for a, b in zip(NAMES, ("q", "k2", "k1", "v2", "v1"), strict=True):
                torch.testing.assert_close(got[f"grad_{a}"], swapped[f"grad_{b}"], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("w1", "w2"), [(16, 8), (8, 16), (200, 200)])
@pytest.mark.parametrize("changed", [1, 31, 64, 99])
def test_later_tokens_change_no_earlier_bit(device, w1, w2, changed):
    # On a GPU, the last two make other kernels run: tokens of one block, or one token a warpgroup.
    shapes = [(2, 32), (8, 64), (64, 64)] if device == "cuda" else [(2, 32)]
    for dtype, (ratio, dim) in itertools.product(DTYPES[device], shapes):
        drawn = draw(n_k=100, kv_heads=2, ratio=ratio, dim=dim, w1=w1, w2=w2, dtype=dtype, device=device)
        before = op(*drawn.inputs, w1, w2)
        drawn.inputs = [torch.cat([x[:, :changed], 50 * torch.randn_like(x[:, changed:])], 1) for x in drawn.inputs]
        after = op(*drawn.inputs, w1, w2)
        assert_same_bits(before[0][:, :changed], after[0][:, :changed], "out")
        assert_same_bits(before[1][:, :, :changed], after[1][:, :, :changed], "lse")
        assert not torch.equal(before[0][:, changed:], after[0][:, changed:]), "the change itself must be seen"


def test_earlier_queries_send_later_keys_no_gradient(device):
    """The backward side of causality: a loss on the first 50 outputs has a zero gradient in every later row."""
    for dtype in DTYPES[device]:
        drawn = draw(n_k=100, kv_heads=2, dim=32, w1=30, w2=12, dtype=dtype, device=device)
        drawn.grad_out[:, 50:] = 0
        drawn.grad_lse[:, :, 50:] = 0
        got = evaluate(op, drawn)
        for name in NAMES:
            assert torch.count_nonzero(got[f"grad_{name}"][:, 50:]) == 0, name
            assert torch.count_nonzero(got[f"grad_{name}"][:, :50]) > 0, name


def test_keys_left_of_every_window_get_no_gradient(device):
    drawn = draw(n_k=60, n_q=10, w1=7, w2=3, device=device)
    got = evaluate(op, drawn)
    for name, w in (("k1", 7), ("v1", 7), ("k2", 3), ("v2", 3)):
        gradient = got[f"grad_{name}"]
        assert torch.count_nonzero(gradient[:, : 60 - 10 - w + 1]) == 0, name
        assert gradient[:, 60 - 10 - w + 1 :].abs().amax((0, 2, 3)).min() > 0, f"{name}: every row inside is seen"


@pytest.mark.parametrize(("w1", "w2"), [(20, 6), (6, 20), (500, 500)])
def test_chunked_prefill_and_decode_equal_one_pass(device, w1, w2):
    """Queries in pieces of 1 to 16 over the keys so far give what one pass gives."""
    for dtype in DTYPES[device]:
        drawn = draw(n_k=48, kv_heads=2, ratio=3, w1=w1, w2=w2, dtype=dtype, device=device)
        truth = reference.two_simplicial_attention(*(x.double() for x in drawn.inputs), w1, w2)
        plain = reference.two_simplicial_attention(*drawn.inputs, w1, w2)
        q, *keys = drawn.inputs
        stops = [1, 2, 3, 8, 24, 40, 41, 47, 48]
        chunks = [op(q[:, a:b], *(x[:, :b] for x in keys), w1, w2) for a, b in zip([0, *stops], stops, strict=False)]
        out, lse = torch.cat([c[0] for c in chunks], 1), torch.cat([c[1] for c in chunks], 2)
        assert_close_to_truth(out, plain[0], truth[0], dtype, "out")
        assert_close_to_truth(lse, plain[1], truth[1], dtype, "lse", FLOOR[dtype])


def test_a_window_of_rows_is_all_a_query_needs(device):
    """Decoding from a ring of the last max(w1, w2) rows gives what the whole cache gives."""
    drawn = draw(n_k=200, n_q=1, w1=9, w2=33, dim=32, kv_heads=2, device=device)
    q, *keys = drawn.inputs
    whole, ring = op(q, *keys, 9, 33), op(q, *(x[:, -33:] for x in keys), 9, 33)
    for a, b in zip(whole, ring, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("w1", "w2"), [(9, 4), (4, 40)])
def test_batch_items_do_not_meet(device, w1, w2):
    """Each item alone gives the bits it has in the batch, gradients included.

    On the GPU the k and v gradients are summed by as many programs as the batch leaves idle: equal to rounding only.
    """
    for dtype in DTYPES[device]:
        drawn = draw(batch=3, n_k=33, kv_heads=2, ratio=3, w1=w1, w2=w2, dtype=dtype, device=device)
        together = evaluate(op, drawn)
        inputs, grad_out, grad_lse = drawn.inputs, drawn.grad_out, drawn.grad_lse
        for b in range(3):
            drawn.inputs = [x[b : b + 1] for x in inputs]
            drawn.grad_out, drawn.grad_lse = grad_out[b : b + 1], grad_lse[b : b + 1]
            for name, x in evaluate(op, drawn).items():
                if device == "cuda" and name in ("grad_k1", "grad_k2", "grad_v1", "grad_v2"):
                    torch.testing.assert_close(together[name][b : b + 1], x, rtol=1e-2, atol=1e-2)
                else:
                    assert_same_bits(together[name][b : b + 1], x, f"{name} of item {b}")


@pytest.mark.parametrize(("batch", "n_q", "n_k"), [(0, 5, 9), (2, 0, 7), (0, 0, 0), (2, 0, 0)])
def test_empty(device, batch, n_q, n_k):
    """No query: no output, and keys that nobody looked at have the gradient 0, not whatever memory held."""
    for dtype in DTYPES[device]:
        drawn = draw(batch=batch, n_q=n_q, n_k=n_k, kv_heads=2, ratio=3, dtype=dtype, device=device)
        got = evaluate(op, drawn)
        assert got["out"].shape == (batch, n_q, 6, 16)
        assert got["lse"].shape == (batch, 6, n_q)
        for name, x in zip(NAMES, drawn.inputs, strict=True):
            assert torch.equal(got[f"grad_{name}"], torch.zeros_like(x)), name
