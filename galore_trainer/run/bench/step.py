"""The optimizer's step alone, on the linear weights of some layers; gradients are there already."""

from __future__ import annotations

from typing import Any

import torch

from galore_trainer.run.bench.measure import Step, Timing, copy_bandwidth, take_turns
from galore_trainer.run.bench.weights import (
    Bench,
    CopiedSvd,
    galore_plus,
    least_bytes,
    linear_weights,
    missing_peers,
    peer,
    with_adapters,
)

TITLES = {"adamw": "AdamW fused", "adamw_8bit": "AdamW 8-bit", "galore_torch": "galore-torch"}


def bench_step(bench: Bench) -> dict[str, Any]:
    """Time every method's step.

    Returns:
        ``timings`` by name; ``floor`` in milliseconds: weights read and written, gradients read, moments read and
        written and bases read once, at the bandwidth of a plain copy (``bandwidth``, bytes a second); ``missing``
        methods; ``profiles`` of our steps where they were asked for.
    """
    missing = missing_peers(bench)
    model = linear_weights(bench)
    methods: dict[str, Step] = {}
    for method, title in TITLES.items():
        if method not in missing:
            optimizer = peer(bench, method, model)
            if method == "galore_torch":
                with CopiedSvd():
                    optimizer.step()
            methods[title] = optimizer.step
    ours = galore_plus(bench, model)
    sparse = {"residual_percent": bench.residual_percent, "residual_warmup_steps": 0}
    methods |= {
        "GaLore+": ours.step,
        "GaLore+, residual": galore_plus(bench, model, **sparse).step,
        "GaLore+, without kernels": galore_plus(bench, model, kernels="torch").step,
        "GaLore+, residual, without kernels": galore_plus(bench, model, kernels="torch", **sparse).step,
    }
    for method, title in (("lora", "LoRA"), ("dora", "DoRA")):
        if method not in missing:
            methods[title] = _adapters(bench, dora=method == "dora")
    timings = take_turns(methods, bench.rounds, bench.torch_device)
    bandwidth = copy_bandwidth(bench.torch_device)
    profiles = {name: _profile(methods[name]) for name in ("GaLore+", "GaLore+, residual")} if bench.profile else {}
    return {
        "profiles": profiles,
        "timings": timings,
        "bandwidth": bandwidth,
        "missing": missing,
        "floor": 1e3 * least_bytes(ours) / bandwidth,
    }


def _adapters(bench: Bench, *, dora: bool) -> Step:
    """AdamW on adapters of the same layers."""
    model = with_adapters(bench, linear_weights(bench), dora=dora)
    for p in model.parameters():
        p.grad = torch.randn_like(p).mul_(1e-3) if p.requires_grad else None
    return peer(bench, "adamw", model).step


def _profile(step: Step) -> str:
    """Which kernels a step spends its time in."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    return str(found.key_averages().table(sort_by="self_cuda_time_total", row_limit=16, max_name_column_width=60))


def lines(found: dict[str, Any]) -> list[str]:
    """The timings as text."""
    text = [line_of(name, timing) for name, timing in found["timings"].items()]
    if "floor" in found:
        text.append(f"{'floor':<36}{found['floor']:10.3f} ms   at {found['bandwidth'] / 1e12:.3f} TB/s, a plain copy")
    return text + [f"{name}: left out, {why}" for name, why in found["missing"].items()]


def line_of(name: str, timing: Timing) -> str:
    """Median, quartiles and the host's share of one method."""
    told = timing.to_dict()
    return f"{name:<36}{told['ms']:10.3f} ms   ({told['low']:.3f} to {told['high']:.3f}), host {told['host_ms']:.3f} ms"
