"""What a call costs besides the kernel: import, first call, overhead per call; next to the same kernel through Triton's JIT.

    python benchmarks/latency.py [--out benchmarks/results]

Needs a GPU. The shapes are so small that the kernel is shorter than its launch. Triton, where it is installed, compiles
the same source (triton_kernels/) as its JIT would for a user: once with an empty cache, then warm.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import RESULTS, write

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


def fresh(code: str) -> float:
    """Milliseconds that `code` prints in a new process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def import_ms() -> float:
    code = "import torch, time; t = time.perf_counter(); import simplex_ops; print((time.perf_counter() - t) * 1e3)"
    return min(fresh(code) for _ in range(3))


def first_call_ms() -> float:
    code = """
import time, torch, simplex_ops
q = torch.randn(1, 32, 8, 64, device="cuda", dtype=torch.bfloat16)
k = [torch.randn(1, 32, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
torch.cuda.synchronize()
t = time.perf_counter()
simplex_ops.two_simplicial_attention(q, *k, 8, 4)
torch.cuda.synchronize()
print((time.perf_counter() - t) * 1e3)"""
    return min(fresh(code) for _ in range(3))


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
        kernel[(4,)](q, k_long, v_long, k_short, v_short, out, lse, *strides, q.shape[1], k_long.shape[1], 2, 4, 64, 8, 4,
                     0.125, HEAD_DIM=64, SHARE=1, BLOCK_M=64, BLOCK_N=128, num_warps=4, num_stages=1)  # fmt: skip
        return out, lse

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = {"import_ms": import_ms(), "first_call_ms": first_call_ms()}

    op = torch.ops.simplex.two_simplicial_attention
    tensors, x = inputs(), torch.randn(1, 32, 8, 64, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        rows["aten_add_us"] = per_call_us(lambda: torch.add(x, x))
        rows["op_inference_us"] = per_call_us(lambda: op(*tensors, 8, 4))
    leaves = inputs(requires_grad=True)
    y = x.clone().requires_grad_()
    rows["aten_add_grad_us"] = per_call_us(lambda: torch.add(y, y))
    rows["op_grad_us"] = per_call_us(lambda: op(*leaves, 8, 4))

    call = jit_launcher()
    if call:
        q, k1, k2, v1, v2 = tensors
        with torch.inference_mode():
            begin = time.perf_counter()
            out, _ = call(q, k1, k2, v1, v2)
            torch.cuda.synchronize()
            rows["jit_first_call_ms"] = (time.perf_counter() - begin) * 1e3
            torch.testing.assert_close(out, op(*tensors, 8, 4)[0], atol=2e-2, rtol=2e-2)
            rows["jit_us"] = per_call_us(lambda: call(q, k1, k2, v1, v2))
    rows["over_aten_inference_us"] = rows["op_inference_us"] - rows["aten_add_us"]
    rows["over_aten_grad_us"] = rows["op_grad_us"] - rows["aten_add_grad_us"]
    print(json.dumps({name: round(value, 2) for name, value in rows.items()}, indent=1))
    print(write("latency", "cuda", [rows], args.out))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        main()
