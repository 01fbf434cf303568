"""What a layer of the decoder may be, by name. A new mixer is one file in `mixers/` and its import line there.

A *layer* maps the residual stream to itself; a *mixer* is the part of a usual layer that moves information between
tokens. Most systems are a mixer; one that changes the layer itself (routing, skipping tokens) registers a layer.

Both have two methods, so that a model of any mix of them trains, decodes, scripts and exports:

    forward(x: Tensor, cache: list[Tensor] | None = None, position: int = 0) -> Tensor
        x [batch, length, dim]; `position` tokens came before x, and `cache`, updated in place, knows them.
    new_cache(batch: int, max_length: int) -> list[Tensor]       with @torch.jit.export

What can also serve texts of different lengths has a third one, which `DecoderLM` asks for when it is given positions:

    at(x: Tensor, positions: Tensor, cache: list[Tensor] | None = None) -> Tensor
        positions [batch, length] of int64, -1 for what is no token, behind the last one of its text.

A Linear called `wo` writes to the residual stream: the decoder starts it smaller in a deeper model.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from simplex_ops.models.block import Block
from simplex_ops.models.config import DecoderConfig

LayerFactory = Callable[..., nn.Module]

_LAYERS: dict[str, LayerFactory] = {}


def register_layer(name: str, factory: LayerFactory) -> None:
    """``factory(config, **options)`` builds the layer that `DecoderConfig.layers` calls ``name``."""
    if name in _LAYERS:
        raise ValueError(f"register_layer: expected a new name, got {name!r}, which is taken")
    _LAYERS[name] = factory


def register_mixer(name: str, factory: LayerFactory) -> None:
    """As `register_layer`, with the mixer that ``factory`` builds inside a `Block`."""

    def block(config: DecoderConfig, **options: Any) -> Block:
        return Block(config, factory(config, **options))

    register_layer(name, block)


def layer_names() -> list[str]:
    """The names that `DecoderConfig.layers` may hold."""
    return sorted(_LAYERS)


def make_layer(name: str, config: DecoderConfig) -> nn.Module:
    if name not in _LAYERS:
        raise ValueError(f"DecoderLM: expected layers to be among {layer_names()}, got {name!r}")
    return _LAYERS[name](config, **config.options.get(name, {}))
