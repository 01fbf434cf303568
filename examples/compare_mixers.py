"""`train_lm.py --mixer grassmann sdpa two_simplicial`: decoders that differ in their mixer, of equal size, as a table and plot.

    pip install tokenizers matplotlib tqdm
    python examples/train_lm.py --mixer grassmann sdpa two_simplicial --steps 2000 --out compare_out

Corpus: the sources of the Python standard library (PSF License Version 2), every 20th file for validation, as tokens of a
byte-level BPE trained on the rest. They are kept in OUT/tokens.pt, so that a machine without `tokenizers` can go on.
Every layer of a model has its mixer, but for "two_simplicial", which stands in every fourth, between attention. Writes
OUT/table.md (validation perplexity per token, parameters, tokens/s, peak memory), table.json and curves.png.
"""

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from train_lm import Batches, loss_of, make_optimizer, read_stdlib, schedule

from simplex_ops.models import DecoderConfig, DecoderLM, interleave

DEPTH, VOCABULARY = 4, 8192
SIZES = {  # dim, heads, kv_heads, head_dim; batch, length
    "cpu": (dict(dim=128, heads=4, kv_heads=4, head_dim=32), 8, 128),
    "cuda": (dict(dim=512, heads=8, kv_heads=8, head_dim=64), 32, 1024),
}


def layers_of(mixer: str) -> tuple[str, ...]:
    return interleave(DEPTH) if mixer == "two_simplicial" else (mixer,) * DEPTH


def read_tokens(path: Path, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Tokens to train and to validate on, from `path` or, the first time, from the corpus."""
    if not path.exists():
        from tokenizers import ByteLevelBPETokenizer

        texts = [bytes(part.tolist()).decode(errors="replace") for part in read_stdlib()]
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(texts[0].split("\n\n"), vocab_size=vocab_size, show_progress=False)
        parts = [torch.tensor(tokenizer.encode(text).ids, dtype=torch.int16) for text in texts]
        torch.save({"tokens": parts, "vocab_size": vocab_size}, path)
    saved = torch.load(path)
    if saved["vocab_size"] != vocab_size:
        raise ValueError(f"{path}: expected tokens of a vocabulary of {vocab_size}, got {saved['vocab_size']}")
    train, valid = saved["tokens"]
    print(f"data: {len(train):,} tokens to train on, {len(valid):,} to validate on, vocabulary {vocab_size:,}")
    return train, valid


def equally_large(config: DecoderConfig, parameters: int) -> DecoderConfig:
    """The config with the width of its MLP chosen so that the model has about so many parameters."""

    def count(mlp_dim: int) -> int:
        with torch.device("meta"):
            return DecoderLM(replace(config, mlp_dim=mlp_dim)).num_parameters()

    eighth = count(16) - count(8)  # linear in the width
    return replace(config, mlp_dim=8 + 8 * round((parameters - count(8)) / eighth))


@torch.no_grad()
def perplexity(model: nn.Module, batches: list[Tensor]) -> float:
    return math.exp(sum(loss_of(model, tokens).item() for tokens in batches) / len(batches))


def train(name: str, model: nn.Module, batches: Batches, valid: list[Tensor], args: argparse.Namespace) -> dict:
    optimizer, seconds, curve = make_optimizer(model), 0.0, []
    on_gpu = args.device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    every = max(1, args.steps // 10)
    for step in tqdm(range(args.steps), desc=name, mininterval=15):
        tokens = batches.next()
        start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule(step / args.steps)
        loss = loss_of(model, tokens)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()
        seconds += time.perf_counter() - start if step >= 3 else 0.0  # the first steps warm up
        if (step + 1) % every == 0 or step + 1 == args.steps:
            curve.append(((step + 1) * tokens[:, 1:].numel(), perplexity(model, valid)))
    trained = (args.steps - 3) * tokens[:, 1:].numel()
    return {
        "mixer": name, "layers": model.config.layers, "mlp_dim": model.config.mlp_dim, "parameters": model.num_parameters(),
        "perplexity": curve[-1][1], "tokens/s": trained / seconds if seconds else None,
        "peak MiB": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None, "curve": curve,
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    lines = ["| mixer | validation perplexity | parameters | tokens/s | peak memory |", "|---|---|---|---|---|"]
    for row in rows:
        memory = "-" if row["peak MiB"] is None else f"{row['peak MiB']:,.0f} MiB"
        speed = "-" if row["tokens/s"] is None else f"{row['tokens/s']:,.0f}"
        lines.append(f"| {row['mixer']} | {row['perplexity']:.2f} | {row['parameters']:,} | {speed} | {memory} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for row in rows:
        axes.semilogy(*zip(*row["curve"], strict=True), marker="o", label=f"{row['mixer']}: {row['perplexity']:.2f}")
    axes.set(xlabel="tokens", ylabel="validation perplexity", title="Python standard library, models of equal size")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)


def compare(args: argparse.Namespace) -> None:
    args.steps, args.lr = args.steps or 2000, args.lr or 3e-3
    sizes, batch, length = SIZES["cuda" if args.device.startswith("cuda") else "cpu"]
    batch = args.batch or batch
    train_tokens, valid_tokens = read_tokens(args.out / "tokens.pt", VOCABULARY)
    valid_batches = Batches(valid_tokens, batch, length, args.seed + 1, args.device)
    valid = [valid_batches.next() for _ in range(16)]

    base = DecoderConfig(VOCABULARY, **sizes, mlp_dim=8 * sizes["dim"] // 3 // 8 * 8, layers=layers_of("sdpa"))
    with torch.device("meta"):
        parameters = DecoderLM(base).num_parameters()
    rows = []
    for name in args.mixer:
        torch.manual_seed(args.seed)
        model = DecoderLM(equally_large(replace(base, layers=layers_of(name)), parameters)).to(args.device)
        batches = Batches(train_tokens, batch, length, args.seed, args.device)
        rows.append(train(name, model, batches, valid, args))
        del model
    machine = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    run = {"seed": args.seed, "steps": args.steps, "batch": batch, "length": length, "lr": args.lr, "device": machine}
    (args.out / "table.json").write_text(json.dumps(run | {"rows": rows}, indent=1) + "\n")
    (args.out / "table.md").write_text(table(rows))
    plot(rows, args.out / "curves.png")
    print(table(rows), end="")
