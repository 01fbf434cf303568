"""The ops inside torch: autograd, autocast, threads, streams, devices. Every test compares numbers.

test_package.py runs all of it, and test_tracing.py, once more through the Python autograd fallback.
"""

import gc
import threading
import weakref
from functools import partial

import pytest
import torch
from problem import NAMES, assert_truth, backward, grads_of, leaves, op_names, small, truth_of
from torch.utils.checkpoint import checkpoint

import simplex_ops

attention = partial(simplex_ops.two_simplicial_attention, return_lse=True)
overload = torch.ops.simplex.two_simplicial_attention.default
overload_backward = torch.ops.simplex.two_simplicial_attention_backward.default


# Registration


def differentiable_ops():
    """The others choose: what they return are indices."""
    names = op_names()
    return [name for name in names if f"{name}_backward" in names]


@pytest.mark.parametrize("name", op_names())
@pytest.mark.parametrize("key", ["CPU", "CUDA", "Meta"])
def test_every_op_has_every_kernel(name, key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


@pytest.mark.parametrize("name", differentiable_ops())
@pytest.mark.parametrize("key", ["Autograd", "AutocastCPU", "AutocastCUDA"])
def test_every_differentiable_op_follows_autograd_and_autocast(name, key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{name}_backward", "Autograd")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, requires_grad):
    problem = small(device)
    inputs = leaves(problem) if requires_grad else problem.inputs
    torch.library.opcheck(overload, (*inputs, 5, 3))
    torch.library.opcheck(overload, (*inputs, 1, 100, 0.3))
    packed = small(device, lengths=[5, 0, 8])
    inputs = leaves(packed) if requires_grad else packed.inputs
    torch.library.opcheck(overload, (*inputs, 5, 3), {"cu_seqlens": packed.cu_seqlens})


@pytest.mark.parametrize("with_grad_lse", [False, True])
def test_opcheck_backward(device, with_grad_lse):
    problem = small(device)
    out, lse = overload(*problem.inputs, 5, 3)
    grad_lse = problem.grad_lse if with_grad_lse else None
    torch.library.opcheck(overload_backward, (problem.grad_out, grad_lse, *problem.inputs, out, lse, 5, 3))


WRITING = {  # name: a call of an op that writes, the arguments that it writes to
    "grassmann_step": (lambda x: (x(1, 3, 4), x(1, 5, 4), x(8, 6), None, [1, 5], 0), [1]),
    "topk_route_calibrate_": (lambda x: (x(2, 6), 3, x(), x()), [2, 3]),
    "route_kv_append_": (
        lambda x: (x(1, 4, 1, 8), x(1, 4, 1, 8), x(1).int(), x(1, 2, 1, 8), x(1, 2, 1, 8), x(1, 2).int()), [0, 1, 2]
    ),
}  # fmt: skip


def test_every_op_that_writes_is_known_here():
    schemas = {name: getattr(torch.ops.simplex, name.split("::")[1]).default._schema for name in op_names()}
    writing = {
        name.split("::")[1]: [i for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write]
        for name, schema in schemas.items()
    }
    assert {name: written for name, written in writing.items() if written} == {n: w for n, (_, w) in WRITING.items()}


def writing_call(name, device):
    """An op that writes, arguments of it, and which of these it writes to."""
    make, written = WRITING[name]
    return getattr(torch.ops.simplex, name), make(lambda *shape: torch.zeros(shape, device=device)), written


@pytest.mark.parametrize("name", WRITING)
def test_what_an_op_writes_to_is_counted(device, name):
    """Else autograd would take what is there now for what somebody saved, and return wrong gradients."""
    op, arguments, written = writing_call(name, device)
    for i in written:
        weight = torch.ones((), device=device, requires_grad=True)
        product = weight * arguments[i].view_as(arguments[i])
        op(*arguments)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()
    with torch.inference_mode():
        op(*writing_call(name, device)[1])


@pytest.mark.parametrize("name", WRITING)
def test_what_an_op_writes_to_has_no_gradient(device, name):
    op, arguments, written = writing_call(name, device)
    for i in written:
        if arguments[i].is_floating_point():
            asked = [x.clone().requires_grad_() if i == j else x for j, x in enumerate(arguments)]
            argument = op.default._schema.arguments[i].name
            with pytest.raises(RuntimeError, match=f"^{name}: expected {argument}, .* not to require grad"):
                op(*asked)
            with torch.no_grad():
                op(*asked)


# Autograd


@pytest.mark.parametrize("wanted", NAMES)
def test_one_input_requires_grad(device, wanted):
    problem = small(device)
    inputs = [x.clone().requires_grad_(name == wanted) for name, x in zip(NAMES, problem.inputs, strict=True)]
    out, lse = attention(*inputs, problem.w1, problem.w2)
    backward(problem, out, lse)
    grads = grads_of(inputs)
    assert [name for name, grad in grads.items() if grad is not None] == [f"grad_{wanted}"]
    assert_truth({"out": out, "lse": lse, f"grad_{wanted}": grads[f"grad_{wanted}"]}, problem)


def test_no_graph_where_none_is_wanted(device):
    problem = small(device)
    with torch.no_grad():
        out, lse = attention(*leaves(problem), problem.w1, problem.w2)
    assert (out.requires_grad, lse.requires_grad) == (False, False)
    assert_truth({"out": out, "lse": lse}, problem)
    with torch.inference_mode():
        out, lse = attention(*[x.clone() for x in problem.inputs], problem.w1, problem.w2)
        assert out.is_inference()
    assert_truth({"out": out.clone(), "lse": lse.clone()}, problem)


@pytest.mark.parametrize("zeroed", ["grad_out", "grad_lse"])
def test_gradient_of_one_output(device, zeroed):
    """Nothing flows into the other output: the same as zeros, though the backward op sees None for grad_lse."""
    problem = small(device)
    truth = small(device)
    truth.inputs, truth.grad_out, truth.grad_lse = problem.inputs, problem.grad_out, problem.grad_lse
    setattr(truth, zeroed, torch.zeros_like(getattr(problem, zeroed)))
    inputs = leaves(problem)
    out, lse = attention(*inputs, problem.w1, problem.w2)
    output, grad = (lse, problem.grad_lse) if zeroed == "grad_out" else (out, problem.grad_out)
    output.backward(grad)
    assert_truth(grads_of(inputs), truth)


def test_strided_gradients(device):
    """What sum, expand and transpose send back is rarely contiguous."""
    problem = small(device)
    problem.grad_out = torch.randn_like(problem.grad_out).transpose(1, 3).contiguous().transpose(1, 3)
    problem.grad_lse = torch.ones((), device=device, dtype=problem.grad_lse.dtype).expand_as(problem.grad_lse)
    inputs = leaves(problem)
    backward(problem, *attention(*inputs, problem.w1, problem.w2))
    assert_truth(grads_of(inputs), problem)


def test_gradients_accumulate_over_two_backwards(device):
    problem = small(device)
    inputs = leaves(problem)
    out, lse = attention(*inputs, problem.w1, problem.w2)
    torch.autograd.backward([out, lse], [problem.grad_out, problem.grad_lse], retain_graph=True)
    backward(problem, out, lse)
    assert_truth({name: grad / 2 for name, grad in grads_of(inputs).items()}, problem)
    with pytest.raises(RuntimeError, match="second time"):
        backward(problem, out, lse)


@pytest.mark.parametrize("changed", [*NAMES, "out", "lse"])
def test_a_saved_tensor_changed_in_place_is_noticed(device, changed):
    problem = small(device)
    tensors = dict(zip(NAMES, (x * 1 for x in leaves(problem)), strict=True))
    out, lse = attention(*tensors.values(), problem.w1, problem.w2)
    tensors |= {"out": out, "lse": lse}
    with torch.no_grad():
        tensors[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (out.sum() + lse.sum()).backward()


def test_double_backward_says_that_there_is_none(device):
    problem = small(device)
    inputs = leaves(problem)
    out, lse = attention(*inputs, problem.w1, problem.w2)
    outputs, incoming = [out, lse], [problem.grad_out, problem.grad_lse]
    grads = torch.autograd.grad(outputs, inputs, incoming, create_graph=True)
    assert_truth({f"grad_{name}": grad for name, grad in zip(NAMES, grads, strict=True)}, problem)
    with pytest.raises(RuntimeError, match="two_simplicial_attention is not twice differentiable"):
        grads[0].sum().backward()


def test_saved_tensor_hooks(device):
    """Five inputs and two outputs are saved, nothing else, and they come back through the hooks."""
    problem = small(device)
    inputs = leaves(problem)
    packed, unpacked = [], []

    def pack(x):
        packed.append(x.shape)
        return x.detach().cpu()

    def unpack(x):
        unpacked.append(x.shape)
        return x.to(device)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out, lse = attention(*inputs, problem.w1, problem.w2)
    backward(problem, out, lse)
    assert sorted(packed) == sorted(unpacked) == sorted([x.shape for x in problem.inputs] + [out.shape, lse.shape])
    assert_truth(grads_of(inputs), problem)


def test_saved_on_cpu(device):
    problem = small(device)
    inputs = leaves(problem)
    with torch.autograd.graph.save_on_cpu(pin_memory=device == "cuda"):
        out, lse = attention(*inputs, problem.w1, problem.w2)
    backward(problem, out, lse)
    assert_truth(grads_of(inputs), problem)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(device, use_reentrant):
    problem = small(device)
    inputs = leaves(problem)
    backward(problem, *checkpoint(attention, *inputs, problem.w1, problem.w2, use_reentrant=use_reentrant))
    assert_truth(grads_of(inputs), problem)


def test_the_graph_is_freed_without_the_garbage_collector(device):
    """An output is saved by the node that it refers to: careless saving would make that a cycle."""
    problem = small(device)
    inputs = [x * 1 for x in leaves(problem)]
    alive = weakref.ref(inputs[0])
    gc.disable()
    try:
        out, lse = attention(*inputs, problem.w1, problem.w2)
        del inputs
        assert alive() is not None  # saved
        del out, lse
        assert alive() is None
    finally:
        gc.enable()


def test_threads(device):
    """Threads that share leaves, each with its own forward and backward."""
    problem = small(device)
    inputs = leaves(problem)
    errors = []

    def work():
        try:
            backward(problem, *attention(*inputs, problem.w1, problem.w2))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert_truth({name: grad / 4 for name, grad in grads_of(inputs).items()}, problem)


def test_torch_func(device):
    """Reverse mode and vmap work, or say that they do not; forward mode never drops a tangent silently."""
    problem = small(device)
    problem.grad_lse = None

    def loss(*inputs):
        return (simplex_ops.two_simplicial_attention(*inputs, problem.w1, problem.w2) * problem.grad_out).sum()

    if simplex_ops.info().autograd == "cpp":
        grads = torch.func.grad(loss, tuple(range(5)))(*problem.inputs)
        assert_truth({f"grad_{name}": grad for name, grad in zip(NAMES, grads, strict=True)}, problem)
        q, *others = problem.inputs
        # The outer of two levels, and both at once, which would be a second derivative.
        outer = torch.func.grad(lambda k1: torch.func.vjp(lambda q: loss(q, k1, *others[1:]), q)[0])(others[0])
        assert_truth({"grad_k1": outer}, problem)
        with pytest.raises(RuntimeError, match="not twice differentiable"):
            torch.func.grad(lambda q: torch.func.grad(loss)(q, *others).square().sum())(q)
    else:
        with pytest.raises(NotImplementedError, match=r"two_simplicial_attention.*torch.func"):
            torch.func.grad(loss)(*problem.inputs)
    with pytest.raises(NotImplementedError, match=r"two_simplicial_attention.*forward-mode"):
        torch.func.jvp(loss, tuple(problem.inputs), tuple(problem.inputs))
    twice = [torch.stack([x, x / 2]) for x in problem.inputs]
    outs = torch.vmap(lambda *inputs: attention(*inputs, problem.w1, problem.w2)[0])(*twice)
    assert_truth({"out": outs[0]}, problem)


# Autocast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(device, dtype):
    """Inputs are cast to the dtype of the region; gradients come back in their own."""
    problem = small(device, dtype=dtype)
    inputs = leaves(problem)
    with torch.autocast(device, dtype=torch.bfloat16):
        out, lse = attention(*inputs, problem.w1, problem.w2)
        with torch.autocast(device, enabled=False):
            assert attention(*inputs, problem.w1, problem.w2)[0].dtype == dtype
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    expected = attention(*(x.bfloat16() for x in problem.inputs), problem.w1, problem.w2)
    torch.testing.assert_close((out, lse), expected, rtol=0, atol=0)
    out.backward(problem.grad_out.to(out.dtype))
    problem.grad_lse = None
    for grad, expected in zip(grads_of(inputs).values(), list(truth_of(problem).values())[2:], strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


def test_autocast_leaves_double_alone():
    problem = small("cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = attention(*problem.inputs, problem.w1, problem.w2)
    assert out.dtype == torch.float64
    assert_truth({"out": out, "lse": lse}, problem)


# CUDA


@pytest.mark.gpu
def test_side_stream():
    """The op runs on the current stream, after what was queued there before it."""
    problem = small("cuda", n_k=64, n_q=64)
    inputs = [torch.zeros_like(x, requires_grad=True) for x in problem.inputs]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the inputs arrive late
        for mine, value in zip(inputs, problem.inputs, strict=True):
            mine.data.copy_(value)
        out, lse = attention(*inputs, problem.w1, problem.w2)
        assert not stream.query()  # the call itself did not wait
        backward(problem, out, lse)
    stream.synchronize()
    assert_truth({"out": out, "lse": lse, **grads_of(inputs)}, problem)


@pytest.mark.gpu
def test_fresh_thread():
    """A new thread has no CUDA context until somebody makes one current."""
    problem = small("cuda")
    results = {}

    def work():
        results["out"], results["lse"] = attention(*problem.inputs, problem.w1, problem.w2)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert_truth(results, problem)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_tensors_choose_the_device():
    problem = small("cuda:1", dtype=torch.float32)
    inputs = leaves(problem)
    with torch.cuda.device(0):
        out, lse = attention(*inputs, problem.w1, problem.w2)
        backward(problem, out, lse)
    assert out.device.index == 1
    assert_truth({"out": out, "lse": lse, **grads_of(inputs)}, problem)
