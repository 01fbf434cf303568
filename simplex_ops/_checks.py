"""What the fakes of every op check with: the conditions and words of csrc/op.h, on sizes that may be symbols; and what
the functions that call the ops share."""

import torch
from torch import Tensor


def expect(op: str, condition: bool, what: str) -> None:
    """torch._check, because the condition may be symbolic: then it becomes a guard, not a constant."""
    torch._check(condition, lambda: f"{op}: expected {what}")


def expect_sizes(op: str, name: str, x: Tensor, shape: tuple[int, ...], origin: str) -> None:
    what = f"{name} to have shape {list(shape)} ({origin}), got {list(x.shape)}"
    expect(op, x.dim() == len(shape), what)
    for size, wanted in zip(x.shape, shape, strict=True):
        expect(op, size == wanted, what)


def expect_dtype(op: str, name: str, x: Tensor, dtype: torch.dtype) -> None:
    expect(op, x.dtype == dtype, f"{name} to have dtype {_NAMES.get(dtype, dtype)}, got {dtype_name(x)}")


def expect_like(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    dtypes = f"{name} to have the dtype of {other_name} ({dtype_name(other)}), got {dtype_name(x)}"
    expect(op, x.dtype == other.dtype, dtypes)
    expect_device(op, name, x, other_name, other)


def expect_device(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    what = f"{name} to have the device of {other_name} ({other.device}), got {x.device}"
    expect(op, x.device == other.device, what)


def expect_floating(op: str, name: str, x: Tensor) -> None:
    names, dtypes = _FLOATING.get(x.device.type, ("", (x.dtype,)))
    expect(op, x.dtype in dtypes, f"{name} to be {names} on {x.device.type}, got {dtype_name(x)}")


def expect_cu_seqlens(op: str, cu_seqlens: Tensor, name: str, x: Tensor) -> None:
    """Sequences that lie one after the other in x [1, length, ...]. The values are for the kernels to look at."""
    what = f"cu_seqlens to be 1-dimensional [sequences + 1], got {cu_seqlens.dim()} dimensions"
    expect(op, cu_seqlens.dim() == 1, what)
    count = cu_seqlens.shape[0]
    expect(op, count >= 2, f"cu_seqlens to hold at least 2 values, got {count}")
    expect_dtype(op, "cu_seqlens", cu_seqlens, torch.int32)
    expect_device(op, "cu_seqlens", cu_seqlens, name, x)
    expect(op, x.shape[0] == 1, f"the batch of {name} to be 1 with cu_seqlens, got {x.shape[0]}")


def wide_dtype(x: Tensor) -> torch.dtype:
    """What sums over x are taken and returned in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def without_autocast(x: Tensor) -> torch.autocast:
    """A region where autocast leaves ops on x's device alone. Meta tensors, which have no autocast, may be in it, too."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


def dtype_name(x: Tensor) -> str:
    """BFloat16, Float: as C++ prints it."""
    return x.type().rpartition(".")[2].removesuffix("Tensor")


_NAMES = {torch.float32: "Float", torch.float64: "Double", torch.int32: "Int", torch.bool: "Bool"}
_LOW = (torch.float32, torch.float16, torch.bfloat16)
_FLOATING = {
    "cpu": ("float32, float64, float16 or bfloat16", (*_LOW, torch.float64)),
    "cuda": ("float32, float16 or bfloat16", _LOW),
}
