"""The attention op in what records a program to run it again: torch.compile, TorchScript, CUDA graphs. Every test compares numbers."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from problem import assert_truth, backward, evaluate, grads_of, leaves, small

import simplex_ops

attention = partial(simplex_ops.two_simplicial_attention, return_lse=True)


def test_compile(device):
    """One graph, dynamic in batch, length and windows, forward and backward."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(attention, fullgraph=True, dynamic=True)
    for changes in (
        {"batch": 6},
        {"batch": 3, "n_k": 33, "n_q": 20},
        {"batch": 5, "n_k": 24, "n_q": 7, "w1": 9, "w2": 2},
    ):
        problem = small(device, **changes)
        assert_truth(evaluate(compiled, problem), problem)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    explanation = torch._dynamo.explain(attention)(*problem.inputs, problem.w1, problem.w2)
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)


def test_compile_under_autocast(device):
    torch._dynamo.reset()
    problem = small(device, dtype=torch.float32)

    def function(*inputs):
        with torch.autocast(device, dtype=torch.bfloat16):
            return attention(*(x * 1 for x in inputs), problem.w1, problem.w2)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*problem.inputs), function(*problem.inputs), rtol=0, atol=0)


class Scripted(torch.nn.Module):
    """The op itself: TorchScript does not know the keyword-only defaults of the public function."""

    def forward(
        self, q: torch.Tensor, k1: torch.Tensor, k2: torch.Tensor, v1: torch.Tensor, v2: torch.Tensor, w1: int, w2: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.simplex.two_simplicial_attention(q, k1, k2, v1, v2, w1, w2)


def test_torchscript(device, tmp_path):
    torch.jit.script(Scripted()).save(tmp_path / "scripted.pt")
    loaded = torch.jit.load(tmp_path / "scripted.pt", map_location=device)
    for _ in range(3):  # the second and third run are the optimised ones
        problem = small(device)
        inputs = leaves(problem)
        out, lse = loaded(*inputs, problem.w1, problem.w2)
        backward(problem, out, lse)
        assert_truth({"out": out, "lse": lse, **grads_of(inputs)}, problem)


def test_torchscript_trace(device):
    problem = small(device)
    traced = torch.jit.trace(lambda *x: attention(*x, 5, 3), problem.inputs)
    other = small(device, batch=3, n_k=21, n_q=21)
    out, lse = traced(*other.inputs)
    assert_truth({"out": out, "lse": lse}, other)


FIRST_CALL_CAPTURED = """
import torch, simplex_ops, sys
sys.path.insert(0, "{tests}")
from problem import draw, evaluate
import reference
torch.manual_seed(1)
attention = lambda *x: simplex_ops.two_simplicial_attention(*x, 5, 3, return_lse=True)
static, fresh = (draw(device="cuda", n_q=13, kv_heads=2) for _ in range(2))
inputs = [x.requires_grad_() for x in static.inputs]
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    out, lse = attention(*inputs)
    grads = torch.autograd.grad([out, lse], inputs, [static.grad_out, static.grad_lse])
for mine, new in zip([*inputs, static.grad_out, static.grad_lse], [*fresh.inputs, fresh.grad_out, fresh.grad_lse]):
    mine.data.copy_(new)
graph.replay()
truth = evaluate(reference.two_simplicial_attention, fresh, torch.float64)
for actual, expected in zip((out, lse, *grads), truth.values()):
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
print("captured")
"""


@pytest.mark.gpu
def test_cuda_graph_capture_is_the_very_first_call():
    """Loading the cubin must not touch the capture."""
    program = FIRST_CALL_CAPTURED.format(tests=Path(__file__).parent)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert run.stdout == "captured\n", run.stderr
