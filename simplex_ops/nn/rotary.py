"""Rotary position embedding."""

import torch
from torch import Tensor


def frequencies(head_dim: int, base: float = 10000.0) -> Tensor:
    """Angle per position of each pair, [head_dim / 2]."""
    return base ** (-torch.arange(0, head_dim, 2).float() / head_dim)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate each pair (x_d, x_{d + D/2}) of ``x`` [..., length, D] by ``angles`` [..., length, D/2]."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
