"""What a parameter group may say: the settings of galore-torch's groups, names, and nothing that is not honoured."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from galore_trainer.config import GaLoreConfig
from galore_trainer.errors import OptionError
from galore_trainer.optim.galore_adamw import GaLoreAdamW

PLAIN = {"svd": "exact", "momentum_transfer": "keep", "residual_percent": 0.0}


def weights(count: int = 2, shape: tuple[int, int] = (24, 16)) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i))) for i in range(count)]


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int = 7) -> None:
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
        optimizer.step()


def test_groups_of_galore_torch_train_as_in_galore_torch() -> None:
    galore_torch = pytest.importorskip("galore_torch", reason="parity extra not installed")
    settings = {"rank": 8, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
    ours, theirs = weights(), weights()
    groups = [[{"params": ps[:1]}, {"params": ps[1:], **settings}] for ps in (ours, theirs)]
    mine = GaLoreAdamW(groups[0], GaLoreConfig(**PLAIN), lr=1e-2, eps=0.0)
    other = galore_torch.GaLoreAdamW(groups[1], lr=1e-2, eps=0.0, weight_decay=0.0, no_deprecation_warning=True)
    train(mine, ours)
    train(other, theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert [g["projected"] for g in mine.param_groups] == [False, True]


def test_each_group_has_its_own_rank_gap_scale_and_side() -> None:
    """As if each had an optimizer of its own, whose config says the same."""
    own = [
        {"rank": 3, "update_proj_gap": 2, "scale": 4.0, "proj_type": "left"},
        {"rank": 5, "scale": 0.5},
        {"update_proj_gap": 4},
    ]
    together, apart = weights(3), weights(3)
    groups = [{"params": [p], "names": [f"w{i}"], **own[i]} for i, p in enumerate(together)]
    config = {"rank": 4, "update_proj_gap": 3, "residual_warmup_steps": 2}
    optimizer = GaLoreAdamW(groups, GaLoreConfig(**config), lr=1e-2)
    for i, p in enumerate(apart):
        alone = GaLoreAdamW(
            [{"params": [p], "names": [f"w{i}"], "projected": True}], GaLoreConfig(**{**config, **own[i]}), lr=1e-2
        )
        for step in range(7):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
            alone.step()
    train(optimizer, together)
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))
    assert optimizer.state[together[0]]["basis"].shape == (1, 24, 3)


def test_overrides_survive_a_resume_and_are_checked() -> None:
    def make(**own) -> tuple[list[nn.Parameter], GaLoreAdamW]:
        params = weights(1)
        return params, GaLoreAdamW([{"params": params, "names": ["w"], **own}], GaLoreConfig(rank=4), lr=1e-2)

    params, optimizer = make(rank=6, scale=0.25)
    train(optimizer, params, 3)
    again, resumed = make(rank=6, scale=0.25)
    resumed.load_state_dict(optimizer.state_dict())
    again[0].data.copy_(params[0].data)
    train(optimizer, params, 2)
    train(resumed, again, 2)
    assert torch.equal(params[0], again[0])
    with pytest.raises(OptionError, match=r"galore\.rank: got 5, wanted 6"):
        make(rank=5)[1].load_state_dict(optimizer.state_dict())
    other = make(rank=6, scale=3.0)[1]
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["scale"] == 3.0


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"maximize": True}, "maximize"),
        ({"foreach": False}, "foreach"),
        ({"fused": True}, "fused"),
        ({"capturable": True}, "capturable"),
        ({"differentiable": True}, "differentiable"),
        ({"amsgrad": True}, "amsgrad"),
        ({"wieght_decay": 0.1}, "Did you mean weight_decay"),
        ({"ranks": 4}, "Did you mean rank"),
        ({"update_proj_gaps": 4}, "Did you mean update_proj_gap"),
        ({"rank": 0}, r"galore\.rank"),
        ({"rank": 17}, "at most 16"),
        ({"rank": 4, "proj_type": "full"}, r"galore\.proj_type"),
        ({"rank": 4, "scale": -1.0}, r"galore\.scale"),
        ({"rank": 4, "projected": False}, "projected"),
        ({"lr": -1.0}, "lr"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]"),
        ({"lr": torch.tensor([1e-3, 1e-4])}, "lr"),
        ({"names": ["a"]}, "2, one for each parameter"),
        ({"names": ["a", "a"]}, "a name that no other parameter has"),
    ],
)
def test_what_means_nothing_here_is_refused(own: dict, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        GaLoreAdamW([{"params": weights(), "projected": True, **own}], GaLoreConfig(rank=4))


def test_one_name_in_two_groups_is_refused() -> None:
    a, b = weights()
    groups = [{"params": [a], "names": ["w"], "projected": True}, {"params": [b], "names": ["w"]}]
    with pytest.raises(OptionError, match="param_groups: names: got 'w'"):
        GaLoreAdamW(groups, GaLoreConfig(rank=4))


@pytest.mark.parametrize("lr", [torch.tensor(2.0**-7), torch.tensor([2.0**-7])])
def test_a_learning_rate_may_be_a_tensor_of_one_number(lr: torch.Tensor) -> None:
    results = []
    for rate in (2.0**-7, lr):
        params = weights()
        optimizer = GaLoreAdamW(
            [{"params": params[:1], "rank": 4}, {"params": params[1:]}], GaLoreConfig(update_proj_gap=3), lr=rate
        )
        train(optimizer, params)
        results.append(torch.cat([p.detach() for p in params]))
    assert torch.equal(*results)


def test_names_of_named_parameters_are_used() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    optimizer = GaLoreAdamW([{"params": model.named_parameters(), "rank": 4}], GaLoreConfig())
    assert optimizer.param_groups[0]["names"] == ["0.weight", "1.weight"]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model[1].weight.grad[0, 0] = float("nan")
    optimizer.step()
    assert optimizer.check_finite() == {"1.weight": 1}


def test_an_optimizer_that_projects_nothing_says_so_once() -> None:
    params = weights()
    with pytest.warns(UserWarning, match="projects nothing"):
        optimizer = GaLoreAdamW(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, params, 2)
        GaLoreAdamW([{"params": weights(), "rank": 4}])


def test_flat_parameters_of_fsdp1_are_refused_as_such() -> None:
    flat = nn.Parameter(torch.zeros(64))
    flat._fsdp_flattened = True
    for projected in (True, False):
        with pytest.raises(OptionError, match="FSDP1"):
            GaLoreAdamW([{"params": [flat], "projected": projected}], GaLoreConfig(rank=4))


def test_expanded_weights_are_refused() -> None:
    p = nn.Parameter(torch.zeros(1, 8).expand(8, 8))
    with pytest.raises(OptionError, match="memory of its own"):
        GaLoreAdamW([{"params": [p], "rank": 4}])
