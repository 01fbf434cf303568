"""Tiles that were measured for one row of the kernel table, by its name: each takes the place of what its family would choose.

`python benchmarks/tune.py rows DIR/tuned.json --write` adds the tiles that won and where.
"""

TILES: dict[str, dict[str, int]] = {
    # docs/kernel_trials.md
    "two_simplicial_bwd_dkv-dtype=bf16-HEAD_DIM=256-sm90a": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1},
    # docs/kernel_trials.md
    "two_simplicial_bwd_dkv-dtype=fp16-HEAD_DIM=256-sm90a": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1},
    # docs/kernel_trials.md
    "two_simplicial_bwd_dq-dtype=bf16-HEAD_DIM=256-SHARE=64-sm90a": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1},
    # docs/kernel_trials.md
    "two_simplicial_bwd_dq-dtype=bf16-HEAD_DIM=256-SHARE=8-sm90a": {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
    # docs/kernel_trials.md
    "two_simplicial_bwd_dq-dtype=fp16-HEAD_DIM=256-SHARE=64-sm90a": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1},
    # docs/kernel_trials.md
    "two_simplicial_bwd_dq-dtype=fp16-HEAD_DIM=256-SHARE=8-sm90a": {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
    # docs/kernel_trials.md
    "two_simplicial_fwd-dtype=bf16-HEAD_DIM=256-SHARE=1-sm90a": {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 1},
    # docs/kernel_trials.md
    "two_simplicial_fwd-dtype=bf16-HEAD_DIM=256-SHARE=64-sm90a": {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 1},
    # docs/kernel_trials.md
    "two_simplicial_fwd-dtype=bf16-HEAD_DIM=256-SHARE=8-sm90a": {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 1},
    # docs/kernel_trials.md
    "two_simplicial_fwd-dtype=fp16-HEAD_DIM=256-SHARE=1-sm90a": {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 1},
    # docs/kernel_trials.md
    "two_simplicial_fwd-dtype=fp16-HEAD_DIM=256-SHARE=64-sm90a": {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 1},
    # docs/kernel_trials.md
    "two_simplicial_fwd-dtype=fp16-HEAD_DIM=256-SHARE=8-sm90a": {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 1},
}
