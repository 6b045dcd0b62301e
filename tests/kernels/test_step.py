"""The optimizer with kernels against the optimizer without: three refreshes, everything a weight can be."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.matrix import LogicalMatrix
from galore_trainer.errors import OptionError
from galore_trainer.optim import refresh
from galore_trainer.optim import step as steps
from galore_trainer.optim.bucket import Bucket
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from galore_trainer.optim.ops_triton import TritonOps

STEPS, GAP, BAD_STEP = 8, 3, 5
SETTINGS: dict[str, Any] = {
    "rank": 5,
    "update_proj_gap": GAP,
    "residual_percent": 6.0,
    "residual_warmup_steps": 2,
    "scale": 2.0,
    "stochastic_rounding": False,
}
SHAPES = [(40, 24), (24, 40), (40, 24), (17, 33)]


@pytest.fixture(autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotations of eigenvectors take most of an interpreted step: one case has them, the others the library's."""
    if "[residual]" not in request.node.name:
        monkeypatch.setattr(refresh, "LIBRARY", 0)


def weights(device: torch.device, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator) for shape in [*SHAPES, (48, 20), (20, 36)]]
    return [torch.nn.Parameter(x.to(device, dtype)) for x in drawn]


def matrices() -> list[list[LogicalMatrix]]:
    """Tall, wide and odd weights; one of heads; GPT-2's fused q, k, v, transposed."""
    sides = [("right", 40, 24), ("left", 24, 40), ("right", 40, 24), ("left", 17, 33)]
    whole = [[LogicalMatrix(length=m, columns=n, side=side, rank=5)] for side, m, n in sides]  # type: ignore[arg-type]
    heads = LogicalMatrix(length=48, columns=20, rank=5, blocks=4, head_dim=6, lenders=1)
    fused = [
        LogicalMatrix(label=label, start=12 * i, length=12, columns=20, rank=5, transposed=True)
        for i, label in enumerate("qkv")
    ]
    return [*whole, [heads], fused]


def train(
    kernels: str, device: torch.device, dtype: torch.dtype = torch.float32, steps: int = STEPS, **settings: Any
) -> tuple[list[torch.nn.Parameter], GaLoreAdamW]:
    """Some steps on given gradients; one entry of the first weight's is not a number in one of them."""
    params = weights(device, dtype)
    group = {"params": params, "projected": True, "matrices": matrices(), "names": list("abcdef")}
    optimizer = GaLoreAdamW(
        [group], GaLoreConfig(**{**SETTINGS, **settings}, kernels=kernels), lr=1e-2, weight_decay=0.1
    )
    for step in range(steps):
        give_gradients(params, step)
        optimizer.step()
    return params, optimizer


def give_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator)
        if step == BAD_STEP and i in (0, 5):
            grad[3, 4] = float("nan")
        p.grad = None
        if getattr(p, "_post_accumulate_grad_hooks", None):
            (p * grad.to(p)).sum().backward()
        else:
            p.grad = grad.to(p)


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many matrices each call of the kernels moved."""
    sizes: list[int] = []
    step_buckets = steps.step_buckets

    def counted(buckets: Any, ops: Any, config: Any) -> Any:
        if isinstance(ops, TritonOps):
            sizes.extend(len(bucket.pieces) for bucket in buckets)
        return step_buckets(buckets, ops, config)

    monkeypatch.setattr(steps, "step_buckets", counted)
    return sizes


def assert_same(mine: GaLoreAdamW, other: GaLoreAdamW, atol: float) -> None:
    """Weights, and every tensor of the state; the signs of a basis are arbitrary, and its moments take them."""
    for a, b in zip(mine.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)
        assert mine.state[a].keys() == other.state[b].keys()
        for key, value in mine.state[a].items():
            if isinstance(value, torch.Tensor) and value.dtype == torch.float32 and "_scale" not in key:
                right = other.state[b][key]
                if key.endswith(("basis", "exp_avg")) and "residual" not in key:
                    value, right = value.abs(), right.abs()
                torch.testing.assert_close(value, right, rtol=1e-3, atol=1e-4, msg=key)
            elif "skipped" in key or isinstance(value, int):
                assert (value == other.state[b][key]) if isinstance(value, int) else value.equal(other.state[b][key])


CASES: dict[str, dict[str, Any]] = {
    "residual": {},
    "no residual, staggered": {"residual_percent": 0.0, "stagger_refresh": True},
    "layer-wise": {"layerwise": True},
    "global residual": {"residual_selection": "global"},
    "state in 16 bits": {"state_bits": 16, "basis_bits": 8},
    "scaled": {"residual": "scaled", "residual_scale": 0.5},
    "both": {"residual": "both", "residual_scale": 0.5},
}


@pytest.mark.parametrize("case", CASES)
def test_float32_weights_move_as_by_torch(case: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of size one move by 0.02 in a step: 2e-5 is a thousandth of that, summed over eight steps."""
    sizes = calls_of(monkeypatch)
    _, mine = train("triton", device, **CASES[case])
    kinds = len(sizes)
    _, other = train("torch", device, **CASES[case])
    assert kinds == len(sizes)
    assert (kinds > 0) == (case != "global residual")
    assert mine.check_finite() == other.check_finite() == {"a": 1, "f": 1}
    if "bits" not in case:  # moments are rounded by chance, upwards or downwards after a difference in the last bit
        assert_same(mine, other, atol=2e-5)
    else:
        for a, b in zip(mine.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-3)


