"""The shape of a decoder, as plain data that JSON can hold."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


def interleave(depth: int, mixer: str = "two_simplicial", every: int = 4, base: str = "sdpa") -> tuple[str, ...]:
    """``depth`` layer names: ``mixer`` at every ``every``-th layer and ``base`` at the others.

    >>> interleave(4)
    ('sdpa', 'sdpa', 'sdpa', 'two_simplicial')
    """
    return tuple(mixer if (index + 1) % every == 0 else base for index in range(depth))


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and layers of a `DecoderLM`.

    Attributes:
        vocab_size: number of tokens; the default is one per byte.
        dim: size of the residual stream.
        heads, kv_heads, head_dim: of every mixer that has heads.
        mlp_dim: hidden size of the SwiGLU MLP.
        layers: a registered name per layer, see `layer_names`.
        options: keyword arguments per layer name, e.g. ``{"two_simplicial": {"w1": 128, "w2": 16}}``.
        tied: whether the head shares the embedding's weight.
        norm_eps: of every RMSNorm.
    """

    vocab_size: int = 256
    dim: int = 256
    heads: int = 4
    kv_heads: int = 1
    head_dim: int = 64
    mlp_dim: int = 704
    layers: tuple[str, ...] = interleave(8)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tied: bool = False
    norm_eps: float = 1e-6


def dot_product_twin(config: DecoderConfig) -> DecoderConfig:
    """The config with each "two_simplicial" layer replaced by dot-product attention of exactly as many parameters."""
    layers = tuple("sdpa_twin" if name == "two_simplicial" else name for name in config.layers)
    return replace(config, layers=layers)
