"""2-simplicial attention (arXiv 2507.02754): attention over pairs of keys, each axis with its own sliding window."""

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import (
    dtype_name,
    expect,
    expect_cu_seqlens,
    expect_device,
    expect_dtype,
    expect_like,
    expect_sizes,
    wide_dtype,
)
from ._library import register_flops

_DTYPES = {
    "cpu": ("float32, float64 or bfloat16", (torch.float32, torch.float64, torch.bfloat16)),
    "cuda": ("float32, float16 or bfloat16", (torch.float32, torch.float16, torch.bfloat16)),
}


@overload
def two_simplicial_attention(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    w1: int,
    w2: int,
    *,
    scale: float | None = None,
    determinant: bool = False,
    cu_seqlens: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def two_simplicial_attention(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    w1: int,
    w2: int,
    *,
    scale: float | None = None,
    determinant: bool = False,
    cu_seqlens: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def two_simplicial_attention(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    w1: int,
    w2: int,
    *,
    scale: float | None = None,
    determinant: bool = False,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Causal 2-simplicial attention, with a sliding window on each key axis (arXiv 2507.02754, sections 4 and 6).

    Where attention scores a query against a key by their dot product, 2-simplicial attention scores it against a *pair*
    of keys by a trilinear product, and mixes the elementwise products of their values. With i the position of a query::

        valid(i) = {(j, k): i - w1 < j <= i  and  i - w2 < k <= i}
        A_ijk    = scale * sum_d q_id k1_jd k2_kd
        P_i      = softmax of A_i over all valid (j, k) jointly
        out_i    = sum_jk P_ijk (v1_j * v2_k)
        lse_i    = ln sum_jk exp(A_ijk)

    Every query sees at least itself. The cost is 4 * head_dim FLOP per head and valid pair, that is O(length w1 w2);
    memory is O(inputs); two runs are bitwise equal, gradients included. Sums are taken in float32 (float64 for float64
    inputs).

    Args:
        q: queries [batch, q_length, heads, head_dim]; they are the last q_length positions of the sequence: q_length =
            length is training, q_length = 1 is decoding over a cache.
        k1, k2, v1, v2: [batch, length, kv_heads, head_dim], length >= q_length; heads is a multiple of kv_heads, and
            query head h reads kv head h // (heads // kv_heads).
        w1: window of k1 and v1 in positions, the query's own included; at least 1. A window larger than the sequence is
            full causal attention on that axis.
        w2: window of k2 and v2. (k1, v1, w1) and (k2, v2, w2) may be exchanged freely.
        scale: factor of the scores; head_dim ** -0.5 if None.
        determinant: the rotation-invariant form of the paper's section 5, see below. head_dim is any number up to 128 then.
        cu_seqlens: int32 [sequences + 1], ascending from 0 to length: several sequences packed into one row, batch 1 and
            q_length = length, of which the i-th holds the positions cu_seqlens[i] to cu_seqlens[i + 1] - 1. No query sees
            a key of another sequence: the result is that of a call for each, and finite values of others change no bit of
            it. (On CUDA nobody looks at cu_seqlens beforehand, for that would wait for the GPU; wrong ones give wrong results
            and read no foreign memory. And what is inf or NaN in a sequence may there make NaN of its neighbours.)
        return_lse: also return the log-sum-exp, which merges results over disjoint sets of pairs. It is differentiable.

    With ``determinant`` the three vectors are cut into chunks of 3, and a score is what no rotation of 3-space changes::

        A_ijk = scale * (sum over chunks of det[q_i; k1_j; k2_k] + sum over the last head_dim % 3 dims of q_id k1_jd k2_kd)

    Exchanging the two axes flips the sign of the determinants. As det[a; b; c] = a . (b x c) has six products where a
    chunk of the plain form has three, it is the plain form of twice the head_dim, and costs as much.

    Dtypes: float32, float16, bfloat16 on CUDA; float32, float64, bfloat16 on the CPU. head_dim is a multiple of 8 up to
    256. All five tensors share dtype and device; they may be strided. `torch.autocast` casts them to its dtype. In float16
    the products of key rows, and those of value rows, must stay within its range (65504): they may be rounded to it.
    TorchScript takes `torch.ops.simplex.two_simplicial_attention` itself, which returns (out, lse).

    Returns:
        out, like q; with return_lse the tuple (out, lse), lse [batch, heads, q_length] in float32 (float64 for float64
        inputs). Both are once differentiable with respect to q, k1, k2, v1 and v2.

    Raises:
        RuntimeError: a rank, shape, dtype, device, window or scale that is not as above; the message names the
            argument, its value and what was expected. Also on a CUDA architecture without a kernel in
            the package; it names those that have one.

    >>> q = torch.randn(2, 512, 8, 64)
    >>> k1, k2, v1, v2 = torch.randn(4, 2, 512, 2, 64)
    >>> two_simplicial_attention(q, k1, k2, v1, v2, 128, 16).shape
    torch.Size([2, 512, 8, 64])
    """
    inputs, head_dim = (q, k1, k2, v1, v2), None
    if determinant:
        head_dim = _checked_head_dim("two_simplicial_attention", *inputs)
        scale = head_dim**-0.5 if scale is None else scale
        inputs = determinant_as_product(*inputs)
    out, lse = torch.ops.simplex.two_simplicial_attention(*inputs, w1, w2, scale, cu_seqlens)
    if head_dim is not None:
        out = out[..., :head_dim].contiguous()
    if return_lse:
        return out, lse
    return out


def determinant_as_product(
    q: Tensor, k1: Tensor, k2: Tensor, v1: Tensor, v2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Inputs of the plain form whose scores are the determinant form's; its out has zeros behind the head_dim of q.

    det[q; k1; k2] = sum_d q_d (k1_d' k2_d'' - k1_d'' k2_d'), where d, d', d'' are the dims of a chunk in cyclic order.
    """
    whole = q.size(-1) // 3 * 3
    padding = -(q.size(-1) + whole) % 8
    chunks, rest = q[..., :whole], q[..., whole:]
    q = F.pad(torch.cat((chunks, -chunks, rest), -1), (0, padding))
    k1 = F.pad(torch.cat((_turned(k1, whole, -1), _turned(k1, whole, 1), k1[..., whole:]), -1), (0, padding))
    k2 = F.pad(torch.cat((_turned(k2, whole, 1), _turned(k2, whole, -1), k2[..., whole:]), -1), (0, padding))
    return q, k1, k2, F.pad(v1, (0, whole + padding)), F.pad(v2, (0, whole + padding))


def _turned(x: Tensor, whole: int, by: int) -> Tensor:
    """The chunks of x, the dims of each moved on by one place (by = 1) or back (-1)."""
    return x[..., :whole].unflatten(-1, (whole // 3, 3)).roll(by, -1).flatten(-2)


def _checked_head_dim(op: str, *tensors: Tensor) -> int:
    """That of q, after the checks that the op could only make of the inputs that it gets."""
    # Not `expect`: what calls the op is traced itself, and torch.compile takes no torch._check with such a message (2.11).
    dim = tensors[0].shape[-1] if tensors[0].dim() else 0
    for name, x in zip(("q", "k1", "k2", "v1", "v2"), tensors, strict=True):
        if x.dim() != 4:
            raise RuntimeError(
                f"{op}: expected {name} to be 4-dimensional [batch, length, heads, head_dim], got {x.dim()} dimensions"
            )
        if x.shape[-1] != dim:
            raise RuntimeError(f"{op}: expected the head_dim of {name} to be that of q ({dim}), got {x.shape[-1]}")
    if not 1 <= dim <= 128:
        raise RuntimeError(f"{op}: expected the head_dim of q to be from 1 to 128 in the determinant form, got {dim}")
    return dim


# The fakes: the checks and texts of csrc/two_simplicial_attention.cpp, on sizes that may be symbols.


@torch.library.register_fake("simplex::two_simplicial_attention")
def _forward_fake(
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    w1: int,
    w2: int,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check("two_simplicial_attention", q, k1, k2, v1, v2, w1, w2, scale, cu_seqlens)
    return q.new_empty(q.shape), q.new_empty(_lse_shape(q), dtype=wide_dtype(q))


@torch.library.register_fake("simplex::two_simplicial_attention_backward")
def _backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    out: Tensor,
    lse: Tensor,
    w1: int,
    w2: int,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    op = "two_simplicial_attention_backward"
    _check(op, q, k1, k2, v1, v2, w1, w2, scale, cu_seqlens)
    for name, x in {"grad_out": grad_out, "out": out}.items():
        expect_sizes(op, name, x, tuple(q.shape), "that of q")
        expect_like(op, name, x, "q", q)
    for name, statistic in (("grad_lse", grad_lse), ("lse", lse)):
        if statistic is not None:
            expect_sizes(op, name, statistic, _lse_shape(q), "batch, heads, length of q")
            expect_dtype(op, name, statistic, wide_dtype(q))
            expect_device(op, name, statistic, "q", q)
    return tuple(x.new_empty(x.shape) for x in (q, k1, k2, v1, v2))


def _lse_shape(q: Tensor) -> tuple[int, int, int]:
    return q.shape[0], q.shape[2], q.shape[1]


def _check(
    op: str,
    q: Tensor,
    k1: Tensor,
    k2: Tensor,
    v1: Tensor,
    v2: Tensor,
    w1: int,
    w2: int,
    scale: float | None,
    cu_seqlens: Tensor | None,
) -> None:
    keys = {"k1": k1, "k2": k2, "v1": v1, "v2": v2}
    for name, x in (("q", q), ("k1", k1)):
        wanted = f"{name} to be 4-dimensional [batch, length, heads, head_dim], got {x.dim()} dimensions"
        expect(op, x.dim() == 4, wanted)

    batch, length, heads, dim = q.shape
    _, kv_length, kv_heads, _ = k1.shape
    for name, x in keys.items():
        expect_sizes(
            op, name, x, (batch, kv_length, kv_heads, dim), "batch of q, its own length, kv heads, head_dim of q"
        )
        expect_like(op, name, x, "q", q)
    names, dtypes = _DTYPES.get(q.device.type, ("", (q.dtype,)))
    expect(op, q.dtype in dtypes, f"q to be {names} on {q.device.type}, got {dtype_name(q)}")
    head_dim = f"the head_dim of q to be a multiple of 8 up to 256, got {dim}"
    for condition in (dim % 8 == 0, dim >= 8, dim <= 256):
        expect(op, condition, head_dim)
    multiple = f"the heads of q to be a multiple of the heads of k1 ({kv_heads}), got {heads}"
    expect(op, kv_heads >= 1, multiple)
    expect(op, heads % kv_heads == 0, multiple)
    expect(op, length <= kv_length, f"the length of q to be at most that of k1 ({kv_length}), got {length}")
    if cu_seqlens is not None:
        same = f"the length of q to be that of k1 ({kv_length}) with cu_seqlens, got {length}"
        expect(op, length == kv_length, same)
        expect_cu_seqlens(op, cu_seqlens, "q", q)
    for name, w in (("w1", w1), ("w2", w2)):
        expect(op, w >= 1, f"{name} to be at least 1, got {w}")
    expect(op, scale is None or math.isfinite(scale), f"scale to be finite, got {scale}")
    in_range = scale is None or q.dtype == torch.float64 or abs(scale) <= torch.finfo(torch.float32).max
    expect(op, in_range, f"scale to be within the range of float32, got {scale}")


def valid_pairs(length: int, kv_length: int, w1: int, w2: int) -> int:
    """Number of (i, j, k) that the op sums over, for one batch entry and head.

    The query at position p (from 1) sees min(p, w1) * min(p, w2) pairs, the queries are the last `length` positions.
    """
    short, long = min(w1, w2), max(w1, w2)

    def first(positions: int) -> int:
        rising = min(positions, short)  # these see everything on both axes
        middle = min(positions, long)  # these and the next on the long axis
        squares = rising * (rising + 1) * (2 * rising + 1) // 6
        line = short * (middle * (middle + 1) - rising * (rising + 1)) // 2
        return squares + line + short * long * (positions - middle)

    return first(kv_length) - first(kv_length - length)


def _forward_flops(
    q: Sequence[int],
    k1: Sequence[int],
    k2: Sequence[int],
    v1: Sequence[int],
    v2: Sequence[int],
    w1: int,
    w2: int,
    *args: Any,
    **kwargs: Any,
) -> int:
    batch, length, heads, dim = q
    return 4 * dim * heads * batch * valid_pairs(length, k1[1], w1, w2)


def _backward_flops(grad_out: Sequence[int], grad_lse: Sequence[int] | None, *args: Any, **kwargs: Any) -> int:
    q, k1, k2, v1, v2, _, _, w1, w2, *_ = args
    return 3 * _forward_flops(q, k1, k2, v1, v2, w1, w2)


register_flops(torch.ops.simplex.two_simplicial_attention, _forward_flops)
register_flops(torch.ops.simplex.two_simplicial_attention_backward, _backward_flops)
