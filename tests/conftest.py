"""Session rules: the installed package is tested, uninitialised memory is NaN, every test starts from one seed."""

import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, before the first matmul
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: threads that wait must not spin
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(
    0, str(Path(__file__).parent)
)  # importmode=importlib leaves it out; tests import `reference` and `problem`

import pytest
import torch
from hypothesis import settings
from interpreter import Interpreter
from problem import DTYPES

# Shapes decide the time of a case, so a deadline would only measure the other jobs of the machine.
settings.register_profile("simplex", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("simplex")


def pytest_configure(config):
    spec = importlib.util.find_spec("simplex_ops")
    if spec is None or spec.origin is None:
        return  # the modules that need the package say so themselves; host and kernel tests do without
    package = Path(spec.origin).parent
    if not (package / "_C.so").exists():
        pytest.exit(
            f"simplex_ops resolves to {package}, a source folder without its compiled library _C.so: tests run against "
            "the installed package. Run `make test`, or install the wheel and call `pytest` (not `python -m pytest`, "
            "which puts the source folder first on sys.path).",
            returncode=4,
        )


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(params=[pytest.param(d, marks=[pytest.mark.gpu] * (d == "cuda")) for d in DTYPES])
def device(request):
    return request.param


@pytest.fixture(scope="session")
def interpreter():
    """interpreter(module, case): module.run_case(**case) where Triton's kernels run in its interpreter."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


@pytest.fixture(autouse=True)
def reproducible():
    torch.manual_seed(20250703)
    torch.use_deterministic_algorithms(True)  # also fills fresh memory with NaN
    torch.backends.cuda.matmul.allow_tf32 = False  # references in fp32 mean fp32
    yield
    torch.use_deterministic_algorithms(False)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # workers share the GPU's memory
