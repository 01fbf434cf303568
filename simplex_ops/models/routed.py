"""Routed layers of the decoder: "mod", "sdt" (two blocks: a decision and a dynamic one) and "stt"."""

from typing import Any

import torch
from torch import Tensor, nn

from simplex_ops.models.block import Block
from simplex_ops.models.config import DecoderConfig
from simplex_ops.models.registry import register_layer
from simplex_ops.nn import MixtureOfDepthsLayer, PositionedAttention, SubjectiveDepthLayer, SubjectiveTimescaleLayer


class PositionedBlock(Block):
    """The usual decoder block for tokens at given positions, with a compact cache: what goes inside a routed layer."""

    def __init__(self, config: DecoderConfig, rope_base: float = 10000.0) -> None:
        mixer = PositionedAttention(config.dim, config.heads, config.kv_heads, config.head_dim, rope_base=rope_base)
        super().__init__(config, mixer)

    def forward(self, x: Tensor, positions: Tensor, cache: list[Tensor] | None = None) -> Tensor:  # type: ignore[override]
        x = x + self.mixer(self.mixer_norm(x), positions, cache)
        return x + self.mlp(self.mlp_norm(x))


class Positioned(nn.Module):
    """A layer that takes positions, as a layer of `DecoderLM`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, cache: Any = None, position: int = 0) -> Tensor:
        positions = torch.arange(position, position + x.shape[1], device=x.device).expand(x.shape[:2])
        return self.layer(x, positions, cache)

    def at(self, x: Tensor, positions: Tensor, cache: Any = None) -> Tensor:
        return self.layer(x, positions, cache)

    def new_cache(self, batch: int, max_length: int) -> Any:
        return self.layer.new_cache(batch, max_length)  # type: ignore[operator]


def mod(config: DecoderConfig, capacity: float = 0.5) -> Positioned:
    return Positioned(MixtureOfDepthsLayer(PositionedBlock(config), config.dim, capacity))


def sdt(config: DecoderConfig, capacity: float = 0.5, window: int = 100) -> Positioned:
    blocks = PositionedBlock(config), PositionedBlock(config)
    return Positioned(SubjectiveDepthLayer(*blocks, config.dim, capacity, window=window))


def stt(config: DecoderConfig, capacity: float = 0.5, window: int = 100, passes: int = 2) -> Positioned:
    layer = SubjectiveTimescaleLayer(PositionedBlock(config), config.dim, capacity, window=window, passes=passes)
    return Positioned(layer)


register_layer("mod", mod)
register_layer("sdt", sdt)
register_layer("stt", stt)
