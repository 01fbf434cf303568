"""Causal attention over tokens that may lie anywhere in their text: what a block inside a routed layer is made of."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simplex_ops.nn.keeps_dtype import KeepsDtype
from simplex_ops.nn.rotary import frequencies, like, rotate
from simplex_ops.nn.sizes import expect_heads
from simplex_ops.route_kv_append import route_kv_append_


class PositionedAttention(KeepsDtype):
    """Causal `scaled_dot_product_attention` with grouped heads, rotary embedding at given positions and a compact cache.

    ``forward(x, positions)`` attends among the tokens of x [batch, n, dim], which stand at positions [batch, n] of their
    text in ascending order. Decoding continues with a cache, in which every sequence has a length of its own::

        cache = layer.new_cache(batch, slots)   # keys, values [batch, slots, kv_heads, head_dim], count [batch]
        y = layer(x, positions, cache)          # appends the tokens whose position is not -1, in place

    The slots with position -1 are empty and must be the last ones of their sequence; what is returned there is of no use.
    """

    kept = ("frequencies",)  # angles are not for 16 bits: a far position would turn by another one
    frequencies: Tensor

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        rope_base: float = 10000.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.kv_heads, self.head_dim = expect_heads("PositionedAttention", dim, heads, kv_heads, head_dim)
        if self.head_dim % 2:
            raise ValueError(f"PositionedAttention: expected head_dim to be even, got {self.head_dim}")
        self.wq = nn.Linear(dim, heads * self.head_dim, bias=False, device=device)
        self.wk = nn.Linear(dim, self.kv_heads * self.head_dim, bias=False, device=device)
        self.wv = nn.Linear(dim, self.kv_heads * self.head_dim, bias=False, device=device)
        self.wo = nn.Linear(heads * self.head_dim, dim, bias=False, device=device)
        self.register_buffer("frequencies", frequencies(self.head_dim, rope_base, device), persistent=False)

    def forward(self, x: Tensor, positions: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        turn = like(self.frequencies, x)
        angles = positions[:, None, :, None] * turn
        q = rotate(q.transpose(1, 2), angles)
        if cache is None:
            k = rotate(k.transpose(1, 2), angles)
            out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
        else:
            keys, values, count = cache
            own = count[:, None] + torch.arange(x.shape[1], device=x.device)  # the row that each slot takes
            at = positions.to(torch.int32)
            route_kv_append_(keys, values, count, k.to(keys.dtype), v.to(keys.dtype), at, turn.to(_wide(keys)))
            mask = torch.arange(keys.shape[1], device=x.device) <= own[:, None, :, None]
            k, v = (rows.to(q.dtype).transpose(1, 2) for rows in (keys, values))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.wo(out.transpose(1, 2).flatten(-2))

    def new_cache(self, batch: int, slots: int) -> list[Tensor]:
        """An empty cache of `slots` rows per sequence: keys and values, and how many rows are filled."""
        weight = self.wk.weight
        keys, values = (weight.new_zeros(batch, slots, self.kv_heads, self.head_dim) for _ in range(2))
        return [keys, values, torch.zeros(batch, dtype=torch.int32, device=weight.device)]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
