"""``torch.compile`` of a step or of a training function runs, the optimizer uncompiled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from galore_trainer.config import GaLoreConfig
from galore_trainer.optim.galore_adamw import GaLoreAdamW


def make(layerwise: bool) -> tuple[nn.Module, GaLoreAdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))
    projected = [{"params": [m.weight for m in (model[0], model[2])], "rank": 4}]
    config = GaLoreConfig(update_proj_gap=3, residual_warmup_steps=2, layerwise=layerwise)
    return model, GaLoreAdamW([*projected, {"params": [model[0].bias, model[2].bias]}], config, lr=1e-2)


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("what", ["step", "function"])
def test_it_trains_as_without(what: str, layerwise: bool) -> None:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    results = []
    for compiled in (False, True):
        model, optimizer = make(layerwise)

        def train(step, model=model, optimizer=optimizer) -> None:
            loss = model(x).square().mean()
            loss.backward()
            step()
            optimizer.zero_grad()

        # the eager backend traces without compiling code for this host
        step = torch.compile(optimizer.step, backend="eager") if compiled and what == "step" else optimizer.step
        run = torch.compile(train, backend="eager") if compiled and what == "function" else train
        for _ in range(5):
            run(step)
        results.append([p.detach() for p in model.parameters()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
