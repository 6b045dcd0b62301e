"""A share of entries is saved with all of its digits, so that the same settings go on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from galore_trainer.config import GaLoreConfig
from galore_trainer.optim.galore_adamw import GaLoreAdamW


@pytest.mark.parametrize("percent", [100 / 3, 10, 1.2345678])
@pytest.mark.parametrize("more", [{}, {"residual_mode": "moments"}, {"residual": "both"}, {"scale": 2.0}])
def test_every_digit_of_the_percent_is_saved(percent: float, more: dict[str, Any]) -> None:
    config = GaLoreConfig(rank=2, residual_percent=percent, **more)
    optimizer, again = (
        GaLoreAdamW([{"params": [torch.nn.Parameter(torch.zeros(6, 4))], "projected": True}], config) for _ in range(2)
    )
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["galore"] == optimizer.param_groups[0]["galore"]
