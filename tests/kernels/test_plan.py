"""A step that repeats the one before makes the same bits as one that looks everything up, whatever has changed."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from galore_trainer.config import GaLoreConfig
from galore_trainer.kernels.recording import Recording
from galore_trainer.optim import plan
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from galore_trainer.optim.ops_triton import TritonOps
from galore_trainer.optim.plan import Plan, Plans

PROJECTED, PLAIN = [(12, 8), (8, 12), (12, 8), (6, 10)], [(7,), (7,), (5, 3)]
STEPS, CHANGED = 7, 4  # the third step is the first that can repeat one; the change comes before this one


def make(residual: str, dtype: torch.dtype, device: torch.device, bits: Any = 32) -> GaLoreAdamW:
    generator = torch.Generator().manual_seed(0)
    shapes = [*PROJECTED, *PLAIN]
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]
    count = len(PROJECTED)
    groups = [
        {"params": params[:count], "names": [f"p{i}" for i in range(count)], "projected": True},
        {"params": params[count:], "names": [f"a{i}" for i in range(len(PLAIN))], "weight_decay": 0.1},
    ]
    percent = {"residual_percent": 0.0} if residual == "none" else {"residual": residual}
    config = GaLoreConfig(rank=3, update_proj_gap=100, kernels="triton", state_bits=bits, **percent)
    return GaLoreAdamW(groups, config, lr=1e-2)


def params_of(optimizer: GaLoreAdamW) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def give_gradients(optimizer: GaLoreAdamW, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params_of(optimizer):
        p.grad = torch.randn(p.shape, generator=generator).to(p)


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many gradients each repeated step took."""
    counts: list[int] = []
    move = Plan.move

    def counted(self: Plan, grads: Any, stopwatch: Any) -> Any:
        counts.append(len(grads))
        return move(self, grads, stopwatch)

    monkeypatch.setattr(Plan, "move", counted)
    return counts


def nothing(optimizer: GaLoreAdamW) -> None:
    pass


def no_gradient(optimizer: GaLoreAdamW) -> None:
    params_of(optimizer)[1].grad = None
    params_of(optimizer)[5].grad = None


def bad_gradients(optimizer: GaLoreAdamW) -> None:
    for i in (0, 4):
        params_of(optimizer)[i].grad.view(-1)[1] = float("inf")  # type: ignore[union-attr]


def strided_gradient(optimizer: GaLoreAdamW) -> None:
    grad: Any = params_of(optimizer)[0].grad
    params_of(optimizer)[0].grad = grad.t().contiguous().t()


def gradients_elsewhere(optimizer: GaLoreAdamW) -> None:
    optimizer.held = [p.grad for p in params_of(optimizer)]  # type: ignore[attr-defined]
    for p, grad in zip(params_of(optimizer), optimizer.held, strict=True):  # type: ignore[attr-defined]
        p.grad = torch.cat([grad.view(-1), grad.view(-1)])[grad.numel() :].view(grad.shape)
        grad.fill_(9.0)


def moved_weights(optimizer: GaLoreAdamW) -> None:
    for i in (2, 4):
        old = params_of(optimizer)[i].data
        params_of(optimizer)[i].data = old.clone()
        old.zero_()


def another_weight(optimizer: GaLoreAdamW) -> None:
    """A parameter in place of another, with the state of that one."""
    group = optimizer.param_groups[0]
    old = group["params"][0]
    group["params"][0] = nn.Parameter(old.detach().clone())
    group["params"][0].grad = old.grad
    optimizer.state[group["params"][0]] = optimizer.state.pop(old)


def state_elsewhere(optimizer: GaLoreAdamW) -> None:
    """What offloading does: the same tensors with other memory."""
    for p in params_of(optimizer):
        for value in optimizer.state[p].values():
            if isinstance(value, Tensor):
                old = value.data
                value.data = old.clone()
                old.zero_()


def other_tensors_in_the_state(optimizer: GaLoreAdamW) -> None:
    for i in (0, 4):
        state = optimizer.state[params_of(optimizer)[i]]
        old = state["exp_avg"]
        state["exp_avg"] = old.clone()
        old.zero_()


def another_mapping(optimizer: GaLoreAdamW) -> None:
    p = params_of(optimizer)[0]
    optimizer.state[p] = copy.deepcopy(optimizer.state[p])


def loaded(optimizer: GaLoreAdamW) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def other_settings(optimizer: GaLoreAdamW) -> None:
    optimizer.param_groups[0].update(lr=3e-3, weight_decay=0.2, betas=(0.8, 0.9), scale=0.7)
    optimizer.param_groups[1].update(lr=torch.tensor(2e-3), eps=1e-5)


def due(optimizer: GaLoreAdamW) -> None:
    optimizer.state[params_of(optimizer)[0]]["due"] = CHANGED


CHANGES: dict[Callable[[GaLoreAdamW], None], int] = {  # and how many of the steps repeat the one before
    nothing: 5,
    no_gradient: 2,
    bad_gradients: 5,
    strided_gradient: 3,
    gradients_elsewhere: 5,
    moved_weights: 3,
    another_weight: 3,
    state_elsewhere: 3,
    other_tensors_in_the_state: 3,
    another_mapping: 3,
    loaded: 3,
    other_settings: 5,
    due: 4,
}


