"""The Triton kernels of routing and the surprise gate, in Triton's interpreter, against plain torch; no GPU needed."""

import pytest

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
def test_arithmetic_in_the_interpreter(case, interpreter):
    interpreter("interpreted_routing", {"name": case})
