"""The attention-free language model of arXiv 2512.19428."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simplex_ops.nn import GrassmannMixing


class GrassmannBlock(nn.Module):
    """The paper's post-norm layer: ``h = norm(mixing(x)); norm(h + mlp(h))``, with a GELU MLP of 4 * dim."""

    def __init__(self, dim: int, rank: int, offsets: Sequence[int]) -> None:
        super().__init__()
        self.mixing = GrassmannMixing(dim, rank, offsets)
        self.mixing_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.mlp_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, cache: list[Tensor] | None = None, position: int = 0) -> Tensor:
        h = self.mixing_norm(self.mixing(x, cache, position))
        return self.mlp_norm(h + self.mlp(h))

    @torch.jit.export
    def new_cache(self, batch: int) -> list[Tensor]:
        return self.mixing.new_cache(batch)


class GrassmannLM(nn.Module):
    """Token and position embedding, post-norm Grassmann layers, LayerNorm, tied head (arXiv 2512.19428, section 4).

    The defaults are the paper's 6-layer model, of 12,607,168 parameters. (The 13,001,920 that it also mentions are these
    with one more dim x dim projection in each layer, which its equations do not have and this model neither.) For
    pre-norm layers, rotary or no positions, take `DecoderLM` with the mixer "grassmann".

    Args:
        vocab_size, dim, rank, depth: sizes of the model; rank is r of `GrassmannMixing`.
        max_length: number of learned positions.
        offsets: those of every layer or, with ``one_offset_per_layer``, the only one of each layer: depth of them.

    Shapes: tokens [batch, length] of int64, logits [batch, length, vocab_size]. Decodes as `DecoderLM` does::

        cache = model.new_cache(batch)
        logits = model(prompt, cache, 0)
        logits = model(token, cache, prompt.shape[1])
    """

    def __init__(
        self,
        vocab_size: int = 30522,
        dim: int = 256,
        rank: int = 32,
        depth: int = 6,
        max_length: int = 128,
        offsets: Sequence[int] = (1, 2, 4, 8, 12, 16),
        *,
        one_offset_per_layer: bool = False,
    ) -> None:
        super().__init__()
        if one_offset_per_layer and len(offsets) != depth:
            raise ValueError(f"GrassmannLM: expected an offset for each of {depth} layers, got {list(offsets)}")
        of_layer = [(offset,) for offset in offsets] if one_offset_per_layer else [tuple(offsets)] * depth
        self.embedding = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(max_length, dim)
        self.layers = nn.ModuleList(GrassmannBlock(dim, rank, chosen) for chosen in of_layer)
        self.norm = nn.LayerNorm(dim)
        for embedding in (self.embedding, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)  # the head shares it: logits start near 0

    def forward(self, tokens: Tensor, cache: list[list[Tensor]] | None = None, position: int = 0) -> Tensor:
        """Logits of the token after each of ``tokens``; with a cache, ``position`` tokens came before these."""
        at = torch.arange(position, position + tokens.size(1), device=tokens.device)
        x = self.embedding(tokens) + self.positions(at)
        for index, layer in enumerate(self.layers):
            layer_cache: list[Tensor] | None = None
            if cache is not None:
                layer_cache = cache[index]
            x = layer(x, layer_cache, position)
        return F.linear(self.norm(x), self.embedding.weight)

    @torch.jit.export
    def new_cache(self, batch: int) -> list[list[Tensor]]:
        """Empty caches of all layers, for ``batch`` sequences: the last ``max(offsets)`` reduced tokens of each."""
        caches: list[list[Tensor]] = []
        for layer in self.layers:
            caches.append(layer.new_cache(batch))  # type: ignore[operator]
        return caches
