"""Each known defect of the public implementations of 2-simplicial attention, as the test that would have caught it."""

import re
from functools import partial
from pathlib import Path

import pytest
import reference
import torch
from problem import DTYPES, NAMES, Problem, assert_close_to_truth, assert_same_bits, check, draw, evaluate

import simplex_ops

op = partial(simplex_ops.two_simplicial_attention, return_lse=True)


def test_statistic_is_in_one_log_base(device):
    """With lse in one base and exp in the other, P in the backward pass does not sum to 1. Sums of P tell without any
    reference: exp(lse) = sum exp(A); and as out is linear in v1 and v2, <grad_v, v> = <grad_out, out> for either v."""
    for dtype in DTYPES[device]:
        drawn = draw(n_k=24, kv_heads=2, ratio=3, w1=9, w2=5, dtype=dtype, device=device)
        got = check(op, drawn)
        for v, name in ((drawn.inputs[3], "grad_v1"), (drawn.inputs[4], "grad_v2")):
            left, right = (got[name].double() * v.double()).sum(), (drawn.grad_out.double() * got["out"].double()).sum()
            terms = (got[name].double() * v.double()).norm()
            assert abs(left - right) <= 20 * torch.finfo(dtype).eps * terms, name
        zero = drawn.inputs[0].new_zeros(1, 24, 1, 16)
        lse = op(zero, zero, zero, zero, zero, 24, 24)[1]
        counts = torch.arange(1, 25, device=device, dtype=torch.double).square()
        torch.testing.assert_close(
            lse[0, 0].double(), counts.log(), atol=1e-5, rtol=1e-6, msg="natural log of the pairs"
        )


def test_backward_receives_its_arguments_in_order(device):
    """Every tensor has a magnitude and, for q, a length of its own: any two swapped are far from the truth."""
    drawn = draw(n_q=11, n_k=24, kv_heads=2, ratio=3, w1=9, w2=5, device=device)
    drawn.inputs = [x * factor for x, factor in zip(drawn.inputs, (0.5, 0.25, 4.0, 1.0, 8.0), strict=True)]
    check(op, drawn)


@pytest.mark.parametrize("batch", [2, 3])
def test_delta_has_the_batch_stride(device, batch):
    """delta of item b read from another item: the gradients of item b then depend on the rest of the batch."""
    drawn = draw(batch=batch, n_k=30, kv_heads=2, ratio=3, w1=7, w2=4, device=device)
    before = check(op, drawn)
    drawn.grad_out = torch.cat([torch.randn_like(drawn.grad_out[:-1]) * 5, drawn.grad_out[-1:]])
    after = evaluate(op, drawn)
    for name in NAMES:
        assert_same_bits(before[f"grad_{name}"][-1], after[f"grad_{name}"][-1], name)


@pytest.mark.parametrize("w2", [1, 2, 16, 31, 32, 33, 64, 100])
def test_backward_for_any_second_window(device, w2):
    for dtype in DTYPES[device]:
        check(op, draw(batch=1, n_k=70, w1=40, w2=w2, dtype=dtype, device=device))


@pytest.mark.parametrize(("kv_heads", "ratio"), [(1, 1), (4, 1), (1, 6), (3, 5), (2, 64)])
def test_backward_for_any_head_ratio(device, kv_heads, ratio):
    for dtype in DTYPES[device]:
        check(op, draw(n_k=20, kv_heads=kv_heads, ratio=ratio, w1=9, w2=5, dtype=dtype, device=device))


@pytest.mark.parametrize("dim", [8, 16, 40, 64, 72, 128, 200, 256])
def test_backward_for_any_head_dim_with_wide_windows(device, dim):
    for dtype in DTYPES[device]:
        check(op, draw(batch=1, n_k=48, dim=dim, w1=48, w2=40, dtype=dtype, device=device))


def test_windows_are_run_time_arguments(device):
    """One process, one shape, many windows: each has its own result."""
    inputs = draw(batch=1, n_k=24, device=device).inputs
    results = []
    for w1 in (1, 2, 3, 7, 16, 17, 24):
        for w2 in (1, 2, 5, 16, 23, 24):
            check(op, Problem(inputs, w1, w2, None, torch.randn_like(inputs[0])))
            results.append(op(*inputs, w1, w2)[0])
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("w", [1, 2, 15, 16, 17, 32, 33, 64])
def test_window_edge_is_exact(device, axis, w):
    """The oldest visible key matters and the one before it does not, in either axis: one bit away from off by one."""
    n = 80
    drawn = draw(batch=1, n_k=n, n_q=1, ratio=1, device=device, grad_lse=False)
    windows = (w, 5) if axis == 1 else (5, w)
    drawn.w1, drawn.w2 = windows
    before = op(*drawn.inputs, *windows)
    gradient = evaluate(op, drawn)[f"grad_v{axis}"]
    for row, visible in ((n - w, True), (n - w - 1, False)):
        changed = [x.clone() for x in drawn.inputs]
        changed[axis][:, row] += 1
        changed[axis + 2][:, row] += 1
        after = op(*changed, *windows)
        assert torch.equal(before[0], after[0]) != visible
        assert torch.equal(before[1], after[1]) != visible
        assert (torch.count_nonzero(gradient[:, row]) > 0) == visible


