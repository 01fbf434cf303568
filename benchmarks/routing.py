"""Speed of routing and of the surprise gate next to plain torch and to a copy of the same bytes, in one run.

    python benchmarks/routing.py [--device cpu|cuda] [--out benchmarks/results]

"of copy" is the op's bytes per second, every byte that it must read or write counted once, over those of torch's copy_.
The layers are forward passes of one block, dense and routed at capacity 0.5, routing included; "routing share" is what the
kernels that a layer runs around its block take, over what all of its kernels take, in the same passes, each on what a dense
block has just made. Calls follow each other without a wait, as in a model. KV bytes are what torch's allocator counts on
CUDA. Less than 60 s on an H100.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import RESULTS, median_ms, write
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._pytree import tree_leaves

import simplex_ops
from simplex_ops.models import DecoderConfig, DecoderLM
from simplex_ops.models.routed import PositionedBlock
from simplex_ops.nn import DynamicLayer, MixtureOfDepthsLayer, SubjectiveTimescaleLayer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import reference

SIZES = {"cpu": (2, 1024, 512, torch.float32), "cuda": (8, 4096, 2048, torch.bfloat16)}  # batch, length, dim
CHOICE = {"cpu": (8, 4096, 2048), "cuda": (64, 4096, 2048)}  # batch, length, k


def call_ms(function: Callable[[], object], device: str, calls: int = 10) -> float:
    """Time of one of several calls in a row."""

    def several() -> None:
        for _ in range(calls):
            function()

    return median_ms(several, device) / calls


class Marked(torch.nn.Module):
    """What the profiler knows by a name."""

    def __init__(self, name: str, module: torch.nn.Module) -> None:
        super().__init__()
        self.name, self.module = name, module

    def forward(self, *args: object) -> torch.Tensor:
        with record_function(self.name):
            return self.module(*args)


def kernels_us(step: Callable[[], object], *names: str, calls: int = 10) -> list[Counter]:
    """What the kernels that ran within `Marked` modules of these names take in a step, by the kernel's name."""
    step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            step()
        torch.cuda.synchronize()
    found = [Counter() for _ in names]
    for event in profiler.events():
        if event.device_type == DeviceType.CPU and event.name in names:
            _add_kernels(event, found[names.index(event.name)], calls)
    return found


def _add_kernels(event: FunctionEvent, times: Counter, calls: int) -> None:
    for kernel in event.kernels:
        times[kernel.name] += kernel.duration / calls
    for child in event.cpu_children:
        _add_kernels(child, times, calls)


def copy_rate(numel: int, dtype: torch.dtype, device: str) -> float:
    """Bytes per ms of a copy of `numel` elements, read and written."""
    source = torch.randn(numel, device=device).to(dtype)
    target = torch.empty_like(source)
    return 2 * source.nbytes / call_ms(lambda: target.copy_(source), device)


def choice(device: str) -> dict:
    batch, length, k = CHOICE[device]
    scores = torch.rand(batch, length, device=device)
    ours = call_ms(lambda: simplex_ops.topk_route(scores, k), device)
    torchs = call_ms(lambda: torch.topk(scores, k).indices.sort().values, device)
    return {"op": "topk_route", "us": 1e3 * ours, "over topk + sort": torchs / ours}


