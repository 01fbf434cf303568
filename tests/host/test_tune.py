"""benchmarks/tune.py without a GPU: candidates are compiled, the host takes them instead of the table's rows, and each family has
an op to be timed in."""

import ctypes
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from host.harness import BF16, ROOT, row, start

TUNE = ROOT / "benchmarks/tune.py"
FAMILY = "two_simplicial_bwd_merge"


def run(*arguments):
    return subprocess.run([sys.executable, str(TUNE), *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    folder = tmp_path_factory.mktemp("candidates")
    keys = ["--key", "dtype=bf16", "--key", "HEAD_DIM=32"]
    done = run(
        "compile",
        FAMILY,
        "--arch",
        "sm_80",
        *keys,
        "--tile",
        "BLOCK_N=16,32,3",
        "--tile",
        "num_warps=4",
        "--out",
        folder,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_compile_leaves_out_what_does_not_work(compiled):
    folder, printed = compiled
    [kept] = json.loads((folder / "manifest.json").read_text())["kernels"]  # 16 is shipped, 3 no power of two
    assert kept["replaces"] == f"{FAMILY}-dtype=bf16-HEAD_DIM=32-sm80"
    assert kept["tile"] == {"BLOCK_N": 32, "num_warps": 4}
    assert (folder / f"{kept['name']}.cubin").stat().st_size == kept["size"]
    assert "BLOCK_N=3 num_warps=4: left out, " in printed
    assert "[1/2]" in printed


def test_a_candidate_takes_the_place_of_its_row(compiled, host):
    start(host, [80])
    key = [("dtype", BF16), ("HEAD_DIM", 32)]
    host.set_table([row("sm_80", family=FAMILY, key=key, tile=[("BLOCK_N", 16)])])
    family = host.KernelFamily(FAMILY)
    candidate = ctypes.CDLL(str(compiled[0] / "candidates.so")).candidate
    candidate.restype = ctypes.c_void_p
    swap = ctypes.CDLL(host.__file__).simplex_try_kernel
    swap.argtypes, swap.restype = [ctypes.c_void_p], ctypes.c_bool
    swap(candidate(0))
    kernel = family.find(0, BF16, 32)
    assert (kernel["BLOCK_N"], kernel.name) == (32, f"{FAMILY}-dtype=bf16-HEAD_DIM=32-sm80+BLOCK_N=32-num_warps=4")
    assert ctypes.string_at(kernel.cubin, 4) == b"\x7fELF"
    assert not swap(None)
    assert family.find(0, BF16, 32)["BLOCK_N"] == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone"], "expected a family with kernels for sm90a and that key, got gone"),
        ([FAMILY, "--key", "HEAD_DIM=48"], "expected a family with kernels for sm90a and that key"),
        ([FAMILY, "--tile", "BLOCK_M=64"], "expected --tile to name one of BLOCK_N, num_warps, got BLOCK_M"),
    ],
)
def test_compile_says_what_it_expects(arguments, message, tmp_path):
    pytest.importorskip("triton")
    done = run("compile", *arguments, "--arch", "sm_90a", "--out", tmp_path)
    assert done.returncode
    assert message in done.stderr


def test_rows_names_the_tile_that_is_right_and_fastest_over_all_shapes(tmp_path):
    def result(tile, speedup, shape, right=True, shipped=False):
        return {"row": "a", "tile": {"M": tile}, "speedup": speedup, "shape": shape, "right": right, "shipped": shipped}

    rows = [result(1, 1.0, s, shipped=True) for s in ("x", "y")]
    rows += [result(2, 1.4, "x"), result(2, 0.9, "y")]  # 1.12
    rows += [result(3, 1.1, "x"), result(3, 1.3, "y")]  # 1.20
    rows += [result(4, 9.0, "x"), result(4, 9.0, "y", right=False)]
    rows += [result(5, 3.0, "x")]
    rows += [result(6, 1.0, "x", shipped=True) | {"row": "b"}, result(7, 1.01, "x") | {"row": "b"}]
    (tmp_path / "tuned.json").write_text(json.dumps({"rows": rows}))
    assert run("rows", tmp_path / "tuned.json").stdout == "a: M=3  # 1.20x of M=1\nb: M=6 stays\n"


def test_rows_are_written_into_the_table_that_the_build_reads(tmp_path):
    """The best tile replaces its row's or is added, the other rows stay, and a second time changes nothing."""
    head, c = '"""Doc."""\n\nTILES = {\n', '    # kept\n    "c": {"M": 9},\n'
    table = tmp_path / "tiles.py"
    table.write_text(head + '    # old\n    "a": {"M": 1},\n' + c + "}\n")
    rows = [{"row": name, "tile": {"M": 1}, "speedup": 1.0, "shape": None, "shipped": True} for name in "ab"]
    rows += [row | {"tile": {"M": 2}, "speedup": 1.5, "right": True, "shipped": False} for row in rows]
    machine = {"hardware": "a GPU", "date": "2026-11-22"}
    (tmp_path / "tuned.json").write_text(json.dumps({"rows": rows, "machine": machine}))
    for _ in range(2):
        run("rows", tmp_path / "tuned.json", "--write", "--table", table)
        won = "".join(f'    # 1.50x, a GPU, 2026-11-22\n    "{name}": {{"M": 2}},\n' for name in "ab")
        assert table.read_text() == head + won + c + "}\n"


def test_each_family_has_an_op_to_be_checked_and_timed_in(monkeypatch):
    """What `time` compares with fp64 on the GPU; here the op's CPU kernels answer."""
    simplex_ops = pytest.importorskip("simplex_ops")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    tune = importlib.import_module("tune")
    manifest = json.loads((Path(simplex_ops.__file__).parent / "manifest.json").read_text())
    # One row of each family; fp16, which the CPU has for some ops only, stands for bf16 too where data is moved.
    rows = {
        r["family"]: r["key"] | {"dtype": "bf16"} for r in manifest["kernels"] if r["key"].get("HEAD_DIM", 64) <= 64
    }
    for family, key in rows.items():
        errors = tune.checker(family, key, (1, 100, 2 * key.get("SHARE", 1), 2, 20, 5))()
        assert errors, family
        assert max(errors) < 1e-2, f"{family}: {errors}"
