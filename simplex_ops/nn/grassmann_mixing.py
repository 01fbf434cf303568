"""Causal mixing by the planes that tokens span, as a drop-in layer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class GrassmannMixing(nn.Module):
    r"""Causal, attention-free Grassmann mixing with projection and gate (arXiv 2512.19428, section 3).

    .. math::
        z = W_z x + b_z, \qquad g = \operatorname{grassmann\_mix}(z), \qquad
        \alpha = \sigma(W_h x + W_g g + b_a), \qquad y = \alpha \odot x + (1 - \alpha) \odot g

    `simplex_ops.grassmann_mix` pairs each reduced token with those at fixed ``offsets`` before it and maps the mean
    Plücker vector of the pairs to the model dimension, in time linear in the length. It depends on the past through
    one direction per token only (docs/grassmann.md has the limits).

    Args:
        dim: size of the model dimension, the last one of the input and the output.
        rank: size r of the reduced tokens, 2 to 128.
        offsets: distances to the earlier tokens, each at least 1; equal ones count several times.
        device, dtype: of the parameters, ``dim * (rank + rank * (rank - 1) / 2 + 2 * dim + 2) + rank`` values.

    Shapes: input and output ``[batch, length, dim]``; any batch, 0 included.

    Dtypes: float32, float64, float16 and bfloat16 on the CPU; float32, float16 and bfloat16 on CUDA.

    Raises:
        ValueError: for a bad size, naming the argument, its value and what was expected.
        RuntimeError: from the op, for an unsupported dtype or device.

    Decoding keeps the last ``max(offsets)`` reduced tokens, whatever the length of the text::

        cache = layer.new_cache(batch)
        y = layer(prompt, cache, 0)  # [batch, n, dim]
        y = layer(token, cache, n)  # [batch, 1, dim], updates the cache in place
    """

    def __init__(
        self,
        dim: int,
        rank: int = 32,
        offsets: Sequence[int] = (1, 2, 4, 8, 12, 16),
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"GrassmannMixing: expected dim to be at least 1, got {dim}")
        if not 2 <= rank <= 128:
            raise ValueError(f"GrassmannMixing: expected rank to be from 2 to 128, got {rank}")
        if not offsets or min(offsets) < 1:
            raise ValueError(f"GrassmannMixing: expected offsets of at least 1, at least one, got {list(offsets)}")
        self.offsets: list[int] = list(offsets)
        self.window = max(self.offsets)
        self.reduce = nn.Linear(dim, rank, device=device, dtype=dtype)
        self.expand = nn.Linear(rank * (rank - 1) // 2, dim, device=device, dtype=dtype)
        self.gate_x = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)
        self.gate_g = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, cache: list[Tensor] | None = None, position: int = 0) -> Tensor:
        """Mix within ``x`` [batch, length, dim] and, with a cache, with the ``position`` tokens that came before it.

        ``position`` is the number of tokens that the cache has seen; the cache is updated in place.
        """
        z = self.reduce(x)
        if cache is not None:
            seen = min(position, self.window)
            # The oldest first, so that the offsets hold; of what the op returns only the new tokens are of use.
            rows = torch.cat((cache[0][:, self.window - seen :].to(z.dtype), z), dim=1)
            kept = min(rows.size(1), self.window)
            cache[0][:, self.window - kept :] = rows[:, rows.size(1) - kept :]
            z = rows
        # The dispatcher's op rather than the Python function: TorchScript compiles this line too.
        g = torch.ops.simplex.grassmann_mix(z, self.expand.weight, self.expand.bias, self.offsets)
        g = g[:, g.size(1) - x.size(1) :]
        alpha = torch.sigmoid(self.gate_x(x) + self.gate_g(g))
        return alpha * x + (1 - alpha) * g

    @torch.jit.export
    def new_cache(self, batch: int, max_length: int | None = None) -> list[Tensor]:
        """An empty cache [batch, max(offsets), rank] of reduced tokens, for every call of ``forward`` that continues."""
        weight = self.reduce.weight
        return [torch.zeros([batch, self.window, weight.size(0)], dtype=weight.dtype, device=weight.device)]

    def extra_repr(self) -> str:
        return f"offsets={self.offsets}"
