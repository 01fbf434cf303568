"""2-simplicial attention as a mixer: "two_simplicial"."""

from simplex_ops.models.config import DecoderConfig
from simplex_ops.models.registry import register_mixer
from simplex_ops.nn import TwoSimplicialAttention


def two_simplicial(
    config: DecoderConfig, w1: int = 512, w2: int = 32, determinant: bool = False
) -> TwoSimplicialAttention:
    return TwoSimplicialAttention(
        config.dim, config.heads, config.kv_heads, config.head_dim, w1=w1, w2=w2, determinant=determinant
    )


register_mixer("two_simplicial", two_simplicial)
