"""Compile the test-only extension (csrc's host logic, a fake driver, pybind11) to build/host, incrementally by ninja."""

import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

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
    (folder / "build.ninja").write_text("\n".join(lines))
    done = subprocess.run([sys.executable, "-m", "ninja", "-C", folder], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the test extension does not compile:\n{done.stdout}{done.stderr}")
    return folder / library
