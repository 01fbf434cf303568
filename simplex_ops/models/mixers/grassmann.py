"""Grassmann mixing as a mixer: "grassmann"."""

from collections.abc import Sequence

from simplex_ops.models.config import DecoderConfig
from simplex_ops.models.registry import register_mixer
from simplex_ops.nn import GrassmannMixing


def grassmann(config: DecoderConfig, rank: int = 32, offsets: Sequence[int] = (1, 2, 4, 8, 12, 16)) -> GrassmannMixing:
    return GrassmannMixing(config.dim, rank, offsets)


register_mixer("grassmann", grassmann)
