"""Train a language model with a simplex_ops mixer next to its dot-product twin, then export it three ways.

Both models have the same number of parameters and see the same bytes in the same order: the sources of the Python
standard library. (Only "two_simplicial" has a twin; another `--mixer` trains alone.) Run `make demo`, or with simplex_ops,
matplotlib and tqdm installed:

    python examples/train_lm.py --seconds 60 --out demo_out

`--model dense mod sdt stt` trains these models side by side instead: with some of the tokens routed past every other
layer, next to a dense one of as many parameters (routed_lm.py, which writes a table and plots). `--mixer` with several names
compares models of these mixers on tokens of a BPE (compare_mixers.py, likewise).

The output folder gets both validation curves (curves.png, curves.json), a sample, and the trained model as an
AOTInductor package, a TorchScript file and a state_dict, which `reload_lm.py` checks in a fresh process.
"""

import argparse
import json
import math
import subprocess
import sys
import sysconfig
import time
import warnings
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.cpp_extension import CUDA_HOME
from tqdm import tqdm

from simplex_ops.models import DecoderConfig, DecoderLM, dot_product_twin, interleave, layer_names
from simplex_ops.nn import anneal_gates, routing_loss, routing_statistics


@dataclass(frozen=True)
class Setup:
    config: DecoderConfig
    batch: int
    length: int
    lr: float  # at its peak; wider models bear less