def moves(device: str) -> list[dict]:
    batch, length, dim, dtype = SIZES[device]
    x = torch.randn(batch, length, dim, device=device).to(dtype)
    idx, _ = simplex_ops.topk_route(torch.rand(batch, length, device=device), length // 2)
    y, gate = simplex_ops.route_gather(x, idx), torch.rand(batch, length, device=device)
    of_slots = gate[:, : length // 2].contiguous()
    rate = copy_rate(x.numel(), dtype, device)
    calls = {
        "route_gather": (lambda: simplex_ops.route_gather(x, idx), 2 * y.nbytes),
        "route_scatter_add": (lambda: simplex_ops.route_scatter_add(x, y, idx, of_slots), 2 * x.nbytes + y.nbytes),
        "route_replace": (lambda: simplex_ops.route_replace(x, y, idx, gate), 2 * x.nbytes + y.nbytes),
    }
    times = {name: call_ms(call, device) for name, (call, _) in calls.items()}
    return [{"op": n, "us": 1e3 * t, "of copy": calls[n][1] / t / rate} for n, t in times.items()]


def gate(device: str) -> dict:
    batch, length, dim, dtype = SIZES[device]
    rows = [torch.randn(batch, length, dim, device=device).to(dtype).requires_grad_() for _ in range(3)]
    numbers = [torch.tensor(p, device=device, requires_grad=True) for p in (0.55, 0.44, 1.025, 1.1)]
    grad = torch.randn(batch, length, device=device)

    def step(function):
        return lambda: torch.autograd.grad(function(*rows, *numbers, 100)[0], [*rows, *numbers], grad)

    ours, eager = (call_ms(step(f), device, 3) for f in (simplex_ops.surprise_gate, reference.surprise_gate))
    return {"op": "surprise_gate, forward + backward", "us": 1e3 * ours, "over eager": eager / ours}


def logits(device: str) -> dict:
    batch, length, dim, dtype = SIZES[device]
    x, weight = torch.randn(batch, length, dim, device=device).to(dtype), torch.randn(2 * dim, device=device)
    ours = call_ms(lambda: simplex_ops.causal_route_logits(x, weight), device)
    rate = copy_rate(x.numel(), dtype, device)
    return {"op": "causal_route_logits", "us": 1e3 * ours, "of copy": x.nbytes / ours / rate}


def append(device: str) -> dict:
    batch, length, dim, dtype = SIZES[device]
    shape = (batch, length // 2, dim // 128, 128)
    k, v, keys, values = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
    count = torch.zeros(batch, dtype=torch.int32, device=device)
    positions = torch.arange(length // 2, dtype=torch.int32, device=device).expand(batch, -1).contiguous()
    frequencies = torch.rand(64, device=device)

    def step() -> None:
        count.zero_()
        simplex_ops.route_kv_append_(keys, values, count, k, v, positions, frequencies)

    ours, rate = median_ms(step, device), copy_rate(2 * k.numel(), dtype, device)
    return {"op": "route_kv_append_", "us": 1e3 * ours, "of copy": 4 * k.nbytes / ours / rate}


@torch.no_grad()
def layers(device: str) -> list[dict]:
    batch, length, dim, dtype = SIZES[device]
    config = DecoderConfig(dim=dim, heads=dim // 128, kv_heads=dim // 128, head_dim=128, mlp_dim=dim * 11 // 4)
    block = PositionedBlock(config).to(device, dtype)
    before = torch.randn(batch, length, dim, device=device).to(dtype)
    gate, positions = (
        torch.rand(batch, length, device=device),
        torch.arange(length, device=device).expand(batch, length),
    )
    x = block(before, positions)
    dense = call_ms(lambda: block(x, positions), device, 5)

    made = {
        "dynamic layer": DynamicLayer(block),
        "mod layer": MixtureOfDepthsLayer(block, dim),
        "stt layer, student": SubjectiveTimescaleLayer(block, dim),
    }
    made = {name: layer.to(device, dtype) for name, layer in made.items()}
    for name in ("mod layer", "stt layer, student"):
        made[name].router.float()  # as under autocast
    student = made["stt layer, student"]
    for _ in range(2):  # where the student routes half of the tokens
        student.top_k(student.router(x), calibrates=True)
    student.eval().trim = True

    rows = [{"op": "dense layer", "us": 1e3 * dense}]
    for name, layer in made.items():
        rest = (gate,) if name == "dynamic layer" else ()
        time = call_ms(partial(layer, x, *rest), device, 5)
        rows.append({"op": name, "us": 1e3 * time, "over dense": dense / time})
        if device == "cuda":
            layer.block, marked = Marked("block", block), Marked("layer", layer)
            whole, inside = kernels_us(lambda: marked(block(before, positions), *rest), "layer", "block")  # noqa: B023
            around = whole - inside
            rows[-1]["routing share"] = around.total() / whole.total()
            print(f"{name}: kernels of {whole.total():.1f} us, {inside.total():.1f} of them in its block, around it:")
            print("\n".join(f"  {us:7.1f}  {kernel[:110]}" for kernel, us in around.most_common() if us > 0.05))
    return rows


def allocated(make: Callable[[], object], device: str) -> int:
    """Bytes that what it makes occupies."""
    if device == "cpu":
        return sum(x.nbytes for x in tree_leaves(make()))
    before = torch.cuda.memory_allocated()
    made = make()
    after = torch.cuda.memory_allocated()
    del made
    return after - before


def caches(device: str) -> list[dict]:
    batch, length, dim, _ = SIZES[device]
    sizes = {"dim": dim, "heads": dim // 128, "kv_heads": dim // 128, "head_dim": 128, "mlp_dim": 64}
    found = {}
    for name, layers in {"dense": ("sdpa",), "mod": ("mod",), "stt": ("stt",), "model: mod": ("sdpa", "mod")}.items():
        model = DecoderLM(DecoderConfig(**sizes, layers=layers)).to(device, torch.bfloat16)
        found[name] = allocated(partial(model.new_cache, batch, length), device) / len(layers)
    return [{"op": f"cache of {n}", "bytes": b, "of dense": b / found["dense"]} for n, b in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = [choice(args.device), *moves(args.device), gate(args.device), logits(args.device), append(args.device)]
    rows += [*layers(args.device), *caches(args.device)]
    for row in rows:
        print("  ".join(f"{name} {value:.2f}" if name != "op" else f"{value:<36}" for name, value in row.items()))
    print(write("routing", args.device, rows, args.out))


if __name__ == "__main__":
    main()
