"""Routing tokens to a layer (arXiv 2511.21408): choose some, gather them, add the layer's output back where they were."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import (
    dtype_name,
    expect,
    expect_device,
    expect_dtype,
    expect_floating,
    expect_like,
    expect_sizes,
    wide_dtype,
    without_autocast,
)
from ._library import register_flops


def topk_route(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest-scored tokens of each sequence, in the order of time.

    Ties go to the earlier token, and NaN counts as -inf, so the choice is one on every device. Exactly k tokens are chosen,
    of scores -inf too if need be. Ascending indices keep a causal mask over the chosen tokens valid. The choice itself is
    not causal: whether a token is among the top k depends on later ones. `threshold_route` is.

    Args:
        scores: [batch, length], float32 (or float64 on the CPU); may be strided.
        k: from 1 to length.

    Returns:
        idx [batch, k] int32, ascending, and mask [batch, length] bool, True at those indices. Neither is differentiable.

    Raises:
        RuntimeError: a rank, dtype or k that is not as above; the message names the argument, its value and what was
            expected.

    >>> topk_route(torch.tensor([[0.1, 0.7, 0.7, 0.9]]), 2)[0]
    tensor([[1, 3]], dtype=torch.int32)
    """
    with without_autocast(scores):
        return torch.ops.simplex.topk_route(scores, k)


def topk_route_calibrate_(scores: Tensor, k: int, threshold: Tensor, calibrations: Tensor) -> tuple[Tensor, Tensor]:
    """`topk_route`, which also moves a threshold, in place, towards the lowest chosen scores, their mean over the batch::

        calibrations += 1
        threshold    += max(1 / calibrations, 0.02) * (mean_b min_t(scores[b, t] where mask[b, t]) - threshold)

    At first that is the plain average of what it has seen, later an exponential one, so that `threshold_route` with it takes
    about the share of the tokens that training takes. Where the mean is not finite (NaN counts as -inf) the threshold
    stays. Nothing waits for the device.

    Args:
        scores, k: as those of `topk_route`.
        threshold, calibrations: float32 without dimensions, on the device of the scores.

    Returns:
        idx, mask: as `topk_route` does.

    Raises:
        RuntimeError: a rank, shape, dtype, device or k that is not as above.

    >>> threshold, calibrations = torch.zeros(()), torch.zeros(())
    >>> topk_route_calibrate_(torch.tensor([[0.1, 0.7, 0.6, 0.9]]), 2, threshold, calibrations)[0]
    tensor([[1, 3]], dtype=torch.int32)
    >>> threshold
    tensor(0.7000)
    """
    with without_autocast(scores):
        return torch.ops.simplex.topk_route_calibrate_(scores.detach(), k, threshold, calibrations)


def threshold_route(scores: Tensor, threshold: float, cap: int) -> tuple[Tensor, Tensor]:
    """The first `cap` tokens of each sequence with score >= threshold, in the order of time.

    Causal: whether a token is chosen depends on no later one. NaN is never chosen.

    Args:
        scores: [batch, length], float32 (or float64 on the CPU); may be strided.
        threshold: any number but NaN; it is rounded to the dtype of the scores.
        cap: slots per sequence, at least 1.

    Returns:
        idx [batch, cap] int32: ascending indices, then -1 in the empty slots; count [batch] int32, the number of filled
        slots. Neither is differentiable.

    Raises:
        RuntimeError: a rank, dtype, threshold or cap that is not as above.

    >>> threshold_route(torch.tensor([[0.1, 0.7, 0.6, 0.9]]), 0.65, 3)
    (tensor([[ 1,  3, -1]], dtype=torch.int32), tensor([2], dtype=torch.int32))
    """
    with without_autocast(scores):
        return torch.ops.simplex.threshold_route(scores, threshold, cap)


