"""What PyTorch tests of the state of each of its optimizers, of ``GaLoreAdamW`` in three forms.

What does not apply of PyTorch's tests:

- states on other devices and ``capturable`` states: they need GPUs.
- a state under other parameter names: refused, since names seed the random streams.
- a state of another optimizer, or under keys that are no parameters: refused by name, in test_state_doors.py.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from galore_trainer.config import GaLoreConfig
from galore_trainer.errors import OptionError
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from torch_optimizers import FORMS, every_form, group_by_form, make, quietly, same, train, weights


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


WAYS: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda state: state,
    "deepcopy": copy.deepcopy,
    "file": through_a_file,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
}


def clones(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


# ------------------------------------------------------------------------------------------ save and load


@every_form
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stop", [0, 1, 2, 4])
def test_a_loaded_state_goes_on_bit_for_bit(stop: int, way: str, form: str) -> None:
    params = weights()
    optimizer = make(form, params, weight_decay=0.1)
    train(params, optimizer, range(stop))
    assert len(optimizer.state) == (3 if stop else 0)
    others = clones(params)
    other = make(form, others, lr=1.0)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    other.load_state_dict(WAYS[way](saved))
    assert same(saved, kept)
    assert repr(other) == repr(optimizer)
    train(others, other, range(stop, stop + 5))
    assert same(saved, kept), "the loaded optimizer writes into what it was loaded from"
    train(params, optimizer, range(stop, stop + 5))
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    assert same(optimizer.state_dict(), other.state_dict())


@every_form
def test_a_state_replaces_the_one_before(form: str) -> None:
    params, others = weights(), weights()
    optimizer, other = make(form, params), make(form, others)
    train(params, optimizer, range(2))
    train(others, other, range(10, 15))
    other.load_state_dict(optimizer.state_dict())
    assert same(optimizer.state_dict(), other.state_dict())
    other.load_state_dict(make(form, weights()).state_dict())
    assert not other.state_dict()["state"]


@every_form
def test_a_state_of_an_earlier_version_lacks_settings(form: str) -> None:
    params = weights()
    config = GaLoreConfig(**{k: v for k, v in FORMS[form].to_dict().items() if k != "update_proj_gap"})
    optimizer = make(form, params, config=config)
    train(params, optimizer, range(4))
    saved = optimizer.state_dict()
    defaults = GaLoreConfig().to_dict()
    for group in saved["param_groups"]:
        if "galore" in group:
            group["galore"] = {k: v for k, v in group["galore"].items() if k not in defaults or v != defaults[k]}
    others = clones(params)
    other = make(form, others, config=config)
    other.load_state_dict(saved)
    for one in (params, optimizer), (others, other):
        train(*one, range(4, 8))
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@every_form
def test_a_step_that_is_a_number_counts_on(form: str) -> None:
    params = weights()
    optimizer = make(form, params)
    train(params, optimizer, range(4))
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state.update({key: value.item() for key, value in state.items() if key.endswith("step")})
    others = clones(params)
    other = make(form, others)
    other.load_state_dict(saved)
    for one in (params, optimizer), (others, other):
        train(*one, range(4, 8))
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_state_of_float32_weights_serves_narrower_ones_unchanged(dtype: torch.dtype, form: str) -> None:
    params = weights()
    optimizer = make(form, params)
    train(params, optimizer, range(4))
    others = weights(dtype)
    other = make(form, others)
    other.load_state_dict(optimizer.state_dict())
    assert same(optimizer.state_dict(), other.state_dict())
    before = [p.detach().clone() for p in others]
    train(others, other, range(4, 6))
    assert all(p.isfinite().all() and not torch.equal(p, w) for p, w in zip(others, before, strict=True))


@every_form
def test_scheduled_settings_are_part_of_a_state(form: str) -> None:
    params = weights()
    optimizer = make(form, params)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=9)
    others = weights()
    other = make(form, others)
    again = torch.optim.lr_scheduler.OneCycleLR(other, 1e-2, total_steps=9)
    for step in range(4):
        train(params, optimizer, [step])
        scheduler.step()
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    again.load_state_dict(scheduler.state_dict())
    for step in range(4, 8):
        for one, o, s in ((params, optimizer, scheduler), (others, other, again)):
            train(one, o, [step])
            s.step()
    assert same(optimizer.state_dict(), other.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@every_form
def test_names_of_parameters_are_kept(form: str) -> None:
    names = ("first", "second", "third")
    params = weights()
    optimizer = make(form, zip(names, params, strict=True))
    train(params, optimizer, range(2))
    saved = through_a_file(optimizer.state_dict())
    assert [name for group in saved["param_groups"] for name in group["param_names"]] == list(names)
    others = clones(params)
    other = make(form, zip(names, others, strict=True))
    other.load_state_dict(saved)
    assert repr(other) == repr(optimizer)
    renamed = make(form, zip("abc", weights(), strict=True))
    with pytest.raises(OptionError, match="first"):
        renamed.load_state_dict(saved)


@every_form
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(form: str) -> None:
    params = weights()
    optimizer = make(form, params)
    train(params, optimizer, range(3))
    good, before = optimizer.state_dict(), copy.deepcopy(optimizer.state_dict())
    extra = quietly([*group_by_form(form, weights()), {"params": weights()[:1]}], FORMS[form]).state_dict()
    fewer = make(form, weights()[1:]).state_dict()
    wider = copy.deepcopy(good)
    wider["state"][0]["exp_avg"] = torch.zeros(9, 9)
    for bad in (extra, fewer, wider):
        with pytest.raises(ValueError):  # noqa: PT011
            optimizer.load_state_dict(bad)
        assert same(optimizer.state_dict(), before)


# ------------------------------------------------------------------------------------------ hooks


@every_form
def test_hooks_around_saving(form: str) -> None:
    params, seen = weights(), []
    optimizer = make(form, params)
    train(params, optimizer, [0])

    def before(opt: Any) -> None:
        seen.append("before")
        opt.param_groups[0]["lr"] = 0.5

    def in_place(opt: Any, state: Any) -> None:
        seen.append("in place")
        state["more"] = 1

    def returned(opt: Any, state: Any) -> Any:
        seen.append("returned")
        return {**state, "last": "more" in state}

    handles = [
        optimizer.register_state_dict_post_hook(returned),
        optimizer.register_state_dict_post_hook(in_place, prepend=True),
        optimizer.register_state_dict_pre_hook(before),
        optimizer.register_state_dict_pre_hook(lambda opt: seen.append("first"), prepend=True),
    ]
    saved = optimizer.state_dict()
    assert seen == ["first", "before", "in place", "returned"]
    assert saved["param_groups"][0]["lr"] == 0.5
    assert saved["more"] == 1
    assert saved["last"]
    for handle in handles:
        handle.remove()
    assert optimizer.state_dict().keys().isdisjoint({"more", "last"})


@every_form
def test_hooks_around_loading(form: str) -> None:
    params, others = weights(), weights()
    optimizer, other = make(form, params), make(form, others)
    train(params, optimizer, range(3))
    seen: list[str] = []

    def renamed(opt: Any, state: Any) -> Any:
        seen.append("returned")
        return {"state": state["states"], "param_groups": state["param_groups"]}

    def in_place(opt: Any, state: Any) -> None:
        seen.append("in place")
        state["states"] = state.pop("momenta")

    handles = [
        other.register_load_state_dict_pre_hook(renamed),
        other.register_load_state_dict_pre_hook(in_place, prepend=True),
        other.register_load_state_dict_post_hook(lambda opt: seen.append(f"after {len(opt.state)}")),
        other.register_load_state_dict_post_hook(lambda opt: seen.append("first"), prepend=True),
    ]
    saved = optimizer.state_dict()
    foreign = {"momenta": saved["state"], "param_groups": saved["param_groups"]}
    other.load_state_dict(foreign)
    assert seen == ["in place", "returned", "first", "after 3"]
    assert foreign.keys() == {"momenta", "param_groups"}, "a hook that changes its argument gets a copy"
    assert same(optimizer.state_dict(), other.state_dict())
    for handle in handles:
        handle.remove()
    other.load_state_dict(saved)
    assert len(seen) == 4


# ------------------------------------------------------------------------------------------ copies


@every_form
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("steps", [0, 2, 4])
def test_a_copy_goes_on_by_itself(steps: int, way: str, form: str) -> None:
    params = weights()
    optimizer = make(form, params, weight_decay=0.1)
    train(params, optimizer, range(steps))
    other: GaLoreAdamW = WAYS[way](optimizer)
    others = [p for group in other.param_groups for p in group["params"]]
    assert same(optimizer.state_dict(), other.state_dict())

    def public(x: Any) -> set[str]:
        return {name for name in dir(x) if not name.startswith("_")}

    assert public(other) == public(optimizer)
    train(others, other, range(steps, steps + 4))
    before = weights()
    train(before, make(form, before, weight_decay=0.1), range(steps))
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    train(params, optimizer, range(steps, steps + 4))
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    assert same(optimizer.state_dict(), other.state_dict())
    other.add_param_group({"params": weights()[2:], "names": ["another"]})
    other.register_step_post_hook(lambda opt, args, kwargs: None)
    other.step()


@every_form
def test_a_state_holds_tensors_and_numbers(form: str) -> None:
    params = weights()
    optimizer = make(form, params)
    train(params, optimizer, range(2))
    for state in optimizer.state_dict()["state"].values():
        assert state
        assert all(isinstance(value, torch.Tensor | int | float) for value in state.values())
