"""What reaches a group after it was added, by a scheduler, by hand or from a state dict, is followed or refused."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from torch import nn

from galore_trainer.config import GaLoreConfig
from galore_trainer.errors import OptionError
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from galore_trainer.targets.groups import parameter_groups, plan_weights


def make(**own) -> tuple[list[nn.Parameter], GaLoreAdamW]:
    params = [nn.Parameter(torch.randn(24, 16, generator=torch.Generator().manual_seed(i))) for i in range(3)]
    groups = [{"params": params[:2], "names": ["a", "b"], "rank": 4, **own}, {"params": params[2:], "names": ["c"]}]
    config = GaLoreConfig(update_proj_gap=3, residual="sparse", residual_warmup_steps=2)
    return params, GaLoreAdamW(groups, config, lr=1e-2, weight_decay=0.1)


def step(params: list[nn.Parameter], optimizer: GaLoreAdamW, seed: int = 0) -> None:
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * seed + i))
    optimizer.step()


BAD = [
    ("lr", math.nan),
    ("lr", math.inf),
    ("lr", -1.0),
    ("lr", "0.1"),
    ("lr", None),
    ("lr", torch.tensor([1e-3, 1e-4])),
    ("eps", math.nan),
    ("eps", -1.0),
    ("weight_decay", math.inf),
    ("betas", (1.0, 0.9)),
    ("betas", (0.9,)),
    ("betas", (0.9, math.nan)),
    ("scale", math.nan),
    ("scale", -1.0),
    ("maximize", True),
    ("amsgrad", True),
    ("rank", 8),
    ("update_proj_gap", 2),
    ("proj_type", "left"),
    ("projected", False),
]


@pytest.mark.parametrize(("key", "value"), BAD)
def test_by_hand(key: str, value: object) -> None:
    params, optimizer = make(update_proj_gap=3, proj_type="std")
    step(params, optimizer)
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0][key] = value
    with pytest.raises(OptionError, match=key):
        step(params, optimizer, 1)
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))


@pytest.mark.parametrize(("key", "value"), [pair for pair in BAD if pair[0] in ("lr", "eps", "betas", "maximize")])
def test_from_a_state_dict(key: str, value: object) -> None:
    params, optimizer = make()
    step(params, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0][key] = value
    with pytest.raises(OptionError, match=key):
        make()[1].load_state_dict(saved)


def test_from_a_scheduler() -> None:
    params, optimizer = make()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: 1.0 if at == 0 else math.nan)
    step(params, optimizer)
    scheduler.step()
    with pytest.raises(OptionError, match="lr: got nan"):
        step(params, optimizer, 1)


@pytest.mark.parametrize(("lost", "name"), [(0, "a"), (2, "c")])
def test_a_state_dict_without_one_parameters_state_is_refused(lost: int, name: str) -> None:
    params, optimizer = make()
    step(params, optimizer)
    saved = optimizer.state_dict()
    del saved["state"][lost]
    with pytest.raises(OptionError, match=f"without {name}"):
        make()[1].load_state_dict(saved)


@pytest.mark.parametrize("calls", [-1, 3.7])
def test_counters_are_counts(calls: float) -> None:
    params, optimizer = make()
    step(params, optimizer)
    saved = optimizer.state_dict()
    saved["state"][0]["calls"] = calls
    with pytest.raises(OptionError, match="calls"):
        make()[1].load_state_dict(saved)


@pytest.mark.parametrize("past_the_end", [10_000, 0], ids=["outside of the weight", "outside of its row"])
def test_positions_outside_of_a_row_are_refused(past_the_end: int) -> None:
    params, optimizer = make()
    for seed in range(4):
        step(params, optimizer, seed)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["residual_index"][0, 0, 0] = past_the_end or params[0].shape[1]
    with pytest.raises(OptionError, match="a: residual_index outside"):
        make()[1].load_state_dict(saved)


def test_groups_made_under_other_settings_are_refused(tiny_llama: nn.Module) -> None:
    config = GaLoreConfig(rank=4, update_proj_gap=5)
    groups = parameter_groups(plan_weights(tiny_llama, config), config, lr=1e-3, weight_decay=0.0)
    with pytest.raises(OptionError, match=r"galore\.(rank|update_proj_gap): got"):
        GaLoreAdamW([dict(group) for group in groups], lr=1e-3)
    optimizer = GaLoreAdamW(groups, config, lr=1e-3)
    with pytest.raises(OptionError, match=r"galore\.rank: got 16, wanted 4"):
        GaLoreAdamW([dict(group) for group in optimizer.param_groups], GaLoreConfig(rank=16, update_proj_gap=5))


def test_groups_without_parameters_are_groups() -> None:
    params, _ = make()
    groups = [{"params": params, "rank": 4}, {"params": []}, {"params": []}]
    optimizer = GaLoreAdamW(groups, GaLoreConfig())
    step(params, optimizer)
    assert all(optimizer.state[p]["calls"] == 1 for p in params)


def test_a_rate_in_the_place_of_the_config_is_refused() -> None:
    with pytest.raises(OptionError, match="lr by its name"):
        GaLoreAdamW([nn.Parameter(torch.zeros(4, 4))], 1e-3)  # type: ignore[arg-type]


def test_the_default_device_has_no_influence() -> None:
    results = []
    for default in ("cpu", "meta"):
        params, optimizer = make()
        with torch.device(default):
            for seed in range(5):
                step_on_cpu(params, optimizer, seed)
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def step_on_cpu(params: list[nn.Parameter], optimizer: GaLoreAdamW, seed: int) -> None:
    for i, p in enumerate(params):
        generator = torch.Generator(device="cpu").manual_seed(10 * seed + i)
        p.grad = torch.randn(p.shape, generator=generator, device="cpu")
    optimizer.step()


# ------------------------------------------------------------------ what is said without a callback


def backward(params: list[nn.Parameter], seed: int, factor: dict[int, float]) -> None:
    for i, p in enumerate(params):
        numbers = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * seed + i))
        (p * numbers * factor.get(i, 1.0)).sum().backward()


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("when", [3, 38])
def test_a_skipped_step_is_told_at_once(when: int, caplog: pytest.LogCaptureFixture) -> None:
    params, optimizer = make()
    with caplog.at_level(logging.WARNING, logger="galore_trainer"):
        for seed in range(when + 1):
            backward(params, seed, {1: math.nan} if seed == when else {})
            optimizer.step()
            optimizer.zero_grad()
    assert "skipped a step of b: " in said(caplog)


@pytest.mark.parametrize("bad", [(3, 4), (3, 5), (0, 1, 2)])
def test_a_short_burst_is_traced_through_clipping(bad: tuple[int, ...], caplog: pytest.LogCaptureFixture) -> None:
    params, optimizer = make()
    with caplog.at_level(logging.WARNING, logger="galore_trainer"):
        for seed in range(8):
            backward(params, seed, {1: math.nan} if seed in bad else {})
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.bad_gradients() == ["b"]
    assert "the gradient of b was not finite" in said(caplog)


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_norm_that_overflows_is_traced_to_its_weight(layerwise: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Clipping by an infinite norm leaves zeros: nothing is skipped, and nothing moves."""
    params = [nn.Parameter(torch.randn(24, 16, generator=torch.Generator().manual_seed(i))) for i in range(3)]
    groups = [{"params": params[:2], "names": ["a", "b"], "rank": 4}, {"params": params[2:], "names": ["c"]}]
    optimizer = GaLoreAdamW(groups, GaLoreConfig(layerwise=layerwise), lr=1e-2)
    with caplog.at_level(logging.WARNING, logger="galore_trainer"):
        for seed in range(30):
            backward(params, seed, {1: 1e30})
            nn.utils.clip_grad_norm_(params, 1.0)
            try:
                optimizer.step()
            except FloatingPointError:
                break
            optimizer.zero_grad()
    assert optimizer.bad_gradients() == ["b"]


def test_a_gradient_that_is_always_zero_costs_nothing_in_the_end() -> None:
    params, optimizer = make()
    unused = nn.Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": [unused], "names": ["unused"]})
    for seed in range(40):
        backward(params, seed, {})
        unused.grad = torch.zeros(3)
        optimizer.step()
        optimizer.zero_grad()
    assert not any(p._backward_hooks for p in (*params, unused))
