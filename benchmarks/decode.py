"""Decoding with 2-simplicial attention: the op's time on the GPU for few queries over a full window, one call as in a step of `generate`.

    python benchmarks/decode.py [--out benchmarks/results]

Needs a GPU; about 20 s. "us" is of the GPU alone (a CUDA graph), "portable" the same in a process with SIMPLEX_KERNELS=portable,
whose kernel walks blocks of rows. "keys GB/s" counts each of the four windows' rows once.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from common import RESULTS, graph_ms, write

import simplex_ops

FIELDS = ("w1", "w2", "Hq", "Hkv", "B", "Nq")
HEADS = ((64, 1), (128, 1), (32, 4), (32, 32))
CASES = list(itertools.product(((512, 32), (128, 16)), HEADS, (1, 8, 64), (1, 4, 16)))
HEAD_DIM = 128


def measure(w1: int, w2: int, heads: int, kv_heads: int, batch: int, queries: int) -> float:
    """us of a call, bf16."""
    q = torch.randn(batch, queries, heads, HEAD_DIM, device="cuda").bfloat16()
    keys = [torch.randn(batch, w1 + queries - 1, kv_heads, HEAD_DIM, device="cuda").bfloat16() for _ in range(4)]
    with torch.no_grad():
        return 1e3 * graph_ms(lambda: simplex_ops.two_simplicial_attention(q, *keys, w1, w2), calls=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--json", action="store_true", help="only the times of this process, as JSON")
    args = parser.parse_args()
    cases = [(*w, *h, batch, queries) for w, h, batch, queries in CASES]
    if args.json:
        print(json.dumps([measure(*case) for case in cases]))
        return
    ours = [measure(*case) for case in cases]
    env = os.environ | {"SIMPLEX_KERNELS": "portable"}
    done = subprocess.run([sys.executable, __file__, "--json"], env=env, stdout=subprocess.PIPE, text=True, check=True)
    rows = []
    for case, us, portable in zip(cases, ours, json.loads(done.stdout), strict=True):
        row = dict(zip(FIELDS, case, strict=True)) | {"us": us, "portable_us": portable}
        window = row["w1"] + row["w2"] + 2 * (row["Nq"] - 1)
        row["keys_gb_per_s"] = row["B"] * row["Hkv"] * window * 2 * HEAD_DIM * 2 / us / 1e3
        rows.append(row)
        shape = "{w1} x {w2} Hq {Hq} Hkv {Hkv} B {B} Nq {Nq}".format(**row)
        print(
            f"{shape:<36} {us:8.1f} us  portable {portable:8.1f} us {portable / us:5.1f}x  keys {row['keys_gb_per_s']:6.0f} GB/s"
        )
    print(write("decode", "cuda", rows, args.out))


if __name__ == "__main__":
    main()
