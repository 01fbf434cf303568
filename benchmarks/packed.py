"""Packed sequences: 2-simplicial attention with cu_seqlens beside a batch of the same sequences, and over documents of mixed lengths.

    python benchmarks/packed.py [--out benchmarks/results]

Needs a GPU; about 20 s. Equal lengths: 16,384 tokens in one row with cu_seqlens, and as a batch without, by turns; "of batch" is the
time of the first over that of the second. Documents: lengths drawn from a log-normal distribution (median 700, as text has them),
one row; TFLOP/s counts the pairs that exist, 4 * D * Hq of each forward and three times that backward.
"""

import argparse
import itertools
from pathlib import Path

import torch
from common import RESULTS, medians_ms, write

from simplex_ops.two_simplicial_attention import valid_pairs

TOKENS, HEAD_DIM = 16384, 128
HEADS = ((64, 1), (32, 4), (32, 32))
WINDOWS = ((512, 32), (128, 16))
LENGTHS = (128, 512, 2048, 16384)
OP, BACKWARD = torch.ops.simplex.two_simplicial_attention, torch.ops.simplex.two_simplicial_attention_backward


def documents() -> list[int]:
    """Lengths of documents that fill TOKENS, the last one cut off."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while (left := TOKENS - sum(lengths)) > 0:
        length = 700 * torch.randn(1, generator=generator).exp().item()
        lengths.append(min(max(round(length), 1), left))
    return lengths


def calls(name: str, tensors: list[torch.Tensor], w1: int, w2: int, cu_seqlens: torch.Tensor | None) -> dict:
    grad, *inputs = tensors
    out, lse = OP(*inputs, w1, w2, None, cu_seqlens)
    return {
        f"{name}_forward": lambda: OP(*inputs, w1, w2, None, cu_seqlens),
        f"{name}_backward": lambda: BACKWARD(grad, None, *inputs, out, lse, w1, w2, None, cu_seqlens),
    }


def measure(heads: int, kv_heads: int, w1: int, w2: int, lengths: list[int]) -> dict:
    shapes = [heads, heads, *[kv_heads] * 4]  # grad_out, q, k1, k2, v1, v2
    tensors = [torch.randn(1, TOKENS, h, HEAD_DIM, device="cuda").bfloat16() for h in shapes]
    starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
    with torch.no_grad():
        timed = calls("packed", tensors, w1, w2, starts)
        equal = len(set(lengths)) == 1
        if equal:
            timed |= calls("batch", [x.unflatten(1, (-1, lengths[0]))[0] for x in tensors], w1, w2, None)
        ms = medians_ms(timed, "cuda", 0.2)
    flop = 4 * HEAD_DIM * heads * sum(valid_pairs(n, n, w1, w2) for n in lengths)
    row = {"Hq": heads, "Hkv": kv_heads, "D": HEAD_DIM, "w1": w1, "w2": w2, "sequences": len(lengths)}
    row["length"] = lengths[0] if equal else "documents"
    for direction, times in (("forward", 1), ("backward", 3)):
        row[f"{direction}_us"] = 1e3 * ms[f"packed_{direction}"]
        row[f"{direction}_tflops"] = times * flop / ms[f"packed_{direction}"] / 1e9
        if equal:
            row[f"{direction}_of_batch"] = ms[f"packed_{direction}"] / ms[f"batch_{direction}"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    cases = [*([n] * (TOKENS // n) for n in LENGTHS), documents()]
    rows = []
    for windows, shape, lengths in itertools.product(WINDOWS, HEADS, cases):
        row = measure(*shape, *windows, lengths)
        rows.append(row)
        text = "Hq {Hq} Hkv {Hkv} {w1} x {w2}, {sequences} of {length}".format(**row)
        for direction in ("forward", "backward"):
            text = f"{text:<50} {direction} {row[f'{direction}_us']:9.0f} us {row[f'{direction}_tflops']:4.0f} TFLOP/s"
            text += f" {row[f'{direction}_of_batch']:5.2f} of batch" if f"{direction}_of_batch" in row else ""
        print(text, flush=True)
    print(write("packed", "cuda", rows, args.out))


if __name__ == "__main__":
    main()
