"""The Triton kernels without a GPU: their arithmetic in Triton's interpreter, and what was compiled of them."""

import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import simplex_ops

ROOT = Path(__file__).parents[1]
# Shared memory of one block on the smallest of the GPUs that run a cubin: 8.6, 8.9 and 12.0; Hopper and Blackwell.
SMALLEST_SHARED = {"sm80": 99 << 10, "sm120f": 99 << 10, "sm90a": 227 << 10, "sm100f": 227 << 10}
# Instructions in the main loops of all warpgroups that move a register to or from local memory. dkv reloads a few
# addresses a step; its sums and scores leave no register over (docs/kernels.md).
SPILLS = {
    "two_simplicial_fwd_scaled": 0,
    "two_simplicial_bwd_dq_scaled": 0,
    "two_simplicial_bwd_dkv_scaled": 6,
    "two_simplicial_bwd_dkv_skewed": 0,
    "two_simplicial_fwd_skewed": 0,
    "two_simplicial_bwd_dq_skewed": 0,
}


CASES = {
    "one token a tile": dict(n_k=5, ratio=64, w1=5, w2=3, share=64, chunk_tiles=3),
    "two tokens a tile": dict(n_k=11, ratio=8, w1=6, w2=3, share=8, chunk_tiles=2),
    "odd ratio": dict(n_k=19, kv_heads=2, ratio=3, w1=9, w2=4, chunk_tiles=2),
    "MHA, split": dict(n_k=40, kv_heads=2, ratio=1, w1=20, w2=5, batch=1, num_splits=3),
    "fewer queries": dict(n_q=5, n_k=33, ratio=5, w1=30, w2=30, num_splits=2),
    "group over a tile": dict(n_k=6, ratio=20, w1=6, w2=2, batch=1),
    "one pair": dict(n_k=18, ratio=2, w1=1, w2=1, batch=1),
    "one key": dict(n_k=1, w1=1, w2=1, kv_heads=2),
    "padded head_dim, negative scale": dict(n_k=20, ratio=4, dim=8, w1=7, w2=7, scale=-0.6),
    "zero scale": dict(n_k=17, ratio=2, w1=16, w2=3, scale=0.0, grad_lse=False),
    "fp16": dict(n_k=20, ratio=8, w1=12, w2=3, dtype="float16"),
    "packed": dict(lengths=(5, 0, 1, 37, 11), ratio=2, kv_heads=2, w1=30, w2=4, num_splits=2),
    "packed, one token a tile": dict(lengths=(1, 3, 2), ratio=64, w1=3, w2=2, share=64, chunk_tiles=3),
    "packed, two tokens a tile": dict(lengths=(3, 1, 7), ratio=8, w1=6, w2=6, share=8, chunk_tiles=2),
    "packed, many in a tile": dict(lengths=(1,) * 9 + (2, 3, 4), ratio=1, w1=5, w2=3, chunk_tiles=2),
    "decode": dict(n_q=1, n_k=40, ratio=4, w1=40, w2=9, decode=dict(heads=4, offsets=4, keys=16)),
    "decode, one part": dict(n_q=3, n_k=20, ratio=1, kv_heads=2, w1=17, w2=3, decode=dict(heads=1, offsets=4, keys=32)),
    "decode, empty parts": dict(
        n_q=6, n_k=6, ratio=4, w1=50, w2=6, scale=-0.5, decode=dict(heads=2, offsets=2, keys=16)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_arithmetic_in_the_interpreter(name, interpreter):
    """Out, lse and all gradients of the kernel bodies against the fp64 truth; memory starts as NaN."""
    allowed = 2e-3 if CASES[name].get("dtype") == "float16" else 2e-6
    for output, error in interpreter("interpreted_kernels", CASES[name]).items():
        assert error < allowed, f"{output}: relative error {error:.1e}"  # NaN fails too


@pytest.fixture(scope="module")
def manifest():
    return json.loads((Path(simplex_ops.__file__).parent / "manifest.json").read_text())


def test_every_arch_has_the_same_keys(manifest):
    keys = {}
    for row in manifest["kernels"]:
        keys.setdefault(row["arch"], set()).add((row["family"], json.dumps(row["key"])))
    # Hopper has more: variants that were measured to pay there and kernels in Gluon, beside the ones for every call.
    hopper = keys.pop("sm90a", set())
    assert len({frozenset(of_arch) for of_arch in keys.values()}) <= 1
    if not os.environ.get("SIMPLEX_ARCHS"):
        assert set(keys) == {"sm80", "sm100f", "sm120f"}
        assert hopper > keys["sm80"]


def argument_lists(source):
    """The names in each list {{"name", value}, ...} of the C++ text."""
    items = []
    for match in re.finditer(r'\{"(\w+)",', source):
        end, depth = match.end(), 1
        while depth > 0:
            depth += {"{": 1, "}": -1}.get(source[end], 0)
            end += 1
        items.append((match.start(), end, match[1]))
    lists = []
    for item, before in zip(items, [None, *items], strict=False):
        if before is None or source[before[1] : item[0]].strip() != ",":
            lists.append([])
        lists[-1].append(item[2])
    return lists


def test_launches_name_their_arguments_in_order(manifest):
    """The launcher compares them, too, but at a launch: on a GPU."""
    orders = {row["family"]: [name for name, *_ in row["parameters"]] for row in manifest["kernels"]}
    found = 0
    for path in sorted((ROOT / "csrc").glob("*.cpp")):
        source = path.read_text()
        headers = re.findall(r'#include "(.*)"', source)  # families may be named in one
        text = source + "".join((ROOT / "csrc" / header).read_text() for header in headers)
        launched = [f" {' '.join(names)} " for family, names in orders.items() if f'"{family}"' in text]
        known = set(" ".join(launched).split())
        for names in argument_lists(source):
            if known.issuperset(names):
                found += 1
                assert any(f" {' '.join(names)} " in order for order in launched), f"{path.name}: {names}"
    assert found > 10


@functools.cache
def main_loops(cubin):
    """The instructions of the smallest loops that hold more than one tensor-core product, from the disassembly."""
    import triton

    nvdisasm = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    text = subprocess.run([str(nvdisasm), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    instructions, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    jumps = [(labels[m[1]], i) for i, x in enumerate(instructions) if (m := re.search(r"BRA.*?(\.L_x_\d+)", x))]
    loops = []
    for a, b in sorted(jumps, key=lambda jump: jump[1] - jump[0]):
        body = instructions[a : b + 1]
        # Where warps wait for a barrier lies behind the kernel's end and jumps back, too.
        is_loop = a <= b and sum("MMA" in x for x in body) >= 8 and not any("EXIT" in x for x in body)
        if is_loop and all(b < c or d < a for c, d in loops):
            loops.append((a, b))
    return [instructions[a : b + 1] for a, b in loops]


def loops_of(manifest, wanted):
    """(name, main loops) of the cubins wanted, from the build folder, which only who built the wheel here has."""
    folder = ROOT / "build" / "kernels"
    rows = [row for row in manifest["kernels"] if wanted(row)]
    if not folder.exists() or not rows:
        pytest.skip("the wheel was built elsewhere, or for other architectures")
    return [(row["name"], main_loops(folder / f"{row['name']}.cubin")) for row in rows]


@pytest.mark.parametrize("family", SPILLS)
def test_no_spills_in_the_main_loops(manifest, family):
    """Registers that do not fit go to local memory; that may happen around the loops that do the work, not inside."""
    for name, loops in loops_of(manifest, lambda row: row["family"] == family):
        assert len(loops) >= 2  # one for each warpgroup that multiplies
        spills = [x for loop in loops for x in loop if re.search(r"\b(LDL|STL)", x)]
        assert len(spills) <= SPILLS[family], f"{name}: {spills}"


def test_grassmann_kernels_do_not_spill(manifest):
    rows = [row for row in manifest["kernels"] if row["family"].startswith(("plucker_", "grassmann_"))]
    assert rows
    assert {row["name"]: row["spills"] for row in rows if row["spills"]} == {}


def test_dq_keeps_q_apart_from_the_score_gradients(manifest):
    """ptxas has given both left operands the same registers: from the second step on S was made of dS instead of q."""
    for name, loops in loops_of(manifest, lambda row: row["family"] == "two_simplicial_bwd_dq_scaled"):
        for loop in loops:
            operands = [m[1] for x in loop if (m := re.search(r"HGMMA\S+ R\d+, (R\d+),", x))]
            assert len(operands) >= 2
            assert len(operands) == len(set(operands)), f"{name}: {operands}"


def test_left_operands_of_fp32_outlive_their_products(manifest):
    """wgmma reads its left operand from registers at any time before it is waited for: nothing may write there until then."""

    def wanted(row):
        of_hopper = row["arch"] == "sm90a" and row["family"].startswith("two_simplicial")
        return of_hopper and row["key"].get("dtype") == "fp32" and row["tile"].get("BLOCK_M") == 64

    for name, loops in loops_of(manifest, wanted):
        products = 0
        for loop in loops:
            read = set()
            for x in loop + loop:
                if "WARPGROUP.DEPBAR" in x:
                    read = set()
                elif m := re.search(r"HGMMA\S+ R\d+, R(\d+),", x):
                    read |= set(range(int(m[1]), int(m[1]) + 4))
                    products += 1
                elif m := re.match(r"(?:@!?U?P\d+ )?(?!ST|RED|HGMMA)[A-Z0-9]+(\.\S+)? R(\d+),", x):
                    width = {".64": 2, ".WIDE": 2, ".128": 4}.get(
                        (re.search(r"\.(64|128|WIDE)\b", m[1] or "") or [""])[0], 1
                    )
                    assert not read & set(range(int(m[2]), int(m[2]) + width)), f"{name}: {x}"
        assert products


def test_each_gpu_has_the_shared_memory(manifest):
    """The host passes over a kernel that needs more, for the next one in its table: slower, and no word about it."""
    too_large = [r["name"] for r in manifest["kernels"] if r["shared"] > SMALLEST_SHARED[r["arch"]]]
    assert too_large == []


def test_cubins_are_reproducible(manifest, tmp_path):
    """Built again, from a copy of the sources in another folder, a cubin has the bits that were shipped."""
    (tmp_path / "elsewhere").mkdir()
    subprocess.run(["cp", "-r", str(ROOT / "triton_kernels"), str(tmp_path / "elsewhere")], check=True)
    script = """
import hashlib, sys, pathlib
from triton_kernels import build
build.configure_triton(pathlib.Path(sys.argv[1]))
for variant in build.all_variants():
    if variant.name in sys.argv[2:]:
        print(variant.name, hashlib.sha256(build.compile_variant(variant)[0]).hexdigest())
"""
    families = {row["family"]: row for row in manifest["kernels"] if row["key"].get("HEAD_DIM", 32) == 32}
    command = [sys.executable, "-c", script, str(tmp_path / "cache"), *(row["name"] for row in families.values())]
    env = os.environ | {"PYTHONPATH": str(tmp_path / "elsewhere")}
    built = subprocess.run(command, env=env, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split()
    assert dict(zip(built[::2], built[1::2], strict=True)) == {r["name"]: r["sha256"] for r in families.values()}


def test_manifest_describes_the_cubins_built():
    folder = ROOT / "build" / "kernels"
    if not folder.exists():
        pytest.skip("the wheel was built elsewhere: its cubins are inside _C.so only")
    for row in json.loads((folder / "manifest.json").read_text())["kernels"]:
        assert hashlib.sha256((folder / f"{row['name']}.cubin").read_bytes()).hexdigest() == row["sha256"], row["name"]
