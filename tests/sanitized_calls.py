"""Every family of kernels on small shapes, forward and backward, for NVIDIA's compute-sanitizer (needs a GPU):

    compute-sanitizer --tool memcheck|racecheck|synccheck --error-exitcode 1 python tests/sanitized_calls.py SYSTEM [DTYPE D ...]

SYSTEM is simplicial, grassmann or routing. racecheck takes minutes: give it one dtype, and for the simplicial system the
head dims 64 (both tile modes), 32 and 256, a process each. It finds hazards in cuBLAS (nvjet kernels): in the grassmann system
`--kernel-name kns=plucker` or `kns=grassmann` leaves ours.
"""

import itertools
import sys
import time

import torch

import simplex_ops

# (Nq, Nk, Hq, Hkv, w1, w2): tiles inside one token, decoding, a group over a tile, several parts, odd ratio, MHA with several
# splits, decoding with one head at a time.
SHAPES = [
    (3, 3, 64, 1, 3, 2),
    (2, 9, 96, 1, 9, 9),
    (9, 9, 96, 1, 9, 9),
    (1, 300, 8, 2, 300, 40),
    (37, 40, 6, 2, 7, 20),
    (130, 130, 2, 2, 33, 6),
    (1, 17, 3, 1, 17, 5),
    (64, 64, 64, 1, 64, 16),  # long keys that fill their tiles; 16 of them in dkv
    (64, 64, 64, 1, 64, 2),  # 32
    (70, 70, 128, 1, 70, 1),  # 64
    (40, 50, 64, 1, 32, 9),  # 32 keys a tile
]


def differentiate(outputs, leaves):
    outputs = [x for x in outputs if x.requires_grad]
    torch.autograd.backward(outputs, [torch.randn_like(x) for x in outputs])
    assert all(x.grad.isfinite().all() for x in leaves)


def simplicial(dtype, dims):
    for dim, (n_q, n_k, heads, kv_heads, w1, w2) in itertools.product(dims or [32, 64, 72, 128, 256], SHAPES):
        q = torch.randn(1, n_q, heads, dim, device="cuda", dtype=dtype, requires_grad=True)
        keys = [torch.randn(1, n_k, kv_heads, dim, device="cuda", dtype=dtype, requires_grad=True) for _ in range(4)]
        outputs = simplex_ops.two_simplicial_attention(q, *keys, w1, w2, return_lse=True)
        differentiate(outputs, [q, *keys])
        yield dim, n_q, n_k, heads, kv_heads, w1, w2
    for dim, heads, bounds in itertools.product(
        dims or [64, 128], (1, 8, 64), ([0, 30, 30, 31, 130], [50, 9, -3, 2**30], [-9, 140])
    ):
        q = torch.randn(1, 130, heads, dim, device="cuda", dtype=dtype, requires_grad=True)  # wrong bounds, too
        keys = [torch.randn(1, 130, 1, dim, device="cuda", dtype=dtype, requires_grad=True) for _ in range(4)]
        starts = torch.tensor(bounds, device="cuda", dtype=torch.int32)
        outputs = simplex_ops.two_simplicial_attention(q, *keys, 70, 20, cu_seqlens=starts, return_lse=True)
        differentiate(outputs, [q, *keys])
        yield dim, heads, bounds


