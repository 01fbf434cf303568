"""The causal router of Subjective Timescale Transformers (arXiv 2511.21408): a token's logit from itself and the one before."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import (
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


def causal_route_logits(x: Tensor, weight: Tensor, prev: Tensor | None = None) -> Tensor:
    r"""Scores each token by a linear map of it and of the token before it (arXiv 2511.21408, the student router of STT)::

        logits_t = <weight[:dim], x_t> + <weight[dim:], x_{t-1}>,        x_{-1} = prev, or 0

    With a weight of dim elements, the router of Mixture-of-Depths, the second term is missing. The sum of a token does not
    depend on how many others are computed beside it: on one device, a token that is decoded alone with `prev` gets the bits
    that it gets within its sequence.

    Args:
        x: [batch, length, dim]; float32, float16, bfloat16, or float64 on the CPU; may be strided. On CUDA dim is a multiple
            of 8.
        weight: [2 * dim] or [dim] in float32 (float64 with float64 data), on the same device.
        prev: None at the start of a sequence, or [batch, dim] like x, the token before the first one. Not with a weight of
            [dim].

    Returns:
        logits [batch, length] in float32 (float64 for float64 data), once differentiable with respect to x, weight and prev.
        Autocast leaves the op alone: 16-bit logits would tie.

    Raises:
        RuntimeError: a rank, shape, dtype or device that is not as above; the message names the argument, its value and
            what was expected.

    >>> causal_route_logits(torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([1.0, 10.0]))
    tensor([[ 1., 12., 23.]])
    """
    with without_autocast(x):
        return torch.ops.simplex.causal_route_logits(x, weight, prev)


# The fakes: the checks and texts of csrc/causal_route_logits.cpp, on sizes that may be symbols.


@torch.library.register_fake("simplex::causal_route_logits")
def _forward_fake(x: Tensor, weight: Tensor, prev: Tensor | None = None) -> Tensor:
    _check("causal_route_logits", x, weight, prev)
    return x.new_empty(x.shape[:2], dtype=wide_dtype(x))


@torch.library.register_fake("simplex::causal_route_logits_backward")
def _backward_fake(
    grad_logits: Tensor, x: Tensor, weight: Tensor, prev: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    op = "causal_route_logits_backward"
    _check(op, x, weight, prev)
    expect_sizes(op, "grad_logits", grad_logits, tuple(x.shape[:2]), "batch, length of x")
    expect_dtype(op, "grad_logits", grad_logits, wide_dtype(x))
    expect_device(op, "grad_logits", grad_logits, "x", x)
    sizes = (0, 0) if prev is None else tuple(prev.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(sizes)


def _check(op: str, x: Tensor, weight: Tensor, prev: Tensor | None) -> None:
    expect(op, x.dim() == 3, f"x to be 3-dimensional [batch, length, dim], got {x.dim()} dimensions")
    expect_floating(op, "x", x)
    batch, _, dim = x.shape
    if x.device.type == "cuda":
        expect(op, dim % 8 == 0, f"the last dim of x to be a multiple of 8 on cuda, got {dim}")
    looks_back = weight.dim() != 1 or dim == 0 or weight.shape[0] != dim
    if looks_back:
        expect_sizes(op, "weight", weight, (2 * dim,), "twice the last dim of x, or once")
    expect_dtype(op, "weight", weight, wide_dtype(x))
    expect_device(op, "weight", weight, "x", x)
    if prev is not None:
        expect(op, looks_back, f"no prev with a weight of {dim} elements, which looks at no token before")
        expect_sizes(op, "prev", prev, (batch, dim), "batch, last dim of x")
        expect_like(op, "prev", prev, "x", x)


def _forward_flops(x: Sequence[int], weight: Sequence[int], *args: Any, **kwargs: Any) -> int:
    batch, length, _ = x
    return 2 * batch * length * weight[0]


def _backward_flops(
    grad_logits: Sequence[int], x: Sequence[int], weight: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    return 2 * _forward_flops(x, weight)


register_flops(torch.ops.simplex.causal_route_logits, _forward_flops)
register_flops(torch.ops.simplex.causal_route_logits_backward, _backward_flops)
