"""What the benchmarks share: timing, the description of the machine, JSON files."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

import simplex_ops

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def median_ms(function: Callable[[], object], device: str, budget_s: float = 0.5, most: int = 50) -> float:
    """Median time of a call, after one to warm up: CUDA events on the GPU, the clock on the CPU."""
    function()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 3 or (len(times) < most and time.perf_counter() - begin < budget_s):
        if device == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        else:
            before = time.perf_counter()
            function()
            times.append((time.perf_counter() - before) * 1e3)
    return statistics.median(times)


def matmul_rate(flop: float, dtype: torch.dtype, device: str, budget_s: float = 0.5) -> float:
    """FLOP per ms of a square product of `flop`, or of the largest that is still sensible."""
    n = max(128, min(8192, round((flop / 2) ** (1 / 3) / 64) * 64))
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / median_ms(lambda: a @ b, device, budget_s)


def commit() -> str:
    """The commit that is measured, "-dirty" with changes on top; SIMPLEX_COMMIT says it where there is no git."""
    if "SIMPLEX_COMMIT" in os.environ:
        return os.environ["SIMPLEX_COMMIT"]
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=9"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    return done.stdout.strip() or "unknown"


def machine(device: str) -> dict:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    info = simplex_ops.info()
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "hardware": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "simplex_ops": info.version,
        "autograd": info.autograd,
    }


def write(name: str, device: str, rows: list[dict], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{device}.json"
    path.write_text(json.dumps({"machine": machine(device), "rows": rows}, indent=1) + "\n")
    return path
