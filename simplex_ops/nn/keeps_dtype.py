"""Buffers that stay as precise as they are made."""

from typing import Any, ClassVar

from torch import nn


class KeepsDtype(nn.Module):
    """A module whose buffers named in `kept` move between devices with it, but not to another dtype."""

    kept: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = {name: getattr(self, name) for name in self.kept}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if not buffer.is_meta:
                setattr(self, name, buffer.to(getattr(self, name).device))
        return self
