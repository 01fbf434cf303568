"""Errors of the kernels that the host chooses over those of the portable kernels, on the same inputs, against fp64.

    python benchmarks/errors.py [--out benchmarks/results]

Needs a GPU that has other than portable kernels (Hopper); about 30 s. Each number is an error of the output, lse or a gradient over
the same error in a second process with SIMPLEX_KERNELS=portable: "rms" the root mean square, "max" the largest element. Inputs
are normal; "logits" is the standard deviation of the logits. Sums are over several draws, so what is left of chance is a few
per cent in rms and more in max. 1.00 everywhere means that the same kernels ran in both.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from common import DTYPES, RESULTS, write

import simplex_ops

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import reference
from problem import draw, evaluate

CASES = [
    {"dtype": dtype, "D": dim, "logits": logits, "Hq": heads}
    for heads in (64, 4)  # scaled and skewed tiles
    for dtype in ("bf16", "fp16")
    for dim in (64, 128)
    for logits in (1, 4, 16)
]
DRAWS = 3


def op(*inputs, **options):
    return simplex_ops.two_simplicial_attention(*inputs, **options, return_lse=True)


def errors(case: dict) -> dict[str, tuple[float, float]]:
    """(rms, max) error of each output over several draws, relative to that of the truth."""
    sums: dict[str, torch.Tensor] = {}
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        problem = draw(
            batch=1, n_k=260, ratio=case["Hq"], dim=case["D"], w1=90, w2=24, dtype=DTYPES[case["dtype"]], device="cuda",
            scale=case["logits"] * case["D"] ** -0.5,
        )  # fmt: skip
        actual = evaluate(op, problem)
        truth = evaluate(reference.two_simplicial_attention, problem, torch.float64)
        for name, x in truth.items():
            wrong = actual[name].double() - x
            of_draw = torch.stack(
                [wrong.square().mean() / x.square().mean(), (wrong.abs().max() / x.abs().max()).square()]
            )
            sums[name] = sums.get(name, 0) + of_draw
    return {name: tuple((x / DRAWS).sqrt().tolist()) for name, x in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--json", action="store_true", help="only the errors of this process, as JSON")
    args = parser.parse_args()
    if args.json:
        print(json.dumps([errors(case) for case in CASES]))
        return
    command = [sys.executable, __file__, "--json"]
    env = os.environ | {"SIMPLEX_KERNELS": "portable"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        chosen = [errors(case) for case in CASES]
        printed = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    rows = []
    for case, ours, portable in zip(CASES, chosen, json.loads(printed), strict=True):
        row = case | {"errors": ours, "portable": portable}
        rows.append(row)
        ratios = {
            name: [mine / max(theirs, 1e-30) for mine, theirs in zip(ours[name], portable[name], strict=True)]
            for name in ours
        }
        if len(rows) == 1:
            print(f"{'rms max of':<30}" + "".join(f"{name:>12}" for name in ratios))
        head = " ".join(f"{name} {value}" for name, value in case.items())
        print(f"{head:<30}" + "".join(f"   {rms:4.2f} {largest:4.2f}" for rms, largest in ratios.values()), flush=True)
    print(write("errors", "cuda", rows, args.out))


if __name__ == "__main__":
    main()
