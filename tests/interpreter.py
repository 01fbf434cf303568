"""Triton kernels in Triton's interpreter: one process, which lives as long as the session and runs case by case.

Triton reads TRITON_INTERPRET when a kernel is decorated, so the kernels of this process's own Triton cannot be
interpreted; and to import torch and Triton takes longer than to interpret a case.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


class Interpreter:
    """interpreter(module, case) -> module.run_case(**case), computed over there; what it raises fails the test here.

    Its stderr is this process's, so that pytest shows it with the test.
    """

    def __init__(self):
        self.process = None

    def __call__(self, module, case):
        if self.process is None:  # the first, or the last one died
            path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__))], env=os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1"},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        try:
            print(json.dumps([module, case]), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            pytest.fail(f"the interpreting process ended with status {self.close()}", pytrace=False)
        result, error = json.loads(answer)
        if error:
            pytest.fail(f"in the interpreting process:\n{error}", pytrace=False)
        return result

    def close(self):
        if self.process is None:
            return None
        process, self.process = self.process, None
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()  # the loop below ends
        return process.wait()


def serve():
    import torch

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a case prints is no answer
    for line in sys.stdin:
        module, case = json.loads(line)
        error = result = None
        torch.manual_seed(7)
        try:
            result = importlib.import_module(module).run_case(**case)
        except Exception:
            error = traceback.format_exc()
        print(json.dumps([result, error]), file=answers, flush=True)


if __name__ == "__main__":
    serve()
