"""Self-attention over pairs of earlier tokens, as a drop-in layer."""

import math

import torch
from torch import Tensor, nn

from simplex_ops.nn.sizes import expect_heads, expect_positive
from simplex_ops.two_simplicial_attention import determinant_as_product


class TwoSimplicialAttention(nn.Module):
    r"""Causal 2-simplicial self-attention with projections (arXiv 2507.02754, section 4; windows: section 6).

    Each token attends to *pairs* (j, k) of tokens in its past instead of single tokens. For token i and one head, with
    :math:`q = W_q x`, :math:`k^1 = W_{k1} x`, :math:`k^2 = W_{k2} x`, :math:`v^1 = W_{v1} x`, :math:`v^2 = W_{v2} x`:

    .. math::
        A_{ijk} = \text{scale} \sum_d q_{id} k^1_{jd} k^2_{kd}, \qquad
        P_{i\cdot\cdot} = \operatorname{softmax}_{jk} A_{ijk}, \qquad
        o_i = \sum_{jk} P_{ijk} (v^1_j \odot v^2_k), \qquad y_i = W_o\, o_i

    where j runs over the last ``w1`` tokens up to and including i, and k over the last ``w2``.

    The layer carries no positions of its own. Rotary embeddings would not do: a trilinear form is not invariant under
    rotating its three arguments, so A would depend on absolute positions. In a decoder the dot-product layers in
    between carry them, and the windows give locality.

    Args:
        dim: size of the model dimension, the last one of the input and the output.
        heads: number of query heads.
        kv_heads: number of key/value heads, a divisor of ``heads`` (default ``heads``). Query head h reads key/value
            head ``h // (heads // kv_heads)``.
        head_dim: size of a head, a multiple of 8 up to 256 (default ``dim // heads``).
        w1, w2: window sizes, at least 1, the token itself included. The cost grows with ``w1 * w2``; the op is
            fastest when one of them is short. A window longer than the sequence is full causal attention.
        bias: whether the projections have a bias.
        scale: factor on the logits (default ``head_dim ** -0.5``).
        determinant: score by determinants of chunks of 3 dims instead, which no rotation of 3-space changes (section 5, see
            `simplex_ops.two_simplicial_attention`); head_dim is any number up to 128 then.
        device, dtype: of the parameters.

    Shapes: input and output ``[batch, length, dim]``; any batch, 0 included.

    Dtypes: float32, float64 and bfloat16 on the CPU; float32, float16 and bfloat16 on CUDA. Softmax and sums are in
    float32 (float64 for float64).

    Raises:
        ValueError: for a bad size, naming the argument, its value and what was expected.
        RuntimeError: from the op, for an unsupported dtype or device.

    Decoding (under ``torch.no_grad()``, else the cache keeps the graph of every step) keeps the last ``max(w1, w2)`` keys and
    values, whatever the length of the text::

        cache = layer.new_cache(batch)
        y = layer(prompt, cache, 0)  # [batch, n, dim]
        y = layer(token, cache, n)  # [batch, 1, dim], updates the cache in place
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        w1: int = 512,
        w2: int = 32,
        bias: bool = False,
        scale: float | None = None,
        determinant: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        expect_positive("TwoSimplicialAttention", w1=w1, w2=w2)
        kv_heads, head_dim = expect_heads("TwoSimplicialAttention", dim, heads, kv_heads, head_dim)
        if determinant and not 1 <= head_dim <= 128:
            raise ValueError(
                f"TwoSimplicialAttention: expected head_dim to be from 1 to 128 in the determinant form, got {head_dim}"
            )
        if not determinant and (head_dim % 8 or not 8 <= head_dim <= 256):
            raise ValueError(
                f"TwoSimplicialAttention: expected head_dim to be a multiple of 8 up to 256, got {head_dim}"
            )
        if scale is not None and not math.isfinite(scale):
            raise ValueError(f"TwoSimplicialAttention: expected scale to be finite, got {scale}")
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.w1 = w1
        self.w2 = w2
        self.scale = head_dim**-0.5 if scale is None else scale
        self.determinant = determinant

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        self.wq = linear(dim, heads * head_dim)
        self.wk1 = linear(dim, kv_heads * head_dim)
        self.wk2 = linear(dim, kv_heads * head_dim)
        self.wv1 = linear(dim, kv_heads * head_dim)
        self.wv2 = linear(dim, kv_heads * head_dim)
        self.wo = linear(heads * head_dim, dim)

    def forward(
        self,
        x: Tensor,
        cache: list[Tensor] | None = None,
        position: int = 0,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Attend within ``x`` [batch, length, dim] and, with a cache, to the ``position`` tokens that came before it.

        ``position`` is the number of tokens that the cache has seen; the cache is updated in place. Without a cache,
        ``cu_seqlens`` (int32, from 0 to length) says which sequences lie in ``x``, a batch of 1: none sees another.
        """
        q = self.wq(x).unflatten(-1, (self.heads, self.head_dim))
        kv_shape = (self.kv_heads, self.head_dim)
        k1 = self.wk1(x).unflatten(-1, kv_shape)
        k2 = self.wk2(x).unflatten(-1, kv_shape)
        v1 = self.wv1(x).unflatten(-1, kv_shape)
        v2 = self.wv2(x).unflatten(-1, kv_shape)
        if cache is not None:
            if cu_seqlens is not None:
                raise ValueError("TwoSimplicialAttention: expected cu_seqlens to be None with a cache, got a tensor")
            self._check_cache(cache[0], x.size(0), position, x.size(1))
            k1, k2, v1, v2 = _extend(cache[0], torch.stack((k1, k2, v1, v2)), position).unbind(0)
        if self.determinant:
            q, k1, k2, v1, v2 = determinant_as_product(q, k1, k2, v1, v2)
        # The dispatcher's op rather than the Python function: TorchScript compiles this line too.
        out = torch.ops.simplex.two_simplicial_attention(q, k1, k2, v1, v2, self.w1, self.w2, self.scale, cu_seqlens)[0]
        return self.wo(out[..., : self.head_dim].flatten(-2))

    def _check_cache(self, ring: Tensor, batch: int, position: int, length: int) -> None:
        if ring.size(1) != batch:
            raise ValueError(f"TwoSimplicialAttention: expected a cache of {batch} sequences, got {ring.size(1)}")
        if position < 0:
            raise ValueError(f"TwoSimplicialAttention: expected position to be at least 0, got {position}")
        window = ring.size(3)
        if window < max(self.w1, self.w2) and position + length > window:
            raise ValueError(
                f"TwoSimplicialAttention: expected position and length to fit a cache of {window} tokens, "
                f"got {position} and {length}"
            )

    @torch.jit.export
    def new_cache(self, batch: int, max_length: int | None = None) -> list[Tensor]:
        """An empty cache for ``batch`` sequences, for every call of ``forward`` that continues them.

        It holds one ring [4, batch, 2, W, kv_heads, head_dim] for k1, k2, v1, v2, each row twice, with
        W = max(w1, w2), or ``max_length`` where no sequence will get longer than that.
        """
        window = max(self.w1, self.w2)
        if max_length is not None:
            window = max(1, min(window, max_length))
        weight = self.wq.weight
        shape = [4, batch, 2, window, self.kv_heads, self.head_dim]
        return [torch.zeros(shape, dtype=weight.dtype, device=weight.device)]

    def extra_repr(self) -> str:
        sizes = f"heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, w1={self.w1}, w2={self.w2}"
        return f"{sizes}, scale={self.scale:g}, determinant={self.determinant}"


