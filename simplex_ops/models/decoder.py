"""A decoder-only language model whose layers are chosen by name."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simplex_ops.models.config import DecoderConfig
from simplex_ops.models.registry import layer_names, make_layer


class DecoderLM(nn.Module):
    """Token embedding, layers by name, RMSNorm, head.

    Shapes: tokens [batch, length] of int64, logits [batch, length, vocab_size]. The model trains and exports through
    ``model(tokens)`` (batch and length may be dynamic), decodes through `generate`, and scripts as a whole::

        model = DecoderLM(DecoderConfig(layers=interleave(8)))
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        text = model.generate(prompt, 100, temperature=0.8)
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        unknown = set(config.options) - set(layer_names())
        if unknown:
            raise ValueError(f"DecoderLM: expected options for layers among {layer_names()}, got {sorted(unknown)}")
        self.config = config
        # Rows of unit length, so that a tied head gives logits of order 1; scaled up to order 1 on the way in.
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.embedding_scale = math.sqrt(config.dim)
        self.layers = nn.ModuleList(make_layer(name, config) for name in config.layers)
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        # Nothing of its own where tied: two names for one weight come apart in to_empty() and load_state_dict(assign=True).
        self.head = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False)
        self._initialize()

    def _initialize(self) -> None:
        """Every projection keeps the variance of its input; what the layers add up to has that of one of them."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                depth = 2 * len(self.layers) if name.endswith(".wo") else 1
                nn.init.normal_(module.weight, std=(module.in_features * depth) ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.embedding.weight, std=self.config.dim**-0.5)

    def forward(
        self,
        tokens: Tensor,
        cache: list[list[Tensor]] | None = None,
        position: int = 0,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Logits of the token after each of ``tokens``; with a cache, ``position`` tokens came before these.

        Texts of different lengths share a batch by ``positions`` [batch, length] of int64 instead: where each token stands
        in its text, and -1 for what is no token, behind the last one. "sdpa" and the routed layers take it, outside of
        TorchScript.
        """
        x = self.embedding(tokens) * self.embedding_scale
        for index, layer in enumerate(self.layers):
            layer_cache: list[Tensor] | None = None
            if cache is not None:
                layer_cache = cache[index]
            x = layer(x, layer_cache, position) if positions is None else self._at(index, x, positions, layer_cache)
        x = self.norm(x)
        return F.linear(x, self.embedding.weight) if self.head is None else self.head(x)

    @torch.jit.unused
    def _at(self, index: int, x: Tensor, positions: Tensor, cache: list[Tensor] | None) -> Tensor:
        return self.layers[index].at(x, positions, cache)  # type: ignore[operator]

    @torch.jit.export
    def new_cache(self, batch: int, max_length: int) -> list[list[Tensor]]:
        """Empty caches of all layers, for ``batch`` sequences of at most ``max_length`` tokens."""
        caches: list[list[Tensor]] = []
        for layer in self.layers:
            caches.append(layer.new_cache(batch, max_length))  # type: ignore[operator]
        return caches

    @torch.jit.export
    def generate(
        self,
        tokens: Tensor,
        count: int,
        temperature: float = 1.0,
        top_k: int = 0,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Append ``count`` sampled tokens to ``tokens`` [batch, length >= 1].

        A ``temperature`` of 0 takes the most likely token; ``top_k`` > 0 samples among the k most likely ones. Random
        numbers come from torch's default generator. With ``lengths`` [batch] of int64, each at least 1, text b is the first
        lengths[b] tokens of its row, and is continued right behind them, with zeros behind; the layers must take
        positions, see `forward`.
        """
        if tokens.size(1) < 1:
            raise ValueError(f"generate: expected tokens to hold at least 1 token, got {tokens.size(1)}")
        if count < 0:
            raise ValueError(f"generate: expected count to be at least 0, got {count}")
        if not temperature >= 0:  # NaN, too
            raise ValueError(f"generate: expected temperature to be at least 0, got {temperature}")
        if top_k < 0:
            raise ValueError(f"generate: expected top_k to be at least 0, got {top_k}")
        if lengths is not None:
            return self._generate_behind(lengths, tokens, count, temperature, top_k)
        with torch.no_grad():
            cache = self.new_cache(tokens.size(0), tokens.size(1) + count)
            step, position = tokens, 0
            for _ in range(count):
                logits = self.forward(step, cache, position, None)[:, -1]
                position += step.size(1)
                step = _sample(logits, temperature, top_k)
                tokens = torch.cat((tokens, step), dim=1)
            return tokens

    @torch.jit.unused
    @torch.no_grad()
    def _generate_behind(self, lengths: Tensor, tokens: Tensor, count: int, temperature: float, top_k: int) -> Tensor:
        batch, longest = tokens.shape
        if lengths.shape != (batch,):
            raise ValueError(f"generate: expected lengths to have shape [{batch}], got {list(lengths.shape)}")
        if batch and not 1 <= int(lengths.min()) <= int(lengths.max()) <= longest:
            raise ValueError(f"generate: expected lengths to be from 1 to {longest}, got {lengths.tolist()}")
        cache = self.new_cache(tokens.size(0), longest + count)
        ascending = torch.arange(longest, device=tokens.device)
        positions = torch.where(ascending < lengths[:, None], ascending, -1)
        texts = F.pad(tokens.masked_fill(positions < 0, 0), (0, count))
        step, last = tokens, lengths - 1
        for index in range(count):
            logits = self.forward(step, cache, 0, positions)
            step = _sample(logits[torch.arange(len(last), device=last.device), last], temperature, top_k)
            positions, last = (lengths + index)[:, None], torch.zeros_like(lengths)
            texts.scatter_(1, positions, step)
        return texts

    def num_parameters(self) -> int:
        """Number of trained values, a tied weight counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


def _sample(logits: Tensor, temperature: float, top_k: int) -> Tensor:
    if temperature < 1e-37:  # no more than 0 to float32
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float()
    # From the largest on, which stays 0: a small temperature takes the others to -inf, not that one to inf.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k > 0:
        threshold = logits.topk(min(top_k, logits.size(-1)), dim=-1)[0][:, -1:]
        scaled = scaled.masked_fill(logits < threshold, float("-inf"))
    return torch.multinomial(F.softmax(scaled, dim=-1), 1)
