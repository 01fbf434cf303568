"""Causal mixing by the planes that tokens span, as a drop-in layer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from simplex_ops.nn.sizes import expect_positive


class GrassmannMixing(nn.Module):
    r"""Causal, attention-free Grassmann mixing with projection and gate (arXiv 2512.19428, section 3).

    .. math::
        z = W_z x + b_z, \qquad g = \operatorname{grassmann\_mix}(z), \qquad
        \alpha = \sigma(W_h x + W_g g + b_a), \qquad y = \alpha \odot x + (1 - \alpha) \odot g

    and with ``output_projection`` :math:`W_o y + b_o` instead of y.

    `simplex_ops.grassmann_mix` pairs each reduced token with those at fixed ``offsets`` before it and maps the mean
    Plücker vector of the pairs to the model dimension, in time linear in the length. It depends on the past through
    one direction per token only (docs/grassmann.md has the limits).

    Its linear layers lend their weights to one op and, without a cache, are not called: hooks on them do not run, and what is put in
    their place (LoRA, quantised layers) must have all of its effect in ``weight`` and ``bias``, as parametrizations have.

    Args:
        dim: size of the model dimension, the last one of the input and the output.
        rank: size r of the reduced tokens, 2 to 128.
        offsets: distances to the earlier tokens, each at least 1; equal ones count several times.
        output_projection: one more Linear(dim, dim) at the end. The paper's equations have none, one of its parameter counts
            has (see `simplex_ops.models.GrassmannLM`).
        device, dtype: of the parameters, ``dim * (rank + rank * (rank - 1) / 2 + 2 * dim + 2) + rank`` values, and
            ``dim * (dim + 1)`` of the output projection.

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
        output_projection: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        expect_positive("GrassmannMixing", dim=dim)
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
        self.out = nn.Linear(dim, dim, device=device, dtype=dtype) if output_projection else nn.Identity()

    def forward(
        self,
        x: Tensor,
        cache: list[Tensor] | None = None,
        position: int = 0,
        valid: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Mix within ``x`` [batch, length, dim] and, with a cache, with the ``position`` tokens that came before it.

        ``position`` is the number of tokens that the cache has seen; the cache is updated in place, and no gradient goes
        through what was mixed. Without a cache, ``valid`` [batch, length] leaves tokens out and ``cu_seqlens`` says which
        sequences are packed into a batch of 1, as in `simplex_ops.grassmann_mix`.
        """
        # The dispatcher's ops rather than the Python functions: TorchScript compiles these lines too.
        weight, bias = self.expand.weight, self.expand.bias
        if cache is None:
            y = torch.ops.simplex.grassmann_layer(
                x, self.reduce.weight, self.reduce.bias, weight, bias, self.gate_x.weight, self.gate_g.weight,
                self.gate_g.bias, self.offsets, valid, cu_seqlens,
            )[0]  # fmt: skip
        else:
            if valid is not None or cu_seqlens is not None:
                raise ValueError("GrassmannMixing: expected valid and cu_seqlens to be None with a cache, got a tensor")
            z = self.reduce(x)
            # Casts under autocast only, which leaves the step alone.
            own = weight.to(z.dtype), bias.to(z.dtype)
            g = torch.ops.simplex.grassmann_step(z, cache[0], own[0], own[1], self.offsets, position)
            y = torch.ops.simplex.grassmann_blend(x, g, self.gate_x(x) + self.gate_g(g))
        return self.out(y)

    @torch.jit.export
    def new_cache(self, batch: int, max_length: int | None = None) -> list[Tensor]:
        """A ring [batch, max(offsets), rank] for the last reduced tokens (`simplex_ops.grassmann_step`); one for each text."""
        weight = self.reduce.weight
        return [torch.zeros([batch, self.window, weight.size(0)], dtype=weight.dtype, device=weight.device)]

    def extra_repr(self) -> str:
        return f"offsets={self.offsets}"
