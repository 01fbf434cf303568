"""Speed and memory of Grassmann mixing next to plain torch, and of the layer next to one of attention, in one run.

    python benchmarks/grassmann.py [--device cpu|cuda] [--only mixing|layers] [--out benchmarks/results] [--plot FILE.json]

Mixing is `grassmann_mix`, forward + backward, next to the paper's equations in plain torch, eager and under torch.compile
(the first shape only: compiling takes longer than all the rest), and next to what torch.compile makes of equations rewritten for
it, without an index. "saved" is what the graph keeps for the backward pass, weights aside. "of roofline" is the least time that
the bytes (each input, output and gradient once) or the products' FLOP can take at the rates of a copy and a matmul measured in
the same run, over the time taken. "products us" are the three matrix products alone (pbar W^T, and both gradients' on a pbar in
memory), by cuBLAS, "over products" the time taken over theirs. Layers are whole, projections included, at one number of tokens:
a layer that is linear in the length takes the same time in each row. On the GPU, "gpu us" are calls replayed from a CUDA graph,
without the host's time between kernels; the other times are those of eager calls, host included.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import RESULTS, graph_ms, median_ms, write
from torch import Tensor, nn

import simplex_ops
from simplex_ops.models import GrassmannLM
from simplex_ops.nn import GrassmannMixing

OFFSETS = (1, 2, 4, 8, 12, 16)
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
MIXING = {  # batch, length, r, d
    "cpu": [(8, 256, 32, 256), (4, 128, 32, 256), (1, 2048, 32, 256), (2, 256, 64, 1024)],
    "cuda": [(32, 512, 32, 256), (32, 512, 64, 1024), (128, 128, 32, 256), (8, 2048, 32, 256), (2, 8192, 32, 256)],
}
LAYERS = {  # tokens, lengths
    "cpu": (4096, [128, 256, 512, 1024, 2048, 4096]),
    "cuda": (65536, [128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536]),
}
DIM, HEADS = 256, 4


def naive_mix(z: Tensor, weight: Tensor, bias: Tensor, offsets: tuple[int, ...], eps: float = 1e-6) -> Tensor:
    """The paper's equations, the way they are usually written down, in the dtype of z."""
    i, j = torch.triu_indices(z.shape[-1], z.shape[-1], 1, device=z.device)
    position = torch.arange(z.shape[1], device=z.device)
    total, count = 0, 0
    for offset in offsets:
        earlier = F.pad(z, (0, 0, offset, 0))[:, : z.shape[1]]
        p = z[..., i] * earlier[..., j] - z[..., j] * earlier[..., i]
        total = total + p / p.norm(dim=-1, keepdim=True).clamp(min=eps)
        count = count + (position >= offset).to(z.dtype)
    return F.linear(total / count.clamp(min=1)[:, None], weight) + bias * (count > 0)[:, None]


def outer_mix(z: Tensor, weight: Tensor, bias: Tensor, offsets: tuple[int, ...], eps: float = 1e-6) -> Tensor:
    """The same by whole r x r matrices: twice the products, but no gather, whose gradient is a scatter with atomics."""
    r = z.shape[-1]
    i, j = torch.triu_indices(r, r, 1, device=z.device)
    position = torch.arange(z.shape[1], device=z.device)
    total, count = 0, 0
    for offset in offsets:
        earlier = F.pad(z, (0, 0, offset, 0))[:, : z.shape[1]]
        p = z[..., :, None] * earlier[..., None, :]
        p = p - p.mT
        norm = (p.float().square().sum((-2, -1), keepdim=True) / 2).sqrt().clamp(min=eps)  # each plane is there twice
        total = total + p / norm.to(p.dtype)
        count = count + (position >= offset).to(z.dtype)
    square = z.new_zeros(weight.shape[0], r * r).index_copy(1, i * r + j, weight)
    return F.linear((total / count.clamp(min=1)[:, None, None]).flatten(-2), square) + bias * (count > 0)[:, None]


class Attention(nn.Module):
    """Causal dot-product attention of one width, projections included."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def step(function: Callable, inputs: list[Tensor], grad: Tensor, weights: list[Tensor] | None = None) -> Callable:
    """A forward and a backward pass; `weights` are leaves that the function itself holds."""
    return lambda: torch.autograd.grad(function(*inputs), [*inputs, *(weights or [])], grad)


def saved_bytes(function: Callable, inputs: list[Tensor]) -> int:
    """What autograd keeps, each memory once, the inputs themselves not counted but for the first, the activation."""
    known = {x.untyped_storage().data_ptr() for x in inputs[1:]}
    saved = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        function(*inputs)
    return sum(saved.values())


def rates(device: str) -> tuple[float, float]:
    """Bytes and FLOP per ms, of a large copy and a large product."""
    numel, n = {"cpu": (1 << 24, 1024), "cuda": (1 << 29, 8192)}[device]
    source = torch.ones(numel, dtype=DTYPE[device], device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / median_ms(lambda: target.copy_(source), device)
    a, b = (torch.randn(n, n, device=device).to(DTYPE[device]) for _ in range(2))
    return copy, 2 * n**3 / median_ms(lambda: a @ b, device)


def three_products(pbar: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a forward and a backward pass of mixing multiply: g, the gradient of pbar and that of the weight."""
    grad = grad.flatten(0, 1)
    return pbar @ weight.mT, grad @ weight, grad.mT @ pbar


