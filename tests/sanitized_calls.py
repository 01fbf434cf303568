"""Every family of kernels on small shapes, forward and backward, for NVIDIA's compute-sanitizer (needs a GPU):

    compute-sanitizer --tool memcheck|racecheck|synccheck --error-exitcode 1 python tests/sanitized_calls.py [DTYPE D ...]

racecheck takes minutes: give it one dtype and the head dims 64 (both tile modes), 32 and 256, a process each.
"""

import itertools
import sys
import time

import torch

import simplex_ops

# (Nq, Nk, Hq, Hkv, w1, w2): tiles inside one token, a group over a tile, odd ratio, MHA with several splits, decode.
SHAPES = [
    (3, 3, 64, 1, 3, 2),
    (2, 9, 96, 1, 9, 9),
    (37, 40, 6, 2, 7, 20),
    (130, 130, 2, 2, 33, 3),
    (1, 17, 4, 1, 17, 5),
]


def main() -> None:
    torch.manual_seed(0)
    dtypes = [getattr(torch, name) for name in sys.argv[1:2]] or [torch.bfloat16, torch.float16, torch.float32]
    dims = [int(dim) for dim in sys.argv[2:]] or [32, 64, 72, 128, 256]
    for dtype, dim in itertools.product(dtypes, dims):
        for n_q, n_k, heads, kv_heads, w1, w2 in SHAPES:
            q = torch.randn(1, n_q, heads, dim, device="cuda", dtype=dtype, requires_grad=True)
            keys = [
                torch.randn(1, n_k, kv_heads, dim, device="cuda", dtype=dtype, requires_grad=True) for _ in range(4)
            ]
            out, lse = simplex_ops.two_simplicial_attention(q, *keys, w1, w2, return_lse=True)
            torch.autograd.backward([out, lse], [torch.randn_like(out), torch.randn_like(lse)])
            assert all(x.grad.isfinite().all() for x in (q, *keys))
            print(dtype, dim, n_q, n_k, heads, kv_heads, w1, w2, f"{time.perf_counter():.1f} s", flush=True)
    print("done")


if __name__ == "__main__":
    main()
