"""Gradients and weights of any strides move as contiguous ones do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.optim.galore_adamw import GaLoreAdamW

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = (24, 16)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced columns": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "every other row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "every other column": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
}


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def train(
    start: Tensor, grads: list[Tensor], of_weight: Callable, of_grad: Callable, projected: bool, **settings
) -> Tensor:
    p = torch.nn.Parameter(of_weight(start.clone()))
    usual = {"rank": 4, "update_proj_gap": 3, "residual_warmup_steps": 2, "residual_percent": 10.0}
    with contextlib.nullcontext() if projected else pytest.warns(UserWarning, match="projects nothing"):
        optimizer = GaLoreAdamW(
            [{"params": [p], "projected": projected}], GaLoreConfig(**{**usual, **settings}), lr=1e-2, weight_decay=0.1
        )
    for grad in grads:
        p.grad = of_grad(grad.to(p.dtype))
        optimizer.step()
    return p.detach().contiguous()


@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", ["gradient", "weight", "both"])
def test_strides_do_not_matter(what: str, layout: str, projected: bool, bits: int) -> None:
    start, grads = numbers(0, *SHAPE), [numbers(1 + i, *SHAPE) for i in range(7)]
    settings = {"state_bits": bits, "plain_state_bits": bits}
    expected = train(start, grads, Tensor.clone, Tensor.clone, projected, **settings)
    other = LAYOUTS[layout]
    of_weight = other if what != "gradient" else Tensor.clone
    of_grad = other if what != "weight" else Tensor.clone
    found = train(start, grads, of_weight, of_grad, projected, **settings)
    # products of strided factors may be added up in another order, and a rounded moment may then fall to its neighbour
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if bits == 32 or not projected else 2e-2)


@pytest.mark.parametrize("projected", [False, True])
def test_an_expanded_gradient_is_a_gradient(projected: bool) -> None:
    """Three experts with one gradient."""
    start, grads = numbers(0, 3, *SHAPE), [numbers(1 + i, 1, *SHAPE) for i in range(5)]
    expected = train(start, [grad.repeat(3, 1, 1) for grad in grads], Tensor.clone, Tensor.clone, projected)
    found = train(start, grads, Tensor.clone, lambda grad: grad.expand(3, *SHAPE), projected)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_channels_last_weights_and_gradients_follow_torch() -> None:
    start = numbers(0, 4, 3, 5, 5)
    ours, theirs = (torch.nn.Parameter(start.clone().to(memory_format=torch.channels_last)) for _ in range(2))
    with pytest.warns(UserWarning, match="projects nothing"):
        mine = GaLoreAdamW([ours], lr=1e-2, weight_decay=0.1)
    other = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, foreach=False)
    for i in range(5):
        grad = numbers(1 + i, 4, 3, 5, 5)
        ours.grad = grad if i % 2 else grad.to(memory_format=torch.channels_last)
        theirs.grad = grad.clone()
        mine.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_a_regression_with_transposed_gradients_ends_where_torch_ends() -> None:
    """300 steps on A x = y with gradients written as (x^T e)^T."""
    x, target = numbers(0, 64, 8), numbers(1, 8, 6)
    losses = []
    for make in (lambda p: torch.optim.AdamW([p], lr=5e-2, weight_decay=0.0, foreach=False), plain):
        A = torch.nn.Parameter(torch.zeros(6, 8, device=DEVICE))
        optimizer = make(A)
        for _ in range(300):
            error = x @ (A.detach().mT - target)
            A.grad = (x.mT @ error).mT / len(x)
            optimizer.step()
        losses.append((x @ (A.detach().mT - target)).square().mean().item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-2, abs=1e-6)
    assert losses[1] < 1e-3


def plain(p: torch.nn.Parameter) -> GaLoreAdamW:
    with pytest.warns(UserWarning, match="projects nothing"):
        return GaLoreAdamW([p], lr=5e-2)


@pytest.mark.parametrize("layout", ["transposed", "every other column"])
def test_kernels_take_any_strides(layout: str) -> None:
    pytest.importorskip("triton")
    start, grads = numbers(0, *SHAPE), [numbers(1 + i, *SHAPE) for i in range(4)]
    other = LAYOUTS[layout]
    for projected in (False, True):
        expected = train(start, grads, Tensor.clone, Tensor.clone, projected, kernels="torch")
        found = train(start, grads, other, other, projected, kernels="triton")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
