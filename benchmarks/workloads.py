"""What benchmarks/tune.py runs to time and check a kernel: for each family of kernels the op that launches it.

A workload is (function, reference, inputs): the op as a user calls it, the same in plain torch (tests/reference.py), and
random inputs of both, small ones for the check, large ones for the clock.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from common import DTYPES
from torch import Tensor

import simplex_ops
from simplex_ops.two_simplicial_attention import valid_pairs

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import reference

Workload = tuple[Callable, Callable, list[Tensor]]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the small ones are tested there too
OFFSETS = (1, 2, 4, 8, 12, 16)


def normal(dtype: torch.dtype, *sizes: int) -> Tensor:
    return torch.randn(sizes, device=DEVICE).to(dtype)


def dtype_of(key: dict, default: str = "fp32") -> torch.dtype:
    return DTYPES[key.get("dtype", default)]


DECODE = ("two_simplicial_fwd_decode", "two_simplicial_fwd_merge")


def attention_shape(family: str, key: dict) -> tuple[int, ...]:
    """B, N, Hq, Hkv, w1, w2 that the row is chosen for: 64 query heads in groups of SHARE rows, or of all where the key has
    none; SHARE 1 is for what no other divides, and skewed tiles are for few heads per kv head. Decoding has one query a
    sequence, HEADS 1 for groups that 4 does not divide."""
    if family in DECODE:
        return (8, 512, 64, 64 if key.get("HEADS") == 1 else 1, 512, 32)
    share = 1 if family.endswith("_skewed") else key.get("SHARE", 64)
    return (1, 2048, 64, 64 // share if share > 1 else 16, 512, 32)


def attention(family: str, key: dict, small: bool, shape: tuple[int, ...]) -> Workload:
    batch, length, heads, kv_heads, w1, w2 = shape
    if small:
        batch, length, heads, kv_heads, w1, w2 = (2, 150, heads // kv_heads, 1, min(w1, 70), min(w2, 9))
    queries = 1 if family in DECODE else length
    sizes = [(batch, queries, heads, key["HEAD_DIM"]), *[(batch, length, kv_heads, key["HEAD_DIM"])] * 4]
    inputs = [normal(dtype_of(key), *s) for s in sizes]
    op = partial(simplex_ops.two_simplicial_attention, w1=w1, w2=w2, return_lse=True)
    return op, partial(reference.two_simplicial_attention, w1=w1, w2=w2), inputs


def attention_flop(family: str, key: dict, shape: tuple[int, ...]) -> float:
    batch, length, heads, _, w1, w2 = shape
    pairs = valid_pairs(1 if family in DECODE else length, length, w1, w2)
    return (3 if "_bwd" in family else 1) * 4 * key["HEAD_DIM"] * heads * batch * pairs


def sequence_bounds(key: dict, small: bool) -> Workload:
    length, w1, w2 = (150, 70, 9) if small else (1 << 18, 1, 1)  # little else to do beside it
    inputs = [normal(dtype_of(key, "bf16"), 1, length, heads, 64) for heads in (8, 1, 1, 1, 1)]
    starts = torch.tensor([0, length // 3, length], dtype=torch.int32, device=DEVICE)
    options = dict(w1=w1, w2=w2, cu_seqlens=starts)
    op = partial(simplex_ops.two_simplicial_attention, return_lse=True, **options)
    return op, partial(reference.two_simplicial_attention, **options), inputs


def plucker_mean(key: dict, small: bool) -> Workload:
    batch, length = (2, 50) if small else (32, 512)
    z = normal(dtype_of(key), batch, length, key.get("HEAD_DIM", 32) // 2)
    return (
        partial(simplex_ops.plucker_mean, offsets=OFFSETS),
        partial(reference.plucker_mean, offsets=OFFSETS),
        [z],
    )


def grassmann_mix(key: dict, small: bool) -> Workload:
    r, dim = 32, 256
    sizes = [((2, 50) if small else (32, 512)) + (r,), (dim, r * (r - 1) // 2), (dim,)]
    inputs = [normal(dtype_of(key), *s) for s in sizes]
    options = dict(offsets=OFFSETS)
    return partial(simplex_ops.grassmann_mix, **options), partial(reference.grassmann_mix, **options), inputs


def grassmann_layer(key: dict, small: bool) -> Workload:
    r, dim = 32, 256
    sizes = [(r, dim), (r,), (dim, r * (r - 1) // 2), (dim,), (dim, dim), (dim, dim), (dim,)]
    inputs = [normal(dtype_of(key), *((2, 50) if small else (32, 512)), dim)]
    inputs += [(torch.randn(s, device=DEVICE) * s[-1] ** -0.5).to(dtype_of(key)) for s in sizes]
    options = dict(offsets=OFFSETS)
    return partial(simplex_ops.grassmann_layer, **options), partial(reference.grassmann_layer, **options), inputs


def grassmann_blend(key: dict, small: bool) -> Workload:
    inputs = [normal(dtype_of(key), 2, 50 if small else 8192, 1024) for _ in range(3)]
    return simplex_ops.grassmann_blend, reference.grassmann_blend, inputs


def surprise_gate(key: dict, small: bool) -> Workload:
    rows = [normal(dtype_of(key, "bf16"), 8, 50 if small else 4096, 2048) for _ in range(3)]
    numbers = [torch.tensor(x, device=DEVICE) for x in (0.55, 0.44, 1.025, 1.1)]
    return (lambda *x: simplex_ops.surprise_gate(*x)[0]), (lambda *x: reference.surprise_gate(*x)[0]), rows + numbers


def choice(ours: Callable, plain: Callable, *limits: float) -> Callable[[dict, bool], Workload]:
    def build(key: dict, small: bool) -> Workload:
        scores = torch.rand(8 if small else 64, 4096, device=DEVICE)
        return (lambda x: ours(x, *limits)), (lambda x: plain(x, *limits)), [scores]

    return build


def calibrated(function: Callable) -> Callable[[Tensor, int], Sequence[Tensor]]:
    def step(scores: Tensor, k: int) -> Sequence[Tensor]:
        return function(scores, k, torch.zeros((), device=DEVICE), torch.ones((), device=DEVICE))[:2]

    return step


def routed(ours: Callable, plain: Callable, scatters: bool, key: dict, small: bool) -> Workload:
    batch, length, dim = (2, 100, 72) if small else (8, 4096, 2048)
    dtype = dtype_of(key, "bf16")
    idx, _ = simplex_ops.topk_route(torch.rand(batch, length, device=DEVICE), length // 2)
    x = normal(dtype, batch, length, dim)
    if not scatters:
        return (lambda x: ours(x, idx)), (lambda x: plain(x, idx)), [x]
    inputs = [x, normal(dtype, batch, length // 2, dim), torch.rand(batch, length // 2, device=DEVICE)]
    return (lambda x, y, gate: ours(x, y, idx, gate)), (lambda x, y, gate: plain(x, y, idx, gate)), inputs


def causal_route_logits(key: dict, small: bool) -> Workload:
    inputs = [normal(dtype_of(key), 8, 50 if small else 4096, 2048), normal(torch.float32, 4096)]
    return simplex_ops.causal_route_logits, reference.causal_route_logits, inputs


def route_kv_append(key: dict, small: bool) -> Workload:
    batch, slots = (2, 50) if small else (8, 2048)
    positions = torch.arange(slots, dtype=torch.int32, device=DEVICE).expand(batch, -1).contiguous()
    count, frequencies = torch.zeros(batch, dtype=torch.int32, device=DEVICE), torch.rand(64, device=DEVICE)

    def append(k: Tensor, v: Tensor) -> Sequence[Tensor]:
        caches, filled = [torch.zeros_like(k), torch.zeros_like(v)], count.clone()
        simplex_ops.route_kv_append_(*caches, filled, k.detach(), v.detach(), positions, frequencies)
        return [*caches, filled]

    def plain(k: Tensor, v: Tensor) -> Sequence[Tensor]:
        empty = torch.zeros_like(k), torch.zeros_like(v), count
        return reference.route_kv_append(*empty, k, v, positions, frequencies.to(k.dtype))

    return append, plain, [normal(dtype_of(key, "bf16"), batch, slots, 16, 128) for _ in range(2)]


# By the start of the family's name; the longest that fits counts.
WORKLOADS: dict[str, Callable[..., Workload]] = {
    "sequence_bounds": sequence_bounds,
    "plucker_mean": plucker_mean,
    "grassmann_blend": grassmann_blend,
    "grassmann_layer": grassmann_layer,
    "grassmann_mix": grassmann_mix,
    "surprise_gate": surprise_gate,
    "causal_route_logits": causal_route_logits,
    "route_kv_append": route_kv_append,
    "route_topk": choice(simplex_ops.topk_route, reference.topk_route, 2048),
    "route_calibrate": choice(
        calibrated(simplex_ops.topk_route_calibrate_), calibrated(reference.topk_route_calibrate), 2048
    ),
    "route_threshold": choice(simplex_ops.threshold_route, reference.threshold_route, 0.5, 4096),
    "route_gather": partial(routed, simplex_ops.route_gather, reference.route_gather, False),
    "route_scatter_add": partial(routed, simplex_ops.route_scatter_add, reference.route_scatter_add, True),
    "route_slots": partial(routed, simplex_ops.route_scatter_add, reference.route_scatter_add, True),
}


def workload(family: str, key: dict, small: bool, shape: tuple[int, ...] | None = None) -> Workload:
    """`shape`: B, N, Hq, Hkv, w1, w2 for two_simplicial_*."""
    if family.startswith("two_simplicial"):
        return attention(family, key, small, shape or attention_shape(family, key))
    prefixes = [prefix for prefix in WORKLOADS if family.startswith(prefix)]
    if not prefixes:
        raise ValueError(f"expected a family that benchmarks/workloads.py has a workload for, got {family}")
    return WORKLOADS[max(prefixes, key=len)](key, small)
