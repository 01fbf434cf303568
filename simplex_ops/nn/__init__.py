"""Modules built on the ops of simplex_ops; every module can be exported (torch.export), and all but the routed layers scripted
(TorchScript)."""

from simplex_ops.nn.grassmann_mixing import GrassmannMixing
from simplex_ops.nn.interpret import PairGeometry, interpret
from simplex_ops.nn.positioned_attention import PositionedAttention
from simplex_ops.nn.routed_layer import RoutedLayer
from simplex_ops.nn.routing import (
    Decision,
    DecisionLayer,
    DynamicLayer,
    MixtureOfDepthsLayer,
    PriorFFN,
    SubjectiveDepthLayer,
    SurpriseGate,
)
from simplex_ops.nn.routing_report import anneal_gates, route_map, routing_loss, routing_reports, routing_statistics
from simplex_ops.nn.timescale import CausalRouter, SubjectiveTimescaleLayer, TransitionNetwork
from simplex_ops.nn.two_simplicial_attention import TwoSimplicialAttention

__all__ = [
    "CausalRouter",
    "Decision",
    "DecisionLayer",
    "DynamicLayer",
    "GrassmannMixing",
    "MixtureOfDepthsLayer",
    "PairGeometry",
    "PositionedAttention",
    "PriorFFN",
    "RoutedLayer",
    "SubjectiveDepthLayer",
    "SubjectiveTimescaleLayer",
    "SurpriseGate",
    "TransitionNetwork",
    "TwoSimplicialAttention",
    "anneal_gates",
    "interpret",
    "route_map",
    "routing_loss",
    "routing_reports",
    "routing_statistics",
]
