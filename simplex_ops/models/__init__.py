"""Small language models whose layers are pluggable: the place to compare mixers under equal parameters and tokens."""

import simplex_ops.models.mixers
import simplex_ops.models.routed  # noqa: F401  (both register every layer)
from simplex_ops.models.config import DecoderConfig, dot_product_twin, interleave
from simplex_ops.models.decoder import DecoderLM
from simplex_ops.models.grassmann import GrassmannHead, GrassmannLM
from simplex_ops.models.registry import layer_names, register_layer, register_mixer

__all__ = [
    "DecoderConfig",
    "DecoderLM",
    "GrassmannHead",
    "GrassmannLM",
    "dot_product_twin",
    "interleave",
    "layer_names",
    "register_layer",
    "register_mixer",
]
