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


def time_ms(function: Callable[[], object], device: str, calls: int = 1) -> float:
    """Time of a call, of `calls` in a row: by CUDA events on the GPU, the clock on the CPU."""
    if device == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            function()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / calls
    before = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - before) * 1e3 / calls


def medians_ms(
    functions: dict[str, Callable[[], object]], device: str, budget_s: float = 0.5, most: int = 50
) -> dict[str, float]:
    """Median time of a call of each function, after one to warm up. They take turns, so that the heat and the clock of the
    GPU are the same for all; short ones are called several times in a row, as in a model, whose launches run ahead."""
    calls = {}
    for name, function in functions.items():
        function()
        calls[name] = max(1, min(20, int(2 / time_ms(function, device)))) if device == "cuda" else 1
    times: dict[str, list[float]] = {name: [] for name in functions}
    begin = time.perf_counter()
    for turn in range(most):
        if turn >= 3 and time.perf_counter() - begin > budget_s:
            break
        for name, function in functions.items():
            times[name].append(time_ms(function, device, calls[name]))
    return {name: statistics.median(samples) for name, samples in times.items()}


def median_ms(function: Callable[[], object], device: str, budget_s: float = 0.5, most: int = 50) -> float:
    return medians_ms({"": function}, device, budget_s, most)[""]


def matmul_of(flop: float, dtype: torch.dtype, device: str) -> tuple[Callable[[], object], float]:
    """A square product of `flop`, or of the largest that is still sensible, and what it is of."""
    n = max(128, min(8192, round((flop / 2) ** (1 / 3) / 64) * 64))
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, 2.0 * n**3


def matmul_rate(flop: float, dtype: torch.dtype, device: str, budget_s: float = 0.5) -> float:
    """FLOP per ms of matmul_of(...)."""
    matmul, its_flop = matmul_of(flop, dtype, device)
    return its_flop / median_ms(matmul, device, budget_s)


def graph_ms(function: Callable[[], object], calls: int = 5, replays: int = 7) -> float:
    """Median time of a call on the GPU alone: recorded `calls` times into a CUDA graph, so that no time of the host counts."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # cuBLAS makes its workspace
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return median_ms(graph.replay, "cuda", most=replays) / calls


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
