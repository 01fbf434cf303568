"""What a Grassmann layer looks at: the planes and angles that its tokens span, as numbers and as a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import simplex_ops
from simplex_ops.nn.grassmann_mixing import GrassmannMixing


@dataclass(frozen=True)
class PairGeometry:
    """The geometry of the pairs (t, t - offset) of one layer.

    Attributes:
        offsets: m of them.
        coordinates: [batch, length, m, r * (r - 1) / 2], the Plücker coordinates of each pair's plane, of norm 1, in the
            order of torch.triu_indices(r, r, 1); 0 where there is no pair or no plane.
        angle: [batch, length, m], the angle theta between the two reduced tokens in radians, from 0 to pi; NaN where there
            is no pair or a token is 0.
    """

    offsets: tuple[int, ...]
    coordinates: Tensor
    angle: Tensor

    def plot(self, path: str | Path, sequence: int = 0, tokens: Sequence[str] | None = None) -> Path:
        """Draws one sequence of the batch to an image file: theta of every pair, then the coordinates, offset by offset.

        ``tokens`` are labels of the time axis. Needs matplotlib.
        """
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        angle = self.angle[sequence].detach().cpu().T.rad2deg()
        coordinates = self.coordinates[sequence].detach().cpu().permute(1, 2, 0)  # [m, P, length]
        count, length = angle.shape
        figure, axes = plt.subplots(
            1 + count, 1, sharex=True, layout="constrained", figsize=(min(16, 4 + 0.12 * length), 1.5 + 1.3 * count)
        )
        image = axes[0].imshow(angle, aspect="auto", cmap="viridis", vmin=0, vmax=180, interpolation="nearest")
        axes[0].set_yticks(range(count), [str(offset) for offset in self.offsets])
        axes[0].set(ylabel="offset", title="angle theta of the pair (t, t - offset); white: no pair")
        figure.colorbar(image, ax=axes[0], label="degrees", ticks=[0, 90, 180])
        largest = coordinates.abs().max().item() if coordinates.numel() else 1.0
        for axis, offset, rows in zip(axes[1:], self.offsets, coordinates, strict=True):
            image = axis.imshow(rows, aspect="auto", cmap="RdBu", vmin=-largest, vmax=largest, interpolation="nearest")
            axis.set(ylabel=f"offset {offset}")
        axes[1].set_title("Plücker coordinates of its plane, one a row")
        figure.colorbar(image, ax=list(axes[1:]))
        if tokens is not None:
            axes[-1].set_xticks(range(length), list(tokens), fontsize=7)
        axes[-1].set_xlabel("t")
        figure.savefig(path, dpi=90)
        plt.close(figure)
        return Path(path)


@torch.no_grad()
def interpret(
    layer: GrassmannMixing, x: Tensor, valid: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> PairGeometry:
    """The Plücker coordinates and the angle theta of each pair (t, offset) that ``layer`` mixes when it is given ``x``.

    `GrassmannMixing` averages the coordinates over the offsets and maps the mean to the model dimension, so these are all
    that it takes from the past. (Only their sum counts: see docs/grassmann.md on what one plane per token can tell.)

    Args:
        layer: the layer.
        x: its input [batch, length, dim].
        valid, cu_seqlens: as in `GrassmannMixing.forward`.

    Memory is that of the coordinates, batch * length * len(offsets) * r * (r - 1) / 2 values: for looking, not for training.

    >>> geometry = interpret(GrassmannMixing(64, rank=8, offsets=(1, 3)), torch.randn(1, 10, 64))
    >>> geometry.coordinates.shape, geometry.angle.shape
    (torch.Size([1, 10, 2, 28]), torch.Size([1, 10, 2]))
    """
    z = layer.reduce(x)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    unit = z / z.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
    length = z.size(1)
    position = torch.arange(length, device=z.device)
    if cu_seqlens is not None:
        position = position - cu_seqlens[torch.searchsorted(cu_seqlens, position.to(cu_seqlens.dtype), right=True) - 1]
    counts = z.ne(0).any(-1)
    if valid is not None:
        counts = counts & valid
    planes, angles = [], []
    for offset in layer.offsets:
        planes.append(simplex_ops.plucker_mean(z, [offset], valid=valid, cu_seqlens=cu_seqlens))
        source = (torch.arange(length, device=z.device) - offset).clamp(min=0)
        earlier = unit[:, source]
        cosine = (unit * earlier).sum(-1)
        # Of what is left, not from the cosine, which rounds small angles away.
        sine = (earlier - cosine[..., None] * unit).norm(dim=-1)
        pairs = counts & counts[:, source] & (position >= offset)
        angles.append(torch.where(pairs, torch.atan2(sine, cosine), torch.nan))
    return PairGeometry(tuple(layer.offsets), torch.stack(planes, 2), torch.stack(angles, 2))
