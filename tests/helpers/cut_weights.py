"""A model whose weights are cut over three processes, for which threads stand."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.hf.build import build_optimizer
from galore_trainer.layouts.shard import Shard
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from galore_trainer.optim.local import LocalWeight
from galore_trainer.optim.state_forms import saved_form
from threads import Meeting, Thread

WORLD = 3


def on_every_rank(work: Callable[[int], Any]) -> list[Any]:
    found: list[Any] = [None] * WORLD
    errors: list[BaseException] = []

    def one(rank: int) -> None:
        try:
            found[rank] = work(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(WORLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return found


def cuts_of(numel: int, columns: int, kind: str, seed: int) -> tuple[int, ...]:
    """Where the second and the third part begin."""
    if kind == "rows":
        rows = numel // columns
        return tuple(columns * (rows * rank // WORLD + (seed + rank) % 2) for rank in range(1, WORLD))
    if kind == "one row":  # both cuts inside one row: the second process has a part of it and nothing else
        begin = columns * ((numel // columns) // 2)
        return begin + 1, max(begin + 1, begin + columns - 1)
    if kind == "empty":
        return 0, numel // 2 + 1
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(1, numel, (WORLD - 1,), generator=generator).sort().values.tolist())


class Run:
    """A model and its optimizer, cut over the threads; each keeps its own weights and state."""

    def __init__(self, model: Any, config: GaLoreConfig, kind: str, factors: torch.dtype | None = None) -> None:
        self.kind, self.config, self.factors = kind, config, factors
        self.meeting = Meeting(WORLD)
        self.optimizers = [build(model, config) for _ in range(WORLD)]
        self.states: list[dict[str, dict[str, Any]]] = [{} for _ in range(WORLD)]
        self.weights: dict[str, Tensor] = {}
        for group in self.optimizers[0].param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                self.weights[name] = p.detach().clone()

    def step(self, grads: dict[str, Tensor]) -> None:
        parts = on_every_rank(lambda rank: self._step(rank, grads))
        for name, whole in self.weights.items():
            whole.copy_(torch.cat([part[name] for part in parts]).view(whole.shape))

    def _step(self, rank: int, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        optimizer, weights = self.optimizers[rank], []
        for group in optimizer.param_groups:
            for i, name in enumerate(group["names"]):
                weights.append(self.local(rank, group, i, name, grads[name]))
        with torch.no_grad():
            optimizer.move(weights)
        return {w.name: w.weight for w in weights}

    def saved(self, w: LocalWeight) -> dict[str, Any]:
        """The state of a weight as it is saved."""
        return saved_form(w.state, w.matrices, self.config, w.rows(), w.shard.local_rows, w.weight.dtype)

    def local(self, rank: int, group: dict[str, Any], i: int, name: str, grad: Tensor) -> LocalWeight:
        whole = self.weights[name]
        columns = whole.shape[-1] if whole.dim() > 1 else 1
        boundaries = (0, *cuts_of(whole.numel(), columns, self.kind, len(name) + i), whole.numel())
        shard = Shard(
            rows=whole.numel() // columns,
            columns=columns,
            start=boundaries[rank],
            stop=boundaries[rank + 1],
            boundaries=boundaries[1:-1],
            ranks=Thread(self.meeting, rank),
        )
        matrices = group["matrices"][i] if group["projected"] else []
        here = slice(shard.start, shard.stop)
        state = self.states[rank].setdefault(name, {})
        weight = whole.reshape(-1)[here].clone()
        mine = grad.reshape(-1)[here].clone()
        return LocalWeight(name, group, state, shard, weight, mine, matrices, compute_in=self.factors)


def decaying(rows: int, columns: int, seed: int) -> Tensor:
    """A gradient whose leading directions are well separated and the same from step to step, as real ones'."""
    generator, fixed = (torch.Generator().manual_seed(n) for n in (seed, rows * columns))
    k = min(rows, columns)
    left, right = (torch.linalg.qr(torch.randn(n, k, generator=fixed)).Q for n in (rows, columns))
    return (left * torch.linspace(1.0, 0.05, k)) @ right.T + 0.05 * torch.randn(rows, columns, generator=generator)


def build(model: Any, config: GaLoreConfig) -> GaLoreAdamW:
    return build_optimizer(model, config, lr=1e-2, weight_decay=0.1, eps=1e-6, seed=1)


def some_gradients(optimizer: GaLoreAdamW, step: int) -> dict[str, Tensor]:
    found = {}
    for group in optimizer.param_groups:
        for i, (name, p) in enumerate(zip(group["names"], group["params"], strict=True)):
            if p.dim() == 1:
                found[name] = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
                continue
            each = [decaying(p.shape[-2], p.shape[-1], 100 * step + 10 * i + e) for e in range(p[..., 0, 0].numel())]
            found[name] = torch.stack(each).view(p.shape)
    return found