def route_gather(x: Tensor, idx: Tensor) -> Tensor:
    """The routed rows: ``y[b, s] = x[b, idx[b, s]]``, and zeros where idx is -1, an empty slot.

    Args:
        x: [batch, length, dim]; float32, float16, bfloat16, or float64 on the CPU; may be strided. On CUDA dim is a multiple
            of 8.
        idx: [batch, slots] int32, as `topk_route` or `threshold_route` returns it: no index twice in a sequence (otherwise
            the gradient is not defined). The CPU refuses an index outside [-1, length); CUDA takes it for an empty slot.

    Returns:
        y [batch, slots, dim] of x's dtype, once differentiable with respect to x.

    Raises:
        RuntimeError: a rank, shape, dtype, device or (on the CPU) index that is not as above.

    >>> route_gather(torch.arange(4.0).view(1, 4, 1), torch.tensor([[1, 3, -1]], dtype=torch.int32)).flatten()
    tensor([1., 3., 0.])
    """
    with without_autocast(x):
        return torch.ops.simplex.route_gather(x, idx)


def route_scatter_add(base: Tensor, y: Tensor, idx: Tensor, gate: Tensor | None = None) -> Tensor:
    """Adds routed rows back: ``out = base; out[b, idx[b, s]] += gate[b, s] * y[b, s]``; an idx of -1 adds nothing.

    Product and sum are rounded once, from float32 (float64 for float64). Deterministic: no two slots share a row.

    Args:
        base: [batch, length, dim]; float32, float16, bfloat16, or float64 on the CPU; may be strided. On CUDA dim is a
            multiple of 8.
        y: [batch, slots, dim], dtype and device of base.
        idx: [batch, slots] int32, no index twice in a sequence (otherwise the result is not defined). The CPU refuses an
            index outside [-1, length); CUDA takes it for an empty slot.
        gate: None, or [batch, slots] in float32 (float64 for float64 data).

    Returns:
        out, like base; once differentiable with respect to base, y and gate.

    Raises:
        RuntimeError: a rank, shape, dtype, device or (on the CPU) index that is not as above.

    >>> idx = torch.tensor([[0, 2]], dtype=torch.int32)
    >>> route_scatter_add(torch.zeros(1, 3, 1), torch.ones(1, 2, 1), idx, torch.tensor([[0.5, 2.0]])).flatten()
    tensor([0.5000, 0.0000, 2.0000])
    """
    with without_autocast(base):
        return torch.ops.simplex.route_scatter_add(base, y, idx, gate)


def route_replace(base: Tensor, y: Tensor, idx: Tensor, gate: Tensor | None = None) -> Tensor:
    """Puts routed rows in their place: ``out = base``, then for each slot, at ``t = idx[b, s]``::

        out[b, t] = base[b, t] + gate[b, t] * (y[b, s] - base[b, t])

    Without a gate that is y, bit for bit. The whole of ``base + gate * (block(rows) - rows)`` in one pass, when y is
    block(rows); rounded once, from float32 (float64 for float64). Deterministic: no two slots share a row.

    Args:
        base, y, idx: as those of `route_scatter_add`.
        gate: None, or [batch, length] in float32 (float64 for float64 data): one for each token, as routers and
            `surprise_gate` return it. Those of other tokens are not read, and their gradient is 0.

    Returns:
        out, like base; once differentiable with respect to base, y and gate.

    Raises:
        RuntimeError: a rank, shape, dtype, device or (on the CPU) index that is not as above.

    >>> idx = torch.tensor([[0, 2]], dtype=torch.int32)
    >>> route_replace(torch.ones(1, 3, 1), torch.full((1, 2, 1), 3.0), idx, torch.tensor([[0.5, 0.7, 1.0]])).flatten()
    tensor([2., 1., 3.])
    """
    with without_autocast(base):
        return torch.ops.simplex.route_replace(base, y, idx, gate)


# The fakes: the checks and texts of csrc/routing.cpp, on sizes that may be symbols.


