"""What a user relies on beside the maths: rounding, skipped steps, state on disk, refusals."""

from __future__ import annotations

import io

import pytest
import torch

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.galore import stochastic_round
from galore_trainer.errors import OptionError
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from galore_trainer.optim.guards import Later


def make(dtype: torch.dtype = torch.float32, seed: int = 0, **settings) -> tuple[list[torch.nn.Parameter], GaLoreAdamW]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(24, 16), (16, 40), (16,)]
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    config = GaLoreConfig(**{"rank": 4, "update_proj_gap": 3, "residual_warmup_steps": 2, **settings})
    groups = [
        {"params": params[:2], "names": ["a", "b"], "projected": True},
        {"params": params[2:], "names": ["c"]},
    ]
    return params, GaLoreAdamW(groups, config, lr=1e-2, weight_decay=0.01, seed=seed)


def train(params: list[torch.nn.Parameter], optimizer: GaLoreAdamW, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def test_stochastic_rounding_is_unbiased() -> None:
    """The mean of 40,000 roundings lies within 5 standard errors of the value; exact values never move."""
    n = 40_000
    for value in (1.0 + 1e-3, -3.14159, 1e-20, 65504.0 * 1.003):
        x = torch.full((n,), value)
        low = x[0].view(torch.int32).bitwise_and(-65536).view(torch.float32)
        gap = (low.view(torch.int32) + 65536).view(torch.float32) - low
        rounded = stochastic_round(x, torch.Generator().manual_seed(1)).double()
        share = ((x[0].double() - low.double()) / gap.double()).item()
        error = (rounded.mean() - x[0].double()).abs() / gap.abs().double()
        assert error <= 5 * (share * (1 - share) / n) ** 0.5 + 1e-9
        assert len(rounded.unique()) == 2
    exact = torch.tensor([1.0, -2.5, 0.0, float("inf"), -float("inf")])
    assert torch.equal(stochastic_round(exact, torch.Generator().manual_seed(1)).float(), exact)
    assert stochastic_round(torch.tensor([float("nan")]), torch.Generator().manual_seed(1)).isnan().all()


def test_small_updates_of_bfloat16_weights_are_not_lost() -> None:
    """Steps of 1/50 of a bf16 spacing: rounding to nearest never moves, stochastic rounding moves by their sum."""
    moved = {}
    for rounding in (True, False):
        p = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        plain = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        spacing = 2.0**-8  # below 1.0
        config = GaLoreConfig(rank=64, scale=1.0, stochastic_rounding=rounding, svd="exact")
        groups = [{"params": [p], "projected": True}, {"params": [plain]}]
        optimizer = GaLoreAdamW(groups, config, lr=spacing / 50)
        for _ in range(100):
            p.grad = torch.eye(64, dtype=torch.bfloat16)
            plain.grad = torch.ones(4096, dtype=torch.bfloat16)
            optimizer.step()
        moved[rounding] = [(1.0 - p.diagonal().float()).mean().item(), (1.0 - plain.float()).mean().item()]
    assert moved[False] == [0.0, 0.0]
    assert moved[True][1] == pytest.approx(2 * spacing, rel=0.1)
    assert moved[True][0] == pytest.approx(2 * spacing, rel=0.3)  # 64 entries: the standard error is 9 %


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_exact_through_weights_only_load(dtype: torch.dtype) -> None:
    params, optimizer = make(dtype)
    train(params, optimizer, range(10))
    for stop in (1, 3, 5):
        first, opt = make(dtype)
        train(first, opt, range(stop))
        buffer = io.BytesIO()
        torch.save({"optimizer": opt.state_dict(), "weights": [p.detach() for p in first]}, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
        second, resumed = make(dtype)
        for p, w in zip(second, saved["weights"], strict=True):
            p.data.copy_(w)
        resumed.load_state_dict(saved["optimizer"])
        for p in second[:2]:
            assert resumed.state[p]["basis"].dtype == torch.float32
            assert resumed.state[p]["skipped"].dtype == torch.int32
        train(second, resumed, range(stop, 10))
        assert all(torch.equal(a, b) for a, b in zip(params, second, strict=True))


@pytest.mark.parametrize(
    ("change", "option"),
    [
        ({"rank": 5}, "galore.rank"),
        ({"update_proj_gap": 7}, "galore.update_proj_gap"),
        ({"head_sharing": "joint"}, "galore.head_sharing"),
        ({"seed": 9}, "seed"),
    ],
)
def test_resume_under_other_settings_is_refused_naming_both(change: dict, option: str) -> None:
    params, optimizer = make()
    train(params, optimizer, range(2))
    _, other = make(**change)
    with pytest.raises(OptionError) as error:
        other.load_state_dict(optimizer.state_dict())
    assert error.value.option == option
    before = {"rank": 4, "update_proj_gap": 3, "head_sharing": "'shared'", "seed": 0}[next(iter(change))]
    assert str(before) in str(error.value)
    assert repr(next(iter(change.values()))) in str(error.value)
    assert "Resume with" in str(error.value)


def test_state_of_another_optimizer_is_refused() -> None:
    params, optimizer = make()
    with pytest.raises(OptionError, match="another optimizer"):
        optimizer.load_state_dict(torch.optim.AdamW(params).state_dict())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("when", [0, 2, 3])  # 0 and 3 are refresh steps
def test_a_non_finite_gradient_skips_that_parameter_only(bad: float, when: int) -> None:
    params, optimizer = make()
    train(params, optimizer, range(when))
    before = [p.detach().clone() for p in params]
    state = {k: v.clone() if torch.is_tensor(v) else v for k, v in optimizer.state[params[0]].items()}
    for p in params:
        p.grad = torch.ones_like(p)
    params[0].grad[3, 4] = bad
    params[2].grad[5] = bad
    optimizer.step()
    assert torch.equal(params[0], before[0])
    assert torch.equal(params[2], before[2])
    assert not torch.equal(params[1], before[1])
    for key in ("exp_avg", "exp_avg_sq", "step", "basis") if state else ():
        assert torch.equal(optimizer.state[params[0]][key], state[key])
    assert optimizer.check_finite() == {"a": 1, "c": 1}
    train(params, optimizer, range(50, 53))
    assert all(p.isfinite().all() for p in params)
    assert not torch.equal(params[0], before[0])
    # the basis that was due came with the next good gradient, and the schedule stayed on its grid
    assert optimizer.state[params[0]]["due"] == ((when + 3) // 3 + 1) * 3
    assert optimizer.check_finite() == {"a": 1, "c": 1}


def test_ten_non_finite_gradients_in_a_row_stop_the_run_naming_the_parameter() -> None:
    params, optimizer = make()
    for p in params:
        p.grad = torch.ones_like(p)
    params[1].grad[0, 0] = float("nan")
    for _ in range(9):
        optimizer.step()
    with pytest.raises(FloatingPointError, match=r"10 steps in a row: b\."):
        optimizer.step()


def test_a_device_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test-only: as on a GPU, whose counters are read five steps after they were asked for."""
    monkeypatch.setattr(Later, "waits", True)
    params, optimizer = make()
    params[1].grad = torch.full_like(params[1], float("nan"))
    for _ in range(14):
        optimizer.step()
    with pytest.raises(FloatingPointError, match=r"10 steps in a row: b\."):
        optimizer.step()


def test_ten_in_a_row_stop_the_run_wherever_they_begin() -> None:
    """The count is read every ten steps; a good step in between does not hide a long row of bad ones."""
    params, optimizer = make()
    with pytest.raises(FloatingPointError):  # noqa: PT012 - the step that raises is not known beforehand
        for step in range(20):
            for p in params:
                p.grad = torch.ones_like(p)
            if 3 <= step < 14:
                params[0].grad[0, 0] = float("nan")
            optimizer.step()
    assert optimizer.state[params[0]]["skipped"].tolist()[1:] == [11, 11]


def test_state_bytes_are_what_the_state_holds() -> None:
    params, optimizer = make(residual_percent=0.0)
    train(params, optimizer, range(1))
    kinds = optimizer.state_bytes()
    counters = 3 * 12 + 3 * 4  # skipped (three int32) and step (float32)
    basis = 4 * (16 * 4 + 16 * 4)  # right: n x r; left: m x r
    assert kinds.pop("residual") == 0
    moments = 4 * 2 * (24 * 4 + 4 * 40)
    plain = 4 * 2 * 16
    assert kinds["basis"] == basis
    assert sum(kinds.values()) == basis + moments + plain + counters


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        ({"rank": 0}, "galore.rank"),
        ({"rank": -3}, "galore.rank"),
        ({"rank": 2.5}, "galore.rank"),
        ({"rank": True}, "galore.rank"),
        ({"update_proj_gap": 0}, "galore.update_proj_gap"),
        ({"scale": float("nan")}, "galore.scale"),
        ({"proj_type": "full"}, "galore.proj_type"),
        ({"svd": "fast"}, "galore.svd"),
        ({"rank_pattern": {"q_proj": 0}}, "galore.rank_pattern['q_proj']"),
        ({"target_modules": []}, "galore.target_modules"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict, option: str) -> None:
    with pytest.raises(OptionError) as error:
        GaLoreConfig(**settings)
    assert error.value.option == option


def test_rank_above_the_smaller_side_is_refused_for_a_weight_given_by_hand() -> None:
    p = torch.nn.Parameter(torch.zeros(8, 6))
    with pytest.raises(OptionError, match="at most 6"):
        GaLoreAdamW([{"params": [p], "projected": True}], GaLoreConfig(rank=7))


def test_closure_and_missing_gradients() -> None:
    params, optimizer = make()
    params[0].grad = torch.ones(24, 16)
    assert optimizer.step(lambda: 3.0) == 3.0
    assert len(optimizer.state[params[0]])
    assert params[1] not in optimizer.state
