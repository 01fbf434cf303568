"""The surprise gate of Subjective Depth Transformers (arXiv 2511.21408): how unexpected is what a block did to a token."""

import math
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


def surprise_gate(
    x_in: Tensor,
    x_post: Tensor,
    x_prior: Tensor,
    beta_ce: Tensor,
    beta_cu: Tensor,
    o_ce: Tensor,
    m_cu: Tensor,
    window: int = 100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Scores each token by its expected and its unexpected change (arXiv 2511.21408).

    A block turned x_in into x_post, where a cheap prior network had foretold x_prior. With dim the last dimension::

        D    = x_post - x_in                            what happened
        D^   = x_prior - x_in                           what was foretold
        d_st = mean_dim D^2                             static surprise: against "nothing happens"
        ce   = mean_dim D^ (2 D - D^) + ln(o_ce + 1e-10)        expected change: d_st - mean_dim (D - D^)^2 + ln o_ce
        cu   = d_st - m_cu * average(d_st)              unexpected change: against the recent past
        g    = 1 - (1 - sigmoid(beta_ce ce)) (1 - sigmoid(beta_cu cu))

    average is the mean over the last `window` tokens up to and including this one, the sequence's first d_st standing in
    for those before it. Nothing depends on a later token or on another sequence. No gradient flows through the average.

    Args:
        x_in, x_post, x_prior: [batch, length, dim] of one dtype and device; may be strided. On CUDA dim is a multiple of 8.
        beta_ce, beta_cu, o_ce, m_cu: one number each, shape [], float32 (float64 with float64 data), on the same device.
        window: length of the average in tokens, from 1 to 2^31 - 1.

    Dtypes: float32, float16, bfloat16; float64 on the CPU. Sums are float32 (float64 on the CPU), and so are the outputs,
    whatever the data: bfloat16 could not rank the gates. Autocast leaves the op alone, for the same reason.

    Returns:
        g, d_st, ce, cu, each [batch, length] in float32 (float64 for float64 data). g is once differentiable with respect
        to all seven tensors; d_st, ce and cu are for logs and not differentiable.

    Raises:
        RuntimeError: a rank, shape, dtype, device or window that is not as above; the message names the argument, its value
            and what was expected.

    >>> x = torch.randn(3, 2, 16, 64)
    >>> g, d_st, ce, cu = surprise_gate(*x, *torch.tensor([0.55, 0.44, 1.025, 1.1]))
    >>> g.shape
    torch.Size([2, 16])
    """
    with without_autocast(x_in):
        return torch.ops.simplex.surprise_gate(x_in, x_post, x_prior, beta_ce, beta_cu, o_ce, m_cu, window)


# The fakes: the checks and texts of csrc/surprise_gate.cpp, on sizes that may be symbols.


@torch.library.register_fake("simplex::surprise_gate")
def _forward_fake(
    x_in: Tensor,
    x_post: Tensor,
    x_prior: Tensor,
    beta_ce: Tensor,
    beta_cu: Tensor,
    o_ce: Tensor,
    m_cu: Tensor,
    window: int = 100,
) -> tuple[Tensor, ...]:
    _check("surprise_gate", (x_in, x_post, x_prior), (beta_ce, beta_cu, o_ce, m_cu), window)
    return tuple(x_in.new_empty(x_in.shape[:2], dtype=wide_dtype(x_in)) for _ in range(4))


@torch.library.register_fake("simplex::surprise_gate_backward")
def _backward_fake(
    grad_g: Tensor,
    x_in: Tensor,
    x_post: Tensor,
    x_prior: Tensor,
    beta_ce: Tensor,
    beta_cu: Tensor,
    o_ce: Tensor,
    m_cu: Tensor,
    d_st: Tensor,
    ce: Tensor,
    cu: Tensor,
    window: int = 100,
) -> tuple[Tensor, ...]:
    op = "surprise_gate_backward"
    _check(op, (x_in, x_post, x_prior), (beta_ce, beta_cu, o_ce, m_cu), window)
    for name, x in {"grad_g": grad_g, "d_st": d_st, "ce": ce, "cu": cu}.items():
        expect_sizes(op, name, x, tuple(x_in.shape[:2]), "batch, length of x_in")
        expect_dtype(op, name, x, wide_dtype(x_in))
        expect_device(op, name, x, "x_in", x_in)
    rows = tuple(x_in.new_empty(x_in.shape) for _ in range(3))
    return *rows, *(x_in.new_empty((), dtype=wide_dtype(x_in)) for _ in range(4))


def _check(op: str, rows: tuple[Tensor, ...], parameters: tuple[Tensor, ...], window: int) -> None:
    x_in = rows[0]
    expect(op, x_in.dim() == 3, f"x_in to be 3-dimensional [batch, length, dim], got {x_in.dim()} dimensions")
    for name, x in zip(("x_post", "x_prior"), rows[1:], strict=True):
        expect_sizes(op, name, x, tuple(x_in.shape), "that of x_in")
        expect_like(op, name, x, "x_in", x_in)
    expect_floating(op, "x_in", x_in)
    dim = x_in.shape[2]
    expect(op, dim >= 1, f"the last dim of x_in to be at least 1, got {dim}")
    if x_in.device.type == "cuda":
        expect(op, dim % 8 == 0, f"the last dim of x_in to be a multiple of 8 on cuda, got {dim}")
    for name, x in zip(("beta_ce", "beta_cu", "o_ce", "m_cu"), parameters, strict=True):
        expect_sizes(op, name, x, (), "one number")
        expect_dtype(op, name, x, wide_dtype(x_in))
        expect_device(op, name, x, "x_in", x_in)
    expect(op, window >= 1, f"window to be at least 1, got {window}")
    expect(op, window < 2**31, f"window to be below 2^31, got {window}")


def _forward_flops(x_in: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 8 * math.prod(
        x_in
    )  # two differences and two sums of products for each element; the gate itself is per token


def _backward_flops(grad_g: Sequence[int], x_in: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 9 * math.prod(x_in)


register_flops(torch.ops.simplex.surprise_gate, _forward_flops)
register_flops(torch.ops.simplex.surprise_gate_backward, _backward_flops)