def grassmann(dtype, dims):
    for r, length in itertools.product(dims or [2, 7, 32, 65, 128], (1, 37)):
        z = torch.randn(2, length, r, device="cuda", dtype=dtype, requires_grad=True)
        weight = torch.randn(24, r * (r - 1) // 2, device="cuda", dtype=dtype, requires_grad=True)
        valid = torch.rand(2, length, device="cuda") < 0.7
        for mask in (None, valid):
            differentiate([simplex_ops.grassmann_mix(z, weight, None, (1, 2, 4, 40), valid=mask)], [z, weight])
            differentiate([simplex_ops.plucker_mean(z, (1, 1, 5), valid=mask)], [z])
        row = z.detach()[:1].requires_grad_()
        for bounds in ([0, length // 2, length // 2, length], [-9, length + 9], [5, 2**31 - 1, 3]):  # wrong ones, too
            starts = torch.tensor(bounds, device="cuda", dtype=torch.int32)
            differentiate([simplex_ops.plucker_mean(row, (1, 5), cu_seqlens=starts)], [row])
        g = simplex_ops.grassmann_mix(z, weight, None, (1, 2, 4, 40)).detach().requires_grad_()
        h, logits = (torch.randn_like(g, requires_grad=True) for _ in range(2))
        differentiate([simplex_ops.grassmann_blend(h, g, logits)], [h, g, logits])
        dim, planes = (128 if r == 32 else 24), weight.shape[1]  # the gate's own kernel takes multiples of 128
        shapes = (2, length, dim), (r, dim), (r,), (dim, planes), (dim,), (dim, dim), (dim, dim), (dim,)
        layer = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
        differentiate([simplex_ops.grassmann_layer(*layer, (1, 2, 4, 40), valid=valid)], layer)
        ring = torch.zeros(2, 5, r, device="cuda", dtype=dtype)
        for position in range(0, length, 3):
            simplex_ops.grassmann_step(z[:, position : position + 3], ring, weight, None, (1, 5), position)
        yield r, length


def routing(dtype, dims):
    for dim, length in itertools.product(dims or [8, 72, 520], (1, 101, 1030)):
        rows = [torch.randn(2, length, dim, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)]
        numbers = [torch.tensor(p, device="cuda", requires_grad=True) for p in (0.55, 0.44, 1.025, 1.1)]
        gate = simplex_ops.surprise_gate(*rows, *numbers)[0]
        differentiate([gate], [*rows, *numbers])
        idx, _ = simplex_ops.topk_route(gate.detach(), (length + 1) // 2)
        simplex_ops.topk_route_calibrate_(gate, length, *torch.zeros(2, device="cuda").unbind())
        simplex_ops.threshold_route(gate.detach(), 0.75, length)
        for put_back, of in ((simplex_ops.route_scatter_add, idx), (simplex_ops.route_replace, gate)):
            y, weights = simplex_ops.route_gather(rows[0], idx), torch.rand(of.shape, device="cuda", requires_grad=True)
            differentiate([put_back(rows[1], y, idx, weights)], [rows[0], rows[1], weights])
        logits_of = (rows[2], torch.randn(2 * dim, device="cuda", requires_grad=True), rows[0][:, 0])
        differentiate([simplex_ops.causal_route_logits(rows[2], logits_of[1][:dim])], logits_of[:2])
        differentiate(
            [simplex_ops.causal_route_logits(*logits_of[:2], before) for before in (None, logits_of[2])], logits_of[:2]
        )
        keys, values = (torch.zeros(2, length + 3, 1, dim, device="cuda", dtype=dtype) for _ in range(2))
        count, positions = torch.full((2,), 2, device="cuda", dtype=torch.int32), idx.clone()
        positions[1, positions.shape[1] // 2 :] = -1
        for frequencies in (None, torch.rand(dim // 2, device="cuda")):
            with torch.no_grad():
                simplex_ops.route_kv_append_(keys, values, count, *[y.unsqueeze(2)] * 2, positions, frequencies)
        yield dim, length


def main() -> None:
    torch.manual_seed(0)
    system = {f.__name__: f for f in (simplicial, grassmann, routing)}[sys.argv[1]]
    dtypes = [getattr(torch, name) for name in sys.argv[2:3]] or [torch.bfloat16, torch.float16, torch.float32]
    for dtype in dtypes:
        for case in system(dtype, [int(dim) for dim in sys.argv[3:]]):
            print(dtype, *case, f"{time.perf_counter():.1f} s", flush=True)
    print("done")


if __name__ == "__main__":
    main()
