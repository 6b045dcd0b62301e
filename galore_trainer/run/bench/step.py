"""The optimizer's step alone, on the linear weights of some layers, with gradients made beforehand."""

from __future__ import annotations

from typing import Any

import torch

from galore_trainer.run.bench.limit import limit_ms, passes
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

SCALED = "GaLore+, scaled residual"
PROFILED = ("GaLore+", SCALED, "GaLore+, residual")
TITLES = {
    "adamw": "AdamW fused",
    "adamw_8bit": "AdamW 8-bit",
    "adamw_8bit_paged": "AdamW 8-bit, paged",
    "adamw_8bit_torchao": "AdamW 8-bit, torchao",
    "galore_torch": "galore-torch",
}


def bench_step(bench: Bench) -> dict[str, Any]:
    """Time every method's step.

    Returns:
        ``timings`` by name; ``floor`` in milliseconds: weights read and written, gradients read, moments read and
        written and bases read once, at the bandwidth of a plain copy (``bandwidth``, bytes a second); ``limits`` of our
        steps in milliseconds (``limit.py``); ``missing`` methods; ``profiles`` of our steps where they were asked for.
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
    galore = galore_plus(bench, model)
    sparse = {"residual_percent": bench.residual_percent, "residual_warmup_steps": 0}
    ours = {
        "GaLore+": galore,
        SCALED: galore_plus(bench, model, residual="scaled"),
        "GaLore+, residual": galore_plus(bench, model, **sparse),
        "GaLore+, 16-bit state": galore_plus(bench, model, state_bits=16),
        "GaLore+, 8-bit state": galore_plus(bench, model, state_bits=8),
        "GaLore+, without kernels": galore_plus(bench, model, kernels="torch"),
        "GaLore+, residual, without kernels": galore_plus(bench, model, kernels="torch", **sparse),
    }
    methods |= {name: optimizer.step for name, optimizer in ours.items()}
    for method, title in (("lora", "LoRA"), ("dora", "DoRA")):
        if method not in missing:
            methods[title] = _adapters(bench, dora=method == "dora")
    timings = take_turns(methods, bench.rounds, bench.torch_device)
    bandwidth = copy_bandwidth(bench.torch_device)
    profiles = {name: _profile(methods[name]) for name in PROFILED} if bench.profile else {}
    return {
        "profiles": profiles,
        "timings": timings,
        "bandwidth": bandwidth,
        "missing": missing,
        "floor": 1e3 * least_bytes(galore) / bandwidth,
        "limits": {name: limit_ms(passes(optimizer), bandwidth) for name, optimizer in ours.items()},
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

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return str(profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=16, max_name_column_width=60))


def lines(part: dict[str, Any]) -> list[str]:
    """The timings as text, those of our steps with their limits."""
    limits = part.get("limits", {})
    text = [line_of(name, timing, limits.get(name)) for name, timing in part["timings"].items()]
    if "floor" in part:
        text.append(f"{'floor':<36}{part['floor']:10.3f} ms   at {part['bandwidth'] / 1e12:.3f} TB/s, a plain copy")
    return text + [f"{name}: left out, {why}" for name, why in part["missing"].items()]


def line_of(name: str, timing: Timing, limit: float | None = None) -> str:
    """Median, quartiles and the host's share of one method; how often the median holds the limit, in milliseconds."""
    figures = timing.to_dict()
    quartiles = f"({figures['low']:.3f} to {figures['high']:.3f})"
    text = f"{name:<36}{figures['ms']:10.3f} ms   {quartiles}, host {figures['host_ms']:.3f} ms"
    return text if limit is None else f"{text}; limit {limit:.3f} ms, {figures['ms'] / limit:.2f} of it"
