"""Weights with fewer rows than processes, under ``fully_shard`` without a Trainer: save, load, go on.

Usage: ``few_rows.py CHECKPOINT DTYPE``, under torchrun with three processes.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from galore_trainer import GaLoreConfig, build_optimizer

CONFIG = GaLoreConfig(
    rank=2, update_proj_gap=3, residual_percent=20.0, residual_warmup_steps=2, proj_type="right", head_sharing="joint"
)


class Sum(torch.nn.Module):
    """Layers of two rows and a bias each, side by side: of each counter the process without rows saves one, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(16, 2) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> Any:
        return sum(layer(x) for layer in self.layers)


def make(dtype: torch.dtype) -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(0)
    model = Sum().to(dtype)
    fully_shard(model)
    return model, build_optimizer(model, CONFIG, lr=1e-2)


def train(model: torch.nn.Module, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    folder, dtype = sys.argv[1], getattr(torch, sys.argv[2])
    dist.init_process_group("gloo")
    for saved_after in (0, 1, 2, 5):
        path = f"{folder}/{saved_after}"
        model, optimizer = make(dtype)
        train(model, optimizer, 0, saved_after)
        weights = {name: p.to_local().detach().clone() for name, p in model.named_parameters()}  # type: ignore[attr-defined]
        dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=path)
        again, resumed = make(dtype)
        state = {"optimizer": get_optimizer_state_dict(again, resumed)}
        dcp.load(state, checkpoint_id=path)
        set_optimizer_state_dict(again, resumed, state["optimizer"])
        for name, p in again.named_parameters():
            p.to_local().detach().copy_(weights[name])  # type: ignore[attr-defined]
        train(model, optimizer, saved_after, saved_after + 4)
        train(again, resumed, saved_after, saved_after + 4)
        for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
            if not torch.equal(p.full_tensor(), q.full_tensor()):  # type: ignore[attr-defined]
                raise SystemExit(f"saved after {saved_after} steps: {name} differs")
    dist.barrier()  # nobody leaves while another still receives
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
