"""What PyTorch tests of each of its optimizers, of ``GaLoreAdamW`` in three forms.

Groups and hooks are in ``test_torch_groups.py``, states in ``test_torch_states.py``.

What does not apply of PyTorch's tests:

- ``amsgrad``, ``maximize``, ``foreach``, ``fused``, ``capturable``, ``differentiable``: the constructor takes none of
  them and says so; so there are no two implementations to compare, no CUDA graph and no backward through a step.
- complex parameters and sparse gradients: refused by name.
- a mix of tensors and numbers as betas: it is taken, not refused.
- peak memory and several devices: they need GPUs.
- a step under torch.compile: in test_compile.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from galore_trainer.errors import OptionError
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from torch_optimizers import FORMS, REFERENCE, every_form, group_by_form, make, quietly, torch_inputs, train, weights

ADAMW = next(info for info in torch_inputs().optim_db if info.optim_cls is torch.optim.AdamW)
FOREIGN = ("amsgrad", "maximize", "foreach", "fused", "capturable", "differentiable")


def errors() -> list[Any]:
    """PyTorch's inputs that AdamW refuses, but for those that are refused for an option that is not taken here."""
    found = []
    for error in ADAMW.optim_error_inputs_func("cpu", torch.float32):
        kwargs = error.optimizer_error_input.kwargs
        mixed = any(isinstance(beta, torch.Tensor) for beta in kwargs.get("betas", ()))
        if not mixed and not any(key in FOREIGN for key in kwargs):
            found.append(error)
    return found


# ------------------------------------------------------------------------------------------ construction


@every_form
@pytest.mark.parametrize("given", ADAMW.optim_inputs_func(device="cpu"), ids=lambda given: given.desc)
def test_options_are_those_of_adamw_or_refused(given: Any, form: str) -> None:
    params, options = weights(), dict(given.kwargs)
    foreign = [key for key in options if key in FOREIGN]
    if foreign:
        with pytest.raises(TypeError, match=foreign[0]):
            make(form, params, **options)
        return
    others = weights()
    train(params, make(form, params, **options), range(5))
    train(others, REFERENCE(others, **options), range(5))
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        if form == "plain" or i == 2:
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert not torch.equal(p, weights()[i])


@every_form
@pytest.mark.parametrize("option", FOREIGN)
def test_options_of_other_optimizers_are_refused_in_a_group_too(option: str, form: str) -> None:
    with pytest.raises(TypeError, match=option):
        make(form, weights(), **{option: True})
    optimizer = make(form, weights())
    with pytest.raises(OptionError, match=option):
        optimizer.add_param_group({"params": weights(), option: True})
    assert len(optimizer.param_groups) == (1 if form == "plain" else 2)


@every_form
@pytest.mark.filterwarnings("ignore:.*projects nothing")
@pytest.mark.parametrize("error", errors(), ids=lambda error: error.optimizer_error_input.desc)
def test_impossible_inputs_are_refused(error: Any, form: str) -> None:
    given = error.optimizer_error_input
    params = weights() if given.params is None else given.params
    option = next((key for key in ("betas", "weight_decay", "lr") if key in given.kwargs), None)
    catch = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    with catch(error.error_type, match=option or error.error_regex):  # options are refused in our words, by their names
        GaLoreAdamW(params, FORMS[form], **given.kwargs)


@every_form
def test_a_group_that_is_refused_is_not_added(form: str) -> None:
    params = weights()
    optimizer = make(form, params)
    count, leaf = len(optimizer.param_groups), weights()[0]
    for group, error in (
        ([leaf], TypeError),
        ({"params": set(weights())}, TypeError),
        ({"params": ["a"]}, TypeError),
        ({"params": [leaf * 2.0]}, ValueError),
        ({"params": [params[0]]}, ValueError),
        ({"params": [leaf], "lr": -1.0}, ValueError),
        ({"params": [leaf], "lr": torch.tensor([1.0, 2.0])}, ValueError),
    ):
        with pytest.raises(error):
            optimizer.add_param_group(group)  # type: ignore[arg-type]
        assert len(optimizer.param_groups) == count
    with pytest.raises(ValueError, match="empty parameter list"):
        GaLoreAdamW([], FORMS[form])


@every_form
@pytest.mark.parametrize("shape", [(4,), (4, 4)])
def test_a_parameter_that_was_put_into_a_group_is_refused(shape: tuple[int, ...], form: str) -> None:
    params, more = weights(), Parameter(torch.ones(shape))
    optimizer = make(form, params)
    train(params, optimizer, [0])
    optimizer.param_groups[0 if len(shape) == 2 else -1]["params"].append(more)
    with pytest.raises(OptionError, match="add_param_group"):
        train([*params, more], optimizer, [1])


@every_form
def test_complex_parameters_are_refused_by_name(form: str) -> None:
    for p in (torch.zeros(4, 4, dtype=torch.complex64), torch.zeros((), dtype=torch.complex128)):
        with pytest.raises(OptionError, match=r"wave.*complex"):
            make(form, [("wave", Parameter(p))])
    optimizer = make(form, weights())
    with pytest.raises(OptionError, match="complex"):
        optimizer.add_param_group({"params": [Parameter(torch.zeros(3, dtype=torch.complex64))]})


