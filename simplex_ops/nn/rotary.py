"""Rotary position embedding."""

import torch
from torch import Tensor


def frequencies(head_dim: int, base: float = 10000.0, device: torch.device | str | None = None) -> Tensor:
    """Angle per position of each pair, [head_dim / 2] in float32.

    A model made on the meta device has them on the CPU: they are in no state_dict that could fill them later.
    """
    if not base > 0:
        raise ValueError(f"frequencies: expected base to be above 0, got {base}")
    angles = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    device = torch.get_default_device() if device is None else torch.device(device)
    return angles if device.type == "meta" else angles.to(device)


def like(frequencies: Tensor, x: Tensor) -> Tensor:
    """The frequencies where x is, and in float64 for float64."""
    return frequencies.to(device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate each pair (x_d, x_{d + D/2}) of ``x`` [..., length, D] by ``angles`` [..., length, D/2]."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
