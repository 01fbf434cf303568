"""Variant: one row of the kernel table, one cubin of the wheel."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from triton import language
from triton.experimental.gluon import language as gl

# Value of a "dtype" key -> type in a Triton signature. The order is csrc/kernel.h's enum DType.
DTYPES = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}


@dataclass(frozen=True)
class Variant:
    """A Triton function with every constant chosen.

    `key` is what the host selects by (dtype, HEAD_DIM, ...); `tile` is what was measured for this arch: the other
    constexprs of the function, and Triton's num_warps, num_stages and launch_pdl. The host reads both back by name.
    """

    function: Any  # triton.JITFunction or gluon's
    arch: str  # "sm80", "sm90a", "sm100f", "sm120f"
    key: dict[str, Any]
    tile: dict[str, int]

    @property
    def family(self) -> str:
        return self.function.__name__

    @property
    def name(self) -> str:
        """`two_simplicial_fwd-dtype=bf16-HEAD_DIM=128-SHARE=1-sm90a`, in files, manifest, errors and profiles."""
        return "-".join([self.family, *(f"{k}={v}" for k, v in self.key.items()), self.arch])

    @property
    def capability(self) -> int:
        return int(self.arch.removeprefix("sm").rstrip("af"))

    def constants(self) -> dict[str, int]:
        """Constexpr arguments of the function: key and tile less what is a launch option or a type."""
        return {k: v for k, v in (self.key | self.tile).items() if k not in ("dtype", "num_warps", "num_stages", "launch_pdl")}

    def parameters(self) -> list[tuple[str, str, int]]:
        """(name, Triton type, divisibility) of each run-time argument, from annotations like `"*dtype:16"`.

        `"tensordesc<dtype[8,HEAD_DIM]>"` is a TMA descriptor, by the box that one copy moves to Gluon's default layout.
        """
        rows = []
        for p in self.function.params:
            if not p.is_constexpr:
                spelled, _, divisibility = p.annotation.partition(":")
                if "dtype" in spelled:
                    spelled = spelled.replace("dtype", DTYPES[self.key["dtype"]])
                if match := re.fullmatch(r"tensordesc<(\w+)\[(.*)\]>", spelled):
                    box = [self.constants().get(size) or int(size) for size in match[2].split(",")]
                    layout = gl.NVMMASharedLayout.get_default_for(box, language.str_to_ty(match[1], None))
                    spelled = f"tensordesc<{match[1]}{str(box).replace(' ', '')},{layout!r}>"
                rows.append((p.name, spelled, int(divisibility or 1)))
        return rows
