"""What modules check their sizes with."""


def expect_positive(owner: str, **sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{owner}: expected {name} to be at least 1, got {value}")


def expect_heads(owner: str, dim: int, heads: int, kv_heads: int | None, head_dim: int | None) -> tuple[int, int]:
    """kv_heads and head_dim, where None stands for heads and for dim / heads."""
    kv_heads = heads if kv_heads is None else kv_heads
    expect_positive(owner, dim=dim, heads=heads, kv_heads=kv_heads)
    if heads % kv_heads:
        raise ValueError(f"{owner}: expected heads to be a multiple of kv_heads ({kv_heads}), got {heads}")
    if head_dim is None:
        if dim % heads:
            raise ValueError(
                f"{owner}: expected dim to be a multiple of heads ({heads}) when head_dim is not given, got {dim}"
            )
        head_dim = dim // heads
    expect_positive(owner, head_dim=head_dim)
    return kv_heads, head_dim
