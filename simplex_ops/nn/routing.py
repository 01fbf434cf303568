"""Layers that spend their compute on some of the tokens: Subjective Depth Transformers and Mixture-of-Depths.

Each wraps a block of the user's: a module that maps ``(x, positions)``, x [batch, length, dim] and positions
[batch, length] of int64, to the new residual stream. Inside a routed layer the block sees the routed tokens only, in the
order of time and with the positions that they had, so ordinary causal attention with rotary positions is what it takes.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simplex_ops.routing import route_gather, route_scatter_add, topk_route
from simplex_ops.surprise_gate import surprise_gate


class PriorFFN(nn.Module):
    """A cheap forecast of what a block adds to the residual stream: SwiGLU of the normalised stream, without biases.

    Its width is dim / 16, rounded up to an even number. Shapes: [..., dim] to [..., dim].
    """

    def __init__(
        self, dim: int, width: float = 0.0625, *, norm_eps: float = 1e-6, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"PriorFFN: expected dim to be at least 1, got {dim}")
        if width <= 0:
            raise ValueError(f"PriorFFN: expected width to be above 0, got {width}")
        hidden = 2 * math.ceil(math.ceil(width * dim) / 2)
        self.norm = nn.RMSNorm(dim, norm_eps, device=device)
        self.wi = nn.Linear(dim, 2 * hidden, bias=False, device=device)
        self.wo = nn.Linear(hidden, dim, bias=False, device=device)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.wi(self.norm(x)).chunk(2, dim=-1)
        return self.wo(F.silu(gate) * up)


class SurpriseGate(nn.Module):
    """`surprise_gate` with learned parameters, each kept positive as the softplus of what is trained.

    They start at the paper's values: o_ce 1.025, m_cu 1.1, beta_ce softplus(-0.3), beta_cu softplus(-0.6).
    """

    def __init__(self, window: int = 100, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"SurpriseGate: expected window to be at least 1, got {window}")
        self.window = window
        start = (-0.3, -0.6, math.log(math.expm1(1.025)), math.log(math.expm1(1.1)))
        self.beta_ce, self.beta_cu, self.o_ce, self.m_cu = (
            nn.Parameter(torch.tensor(value, dtype=torch.float32, device=device)) for value in start
        )

    def forward(self, x_in: Tensor, x_post: Tensor, x_prior: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(g, d_st, ce, cu), each [batch, length]."""
        raw = (self.beta_ce, self.beta_cu, self.o_ce, self.m_cu)
        # Cast first: a model that is moved to bfloat16 takes its parameters along.
        values = [F.softplus(parameter.to(_wide(x_in.dtype))) for parameter in raw]
        return surprise_gate(x_in, x_post, x_prior, values[0], values[1], values[2], values[3], self.window)


class Decision(NamedTuple):
    """What a `DecisionLayer` returns. The statistics d_st, ce and cu, [batch, length], are for logs and have no gradient."""

    x: Tensor  # [batch, length, dim], the new residual stream
    gate: Tensor  # [batch, length], float32 (float64 for float64)
    prior_loss: Tensor  # the prior's mean squared error, one number
    d_st: Tensor
    ce: Tensor
    cu: Tensor


class DecisionLayer(nn.Module):
    """A whole block, and how surprising its effect on each token was (arXiv 2511.21408).

    ``x_post = block(x, positions)``, ``x_prior = x + prior(x)``, and the gate is that of `surprise_gate`. Add about 0.05 times
    prior_loss to the training loss; its target, the block's update, gets no gradient from it.

    Args:
        block: maps (x, positions) to the new residual stream.
        dim: of the residual stream.
        window: of the gate's moving average, in tokens.
    """

    def __init__(
        self, block: nn.Module, dim: int, *, window: int = 100, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.block = block
        self.prior = PriorFFN(dim, device=device)
        self.gate = SurpriseGate(window, device=device)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Decision:
        x_post = self.block(x, _positions(x, positions))
        forecast = self.prior(x).to(x_post.dtype)
        g, d_st, ce, cu = self.gate(x, x_post, x + forecast)
        loss = F.mse_loss(forecast, (x_post - x).detach())
        return Decision(x_post, g, loss, d_st, ce, cu)


class DynamicLayer(nn.Module):
    """A block for the tokens with the highest gates, the identity for all others (arXiv 2511.21408).

    ``k = max(1, floor(capacity * length))`` tokens of each sequence are routed, and ``x + gate * (block(x) - x)`` replaces them.
    A token's output depends on its routed past only; which tokens are routed depends on the gates of the whole sequence.

    Args:
        block: maps (x, positions) of the routed tokens to their new residual stream.
        capacity: the share of the tokens that is routed, in (0, 1].
    """

    def __init__(self, block: nn.Module, capacity: float = 0.5) -> None:
        super().__init__()
        _check_capacity("DynamicLayer", capacity)
        self.block = block
        self.capacity = capacity

    def forward(self, x: Tensor, gate: Tensor, positions: Tensor | None = None) -> Tensor:
        """x [batch, length, dim] and its gates [batch, length], as a `DecisionLayer` returns them."""
        return _route(self.block, x, gate, self.capacity, _positions(x, positions))


class MixtureOfDepthsLayer(nn.Module):
    """The baseline: tokens are chosen and updates weighted by a linear router (arXiv 2404.02258), otherwise a `DynamicLayer`."""

    def __init__(
        self, block: nn.Module, dim: int, capacity: float = 0.5, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        _check_capacity("MixtureOfDepthsLayer", capacity)
        self.block = block
        self.capacity = capacity
        self.router = nn.Linear(dim, 1, bias=False, device=device)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        wide = _wide(x.dtype)
        with torch.autocast(x.device.type, enabled=False):  # 16-bit weights would tie
            weight = F.linear(x.to(wide), self.router.weight.to(wide)).squeeze(-1)
        return _route(self.block, x, weight, self.capacity, _positions(x, positions))


def _route(block: nn.Module, x: Tensor, gate: Tensor, capacity: float, positions: Tensor) -> Tensor:
    idx, _ = topk_route(gate.detach(), _slots(x.shape[1], capacity))
    rows = route_gather(x, idx)
    update = block(rows, positions.gather(1, idx.long())) - rows
    return route_scatter_add(x, update.to(x.dtype), idx, gate.gather(1, idx.long()))


def _slots(length: int, capacity: float) -> int:
    return torch.sym_max(1, math.floor(capacity * length))


def _positions(x: Tensor, positions: Tensor | None) -> Tensor:
    if positions is None:
        positions = torch.arange(x.shape[1], device=x.device)
    return positions.expand(x.shape[:2])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check_capacity(layer: str, capacity: float) -> None:
    if not 0 < capacity <= 1:
        raise ValueError(f"{layer}: expected capacity to be above 0 and at most 1, got {capacity}")