@every_form
def test_named_parameters_train_as_unnamed_ones(form: str) -> None:
    params, others = weights(), weights()
    names = {"first.weight": 0, "second.weight": 1, "second.bias": 2}
    optimizer = make(form, [(name, params[i]) for name, i in names.items()])
    assert [name for group in optimizer.param_groups for name in group["param_names"]] == list(names)
    groups = group_by_form(form, others)
    for group, by_name in zip(groups, optimizer.param_groups, strict=True):
        group["names"] = by_name["param_names"]  # they seed the random streams of what is projected
    train(params, optimizer, range(5))
    train(others, quietly(groups, FORMS[form], lr=1e-2), range(5))
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@every_form
def test_it_can_be_printed(form: str) -> None:
    text = repr(make(form, weights(), lr=0.125))
    assert text.startswith("GaLoreAdamW (")
    assert "lr: 0.125" in text
    assert ("projected: True" in text) == (form != "plain")


# ------------------------------------------------------------------------------------------ steps


def layouts() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Ways to lay out equal numbers in memory."""
    return {
        "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else torch.stack([x, x], dim=-1)[..., 0],
        "sliced": lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],
        "strided": lambda x: torch.stack([x, -x], dim=-1)[..., 0],
    }


@every_form
@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("schedule", ADAMW.scheduler_inputs[0], ids=["StepLR", "ReduceLROnPlateau"])
def test_it_goes_in_the_right_direction(schedule: Any, layout: str, form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (10, 5), "bias": (10,), "input": (5,)}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weight, bias = (Parameter(layouts()[layout](drawn[name])) for name in ("weight", "bias"))
    assert not weight.is_contiguous()
    optimizer = make(form, [weight, bias])
    scheduler = schedule(optimizer)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = (weight @ drawn["input"] + bias).square().sum()
        value.backward()
        weight.grad = layouts()[layout](weight.grad)  # type: ignore[arg-type]
        return value

    first = loss().item()
    for _ in range(20):
        last = optimizer.step(loss).item()
        scheduler.step(last) if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else scheduler.step()
    assert last < 0.9 * first


@every_form
@pytest.mark.parametrize("of", ["weight", "gradient", "both"])
@pytest.mark.parametrize("layout", layouts())
def test_layouts_in_memory_change_nothing(layout: str, of: str, form: str) -> None:
    params, others = weights(), weights()
    if of != "gradient":
        others = [Parameter(layouts()[layout](p.detach())) for p in others]
    optimizer, other = make(form, params), make(form, others)
    for step in range(5):
        train(params, optimizer, [step])
        for p, q in zip(params, others, strict=True):
            assert p.grad is not None
            q.grad = layouts()[layout](p.grad) if of != "weight" else p.grad
        other.step()
    for p, q in zip(params, others, strict=True):
        # products of another layout may add up in another order
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6)
        assert form != "plain" or torch.equal(p, q)


@every_form
def test_without_gradients_nothing_happens(form: str) -> None:
    params = weights()
    optimizer = make(form, params, weight_decay=0.1)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, weights(), strict=True))
    assert not any(optimizer.state.values())
    train(params[:1], optimizer, range(3))
    assert all(torch.equal(p, q) for p, q in zip(params[1:], weights()[1:], strict=True))
    assert not torch.equal(params[0], weights()[0])


@every_form
def test_gradients_of_zero_move_nothing(form: str) -> None:
    params = weights()
    optimizer = make(form, params)
    for p in params:
        p.grad = torch.zeros_like(p)
    for _ in range(4):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, weights(), strict=True))
    train(params, optimizer, range(3))
    assert not any(torch.equal(p, q) for p, q in zip(params, weights(), strict=True))


@every_form
def test_sparse_gradients_are_refused_by_name(form: str) -> None:
    for which in (0, 2):
        params = weights()
        optimizer = make(form, zip(("first", "second", "third"), params, strict=True))
        params[which].grad = torch.ones_like(params[which]).to_sparse()
        with pytest.raises(OptionError, match=("first", "second", "third")[which]):
            optimizer.step()


@every_form
def test_dtypes_side_by_side_move_as_they_do_alone(form: str) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    together = {f"{dtype}.{i}": p for dtype in dtypes for i, p in enumerate(weights(dtype))}
    groups = group_by_form(form, together.items())
    optimizer = quietly(groups, FORMS[form], lr=1e-2, eps=1e-4, weight_decay=0.1)
    train(list(together.values())[::-1], optimizer, range(5))
    for dtype in dtypes:
        alone = {f"{dtype}.{i}": p for i, p in enumerate(weights(dtype))}
        single = quietly(group_by_form(form, alone.items()), FORMS[form], lr=1e-2, eps=1e-4, weight_decay=0.1)
        for step in range(5):
            generator = torch.Generator().manual_seed(100 + step)
            for name, p in reversed(together.items()):
                grad = torch.randn(p.shape, generator=generator).to(p.dtype)
                if name in alone:
                    alone[name].grad = grad
            single.step()
        assert all(torch.equal(p, together[name]) for name, p in alone.items()), dtype


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (1, 1), (2, 1, 3, 2)])
def test_any_shape_is_plain(shape: tuple[int, ...]) -> None:
    params, others = ([Parameter(torch.ones(shape)), Parameter(torch.ones(2))] for _ in range(2))
    train(params, make("plain", params, weight_decay=0.1), range(4))
    train(others, REFERENCE(others, weight_decay=0.1), range(4))
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", ["projected", "residual"])
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3,), (1, 1), (4, 1)])
def test_what_has_no_such_rank_is_refused_by_name(shape: tuple[int, ...], form: str) -> None:
    with pytest.raises(OptionError, match="odd"):
        quietly([{"params": [("odd", Parameter(torch.ones(shape)))], "projected": True}], FORMS[form])
