"""Decoding with Grassmann mixing (arXiv 2512.19428): new tokens against a ring of the last ones."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import expect, expect_device, expect_floating, expect_sizes, without_autocast
from ._library import register_flops
from .grassmann_mix import check_grassmann_mix


def grassmann_step(
    z: Tensor,
    ring: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Sequence[int],
    position: int,
    *,
    bias_everywhere: bool = False,
) -> Tensor:
    """What `grassmann_mix` returns for the tokens ``position``, ``position + 1``, ... of a text, of which z holds only these.

    The ring holds the tokens before them, token t in slot ``t % slots``, and afterwards these, too: it is updated in place.
    Its size and the cost of a token do not depend on how long the text is. Start with any ring and position 0.

    Args:
        z: the new tokens [batch, count, r], 2 <= r <= 128, any count; 1 is a decoding step, more a prompt or a chunk of it.
        ring: [batch, slots, r], at least as many slots as the largest offset; its dtype may be wider than that of z.
        weight: [d, r * (r - 1) / 2], columns in the order of torch.triu_indices(r, r, 1).
        bias: [d] or None.
        offsets: distances to the earlier tokens, each at least 1.
        position: number of tokens that the ring has seen.
        bias_everywhere: add the bias also to tokens without an earlier one to pair with.

    Dtypes: float32, float64, float16, bfloat16 on the CPU; float32, float16, bfloat16 on CUDA.

    Returns:
        g [batch, count, d] like z. Not differentiable: train with `grassmann_mix`. Autocast leaves the op alone.

    Raises:
        RuntimeError: a rank, shape, dtype, device, offset or position that is not as above; the message names the argument,
            its value and what was expected.

    >>> z, weight, ring = torch.randn(1, 9, 4), torch.randn(8, 6), torch.zeros(1, 5, 4)
    >>> steps = [grassmann_step(z[:, t : t + 1], ring, weight, None, [1, 5], t) for t in range(9)]
    >>> torch.allclose(torch.cat(steps, 1), grassmann_mix(z, weight, None, [1, 5]), atol=1e-5)
    True
    """
    with without_autocast(z):
        return torch.ops.simplex.grassmann_step(z, ring, weight, bias, offsets, position, bias_everywhere)


@torch.library.register_fake("simplex::grassmann_step")
def _fake(
    z: Tensor,
    ring: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Sequence[int],
    position: int,
    bias_everywhere: bool = False,
) -> Tensor:
    op = "grassmann_step"
    check_grassmann_mix(op, z, weight, bias, offsets, None, None)
    expect(op, ring.dim() == 3, f"ring to be 3-dimensional [batch, slots, r], got {ring.dim()} dimensions")
    expect_floating(op, "ring", ring)
    expect_device(op, "ring", ring, "z", z)
    slots = ring.shape[1]
    expect_sizes(op, "ring", ring, (z.shape[0], slots, z.shape[2]), "batch of z, its own slots, r of z")
    largest = max(offsets)
    what = f"ring to have a slot for each token up to the largest offset ({largest}), got {slots}"
    expect(op, slots >= largest, what)
    expect(op, position >= 0, f"position to be at least 0, got {position}")
    return z.new_empty((*z.shape[:2], weight.shape[0]))


def _flops(
    z: Sequence[int],
    ring: Sequence[int],
    weight: Sequence[int],
    bias: Sequence[int] | None,
    offsets: Sequence[int],
    position: int,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Counted as in `plucker_mean_flops`, with the pairs that reach into the ring."""
    batch, count, r = z
    d, planes = weight
    pairs = sum(min(count, max(0, position + count - offset)) for offset in offsets)
    return batch * (12 * r * pairs + count * planes * (3 + 2 * d))


register_flops(torch.ops.simplex.grassmann_step, _flops)
