"""The gate that Grassmann mixing blends its output with (arXiv 2512.19428)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import expect_floating, expect_like, expect_sizes
from ._library import register_flops


def grassmann_blend(h: Tensor, g: Tensor, logits: Tensor) -> Tensor:
    """The tokens and what was mixed into them, each element by its own gate (arXiv 2512.19428, section 3)::

        alpha = sigmoid(logits)
        out   = alpha h + (1 - alpha) g

    In one pass over the inputs, which are all that is kept for the backward pass. Computed in float32 (float64 for float64).

    Args:
        h, g, logits: of one shape, any shape; may be strided.

    Dtypes: float32, float64, float16, bfloat16 on the CPU; float32, float16, bfloat16 on CUDA; one for all three.

    Returns:
        out, contiguous, like h; once differentiable with respect to h, g and logits.

    Raises:
        RuntimeError: a shape, dtype or device that is not as above; the message names the argument, its value and what
            was expected.

    >>> grassmann_blend(torch.tensor([1.0, 1.0]), torch.tensor([3.0, 3.0]), torch.tensor([0.0, 100.0]))
    tensor([2., 1.])
    """
    return torch.ops.simplex.grassmann_blend(h, g, logits)


@torch.library.register_fake("simplex::grassmann_blend")
def _forward_fake(h: Tensor, g: Tensor, logits: Tensor) -> Tensor:
    _check("grassmann_blend", h, {"g": g, "logits": logits})
    return h.new_empty(h.shape)


@torch.library.register_fake("simplex::grassmann_blend_backward")
def _backward_fake(grad_out: Tensor, h: Tensor, g: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check("grassmann_blend_backward", h, {"g": g, "logits": logits, "grad_out": grad_out})
    return h.new_empty(h.shape), h.new_empty(h.shape), h.new_empty(h.shape)


def _check(op: str, h: Tensor, others: dict[str, Tensor]) -> None:
    expect_floating(op, "h", h)
    for name, x in others.items():
        expect_sizes(op, name, x, tuple(h.shape), "that of h")
        expect_like(op, name, x, "h", h)


def _flops_per_element(count: int) -> Any:
    def formula(h: Sequence[int], *args: Any, **kwargs: Any) -> int:
        numel = count
        for size in h:
            numel *= size
        return numel

    return formula


# The sigmoid counts as four: negate, exponentiate, add, divide.
register_flops(torch.ops.simplex.grassmann_blend, _flops_per_element(8))
register_flops(torch.ops.simplex.grassmann_blend_backward, _flops_per_element(11))
