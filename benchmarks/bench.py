"""Speed of 2-simplicial attention next to a matrix product of the same FLOPs and to plain torch, in one run.

    python benchmarks/bench.py [--device cpu|cuda] [--quick] [--out benchmarks/results] [--plot FILE.json]

FLOP are 4 * D * Hq * (valid pairs) forward, three times that backward. "of matmul" is the op's FLOP rate over that of
torch.matmul (cuBLAS on the GPU) at the same dtype and FLOPs. Plain torch is tests/reference.py, where it fits in memory.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from common import RESULTS, median_ms, write

from simplex_ops.two_simplicial_attention import valid_pairs

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import reference

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FIELDS = ("dtype", "B", "N", "Hq", "Hkv", "D", "w1", "w2")
SHAPES = {
    "cpu": [
        ("fp32", 1, 1024, 8, 2, 64, 128, 16),
        ("bf16", 1, 1024, 8, 2, 64, 128, 16),
        ("fp32", 1, 1024, 8, 2, 64, 16, 128),
        ("fp32", 2, 512, 4, 4, 32, 64, 8),
    ],
    "cuda": [
        ("bf16", 4, 8192, 64, 1, 128, 512, 32),
        ("bf16", 4, 8192, 128, 1, 128, 512, 32),
        ("bf16", 4, 8192, 8, 1, 128, 512, 32),
        ("bf16", 4, 8192, 1, 1, 128, 512, 32),
        *(("bf16", 4, 8192, 64, 1, 128, *w) for w in ((128, 16), (128, 128), (256, 64), (1024, 32))),
        *(("bf16", 1, n, 64, 1, 128, 512, 32) for n in (512, 1024, 2048, 4096)),
        ("bf16", 1, 256, 64, 1, 128, 32, 32),
        *(("bf16", 2, 4096, 32, 32 // ratio, 128, 512, 32) for ratio in (1, 4, 8, 16)),
        ("bf16", 2, 4096, 32, 4, 64, 512, 32),
        ("fp16", 4, 8192, 64, 1, 128, 512, 32),
        ("fp32", 1, 2048, 64, 1, 128, 512, 32),
        ("bf16", 1, 2048, 8, 1, 256, 512, 32),
    ],
}


def matmul_rate(flop: float, dtype: torch.dtype, device: str) -> float:
    """FLOP per ms of a square product of `flop`, or of the largest that is still sensible."""
    n = max(128, min(8192, round((flop / 2) ** (1 / 3) / 64) * 64))
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / median_ms(lambda: a @ b, device)


def measure(shape: tuple, device: str) -> dict:
    dtype, batch, n, heads, kv_heads, dim, w1, w2 = (DTYPES.get(shape[0]), *shape[1:])
    q = torch.randn(batch, n, heads, dim, device=device).to(dtype)
    keys = [torch.randn(batch, n, kv_heads, dim, device=device).to(dtype) for _ in range(4)]
    grad = torch.randn_like(q)
    flop = 4 * dim * heads * batch * valid_pairs(n, n, w1, w2)
    op, backward = torch.ops.simplex.two_simplicial_attention, torch.ops.simplex.two_simplicial_attention_backward
    with torch.no_grad():
        out, lse = op(q, *keys, w1, w2)
        rate = matmul_rate(flop, dtype, device)
        times = {
            "forward": median_ms(lambda: op(q, *keys, w1, w2), device),
            "backward": median_ms(lambda: backward(grad, None, q, *keys, out, lse, w1, w2), device),
        }
        row = dict(zip(FIELDS, shape, strict=True)) | {"matmul_tflops": rate / 1e9}
        # The reference gathers every query's window: on the GPU only where that is quick.
        if device == "cpu" or heads * batch * n * w1 * w2 < 3e10:
            row["plain_torch_forward_us"] = 1e3 * median_ms(
                lambda: reference.two_simplicial_attention(q, *keys, w1, w2), device, most=3
            )
    for direction, times_flop in (("forward", 1), ("backward", 3)):
        achieved = times_flop * flop / times[direction]
        row |= {
            f"{direction}_us": times[direction] * 1e3,
            f"{direction}_tflops": achieved / 1e9,
            f"{direction}_of_matmul": achieved / rate,
        }
    return row


def line(row: dict) -> str:
    shape = f"{row['dtype']} B{row['B']} N{row['N']} Hq{row['Hq']} Hkv{row['Hkv']} D{row['D']} {row['w1']}x{row['w2']}"
    text = f"{shape:<42}"
    for direction in ("forward", "backward"):
        text += f" {direction} {row[f'{direction}_us']:10.1f} us {row[f'{direction}_tflops']:8.3f} TFLOP/s"
        text += f" {row[f'{direction}_of_matmul']:5.2f} of matmul"
    plain = row.get("plain_torch_forward_us")
    return text + (f"  plain torch / op {plain / row['forward_us']:7.1f}" if plain else "")


def plot(path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    content = json.loads(path.read_text())
    rows, where = content["rows"], content["machine"]
    labels = [line(row)[:42].strip() for row in rows]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.34 * len(rows)))
    for shift, direction in ((-0.2, "forward"), (0.2, "backward")):
        axes.barh(
            [i + shift for i in range(len(rows))], [r[f"{direction}_tflops"] for r in rows], 0.38, label=direction
        )
    axes.plot(
        [r["matmul_tflops"] for r in rows], range(len(rows)), "k|", markersize=12, label="matmul of the same FLOPs"
    )
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("TFLOP/s")
    axes.set_title(
        f"2-simplicial attention, {where['hardware']}, torch {where['torch']}, {where['date']}, {where['commit']}",
        fontsize=8,
    )
    axes.legend(fontsize=7)
    figure.tight_layout()
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=120)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="the first four shapes only")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, metavar="FILE.json", help="draw an earlier run instead of measuring")
    args = parser.parse_args()
    if args.plot:
        print(plot(args.plot))
        return
    rows = []
    for shape in SHAPES[args.device][: 4 if args.quick else None]:
        rows.append(measure(shape, args.device))
        print(line(rows[-1]), flush=True)
    print(write("two_simplicial_attention", args.device, rows, args.out))


if __name__ == "__main__":
    main()
