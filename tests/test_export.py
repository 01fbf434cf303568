"""torch.export and AOTInductor: one program for every batch, length and window."""

import reference
import torch
from problem import PRECISE, draw

import simplex_ops

TOLERANCE = {"cpu": 1e-10, "cuda": 1e-4}


class Attention(torch.nn.Module):
    def forward(self, q, k1, k2, v1, v2):
        return simplex_ops.two_simplicial_attention(q, k1, k2, v1, v2, 5, 3, return_lse=True)


class Gradient(torch.nn.Module):
    """The backward op as a part of a program, as a training step that is exported whole has it."""

    def forward(self, grad_out, q, k1, k2, v1, v2):
        out, lse = simplex_ops.two_simplicial_attention(q, k1, k2, v1, v2, 5, 3, return_lse=True)
        return torch.ops.simplex.two_simplicial_attention_backward(grad_out, None, q, k1, k2, v1, v2, out, lse, 5, 3)


def problem_at(device, batch, n_q, n_k):
    return draw(batch=batch, n_q=n_q, n_k=n_k, kv_heads=2, dtype=PRECISE[device], device=device, grad_lse=False)


SIZES = [(6, 13, 19), (3, 1, 40), (1, 25, 25)]


def exported(module, device, leading=()):
    """Traced at the first of SIZES with batch, number of queries and number of keys left open."""
    batch, n_q, n_k = (torch.export.Dim(name, min=1) for name in ("batch", "n_q", "n_k"))
    problem = problem_at(device, *SIZES[0])
    shapes = [{0: batch, 1: n_q}, *[{0: batch, 1: n_k}] * 4]
    first = [getattr(problem, name) for name in leading]
    arguments = (*first, *problem.inputs)
    return torch.export.export(module, arguments, dynamic_shapes=(*[shapes[0]] * len(leading), *shapes))


def assert_forward(program, device):
    for size in SIZES:
        problem = problem_at(device, *size)
        expected = reference.two_simplicial_attention(*problem.inputs, 5, 3)
        tolerance = TOLERANCE[device]
        torch.testing.assert_close(tuple(program(*problem.inputs)), expected, rtol=tolerance, atol=tolerance)


def test_export(device, tmp_path):
    program = exported(Attention(), device)
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert torch.ops.simplex.two_simplicial_attention.default in targets
    assert_forward(program.module(), device)
    torch.export.save(program, tmp_path / "attention.pt2")
    assert_forward(torch.export.load(tmp_path / "attention.pt2").module(), device)


def test_export_of_the_backward_op(device):
    program = exported(Gradient(), device, leading=["grad_out"]).module()
    for size in SIZES:
        problem = problem_at(device, *size)
        inputs = [x.clone().requires_grad_() for x in problem.inputs]
        out, _ = reference.two_simplicial_attention(*inputs, 5, 3)
        expected = torch.autograd.grad(out, inputs, problem.grad_out)
        tolerance = TOLERANCE[device]
        actual = program(problem.grad_out, *problem.inputs)
        torch.testing.assert_close(tuple(actual), expected, rtol=tolerance, atol=tolerance)


def test_aot_inductor(device, tmp_path):
    program = exported(Attention(), device)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "attention.pt2"))
    assert_forward(torch._inductor.aoti_load_package(package), device)
