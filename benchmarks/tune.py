"""Tune the tiles of a family of kernels: compile candidates anywhere, time them on the GPU in question, print the best.

    python benchmarks/tune.py compile FAMILY... --arch sm_90a --out DIR [--key HEAD_DIM=128 ...] [--tile BLOCK_M=32,64 ...]
    python benchmarks/tune.py time DIR... [--shape B,N,Hq,Hkv,w1,w2 ...]
    python benchmarks/tune.py rows DIR/tuned.json [--write]

`compile` needs what the wheel's build needs, and no GPU. Each row of the family for that arch (`--key`: those with these values) is
compiled with all combinations of a tile's neighbours; `--tile NAME=values` sets a constant's values instead (of a name that the
source gives a tile: BLOCK_M, STAGES, num_warps, ...). What does not compile, spills grossly or exceeds the shared memory is
left out. DIR then holds cubins, manifest.json and candidates.so, a kernel table like the wheel's own (so both machines have
one CPU architecture). `time` needs DIR, this repository's benchmarks/ and tests/reference.py, and the installed wheel of the
same sources. It runs the op as users call it (benchmarks/workloads.py), with one candidate after the other in the place of
the wheel's row (csrc/kernel.h, simplex_try_kernel), beside the wheel's row and a cuBLAS product in the same run. First a small problem:
fresh memory is NaN, and the error against fp64 must not exceed that of the wheel's row by a tenth. Portable kernels that another kernel
goes before want SIMPLEX_KERNELS=portable. A backward kernel is timed within its whole backward pass. `rows --write` puts the tiles
that won into triton_kernels/tiles.py, with the GPU and the date; the next build takes them.
"""

import argparse
import ctypes
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KIB_SHARED = {"sm80": 99, "sm120f": 99}  # the smallest of the GPUs that run the cubin; else Hopper's and Blackwell's
WORTHWHILE = 1.02


# ---- compile


