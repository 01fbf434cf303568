"""Dot-product attention as a mixer: "sdpa", and "sdpa_twin" with the parameters of "two_simplicial"."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simplex_ops.models.config import DecoderConfig
from simplex_ops.models.registry import register_mixer
from simplex_ops.nn.keeps_dtype import KeepsDtype
from simplex_ops.nn.rotary import frequencies, like, rotate
from simplex_ops.nn.sizes import expect_heads


class DotProductAttention(KeepsDtype):
    """Causal `scaled_dot_product_attention` with rotary positions and grouped key/value heads."""

    kept = ("frequencies",)  # bfloat16 would turn far positions by other angles
    frequencies: Tensor

    def __init__(self, dim: int, heads: int, kv_heads: int, head_dim: int, rope_base: float = 10000.0) -> None:
        super().__init__()
        expect_heads("DotProductAttention", dim, heads, kv_heads, head_dim)
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.wq = nn.Linear(dim, heads * head_dim, bias=False)
        self.wk = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.wv = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.wo = nn.Linear(heads * head_dim, dim, bias=False)
        self.register_buffer("frequencies", frequencies(head_dim, rope_base), persistent=False)

    def forward(self, x: Tensor, cache: list[Tensor] | None = None, position: int = 0) -> Tensor:
        length = x.size(1)
        positions = torch.arange(position, position + length, device=x.device)
        q, k, v = self._project(x, positions[:, None] * like(self.frequencies, x))
        mask: Tensor | None = None
        if cache is not None:
            rows = cache[0]
            if position < 0 or position + length > rows.size(3):
                raise ValueError(
                    f"DotProductAttention: expected position and length to fit a cache of {rows.size(3)} tokens, "
                    f"got {position} and {length}"
                )
            rows[:, :, :, position : position + length] = torch.stack((k, v)).to(rows.dtype)
            k, v = rows[:, :, :, : position + length].to(q.dtype).unbind(0)
            # is_causal would align the mask with the first key instead of the last.
            mask = torch.arange(position + length, device=x.device) <= positions[:, None]
        return self._attend(q, k, v, mask)

    @torch.jit.unused
    def at(self, x: Tensor, positions: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        q, k, v = self._project(x, positions[:, None, :, None] * like(self.frequencies, x))
        if cache is None:
            return self._attend(q, k, v, None)
        rows = cache[0]
        text, token = (positions >= 0).nonzero(as_tuple=True)
        rows[:, text, :, positions[text, token]] = torch.stack((k, v)).to(rows.dtype)[:, text, :, token]
        # What is no token attends to the first one: nobody wants its output, but it may not be NaN.
        mask = torch.arange(rows.size(3), device=x.device) <= positions.clamp(min=0)[:, None, :, None]
        k, v = rows.to(q.dtype).unbind(0)
        return self._attend(q, k, v, mask)

    def _project(self, x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.wq(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
        k = self.wk(x).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        v = self.wv(x).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        return rotate(q, angles), rotate(k, angles), v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return self.wo(out.transpose(1, 2).flatten(-2))

    @torch.jit.export
    def new_cache(self, batch: int, max_length: int) -> list[Tensor]:
        """Keys and values [2, batch, kv_heads, max_length, head_dim]."""
        weight = self.wk.weight
        shape = [2, batch, self.kv_heads, max_length, self.head_dim]
        return [torch.zeros(shape, dtype=weight.dtype, device=weight.device)]


def sdpa(config: DecoderConfig, rope_base: float = 10000.0) -> DotProductAttention:
    return DotProductAttention(config.dim, config.heads, config.kv_heads, config.head_dim, rope_base)


def sdpa_twin(config: DecoderConfig, rope_base: float = 10000.0) -> DotProductAttention:
    # The two keys and two values of a 2-simplicial layer weigh as much as one key and one value of twice the heads:
    # equal parameters to the last one, and an equal MLP.
    return DotProductAttention(config.dim, config.heads, 2 * config.kv_heads, config.head_dim, rope_base)


register_mixer("sdpa", sdpa)
register_mixer("sdpa_twin", sdpa_twin)
