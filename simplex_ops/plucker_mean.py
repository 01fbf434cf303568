"""The mean normalised Plücker vector of a token's planes with earlier tokens (arXiv 2512.19428)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import expect, expect_cu_seqlens, expect_device, expect_dtype, expect_floating, expect_like, expect_sizes
from ._library import register_flops


def plucker_mean(
    z: Tensor, offsets: Sequence[int], *, valid: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    r"""Mean over offsets of the normalised Plücker vectors of the pairs (z_t, z_{t - offset}) (arXiv 2512.19428, section 3).

    A pair of tokens spans a plane, whose Plücker coordinates are the 2 x 2 minors of the pair. With P = r (r - 1) / 2::

        p_ij(t, offset) = z_{t,i} z_{t-offset,j} - z_{t,j} z_{t-offset,i}     i < j, in the order of torch.triu_indices(r, r, 1)
        pbar_t          = (1 / N_t) sum_offset p(t, offset) / |p(t, offset)|

    over the N_t offsets with t - offset >= 0 (and both tokens valid); pbar_t = 0 where N_t = 0. Each offset counts, equal
    ones several times. A pair that spans no plane (a token is 0, or sin of the angle between them is at most 1e-6)
    contributes exactly 0 and counts. pbar does not change when tokens are scaled.

    All planes of one sum contain z_t, so the sum is ONE plane: with u_t = z_t / |z_t|,
    pbar_t = u_t ^ Y_t, where Y_t is the mean of the unit vectors normal to u_t in the planes (docs/grassmann.md).
    The cost is O(len(offsets) r + r^2) per token; only z is saved for the backward pass; two runs are bitwise equal,
    gradients included. Everything up to the result's rounding is computed in float32 (float64 for float64 inputs).

    Args:
        z: tokens [batch, length, r], 2 <= r <= 128.
        offsets: distances to the earlier tokens, each at least 1. Those of length or more pair nothing.
        valid: bool [batch, length]; pairs with a token where it is False do not count.
        cu_seqlens: int32 [sequences + 1], ascending from 0 to length: several sequences packed into one row, batch 1, of
            which the i-th holds the tokens cu_seqlens[i] to cu_seqlens[i + 1] - 1. No pair crosses a sequence's start.
            The CPU checks the values; on CUDA that would wait for the GPU, and wrong ones give wrong numbers.

    Dtypes: float32, float64, float16, bfloat16 on the CPU; float32, float16, bfloat16 on CUDA.

    Returns:
        pbar [batch, length, r * (r - 1) / 2] like z, once differentiable with respect to z.

    Raises:
        RuntimeError: a rank, shape, dtype, device, offset or value that is not as above; the message
            names the argument, its value and what was expected.

    >>> plucker_mean(torch.tensor([[[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]]), [1])
    tensor([[[ 0.,  0.,  0.],
             [-1.,  0.,  0.]]])
    """
    return torch.ops.simplex.plucker_mean(z, offsets, valid, cu_seqlens)


@torch.library.register_fake("simplex::plucker_mean")
def _forward_fake(
    z: Tensor, offsets: Sequence[int], valid: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    return z.new_empty((*z.shape[:2], check_plucker_mean("plucker_mean", z, offsets, valid, cu_seqlens)))


@torch.library.register_fake("simplex::plucker_mean_backward")
def _backward_fake(
    grad_pbar: Tensor,
    z: Tensor,
    offsets: Sequence[int],
    valid: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    op = "plucker_mean_backward"
    planes = check_plucker_mean(op, z, offsets, valid, cu_seqlens)
    expect_sizes(op, "grad_pbar", grad_pbar, (*z.shape[:2], planes), "batch and length of z, r * (r - 1) / 2")
    expect_like(op, "grad_pbar", grad_pbar, "z", z)
    return z.new_empty(z.shape)


def check_plucker_mean(
    op: str, z: Tensor, offsets: Sequence[int], valid: Tensor | None, cu_seqlens: Tensor | None
) -> int:
    """The checks and texts of csrc/plucker_mean.cpp, on sizes that may be symbols; returns r * (r - 1) / 2."""
    expect(op, z.dim() == 3, f"z to be 3-dimensional [batch, length, r], got {z.dim()} dimensions")
    expect_floating(op, "z", z)
    r = z.shape[2]
    for condition in (r >= 2, r <= 128):
        expect(op, condition, f"the last dim of z to be from 2 to 128, got {r}")
    expect(op, len(offsets) > 0, "offsets to hold at least one offset, got []")
    for offset in offsets:
        expect(op, offset >= 1, f"every offset to be at least 1, got {offset}")
    if valid is not None:
        expect_sizes(op, "valid", valid, (z.shape[0], z.shape[1]), "batch and length of z")
        expect_dtype(op, "valid", valid, torch.bool)
        expect_device(op, "valid", valid, "z", z)
    if cu_seqlens is not None:
        expect_cu_seqlens(op, cu_seqlens, "z", z)
    return r * (r - 1) // 2


def plucker_mean_flops(z: Sequence[int], offsets: Sequence[int]) -> int:
    """For each pair two dot products, two subtractions, a norm and a sum of length r (12 r), 3 for each coordinate."""
    batch, length, r = z
    pairs = sum(max(0, length - offset) for offset in offsets)
    return batch * (12 * r * pairs + 3 * length * (r * (r - 1) // 2))


def _forward_flops(z: Sequence[int], offsets: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return plucker_mean_flops(z, offsets)


def _backward_flops(
    grad_pbar: Sequence[int], z: Sequence[int], offsets: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    return 3 * plucker_mean_flops(z, offsets)


register_flops(torch.ops.simplex.plucker_mean, _forward_flops)
register_flops(torch.ops.simplex.plucker_mean_backward, _backward_flops)
