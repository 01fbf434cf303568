"""`train_lm.py --model dense mod sdt stt`: routed models next to a dense one, as a table and plots.

Equal blocks, tokens and (to 0.1 %) parameters: the dense and MoD models get a little more MLP for what the others spend
on forecasts and students. Every other block is routed at capacity 0.5. The validation loss "as decoded" routes by the
learned threshold, which sees no later token; "by top-k" routes as in training, which does.

    python examples/routed_lm.py --out FOLDER RUN/routed.json ...

joins such runs, of several seeds or of one model each, into one file, one table of means over the seeds, and plots.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
import train_lm
from torch import Tensor

from simplex_ops.models import DecoderConfig, DecoderLM
from simplex_ops.nn import RoutedLayer, route_map, routing_statistics

PAIRS = {"dense": ("sdpa", "sdpa"), "mod": ("sdpa", "mod"), "sdt": ("sdt",), "stt": ("sdpa", "stt")}


def config_of(name: str, base: DecoderConfig) -> DecoderConfig:
    blocks = len(base.layers)
    forecast = 2 * -(-base.dim // 32)  # width of PriorFFN; two blocks of a dense pair share what one forecast weighs
    more = forecast // 2 if name in ("dense", "mod") else 0
    return replace(base, layers=PAIRS[name] * (blocks // 2), mlp_dim=base.mlp_dim + more, options={})


def sync(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def train_rate(model: DecoderLM, tokens: Tensor, repeats: int = 5) -> float:
    """Tokens per second, forward and backward."""
    for attempt in range(repeats + 1):
        if attempt == 1:
            start = sync(tokens.device.type)
        train_lm.loss_of(model, tokens).backward()
    model.zero_grad()
    return repeats * tokens[:, 1:].numel() / (sync(tokens.device.type) - start)


def decode_rate(model: DecoderLM, tokens: Tensor, count: int = 64) -> float:
    """Tokens per second of all texts together, after a prompt."""
    model.eval()
    for layer in model.modules():
        if isinstance(layer, RoutedLayer):
            layer.trim = True  # skip the layer where nothing is routed
    start = sync(tokens.device.type)
    model.generate(tokens[:, :64], count)
    model.train()
    return tokens.shape[0] * count / (sync(tokens.device.type) - start)


def cache_bytes(cache: object) -> int:
    """What the keys and values of all layers occupy."""
    if isinstance(cache, Tensor):
        return cache.untyped_storage().nbytes() if cache.dim() >= 4 else 0
    return sum(cache_bytes(item) for item in cache)


@torch.no_grad()
def evaluate(name: str, model: DecoderLM, valid: list[Tensor], setup: train_lm.Setup) -> dict:
    """One row of the table."""
    blocks = 2 * len(model.layers) if name == "sdt" else len(model.layers)
    as_decoded, share, square = train_lm.bits_per_byte(model, valid), 1.0, 1.0
    model.eval()
    if name != "dense":
        masks = torch.cat([(model(tokens[:, :-1]), route_map(model)[1])[1] for tokens in valid], 1).float()
        per_text = masks.mean(-1)  # [layers, texts]
        dense = blocks - len(masks)
        share, square = masks.mean().item(), per_text.square().mean().item()
        square = (dense + len(masks) * square) / blocks
    model.train()
    losses = [train_lm.loss_of(model, tokens).item() for tokens in valid]
    statistics = list(routing_statistics(model).values())

    def mean(key: str) -> float | None:
        values = [row[key] for row in statistics if key in row]
        return sum(values) / len(values) if values else None

    cache = model.new_cache(1, setup.length)
    return {
        "model": name,
        "parameters": model.num_parameters(),
        "bits/byte as decoded": as_decoded,
        "bits/byte by top-k": sum(losses) / len(losses) / torch.log(torch.tensor(2.0)).item(),
        "forecast loss": mean("prior_loss"),
        "student accuracy": mean("router_accuracy"),
        "routed": share,
        "attention FLOPs": square,
        "KV bytes/text": cache_bytes(cache),
    }


def show(rows: list[dict]) -> str:
    """A table in Markdown."""

    def cell(value: object) -> str:
        return (
            ""
            if value is None
            else f"{value:.3f}"
            if isinstance(value, float) and value < 100
            else f"{value:,.0f}"
            if not isinstance(value, str)
            else value
        )

    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(cell(value) for value in row.values()) + " |" for row in rows]
    return "\n".join(lines)


def plot_surprise(statistics: list[dict], tokens: list[int], path: Path) -> None:
    """S_CE, "as foretold", and S_CU, "more than lately", over training: what the gates go by."""
    import matplotlib.pyplot as plt

    names = [name for name, layers in statistics[-1].items() if any("s_ce" in row for row in layers.values())]
    if not names:
        return
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 4), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for layer in (layer for layer, row in statistics[-1][name].items() if "s_ce" in row):
            for key, line in (("s_ce", "-"), ("s_cu", "--")):
                axis.plot(
                    tokens[1:], [s[name][layer][key] for s in statistics[1:]], line, label=f"{layer} {key.upper()}"
                )
        axis.set(xlabel="tokens", ylabel="mean", title=f"{name}: expected and unexpected change", ylim=(0, 1))
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


@torch.no_grad()
def plot_routes(models: dict[str, DecoderLM], tokens: Tensor, path: Path) -> None:
    """Which tokens of a text each routed layer computes when it decodes: tokens x layers, a row per layer."""
    import matplotlib.pyplot as plt

    routed = {name: model for name, model in models.items() if name != "dense"}
    if not routed:
        return
    figure, axes = plt.subplots(len(routed), figsize=(16, 1.5 * len(routed) + 1), layout="constrained", squeeze=False)
    for axis, (name, model) in zip(axes[:, 0], routed.items(), strict=True):
        model.eval()
        model(tokens[None])
        model.train()
        layers, masks = route_map(model)
        axis.imshow(masks[:, 0].cpu(), aspect="auto", cmap="Greys", vmin=0, vmax=1.4, interpolation="nearest")
        axis.set_yticks(
            range(len(layers)), [layer.removesuffix(".dynamic").removesuffix(".layer") for layer in layers], fontsize=7
        )
        axis.set_xticks(
            range(len(tokens)), [ascii(chr(t))[1:-1] for t in tokens.tolist()], fontsize=6, family="monospace"
        )
        axis.set_title(f"{name}: {masks.float().mean():.0%} routed", fontsize=8)
    figure.savefig(path, dpi=150)


def compare(setup: train_lm.Setup, args: argparse.Namespace) -> None:
    models = {}
    for name in args.model:
        torch.manual_seed(args.seed)
        models[name] = DecoderLM(config_of(name, setup.config)).to(args.device)
        print(f"{name}: {models[name].num_parameters():,} parameters, layers {', '.join(models[name].config.layers)}")
    train_text, valid_text = train_lm.read_stdlib()
    batches = train_lm.Batches(train_text, setup.batch, setup.length, args.seed, args.device)
    drawn = train_lm.Batches(valid_text, setup.batch, setup.length, args.seed + 1, args.device)
    valid, statistics = [drawn.next() for _ in range(max(1, 64 // setup.batch))], []
    curves = train_lm.train(models, batches, valid, args, statistics)

    rows = [evaluate(name, model, valid, setup) for name, model in models.items()]
    for row, model in zip(rows, models.values(), strict=True):
        row["train tokens/s"] = train_rate(model, valid[0])
        row["decode tokens/s"] = decode_rate(model, valid[0])
    print(show(rows))
    (args.out / "table.md").write_text(show(rows) + "\n")
    hardware = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    machine = {"date": date.today().isoformat(), "hardware": hardware, "torch": torch.__version__}
    log = {"machine": machine, "command": " ".join(sys.argv), "seed": args.seed}
    log |= {"curves": curves, "statistics": statistics, "rows": rows}
    (args.out / "routed.json").write_text(json.dumps(log, indent=1) + "\n")
    train_lm.plot(
        curves,
        f"Python standard library, {rows[0]['parameters']:,} parameters each, seed {args.seed}",
        args.out / "curves.png",
    )
    plot_surprise(statistics, curves["tokens"], args.out / "surprise.png")
    text = torch.tensor(list(valid_text[4096 : 4096 + 160].tolist()), device=args.device)
    plot_routes(models, text, args.out / "routes.png")
    print(f"wrote {', '.join(sorted(path.name for path in args.out.iterdir()))} to {args.out}/")


def join(logs: list[dict]) -> list[dict]:
    """One run per seed, of the models of all logs."""
    runs: dict[int, dict] = {}
    for log in sorted(logs, key=lambda log: [list(PAIRS).index(row["model"]) for row in log["rows"]]):
        run = runs.setdefault(
            log["seed"], log | {"curves": {}, "statistics": [{} for _ in log["statistics"]], "rows": []}
        )
        if run["curves"] and run["curves"]["tokens"] != log["curves"]["tokens"]:
            raise ValueError(f"join: expected runs of seed {log['seed']} to see the same tokens")
        run["curves"] |= log["curves"]
        run["rows"] += log["rows"]
        for record, more in zip(run["statistics"], log["statistics"], strict=True):
            record |= more
    return [runs[seed] for seed in sorted(runs)]


def plot_runs(runs: list[dict], path: Path) -> None:
    """A line for each model and seed: runs by the clock see different numbers of tokens, and a mean would compare those."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for i, name in enumerate(name for name in runs[0]["curves"] if name != "tokens"):
        label: str | None = f"{name}: " + ", ".join(f"{run['curves'][name][-1]:.3f}" for run in runs)
        for run in runs:
            curves = run["curves"]
            axes.plot(curves["tokens"][2:], curves[name][2:], f"C{i}.-", linewidth=1, alpha=0.7, label=label)
            label = None
    seeds = ", ".join(str(run["seed"]) for run in runs)
    axes.set(
        xlabel="tokens", ylabel="validation bits per byte", title=f"Python standard library, a line per seed ({seeds})"
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def mean_rows(runs: list[dict]) -> list[dict]:
    def mean(values: list) -> object:
        return values[0] if isinstance(values[0], str) or values[0] is None else sum(values) / len(values)

    return [
        {key: mean([row[key] for row in rows]) for key in rows[0]}
        for rows in zip(*(run["rows"] for run in runs), strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = join([json.loads(path.read_text()) for path in args.logs])
    (args.out / "routed.json").write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    print(show(mean_rows(runs)))
    for run in runs:
        for row in run["rows"]:
            print(
                run["seed"],
                row["model"],
                *(f"{row[key]:.3f}" for key in ("bits/byte as decoded", "bits/byte by top-k")),
            )
    plot_runs(runs, args.out / "curves.png")
    plot_surprise(runs[0]["statistics"], runs[0]["curves"]["tokens"], args.out / "surprise.png")


if __name__ == "__main__":
    main()
