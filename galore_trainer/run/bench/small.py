"""SmolLM2-135M, as the quickstart trains it: float32 weights, products in bfloat16. Its step is bound by launches."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from galore_trainer.run.bench.e2e import batches_of
from galore_trainer.run.bench.measure import Step, take_turns
from galore_trainer.run.bench.weights import Bench, galore_plus, make_model, peer

LAYERS, ROUNDS = 30, 3  # rounds for each one of the benchmark: these steps are short
METHODS: dict[str, dict[str, Any]] = {"GaLore+": {}, "GaLore+, scaled residual": {"residual": "scaled"}}


def small_bench(bench: Bench) -> Bench:
    """The benchmark with the small model in place of its own; a tiny one stays."""
    small = dataclasses.replace(bench, dtype="float32", rounds=ROUNDS * bench.rounds)
    if bench.shape == "tiny":
        return small
    return dataclasses.replace(small, shape="smollm2-135m", model_layers=LAYERS, batch_size=16, length=256)


def bench_small(bench: Bench) -> dict[str, Any]:
    """Time updates of all weights, and training steps.

    Returns:
        ``timings``: updates and training steps of every method, by "update, METHOD" and "training, METHOD".
    """
    small = small_bench(bench)
    model = make_model(small, small.model_layers)
    model.gradient_checkpointing_disable()
    batches = batches_of(small)

    def gradients() -> None:
        with torch.autocast(small.torch_device.type, torch.bfloat16):
            loss = model(input_ids=(ids := next(batches)), labels=ids).loss
        loss.backward()

    def training(optimizer: torch.optim.Optimizer) -> Step:
        def step() -> None:
            gradients()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    optimizers = {"AdamW fused": peer(small, "adamw", model)}
    optimizers |= {name: galore_plus(small, model, **settings) for name, settings in METHODS.items()}
    steps = {f"training, {name}": training(optimizer) for name, optimizer in optimizers.items()}
    timings = take_turns(steps, small.rounds, bench.torch_device)
    gradients()
    updates: dict[str, Step] = {f"update, {name}": optimizer.step for name, optimizer in optimizers.items()}
    timings |= take_turns(updates, small.rounds, bench.torch_device)
    return {"timings": timings, "missing": {}}
