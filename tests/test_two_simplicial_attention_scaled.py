"""The Hopper kernels, scaled and skewed: logits that leave the range of a fixed reference, and what chooses these kernels."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import reference
import torch
from problem import assert_close_to_truth, assert_same_bits, check, draw, evaluate
from torch.profiler import ProfilerActivity, profile

import simplex_ops

op = partial(simplex_ops.two_simplicial_attention, return_lse=True)
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no Hopper GPU"
)
pytestmark = [pytest.mark.gpu, hopper]


def kernels_of(run):
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        run()
        torch.cuda.synchronize()
    return {event.key for event in record.key_averages()}


@pytest.mark.parametrize(
    ("dtype", "ratio", "w", "kind", "dkv_kind"),
    [
        (torch.bfloat16, 64, (64, 16), "_scaled", "_scaled"),
        (torch.float16, 128, (16, 64), "_scaled", "_scaled"),
        (torch.bfloat16, 8, (64, 60), "_scaled", "_scaled"),
        (torch.bfloat16, 8, (128, 16), "_skewed", "_skewed"),  # 64 rows have 8 tokens, many next to 16 short keys
        (torch.bfloat16, 16, (64, 16), "_scaled", "_scaled"),  # 4, and two tiles of 64 for a window of 67
        (torch.bfloat16, 8, (64, 9), "_skewed", "_skewed"),  # too few rows with a short key
        (torch.bfloat16, 12, (64, 64), "_skewed", "_skewed"),  # copies of 8 heads cannot make up 12
        (torch.float16, 3, (64, 16), "_skewed", "_skewed"),
        (torch.bfloat16, 1, (16, 64), "_skewed", "_skewed"),
        (torch.bfloat16, 1, (5, 64), "_skewed", ""),  # a third of two steps of four offsets would be waste
        (torch.float32, 64, (64, 16), "", ""),
    ],
)
def test_choice_of_the_kernels(dtype, ratio, w, kind, dkv_kind):
    """Both passes or none: a backward pass that rounds S otherwise than its forward takes the difference for a gradient."""
    problem = draw(n_k=130, ratio=ratio, dim=64, w1=w[0], w2=w[1], dtype=dtype, device="cuda")
    evaluate(op, problem)  # loads the kernels
    names = kernels_of(lambda: evaluate(op, problem))
    assert {
        f"two_simplicial_fwd{kind}",
        f"two_simplicial_bwd_dq{kind}",
        f"two_simplicial_bwd_dkv{dkv_kind}",
    } <= names


@pytest.mark.parametrize("scale", [-0.15, -0.5, 0.0])
@pytest.mark.parametrize("ratio", [1, 8, 64])
@pytest.mark.parametrize(
    ("n_q", "n_k", "w"), [(2, 2, (9, 5)), (70, 70, (33, 9)), (150, 150, (40, 40)), (2, 90, (64, 16))]
)
@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.float16), (128, torch.bfloat16), (128, torch.float32)])
def test_scales_that_are_not_positive(scale, ratio, n_q, n_k, w, dim, dtype):
    """-inf in place of a logit that is not seen must not become inf; every kernel masks in its own way."""
    problem = draw(
        batch=1, n_q=n_q, n_k=n_k, ratio=ratio, dim=dim, w1=w[0], w2=w[1], dtype=dtype, device="cuda", scale=scale
    )
    check(op, problem, atol=0.02)  # of a few pairs rounding may be above the rule


@pytest.mark.parametrize(("n_q", "kind"), [(1, "_decode"), (17, "_decode"), (18, "_scaled")])
def test_choice_for_few_queries(n_q, kind):
    problem = draw(n_q=n_q, n_k=70, ratio=64, dim=64, w1=64, w2=16, dtype=torch.bfloat16, device="cuda", batch=1)
    evaluate(op, problem)
    names = kernels_of(lambda: evaluate(op, problem))
    backward = "_scaled" if kind == "_scaled" else "_skewed"
    assert {f"two_simplicial_fwd{kind}", f"two_simplicial_bwd_dq{backward}"} <= names


@pytest.mark.parametrize("ratio", [1, 3, 4, 6, 8, 70])
@pytest.mark.parametrize(
    ("n_q", "n_k", "w"),
    [
        (50, 50, (20, 7)),  # fewer tokens than a tile, in a window smaller than one
        (200, 200, (11, 130)),
        (130, 130, (1, 1)),
        (100, 257, (128, 1)),
        (64, 333, (300, 40)),
        (1, 200, (64, 5)),
    ],
)
@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 128), (torch.float16, 64), (torch.bfloat16, 72)])
def test_skewed_kernels(dtype, dim, n_q, n_k, w, ratio):
    problem = draw(n_q=n_q, n_k=n_k, kv_heads=2, ratio=ratio, dim=dim, w1=w[0], w2=w[1], dtype=dtype, device="cuda")
    actual = check(op, problem)
    for name, x in evaluate(op, problem).items():
        assert_same_bits(x, actual[name], name)


@pytest.mark.parametrize(
    ("n_q", "ratio", "w"),
    [
        (150, 64, (140, 4)),  # 64 keys a tile of dkv
        (150, 128, (150, 2)),
        (150, 64, (150, 6)),  # 32
        (150, 128, (5, 130)),
        (150, 64, (90, 24)),  # 16 from here on
        (150, 128, (16, 64)),
        (150, 32, (70, 33)),
        (150, 8, (140, 40)),
        (150, 64, (32, 20)),  # and 32 keys a tile in the other kernels
        (150, 8, (31, 17)),
        (70, 16, (32, 32)),
        (150, 64, (32, 32)),
        (150, 128, (3, 1)),
    ],
)
@pytest.mark.parametrize("dim", [40, 64, 72, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients(dtype, dim, n_q, ratio, w):
    problem = draw(batch=1, n_q=n_q, n_k=150, ratio=ratio, dim=dim, w1=w[0], w2=w[1], dtype=dtype, device="cuda")
    actual = check(op, problem)
    for name, x in evaluate(op, problem).items():
        assert_same_bits(x, actual[name], name)


@pytest.mark.parametrize(
    ("batch", "n_k", "ratio", "w"),
    [
        (4, 1024, 16, (32, 20)),
        (2, 1024, 8, (70, 60)),
        (1, 500, 64, (300, 8)),
    ],
)
def test_programs_that_take_several_short_keys(batch, n_k, ratio, w):
    """In short sequences they take 8 (or 2) and are done."""
    problem = draw(batch=batch, n_k=n_k, ratio=ratio, dim=128, w1=w[0], w2=w[1], dtype=torch.bfloat16, device="cuda")
    check(op, problem)


@pytest.mark.parametrize("w", [(32, 32), (64, 64), (128, 128)])
def test_tiles_of_few_steps(w):
    """One left-over long key with two tiles of short keys and more: both warpgroups must be done with a tile before its place is
    written again."""
    case = dict(batch=1, ratio=64, dim=128, w1=w[0], w2=w[1], dtype=torch.bfloat16, device="cuda")
    if w[0] <= 64:  # the truth of more takes GBs
        check(op, draw(n_k=300, **case))  # wrong gradients may repeat
    problem = draw(n_k=256, **case)
    first = evaluate(op, problem)
    for _ in range(20):
        for name, x in evaluate(op, problem).items():
            assert_same_bits(x, first[name], name)


def errors():
    """Of the kernels that this process chooses: mean square errors of out, lse and the gradients against the truth, three draws."""
    found = {}
    for dtype, dim, ratio in [(torch.bfloat16, 128, 64), (torch.float16, 64, 64), (torch.bfloat16, 64, 4)]:
        for seed in range(3):
            torch.manual_seed(seed)
            problem = draw(batch=1, n_k=260, ratio=ratio, dim=dim, w1=90, w2=24, dtype=dtype, device="cuda")
            actual, truth = evaluate(op, problem), evaluate(reference.two_simplicial_attention, problem, torch.float64)
            for name, x in truth.items():
                case = f"{name} {dtype} {dim} {ratio}"
                found[case] = found.get(case, 0) + (actual[name].double() - x).square().mean().item()
    return found


def test_errors_are_those_of_the_portable_kernels():
    """Scaled tiles round k_long * k_short where the portable kernel rounds q * k_short: the same error, up to chance. Only
    v_long * v_short is a rounding more, a fifth of out's error."""
    code = "import json, sys; sys.path[:0] = sys.argv[1:2]; import {0}; print(json.dumps({0}.errors()))"
    command = [sys.executable, "-c", code.format(Path(__file__).stem), str(Path(__file__).parent)]
    env = os.environ | {"SIMPLEX_KERNELS": "portable"}
    printed = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    portable = json.loads(printed.splitlines()[-1])
    for case, error in errors().items():
        allowed = 1.3 if case.startswith("out") else 1.12
        assert error <= allowed**2 * portable[case], (
            f"{case}: {(error / portable[case]) ** 0.5:.2f} times the portable error"
        )