def _extend(ring: Tensor, new: Tensor, position: int) -> Tensor:
    """Write ``new`` [4, B, T, H, D], which starts at ``position``, to the ring and return the rows it may attend to.

    The op tells windows by row order, so rows must come out in the order of time. A ring [4, B, 2, W, H, D] therefore
    keeps two copies of each row, at p % W and p % W + W of its flattened view: whatever the position, the last W rows
    are one slice of it, and a decoding step writes two rows and moves none.
    """
    if new.size(2) == 1:
        _write(ring, new, position)
        return _newest(ring, position + 1).to(new.dtype)
    # A chunk's first rows need rows that its last rows are about to overwrite.
    seen = torch.cat((_newest(ring, position).to(new.dtype), new), dim=2)
    _write(ring, new, position)
    return seen


def _newest(ring: Tensor, position: int) -> Tensor:
    window = ring.size(3)
    rows = min(position, window)
    end = (position - 1) % window + window + 1
    return ring.flatten(2, 3).narrow(2, end - rows, rows)


def _write(ring: Tensor, new: Tensor, position: int) -> None:
    window = ring.size(3)
    if new.size(2) == 1:
        ring.select(3, position % window).copy_(new)  # both copies, in one kernel
        return
    end = position + new.size(2)
    rows = min(new.size(2), window)
    slots = torch.arange(end - rows, end, device=ring.device) % window
    ring[:, :, :, slots] = new[:, :, new.size(2) - rows :].unsqueeze(2).to(ring.dtype)
