"""The optimizer's step alone: GaLore+ with and without kernels and residual, against fused AdamW and galore-torch.

Weights of a Llama's layers with random gradients. All methods take turns on the same weights in one process; device
events, medians over rounds. The floor is what must move (weights read and written, gradients read, moments read and
written, bases read) at the bandwidth of a plain copy, measured here.

    python benchmarks/step.py --shape llama-7b --layers 16 --rank 128 --output step.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SHAPES = {"tiny": (64, 176), "llama-7b": (4096, 11008), "llama3-8b": (4096, 14336)}
BOUNDS = [
    ("GaLore+, kernels", "floor", 1.35),
    ("GaLore+, kernels", "AdamW fused", 0.50),
    ("GaLore+ residual, kernels", "AdamW fused", 0.85),
]
Step = Callable[[], Any]


def make_weights(arguments: argparse.Namespace) -> list[torch.nn.Parameter]:
    """q, k, v, o, gate, up and down of every layer, with gradients."""
    hidden, wide = SHAPES[arguments.shape]
    shapes = [(hidden, hidden)] * 4 + [(wide, hidden)] * 2 + [(hidden, wide)]
    options = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    weights = [torch.nn.Parameter(torch.randn(s, **options).mul_(0.02)) for s in shapes * arguments.layers]
    for p in weights:
        p.grad = torch.randn(p.shape, **options).mul_(1e-3)
    return weights


def galore_plus(weights: list[torch.nn.Parameter], rank: int, residual: float, kernels: str) -> Any:
    from galore_trainer import GaLoreAdamW, GaLoreConfig

    config = GaLoreConfig(
        rank=rank, residual_percent=residual, residual_warmup_steps=1, update_proj_gap=10**6, kernels=kernels,
        subspace_iterations=0,
    )  # fmt: skip
    return GaLoreAdamW([{"params": weights, "projected": True}], config, lr=1e-6)


def galore_torch(weights: list[torch.nn.Parameter], rank: int) -> Any:
    """galore-torch, whose SVDs are computed once for each shape and copied."""
    from galore_torch import GaLoreAdamW

    svd, known = torch.linalg.svd, dict[Any, Any]()

    def copied(matrix: torch.Tensor, **options: Any) -> Any:
        if matrix.shape not in known:
            known[matrix.shape] = svd(matrix, **options)
        return known[matrix.shape]

    settings = {"rank": rank, "update_proj_gap": 10**6, "scale": 0.25, "proj_type": "std"}
    optimizer = GaLoreAdamW([{"params": weights, **settings}], lr=1e-6, no_deprecation_warning=True)
    torch.linalg.svd = copied
    try:
        optimizer.step()
    finally:
        torch.linalg.svd = svd
    return optimizer


def make_methods(arguments: argparse.Namespace, weights: list[torch.nn.Parameter]) -> dict[str, Step]:
    """The steps by name; what is missing is said."""
    rank, cuda = arguments.rank, arguments.device == "cuda"
    methods: dict[str, Step] = {"AdamW fused": torch.optim.AdamW(weights, lr=1e-6, fused=True).step}
    kinds = [("kernels", "triton")] if cuda or os.environ.get("TRITON_INTERPRET") == "1" else []
    for label, kernels in [*kinds, ("torch", "torch")]:
        methods[f"GaLore+, {label}"] = galore_plus(weights, rank, 0.0, kernels).step
        methods[f"GaLore+ residual, {label}"] = galore_plus(weights, rank, arguments.residual, kernels).step
    if importlib.util.find_spec("galore_torch") is None:
        print("galore-torch is not installed: left out")
    else:
        methods["galore-torch"] = galore_torch(weights, rank).step
    wanted = arguments.only.split("|") if arguments.only else [""]
    return {name: step for name, step in methods.items() if any(text in name for text in wanted)}


def timed(step: Step, cuda: bool) -> tuple[float, float]:
    """Milliseconds of a step, and of its Python."""
    if not cuda:
        start = time.perf_counter()
        step()
        return (passed := 1e3 * (time.perf_counter() - start)), passed
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    start = time.perf_counter()
    step()
    host = 1e3 * (time.perf_counter() - start)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end), host


def copy_bandwidth(cuda: bool) -> float:
    """Bytes that a plain copy moves in a second, read and written ones counted."""
    a = torch.empty(1 << (31 if cuda else 24), dtype=torch.uint8, device="cuda" if cuda else "cpu").zero_()
    b = torch.empty_like(a)
    times = [timed(lambda: b.copy_(a), cuda)[0] for _ in range(12)]
    return 2e3 * a.numel() / statistics.median(times[2:])


def moved_bytes(weights: list[torch.nn.Parameter], rank: int) -> int:
    """What a step without residual has to move: W twice, G, M and V twice, P."""
    total = 0
    for p in weights:
        longer, shorter = max(p.shape), min(p.shape)
        total += 3 * p.numel() * p.element_size() + 4 * rank * (4 * longer + shorter)
    return total


def measure(methods: dict[str, Step], rounds: int, cuda: bool) -> dict[str, dict[str, float]]:
    """Medians and quartiles, methods taking turns."""
    for step in methods.values():
        for _ in range(3):  # bases, residuals, compilation
            step()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, step in methods.items():
            times[name].append(timed(step, cuda))
    found = {}
    for name, pairs in times.items():
        device, host = (sorted(x) for x in zip(*pairs, strict=True))
        quarter = len(device) // 4
        found[name] = {
            "ms": statistics.median(device), "low": device[quarter], "high": device[-1 - quarter],
            "host_ms": statistics.median(host),
        }  # fmt: skip
    return found


def profile(step: Step) -> None:
    """Which kernels a step spends its time in."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    print(found.key_averages().table(sort_by="self_cuda_time_total", row_limit=14, max_name_column_width=50))


def main() -> None:
    """Measure, print a table and the ratios, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--residual", type=float, default=1.2)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default="", help="methods with one of these texts in their names, separated by |")
    parser.add_argument("--profile", action="store_true", help="print the kernels of each GaLore+ step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("step.json"))
    arguments = parser.parse_args()

    from galore_trainer.run.artifacts import environment

    cuda = arguments.device == "cuda"
    torch.manual_seed(0)
    weights = make_weights(arguments)
    methods = make_methods(arguments, weights)
    rows = measure(methods, arguments.rounds, cuda)
    bandwidth = copy_bandwidth(cuda)
    floor = 1e3 * moved_bytes(weights, arguments.rank) / bandwidth
    rows["floor"] = {"ms": floor, "low": floor, "high": floor, "host_ms": 0.0}
    for name, row in rows.items():
        print(f"{name:<28}{row['ms']:9.3f} ms  ({row['low']:.3f} to {row['high']:.3f})  host {row['host_ms']:.3f} ms")
    if arguments.profile and cuda:
        for name in methods:
            if name.startswith("GaLore+") and "kernels" in name:
                print(name)
                profile(methods[name])
    ratios = []
    for name, other, bound in BOUNDS:
        if name in rows and other in rows:
            ratio = rows[name]["ms"] / rows[other]["ms"]
            ratios.append({"name": f"{name} / {other}", "ratio": ratio, "bound": bound})
            print(f"{name} / {other}: {ratio:.3f} (bound {bound})")
    settings = {key: str(value) for key, value in vars(arguments).items()}
    result = {"bandwidth": bandwidth, "rows": rows, "ratios": ratios, "environment": environment()}
    arguments.output.write_text(json.dumps(settings | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
