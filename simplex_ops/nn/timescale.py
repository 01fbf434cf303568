"""Subjective Timescale Transformers (arXiv 2511.21408): a block runs when its token is not what the one before foretold."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simplex_ops.causal_route_logits import causal_route_logits
from simplex_ops.nn.routed_layer import RoutedLayer, expanded, last_tokens, positions_of, wide
from simplex_ops.nn.routing import PriorFFN, SurpriseGate
from simplex_ops.nn.sizes import expect_positive
from simplex_ops.routing import route_gather, route_replace


class TransitionNetwork(PriorFFN):
    """A forecast of a block's update of token t from the block's output at t - 1 (zero before the first): a `PriorFFN`.

    Shapes: x_post [batch, length, dim] to [batch, length, dim].
    """

    def forward(self, x_post: Tensor) -> Tensor:
        return super().forward(F.pad(x_post, (0, 0, 1, 0))[:, :-1])


class CausalRouter(nn.Module):
    """The student: ``logit_t = <w_1, x_t> + <w_2, x_{t-1}> + bias``, in float32 whatever the model is in."""

    def __init__(self, dim: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        expect_positive("CausalRouter", dim=dim)
        self.weight = nn.Parameter(torch.empty(2 * dim, device=device).normal_(std=0.5 * dim**-0.5))
        self.bias = nn.Parameter(torch.zeros(1, device=device))  # FSDP shards no parameter without dimensions

    def forward(self, x: Tensor, prev: Tensor | None = None) -> Tensor:
        """Logits [batch, length] of x [batch, length, dim]; prev [batch, dim] is the token before the first one."""
        logits = causal_route_logits(x, self.weight.to(wide(x.dtype)), prev)
        return logits + self.bias.to(logits.dtype)


class SubjectiveTimescaleLayer(RoutedLayer):
    r"""A block for the surprising tokens, chosen in training by what it did, at inference by a causal student.

    Training (the teacher), with x_{-1}^{post} = 0::

        x_post_t = block(x)_t over all tokens,         x_prior_t = x_t + transition(x_post_{t-1})
        g        = surprise_gate(x, x_post, x_prior),  routed: the top k of g
        out      = x + g * (block(routed) - x) at the routed tokens, x elsewhere       passes=2, as published
        out      = x + g * (x_post - x)        at the routed tokens, x elsewhere       passes=1

    The second pass lets a routed token attend to routed tokens only, which is all that it finds at inference; the single
    pass costs one block instead of 1 + capacity and lets it attend to all. Two losses come along, see `routing_loss`:
    the transition network's mean squared error (its target is constant), and the student's cross-entropy against the
    top-k mask, whose input is detached.

    In eval mode and with a cache (the student): tokens whose logit reaches `threshold` are replaced by block(routed), not
    weighted by a gate, which could only be known after computing the block; the gate of a trained layer is near 1 there,
    because its schedule ends at beta = 100. A skipped token leaves no row in the block's cache.

    Args:
        block: maps (x, positions) to the new residual stream, see `simplex_ops.nn.routing`.
        dim: of the residual stream.
        capacity: the share of the tokens that training routes, in (0, 1].
        window: of the gate's moving average, in tokens.
        passes: 2 or 1.
    """

    def __init__(
        self,
        block: nn.Module,
        dim: int,
        capacity: float = 0.5,
        *,
        window: int = 100,
        passes: int = 2,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(block, capacity, device)
        if passes not in (1, 2):
            raise ValueError(f"SubjectiveTimescaleLayer: expected passes to be 1 or 2, got {passes}")
        self.passes = passes
        self.transition = TransitionNetwork(dim, device=device)
        self.gate = SurpriseGate(window, scheduled=True, device=device)
        self.router = CausalRouter(dim, device=device)

    def forward(self, x: Tensor, positions: Tensor | None = None, cache: list[Tensor] | None = None) -> Tensor:
        positions = expanded(positions, x)
        return self._teach(x, positions) if self.training and cache is None else self._follow(x, positions, cache)

    def _teach(self, x: Tensor, positions: Tensor | None) -> Tensor:
        x_post = self.block(x, positions_of(x, positions)).to(x.dtype)  # another one, maybe, under autocast
        forecast = self.transition(x_post).to(x.dtype)
        g, d_st, ce, cu = self.gate(x, x_post, x + forecast)
        idx, mask = self.top_k(g)
        logits = self.router(x.detach())
        # The student's own threshold: where it routes as many as the teacher does.
        self.top_k(logits, calibrates=True)
        self.tell(
            mask=mask,
            gate=g,
            d_st=d_st,
            ce=ce,
            cu=cu,
            prior_loss=F.mse_loss(forecast, (x_post - x).detach()),
            router_loss=F.binary_cross_entropy_with_logits(logits, mask.to(logits.dtype)),
            router_accuracy=((logits.detach() >= self.threshold) == mask).to(logits.dtype).mean(),
            load=torch.sigmoid(logits),
        )
        if self.passes == 2:
            return self.run(x, idx, g, positions)
        return route_replace(x, route_gather(x_post, idx), idx, g)

    def _follow(self, x: Tensor, positions: Tensor | None, cache: list[Tensor] | None) -> Tensor:
        prev = None if cache is None else cache[-1].to(x.dtype)
        logits = self.router(x, prev)
        idx, mask = self.by_threshold(logits, positions, None if cache is None else cache[:-1])
        self.tell(mask=mask, gate=torch.sigmoid(logits))
        if cache is None:
            return self.run(x, idx, None, positions)
        positions = positions_of(x, positions)
        cache[-1].copy_(last_tokens(x, cache[-1], positions))
        return self.run(x, idx, None, positions, cache[:-1])

    def new_cache(self, batch: int, max_length: int, slots: int | None = None) -> list[Tensor]:
        """The block's cache, as `RoutedLayer.new_cache` has it, and the last token of each text for the student."""
        return [
            *super().new_cache(batch, max_length, slots),
            self.router.weight.new_zeros(batch, len(self.router.weight) // 2),
        ]
