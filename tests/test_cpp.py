"""examples/cpp, built and run without Python on the CPU, against the numbers of Python."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import simplex_ops

EXAMPLE = Path(__file__).parents[1] / "examples/cpp"
PACKAGE = Path(simplex_ops.__file__).parent
BINDING = PACKAGE / "_autograd_{}_{}.so".format(*torch.__version__.split(".")[:2])
WINDOWS = (5, 3)

pytestmark = [
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler"),
    pytest.mark.skipif(not BINDING.exists(), reason="the package has no autograd binding for this torch"),
]


class Attention(torch.nn.Module):
    def forward(self, q: torch.Tensor, k1: torch.Tensor, k2: torch.Tensor, v1: torch.Tensor, v2: torch.Tensor):
        return torch.ops.simplex.two_simplicial_attention(q, k1, k2, v1, v2, 5, 3)[0]


def ramp(shape, start):
    return (torch.arange(torch.Size(shape).numel(), dtype=torch.float64) + start).sin().float().view(shape)


def inputs():
    return [ramp((2, 7, 4, 8), 0), *(ramp((2, 7, 2, 8), 1000 * i) for i in range(1, 5))]


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What the program prints: a name and numbers in every line."""
    folder = tmp_path_factory.mktemp("cpp")
    subprocess.run(["make", "-C", EXAMPLE, f"TORCH={torch.__path__[0]}", f"OUT={folder}"], check=True)
    batch, length = (torch.export.Dim(name, min=1) for name in ("batch", "length"))
    other = [torch.randn(3, 9, heads, 8) for heads in (4, 2, 2, 2, 2)]  # the program runs it at another size
    program = torch.export.export(Attention(), tuple(other), dynamic_shapes=[{0: batch, 1: length}] * 5)
    torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    torch.jit.script(Attention()).save(folder / "model.pt")

    files = [PACKAGE / "_C.so", BINDING, folder / "model.pt2", folder / "model.pt"]
    bare = {"PATH": os.environ["PATH"], "PYTHONHOME": "/nowhere"}  # a Python inside the process could not start
    run = subprocess.run([folder / "simplex_example", *files], capture_output=True, text=True, env=bare, cwd=folder)
    assert run.returncode == 0, run.stderr
    lines = (line.split() for line in run.stdout.splitlines())
    return {name: torch.tensor([float(value) for value in values]) for name, *values in lines}


def assert_printed(actual, expected):
    torch.testing.assert_close(actual, expected.detach().flatten().float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["op", "aot_inductor", "torchscript"])
def test_output(printed, way):
    assert_printed(printed[way], simplex_ops.two_simplicial_attention(*inputs(), *WINDOWS))


def test_training_step(printed):
    x = [t.requires_grad_() for t in inputs()]
    loss = simplex_ops.two_simplicial_attention(*x, *WINDOWS).square().sum()
    loss.backward()
    assert_printed(printed["loss"], loss.reshape(1))
    assert_printed(printed["grad_q"], x[0].grad)
    assert_printed(printed["grad_v2"], x[4].grad)
    with torch.no_grad():
        after = [t - 0.01 * t.grad for t in x]
    stepped = simplex_ops.two_simplicial_attention(*after, *WINDOWS).square().sum()
    assert stepped < loss
    assert_printed(printed["loss_after_step"], stepped.reshape(1))


def test_no_python_in_the_program(printed):
    """Neither library pulls Python in."""
    for library in (PACKAGE / "_C.so", BINDING):
        with open(library, "rb") as file:
            assert b"libpython" not in (content := file.read())
            assert b"libtorch_python" not in content
