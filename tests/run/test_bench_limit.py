"""The limit of a step follows from shapes, dtypes and rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.matrix import LogicalMatrix
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from galore_trainer.run.bench.limit import Pass, limit_ms, passes

M, N, R = 48, 32, 4
FEW = 64  # bytes of counters in the state, which are no part of a matrix


def stepped(**settings: Any) -> GaLoreAdamW:
    """A bfloat16 weight of 48 x 32 after one step at rank 4."""
    p = torch.nn.Parameter(torch.randn(M, N, dtype=torch.bfloat16))
    p.grad = torch.randn_like(p)
    matrix = LogicalMatrix(length=M, columns=N, rank=R)
    group = {"params": [p], "projected": True, "matrices": [[matrix]], "names": ["w"]}
    config = GaLoreConfig(**{"rank": R, "residual_percent": 0.0, "residual_warmup_steps": 0, **settings})
    optimizer = GaLoreAdamW([group], config, lr=1e-3)
    for _ in range(2):
        optimizer.step()
    return optimizer


def test_the_passes_of_a_step() -> None:
    """G, P and R; M and V twice; W twice, N and P: each product has two operations for each entry and each of r."""
    found = passes(stepped())
    assert found["project"] == Pass(2 * M * N + 4 * N * R + 4 * M * R, 2 * M * N * R)
    assert found["update"] == Pass(4 * M * N + 2 * M * R + 4 * N * R, 2 * M * N * R)
    assert 0 <= found["moments"].bytes - 16 * M * R <= 2 * FEW
    assert "residual" not in found


@pytest.mark.parametrize(("bits", "size"), [(16, 2), (8, 1)])
def test_small_state_is_counted_as_it_is_stored(bits: int, size: int) -> None:
    assert 0 <= passes(stepped(state_bits=bits))["moments"].bytes - 4 * size * M * R <= 2 * FEW


def test_what_residuals_add() -> None:
    plain = passes(stepped())
    scaled = passes(stepped(residual="scaled"))
    assert scaled["update"].bytes - plain["update"].bytes == 2 * M * N  # G once more
    entries = M * 2  # of 32, five percent
    sparse = passes(stepped(residual="sparse", residual_percent=6.25))
    # positions, moments twice, and 32 bytes of memory for an entry of G
    assert 0 <= sparse["residual"].bytes - entries * (4 + 16 + 32) <= FEW


def test_a_pass_takes_as_long_as_its_bytes_or_its_products() -> None:
    parts = {"project": Pass(10**9, 0), "update": Pass(10**9, 3 * 10**12)}
    assert limit_ms(parts, 1e12) == pytest.approx(1.0 + 4.0)


def test_the_limits_that_the_bounds_refer_to() -> None:
    """Seven weights of a LLaMA-7B layer, 16 times, float32 state, at 4.24 TB/s: milliseconds by rank."""
    square, long, layers = 4096, 11008, 16
    entries = layers * (4 * square**2 + 3 * square * long)
    for rank, limit in {32: 4.7, 128: 5.2, 256: 6.2, 512: 10.4, 1024: 20.7}.items():
        moments, bases = layers * rank * (4 * square + 3 * long), 4 * layers * rank * 7 * square
        products = 2 * entries * rank
        parts = {
            "project": Pass(2 * entries + bases + 4 * moments, products),
            "moments": Pass(16 * moments),
            "update": Pass(4 * entries + bases + 2 * moments, products),
        }
        assert limit_ms(parts, 4.24e12) == pytest.approx(limit, abs=0.05)
