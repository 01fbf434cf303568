"""Autograd and autocast for every op of the library, derived from the schemas: the Python twin of csrc/autograd.cpp.

Used where the wheel holds no C++ binding for the running torch, so that a wheel outlives the torches it was built for.
The convention, by name: op X has X_backward; each argument of X_backward is grad_<output of X> (`Tensor?`: None where
there is no gradient, `Tensor`: zeros), an input of X or an output of X; each return is grad_<input of X>. An output
without a grad_ argument is not differentiable, nor is any of an op without X_backward: they are constants to autograd. An
op that writes to an argument says so in its schema, and autograd notices where somebody has saved what was there.
"""

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad

_registrations = torch.library.Library("simplex", "IMPL")  # lives as long as the process


def register() -> None:
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("simplex::")}
    for name in sorted(names):
        written = [a.name for a in _overload(name)._schema.arguments if a.alias_info and a.alias_info.is_write]
        if written:
            _register_writing(_overload(name), written)
        if f"{name}_backward" not in names and not name.endswith("_backward"):
            _register_constant(_overload(name), written)
        if f"{name}_backward" in names:
            op, backward = _overload(name), _overload(f"{name}_backward")
            _register_autograd(op, _differentiable(op, backward))
            _register_autograd(backward, _once_differentiable(op, backward))
            for device in ("cpu", "cuda"):
                _register_autocast(op, device)


def _overload(name: str) -> OpOverload:
    overload: OpOverload = getattr(torch.ops.simplex, name.removeprefix("simplex::")).default
    return overload


def _register_autograd(op: OpOverload, function: type[torch.autograd.Function]) -> None:
    """torch.library.register_autograd would do, but for forward-mode AD: it drops the tangents without a word."""
    parameters = op._schema.arguments

    def kernel(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        args += tuple(parameter.default_value for parameter in parameters[len(args) :])  # the dispatcher drops defaults
        if forward_ad._current_level >= 0 and any(
            forward_ad.unpack_dual(x).tangent is not None for x in _tensors(args)
        ):
            raise NotImplementedError(f"{op._schema.name}: forward-mode AD (jvp) is not supported, use reverse mode")
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            if torch._C._are_functorch_transforms_active():  # they want a rule for each transform from a Function
                raise NotImplementedError(
                    f"{op._schema.name}: torch.func needs the C++ autograd binding, and there is none for torch "
                    f"{torch.__version__} here; torch.autograd.grad works"
                )
            return function.apply(keys, *args)
        return _below_autograd(op, keys, args)

    _registrations.impl(op, kernel, "Autograd", with_keyset=True)


def _register_constant(op: OpOverload, written: list[str]) -> None:
    def kernel(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        for name, arg in zip((a.name for a in op._schema.arguments), args, strict=False):
            if name in written and torch.is_grad_enabled() and arg.requires_grad:
                raise RuntimeError(
                    f"{op._schema.name.removeprefix('simplex::')}: expected {name}, which is updated in place, not to require grad"
                )
        return _below_autograd(op, keys, args)

    _registrations.impl(op, kernel, "Autograd", with_keyset=True)


def _register_writing(op: OpOverload, written: list[str]) -> None:
    def kernel(keys: torch._C.DispatchKeySet, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            result = op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args)
        for parameter, arg in zip(op._schema.arguments, args, strict=False):
            if parameter.name in written and not arg.is_inference():
                torch.autograd.graph.increment_version(arg)
        return result

    _registrations.impl(op, kernel, "ADInplaceOrView", with_keyset=True)


def _below_autograd(op: OpOverload, keys: torch._C.DispatchKeySet, args: tuple) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keys & torch._C._after_autograd_keyset, *args)


def _tensors(args: tuple) -> list[Tensor]:
    return [arg for arg in args if isinstance(arg, Tensor)]


def _differentiable(op: OpOverload, backward: OpOverload) -> type[torch.autograd.Function]:
    inputs = {argument.name: i for i, argument in enumerate(op._schema.arguments)}
    outputs = {result.name: i for i, result in enumerate(op._schema.returns)}
    arguments = [argument.name for argument in backward._schema.arguments]
    results = [result.name.removeprefix("grad_") for result in backward._schema.returns]
    optional = {a.name for a in backward._schema.arguments if isinstance(a.type, torch.OptionalType)}
    grads = {f"grad_{name}": i for name, i in outputs.items() if f"grad_{name}" in arguments}
    saved = [name for name in arguments if name not in grads]
    fixed = [i for name, i in outputs.items() if f"grad_{name}" not in grads]
    for name in saved:
        if name not in inputs and name not in outputs:
            raise ValueError(f"{backward}: expected argument {name} to be an input, an output or grad_<output> of {op}")
    for name in results:
        if name not in inputs:
            raise ValueError(f"{backward}: expected every return to be grad_<input> of {op}, got {name}")

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keys: torch._C.DispatchKeySet, *args: Any) -> Any:
            result = _below_autograd(op, keys, args)
            out = result if isinstance(result, tuple) else (result,)
            values = {name: args[inputs[name]] if name in inputs else out[outputs[name]] for name in saved}
            ctx.tensors = [name for name, value in values.items() if isinstance(value, Tensor)]
            ctx.save_for_backward(*(values.pop(name) for name in ctx.tensors))
            ctx.values = values
            ctx.zeros = {
                name: (out[i].shape, out[i].dtype, out[i].device) for name, i in grads.items() if name not in optional
            }
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*(out[i] for i in fixed))
            return result

        @staticmethod
        def backward(ctx: Any, *output_grads: Tensor | None) -> Any:
            input_grads: list[Tensor | None] = [None] * (1 + len(inputs))
            if all(grad is None for grad in output_grads):
                return tuple(input_grads)
            values = dict(zip(ctx.tensors, ctx.saved_tensors, strict=True)) | ctx.values
            for name, i in grads.items():
                values[name] = output_grads[i]
                if values[name] is None and name in ctx.zeros:
                    shape, dtype, device = ctx.zeros[name]
                    values[name] = torch.zeros(shape, dtype=dtype, device=device)
            found = backward(*(values[name] for name in arguments))
            for name, grad in zip(results, found if isinstance(found, tuple) else (found,), strict=True):
                i = 1 + inputs[name]
                input_grads[i] = grad if ctx.needs_input_grad[i] else None
            return tuple(input_grads)

    return Backward


def _once_differentiable(op: OpOverload, backward: OpOverload) -> type[torch.autograd.Function]:
    message = f"{op._schema.name} is not twice differentiable: {backward._schema.name} has no derivative"

    class DoubleBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keys: torch._C.DispatchKeySet, *args: Any) -> Any:
            return _below_autograd(backward, keys, args)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            raise RuntimeError(message)

    return DoubleBackward


def _register_autocast(op: OpOverload, device: str) -> None:
    key = f"Autocast{device.upper()}"
    without_autocast = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(value: Any, dtype: torch.dtype) -> Any:
        """fp64 stays, as everywhere in torch."""
        if isinstance(value, Tensor) and value.device.type == device and value.is_floating_point():
            return value if value.dtype == torch.float64 else value.to(dtype)
        return value

    def kernel(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(without_autocast):
            return op(*(cast(arg, dtype) for arg in args))

    _registrations.impl(op, kernel, key)
