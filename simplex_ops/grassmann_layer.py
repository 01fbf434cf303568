"""A whole layer of Grassmann mixing (arXiv 2512.19428): reduction, mixing, expansion, gate."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import expect, expect_floating, expect_like, expect_sizes
from ._library import register_flops
from .grassmann_mix import check_grassmann_mix
from .plucker_mean import plucker_mean_flops


def grassmann_layer(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    gate_x_weight: Tensor,
    gate_g_weight: Tensor,
    gate_bias: Tensor,
    offsets: Sequence[int],
    *,
    valid: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    r"""The layer of Grassmann mixing, from tokens to gated tokens (arXiv 2512.19428, section 3)::

        z     = W_reduce x + b_reduce
        g     = grassmann_mix(z, W_expand, b_expand)
        alpha = sigmoid(W_gx x + W_gg g + b_gate)
        out   = alpha x + (1 - alpha) g

    The same as these ops one by one, but in the gradients of x and g the parts that come from several places are added
    inside matrix products. Between the passes x, z, g and the logits of alpha are kept. Two runs are bitwise equal.

    Args:
        x: tokens [batch, length, dim].
        reduce_weight, reduce_bias: [r, dim] and [r], 2 <= r <= 128.
        expand_weight, expand_bias: [dim, r * (r - 1) / 2] and [dim], as weight and bias of `grassmann_mix`.
        gate_x_weight, gate_g_weight, gate_bias: [dim, dim], [dim, dim] and [dim].
        offsets, valid, cu_seqlens: as in `grassmann_mix`.

    Dtypes: float32, float64, float16, bfloat16 on the CPU; float32, float16, bfloat16 on CUDA; one for all.

    Returns:
        out [batch, length, dim] like x, once differentiable with respect to x, weights and biases.

    Raises:
        RuntimeError: a rank, shape, dtype, device, offset or value that is not as above; the message
            names the argument, its value and what was expected.

    >>> shapes = [(2, 512, 64), (8, 64), (8,), (64, 28), (64,), (64, 64), (64, 64), (64,)]
    >>> grassmann_layer(*(torch.randn(shape) for shape in shapes), [1, 2, 4]).shape
    torch.Size([2, 512, 64])
    """
    weights = (reduce_weight, reduce_bias, expand_weight, expand_bias, gate_x_weight, gate_g_weight, gate_bias)
    out: Tensor = torch.ops.simplex.grassmann_layer(x, *weights, offsets, valid, cu_seqlens)[0]
    return out


@torch.library.register_fake("simplex::grassmann_layer")
def _forward_fake(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    gate_x_weight: Tensor,
    gate_g_weight: Tensor,
    gate_bias: Tensor,
    offsets: Sequence[int],
    valid: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "grassmann_layer"
    _check(op, x, reduce_weight, expand_weight, gate_x_weight, gate_g_weight)
    r, dim = reduce_weight.shape
    vectors = {
        "reduce_bias": (reduce_bias, r, "r of reduce_weight"),
        "expand_bias": (expand_bias, dim, "dim of x"),
        "gate_bias": (gate_bias, dim, "dim of x"),
    }
    for name, (vector, size, origin) in vectors.items():
        expect_sizes(op, name, vector, (size,), origin)
        expect_like(op, name, vector, "x", x)
    z = x.new_empty((*x.shape[:2], r))
    check_grassmann_mix(op, z, expand_weight, expand_bias, offsets, valid, cu_seqlens)
    return x.new_empty(x.shape), z, x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.register_fake("simplex::grassmann_layer_backward")
def _backward_fake(
    grad_out: Tensor,
    x: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    gate_x_weight: Tensor,
    gate_g_weight: Tensor,
    z: Tensor,
    g: Tensor,
    logits: Tensor,
    offsets: Sequence[int],
    valid: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    op = "grassmann_layer_backward"
    _check(op, x, reduce_weight, expand_weight, gate_x_weight, gate_g_weight)
    check_grassmann_mix(op, z, expand_weight, None, offsets, valid, cu_seqlens)
    expect_sizes(op, "z", z, (*x.shape[:2], reduce_weight.shape[0]), "batch and length of x, r of reduce_weight")
    expect_like(op, "z", z, "x", x)
    for name, tensor in (("grad_out", grad_out), ("g", g), ("logits", logits)):
        expect_sizes(op, name, tensor, tuple(x.shape), "that of x")
        expect_like(op, name, tensor, "x", x)
    r, dim = reduce_weight.shape
    shapes = (
        tuple(x.shape), (r, dim), (r,), tuple(expand_weight.shape), (dim,), (dim, dim), (dim, dim), (dim,),
    )  # fmt: skip
    return tuple(x.new_empty(shape) for shape in shapes)


def _check(
    op: str, x: Tensor, reduce_weight: Tensor, expand_weight: Tensor, gate_x_weight: Tensor, gate_g_weight: Tensor
) -> None:
    expect(op, x.dim() == 3, f"x to be 3-dimensional [batch, length, dim], got {x.dim()} dimensions")
    expect_floating(op, "x", x)
    what = f"reduce_weight to be 2-dimensional [r, dim], got {reduce_weight.dim()} dimensions"
    expect(op, reduce_weight.dim() == 2, what)
    dim, r = x.shape[2], reduce_weight.shape[0]
    weights = {
        "reduce_weight": (reduce_weight, (r, dim), "its own r, dim of x"),
        "expand_weight": (expand_weight, (dim, r * (r - 1) // 2), "dim of x, r * (r - 1) / 2"),
        "gate_x_weight": (gate_x_weight, (dim, dim), "dim of x twice"),
        "gate_g_weight": (gate_g_weight, (dim, dim), "dim of x twice"),
    }
    for name, (weight, shape, origin) in weights.items():
        expect_sizes(op, name, weight, shape, origin)
    for name, (weight, _, _) in weights.items():
        expect_like(op, name, weight, "x", x)


def _forward_flops(x: Sequence[int], reduce_weight: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return _flops(x, reduce_weight, args[6], 1)


def _backward_flops(
    grad_out: Sequence[int], x: Sequence[int], reduce_weight: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    return _flops(x, reduce_weight, args[6], 2)


def _flops(x: Sequence[int], reduce_weight: Sequence[int], offsets: Sequence[int], passes: int) -> int:
    """Products once forward and twice backward, the mean once and three times, the gate 8 and 11 per element."""
    tokens, dim, r = x[0] * x[1], x[2], reduce_weight[0]
    products = 2 * tokens * dim * (r + r * (r - 1) // 2 + 2 * dim)
    mean = plucker_mean_flops((x[0], x[1], r), offsets) * (1 if passes == 1 else 3)
    return passes * products + mean + tokens * dim * (8 if passes == 1 else 11)


register_flops(torch.ops.simplex.grassmann_layer, _forward_flops)
register_flops(torch.ops.simplex.grassmann_layer_backward, _backward_flops)
