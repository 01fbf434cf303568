"""What is installed: `simplex_ops.info()` and `python -m simplex_ops`."""

import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from . import _library


@dataclass(frozen=True)
class Info:
    """The installed package and what it runs on; `print(info())` is made to be pasted into a bug report."""

    version: str
    torch: str
    autograd: str  # "cpp": the C++ binding built for this torch; "python": the slower fallback
    devices: tuple[str, ...]
    archs: tuple[str, ...]  # CUDA architectures with kernels in the package
    kernels: int

    def __str__(self) -> str:
        rows = {
            "simplex_ops": self.version,
            "torch": self.torch,
            "autograd": {"cpp": "C++ binding", "python": "Python fallback"}[self.autograd],
            "devices": ", ".join(self.devices),
            "kernels": f"{self.kernels} for {', '.join(self.archs)}" if self.kernels else "none, CPU only",
        }
        return "\n".join(f"{name:<12} {value}" for name, value in rows.items())


def info() -> Info:
    """Version, torch, devices, the CUDA architectures and kernels in the package, and the active autograd binding."""
    manifest = _library.FOLDER / "manifest.json"
    kernels = json.loads(manifest.read_text())["kernels"] if manifest.exists() else []
    try:
        installed = version("simplex_ops")
    except PackageNotFoundError:  # imported from a folder that pip did not install
        installed = "unknown"
    return Info(
        version=installed,
        torch=torch.__version__,
        autograd=_library.autograd,
        devices=("cpu", *(_cuda_device(i) for i in range(torch.cuda.device_count()))),
        archs=tuple(sorted({kernel["arch"] for kernel in kernels}, key=lambda arch: (len(arch), arch))),
        kernels=len(kernels),
    )


def _cuda_device(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return f"cuda:{index} {properties.name} (sm_{properties.major}{properties.minor})"
