"""Reload what train_lm.py exported, in a process that only imports torch and simplex_ops, and compare the answers."""

import argparse
import json
import sys
import warnings
from pathlib import Path

import torch

import simplex_ops  # noqa: F401  (registers the ops that the exported files call)


def load_state_dict(folder: Path) -> torch.nn.Module:
    from simplex_ops.models import DecoderConfig, DecoderLM

    model = DecoderLM(DecoderConfig(**json.loads((folder / "config.json").read_text())))
    model.load_state_dict(torch.load(folder / "model.pt", map_location="cpu"))
    return model.eval()


@torch.no_grad()
def main() -> None:
    warnings.filterwarnings("ignore", message=".*torch.jit.*is deprecated.*")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-3, help="on the largest absolute difference of a logit")
    args = parser.parse_args()
    expected = torch.load(args.folder / "expected.pt")
    tokens, logits = expected["tokens"], expected["logits"]
    answers = {
        "AOTInductor model.pt2": torch._inductor.aoti_load_package(str(args.folder / "model.pt2")),
        "TorchScript model.ts": torch.jit.load(str(args.folder / "model.ts")),
        "state_dict  model.pt": load_state_dict(args.folder).to(tokens.device),
    }
    print(f"reloaded in a fresh process on {tokens.device}, logits up to {logits.abs().max():.1f}")
    worst = 0.0
    for name, model in answers.items():
        difference = (model(tokens) - logits).abs().max().item()
        worst = max(worst, difference)
        print(f"  {name:22} max abs difference {difference:.1e}")
    if not worst <= args.tolerance:
        sys.exit(f"expected differences of at most {args.tolerance}, got {worst}")


if __name__ == "__main__":
    main()
