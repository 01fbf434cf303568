"""The attention-free models of arXiv 2512.19428: a language model and a classifier of sequences of features."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simplex_ops.nn import GrassmannMixing


class GrassmannBlock(nn.Module):
    """The paper's post-norm layer: ``h = norm(mixing(x)); norm(h + mlp(h))``, with a GELU MLP of 4 * dim."""

    def __init__(self, dim: int, rank: int, offsets: Sequence[int], output_projection: bool = False) -> None:
        super().__init__()
        self.mixing = GrassmannMixing(dim, rank, offsets, output_projection=output_projection)
        self.mixing_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.mlp_norm = nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,
        cache: list[Tensor] | None = None,
        position: int = 0,
        valid: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        h = self.mixing_norm(self.mixing(x, cache, position, valid, cu_seqlens))
        return self.mlp_norm(h + self.mlp(h))

    @torch.jit.export
    def new_cache(self, batch: int) -> list[Tensor]:
        return self.mixing.new_cache(batch)


class GrassmannLM(nn.Module):
    """Token and position embedding, post-norm Grassmann layers, LayerNorm, tied head (arXiv 2512.19428, section 4).

    The paper states two sizes for its 6-layer model. The defaults are what its equations say, of 12,607,168 parameters;
    ``output_projection=True`` adds a dim x dim projection to each layer and has the 13,001,920 that it also mentions. For
    pre-norm layers, rotary or no positions, take `DecoderLM` with the mixer "grassmann".

    Args:
        vocab_size, dim, rank, depth: sizes of the model; rank is r of `GrassmannMixing`.
        max_length: number of learned positions.
        offsets: those of every layer or, with ``one_offset_per_layer``, the only one of each layer: depth of them.
        output_projection: of `GrassmannMixing`.

    Shapes: tokens [batch, length] of int64, logits [batch, length, vocab_size]. With ``cu_seqlens`` (int32, from 0 to length)
    a batch of 1 holds several texts, each with its own positions, up to ``max_length`` tokens; none sees another. Decodes as
    `DecoderLM` does::

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
        output_projection: bool = False,
    ) -> None:
        super().__init__()
        if one_offset_per_layer and len(offsets) != depth:
            raise ValueError(f"GrassmannLM: expected an offset for each of {depth} layers, got {list(offsets)}")
        of_layer = [(offset,) for offset in offsets] if one_offset_per_layer else [tuple(offsets)] * depth
        self.embedding = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(max_length, dim)
        self.layers = nn.ModuleList(GrassmannBlock(dim, rank, chosen, output_projection) for chosen in of_layer)
        self.norm = nn.LayerNorm(dim)
        for embedding in (self.embedding, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)  # the head shares it: logits start near 0

    def forward(
        self,
        tokens: Tensor,
        cache: list[list[Tensor]] | None = None,
        position: int = 0,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Logits of the token after each of ``tokens``; with a cache, ``position`` tokens came before these."""
        most = self.positions.num_embeddings
        # The embedding's own error names no argument and, on CUDA, ends the process. (An export may leave the length open.)
        if not torch.compiler.is_compiling() and cu_seqlens is None and not 0 <= position <= most - tokens.size(1):
            raise ValueError(
                f"GrassmannLM: expected position and length to fit {most} positions, got {position} and {tokens.size(1)}"
            )
        at = torch.arange(position, position + tokens.size(1), device=tokens.device)
        if cu_seqlens is not None:  # counted from the last text that starts at or before the token
            text = torch.searchsorted(cu_seqlens, at.to(cu_seqlens.dtype), right=True) - 1
            at = at - cu_seqlens[text]
        x = self.embedding(tokens) + self.positions(at)
        for index, layer in enumerate(self.layers):
            layer_cache: list[Tensor] | None = None
            if cache is not None:
                layer_cache = cache[index]
            x = layer(x, layer_cache, position, None, cu_seqlens)
        return F.linear(self.norm(x), self.embedding.weight)

    @torch.jit.export
    def new_cache(self, batch: int) -> list[list[Tensor]]:
        """Empty caches of all layers, for ``batch`` sequences: the last ``max(offsets)`` reduced tokens of each."""
        caches: list[list[Tensor]] = []
        for layer in self.layers:
            caches.append(layer.new_cache(batch))  # type: ignore[operator]
        return caches

    def num_parameters(self) -> int:
        """Number of trained values, the tied head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


class GrassmannHead(nn.Module):
    """Classifies sequences by the features that a frozen encoder gives their tokens, as the paper does natural language
    inference (arXiv 2512.19428, section 5): a projection, post-norm Grassmann layers, the mean over the tokens, logits.

    Mixing is causal, the encoder's features need not be. The sizes are ours to choose: none of them is checked against the
    paper's. Compute the features under ``torch.no_grad()``; no gradient is taken with respect to them otherwise either.

    Args:
        feature_dim: of the encoder; 768 for DistilBERT.
        classes: 3 for entailment, neutral and contradiction.
        dim, rank, depth, offsets: of the layers, as in `GrassmannLM`.

    Shapes: features [batch, length, feature_dim], valid bool [batch, length], False where a sequence is padded; logits
    [batch, classes]. What stands at padding changes nothing. A sequence without a valid token gets the logits of a mean 0.
    """

    def __init__(
        self,
        feature_dim: int = 768,
        classes: int = 3,
        dim: int = 256,
        rank: int = 32,
        depth: int = 2,
        offsets: Sequence[int] = (1, 2, 4, 8, 12, 16),
    ) -> None:
        super().__init__()
        self.project = nn.Linear(feature_dim, dim)
        self.layers = nn.ModuleList(GrassmannBlock(dim, rank, offsets) for _ in range(depth))
        self.classify = nn.Linear(dim, classes)

    def forward(self, features: Tensor, valid: Tensor | None = None) -> Tensor:
        features = features.detach()
        if valid is None:
            valid = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        out = ~valid[..., None]
        x = self.project(features.masked_fill(out, 0.0))  # padding may hold anything, NaN too
        for layer in self.layers:
            x = layer(x, None, 0, valid)
        return self.classify(x.masked_fill(out, 0.0).sum(1) / valid.sum(1, keepdim=True).clamp(min=1))
