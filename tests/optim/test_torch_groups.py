"""What PyTorch tests of the groups, learning rates and hooks of each of its optimizers, of ``GaLoreAdamW``.

``test_torch_properties.py`` says what does not apply.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as schedulers
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from torch_optimizers import FORMS, REFERENCE, every_form, group_by_form, make, quietly, train, weights


@every_form
def test_groups_move_as_optimizers_of_their_own(form: str) -> None:
    options = [
        {"lr": 1e-2, "weight_decay": 0.1},
        {"lr": 3e-3, "betas": (0.7, 0.9), "eps": 1e-4},
        {"lr": 5e-3, "betas": (0.0, 0.99)},
    ]
    sets = [{f"{i}.{j}": p for j, p in enumerate(weights())} for i in range(3)]
    alone = [{f"{i}.{j}": p for j, p in enumerate(weights())} for i in range(3)]
    groups = [{**g, **own} for own, s in zip(options, sets, strict=True) for g in group_by_form(form, s.items())]
    first = [group for group in groups if not group["params"][0][0].startswith("2")]
    optimizer = quietly(first, FORMS[form])
    singles = [
        quietly(group_by_form(form, s.items()), FORMS[form], **own) for own, s in zip(options, alone, strict=True)
    ]
    for step in range(6):
        if step == 2:  # one that comes later
            for group in groups[len(first) :]:
                optimizer.add_param_group(group)
        for single, own, shared in zip(singles, alone, sets, strict=True):
            if step < 2 and single is singles[2]:
                continue
            train(list(own.values()), single, [step])
            for name, p in own.items():
                shared[name].grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
    for shared, own in zip(sets, alone, strict=True):
        assert all(torch.equal(p, own[name]) for name, p in shared.items())


@every_form
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_is_a_learning_rate(shape: tuple[int, ...], form: str) -> None:
    params, others = weights(), weights()
    rate = torch.full(shape, 1e-2)
    optimizer, other = make(form, params, lr=rate), make(form, others, lr=rate.item())
    scheduler, same = (schedulers.ExponentialLR(x, 0.5) for x in (optimizer, other))
    for step in range(5):
        train(params, optimizer, [step])
        train(others, other, [step])
        scheduler.step()
        same.step()
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)  # the tensor's rate is rounded to float32


@every_form
def test_tensors_are_betas(form: str) -> None:
    params, others = weights(), weights()
    train(params, make(form, params, betas=(torch.tensor([0.5]), 0.99)), range(5))
    train(others, make(form, others, betas=(0.5, 0.99)), range(5))
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda opt: schedulers.LambdaLR(opt, lambda step: 0.9**step),
    "MultiplicativeLR": lambda opt: schedulers.MultiplicativeLR(opt, lambda step: 0.9),
    "StepLR": lambda opt: schedulers.StepLR(opt, 2),
    "MultiStepLR": lambda opt: schedulers.MultiStepLR(opt, [1, 3]),
    "ConstantLR": lambda opt: schedulers.ConstantLR(opt, total_iters=2),
    "LinearLR": lambda opt: schedulers.LinearLR(opt, total_iters=3),
    "ExponentialLR": lambda opt: schedulers.ExponentialLR(opt, 0.9),
    "PolynomialLR": lambda opt: schedulers.PolynomialLR(opt, 4),
    "CosineAnnealingLR": lambda opt: schedulers.CosineAnnealingLR(opt, 3),
    "CosineAnnealingWarmRestarts": lambda opt: schedulers.CosineAnnealingWarmRestarts(opt, 2),
    "CyclicLR": lambda opt: schedulers.CyclicLR(opt, 1e-3, 1e-2, 2),  # moves the first beta too, as the next does
    "OneCycleLR": lambda opt: schedulers.OneCycleLR(opt, 1e-2, total_steps=7),
    "ReduceLROnPlateau": lambda opt: schedulers.ReduceLROnPlateau(opt, patience=0),
    "SequentialLR": lambda opt: schedulers.SequentialLR(
        opt, [schedulers.ConstantLR(opt), schedulers.ExponentialLR(opt, 0.9)], [2]
    ),
    "ChainedScheduler": lambda opt: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(opt), schedulers.ExponentialLR(opt, 0.9)]
    ),
    "SWALR": lambda opt: torch.optim.swa_utils.SWALR(opt, 1e-3),
}


@every_form
@pytest.mark.filterwarnings("error:.*before `optimizer.step")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_set_what_the_next_step_uses(schedule: str, form: str) -> None:
    params, others, third = weights(), weights(), weights()
    optimizer, by_hand = make(form, params), make(form, others)
    adamw = REFERENCE(third)
    both, used = (SCHEDULES[schedule](optimizer), SCHEDULES[schedule](adamw)), set()
    for step in range(5):
        used.add(adamw.param_groups[0]["lr"])
        for group in by_hand.param_groups:
            group.update({key: adamw.param_groups[0][key] for key in ("lr", "betas")})
        train(others, by_hand, [step])
        train(params, optimizer, [step])
        train(third, adamw, [step])
        for scheduler in both:
            scheduler.step(1.0) if schedule == "ReduceLROnPlateau" else scheduler.step()
    assert len(used) > 1
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    torch.testing.assert_close(params if form == "plain" else params[2], third if form == "plain" else third[2])


# ------------------------------------------------------------------------------------------ around a step


@every_form
def test_step_hooks_run_around_a_step_in_their_order(form: str) -> None:
    params, seen = weights(), []
    optimizer = make(form, params)

    def note(word: str) -> Callable[..., None]:
        return lambda opt, args, kwargs: seen.append((word, torch.equal(params[0], weights()[0])))

    handles = [
        optimizer.register_step_post_hook(note("after")),
        optimizer.register_step_pre_hook(note("before")),
        register_optimizer_step_pre_hook(note("before all")),
        register_optimizer_step_post_hook(note("after all")),
    ]
    train(params, optimizer, [0])
    assert seen == [("before all", True), ("before", True), ("after", False), ("after all", False)]
    for handle in handles:
        handle.remove()
    train(params, optimizer, [1])
    assert len(seen) == 4
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: 7.0), {}))
    assert optimizer.step() == 7.0


@every_form
def test_a_closure_runs_once_with_gradients_on(form: str) -> None:
    params, enabled = weights(), []
    optimizer = make(form, params)

    def closure() -> torch.Tensor:
        enabled.append(torch.is_grad_enabled())
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() > 0.0
    assert enabled == [True]
    assert optimizer.step() is None


@every_form
@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_clears_gradients(to_none: bool, form: str) -> None:
    params = weights()
    optimizer = make(form, params)
    train(params, optimizer, [0])
    optimizer.zero_grad(set_to_none=to_none)
    assert all(p.grad is None if to_none else not p.grad.any() for p in params)  # type: ignore[union-attr]
    moved = [p.detach().clone() for p in params]
    optimizer.step()  # momentum goes on where a gradient is zero
    assert all(torch.equal(p, before) == to_none for p, before in zip(params, moved, strict=True))


@every_form
def test_a_frozen_parameter_stays(form: str) -> None:
    params, others = weights(), weights()
    params[0].requires_grad_(False)
    optimizer, other = make(form, params), make(form, others)
    train(params[1:], optimizer, range(4))
    train(others[1:], other, range(4))
    assert torch.equal(params[0], weights()[0])
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@every_form
def test_the_profiler_names_a_step(form: str) -> None:
    params = weights()
    optimizer = make(form, params)
    with torch.autograd.profiler.profile() as profile:
        train(params, optimizer, [0])
        optimizer.zero_grad()
    names = {event.name for event in profile.function_events}
    assert names >= {"Optimizer.step#GaLoreAdamW.step", "Optimizer.zero_grad#GaLoreAdamW.zero_grad"}


@every_form
def test_a_gradient_scaler_leaves_out_a_step_that_overflowed(form: str) -> None:
    params, others = weights(), weights()
    optimizer, other = make(form, params), make(form, others)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(5):
        generator = torch.Generator().manual_seed(100 + step)
        scaler.scale(torch.ones(()))
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator) * scaler.get_scale()
        if step == 2:
            params[0].grad[0, 0] = float("inf")  # type: ignore[index]
        else:
            train(others, other, [step])
        scaler.step(optimizer)
        scaler.update()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
