"""What all routed layers share: choose tokens, run a block on them, put its update back."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from simplex_ops.nn.keeps_dtype import KeepsDtype
from simplex_ops.routing import route_gather, route_replace, threshold_route, topk_route, topk_route_calibrate_


class Reports(nn.Module):
    """A layer that keeps statistics of its last forward pass in `report`, losses with their graph included."""

    def __init__(self) -> None:
        super().__init__()
        self.report: dict[str, Tensor] = {}

    def tell(self, **report: Tensor) -> None:
        """torch.export would refuse the assignment, torch.compile makes it."""
        compiling = torch.compiler.is_compiling()  # is_exporting() is true under torch.compile in torch 2.11
        if not compiling or torch.compiler.is_dynamo_compiling():
            self.report = report

    def __getstate__(self) -> dict[str, Any]:
        """Without statistics: copies and files of a layer take no graph along."""
        return {**self.__dict__, "report": {}}


class RoutedLayer(Reports, KeepsDtype):
    """A block for some of the tokens, the identity for the others.

    In training mode ``k = max(1, floor(capacity * length))`` tokens of each sequence are routed, those with the highest
    scores. In eval mode, and whenever there is a cache, the tokens whose score reaches `threshold` are: a decision that
    depends on no later token. Training keeps `threshold` at the moving average of the k-th score, so that about the same
    share is routed; to trade speed for quality set it at run time, ``layer.threshold.fill_(value)``.

    Attributes:
        block: maps (x, positions), and (x, positions, cache) to decode, to the new residual stream.
        capacity: the share of the tokens that training routes and a cache has room for, in (0, 1].
        threshold: the lowest score that is routed, a float32 buffer.
        trim: False for static shapes: a pass by threshold then computes as many slots as there are tokens. True asks the
            device how many slots are filled and computes these only; it waits for the device, and last bits may depend
            on the widest route of the batch.
        report: statistics of the last forward pass, see `routing_statistics`.
    """

    kept = ("threshold", "calibrations")  # scores are float32 whatever the model is in
    threshold: Tensor
    calibrations: Tensor

    def __init__(self, block: nn.Module, capacity: float, device: torch.device | str | None = None) -> None:
        super().__init__()
        if not 0 < capacity <= 1:
            raise ValueError(f"{type(self).__name__}: expected capacity to be above 0 and at most 1, got {capacity}")
        self.block = block
        self.capacity = capacity
        self.trim = False
        for name in self.kept:
            self.register_buffer(name, torch.zeros((), dtype=torch.float32, device=device))

    def new_cache(self, batch: int, max_length: int, slots: int | None = None) -> list[Tensor]:
        """The block's cache for `batch` texts of at most `max_length` tokens, of `slots` rows each: by default the share
        that `capacity` is. A token that finds the cache of its text full is skipped."""
        return self.block.new_cache(batch, slots_of(max_length, self.capacity) if slots is None else slots)  # type: ignore[operator]

    def top_k(self, scores: Tensor, calibrates: bool = False) -> tuple[Tensor, Tensor]:
        """(idx, mask) of the tokens that training routes. `calibrates`: moves the threshold towards their lowest score."""
        k = slots_of(scores.shape[1], self.capacity)
        if calibrates:
            return topk_route_calibrate_(scores, k, self.threshold, self.calibrations)
        return topk_route(scores.detach(), k)

    def by_threshold(
        self, scores: Tensor, positions: Tensor | None, cache: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(idx, mask) of the tokens that reach the threshold, stand at a position and find room in the cache."""
        margin = scores.detach() - self.threshold
        if positions is not None:
            margin = margin.masked_fill(positions < 0, -math.inf)
        mask = margin >= 0
        idx, count = threshold_route(margin, 0.0, scores.shape[1])
        if cache is not None:
            room = cache[0].shape[1] - cache[-1]
            idx = torch.where(torch.arange(idx.shape[1], device=idx.device) < room[:, None], idx, -1)
            mask = mask & (mask.cumsum(1) <= room[:, None])
            count = torch.minimum(count, room)
        if self.trim:
            idx = idx[:, : int(count.max()) if len(count) else 0].contiguous()  # once for all who take it
        return idx, mask

    def run(
        self,
        x: Tensor,
        idx: Tensor,
        gate: Tensor | None,
        positions: Tensor | None,
        cache: list[Tensor] | None = None,
    ) -> Tensor:
        """x + gate * (block(x) - x) at idx, the routed tokens with the positions that they had; x elsewhere.

        The gate is one of all tokens, [batch, length]; without positions [batch, length] these are the indices.
        """
        if idx.shape[1] == 0:
            return x
        at = idx.long()
        if positions is not None:
            at = torch.where(idx < 0, -1, positions.gather(1, at.clamp(min=0)))
        rows = route_gather(x, idx)
        new = self.block(rows, at) if cache is None else self.block(rows, at, cache)
        return route_replace(x, new.to(x.dtype), idx, gate)

    def route(
        self,
        x: Tensor,
        scores: Tensor,
        gate: Tensor,
        positions: Tensor | None,
        cache: list[Tensor] | None = None,
        **report: Tensor,
    ) -> Tensor:
        """Routes by scores [batch, length], and weighs the block's update by a gate of that shape."""
        if self.training and cache is None:
            idx, mask = self.top_k(scores, calibrates=True)
        else:
            idx, mask = self.by_threshold(scores, positions, cache)
        self.tell(mask=mask, gate=gate, **report)
        return self.run(x, idx, gate, positions, cache)


def slots_of(length: int, capacity: float) -> int:
    slots = math.floor(capacity * length)
    return max(1, slots) if isinstance(slots, int) else torch.sym_max(1, slots)


def expanded(positions: Tensor | None, x: Tensor) -> Tensor | None:
    return None if positions is None else positions.expand(x.shape[:2])


def positions_of(x: Tensor, positions: Tensor | None) -> Tensor:
    if positions is None:
        positions = torch.arange(x.shape[1], device=x.device)
    return positions.expand(x.shape[:2])


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def last_tokens(rows: Tensor, before: Tensor, positions: Tensor) -> Tensor:
    """For the next step, the last of rows [batch, n, ...] that is a token, or `before` where none is."""
    tokens = (positions >= 0).sum(1)
    batch = torch.arange(len(rows), device=rows.device)
    some = (tokens > 0).view(-1, *[1] * (before.dim() - 1))
    return torch.where(some, rows[batch, tokens.clamp(min=1) - 1].to(before.dtype), before)
