"""New bases for all weights at once: randomized, shared or joint, against the SVDs that galore-torch computes."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from galore_trainer.run.bench.measure import Step, Timing, take_turns, timed
from galore_trainer.run.bench.weights import Bench, galore_plus, linear_weights

KINDS: dict[str, dict[str, Any]] = {
    **{f"shared heads, {q} iterations": {"subspace_iterations": q} for q in range(4)},
    "joint, 1 iterations": {"subspace_iterations": 1, "head_sharing": "joint"},
    "a basis for each head, 1 iterations": {"subspace_iterations": 1, "head_sharing": "per_head"},
}
USUAL = "shared heads, 1 iterations"
HIGHER = (256, 512)  # ranks
_SVDS: dict[Any, float] = {}  # milliseconds by shape and device; they take many seconds


def bench_refresh(bench: Bench) -> dict[str, Any]:
    """Time a refresh of all weights.

    Returns:
        ``timings`` by kind; ``svd``: milliseconds of the SVDs of all weights, each shape timed once and counted as
        often as it occurs; ``missing``: nothing.
    """
    model = linear_weights(bench)
    methods: dict[str, Step] = {}
    ranks = {f"{USUAL}, r {rank}": {"subspace_iterations": 1, "rank": bench.scaled(rank)} for rank in HIGHER}
    for name, settings in {**KINDS, **ranks}.items():
        optimizer = galore_plus(bench, model, **settings)
        optimizer.step()
        methods[name] = optimizer.refresh_now
    timings = take_turns(methods, bench.rounds, bench.torch_device)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return {"timings": timings, "svd": svd_ms(grads), "missing": {}}


def svd_ms(grads: Iterable[Tensor]) -> float:
    """Milliseconds of torch's SVDs of all gradients, as galore-torch calls them; one of each shape is timed."""
    counts, samples = Counter[Any](), dict[Any, Tensor]()
    for grad in grads:
        counts[grad.shape] += 1
        samples[grad.shape] = grad
    for shape, grad in samples.items():
        if (shape, grad.device) not in _SVDS:
            wide = grad.float()
            torch.linalg.svd(wide[:64, :64], full_matrices=False)  # handles and workspaces are made
            svd = functools.partial(torch.linalg.svd, wide, full_matrices=False)
            _SVDS[shape, grad.device] = timed(svd, grad.device)[0]
    return sum(count * _SVDS[shape, samples[shape].device] for shape, count in counts.items())


def spread(timing: Timing, steps: int) -> float:
    """Milliseconds that a refresh adds to each of so many steps."""
    return timing.median / steps
