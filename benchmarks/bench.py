"""Speed of 2-simplicial attention next to a matrix product of the same FLOPs and to plain torch, in one run.

    python benchmarks/bench.py [--device cpu|cuda] [--quick | --report] [--out benchmarks/results] [--plot FILE.json | --table FILE.json]

FLOP are 4 * D * Hq * (valid pairs) forward, three times that backward. "of matmul" is the op's FLOP rate over that of
torch.matmul (cuBLAS on the GPU) at the same dtype and FLOPs. Plain torch is tests/reference.py, where it is quick.
--report adds sweeps over the length, the GQA ratio and the windows, and draws them: less than a minute on an H100.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch
from common import DTYPES, RESULTS, matmul_of, median_ms, medians_ms, write

from simplex_ops.two_simplicial_attention import valid_pairs

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import reference

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
        *(("fp32", 1, 2048, 64, 1, dim, 512, 32) for dim in (128, 64)),
        ("fp32", 4, 2048, 8, 1, 128, 512, 32),
        ("fp32", 4, 4096, 1, 1, 128, 512, 32),
        ("bf16", 1, 2048, 8, 1, 256, 512, 32),
    ],
}


WINDOWS = {
    "cpu": [(32, 4), (32, 32), (64, 16), (128, 8), (256, 8)],
    "cuda": [(128, 16), (128, 128), (256, 64), (512, 32), (1024, 32)],
}
LENGTHS = {"cpu": [128, 256, 512], "cuda": [256 << i for i in range(7)]}
RATIOS = {"cpu": [1, 2, 4, 8], "cuda": [1 << i for i in range(8)]}


def sweeps(device: str) -> list[tuple[str, object, tuple]]:
    """(sweep, its coordinate, shape): one of length, GQA ratio and windows moves, the others stay."""
    dtype, heads, most_heads, length, long, windows = {
        "cpu": ("fp32", 8, 8, 256, 256, (128, 8)),
        "cuda": ("bf16", 64, 128, 2048, 8192, (512, 32)),
    }[device]
    points = []
    for dim in (128, 64):
        points += [("length", n, (dtype, 1, n, heads, 1, dim, *windows)) for n in LENGTHS[device]]
        points += [("ratio", r, (dtype, 1, length, most_heads, most_heads // r, dim, *windows)) for r in RATIOS[device]]
        points += [("windows", f"{w[0]} x {w[1]}", (dtype, 1, long, heads, 1, dim, *w)) for w in WINDOWS[device]]
    return points


def measure(shape: tuple, device: str, budget_s: float, plain_torch: bool = True) -> dict:
    dtype, batch, n, heads, kv_heads, dim, w1, w2 = (DTYPES.get(shape[0]), *shape[1:])
    q = torch.randn(batch, n, heads, dim, device=device).to(dtype)
    keys = [torch.randn(batch, n, kv_heads, dim, device=device).to(dtype) for _ in range(4)]
    grad = torch.randn_like(q)
    flop = 4 * dim * heads * batch * valid_pairs(n, n, w1, w2)
    op, backward = torch.ops.simplex.two_simplicial_attention, torch.ops.simplex.two_simplicial_attention_backward
    with torch.no_grad():
        out, lse = op(q, *keys, w1, w2)
        matmul, matmul_flop = matmul_of(flop, dtype, device)
        calls = {
            "matmul": matmul,
            "forward": lambda: op(q, *keys, w1, w2),
            "backward": lambda: backward(grad, None, q, *keys, out, lse, w1, w2),
        }
        times = medians_ms(calls, device, 3 * budget_s)
        rate = matmul_flop / times["matmul"]
        row = dict(zip(FIELDS, shape, strict=True)) | {"matmul_tflops": rate / 1e9}
        # The reference gathers every query's window: on the GPU only where that is quick.
        if plain_torch and (device == "cpu" or heads * batch * n * w1 * w2 < 3e9):
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


def table(path: Path) -> str:
    """The shapes of a run as the README's table."""
    lines = [
        "| dtype, B, N, Hq / Hkv, D, windows | forward us | TFLOP/s | of matmul | backward us | TFLOP/s | of matmul |"
    ]
    lines.append("|---" * 7 + "|")
    for row in json.loads(path.read_text())["rows"]:
        if "sweep" not in row:
            cells = ["{dtype}, {B}, {N}, {Hq} / {Hkv}, {D}, {w1} x {w2}".format(**row)]
            for d in ("forward", "backward"):
                cells += [f"{row[f'{d}_us']:,.0f}", f"{row[f'{d}_tflops']:.0f}", f"{row[f'{d}_of_matmul']:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


AXES = {
    "length": "length, one sequence, one kv head",
    "ratio": "query heads per kv head",
    "windows": "windows",
}


def plot(path: Path) -> Path:
    """The sweeps: TFLOP/s above, the fraction of a matmul of the same FLOPs below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    content = json.loads(path.read_text())
    rows, where = [row for row in content["rows"] if "sweep" in row], content["machine"]
    if not rows:
        raise SystemExit(f"expected a run with --report, got {path}, which has no sweeps")
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), sharex="col", sharey="row", layout="constrained")
    for column, (sweep, label) in enumerate(AXES.items()):
        mine = [row for row in rows if row["sweep"] == sweep]
        ticks = list(dict.fromkeys(str(row["at"]) for row in mine))
        for dim, (kind, ax) in itertools.product((128, 64), zip(("tflops", "of_matmul"), axes[:, column], strict=True)):
            of_dim = [row for row in mine if row["D"] == dim]
            for direction, color in (("forward", "tab:blue"), ("backward", "tab:orange")):
                style = dict(color=color, marker="o", ls="-" if dim == 128 else "--", ms=4)
                ax.plot(
                    ticks, [r[f"{direction}_{kind}"] for r in of_dim], label=f"{direction}, head_dim {dim}", **style
                )
            if kind == "tflops" and dim == 128:
                rate = [r["matmul_tflops"] for r in of_dim]
                ax.plot(ticks, rate, color="gray", ls=":", label="matmul of the forward pass's FLOPs")
        same = mine[0]
        fixed = {
            "length": f"Hq {same['Hq']}, windows {same['w1']} x {same['w2']}",
            "ratio": f"Hq {same['Hq']}, N {same['N']}, windows {same['w1']} x {same['w2']}",
            "windows": f"Hq {same['Hq']}, Hkv {same['Hkv']}, N {same['N']}",
        }
        axes[0, column].set_title(f"{fixed[sweep]}, {same['dtype']}", fontsize=9)
        axes[1, column].set_xlabel(label)
        for ax in axes[:, column]:
            ax.grid(alpha=0.3)
    for ax in axes[:, 0]:  # the rows share theirs
        ax.set_ylim(bottom=0)
    axes[0, 0].set_ylabel("TFLOP/s")
    axes[1, 0].set_ylabel("fraction of matmul")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(
        f"2-simplicial attention, {where['hardware']}, torch {where['torch']}, {where['date']}, {where['commit']}",
        fontsize=10,
    )
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=110)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="the first four shapes only")
    parser.add_argument("--report", action="store_true", help="all shapes and the sweeps, with a plot of these")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, metavar="FILE.json", help="draw an earlier run instead of measuring")
    parser.add_argument("--table", type=Path, metavar="FILE.json", help="print an earlier run as a table in Markdown")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return
    if args.plot:
        print(plot(args.plot))
        return
    rows: list[dict] = []
    try:
        for shape in SHAPES[args.device][: 4 if args.quick else None]:
            rows.append(measure(shape, args.device, 0.15 if args.report else 0.5))
            print(line(rows[-1]), flush=True)
        for sweep, at, shape in sweeps(args.device) if args.report else []:
            rows.append(measure(shape, args.device, 0.1, plain_torch=False) | {"sweep": sweep, "at": at})
            print(f"{sweep:<8} {line(rows[-1])}", flush=True)
    finally:
        path = write("two_simplicial_attention", args.device, rows, args.out)
        print(path)
    if args.report:
        print(plot(path))


if __name__ == "__main__":
    main()
