"""Train a small Grassmann language model for a minute and draw what one of its layers looks at.

    python examples/interpret_grassmann.py --out docs/grassmann_geometry.png

The picture shows the angle theta and the Plücker coordinates of each pair (t, t - offset) over a line of Python.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from train_lm import Batches, read_stdlib

from simplex_ops.models import DecoderConfig, DecoderLM
from simplex_ops.nn import interpret

TEXT = "for i in range(len(names)): names[i] = names[i].strip()"


def train(steps: int, device: str) -> DecoderLM:
    model = DecoderLM(DecoderConfig(dim=128, mlp_dim=352, layers=("grassmann",) * 4)).to(device)
    batches = Batches(read_stdlib()[0], batch=8, length=256, seed=0, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    for step in range(steps):
        tokens = batches.next()
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 49:
            print(f"step {step + 1}: {loss.item() / 0.6931:.2f} bits per byte", flush=True)
    return model


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("grassmann_geometry.png"))
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.enable_grad():
        model = train(args.steps, args.device)

    mixer = model.layers[args.layer].mixer
    inputs = []
    mixer.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    model(torch.tensor([list(args.text.encode())], device=args.device))
    geometry = interpret(mixer, inputs[0])
    mean = geometry.angle.rad2deg().nanmean((0, 1))
    print("mean theta:", ", ".join(f"{o}: {a:.0f}°" for o, a in zip(geometry.offsets, mean, strict=True)))
    print(geometry.plot(args.out, tokens=list(args.text)))


if __name__ == "__main__":
    main()
