"""What the host tests share: the extension's build, rows of a kernel table, what the fake driver saw."""

import fcntl
import importlib.util
import re
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

FP32, FP16, BF16 = 0, 1, 2
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376, 75: 65536, 110: 232448}
DRIVER_13_1, DRIVER_13_2 = 13010, 13020
ARCHS = ["sm_80", "sm_90a", "sm_100f", "sm_120f"]

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "csrc" / name for name in ("driver.cpp", "kernel.cpp", "launch.cpp")]
SOURCES += [ROOT / "tests/host" / name for name in ("fake_driver.cpp", "bindings.cpp")]

RULES = """
rule compile
  command = g++ -MMD -MF $out.d {flags} -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = g++ -shared $in -o $out -lpthread -ldl
"""


def build() -> Path:
    """build/host/simplex_host.so: csrc's host logic, the fake driver and pybind11; incremental, by ninja."""
    import pybind11

    # Found, not imported: importing Triton takes seconds and its headers are all that is needed.
    triton = Path(importlib.util.find_spec("triton").origin).parent
    includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    flags = "-O2 -g0 -std=c++17 -fPIC -Wall -Wextra " + " ".join(f"-I{path}" for path in includes)
    folder = ROOT / "build/host"
    folder.mkdir(parents=True, exist_ok=True)
    library = f"simplex_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    lines = [RULES.format(flags=f"{flags} -idirafter {triton / 'backends/nvidia/include'}")]
    lines += [f"build {source.stem}.o: compile {source}" for source in SOURCES]
    lines.append(f"build {library}: link {' '.join(f'{source.stem}.o' for source in SOURCES)}\n")
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of the workers of pytest-xdist one builds and the others find it done
        (folder / "build.ninja").write_text("\n".join(lines))
        done = subprocess.run([sys.executable, "-m", "ninja", "-C", folder], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the test extension does not compile:\n{done.stdout}{done.stderr}")
    return folder / library


def load_extension(path):
    spec = importlib.util.spec_from_file_location("simplex_host", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(host, capabilities, version=DRIVER_13_1):
    host.reset(version, [(*divmod(c, 10), SHARED[c]) for c in capabilities])
    host.load_driver(host.__file__)  # the extension exports the functions of libcuda
    host.set_thread(0x1000, 0)


def row(arch="sm_90a", dtype=BF16, dim=64, **changes):
    number, suffix = re.fullmatch(r"sm_(\d+)([af]?)", arch).groups()
    return {
        "name": f"scale_fwd-{dtype}-{dim}-{arch}", "family": "scale_fwd", "symbol": "scale_fwd", "arch": int(number),
        "arch_suffix": suffix or "\0", "num_warps": 4, "num_ctas": 1, "shared": 1024, "cooperative": 0, "pdl": 0,
        "key": [("dtype", dtype), ("HEAD_DIM", dim)], "tile": [("BLOCK_M", 128)], "params": [], "tensor_maps": [],
    } | changes  # fmt: skip


def calls(host, function):
    """The arguments of every call of a driver function, in order."""
    return [values for name, values in host.calls() if name == function]


def launched(host):
    [values] = calls(host, "cuLaunchKernelEx")
    return values


def simple_kernel(host, **changes):
    t = host.ParamType
    params = [("x_ptr", t.Pointer, 16), ("n", t.I32, 1), ("stride", t.I64, 8), ("scale", t.F32, 1)]
    host.set_param_sizes([8, 4, 8, 4, 8, 8])
    [kernel] = host.set_table([row(params=params, **changes)])
    return kernel


def simple_arguments(host, **changes):
    t = host.ParamType
    values = {"x_ptr": (t.Pointer, 0x7F0000000010), "n": (t.I32, -5), "stride": (t.I64, 1 << 40), "scale": (t.F32, 0.1)}
    return [(name, *value) for name, value in (values | changes).items()]


def map_kernel(host, block_size=(64, 32), elem_size=2, elem_type=10, fp4_padded=False):
    t = host.ParamType
    meta = dict(swizzle=3, elem_size=elem_size, elem_type=elem_type, fp4_padded=fp4_padded, block_size=block_size)
    params = [("x_desc", t.TensorMap, 1), ("n", t.I32, 1)]
    rank = len(block_size)
    host.set_param_sizes([128, *[4] * rank, *[8] * rank, 4, 8, 8])
    [kernel] = host.set_table([row(params=params, tensor_maps=[meta])])
    return kernel


def launch_map(host, kernel, data, shape, strides):
    t = host.ParamType
    args = [("x_desc", t.TensorMap, host.TensorDescriptor(data, shape, strides)), ("n", t.I32, 9)]
    host.launch(kernel, 0, 0, [1, 1, 1], args)


def in_threads(number, work):
    """work(0) ... work(number - 1), all at once, each on a new thread."""
    errors = []
    barrier = threading.Barrier(number)

    def run(index):
        try:
            barrier.wait()
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
