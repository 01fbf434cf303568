"""The usual decoder layer: a mixer and an MLP, each on a normalised residual stream."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simplex_ops.models.config import DecoderConfig


class SwiGLU(nn.Module):
    """``wo(silu(gate) * up)`` with ``gate, up = wi(x)``; 3 * dim * hidden parameters."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.wi = nn.Linear(dim, 2 * hidden, bias=False)
        self.wo = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.wi(x).chunk(2, dim=-1)
        return self.wo(F.silu(gate) * up)


class Block(nn.Module):
    """``x += mixer(norm(x)); x += mlp(norm(x))``."""

    def __init__(self, config: DecoderConfig, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.mixer = mixer
        self.mlp_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config.dim, config.mlp_dim)

    def forward(self, x: Tensor, cache: list[Tensor] | None = None, position: int = 0) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x), cache, position)
        return x + self.mlp(self.mlp_norm(x))

    @torch.jit.unused
    def at(self, x: Tensor, positions: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        if not hasattr(self.mixer, "at"):
            raise ValueError(f"Block: expected a mixer that takes positions, got {type(self.mixer).__name__}")
        x = x + self.mixer.at(self.mixer_norm(x), positions, cache)  # type: ignore[operator]
        return x + self.mlp(self.mlp_norm(x))

    @torch.jit.export
    def new_cache(self, batch: int, max_length: int) -> list[Tensor]:
        return self.mixer.new_cache(batch, max_length)  # type: ignore[operator]
