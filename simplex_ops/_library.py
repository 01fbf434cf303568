"""Loads the compiled ops, then the autograd binding that fits the running torch."""

import importlib.abc
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

FOLDER = Path(__file__).parent
OLDEST_TORCH = (2, 10)


def torch_minor(version: str) -> tuple[int, int]:
    """(2, 13) for "2.13.0+cpu"; ImportError for a torch without the stable ABI that the ops are built on."""
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < OLDEST_TORCH:
        raise ImportError(f"simplex_ops: expected torch to be at least 2.10, got {version}")
    return major, minor


def load_ops() -> None:
    library = FOLDER / "_C.so"
    if not library.exists():
        raise ImportError(
            f"simplex_ops: expected the compiled ops at {library}, got no such file: "
            "a source folder cannot be imported, install the package first (pip install .)"
        )
    torch.ops.load_library(library)


def load_autograd(minor: tuple[int, int], choice: str) -> str:
    """Makes the ops differentiable and autocast-aware; returns what is active, "cpp" or "python".

    choice "" takes the C++ binding if the wheel holds one for this torch, "cpp" demands it, "python" leaves it aside.
    """
    if choice not in ("", "cpp", "python"):
        raise ImportError(f"simplex_ops: expected SIMPLEX_AUTOGRAD to be cpp, python or unset, got {choice}")
    binding = FOLDER / "_autograd_{}_{}.so".format(*minor)
    if choice == "cpp" and not binding.exists():
        raise ImportError(f"simplex_ops: SIMPLEX_AUTOGRAD=cpp, but the package has no {binding.name} for this torch")
    if choice != "python" and binding.exists():
        try:
            torch.ops.load_library(binding)
            return "cpp"
        except OSError as error:  # a torch of this minor, but of another ABI: somebody's own build
            if choice == "cpp":
                raise ImportError(f"simplex_ops: {binding.name} does not load: {error}") from error
            warnings.warn(f"simplex_ops: autograd runs through Python, {binding.name} fails: {error}", stacklevel=2)

    from . import _autograd

    _autograd.register()
    return "python"


def register_flops(op: torch._ops.OpOverloadPacket, formula: Callable[..., int]) -> None:
    """torch.utils.flop_counter.register_flop_formula, once somebody imports that module: it imports Triton, which alone
    takes longer than all of simplex_ops."""

    def register() -> None:
        from torch.utils.flop_counter import register_flop_formula

        register_flop_formula(op)(formula)

    _after_import("torch.utils.flop_counter", register)


def _after_import(module: str, action: Callable[[], None]) -> None:
    if module in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Watcher(module, action))


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it lets the other finders find `module` and runs `action` after its execution."""

    def __init__(self, module: str, action: Callable[[], None]):
        self.module, self.action = module, action

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.action()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


minor = torch_minor(torch.__version__)
load_ops()
autograd = load_autograd(minor, os.environ.get("SIMPLEX_AUTOGRAD", ""))
