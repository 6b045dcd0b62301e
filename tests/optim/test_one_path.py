"""One path serves whole and cut weights: what must not depend on the backend, on joining, or on a save."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, Phi3Config

from cut_weights import Run, some_gradients
from galore_trainer.config import GaLoreConfig
from galore_trainer.optim import lenders, refresh
from galore_trainer.optim.bucket import Bucket

SMALL = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2}
PHI3 = Phi3Config(**SMALL, num_attention_heads=4, num_key_value_heads=4, pad_token_id=0)
NEOX = GPTNeoXConfig(**SMALL, num_attention_heads=4)


def cut_run(architecture: Any, settings: dict[str, Any], steps: int, most: int | None = None) -> Run:
    config = GaLoreConfig(**{"rank": 2, "update_proj_gap": 2, "proj_type": "right", **settings})
    torch.manual_seed(0)
    run = Run(AutoModelForCausalLM.from_config(architecture), config, "rows")
    for optimizer in run.optimizers:
        optimizer.max_stack_elements = most
    for step in range(steps):
        run.step(some_gradients(run.optimizers[0], step))
    return run


@pytest.mark.parametrize("settings", [{}, {"head_sharing": "per_head"}, {"head_choice": "energy"}], ids=str)
@pytest.mark.parametrize("architecture", [PHI3, NEOX], ids=lambda config: config.model_type)
def test_joined_parts_of_a_fused_weight_have_bases_of_their_own_rows(
    architecture: Any, settings: dict[str, Any]
) -> None:
    """q, k and v are equal matrices at other rows of one weight; on a GPU their bases are found together."""
    alone, joined = (cut_run(architecture, settings, 3, most) for most in (None, 1 << 20))
    for name, w in joined.weights.items():
        torch.testing.assert_close(w, alone.weights[name], rtol=0, atol=1e-5)


def test_rows_that_stay_are_not_copied_for_a_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are most of a gradient; only a process that has fewer than another in one bucket adds zeros."""
    seen: list[bool] = []

    def noted(bucket: Bucket, *args: Any) -> Any:
        rows, reduce = lenders.lending_rows(bucket, *args)
        (w,) = [piece.owner for piece in bucket.pieces]
        if reduce is not None and w.shard.local_rows:
            seen.append(rows[0].untyped_storage().data_ptr() == w.grad.untyped_storage().data_ptr())
        return rows, reduce

    monkeypatch.setattr(refresh, "lending_rows", noted)
    cut_run(PHI3, {"head_sharing": "joint"}, 1)
    assert all(seen)
    assert seen
