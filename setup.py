"""Build of the wheel: cubins (triton_kernels), the stable-ABI _C.so and a C++ autograd binding. Needs no GPU or nvcc.

Environment: SIMPLEX_ARCHS="80,90" builds only those architectures; SIMPLEX_KERNELS_DIR=DIR takes the kernels from that
output folder of `python -m triton_kernels.build DIR` instead of compiling them; SIMPLEX_BINDINGS_DIR=DIR adds the `_autograd_*.so`
of that folder, made in other environments by `python setup.py build_binding --out DIR` (one per minor release of torch,
whose C++ ABI they depend on).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build"
KERNELS = Path(os.environ.get("SIMPLEX_KERNELS_DIR") or BUILD / "kernels").resolve()

# GCC 12 sees an overflow in torch's intrusive_ptr. -z defs: a missing symbol fails here, not at import.
COMPILE = "-O3 -g0 -std=c++17 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -Wall -Wno-stringop-overflow"
LINK = "-shared -s -Wl,-z,defs -Wl,--as-needed"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10, the oldest that _C.so runs on

NINJA = """
rule compile
  command = {cxx} -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $in
rule link
  command = {cxx} {link} $in -o $out {libraries}
  description = $out
"""


def binding_name() -> str:
    import torch

    major, minor = torch.__version__.split(".")[:2]
    return f"_autograd_{major}_{minor}.so"


def compile_library(name: str, sources: list[Path], defines="", also: list[Path] = (), targets: list[str] = ()) -> Path:
    """build/cpp/<torch>/<name>, incrementally, or only the `targets` of it. `also`: what the kernel table includes behind
    the compiler's back."""
    import torch
    import triton
    from torch.utils.cpp_extension import include_paths, library_paths

    folder = BUILD / "cpp" / f"torch-{torch.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    cuda_types = Path(triton.__file__).parent / "backends/nvidia/include"
    # -isystem: warnings are for our own code. Triton's folder comes last: torch must not find its other headers.
    includes = [f"-I{ROOT / 'csrc'}", *(f"-isystem {p}" for p in include_paths()), f"-idirafter {cuda_types}"]
    libraries = [*(f"-L{p}" for p in library_paths()), "-ltorch_cpu -lc10 -lpthread -ldl"]
    rules = NINJA.format(cxx=os.environ.get("CXX", "g++"), link=LINK, libraries=" ".join(libraries))
    # Error messages name files: by a relative path, so that builds in two places are alike.
    prefixes = [f"-ffile-prefix-map={p}=." for p in (ROOT, Path(torch.__file__).parents[1])]
    flags = " ".join([COMPILE, f"-Wa,-I{KERNELS}", defines, *prefixes, *includes, os.environ.get("CXXFLAGS", "")])
    lines, objects = [rules], []
    for source in sources:
        objects.append(f"{source.stem}.o")
        hidden = f" | {' '.join(map(str, also))}" if source.parent == KERNELS else ""
        lines.append(f"build {objects[-1]}: compile {source}{hidden}\n  flags = {flags}")
    lines.append(f"build {name}: link {' '.join(objects)}\ndefault {name}\n")
    (folder / f"{name}.ninja").write_text("\n".join(lines))
    subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder), "-f", f"{name}.ninja", *targets], check=True)
    return folder / name


def build_binding() -> Path:
    return compile_library(binding_name(), [ROOT / "csrc/autograd.cpp"], "-std=c++20")  # torch 2.14's headers


def build_package() -> list[Path]:
    """Everything compiled that belongs into simplex_ops/."""
    sources = sorted(set(ROOT.glob("csrc/*.cpp")) - {ROOT / "csrc/autograd.cpp"})
    prebuilt = os.environ.get("SIMPLEX_BINDINGS_DIR")
    bindings = sorted(Path(prebuilt).glob("_autograd_*.so")) if prebuilt else []

    def compile_core(targets=()):
        cubins = sorted(KERNELS.glob("*.cubin"))
        return compile_library("_C.so", [*sources, KERNELS / "kernels.cpp"], STABLE_ABI, cubins, targets)

    # The C++ compiles while the kernels do: its largest files, one core each, would leave the others idle.
    command = [sys.executable, "-m", "triton_kernels.build", str(KERNELS)]
    with subprocess.Popen("true" if os.environ.get("SIMPLEX_KERNELS_DIR") else command, cwd=ROOT) as kernels:
        if binding_name() not in [b.name for b in bindings]:
            bindings.append(build_binding())
        compile_core([f"{source.stem}.o" for source in sources])
    if kernels.returncode:
        raise subprocess.CalledProcessError(kernels.returncode, command)
    return [compile_core(), *bindings, KERNELS / "manifest.json"]


class BuildLibraries(build_ext):
    """Takes the place of the compilation of Python extensions: these libraries contain no Python."""

    def package_dir(self) -> Path:
        return ROOT / "simplex_ops" if self.inplace else Path(self.build_lib, "simplex_ops")

    def run(self):
        package = self.package_dir()
        package.mkdir(parents=True, exist_ok=True)
        for stale in package.glob("_autograd_*.so"):
            stale.unlink()
        self.built = [shutil.copy2(file, package) for file in build_package()]

    def get_outputs(self):
        return [str(file) for file in getattr(self, "built", [])]

    def get_output_mapping(self):
        return {}


class BuildBinding(Command):
    description = "build only the C++ autograd binding, for the torch that is installed"
    user_options = [  # noqa: RUF012 (setuptools' own interface)
        ("out=", None, "folder that receives _autograd_<major>_<minor>.so"),
    ]

    def initialize_options(self):
        self.out = None

    def finalize_options(self):
        self.out = Path(self.out or BUILD / "bindings")

    def run(self):
        self.out.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build_binding(), self.out)


class AnyPythonWheel(bdist_wheel):
    def run(self):
        # setuptools packs whatever earlier builds left here, modules since renamed included.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("simplex_ops._C", [])],  # makes the wheel a platform wheel
    cmdclass={"build_ext": BuildLibraries, "build_binding": BuildBinding, "bdist_wheel": AnyPythonWheel},
)
