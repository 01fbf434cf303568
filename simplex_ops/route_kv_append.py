"""The compact key/value cache of routed layers (arXiv 2511.21408): only the tokens that a layer computed leave a row in it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import expect, expect_device, expect_dtype, expect_floating, expect_like, expect_sizes, wide_dtype
from ._library import register_flops


def route_kv_append_(
    keys: Tensor,
    values: Tensor,
    count: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    frequencies: Tensor | None = None,
) -> None:
    r"""Appends the keys and values of routed tokens to a cache in which each sequence has a length of its own, in place.

    With c = count[b] before the call, for every slot s of sequence b that is not empty and finds room, c + s < capacity::

        keys[b, c + s]   = rotate(k[b, s], positions[b, s] * frequencies)
        values[b, c + s] = v[b, s]
        count[b]         = min(c + number of filled slots, capacity)

    rotate turns each pair (k_d, k_{d + head_dim / 2}) of a head by its angle: rotary embedding at the position that the
    token has in the text, not at its row in the cache. A full cache takes no more, and says so by its count. Skipped
    tokens leave nothing: the rows of a sequence are its routed tokens, in the order of time.

    Args:
        keys, values: [batch, capacity, heads, head_dim], contiguous; float32, float16, bfloat16, or float64 on the CPU.
        count: [batch] int32, how many rows of each sequence are filled.
        k, v: [batch, slots, heads, head_dim] like keys; may be strided. head_dim is even; on CUDA heads * head_dim is a
            multiple of 8.
        positions: [batch, slots] int32, the tokens' positions in the text, or -1 in an empty slot. The empty slots are the
            last ones, as `threshold_route` leaves them (the CPU refuses any other order, CUDA leaves rows unwritten).
        frequencies: None for no rotation, or [head_dim / 2] in float32 (float64 with float64 data).

    For decoding, under torch.no_grad: no gradient flows through the cache. Nothing waits for the device, and no shape
    depends on the routes.

    Raises:
        RuntimeError: a rank, shape, dtype, device, stride or (on the CPU) count or order of slots that is not as above.

    >>> keys, values, count = torch.zeros(1, 4, 1, 2), torch.zeros(1, 4, 1, 2), torch.zeros(1, dtype=torch.int32)
    >>> k = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 2, 1, 2)
    >>> route_kv_append_(keys, values, count, k, k, torch.tensor([[5, -1]], dtype=torch.int32))
    >>> count, keys[0, :, 0]
    (tensor([1], dtype=torch.int32), tensor([[1., 2.],
            [0., 0.],
            [0., 0.],
            [0., 0.]]))
    """
    torch.ops.simplex.route_kv_append_(keys, values, count, k, v, positions, frequencies)


# The fake: the checks and texts of csrc/route_kv_append.cpp, on sizes that may be symbols.


@torch.library.register_fake("simplex::route_kv_append_")
def _fake(
    keys: Tensor,
    values: Tensor,
    count: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    frequencies: Tensor | None = None,
) -> None:
    op = "route_kv_append_"
    expect(op, k.dim() == 4, f"k to be 4-dimensional [batch, slots, heads, head_dim], got {k.dim()} dimensions")
    what = f"keys to be 4-dimensional [batch, capacity, heads, head_dim], got {keys.dim()} dimensions"
    expect(op, keys.dim() == 4, what)
    expect_floating(op, "k", k)
    batch, slots, heads, head_dim = k.shape
    expect(op, head_dim % 2 == 0, f"the head_dim of k to be even, got {head_dim}")
    if k.device.type == "cuda":
        row = heads * head_dim
        expect(op, row % 8 == 0, f"heads * head_dim of k to be a multiple of 8 on cuda, got {row}")
    expect_sizes(op, "v", v, (batch, slots, heads, head_dim), "that of k")
    expect_like(op, "v", v, "k", k)
    for name, x in (("keys", keys), ("values", values)):
        sizes = (batch, keys.shape[1], heads, head_dim)
        expect_sizes(op, name, x, sizes, "batch of k, the capacity of keys, heads and head_dim of k")
        expect_like(op, name, x, "k", k)
        expect(op, x.is_contiguous(), f"{name} to be contiguous, got strides that are not")
    expect_sizes(op, "count", count, (batch,), "batch of k")
    expect_sizes(op, "positions", positions, (batch, slots), "batch, slots of k")
    for name, x in (("count", count), ("positions", positions)):
        expect_dtype(op, name, x, torch.int32)
        expect_device(op, name, x, "k", k)
    expect(op, count.is_contiguous(), "count to be contiguous, got strides that are not")
    if frequencies is not None:
        expect_sizes(op, "frequencies", frequencies, (head_dim // 2,), "half the head_dim of k")
        expect_dtype(op, "frequencies", frequencies, wide_dtype(k))
        expect_device(op, "frequencies", frequencies, "k", k)


def _flops(keys: Any, values: Any, count: Any, k: Sequence[int], *args: Any, **kwargs: Any) -> int:
    batch, slots, heads, head_dim = k
    return 3 * batch * slots * heads * head_dim  # the rotation of every slot, filled or not


register_flops(torch.ops.simplex.route_kv_append_, _flops)
