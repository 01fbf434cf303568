"""The Triton kernels of routing and the surprise gate, in Triton's interpreter, against plain torch; no GPU needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CASES = [
    "gate",
    "gate, long window",
    "gate, window 1",
    "gate, fp16",
    "choice",
    "choice, ties",
    "choice, in one block",
    "choice, constant",
    "choice, special",
    "choice, nothing valid",
    "logits",
    "append",
    "moves",
    "moves, fp16",
]


@pytest.mark.parametrize("case", CASES)
def test_arithmetic_in_the_interpreter(case):
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(TESTS / "interpreted_routing.py"), case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