def forward_reference(problem, dtype):
    with torch.no_grad():
        inputs = [x.to(dtype) for x in problem.inputs]
        out, lse = reference.two_simplicial_attention(*inputs, problem.w1, problem.w2, scale=problem.scale)
    return {"out": out, "lse": lse}


def rising(k):
    return k * torch.linspace(0.01, 30, k.shape[1], device=k.device)[:, None, None]


def falling(k):
    return rising(k.flip(1)).flip(1)


def huge(k):
    return k * 30


def late_key(k):
    """One key past the first tiles beats all others by far, for the rows that are not orthogonal to it."""
    k = k.clone()
    k[:, 150] *= 200
    return k


def early_key(k):
    """The same where the later rows no longer see it, although the first logits computed for their tile are with it."""
    k = k.clone()
    k[:, 60] *= 200
    return k


LOGITS = {f.__name__: f for f in (rising, falling, huge, late_key, early_key)}


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("scale", [None, -0.09, 0.0])
@pytest.mark.parametrize(
    ("ratio", "w", "dim"), [(64, (90, 13), 128), (128, (9, 130), 72), (1, (90, 13), 128), (3, (70, 40), 64)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_any_range(dtype, ratio, w, dim, scale, logits):
    """Exponents are relative to a reference that is not the maximum: output and lse must not show it."""
    problem = draw(batch=1, n_k=200, ratio=ratio, dim=dim, w1=w[0], w2=w[1], dtype=dtype, device="cuda", scale=scale)
    problem.inputs[1] = LOGITS[logits](problem.inputs[1].float()).to(dtype)
    actual = evaluate(op, problem)
    truth, plain = forward_reference(problem, torch.float64), forward_reference(problem, dtype)
    for name in ("out", "lse"):
        # lse is a logit: its rounding is that of the largest logits
        atol = 2 * torch.finfo(dtype).eps * truth["lse"].abs().max().item() if name == "lse" else 0.0
        assert_close_to_truth(actual[name], plain[name], truth[name], dtype, name, atol)
    for name, x in evaluate(op, problem).items():
        assert_same_bits(x, actual[name], name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_logits_far_below_zero(dtype):
    problem = draw(batch=1, n_k=150, ratio=64, dim=64, w1=70, w2=9, dtype=dtype, device="cuda")
    q, k1, k2 = problem.inputs[:3]
    problem.inputs[:3] = [q.abs() + 1, -8 * (k1.abs() + 1), k2.abs() + 1]
    actual = evaluate(op, problem)
    truth, plain = forward_reference(problem, torch.float64), forward_reference(problem, dtype)
    assert truth["lse"].max() < -100
    assert_close_to_truth(actual["out"], plain["out"], truth["out"], dtype, "out")


def test_fp16_weights_that_are_each_too_small():
    """Tokens whose first tile lies outside their window start from a reference of 0: 64 of the weights of 2^-22.7 sum to
    more than 1/2 here, but fp16 would round each by a fifth."""
    q = torch.full((1, 2176, 8, 40), -1, dtype=torch.float16, device="cuda")
    inputs = [q, *(torch.ones_like(q[:, :, :1]) for _ in range(4))]
    run = partial(op, *inputs, 2048, 2048, scale=0.393)
    run()
    assert "two_simplicial_fwd_scaled" in kernels_of(run)
    torch.testing.assert_close(run()[0], torch.ones_like(inputs[0]), atol=0, rtol=2e-3)
