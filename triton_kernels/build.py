"""Compile every VARIANTS table to build/kernels/{*.cubin, manifest.json, kernels.cpp}. Needs no GPU and no CUDA toolkit.

    python -m triton_kernels.build [OUT_DIR]

The environment variable SIMPLEX_ARCHS ("80,90") restricts the architectures of a development build.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from triton_kernels.variant import Variant

# The older of Triton's two assemblers: its cubins load from driver 525 on (ptxas-blackwell's from 580) at the same speed.
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
PARAM_TYPES = {"i32": "I32", "i64": "I64", "fp32": "F32"}


def configure_triton(cache: Path) -> None:
    """Pin everything that decides the bits of a cubin."""
    knobs.cache.dir = str(cache)
    knobs.compilation.disable_line_info = True  # a path or line number in the cubin would break reproducibility
    knobs.nvidia.ptxas = knobs.nvidia.ptxas_blackwell = str(PTXAS)
    knobs.runtime.add_stages_inspection_hook = assemble_for_arch


def assemble_for_arch(_backend: Any = None, stages: dict = {}, options: Any = None, *_: Any) -> tuple[str, str] | None:
    """Replace Triton's last stage by our own call of ptxas. (Triton calls its hook without arguments for a cache key.)

    Triton assembles for sm_100a only, which runs on nothing but 10.0; sm_100f runs on the whole family. The report of
    registers and spills goes into the metadata on the way.
    """

    if options is None:
        this_file = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        return this_file, this_file

    def make_cubin(ptx: str, metadata: dict) -> bytes:
        capability = int(options.arch.removeprefix("sm"))
        target = f"sm_{capability}" + ("" if capability < 90 else "a" if capability < 100 else "f")
        ptx = re.sub(r"\.target sm_\w+", f".target {target}", ptx)
        with tempfile.TemporaryDirectory() as folder:
            source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
            source.write_text(ptx)
            fmad = [] if options.enable_fp_fusion else ["--fmad=false"]
            command = [str(PTXAS), "-v", *fmad, "--regAllocOptLevel=2", f"--gpu-name={target}", str(source), "-o", str(cubin)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"ptxas failed: {' '.join(command)}\n{done.stderr}")
            metadata["ptxas_report"] = done.stderr
            return cubin.read_bytes()

    stages["cubin"] = make_cubin
    return None


def compile_variant(variant: Variant) -> tuple[bytes, dict[str, Any]]:
    """The cubin and its manifest row."""
    parameters = variant.parameters()
    constants = variant.constants()
    names = variant.function.arg_names
    signature = {name: "constexpr" for name in constants} | {name: spelled for name, spelled, _ in parameters}
    missing = set(names) ^ set(signature)
    if missing:
        raise ValueError(f"{variant.name}: no value or no parameter for {sorted(missing)}")
    attrs = {(names.index(name),): [["tt.divisibility", by]] for name, _, by in parameters if by > 1}
    source_type = GluonASTSource if isinstance(variant.function, GluonJITFunction) else ASTSource
    source = source_type(variant.function, signature={n: signature[n] for n in names}, constexprs=constants, attrs=attrs)
    # No multiply-add is fused unless a kernel says tl.fma: a sum over lanes must not depend on which factor a lane holds.
    launch_options = {k: v for k, v in variant.tile.items() if k in ("num_warps", "num_stages", "launch_pdl")}
    compiled = triton.compile(
        source, target=GPUTarget("cuda", variant.capability, 32), options={"enable_fp_fusion": False, **launch_options}
    )
    meta = compiled.metadata
    if meta.global_scratch_size or meta.profile_scratch_size:
        raise ValueError(f"{variant.name}: needs scratch memory, which the launcher passes as null")
    report = meta.ptxas_report
    cubin = compiled.asm["cubin"]
    return cubin, {
        "name": variant.name,
        "family": variant.family,
        "arch": variant.arch,
        "key": variant.key,
        "tile": variant.tile,
        "parameters": parameters,
        "tensor_maps": meta.tensordesc_meta or [],
        "symbol": meta.name,
        "num_warps": meta.num_warps,
        "num_ctas": meta.num_ctas,
        "cooperative": meta.launch_cooperative_grid,
        "pdl": meta.launch_pdl,
        "shared": meta.shared,
        "registers": int(re.search(r"Used (\d+) registers", report).group(1)),
        "spills": sum(int(n) for n in re.findall(r"(\d+) bytes spill", report)),
        "size": len(cubin),
        "sha256": hashlib.sha256(cubin).hexdigest(),
    }


def all_variants() -> list[Variant]:
    """The VARIANTS of every module of this package, with the TILES measured, for the architectures wanted; checked."""
    import triton_kernels
    from triton_kernels.tiles import TILES

    variants: list[Variant] = []
    for module in pkgutil.iter_modules(triton_kernels.__path__):
        variants += getattr(importlib.import_module(f"triton_kernels.{module.name}"), "VARIANTS", [])
    constants = {v.name: set(v.tile) for v in variants}
    misfits = [name for name, tile in TILES.items() if constants.get(name) != set(tile)]
    if misfits:
        raise ValueError(f"tiles.py: expected names of variants and all constants of their tiles, got {misfits}")
    variants = [replace(v, tile=TILES.get(v.name, v.tile)) for v in variants]
    archs = [a for a in os.environ.get("SIMPLEX_ARCHS", "").split(",") if a]
    unknown = set(archs) - {str(v.capability) for v in variants}
    if unknown:
        raise ValueError(f"expected SIMPLEX_ARCHS to list numbers like 80,90, got {sorted(unknown)}, which no variant is for")
    variants = [v for v in variants if not archs or str(v.capability) in archs]
    names = [v.name for v in variants]
    duplicates = {n for n in names if names.count(n) > 1}
    if duplicates:
        raise ValueError(f"two variants share a key: {sorted(duplicates)}")
    return variants


def constant(name: str, value: Any) -> str:
    return f'{{"{name}", int64_t(DType::{value})}}' if name == "dtype" else f'{{"{name}", {int(value)}}}'


def kernels_cpp(rows: list[dict[str, Any]]) -> str:
    """The table as C++ (csrc/kernel.h), with the cubins, which the assembler must find by name, in .rodata."""
    declared, blobs, lists, table = [], [], [], []
    for i, row in enumerate(rows):
        declared.append(f'extern const unsigned char simplex_cubin_{i}[] __attribute__((visibility("hidden")));')
        name = row["name"]
        blobs.append(f'    ".balign 64\\nsimplex_cubin_{i}:\\n.incbin \\"{name}.cubin\\"\\n"')
        tile = {k: v for k, v in row["tile"].items() if k not in ("num_warps", "num_stages", "launch_pdl")}
        params = [
            f'{{"{name}", ParamType::{"Pointer" if t[0] == "*" else PARAM_TYPES.get(t, "TensorMap")}, {by}}}'
            for name, t, by in row["parameters"]
        ]
        spans = []
        for type_name, label, items in (
            ("Constant", "kKey", [constant(k, v) for k, v in row["key"].items()]),
            ("Constant", "kTile", [constant(k, v) for k, v in tile.items()]),
            ("Param", "kParams", params),
            ("TensorMapMeta", "kMaps", [tensor_map(m, lists, f"{i}_{j}") for j, m in enumerate(row["tensor_maps"])]),
        ):
            spans.append(f"{label}{i}" if items else "{}")
            if items:
                lists.append(f"static constexpr {type_name} {label}{i}[] = {{{', '.join(items)}}};")
        capability, suffix = re.fullmatch(r"sm(\d+)([af]?)", row["arch"]).groups()
        flags = ", ".join(str(row[flag]).lower() for flag in ("cooperative", "pdl"))
        table.append(
            f'    {{"{name}", "{row["family"]}", "{row["symbol"]}", {capability}, \'{suffix or chr(92) + "0"}\', '
            f'{row["num_warps"]}, {row["num_ctas"]}, {row["shared"]}, {flags}, {", ".join(spans)}, '
            f"simplex_cubin_{i}, {row['size']}}},"
        )
    newline = "\n"
    return f"""// Generated by triton_kernels/build.py.
