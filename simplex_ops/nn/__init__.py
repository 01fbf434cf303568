"""Modules built on the ops of simplex_ops; every module can be exported (torch.export), and all but the routed layers scripted
(TorchScript)."""

from simplex_ops.nn.grassmann_mixing import GrassmannMixing
from simplex_ops.nn.interpret import PairGeometry, interpret
from simplex_ops.nn.routing import Decision, DecisionLayer, DynamicLayer, MixtureOfDepthsLayer, PriorFFN, SurpriseGate
from simplex_ops.nn.two_simplicial_attention import TwoSimplicialAttention

__all__ = [
    "Decision",
    "DecisionLayer",
    "DynamicLayer",
    "GrassmannMixing",
    "MixtureOfDepthsLayer",
    "PairGeometry",
    "PriorFFN",
    "SurpriseGate",
    "TwoSimplicialAttention",
    "interpret",
]