@pytest.mark.parametrize("residual", ["sparse", "both"])
def test_bfloat16_weights_move_as_by_torch(residual: str, device: torch.device) -> None:
    """To nearest: N and P are rounded to bfloat16 before they are multiplied, which moves W by 2^-9 of a step more or
    less, so that a hundredth of all roundings falls to the neighbour; a step is about two units of W here.
    """
    mine, _ = train("triton", device, torch.bfloat16, residual=residual)
    other, _ = train("torch", device, torch.bfloat16, residual=residual)
    start = weights(device, torch.bfloat16)
    for a, b, c in zip(mine, other, start, strict=True):
        unit = 2.0 ** (torch.maximum(a.abs(), b.abs()).float().log2().floor().clamp(min=-4) - 7)
        # "both" rounds entries at S twice, at first where phi D has taken them, which may be a power of two further
        assert ((a.float() - b.float()).abs() <= (8 if residual == "both" else 4) * unit).all()
        error, moved = (a.float() - b.float()).norm(), (b.float() - c.float()).norm()
        assert error < 0.15 * moved


def test_stochastic_rounding_depends_on_seed_name_and_step_alone(device: torch.device) -> None:
    options: dict[str, Any] = {"stochastic_rounding": True, "residual_percent": 0.0, "steps": 3}
    first, _ = train("triton", device, torch.bfloat16, **options)
    again, _ = train("triton", device, torch.bfloat16, **options)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    nearest, _ = train("triton", device, torch.bfloat16, **options | {"stochastic_rounding": False})
    assert not all(torch.equal(a, b) for a, b in zip(first, nearest, strict=True))


def test_equal_matrices_move_together_whatever_the_age_of_their_bases(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Staggered refreshes do not part them: two tall weights in one call, three parts of a fused one in another."""
    sizes = calls_of(monkeypatch)
    train("triton", device, steps=12, update_proj_gap=12, residual_percent=0.0, stagger_refresh=True)  # none due then
    assert sorted(sizes[-5:]) == [1, 1, 1, 2, 3]


def test_a_checkpoint_of_one_continues_with_the_other(device: torch.device) -> None:
    """The choice of kernels is no part of the method."""
    params, saved = train("torch", device, steps=4)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    group = {"params": copies, "projected": True, "matrices": matrices(), "names": list("abcdef")}
    resumed = GaLoreAdamW([group], GaLoreConfig(**SETTINGS, kernels="triton"), lr=1e-2, weight_decay=0.1)
    resumed.load_state_dict(copy.deepcopy(saved.state_dict()))
    for step in (4, 6):
        for own, optimizer in ((params, saved), (copies, resumed)):
            give_gradients(own, step)
            optimizer.step()
    for a, b in zip(params, copies, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_what_the_kernels_cannot_do_is_refused_where_they_are_asked_for(device: torch.device) -> None:
    with pytest.raises(OptionError, match=r"galore.kernels.*e: float64 is neither float32 nor bfloat16. Use auto"):
        train("triton", device, torch.float64, steps=1)


def test_auto_takes_torch_off_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = calls_of(monkeypatch)
    train("auto", torch.device("cpu"), steps=2)
    assert not sizes


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Only reference counts free."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("no_collection")
def test_gradients_end_with_their_step(case: str, kernels: str, device: torch.device) -> None:
    """In a cycle of references they would pile up until the next garbage collection."""
    params, optimizer = train(kernels, device, steps=GAP + 1, **CASES[case])
    gradients = [weakref.ref(p.grad) for p in params if isinstance(p.grad, torch.Tensor)]
    optimizer.zero_grad()
    assert not any(gradient() is not None for gradient in gradients)
    assert not any(isinstance(x, Bucket) for x in gc.get_objects())