#include "kernel.h"

namespace simplex {{

extern "C" {{
{newline.join(declared)}
}}
asm(".pushsection .rodata\\n"
{newline.join(blobs)}
    ".popsection\\n");

{newline.join(lists)}

static const Kernel kTable[] = {{
{newline.join(table)}
}};

Span<Kernel> kernel_table() {{ return kTable; }}

}}  // namespace simplex
"""


def tensor_map(meta: dict[str, Any], lists: list[str], label: str) -> str:
    box = ", ".join(str(n) for n in meta["block_size"])
    lists.append(f"static constexpr int32_t kBox{label}[] = {{{box}}};")
    fp4 = str(bool(meta.get("fp4_padded", False))).lower()
    return f"{{{meta['swizzle']}, {meta['elem_size']}, {meta['elem_type']}, {fp4}, kBox{label}}}"


def compile_all(
    variants: list[Variant], cache: Path, compile: Callable[[Variant], Any] = compile_variant
) -> Iterator[Any]:
    """compile(variant) of each, in order, on all cores."""
    # fork: a worker inherits the imported Triton and the variants, whose functions cannot be pickled.
    with multiprocessing.get_context("fork").Pool(initializer=_start_worker, initargs=(variants, cache, compile)) as pool:
        yield from pool.imap(_compile_index, range(len(variants)))


def _start_worker(*work: Any) -> None:
    global _work
    _work = work
    configure_triton(work[1])


def _compile_index(i: int) -> Any:
    variants, _, compile = _work
    return compile(variants[i])


def write_table(out_dir: Path, compiled: list[tuple[bytes, dict[str, Any]]]) -> None:
    """Cubins, manifest.json and kernels.cpp, and no other cubins beside them."""
    rows = [row for _, row in compiled]
    for cubin, row in compiled:
        (out_dir / f"{row['name']}.cubin").write_bytes(cubin)
    for stale in set(out_dir.glob("*.cubin")) - {out_dir / f"{row['name']}.cubin" for row in rows}:
        stale.unlink()
    ptxas_version = re.search(r"release ([\d.]+)", subprocess.check_output([str(PTXAS), "--version"], text=True)).group(1)
    manifest = {"triton": triton.__version__, "ptxas": ptxas_version, "kernels": rows}
    (out_dir / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    (out_dir / "kernels.cpp").write_text(kernels_cpp(rows))


def build(out_dir: Path) -> None:
    """Compile every variant into out_dir, on all cores."""
    out_dir = Path(out_dir).resolve()
    out_dir.mkdir(parents=True, exist_ok=True)
    variants = all_variants()
    compiled = []
    for cubin, row in compile_all(variants, out_dir.parent / "triton_cache"):
        compiled.append((cubin, row))
        print(f"[{len(compiled)}/{len(variants)}] {row['name']}: {row['registers']} registers, {row['spills']} B spilled, "
              f"{row['shared'] / 1024:.0f} KiB shared", flush=True)
    write_table(out_dir, compiled)


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else "build/kernels"))
