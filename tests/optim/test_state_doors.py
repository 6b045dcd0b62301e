"""Through every public door the state comes back as it was, or the load is refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from galore_trainer.config import GaLoreConfig
from galore_trainer.errors import OptionError
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from galore_trainer.optim.state_forms import COUNTERS

SAVE_AT, END = 4, 8


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.q = nn.Parameter(torch.randn(24, 16, generator=generator))
        self.mlp = nn.Parameter(torch.randn(16, 24, generator=generator))
        self.bias = nn.Parameter(torch.randn(16, generator=generator))


def make(percent: float = 0.0, **settings) -> tuple[Model, GaLoreAdamW]:
    model = Model()
    config = GaLoreConfig(rank=4, update_proj_gap=3, residual_percent=percent, residual_warmup_steps=2, **settings)
    groups = [
        {"params": [model.q, model.mlp], "names": ["q", "mlp"], "projected": True},
        {"params": [model.bias], "names": ["bias"]},
    ]
    return model, GaLoreAdamW(groups, config, lr=1e-2, weight_decay=0.1)


def train(model: Model, optimizer: GaLoreAdamW, steps: range) -> None:
    for step in steps:
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
        optimizer.step()
    optimizer.zero_grad()


def copied(model: Model) -> tuple[Model, GaLoreAdamW]:
    other, optimizer = make()
    other.load_state_dict(model.state_dict())
    return other, optimizer


def through_file(saved: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def by_file(model: Model, optimizer: GaLoreAdamW, folder: Path) -> tuple[Model, GaLoreAdamW]:
    other, resumed = copied(model)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    return other, resumed


def by_dcp(model: Model, optimizer: GaLoreAdamW, folder: Path) -> tuple[Model, GaLoreAdamW]:
    """Into an optimizer that has taken a step of its own, as its state dict has to hold what shall be loaded."""
    dcp.save(optimizer.state_dict(), checkpoint_id=folder)
    other, resumed = make()
    train(other, resumed, range(20, 21))
    other.load_state_dict(model.state_dict())
    saved = resumed.state_dict()
    dcp.load(saved, checkpoint_id=folder)
    resumed.load_state_dict(saved)
    return other, resumed


def by_names(flatten: bool, through_dcp: bool) -> Callable:
    def door(model: Model, optimizer: GaLoreAdamW, folder: Path) -> tuple[Model, GaLoreAdamW]:
        options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        saved = get_optimizer_state_dict(model, optimizer, options=options)
        other, resumed = copied(model)
        if through_dcp:
            dcp.save({"optimizer": saved}, checkpoint_id=folder)
            saved = get_optimizer_state_dict(other, resumed, options=options)
            dcp.load({"optimizer": saved}, checkpoint_id=folder)
        set_optimizer_state_dict(other, resumed, saved, options=options)
        return other, resumed

    return door


def by_deepcopy(model: Model, optimizer: GaLoreAdamW, folder: Path) -> tuple[Model, GaLoreAdamW]:
    return copy.deepcopy((model, optimizer))


def by_pickle(model: Model, optimizer: GaLoreAdamW, folder: Path) -> tuple[Model, GaLoreAdamW]:
    return pickle.loads(pickle.dumps((model, optimizer)))


def by_old_file(model: Model, optimizer: GaLoreAdamW, folder: Path) -> tuple[Model, GaLoreAdamW]:
    """As earlier versions wrote it: counters are integers, and nothing says how many steps there were."""
    saved = through_file(optimizer.state_dict())
    del saved["steps"]
    for state in saved["state"].values():
        state.update({key: int(value) for key, value in state.items() if key in COUNTERS})
    other, resumed = copied(model)
    resumed.load_state_dict(saved)
    return other, resumed


def by_float_steps(model: Model, optimizer: GaLoreAdamW, folder: Path) -> tuple[Model, GaLoreAdamW]:
    """Tools that write scalars as numbers."""
    saved = through_file(optimizer.state_dict())
    for state in saved["state"].values():
        state.update({key: float(value) for key, value in state.items() if key == "step" or key in COUNTERS})
    other, resumed = copied(model)
    resumed.load_state_dict(saved)
    return other, resumed


DOORS: dict[str, Callable] = {
    "file": by_file,
    "dcp": by_dcp,
    "names": by_names(False, False),
    "names by dcp": by_names(False, True),
    "flattened names": by_names(True, False),
    "flattened names by dcp": by_names(True, True),
    "deepcopy": by_deepcopy,
    "pickle": by_pickle,
    "file of an earlier version": by_old_file,
    "numbers for scalars": by_float_steps,
}


@pytest.mark.parametrize("door", DOORS)
def test_training_goes_on_bit_for_bit(door: str, tmp_path: Path) -> None:
    whole, straight = make()
    train(whole, straight, range(END))
    model, optimizer = make()
    train(model, optimizer, range(SAVE_AT))
    other, resumed = DOORS[door](model, optimizer, tmp_path)
    counters = {key: type(value) for key, value in resumed.state[other.q].items() if key in COUNTERS}
    assert counters == dict.fromkeys(COUNTERS, int)
    train(other, resumed, range(SAVE_AT, END))
    for name, p in other.named_parameters():
        assert torch.equal(p, whole.get_parameter(name)), name


def test_a_flattened_state_dict_that_loses_a_residual_is_refused() -> None:
    """torch restores the keys that a fresh optimizer has, and no others."""
    model, optimizer = make(10.0)
    train(model, optimizer, range(SAVE_AT))
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    other, resumed = make(10.0)
    with pytest.raises(OptionError, match="a state of q without residual_index"):
        set_optimizer_state_dict(other, resumed, saved, options=options)


def test_a_fresh_optimizer_filled_by_dcp_alone_is_refused(tmp_path: Path) -> None:
    """``dcp.load`` fills in what is there: of an optimizer without state, nothing but the groups."""
    model, optimizer = make()
    train(model, optimizer, range(SAVE_AT))
    dcp.save(optimizer.state_dict(), checkpoint_id=tmp_path)
    _, fresh = make()
    saved = fresh.state_dict()
    dcp.load(saved, checkpoint_id=tmp_path)
    with pytest.raises(OptionError, match="the states of 0 parameters out of 3, without q, mlp, bias"):
        fresh.load_state_dict(saved)


def test_counters_of_a_state_dict_are_cpu_tensors_of_their_own() -> None:
    model, optimizer = make()
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    for key in COUNTERS:
        value = saved["state"][0][key]
        assert (value.dtype, value.shape, value.device.type) == (torch.int64, (), "cpu")
        value += 7
        assert optimizer.state[model.q][key] == int(value) - 7


def test_hooks_see_and_change_what_is_saved_and_loaded() -> None:
    model, optimizer = make()
    train(model, optimizer, range(SAVE_AT))
    order: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: order.append("saving"))

    def saved_hook(_, saved: dict) -> dict:
        order.append("saved")
        return {**saved, "note": "mine"}

    optimizer.register_state_dict_post_hook(saved_hook)
    saved = optimizer.state_dict()
    assert saved["note"] == "mine"
    wrapped = {"optimizer of another tool": {k: v for k, v in saved.items() if k != "note"}}
    other, resumed = copied(model)

    def unwrap(_, foreign: dict) -> dict:
        order.append("loading")
        return foreign["optimizer of another tool"]

    resumed.register_load_state_dict_pre_hook(unwrap)
    resumed.register_load_state_dict_post_hook(lambda _: order.append("loaded"))
    resumed.load_state_dict(wrapped)
    assert order == ["saving", "saved", "loading", "loaded"]
    train(model, optimizer, range(SAVE_AT, END))
    train(other, resumed, range(SAVE_AT, END))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def spoil_key(saved: dict) -> None:
    saved["state"][0]["exp_avg_max"] = saved["state"][0]["exp_avg"]


def spoil_missing(saved: dict) -> None:
    del saved["state"][1]["exp_avg_sq"]


def spoil_shape(saved: dict) -> None:
    saved["state"][0]["exp_avg"] = torch.zeros(1, 30, 4)


def spoil_plain_shape(saved: dict) -> None:
    saved["state"][2]["exp_avg"] = torch.zeros(20)


def spoil_dtype(saved: dict) -> None:
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"].to(torch.uint8)


def spoil_number(saved: dict) -> None:
    saved["state"][9] = saved["state"].pop(0)


def spoil_weight(saved: dict) -> None:
    saved["param_groups"][0]["matrices"][1][0]["columns"] = 30


def spoil_heads(saved: dict) -> None:
    saved["param_groups"][0]["matrices"][0][0]["head_dim"] = 8


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_key, "exp_avg_max in the state of q"),
        (spoil_missing, "a state of mlp without exp_avg_sq"),
        (spoil_shape, r"q: exp_avg of shape \[1, 30, 4\].*\[1, 24, 4\].*\[24, 16\]"),
        (spoil_plain_shape, r"bias: exp_avg of shape \[20\].*\[16\]"),
        (spoil_dtype, "q: exp_avg in torch.uint8"),
        (spoil_number, "states of"),
        (spoil_weight, "heads of mlp: got '16 x 24.*16 x 30.*as in the checkpoint"),
        (spoil_heads, "heads of q: got '24 x 16, no heads.*3 heads of 8 rows"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_name(spoil: Callable, said: str) -> None:
    model, optimizer = make()
    train(model, optimizer, range(2))
    saved = through_file(optimizer.state_dict())
    spoil(saved)
    other, resumed = make()
    with pytest.raises(OptionError, match=said):
        resumed.load_state_dict(saved)
    assert not resumed.state[other.q]


@pytest.mark.parametrize(
    "foreign", [None, [], {}, {"state": {}}, {"state": {}, "param_groups": [{"params": [0, 1, 2]}]}]
)
def test_foreign_formats_are_refused(foreign: object) -> None:
    with pytest.raises(OptionError, match="GaLoreAdamW"):
        make()[1].load_state_dict(foreign)