def mixing(device: str, compiled: bool) -> list[dict]:
    copy, product = rates(device)
    rows = []
    for index, (batch, length, r, d) in enumerate(MIXING[device]):
        planes = r * (r - 1) // 2
        shapes = ((batch, length, r), (d, planes), (d,))
        inputs = [torch.randn(s, device=device).to(DTYPE[device]).requires_grad_() for s in shapes]
        grad = torch.randn(batch, length, d, device=device).to(DTYPE[device])

        def ours(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return simplex_ops.grassmann_mix(z, weight, bias, OFFSETS)

        def naive(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return naive_mix(z, weight, bias, OFFSETS)

        difference = (ours(*inputs) - naive(*inputs)).float().abs().max().item()
        if not difference < 0.05 * d**0.5:
            raise RuntimeError(f"ours and the naive form differ by {difference}")
        z, weight, bias = inputs
        moved = 3 * z.nbytes + 3 * weight.nbytes + 2 * bias.nbytes + 2 * grad.nbytes  # in and out of both passes
        least = max(moved / copy, 6 * batch * length * planes * d / product)
        time = median_ms(step(ours, inputs, grad), device)
        eager = median_ms(step(naive, inputs, grad), device, most=10)
        alone = graph_ms(step(ours, inputs, grad)) if device == "cuda" else time
        row = {
            "what": "mixing", "B": batch, "L": length, "r": r, "d": d, "us": 1e3 * time, "gpu us": 1e3 * alone,
            "least us": 1e3 * least, "of roofline": least / alone, "naive eager us": 1e3 * eager,
            "over eager": eager / time, "saved MiB": saved_bytes(ours, inputs) / 2**20,
            "naive saved MiB": saved_bytes(naive, inputs) / 2**20,
        }  # fmt: skip
        if device == "cuda":
            pbar = torch.randn(batch * length, planes, device=device).to(DTYPE[device])
            row["products us"] = 1e3 * graph_ms(partial(three_products, pbar, weight.detach(), grad))
            row["over products"] = row["gpu us"] / row["products us"]
        if compiled and index == 0:
            for name, form in (("naive", naive_mix), ("outer", outer_mix)):
                fast = step(torch.compile(partial(form, offsets=OFFSETS), dynamic=False, fullgraph=True), inputs, grad)
                row[f"{name} compiled us"] = 1e3 * median_ms(fast, device, most=10)
                row[f"over {name} compiled"] = row[f"{name} compiled us"] / row["us"]
        rows.append(row)
        print(line(row), flush=True)
    return rows


def layers(device: str) -> list[dict]:
    torch.manual_seed(0)
    modules = {"grassmann": GrassmannMixing(DIM), "attention": Attention(DIM, HEADS)}
    tokens, lengths = LAYERS[device]
    rows = []
    for length in lengths:
        row = {"what": "layer", "B": tokens // length, "L": length, "d": DIM}
        x = torch.randn(tokens // length, length, DIM, device=device).to(DTYPE[device]).requires_grad_()
        grad = torch.randn_like(x)
        for name, module in modules.items():
            module.to(device, DTYPE[device])
            both = step(module, [x], grad, list(module.parameters()))
            row[f"{name} us"] = 1e3 * median_ms(both, device, most=10)
            if device == "cuda":
                row[f"{name} gpu us"] = 1e3 * graph_ms(both, calls=2, replays=5)
        row["over attention"] = row["attention us"] / row["grassmann us"]
        if device == "cuda":
            row["gpu over attention"] = row["attention gpu us"] / row["grassmann gpu us"]
        rows.append(row)
        print(line(row), flush=True)
    return rows


def line(row: dict) -> str:
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())


def plot(path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    content = json.loads(path.read_text())
    rows = [row for row in content["rows"] if row["what"] == "layer"]
    figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
    lengths, tokens = [row["L"] for row in rows], rows[0]["B"] * rows[0]["L"]
    which = "gpu us" if "attention gpu us" in rows[0] else "us"
    for name in ("grassmann", "attention"):
        axes.plot(lengths, [row[f"{name} {which}"] / tokens for row in rows], "o-", label=name)
    if which == "gpu us":
        axes.set_yscale("log")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths], fontsize=7)
    where = content["machine"]
    axes.set(
        xlabel="length", ylabel="us per token, forward + backward",
        title=f"Layers of width {DIM}, {where['hardware']}, torch {where['torch']}, {where['date']}",
    )  # fmt: skip
    axes.title.set_fontsize(8)
    axes.grid(alpha=0.3)
    axes.legend()
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=120)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", choices=("mixing", "layers"), help="one of the two halves")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile aside")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, metavar="FILE.json", help="draw an earlier run instead of measuring")
    args = parser.parse_args()
    if args.plot:
        print(plot(args.plot))
        return
    with torch.device("meta"):
        counts = [GrassmannLM(output_projection=extra).num_parameters() for extra in (False, True)]
    print(f"GrassmannLM: {counts[0]:,} parameters, with output_projection=True {counts[1]:,}")
    rows = []
    if args.only != "mixing":
        rows += layers(args.device)
    if args.only != "layers":
        rows += mixing(args.device, not args.no_compile)
    path = write("grassmann", args.device, rows, args.out)
    print(path)


if __name__ == "__main__":
    main()