def train(
    residual: str, change: Callable[[GaLoreAdamW], None], dtype: torch.dtype, device: torch.device, bits: int = 32
) -> GaLoreAdamW:
    optimizer = make(residual, dtype, device, bits)
    for step in range(STEPS):
        give_gradients(optimizer, step)
        if step == CHANGED:
            change(optimizer)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_same_bits(
    change: Callable[[GaLoreAdamW], None], device: torch.device, repeated: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    residual, dtype = ("scaled", torch.bfloat16) if len(change.__name__) % 2 else ("none", torch.float32)
    _compare(train(residual, change, dtype, device), lambda: train(residual, change, dtype, device), monkeypatch)
    assert len(repeated) == CHANGES[change]


@pytest.mark.parametrize("change", [nothing, bad_gradients, state_elsewhere, loaded, due], ids=lambda x: x.__name__)
@pytest.mark.parametrize("bits", [16, 8])
def test_the_same_bits_of_small_state(
    bits: int,
    change: Callable[[GaLoreAdamW], None],
    device: torch.device,
    repeated: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    residual = "none" if bits == 8 else "scaled"
    mine = train(residual, change, torch.bfloat16, device, bits)
    _compare(mine, lambda: train(residual, change, torch.bfloat16, device, bits), monkeypatch)
    assert len(repeated) == CHANGES[change]


def _compare(mine: GaLoreAdamW, again: Callable[[], GaLoreAdamW], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same steps without plans give the same bits."""
    monkeypatch.setattr(Plans, "_gradients", lambda *_: None)
    other = again()
    for a, b in zip(params_of(mine), params_of(other), strict=True):
        assert torch.equal(a, b)
        assert mine.state[a].keys() == other.state[b].keys()
        for key, value in mine.state[a].items():
            assert (
                torch.equal(value, other.state[b][key]) if isinstance(value, Tensor) else value == other.state[b][key]
            )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a recorded step launches no kernel by itself")
@pytest.mark.parametrize(("residual", "bits"), [("none", 32), ("scaled", 32), ("scaled", 8)])
def test_launches_hold_no_number_of_a_step(
    residual: str, bits: int, device: torch.device, monkeypatch: pytest.MonkeyPatch, repeated: list[int]
) -> None:
    """Else a recorded step would repeat the rates, ages or keys of the step that was recorded."""
    from triton.runtime.interpreter import InterpretedFunction

    launched: list[Any] = []
    get = InterpretedFunction.__getitem__

    def logged(self: Any, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> Any:
            numbers = [x for x in (*args, *options.values()) if not isinstance(x, Tensor)]
            launched.append((self.fn.__name__, grid, numbers))
            return get(self, grid)(*args, **options)

        return launch

    monkeypatch.setattr(InterpretedFunction, "__getitem__", logged)
    optimizer, of_steps = make(residual, torch.bfloat16, device, bits), []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group.update(lr=1e-2 / (step + 1), weight_decay=0.1 * step)
        give_gradients(optimizer, step)
        launched.clear()
        optimizer.step()
        of_steps.append(list(launched))
    assert len(repeated) == STEPS - 2
    assert of_steps[2]
    assert all(numbers == of_steps[2] for numbers in of_steps[3:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_repeated_steps_of_a_small_model_are_recorded(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, and again where a number that launches hold has changed."""
    made: list[Recording] = []

    def recorded(launch: Callable[[], Tensor]) -> Recording:
        made.append(Recording(launch))
        return made[-1]

    monkeypatch.setattr(plan, "Recording", recorded)
    train("scaled", nothing, torch.bfloat16, device)
    assert len(made) == 1
    train("none", other_settings, torch.float32, device)
    assert len(made) == 3  # the change comes after the first recorded step
    monkeypatch.setattr(plan, "is_small", lambda _: False)
    train("scaled", nothing, torch.bfloat16, device)
    assert len(made) == 3


def test_a_step_that_cannot_be_recorded_is_launched(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(launch: Callable[[], Tensor]) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(plan, "Recording", fails)
    mine, other = (make("scaled", torch.bfloat16, device) for _ in range(2))
    for optimizer in (mine, other):
        for step in range(STEPS):
            if optimizer is mine and optimizer._plans._plan is not None:
                optimizer._plans._plan._may_record |= step == CHANGED
            give_gradients(optimizer, step)
            optimizer.step()
    assert "no room" in caplog.text
    for a, b in zip(params_of(mine), params_of(other), strict=True):
        assert torch.equal(a, b)


def test_a_repeated_step_keeps_no_gradient(device: torch.device, repeated: list[int]) -> None:
    """Nor does anything wait for a garbage collection."""
    gc.collect()
    gc.disable()
    try:
        optimizer = train("scaled", nothing, torch.bfloat16, device)
        gradients = [weakref.ref(p.grad) for p in params_of(optimizer)]
        optimizer.zero_grad()
        assert repeated
        assert not any(gradient() is not None for gradient in gradients)
    finally:
        gc.enable()


def test_an_error_in_a_repeated_step_keeps_no_gradient(
    device: torch.device, repeated: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "is_small", lambda _: False)
    optimizer = train("scaled", nothing, torch.bfloat16, device)

    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError

    give_gradients(optimizer, STEPS)
    gradients = [weakref.ref(p.grad) for p in params_of(optimizer)]
    monkeypatch.setattr(TritonOps, "apply_", fails)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    assert not any(gradient() is not None for gradient in gradients)
