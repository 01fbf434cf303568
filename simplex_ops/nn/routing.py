"""Layers that spend their compute on some of the tokens: Subjective Depth Transformers and Mixture-of-Depths.

Each wraps a block of the user's: a module that maps ``(x, positions)``, x [batch, length, dim] and positions
[batch, length] of int64, to the new residual stream. Inside a routed layer the block sees the routed tokens only, in the
order of time and with the positions that they had, so ordinary causal attention with rotary positions is what it takes.

To decode, the block also takes ``(x, positions, cache)`` and makes its cache by ``new_cache(batch, slots)``: a list of
tensors whose first is [batch, slots, ...] and whose last counts the filled rows of each text, int32 [batch], as
`PositionedAttention` has it. In every call with a cache, and in eval mode, positions may be -1 for what is no token, after
the last token of its text: texts of different lengths then share a batch.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simplex_ops.causal_route_logits import causal_route_logits
from simplex_ops.nn.routed_layer import Reports, RoutedLayer, expanded, positions_of, wide
from simplex_ops.nn.sizes import expect_positive
from simplex_ops.surprise_gate import surprise_gate


class PriorFFN(nn.Module):
    """A cheap forecast of what a block adds to the residual stream: SwiGLU of the normalised stream, without biases.

    Its width is dim / 16, rounded up to an even number. Shapes: [..., dim] to [..., dim].
    """

    def __init__(
        self, dim: int, width: float = 0.0625, *, norm_eps: float = 1e-6, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        expect_positive("PriorFFN", dim=dim)
        if not 0 < width < math.inf:
            raise ValueError(f"PriorFFN: expected width to be above 0 and finite, got {width}")
        hidden = 2 * math.ceil(math.ceil(width * dim) / 2)
        self.norm = nn.RMSNorm(dim, norm_eps, device=device)
        self.wi = nn.Linear(dim, 2 * hidden, bias=False, device=device)
        self.wo = nn.Linear(hidden, dim, bias=False, device=device)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.wi(self.norm(x)).chunk(2, dim=-1)
        return self.wo(F.silu(gate) * up)


class SurpriseGate(nn.Module):
    """`surprise_gate` with learned parameters, each kept positive as the softplus of what is trained.

    They start at the paper's values: o_ce 1.025, m_cu 1.1, beta_ce softplus(-0.3), beta_cu softplus(-0.6). With
    ``scheduled`` the two betas are not learned: `anneal_gates` raises both from 0.1 to 100, as the paper does for STT.
    """

    beta: Tensor

    def __init__(self, window: int = 100, *, scheduled: bool = False, device: torch.device | str | None = None) -> None:
        super().__init__()
        expect_positive("SurpriseGate", window=window)
        self.window = window
        self.scheduled = scheduled
        start = {"o_ce": math.log(math.expm1(1.025)), "m_cu": math.log(math.expm1(1.1))}
        if scheduled:
            self.register_buffer("beta", torch.tensor(0.1, device=device))
        else:
            start = {"beta_ce": -0.3, "beta_cu": -0.6, **start}
        for name, value in start.items():  # of one element: FSDP shards no parameter without dimensions
            setattr(self, name, nn.Parameter(torch.tensor([value], dtype=torch.float32, device=device)))

    def values(self, dtype: torch.dtype) -> list[Tensor]:
        """beta_ce, beta_cu, o_ce and m_cu as the gate of data of this dtype takes them."""
        # Cast first: a model that is moved to bfloat16 takes its parameters along.
        learned = [F.softplus(parameter.to(wide(dtype)))[0] for parameter in self.parameters()]
        return [self.beta.to(wide(dtype))] * 2 + learned if self.scheduled else learned

    def forward(self, x_in: Tensor, x_post: Tensor, x_prior: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(g, d_st, ce, cu), each [batch, length]."""
        beta_ce, beta_cu, o_ce, m_cu = self.values(x_in.dtype)
        return surprise_gate(x_in, x_post, x_prior, beta_ce, beta_cu, o_ce, m_cu, self.window)

    def resume(self, d_st: Tensor, ce: Tensor, positions: Tensor, past: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """(g, cu) of tokens that continue a text, from their d_st and ce and the text's last `window` values of d_st.

        past [batch, window] and seen [batch], how many tokens the text had, are updated in place.
        """
        beta_ce, beta_cu, _, m_cu = self.values(d_st.dtype)
        earlier = torch.where(seen[:, None] > 0, past, d_st[:, :1])  # the first one stands in for those before it
        rows = torch.cat((earlier, d_st), 1)
        cu = d_st - m_cu * rows.unfold(1, self.window, 1)[:, 1:].mean(-1)
        g = 1 - torch.sigmoid(-beta_ce * ce) * torch.sigmoid(-beta_cu * cu)
        tokens = (positions >= 0).sum(1, dtype=seen.dtype)
        past.copy_(rows.gather(1, tokens[:, None] + torch.arange(self.window, device=rows.device)))
        seen += tokens
        return g, cu


class Decision(NamedTuple):
    """What a `DecisionLayer` returns. The statistics d_st, ce and cu, [batch, length], are for logs and have no gradient."""

    x: Tensor  # [batch, length, dim], the new residual stream
    gate: Tensor  # [batch, length], float32 (float64 for float64)
    prior_loss: Tensor  # the prior's mean squared error, one number
    d_st: Tensor
    ce: Tensor
    cu: Tensor


class DecisionLayer(Reports):
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

    def forward(self, x: Tensor, positions: Tensor | None = None, cache: list[Tensor] | None = None) -> Decision:
        positions = positions_of(x, positions)
        x_post = self.block(x, positions) if cache is None else self.block(x, positions, cache[:-2])
        x_post = x_post.to(x.dtype)  # under autocast a block may return another one
        forecast = self.prior(x).to(x.dtype)
        g, d_st, ce, cu = self.gate(x, x_post, x + forecast)
        if cache is not None:
            g, cu = self.gate.resume(d_st, ce, positions, cache[-2], cache[-1])
        loss = F.mse_loss(forecast, (x_post - x).detach())
        self.tell(prior_loss=loss, gate=g, d_st=d_st, ce=ce, cu=cu)
        return Decision(x_post, g, loss, d_st, ce, cu)

    def new_cache(self, batch: int, max_length: int) -> list[Tensor]:
        """The block's cache for all tokens, and what the gate's moving average needs."""
        weight = self.prior.wo.weight
        past = torch.zeros(batch, self.gate.window, dtype=wide(weight.dtype), device=weight.device)
        seen = torch.zeros(batch, dtype=torch.int32, device=weight.device)
        return [*self.block.new_cache(batch, max_length), past, seen]  # type: ignore[operator]


class DynamicLayer(RoutedLayer):
    """A block for the tokens with the highest gates, the identity for all others (arXiv 2511.21408).

    ``x + gate * (block(x) - x)`` replaces the routed tokens; `RoutedLayer` says which ones these are. A token's output
    depends on its routed past only; which tokens top-k routes depends on the gates of the whole sequence.

    Args:
        block: maps (x, positions) of the routed tokens to their new residual stream.
        capacity: the share of the tokens that is routed, in (0, 1].
    """

    def __init__(self, block: nn.Module, capacity: float = 0.5, *, device: torch.device | str | None = None) -> None:
        super().__init__(block, capacity, device)

    def forward(
        self, x: Tensor, gate: Tensor, positions: Tensor | None = None, cache: list[Tensor] | None = None
    ) -> Tensor:
        """x [batch, length, dim] and its gates [batch, length], as a `DecisionLayer` returns them."""
        return self.route(x, gate, gate, expanded(positions, x), cache, load=gate)


class SubjectiveDepthLayer(nn.Module):
    """A `DecisionLayer` and the `DynamicLayer` that follows its gates, as one layer: two blocks, the second routed."""

    def __init__(
        self,
        decision_block: nn.Module,
        dynamic_block: nn.Module,
        dim: int,
        capacity: float = 0.5,
        *,
        window: int = 100,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.decision = DecisionLayer(decision_block, dim, window=window, device=device)
        self.dynamic = DynamicLayer(dynamic_block, capacity, device=device)

    def forward(self, x: Tensor, positions: Tensor | None = None, cache: list[list[Tensor]] | None = None) -> Tensor:
        of_decision, of_dynamic = (None, None) if cache is None else cache
        made = self.decision(x, positions, of_decision)
        return self.dynamic(made.x, made.gate, positions, of_dynamic)

    def new_cache(self, batch: int, max_length: int, slots: int | None = None) -> list[list[Tensor]]:
        """The caches of both layers; `slots` is that of the routed one."""
        return [self.decision.new_cache(batch, max_length), self.dynamic.new_cache(batch, max_length, slots)]


class MixtureOfDepthsLayer(RoutedLayer):
    """The baseline: tokens are chosen by a linear router (arXiv 2404.02258), otherwise a `DynamicLayer`.

    Updates are weighted by the sigmoid of the router's logit, which is between 0 and 1 as the gate of a `DynamicLayer` is. By the
    logit itself, as published, the update grows with the stream that it is added to: at a learning rate that the other layers
    bear, training diverges (docs/routing.md).
    """

    def __init__(
        self, block: nn.Module, dim: int, capacity: float = 0.5, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__(block, capacity, device)
        expect_positive("MixtureOfDepthsLayer", dim=dim)
        self.router = nn.Linear(dim, 1, bias=False, device=device)

    def forward(self, x: Tensor, positions: Tensor | None = None, cache: list[Tensor] | None = None) -> Tensor:
        # The op reads 16-bit data and adds up in float32, where a linear layer would tie or copy.
        logits = causal_route_logits(x, self.router.weight[0].to(wide(x.dtype)))
        return self.route(x, logits, torch.sigmoid(logits), expanded(positions, x), cache)
