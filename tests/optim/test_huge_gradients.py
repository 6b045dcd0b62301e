"""Gradients whose squares overflow are skipped and named; nothing becomes infinite or NaN, then or later."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from galore_trainer.config import GaLoreConfig
from galore_trainer.optim.galore_adamw import GaLoreAdamW

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NOTHING: Mapping[str, float] = {}
SHAPES = {"q": (24, 16), "mlp": (16, 40), "bias": (16,)}


def make(dtype: torch.dtype = torch.float32, **settings) -> tuple[dict[str, nn.Parameter], GaLoreAdamW]:
    generator = torch.Generator().manual_seed(5)
    params = {name: nn.Parameter(torch.randn(s, generator=generator).to(DEVICE, dtype)) for name, s in SHAPES.items()}
    usual = {"rank": 4, "update_proj_gap": 3, "residual_warmup_steps": 2, "residual_percent": 10.0}
    groups = [
        {"params": [params["q"], params["mlp"]], "names": ["q", "mlp"], "projected": True},
        {"params": [params["bias"]], "names": ["bias"]},
    ]
    return params, GaLoreAdamW(groups, GaLoreConfig(**{**usual, **settings}), lr=1e-2, weight_decay=0.01)


def step(
    params: dict[str, nn.Parameter], optimizer: GaLoreAdamW, seed: int, factor: Mapping[str, float] = NOTHING
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, p in params.items():
        numbers = torch.randn(p.shape, generator=generator).to(p) * factor.get(name, 1.0)
        (p * numbers).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


SETTINGS = [
    {},
    {"layerwise": True},
    {"state_bits": 16, "plain_state_bits": 16},
    {"state_bits": 8, "plain_state_bits": 8},
    {"momentum_transfer": "keep", "svd": "exact"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("when", [0, 2, 3, 4])  # 0 and 3 are refreshes
@pytest.mark.parametrize("factor", [1e25, 1e19])
def test_one_step_changes_nothing_else(settings: dict, dtype: torch.dtype, when: int, factor: float) -> None:
    check_one_step(dtype, when, factor, 8, settings)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1e25), (torch.bfloat16, 1e19)])
def test_kernels_skip_it_too(dtype: torch.dtype, factor: float) -> None:
    pytest.importorskip("triton")
    check_one_step(dtype, 3, factor, 5, {"kernels": "triton", "update_proj_gap": 5})


def check_one_step(dtype: torch.dtype, when: int, factor: float, steps: int, settings: dict) -> None:
    params, optimizer = make(dtype, **settings)
    for at in range(steps):
        step(params, optimizer, at, dict.fromkeys(SHAPES, factor) if at == when else {})
        for name, p in params.items():
            assert p.isfinite().all(), name
            assert all(x.isfinite().all() for x in optimizer.state[p].values() if torch.is_tensor(x)), name
    assert optimizer.check_finite() == dict.fromkeys(SHAPES, 1)
    fresh = make(dtype)[0]
    assert all(not torch.equal(p, fresh[name]) for name, p in params.items())


@pytest.mark.parametrize("settings", [{}, {"layerwise": True}], ids=str)
@pytest.mark.parametrize("name", ["q", "bias"])
def test_a_lasting_one_stops_the_run_and_is_named(name: str, settings: dict) -> None:
    params, optimizer = make(**settings)
    with pytest.raises(FloatingPointError, match=rf"in 10 steps in a row: {name}\."):  # noqa: PT012
        for at in range(30):
            step(params, optimizer, at, {name: 1e30})
    assert all(p.isfinite().all() for p in params.values())
    assert optimizer.state[params["mlp"]]["skipped"].tolist() == [0, 0, 0]


def test_what_the_basis_does_not_see_can_be_too_large() -> None:
    """The lost part of a gradient feeds the residual's moments."""
    params, optimizer = make(update_proj_gap=1000)
    for at in range(4):
        step(params, optimizer, at)
    p = params["q"]
    state = optimizer.state[p]
    P = state["basis"][0]
    across = torch.randn(24, 16, generator=torch.Generator().manual_seed(9)).to(p)
    across -= across @ P @ P.mT
    p.grad = across * 1e21
    p.grad -= p.grad @ P @ P.mT  # again, as rounding left some 1e14 in the projection
    optimizer.step()
    assert optimizer.check_finite() == {"q": 1}
    assert all(x.isfinite().all() for x in state.values() if torch.is_tensor(x))


def test_float64_holds_larger_ones() -> None:
    params, optimizer = make(torch.float64)
    for at in range(6):
        step(params, optimizer, at, dict.fromkeys(SHAPES, 1e30) if at == 2 else {})
    assert optimizer.check_finite() == {}
    assert all(p.isfinite().all() for p in params.values())


# ------------------------------------------------------------------ whose gradient it was


def clipped_step(params: dict[str, nn.Parameter], optimizer: GaLoreAdamW, seed: int, bad: str | None) -> None:
    """As the Trainer does it: one NaN makes the norm NaN, and clipping by it makes every gradient NaN."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in params.items():
        numbers = torch.randn(p.shape, generator=generator).to(p)
        if name == bad:
            numbers.view(-1)[3] = float("nan")
        (p * numbers).sum().backward()
    nn.utils.clip_grad_norm_(list(params.values()), 1.0)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("settings", [{}, {"layerwise": True}], ids=str)
def test_the_culprit_is_named_when_it_happens_again(settings: dict, caplog: pytest.LogCaptureFixture) -> None:
    params, optimizer = make(**settings)
    with caplog.at_level(logging.WARNING, logger="galore_trainer"):
        for at in range(40):
            clipped_step(params, optimizer, at, "mlp" if at in (12, 27) else None)
    assert all(total == 2 for total in optimizer.check_finite().values())
    assert optimizer.bad_gradients() == ["mlp"]
    said = [record.getMessage() for record in caplog.records]
    assert len([text for text in said if "the gradient of mlp was not finite" in text]) == 1
    assert not any(p._backward_hooks for p in params.values())  # good steps cost nothing again


@pytest.mark.parametrize("began", [0, 1, 4, 8])
def test_a_stopped_run_names_the_culprit(began: int) -> None:
    params, optimizer = make()
    with pytest.raises(FloatingPointError, match="It began in the gradients of q, before clipping"):  # noqa: PT012
        for at in range(30):
            clipped_step(params, optimizer, at, "q" if at >= began else None)


def test_good_steps_carry_no_hooks() -> None:
    params, optimizer = make()
    for at in range(12):
        clipped_step(params, optimizer, at, None)
    assert not any(p._backward_hooks for p in params.values())


def test_a_resumed_run_watches_for_new_skips_alone() -> None:
    params, optimizer = make()
    for at in range(12):
        clipped_step(params, optimizer, at, "q" if at == 3 else None)
    other, resumed = make()
    resumed.load_state_dict(optimizer.state_dict())
    for at in range(12, 24):
        clipped_step(other, resumed, at, None)
    assert not any(p._backward_hooks for p in other.values())
