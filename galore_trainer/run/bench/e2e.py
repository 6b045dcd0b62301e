"""Whole training steps of a Llama: forward, backward, clipping, step; and a run whose refreshes are staggered."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from galore_trainer.optim.galore_adamw import GaLoreAdamW
from galore_trainer.run.bench.measure import Step, take_turns, timed
from galore_trainer.run.bench.refresh import svd_ms
from galore_trainer.run.bench.step import TITLES
from galore_trainer.run.bench.weights import (
    SHAPES,
    Bench,
    CopiedSvd,
    galore_plus,
    make_model,
    missing_peers,
    peer,
    with_adapters,
)

REFRESH_ROUNDS = 8


def bench_e2e(bench: Bench) -> dict[str, Any]:
    """Time training steps without a refresh, and a refresh on the gradients of one.

    Returns:
        ``timings`` by name, with "forward and backward" alone; ``refresh``: of all weights; ``svd``: as in
        ``bench_refresh``; ``staggered``: milliseconds of each step of a run whose refreshes are spread over its steps,
        and ``refreshed``: which of them refreshed a weight; ``together``: the same of a run that refreshes all weights
        at once; ``missing`` methods.
    """
    missing, batches = missing_peers(bench), batches_of(bench)
    model = make_model(bench, bench.model_layers)
    methods: dict[str, Step] = {"forward and backward": lambda: _gradients(model, next(batches))}
    for method, title in TITLES.items():
        if method in missing:
            continue
        optimizer = peer(bench, method, model)
        if method == "galore_torch":
            _gradients(model, next(batches), keep=True)
            with CopiedSvd():
                optimizer.step()
        methods[title] = training_step(model, optimizer, batches)
    galore = galore_plus(bench, model, subspace_iterations=1)
    methods["GaLore+"] = training_step(model, galore, batches)
    scaled = galore_plus(bench, model, residual="scaled", subspace_iterations=1)
    methods["GaLore+, scaled residual"] = training_step(model, scaled, batches)
    clipping = galore_plus(bench, model, subspace_iterations=1, max_grad_norm=1.0)
    methods["GaLore+, clipping inside the step"] = training_step(model, clipping, batches)
    residual = galore_plus(bench, model, residual_percent=bench.residual_percent, residual_warmup_steps=0)
    methods["GaLore+, residual"] = training_step(model, residual, batches)
    layerwise_model = make_model(bench, bench.model_layers)
    layerwise = galore_plus(bench, layerwise_model, layerwise=True, update_proj_gap=bench.gap, subspace_iterations=1)
    methods["GaLore+, layer-wise"] = training_step(layerwise_model, layerwise, batches)
    for method, title in (("lora", "LoRA"), ("dora", "DoRA")):
        if method not in missing:
            adapted = with_adapters(bench, make_model(bench, bench.model_layers), dora=method == "dora")
            methods[title] = training_step(adapted, peer(bench, "adamw", adapted), batches)
    timings = take_turns(methods, bench.rounds, bench.torch_device)
    _gradients(model, next(batches), keep=True)
    refresh = take_turns({"refresh": galore.refresh_now}, REFRESH_ROUNDS, bench.torch_device)["refresh"]
    svd = svd_ms(p.grad for _, p in galore.projected_weights() if p.grad is not None)
    model.zero_grad()
    times, refreshed = _run(bench, model, batches, stagger_refresh=True)
    together, _ = _run(bench, model, batches)
    return {
        "timings": timings,
        "refresh": refresh,
        "svd": svd,
        "staggered": times,
        "refreshed": refreshed,
        "together": together,
        "missing": missing,
    }


def _run(bench: Bench, model: Any, batches: Iterator[Tensor], **settings: Any) -> tuple[list[float], list[bool]]:
    """Milliseconds of the steps of a run with a short gap, after all weights have bases; which refreshed a weight."""
    optimizer = galore_plus(bench, model, update_proj_gap=bench.short_gap, subspace_iterations=1, **settings)
    step = training_step(model, optimizer, batches)
    for _ in range(bench.short_gap):
        step()
    times: list[float] = []
    counts = [_refreshes(optimizer)]
    for _ in range(bench.steps):
        times.append(timed(step, bench.torch_device)[0])
        counts.append(_refreshes(optimizer))
    return times, [after > before for before, after in itertools.pairwise(counts)]


def _refreshes(optimizer: torch.optim.Optimizer) -> int:
    """How many bases the optimizer has found so far; the device is not asked."""
    return sum(state.get("refreshes", 0) for state in optimizer.state.values())


def batches_of(bench: Bench) -> Iterator[Tensor]:
    """Random tokens on the device, a few batches over and over."""
    generator = torch.Generator().manual_seed(0)
    size = (4, bench.batch_size, bench.length)
    ids = torch.randint(0, SHAPES[bench.shape]["vocab_size"], size, generator=generator).to(bench.torch_device)
    return itertools.cycle(ids.unbind())


def training_step(model: Any, optimizer: torch.optim.Optimizer, batches: Iterator[Tensor]) -> Step:
    """A step as the Trainer makes it, with its clipping at 1.0 unless the optimizer clips."""
    clips_itself = isinstance(optimizer, GaLoreAdamW) and optimizer.config.max_grad_norm is not None

    def step() -> None:
        _gradients(model, next(batches), keep=True)
        if not clips_itself:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _gradients(model: Any, ids: Tensor, *, keep: bool = False) -> None:
    model(input_ids=ids, labels=ids).loss.backward()
    if not keep:
        model.zero_grad()