@torch.library.register_fake("simplex::topk_route")
def _topk_fake(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    _check_scores("topk_route", scores)
    return _chosen("topk_route", scores, k)


@torch.library.register_fake("simplex::topk_route_calibrate_")
def _topk_calibrate_fake(scores: Tensor, k: int, threshold: Tensor, calibrations: Tensor) -> tuple[Tensor, Tensor]:
    op = "topk_route_calibrate_"
    _check_scores(op, scores)
    for name, x in (("threshold", threshold), ("calibrations", calibrations)):
        expect_sizes(op, name, x, (), "one number")
        expect_dtype(op, name, x, torch.float32)
        expect_device(op, name, x, "scores", scores)
    return _chosen(op, scores, k)


def _chosen(op: str, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    batch, length = scores.shape
    # A symbolic k waits for the kernel: that length // 2 is at most length is a guard which torch.export cannot state.
    for condition in (k >= 1, k <= length) if isinstance(k, int) else ():
        expect(op, condition, f"k to be from 1 to the length of scores ({length}), got {k}")
    return scores.new_empty((batch, k), dtype=torch.int32), scores.new_empty((batch, length), dtype=torch.bool)


@torch.library.register_fake("simplex::threshold_route")
def _threshold_fake(scores: Tensor, threshold: float, cap: int) -> tuple[Tensor, Tensor]:
    op = "threshold_route"
    _check_scores(op, scores)
    expect(op, not math.isnan(threshold), "threshold to be a number, got nan")
    expect(op, cap >= 1, f"cap to be at least 1, got {cap}")
    # A symbolic cap waits for the kernel: torch.export would want the bound stated for the length it comes from.
    expect(op, not isinstance(cap, int) or cap < 2**31, f"cap to be below 2^31, got {cap}")
    batch = scores.shape[0]
    return scores.new_empty((batch, cap), dtype=torch.int32), scores.new_empty((batch,), dtype=torch.int32)


def _check_scores(op: str, scores: Tensor) -> None:
    expect(op, scores.dim() == 2, f"scores to be 2-dimensional [batch, length], got {scores.dim()} dimensions")
    device = scores.device.type
    dtypes = (torch.float32, torch.float64) if device == "cpu" else (torch.float32,)
    names = "float32 or float64" if device == "cpu" else "float32"
    expect(op, scores.dtype in dtypes, f"scores to be {names} on {device}, got {dtype_name(scores)}")


@torch.library.register_fake("simplex::route_gather")
def _gather_fake(x: Tensor, idx: Tensor) -> Tensor:
    _check_route("route_gather", "x", x, idx)
    return x.new_empty((x.shape[0], idx.shape[1], x.shape[2]))


@torch.library.register_fake("simplex::route_gather_backward")
def _gather_backward_fake(grad_y: Tensor, x: Tensor, idx: Tensor) -> Tensor:
    op = "route_gather_backward"
    _check_route(op, "x", x, idx)
    sizes = (x.shape[0], idx.shape[1], x.shape[2])
    expect_sizes(op, "grad_y", grad_y, sizes, "batch, slots of idx, last dim of x")
    expect_like(op, "grad_y", grad_y, "x", x)
    return x.new_empty(x.shape)


@torch.library.register_fake("simplex::route_scatter_add")
def _scatter_add_fake(base: Tensor, y: Tensor, idx: Tensor, gate: Tensor | None = None) -> Tensor:
    _check_update("route_scatter_add", False, "base", base, y, idx, gate)
    return base.new_empty(base.shape)


@torch.library.register_fake("simplex::route_scatter_add_backward")
def _scatter_add_backward_fake(
    grad_out: Tensor, y: Tensor, idx: Tensor, gate: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    return _update_backward_fake("route_scatter_add_backward", False, grad_out, y, idx, gate)


@torch.library.register_fake("simplex::route_replace")
def _replace_fake(base: Tensor, y: Tensor, idx: Tensor, gate: Tensor | None = None) -> Tensor:
    _check_update("route_replace", True, "base", base, y, idx, gate)
    return base.new_empty(base.shape)


@torch.library.register_fake("simplex::route_replace_backward")
def _replace_backward_fake(
    grad_out: Tensor, base: Tensor, y: Tensor, idx: Tensor, gate: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    op = "route_replace_backward"
    grads = _update_backward_fake(op, True, grad_out, y, idx, gate)
    expect_sizes(op, "base", base, tuple(grad_out.shape), "that of grad_out")
    expect_like(op, "base", base, "grad_out", grad_out)
    return grads


def _update_backward_fake(
    op: str, replaces: bool, grad_out: Tensor, y: Tensor, idx: Tensor, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    _check_update(op, replaces, "grad_out", grad_out, y, idx, gate)
    sizes = (0, 0) if gate is None else tuple(gate.shape)
    return (
        grad_out.new_empty(grad_out.shape),
        y.new_empty(y.shape),
        grad_out.new_empty(sizes, dtype=wide_dtype(grad_out)),
    )


def _check_route(op: str, name: str, rows: Tensor, idx: Tensor) -> None:
    expect(op, rows.dim() == 3, f"{name} to be 3-dimensional [batch, length, dim], got {rows.dim()} dimensions")
    expect_floating(op, name, rows)
    if rows.device.type == "cuda":
        expect(op, rows.shape[2] % 8 == 0, f"the last dim of {name} to be a multiple of 8 on cuda, got {rows.shape[2]}")
    expect(op, idx.dim() == 2, f"idx to be 2-dimensional [batch, slots], got {idx.dim()} dimensions")
    expect_sizes(op, "idx", idx, (rows.shape[0], idx.shape[1]), "batch, slots")
    expect_dtype(op, "idx", idx, torch.int32)
    expect_device(op, "idx", idx, name, rows)


def _check_update(
    op: str, replaces: bool, name: str, rows: Tensor, y: Tensor, idx: Tensor, gate: Tensor | None
) -> None:
    _check_route(op, name, rows, idx)
    expect_sizes(op, "y", y, (rows.shape[0], idx.shape[1], rows.shape[2]), "batch, slots of idx, dim")
    expect_like(op, "y", y, name, rows)
    if gate is not None:
        sizes, what = (tuple(rows.shape[:2]), "batch, length") if replaces else (tuple(idx.shape), "that of idx")
        expect_sizes(op, "gate", gate, sizes, what)
        expect_dtype(op, "gate", gate, wide_dtype(rows))
        expect_device(op, "gate", gate, name, rows)


# FLOPs are arithmetic on the data, by element: choosing and moving count nothing, adding a gated row two, replacing it three.


def _no_flops(*args: Any, **kwargs: Any) -> int:
    return 0


def _update_flops(
    rows: Sequence[int], y: Sequence[int], idx: Sequence[int], gate: Sequence[int] | None = None, **kwargs: Any
) -> int:
    return (1 if gate is None else 2) * math.prod(y)


def _update_backward_flops(
    rows: Sequence[int], y: Sequence[int], idx: Sequence[int], gate: Sequence[int] | None = None, **kwargs: Any
) -> int:
    return (0 if gate is None else 3) * math.prod(y)  # gate * grad, and a product with y


def _replace_flops(
    rows: Sequence[int], y: Sequence[int], idx: Sequence[int], gate: Sequence[int] | None = None, **kwargs: Any
) -> int:
    return (0 if gate is None else 3) * math.prod(y)


def _replace_backward_flops(
    grad_out: Sequence[int],
    base: Sequence[int],
    y: Sequence[int],
    idx: Sequence[int],
    gate: Sequence[int] | None = None,
    **kwargs: Any,
) -> int:
    return (0 if gate is None else 5) * math.prod(y)


for _op in ("topk_route", "topk_route_calibrate_", "threshold_route", "route_gather", "route_gather_backward"):
    register_flops(getattr(torch.ops.simplex, _op), _no_flops)
register_flops(torch.ops.simplex.route_scatter_add, _update_flops)
register_flops(torch.ops.simplex.route_scatter_add_backward, _update_backward_flops)
register_flops(torch.ops.simplex.route_replace, _replace_flops)
register_flops(torch.ops.simplex.route_replace_backward, _replace_backward_flops)