@pytest.mark.parametrize("tensor", range(5), ids=NAMES)
def test_offsets_pass_2_to_the_31(device, tensor):
    """3000 rows a million elements apart: row * stride overflows int32 past row 2047. The gaps are never touched, so on
    the CPU the buffer costs address space only."""
    n, stride = 3001, 2**20
    drawn = draw(batch=1, n_k=n, ratio=1, dim=16, w1=3, w2=2, dtype=torch.bfloat16, device=device)
    torch.utils.deterministic.fill_uninitialized_memory = False  # would touch all 6 GB
    try:
        buffer = torch.empty(n * stride, dtype=torch.bfloat16, device=device)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    expected = evaluate(op, drawn)
    far = buffer.as_strided((1, n, 1, 16), (n * stride, stride, 16, 1))
    drawn.inputs[tensor] = far.copy_(drawn.inputs[tensor])
    for name, x in evaluate(op, drawn).items():
        assert_same_bits(x, expected[name], name)


@pytest.mark.gpu
@pytest.mark.big
@pytest.mark.parametrize("kv_heads", [1, 128])
def test_tensors_of_more_than_2_to_the_31_elements(kv_heads):
    """70,000 x 128 heads x 256 = 2.3e9 elements, and more rows than a grid axis holds. The last rows form a problem of
    their own: queries see `w` rows back, and only later queries send a key gradient."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 70e9:
        pytest.skip("needs 70 GB of free GPU memory")
    n, w, tail, dtype = 70_000, (3, 2), 5, torch.bfloat16
    with torch.device("cuda"):
        normal = lambda heads: torch.empty(1, n, heads, 256, dtype=dtype).normal_()  # noqa: E731  (randn would double it)
        inputs = [normal(128).requires_grad_(), *(normal(kv_heads).requires_grad_() for _ in range(4))]
        grad_out = normal(128)
    out, lse = op(*inputs, *w)
    gradients = torch.autograd.grad(out, inputs, grad_out)
    got = {"out": out, "lse": lse} | {f"grad_{name}": g for name, g in zip(NAMES, gradients, strict=True)}
    rows = tail + max(w) - 1
    ends = [x.detach()[:, -tail if i == 0 else -rows :] for i, x in enumerate(inputs)]
    small = Problem(ends, *w, None, grad_out[:, -tail:])
    truth = evaluate(reference.two_simplicial_attention, small, torch.float64)
    plain = evaluate(reference.two_simplicial_attention, small)
    for name in got:
        last = (slice(None), slice(None), slice(-tail, None)) if name == "lse" else (slice(None), slice(-tail, None))
        assert_close_to_truth(got[name][last], plain[name][last], truth[name][last], dtype, name)


def grown_peak(device, run):
    """Bytes by which the peak of memory in use grows while `run()` runs."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now

    def kilobytes(key):
        return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    before = kilobytes("VmRSS")
    run()
    return (kilobytes("VmHWM") - before) * 1024


def memory_of_forward_and_backward(device, shape):
    drawn = draw(batch=1, grad_lse=False, device=device, **shape)
    inputs = [x.requires_grad_() for x in drawn.inputs]
    evaluate(op, draw(device=device))  # threads, workspaces and kernels are there before the measurement
    result, gradients = [], []
    forward = grown_peak(device, lambda: result.extend(op(*inputs, drawn.w1, drawn.w2)))
    backward = grown_peak(device, lambda: gradients.extend(torch.autograd.grad(result[0], inputs, drawn.grad_out)))
    assert all(torch.isfinite(x).all() for x in gradients)
    return forward, backward


@pytest.mark.parametrize(("w1", "w2"), [(8192, 1), (1, 8192)])
def test_memory_does_not_grow_with_the_window(device, w1, w2):
    """A tensor of N x w would be 256 MB here, where all inputs together are 1.3 MB."""
    forward, backward = memory_of_forward_and_backward(device, dict(n_k=8192, ratio=1, dim=8, w1=w1, w2=w2))
    assert max(forward, backward) < 32e6, f"forward {forward / 1e6:.0f} MB, backward {backward / 1e6:.0f} MB"


def test_key_heads_are_not_repeated(device):
    """128 query heads share one kv head: repeating k1, k2, v1 and v2 would take four times the memory of q."""
    shape = dict(n_k=1400, ratio=128, dim=64, w1=2, w2=2)
    forward, backward = memory_of_forward_and_backward(device, shape)
    q = 1400 * 128 * 64 * 4
    assert forward < 1.8 * q, f"forward took {forward / q:.1f} times q; out alone is 1"
    assert backward < 1.8 * q, f"backward took {backward / q:.1f} times q; grad_q alone is 1"
