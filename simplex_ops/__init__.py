"""Fast sequence-mixing operators for PyTorch: one wheel for every Python, torch and CUDA, without a compiler."""

import importlib
from typing import Any

from . import _library as _library  # first: it loads the ops that the modules below describe
from .causal_route_logits import causal_route_logits
from .grassmann_blend import grassmann_blend
from .grassmann_layer import grassmann_layer
from .grassmann_mix import grassmann_mix
from .grassmann_step import grassmann_step
from .info import Info, info
from .plucker_mean import plucker_mean
from .route_kv_append import route_kv_append_
from .routing import (
    route_gather,
    route_replace,
    route_scatter_add,
    threshold_route,
    topk_route,
    topk_route_calibrate_,
)
from .surprise_gate import surprise_gate
from .two_simplicial_attention import two_simplicial_attention

__all__ = [
    "Info",
    "causal_route_logits",
    "grassmann_blend",
    "grassmann_layer",
    "grassmann_mix",
    "grassmann_step",
    "info",
    "models",
    "nn",
    "plucker_mean",
    "route_gather",
    "route_kv_append_",
    "route_replace",
    "route_scatter_add",
    "surprise_gate",
    "threshold_route",
    "topk_route",
    "topk_route_calibrate_",
    "two_simplicial_attention",
]


def __getattr__(name: str) -> Any:
    """nn and models load when they are used, so that `import simplex_ops` stays quick."""
    if name in ("nn", "models"):
        return importlib.import_module(f".{name}", __name__)
    if name == "__version__":
        return info().version
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
