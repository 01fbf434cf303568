"""Modules built on the ops of simplex_ops; every module can be scripted (TorchScript) and exported (torch.export)."""

from simplex_ops.nn.two_simplicial_attention import TwoSimplicialAttention

__all__ = ["TwoSimplicialAttention"]
