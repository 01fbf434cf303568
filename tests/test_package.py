"""The package as a user meets it: import, info(), the choice of the autograd binding, the FLOP count."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import simplex_ops

TESTS = Path(__file__).parent


def run_python(program, **environment):
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=TESTS,  # not the repository, whose simplex_ops/ is a source folder
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result


def test_import_is_quick():
    program = "import time, torch; t = time.process_time(); import simplex_ops; print(time.process_time() - t)"
    assert min(float(run_python(program).stdout) for _ in range(3)) <= 0.15


def test_info():
    info = simplex_ops.info()
    assert (info.torch, info.version) == (torch.__version__, simplex_ops.__version__)
    assert (info.devices[0], len(info.devices)) == ("cpu", 1 + torch.cuda.device_count())
    printed = run_python("import runpy; runpy.run_module('simplex_ops', run_name='__main__')").stdout
    assert printed == f"{info}\n"


def test_choice_of_the_autograd_binding():
    show = "import simplex_ops; print(simplex_ops.info().autograd)"
    assert run_python(show, SIMPLEX_AUTOGRAD="python").stdout == "python\n"
    assert run_python(show, SIMPLEX_AUTOGRAD="").stdout in ("cpp\n", "python\n")
    refused = "try:\n import simplex_ops\nexcept ImportError as error:\n print(error)"
    message = "simplex_ops: expected SIMPLEX_AUTOGRAD to be cpp, python or unset, got rust\n"
    assert run_python(refused, SIMPLEX_AUTOGRAD="rust").stdout == message


@pytest.mark.skipif(simplex_ops.info().autograd == "python", reason="the whole suite is running with the fallback")
def test_integration_through_the_python_fallback():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_integration.py", "test_tracing.py"]
    environment = {**os.environ, "SIMPLEX_AUTOGRAD": "python"}
    run = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@pytest.mark.parametrize(
    ("n_q", "n_k", "w1", "w2"), [(7, 7, 3, 2), (7, 7, 2, 3), (5, 9, 4, 4), (1, 9, 100, 3), (6, 6, 99, 99)]
)
def test_flops(n_q, n_k, w1, w2):
    q = torch.randn(3, n_q, 4, 16, requires_grad=True)
    keys = torch.randn(4, 3, n_k, 2, 16).requires_grad_()
    pairs = sum(min(i + 1, w1) * min(i + 1, w2) for i in range(n_k - n_q, n_k))
    with FlopCounterMode(display=False) as forward:
        out = simplex_ops.two_simplicial_attention(q, *keys, w1, w2)
    assert forward.get_total_flops() == 4 * 16 * 4 * 3 * pairs
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 3 * forward.get_total_flops()


@pytest.mark.parametrize("first", ["simplex_ops", "torch.utils.flop_counter"])
def test_flop_formulas_whatever_is_imported_first(first):
    program = (
        f"import torch, {first}, simplex_ops\nfrom torch.utils.flop_counter import flop_registry\n"
        "print(torch.ops.simplex.two_simplicial_attention in flop_registry)"
    )
    assert run_python(program).stdout == "True\n"