# What a device trains well within the default time.
SETUPS = {
    "cpu": Setup(
        DecoderConfig(
            dim=128,
            heads=4,
            head_dim=32,
            mlp_dim=352,
            layers=interleave(4),
            options={"two_simplicial": {"w1": 64, "w2": 8}},
        ),
        batch=4,
        length=256,
        lr=3e-3,
    ),
    "cuda": Setup(
        DecoderConfig(dim=512, heads=8, head_dim=64, mlp_dim=1408, layers=interleave(8)),
        batch=32,
        length=1024,
        lr=6e-4,
    ),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    routed = ("mod", "sdt", "stt")
    mixers = [name for name in layer_names() if not name.startswith("sdpa_") and name not in routed]
    parser.add_argument(
        "--model", nargs="+", choices=("dense", *routed), help="compare these instead of a mixer and its twin"
    )
    parser.add_argument(
        "--mixer",
        nargs="+",
        choices=mixers,
        default=["two_simplicial"],
        help="mixer of every fourth layer; several: compare",
    )
    parser.add_argument("--seconds", type=float, default=45.0, help="time for training both models")
    parser.add_argument("--steps", type=int, help="train this many steps instead, for a reproducible run")
    parser.add_argument("--batch", type=int, help="texts a step, instead of what the device trains well")
    parser.add_argument("--lr", type=float, help="peak learning rate, instead of what suits the device's model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("demo_out"))
    parser.add_argument("--no-export", action="store_true", help="stop after the curves and the sample")
    return parser.parse_args()


def read_stdlib() -> tuple[Tensor, Tensor]:
    """The standard library's sources as bytes, for training and, every 20th file, for validation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    # Distributions differ in whether they ship the tests, and what is installed is anyone's guess.
    skipped = {"site-packages", "dist-packages", "test", "tests"}
    files = [path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts)]
    train = b"".join(path.read_bytes() for index, path in enumerate(files) if index % 20)
    valid = b"".join(path.read_bytes() for path in files[::20])
    print(f"data: {len(files)} files of {root}, {len(train):,} bytes to train on, {len(valid):,} to validate on")
    return tuple(torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (train, valid))


class Batches:
    """Random windows of a text, the same ones for the same seed, as int64 [batch, length + 1]."""

    def __init__(self, text: Tensor, batch: int, length: int, seed: int, device: str) -> None:
        self.text, self.batch, self.device = text, batch, device
        self.window = torch.arange(length + 1)
        self.generator = torch.Generator().manual_seed(seed)

    def next(self) -> Tensor:
        starts = torch.randint(len(self.text) - len(self.window), (self.batch, 1), generator=self.generator)
        return self.text[starts + self.window].long().to(self.device)


def autocast(device: str) -> AbstractContextManager:
    return torch.autocast(device, torch.bfloat16, enabled=device.startswith("cuda"))


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    with autocast(tokens.device.type):
        logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: nn.Module, batches: list[Tensor]) -> float:
    model.eval()  # routed layers then decide as they decode, without a look ahead
    loss = sum(loss_of(model, tokens).item() for tokens in batches) / len(batches) / math.log(2)
    model.train()
    return loss


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    gains = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=all(p.is_cuda for p in model.parameters()))


def schedule(progress: float) -> float:
    """Learning rate relative to its peak: 5 % of warm-up, then a cosine down to a twentieth."""
    return min(1.0, progress / 0.05 + 0.01) * (0.05 + 0.95 * math.cos(math.pi / 2 * progress) ** 2)


def train(
    models: dict[str, nn.Module],
    batches: Batches,
    valid: list[Tensor],
    args: argparse.Namespace,
    statistics: list[dict] | None = None,
) -> dict:
    """Train the models side by side on the same batches; their validation curves, with the tokens seen.

    Statistics of routed layers, by model and layer, are appended to ``statistics`` at each validation.

    Side by side rather than one after the other: however much time there is, they see the same number of tokens.
    """
    optimizers = {name: make_optimizer(model) for name, model in models.items()}
    curves: dict[str, list[float]] = {"tokens": [], **{name: [] for name in models}}
    start, step, progress, next_validation = time.perf_counter(), 0, 0.0, 0.0
    interval = 0.5 if sys.stderr.isatty() else 15.0  # a log file wants few lines
    bar = tqdm(
        total=100,
        desc="training",
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        mininterval=interval,
    )
    while True:
        if progress >= next_validation:
            curves["tokens"].append(step * batches.batch * (len(batches.window) - 1))
            if statistics is not None:
                statistics.append({name: routing_statistics(model) for name, model in models.items()})
            for name, model in models.items():
                curves[name].append(bits_per_byte(model, valid))
            next_validation = (int(10 * progress) + 1) / 10
        if progress >= 1:
            break
        learning_rate = args.lr * schedule(progress)
        tokens = batches.next()
        for name, model in models.items():
            anneal_gates(model, progress)
            loss = loss_of(model, tokens) + routing_loss(model)
            optimizers[name].zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizers[name].param_groups:
                group["lr"] = learning_rate
            optimizers[name].step()
        step += 1
        progress = step / args.steps if args.steps else (time.perf_counter() - start) / args.seconds
        bar.update(min(100 * progress, 100) - bar.n)
        losses = ", ".join(f"{name} {curves[name][-1]:.3f}" for name in models)
        bar.set_postfix_str(f"{losses} bits/byte, step {step}", refresh=False)
    bar.close()
    seconds = time.perf_counter() - start
    print(f"trained {step} steps in {seconds:.0f} s, {curves['tokens'][-1]:,} tokens for each model")
    return curves


def plot(curves: dict, title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in (key for key in curves if key != "tokens"):
        axes.plot(curves["tokens"][1:], curves[name][1:], marker="o", label=f"{name}: {curves[name][-1]:.3f}")
    axes.set(xlabel="tokens", ylabel="validation bits per byte", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


@torch.no_grad()
def export(model: DecoderLM, prompt: Tensor, out: Path) -> None:
    """Write model.pt2, model.ts, model.pt (+ config.json), and what they should answer to a prompt: expected.pt."""
    # An AOTInductor package for CUDA is linked against the CUDA toolkit; without one, export for the CPU.
    device = "cuda" if prompt.is_cuda and CUDA_HOME else "cpu"
    model, prompt = model.to(device).eval(), prompt.to(device)
    torch.save({"tokens": prompt, "logits": model(prompt)}, out / "expected.pt")

    torch.save(model.state_dict(), out / "model.pt")
    (out / "config.json").write_text(json.dumps(asdict(model.config), indent=2) + "\n")
    torch.jit.script(model).save(str(out / "model.ts"))
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(model, (prompt,), dynamic_shapes=((dynamic, dynamic),))
    torch._inductor.aoti_compile_and_package(program, package_path=str(out / "model.pt2"))


def main() -> None:
    warnings.filterwarnings("ignore", message=".*torch.jit.*is deprecated.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # torch.export's own
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    setup = SETUPS["cuda" if args.device.startswith("cuda") else "cpu"]
    setup = replace(setup, batch=args.batch or setup.batch)
    if len(args.mixer) > 1 and not args.model:
        from compare_mixers import compare

        compare(args)
        return
    args.lr = args.lr or setup.lr
    if args.model:
        from routed_lm import compare

        compare(setup, args)
        return
    (mixer,) = args.mixer
    config = replace(setup.config, layers=interleave(len(setup.config.layers), mixer))
    models, twin = {}, dot_product_twin(config)
    for name, its_config in {mixer: config, **({} if twin == config else {"sdpa": twin})}.items():
        torch.manual_seed(args.seed)
        models[name] = DecoderLM(its_config).to(args.device)
        print(f"{name}: {models[name].num_parameters():,} parameters, layers {', '.join(its_config.layers)}")

    train_text, valid_text = read_stdlib()
    batches = Batches(train_text, setup.batch, setup.length, args.seed, args.device)
    valid = Batches(valid_text, setup.batch, setup.length, args.seed + 1, args.device)
    curves = train(models, batches, [valid.next() for _ in range(16)], args)
    (args.out / "curves.json").write_text(json.dumps(curves, indent=2) + "\n")
    title = f"Python standard library, {models[mixer].num_parameters():,} parameters each"
    plot(curves, title, args.out / "curves.png")

    prompt = torch.tensor([list(b"def ")], device=args.device)
    sample = bytes(models[mixer].generate(prompt, 300, 0.7)[0].tolist()).decode(errors="replace")
    (args.out / "sample.txt").write_text(sample)
    print(f"--- sample of {mixer}\n{sample}\n---")

    if not args.no_export:
        print("exporting: state_dict, TorchScript, AOTInductor (compiles C++, takes a while)")
        export(models[mixer], valid.next()[:2, :100], args.out)
        reload_lm = Path(__file__).with_name("reload_lm.py")
        subprocess.run([sys.executable, str(reload_lm), str(args.out)], check=True)
    print(f"wrote {', '.join(sorted(path.name for path in args.out.iterdir()))} to {args.out}/")


if __name__ == "__main__":
    main()
