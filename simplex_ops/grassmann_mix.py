"""Grassmann mixing (arXiv 2512.19428): a linear map of the mean Plücker vector of a token's planes with earlier tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import expect, expect_like, expect_sizes
from ._library import register_flops
from .plucker_mean import check_plucker_mean, plucker_mean_flops


def grassmann_mix(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Sequence[int],
    *,
    valid: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bias_everywhere: bool = False,
) -> Tensor:
    r"""Causal, attention-free mixing of tokens by the planes that they span (arXiv 2512.19428, section 3)::

        p_ij(t, offset) = z_{t,i} z_{t-offset,j} - z_{t,j} z_{t-offset,i}     i < j
        g_t             = W (1 / N_t) sum_offset p(t, offset) / |p(t, offset)| + b

    over the N_t offsets with t - offset >= 0 (and both tokens valid). Where N_t = 0, g_t = 0, without the bias. See
    `plucker_mean`, which is what W is applied to, for pairs that span no plane and for numerics.

    The vectors' mean is computed in O(len(offsets) r + r^2) per token, not O(len(offsets) r^2), and multiplied by W in
    one matrix product. Between the passes only the inputs are kept: the backward pass computes the mean anew. Each pass
    needs one buffer [batch, length, P] in passing, P = r (r - 1) / 2. Two runs are bitwise equal.

    Args:
        z: tokens [batch, length, r], 2 <= r <= 128.
        weight: [d, r * (r - 1) / 2], columns in the order of torch.triu_indices(r, r, 1).
        bias: [d] or None.
        offsets: distances to the earlier tokens, each at least 1. Those of length or more pair nothing.
        valid: bool [batch, length]; pairs with a token where it is False do not count.
        cu_seqlens: int32 [sequences + 1], ascending from 0 to length: sequences packed into one row, see `plucker_mean`.
        bias_everywhere: add the bias also where N_t = 0, for checkpoints of models that do.

    Dtypes: float32, float64, float16, bfloat16 on the CPU; float32, float16, bfloat16 on CUDA. The matrix product is
    torch's, so torch.backends.cuda.matmul.allow_tf32 holds for float32.

    Returns:
        g [batch, length, d] like z, once differentiable with respect to z, weight and bias.

    Raises:
        RuntimeError: a rank, shape, dtype, device, offset or value that is not as above; the message
            names the argument, its value and what was expected.

    >>> z, weight = torch.randn(2, 512, 32), torch.randn(256, 496)
    >>> grassmann_mix(z, weight, None, [1, 2, 4, 8, 12, 16]).shape
    torch.Size([2, 512, 256])
    """
    return torch.ops.simplex.grassmann_mix(z, weight, bias, offsets, valid, cu_seqlens, bias_everywhere)


@torch.library.register_fake("simplex::grassmann_mix")
def _forward_fake(
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Sequence[int],
    valid: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bias_everywhere: bool = False,
) -> Tensor:
    check_grassmann_mix("grassmann_mix", z, weight, bias, offsets, valid, cu_seqlens)
    return z.new_empty((*z.shape[:2], weight.shape[0]))


@torch.library.register_fake("simplex::grassmann_mix_backward")
def _backward_fake(
    grad_g: Tensor,
    z: Tensor,
    weight: Tensor,
    offsets: Sequence[int],
    valid: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bias_everywhere: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "grassmann_mix_backward"
    check_grassmann_mix(op, z, weight, None, offsets, valid, cu_seqlens)
    expect_sizes(op, "grad_g", grad_g, (*z.shape[:2], weight.shape[0]), "batch and length of z, d of weight")
    expect_like(op, "grad_g", grad_g, "z", z)
    return z.new_empty(z.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])


def check_grassmann_mix(
    op: str,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Sequence[int],
    valid: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    planes = check_plucker_mean(op, z, offsets, valid, cu_seqlens)
    what = f"weight to be 2-dimensional [d, r * (r - 1) / 2], got {weight.dim()} dimensions"
    expect(op, weight.dim() == 2, what)
    d = weight.shape[0]
    expect_sizes(op, "weight", weight, (d, planes), "its own d, r * (r - 1) / 2 for the r of z")
    expect_like(op, "weight", weight, "z", z)
    if bias is not None:
        expect_sizes(op, "bias", bias, (d,), "d of weight")
        expect_like(op, "bias", bias, "z", z)


def _forward_flops(
    z: Sequence[int],
    weight: Sequence[int],
    bias: Sequence[int] | None,
    offsets: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    return plucker_mean_flops(z, offsets) + _product_flops(z, weight)


def _backward_flops(
    grad_g: Sequence[int], z: Sequence[int], weight: Sequence[int], offsets: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    return 3 * plucker_mean_flops(z, offsets) + 2 * _product_flops(z, weight)


def _product_flops(z: Sequence[int], weight: Sequence[int]) -> int:
    return 2 * z[0] * z[1] * weight[0] * weight[1]


register_flops(torch.ops.simplex.grassmann_mix, _forward_flops)
register_flops(torch.ops.simplex.grassmann_mix_backward, _backward_flops)