def neighbours(name: str, value: int, gluon: bool) -> list[int]:
    """What to try for a constant of a tile besides what it is."""
    if name == "num_warps":  # Gluon kernels lay their warps out themselves
        return [value] if gluon else [w for w in (value // 2, value, value * 2) if 1 <= w <= 16]
    if name in ("num_stages", "STAGES"):
        return [s for s in (value - 1, value, value + 1) if s >= 1]
    return [n for n in (value // 2, value, value * 2) if 1 <= n <= 4096]


def tiles(shipped: dict[str, int], chosen: dict[str, list[int]], gluon: bool) -> Iterator[dict[str, int]]:
    """All combinations but the one that is shipped."""
    unknown = set(chosen) - set(shipped)
    if unknown:
        raise SystemExit(f"expected --tile to name one of {', '.join(shipped)}, got {', '.join(sorted(unknown))}")
    values = [chosen.get(name, neighbours(name, value, gluon)) for name, value in shipped.items()]
    for combination in itertools.product(*values):
        tile = dict(zip(shipped, combination, strict=True))
        if tile != shipped:
            yield tile


def label(tile: dict[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in tile.items())


def try_compile(variant: Any) -> Any:
    """(cubin, manifest row), or what the compiler says against it."""
    from triton_kernels.build import compile_variant

    try:
        cubin, row = compile_variant(variant)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
    row["replaces"] = row["name"]
    row["name"] += "+" + label(variant.tile).replace(" ", "-")
    return cubin, row


def link(folder: Path) -> None:
    """candidates.so: the generated kernel table, and a way in for ctypes."""
    table = folder / "kernels.cpp"
    way_in = '\nextern "C" const simplex::Kernel* candidate(int i) { return &simplex::kernel_table()[i]; }\n'
    table.write_text(table.read_text() + way_in)
    command = [os.environ.get("CXX", "g++"), "-shared", "-fPIC", "-O1", "-std=c++17", f"-I{ROOT / 'csrc'}"]
    command += [f"-Wa,-I{folder}", str(table), "-o", str(folder / "candidates.so")]
    subprocess.run(command, check=True)


def compile_candidates(args: argparse.Namespace) -> None:
    os.environ.pop("SIMPLEX_ARCHS", None)  # --arch it is
    sys.path.insert(0, str(ROOT))
    from triton.experimental.gluon._runtime import GluonJITFunction

    from triton_kernels.build import all_variants, compile_all, write_table

    arch = args.arch.replace("_", "")
    wanted = dict(item.split("=") for item in args.key)
    chosen = {name: [int(v) for v in values.split(",")] for name, values in (item.split("=") for item in args.tile)}
    rows = [v for v in all_variants() if v.arch == arch and v.family in args.family]
    rows = [v for v in rows if all(str(v.key.get(name)) in value.split(",") for name, value in wanted.items())]
    if not rows:
        raise SystemExit(f"expected a family with kernels for {arch} and that key, got {', '.join(args.family)}")
    candidates = [
        replace(row, tile=tile)
        for row in rows
        for tile in tiles(row.tile, chosen, isinstance(row.function, GluonJITFunction))
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    most_shared = args.shared or KIB_SHARED.get(arch, 227)
    kept, seen = [], set()
    for i, (variant, result) in enumerate(
        zip(candidates, compile_all(candidates, ROOT / "build/triton_cache", try_compile), strict=True)
    ):
        head = f"[{i + 1}/{len(candidates)}] {variant.name} {label(variant.tile)}"
        if isinstance(result, str):
            print(f"{head}: left out, {result}", flush=True)
            continue
        row = result[1]
        report = f"{row['registers']} registers, {row['spills']} B spilled, {row['shared'] / 1024:.0f} KiB shared"
        against = [
            (row["spills"] > args.spills, "spills"),
            (row["shared"] > most_shared << 10, "shared memory"),
            ((row["replaces"], row["sha256"]) in seen, "the same cubin as before"),
        ]
        reasons = [reason for applies, reason in against if applies]
        print(f"{head}: {report}" + "".join(f", left out: {reason}" for reason in reasons[:1]), flush=True)
        if not reasons:
            seen.add((row["replaces"], row["sha256"]))
            kept.append(result)
    if not kept:
        raise SystemExit("no candidate is left")
    write_table(args.out, kept)
    link(args.out.resolve())
    print(f"{len(kept)} candidates in {args.out}: on a machine with the GPU, python benchmarks/tune.py time {args.out}")


# ---- time


class Trial:
    """Puts candidates of DIR/candidates.so in the place of the installed wheel's kernels."""

    def __init__(self, folder: Path) -> None:
        import simplex_ops

        package = Path(simplex_ops.__file__).parent
        self.swap = ctypes.CDLL(str(package / "_C.so")).simplex_try_kernel
        self.swap.argtypes, self.swap.restype = [ctypes.c_void_p], ctypes.c_bool
        self.table = ctypes.CDLL(str(folder.resolve() / "candidates.so")).candidate
        self.table.argtypes, self.table.restype = [ctypes.c_int], ctypes.c_void_p
        self.rows = json.loads((folder / "manifest.json").read_text())["kernels"]
        self.shipped = {row["name"]: row for row in json.loads((package / "manifest.json").read_text())["kernels"]}
        for row in self.rows:
            ours = self.shipped.get(row["replaces"])
            if ours is None or ours["parameters"] != row["parameters"]:
                raise SystemExit(f"expected the wheel of the sources that {row['name']} is made from, got another one")

    def start(self, index: int | None) -> None:
        self.swap(None if index is None else self.table(index))

    def stop(self) -> bool:
        """Whether the candidate was launched."""
        return self.swap(None)


def differentiable(function: Callable, inputs: list) -> list:
    """What the function returns that has a gradient; the inputs become leaves."""
    out = function(*[x.requires_grad_(x.is_floating_point()) for x in inputs])
    return [x for x in (out if isinstance(out, list | tuple) else [out]) if x.requires_grad]


def outputs(function: Callable, inputs: list, grads: list | None) -> list:
    """What the function returns, or the gradients of its inputs with the incoming gradients `grads`."""
    import torch

    leaves = [x.detach().clone() for x in inputs]
    if grads is None:
        with torch.no_grad():
            out = function(*leaves)
        return list(out) if isinstance(out, list | tuple) else [out]
    out = differentiable(function, leaves)
    return list(
        torch.autograd.grad(
            out, [x for x in leaves if x.requires_grad], [g.to(x.dtype) for g, x in zip(grads, out, strict=True)]
        )
    )


def relative_errors(actual: list, truth: list) -> list[float]:
    """Root mean square of each difference over that of the truth."""
    errors = []
    for a, t in zip(actual, truth, strict=True):
        a, t = a.double(), t.double()
        error = (a - t).square().mean().sqrt() / t.square().mean().sqrt().clamp(min=1e-30)
        errors.append(error.item() if math.isfinite(error.item()) else math.inf)
    return errors


def checker(family: str, key: dict, shape: Any = None) -> Callable[[], list[float]]:
    """Errors against fp64, on a small problem, of the op that `family` serves, with whatever kernels are in place."""
    import torch
    from workloads import workload

    backward = "_bwd" in family
    function, reference, inputs = workload(family, key, True, shape)
    grads = None
    if backward:
        grads = [torch.randn(x.shape, device=x.device).to(x.dtype) for x in differentiable(function, inputs)]
    wide = [x.detach().double() if x.is_floating_point() else x for x in inputs]
    truth = outputs(reference, wide, grads)

    def errors() -> list[float]:
        torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
        try:
            return relative_errors(outputs(function, inputs, grads), truth)
        finally:
            torch.use_deterministic_algorithms(False)

    return errors


def clocked(family: str, key: dict, shape: Any = None) -> Callable[[], object]:
    """The call that is timed, on a large problem: the op, or the backward pass of it. The wheel's own kernels must be in place."""
    import torch
    from workloads import workload

    op, _, inputs = workload(family, key, False, shape)
    if "_bwd" not in family:
        return torch.no_grad()(lambda: op(*inputs))
    out = differentiable(op, inputs)
    leaves, grads = [x for x in inputs if x.requires_grad], [torch.randn_like(x) for x in out]
    return lambda: torch.autograd.grad(out, leaves, grads, retain_graph=True)


def time_candidates(args: argparse.Namespace) -> None:
    import torch

    torch.manual_seed(0)
    for folder in args.folder:
        time_folder(folder, args)


def time_folder(folder: Path, args: argparse.Namespace) -> None:
    from common import DTYPES, machine, matmul_rate, median_ms
    from workloads import attention_flop, attention_shape

    trial, results, begin = Trial(folder), [], time.perf_counter()

    def measure(base: dict, shape: Any, indices: list[int | None]) -> None:
        family, key = base["family"], base["key"]
        attention = family.startswith("two_simplicial")
        shape = (shape or attention_shape(family, key)) if attention else None
        flop = attention_flop(family, key, shape) if attention else 0
        rate = matmul_rate(1e12, DTYPES[key.get("dtype", "fp32")], "cuda", 0.1)
        errors, call = checker(family, key, shape), clocked(family, key, shape)
        print(f"{base['name']} {shape or ''}; matmul {rate / 1e9:.0f} TFLOP/s")
        expected, usual = [], 0.0
        for index in indices:
            row = base if index is None else trial.rows[index]
            result = {k: row[k] for k in ("family", "arch", "key", "tile", "registers", "spills", "shared")}
            result |= {"row": base["name"], "shape": shape, "shipped": index is None}
            if time.perf_counter() - begin > args.seconds:
                print(f"  stopped after {args.seconds} s, before {label(row['tile'])}")
                return
            trial.start(index)
            try:
                found = errors()
                ms = median_ms(call, "cuda", args.budget, 20)
            except RuntimeError as error:
                result["error"] = str(error).splitlines()[0]
                print(f"  {label(row['tile'])}: {result['error']}", flush=True)
                results.append(result)
                if "illegal" in str(error) or "unspecified" in str(error):
                    raise  # the context is gone
                continue
            finally:
                launched = trial.stop()
            if index is None:
                expected, usual = found, usual or ms
            elif not launched:
                raise SystemExit(
                    f"{base['name']} was never launched: give a --shape that it is chosen for; a portable kernel may need "
                    "SIMPLEX_KERNELS=portable"
                )
            worst = max((f / e if e else float(f > 0)) for f, e in zip(found, expected, strict=True))
            right = all(f <= 1.1 * e + 1e-9 for f, e in zip(found, expected, strict=True))
            result |= {
                "us": ms * 1e3,
                "speedup": usual / ms,
                "errors": found,
                "error over shipped": worst,
                "right": right,
            }
            if flop:
                result |= {"tflops": flop / ms / 1e9, "of matmul": flop / ms / rate}
            results.append(result)
            print(line(result), flush=True)

    try:
        for name in dict.fromkeys(row["replaces"] for row in trial.rows):
            mine = [i for i, row in enumerate(trial.rows) if row["replaces"] == name]
            for shape in args.shape or [None]:
                measure(trial.shipped[name], shape, [None, *mine, None])  # the last shows the drift
    finally:
        path = folder / "tuned.json"
        path.write_text(json.dumps({"machine": machine("cuda"), "rows": results}, indent=1) + "\n")
        print(path)
    print_rows(path)


def line(result: dict) -> str:
    text = f"  {label(result['tile']) + (' (shipped)' if result['shipped'] else ''):<64} {result['us']:10.1f} us {result['speedup']:5.2f}x"
    if "tflops" in result:
        text += f" {result['tflops']:6.1f} TFLOP/s {result['of matmul']:5.2f} of matmul"
    text += f"  {result['registers']:3d} registers {result['spills']:5d} B spilled {result['shared'] / 1024:4.0f} KiB"
    return text + f"  error {result['error over shipped']:.2f}" + ("" if result["right"] else " WRONG")


# ---- rows


def winners(rows: list[dict]) -> Iterator[tuple[str, dict, dict | None, float]]:
    """(row, shipped tile, best tile, speed-up): over all shapes that were timed, of the tiles that are right. None: it stays."""
    for name in dict.fromkeys(row["row"] for row in rows):
        trials: dict[str, list[dict]] = {}
        for row in rows:
            if row["row"] == name and not row["shipped"]:
                trials.setdefault(label(row["tile"]), []).append(row)
        shapes = len({str(row["shape"]) for row in rows if row["row"] == name})
        gains = {
            tile: math.prod(row["speedup"] for row in runs) ** (1 / shapes)
            for tile, runs in trials.items()
            if len(runs) == shapes and all(row.get("right") for row in runs)
        }
        shipped = next(row["tile"] for row in rows if row["row"] == name and row["shipped"])
        best = max(gains, key=gains.__getitem__, default=None)
        if best is None or gains[best] < WORTHWHILE:
            yield name, shipped, None, 1.0
        else:
            yield name, shipped, trials[best][0]["tile"], gains[best]


def print_rows(path: Path) -> None:
    for name, shipped, best, gain in winners(json.loads(path.read_text())["rows"]):
        print(
            f"{name}: {label(best)}  # {gain:.2f}x of {label(shipped)}" if best else f"{name}: {label(shipped)} stays"
        )


def write_rows(path: Path, table: Path) -> None:
    """The winners into TILES, each below where it was measured, in the order of their names; other rows stay as they are."""
    tuned, text = json.loads(path.read_text()), table.read_text()
    begin, end = text.index(" = {\n") + len(" = {\n"), text.rindex("}\n")
    rows = {name: row for row, name in re.findall(r'(    # .*\n    "(.*?)": .*\n)', text[begin:end])}
    for name, _, best, gain in winners(tuned["rows"]):
        if best:
            remark = f"{gain:.2f}x, {tuned['machine']['hardware']}, {tuned['machine']['date']}"
            rows[name] = f'    # {remark}\n    "{name}": {json.dumps(best)},\n'
    table.write_text(text[:begin] + "".join(rows[name] for name in sorted(rows)) + text[end:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(required=True)
    action = actions.add_parser("compile", help="candidates of FAMILY into DIR; no GPU")
    action.add_argument("family", nargs="+", help="kernel function of triton_kernels/, e.g. two_simplicial_fwd")
    action.add_argument("--arch", required=True, help="sm_80, sm_90a, sm_100f, sm_120f")
    action.add_argument("--out", type=Path, required=True, metavar="DIR")
    action.add_argument("--key", action="append", default=[], metavar="NAME=VALUE,...", help="only such rows")
    action.add_argument("--tile", action="append", default=[], metavar="NAME=VALUE,...", help="values to try")
    action.add_argument("--spills", type=int, default=4096, metavar="BYTES", help="leave out what spills more (4096)")
    action.add_argument("--shared", type=int, metavar="KIB", help="leave out what needs more shared memory")
    action.set_defaults(run=compile_candidates)
    action = actions.add_parser("time", help="all candidates of DIR on this machine's GPU")
    action.add_argument("folder", type=Path, nargs="+", metavar="DIR")
    action.add_argument(
        "--shape",
        action="append",
        type=lambda text: tuple(int(n) for n in text.split(",")),
        metavar="B,N,Hq,Hkv,w1,w2",
        help="of 2-simplicial attention; the speed-up over several is their geometric mean",
    )
    action.add_argument("--budget", type=float, default=0.1, metavar="S", help="time for a candidate (0.1)")
    action.add_argument(
        "--seconds", type=float, default=300, metavar="S", help="start no candidate of a DIR after that (300)"
    )
    action.set_defaults(run=time_candidates)
    action = actions.add_parser("rows", help="the tiles that won")
    action.add_argument("json", type=Path)
    action.add_argument("--write", action="store_true", help="and into the table that the next build reads")
    action.add_argument("--table", type=Path, default=ROOT / "triton_kernels/tiles.py", help=argparse.SUPPRESS)
    action.set_defaults(run=lambda args: (print_rows(args.json), args.write and write_rows(args.json, args.table)))
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
