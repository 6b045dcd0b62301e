"""Steps in a row, as in training, where the host runs ahead of the device: by rank, residual and state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from galore_trainer.core.basis import BASES
from galore_trainer.run.bench.limit import limit_ms, passes
from galore_trainer.run.bench.measure import Step, Timing, copy_bandwidth, take_turns
from galore_trainer.run.bench.weights import Bench, galore_plus, linear_weights, peer

IN_A_ROW = 4
RANKS = (32, 128, 256, 512, 1024)
ADAMW, SCALED, SPARSE, ALONE = "AdamW fused", "scaled residual", "sparse residual", "one step alone"


def bench_ranks(bench: Bench) -> dict[str, Any]:
    """Time a quarter of four steps in a row, and one step alone.

    Returns:
        ``timings`` by name and ``limits`` of our steps in milliseconds (``limit.py``); what is not named by a rank has
        rank 128. ``missing``: nothing.
    """
    model = linear_weights(bench)
    sparse = {"residual_percent": bench.residual_percent, "residual_warmup_steps": 0}
    settings: dict[str, dict[str, Any]] = {
        **{f"r {rank}": {"rank": bench.scaled(rank)} for rank in RANKS},
        SCALED: {"residual": "scaled"},
        SPARSE: sparse,
        "16-bit state": {"state_bits": 16},
        "8-bit state": {"state_bits": 8},
    }
    ours = {name: galore_plus(bench, model, **{"rank": bench.scaled(128), **each}) for name, each in settings.items()}
    adamw = peer(bench, "adamw", model)
    with RandomBases():
        for optimizer in ours.values():
            optimizer.step()
    steps: dict[str, Step] = {ADAMW: adamw.step}
    steps |= {name: optimizer.step for name, optimizer in ours.items()}
    methods = {name: in_a_row(step) for name, step in steps.items()}
    found = take_turns(methods, bench.rounds, bench.torch_device)
    timings = {name: quarter(timing) for name, timing in found.items()}
    timings |= take_turns({ALONE: steps["r 128"]}, bench.rounds, bench.torch_device)
    bandwidth = copy_bandwidth(bench.torch_device)
    limits = {name: limit_ms(passes(optimizer), bandwidth) for name, optimizer in ours.items()}
    return {"timings": timings, "limits": limits, "missing": {}}


def in_a_row(step: Step) -> Step:
    """Several steps as one."""

    def steps() -> None:
        for _ in range(IN_A_ROW):
            step()

    return steps


def quarter(timing: Timing) -> Timing:
    """Of one step of several in a row."""
    return Timing(tuple(ms / IN_A_ROW for ms in timing.ms), tuple(ms / IN_A_ROW for ms in timing.host_ms))


class RandomBases:
    """Makes random bases in place of those of gradients, which take long to find and change no time of a step."""

    def __enter__(self) -> None:
        """Put random bases in the place of randomized ones."""
        self._found = BASES["randomized"]
        BASES["randomized"] = _random

    def __exit__(self, *_: object) -> None:
        """Put those of gradients back."""
        BASES["randomized"] = self._found


def _random(rows: Any, rank: int, side: str, **_: object) -> Tensor:
    first = rows[0]
    inner = first.shape[2] if side == "right" else first.shape[1]
    return torch.randn(sum(len(x) for x in rows), inner, rank, device=first.device) / inner**0.5
