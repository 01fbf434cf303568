"""What a call costs besides the kernel: import, first call, overhead per call; next to the same kernel through Triton's JIT.

    python benchmarks/latency.py [--out benchmarks/results]

Needs a GPU; about 15 s. The shapes are so small that the kernel is shorter than its launch. Import and first call are those of this
very process, once. Triton, where it is installed, compiles the same source (triton_kernels/) as its JIT would for a user,
with an empty cache.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

begin = time.perf_counter()
import simplex_ops  # noqa: E402

IMPORT_MS = (time.perf_counter() - begin) * 1e3
from common import RESULTS, write  # noqa: E402

ROOT = Path(__file__).parents[1]


def per_call_us(function, calls: int = 2000) -> float:
    """Host time of a call that is not waited for: the best of several batches, each short of filling the launch queue."""
    for _ in range(50):
        function()
    best = float("inf")
    for _ in range(calls // 100):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(100):
            function()
        best = min(best, (time.perf_counter() - begin) / 100)
    torch.cuda.synchronize()
    return best * 1e6


def inputs(requires_grad: bool = False) -> list[torch.Tensor]:
    shapes = [(1, 32, 8, 64), *[(1, 32, 2, 64)] * 4]
    return [torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=requires_grad) for s in shapes]


def first_call_ms(call) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


def jit_launcher():
    """The forward kernel under triton.jit, launched as a user's Python would. None without Triton."""
    try:
        import triton
    except ImportError:
        return None
    sys.path.insert(0, str(ROOT))
    from triton_kernels import two_simplicial_attention as kernels

    function = kernels.two_simplicial_fwd.fn  # the JIT infers types; annotations like "*dtype:16" are for the build
    function.__annotations__ = {n: a for n, a in function.__annotations__.items() if not isinstance(a, str)}
    kernel = triton.jit(function)

    def call(q, k_long, k_short, v_long, v_short):
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], device=q.device)
        strides = [t.stride(d) for t in (q, k_long, v_long, k_short, v_short) for d in range(3)]
        no_bounds = lse.view(torch.int32), 0  # of packed sequences: never read
        kernel[(4,)](q, k_long, v_long, k_short, v_short, out, lse, *strides, q.shape[1], k_long.shape[1], 2, 4, 64, 8, 4,
                     0.125, *no_bounds, HEAD_DIM=64, SHARE=1, BLOCK_M=64, BLOCK_N=128, num_warps=4, num_stages=1)  # fmt: skip
        return out, lse

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    row: dict[str, float] = {}

    def note(name: str, value: float) -> None:
        row[name] = value
        print(f"{name:<24} {value:8.2f}", flush=True)

    note("import_ms", IMPORT_MS)
    op = torch.ops.simplex.two_simplicial_attention
    tensors, x = inputs(), torch.randn(1, 32, 8, 64, device="cuda", dtype=torch.bfloat16)
    note("first_call_ms", first_call_ms(lambda: simplex_ops.two_simplicial_attention(*tensors, 8, 4)))
    with torch.inference_mode():
        note("aten_add_us", per_call_us(lambda: torch.add(x, x)))
        note("op_inference_us", per_call_us(lambda: op(*tensors, 8, 4)))
    leaves = inputs(requires_grad=True)
    y = x.clone().requires_grad_()
    note("aten_add_grad_us", per_call_us(lambda: torch.add(y, y)))
    note("op_grad_us", per_call_us(lambda: op(*leaves, 8, 4)))
    note("over_aten_inference_us", row["op_inference_us"] - row["aten_add_us"])
    note("over_aten_grad_us", row["op_grad_us"] - row["aten_add_grad_us"])

    call = jit_launcher()
    if call:
        q, k1, k2, v1, v2 = tensors
        with torch.inference_mode():
            note("jit_first_call_ms", first_call_ms(lambda: call(q, k1, k2, v1, v2)))
            torch.testing.assert_close(call(q, k1, k2, v1, v2)[0], op(*tensors, 8, 4)[0], atol=2e-2, rtol=2e-2)
            note("jit_us", per_call_us(lambda: call(q, k1, k2, v1, v2)))
    print(write("latency", "cuda", [row], args.out))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        main()
