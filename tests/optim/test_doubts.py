"""A refresh whose fast tools fail: the old basis stays for a step, and the next one finds a new one for certain."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.linalg import CERTAIN, Tools, by_cholesky
from galore_trainer.core.matrix import LogicalMatrix
from galore_trainer.optim import refresh
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from galore_trainer.optim.layerwise import ProjectedGradient

GAP = 4
NAMES = ["a", "b", "c"]


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """What GPUs take, here too."""
    monkeypatch.setattr(refresh, "tools_for", lambda *_: Tools(by_cholesky, refresh.by_library))


def begin(**settings: Any) -> GaLoreAdamW:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(40, 24, generator=generator)) for _ in NAMES]
    config = GaLoreConfig(rank=4, update_proj_gap=GAP, residual_percent=0.0, oversampling=4, **settings)
    optimizer = GaLoreAdamW([{"params": params, "projected": True, "names": NAMES}], config, lr=1e-2)
    optimizer.max_stack_elements = 1 << 20  # all in one stack
    return optimizer


def step(optimizer: GaLoreAdamW, at: int, poor: str | None = None, spoil: Mapping[str, float] = {}) -> None:
    """Gradients of their own in every step.

    The poor one has two directions only, in which no factor exists; spoilt ones are zero but for this value.
    """
    generator = torch.Generator().manual_seed(100 + at)
    for name, p in zip(NAMES, optimizer.param_groups[0]["params"], strict=True):
        p.grad = torch.randn(40, 24, generator=generator)
        if name == poor:
            p.grad = p.grad[:, :2] @ p.grad[:2]
        if name in spoil:
            p.grad.zero_()[0, 0] = spoil[name]
    optimizer.step()


def basis(optimizer: GaLoreAdamW, name: str) -> Tensor:
    return optimizer.state_of(name)["basis"].clone()


def test_a_failure_keeps_the_basis_and_is_made_good_a_step_later() -> None:
    optimizer = begin()
    for at in range(GAP):
        step(optimizer, at)
    before = {name: basis(optimizer, name) for name in NAMES}
    step(optimizer, GAP, poor="b")
    after = {name: basis(optimizer, name) for name in NAMES}
    assert torch.equal(after["b"], before["b"])
    for name in ("a", "c"):
        assert not torch.allclose(after[name], before[name], atol=1e-2)
    for p in optimizer.param_groups[0]["params"]:
        assert all(torch.isfinite(x).all() for x in optimizer.state[p].values() if isinstance(x, Tensor))
        assert torch.isfinite(p).all()
    step(optimizer, GAP + 1, poor="b")  # a second poor one does not matter: Householder and the library take it
    again = basis(optimizer, "b")
    grad = optimizer.param_groups[0]["params"][1].grad
    assert torch.equal(basis(optimizer, "a"), after["a"])
    lost = grad - grad @ again[0] @ again[0].mT
    assert lost.norm() < 1e-5 * grad.norm()
    for at in range(GAP + 2, 2 * GAP):
        step(optimizer, at)
        assert torch.equal(basis(optimizer, "b"), again)
    step(optimizer, 2 * GAP)  # on the grid, in spite of the one that was late
    assert not torch.allclose(basis(optimizer, "b"), again, atol=1e-2)
    assert optimizer.check_finite() == {}


def test_no_answer_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first refresh, which has no old basis to keep, a step asks for nothing: not for norms either."""
    optimizer = begin()
    step(optimizer, 0)
    asked: list[int] = []
    tolist = refresh.Later.tolist
    monkeypatch.setattr(refresh.Later, "tolist", lambda self: asked.append(1) or tolist(self))
    monkeypatch.setattr(refresh, "certain", lambda *_, **__: pytest.fail("waited"))
    for at in range(1, GAP + 1):
        step(optimizer, at)
    assert not asked


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_an_unusable_gradient_leaves_the_refresh_due(value: float) -> None:
    optimizer = begin()
    for at in range(GAP):
        step(optimizer, at)
    before = {name: basis(optimizer, name) for name in NAMES}
    weights = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    step(optimizer, GAP, spoil={"b": value})
    step(optimizer, GAP + 1, spoil={"b": value})  # late already: it is looked at first, and waits again
    assert torch.equal(basis(optimizer, "b"), before["b"])
    assert optimizer.check_finite() == ({} if value == 0.0 else {"b": 2})
    if value != 0.0:
        assert torch.equal(optimizer.param_groups[0]["params"][1], weights[1])
    report = optimizer.projection_report()
    assert report is not None
    assert report["mean"] <= 1.0
    step(optimizer, GAP + 2)
    after = basis(optimizer, "b")
    assert not torch.allclose(after, before["b"], atol=1e-2)
    assert [optimizer.state_of(name)["due"] for name in NAMES] == [2 * GAP] * 3
    step(optimizer, GAP + 3)
    assert torch.equal(basis(optimizer, "b"), after)
    for p in optimizer.param_groups[0]["params"]:
        assert torch.isfinite(p).all()


def test_one_row_that_lends_nothing_spoils_a_refresh_too() -> None:
    """A basis from one head is finite where another head's gradient is not."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(64, 40, generator=generator))
    config = GaLoreConfig(rank=4, update_proj_gap=GAP, residual_percent=0.0, oversampling=4, head_choice="fixed")
    matrix = LogicalMatrix(length=64, columns=40, rank=4, head_dim=16, lenders=1)
    group = {"params": [p], "projected": True, "names": ["q"], "matrices": [[matrix]]}
    optimizer = GaLoreAdamW([group], config, lr=1e-2)
    for at in range(GAP + 1):
        p.grad = torch.randn(64, 40, generator=generator)
        before = optimizer.state_of("q")["basis"].clone() if at else None
        if at == GAP:
            p.grad[-1, 0] = float("nan")
        optimizer.step()
    assert torch.equal(optimizer.state_of("q")["basis"], before)


@pytest.mark.parametrize("how", ["checkpoint", "copy"])
def test_a_checkpoint_or_a_copy_knows_of_a_failure(how: str) -> None:
    optimizer = begin()
    for at in range(GAP):
        step(optimizer, at)
    step(optimizer, GAP, poor="b")
    if how == "copy":
        other = copy.deepcopy(optimizer)
    else:
        other = begin()
        for p, q in zip(other.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True):
            p.data.copy_(q.data)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for run in (optimizer, other):
        step(run, GAP + 1, poor="b")  # found for certain at once, though it is as poor as before
    assert [other.state_of(name)["due"] for name in NAMES] == [2 * GAP] * 3
    for name in NAMES:
        assert torch.equal(basis(optimizer, name), basis(other, name))


def test_fast_tools_find_what_certain_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for tools in (refresh.tools_for(None, None), CERTAIN):  # type: ignore[arg-type]
        monkeypatch.setattr(refresh, "tools_for", lambda *_, tools=tools: tools)
        optimizer = begin()
        for at in range(2 * GAP + 1):
            step(optimizer, at)
        runs.append(optimizer)
    for a, b in zip(*(run.param_groups[0]["params"] for run in runs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_layerwise_hooks_know_of_a_failure() -> None:
    """The gradient after a failed refresh is kept whole, though no refresh lies on the grid."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(40, 24, generator=generator))
    config = GaLoreConfig(rank=4, update_proj_gap=GAP, residual_percent=0.0, oversampling=4, layerwise=True)
    optimizer = GaLoreAdamW([{"params": [p], "projected": True, "names": ["a"]}], config, lr=1e-2)
    bases, whole = [], []
    for at in range(3 * GAP + 1):
        G = torch.randn(40, 24, generator=generator)
        if at == 2 * GAP:
            G = G[:, :2] @ G[:2]
        (p * G).sum().backward()
        whole.append(not isinstance(p.grad, ProjectedGradient))
        optimizer.step()
        optimizer.zero_grad()
        bases.append(basis(optimizer, "a"))
    assert [at for at, kept in enumerate(whole) if kept] == [GAP, 2 * GAP, 2 * GAP + 1, 3 * GAP]
    changed = [at for at in range(1, len(bases)) if not torch.equal(bases[at], bases[at - 1])]
    assert changed == [GAP, 2 * GAP + 1, 3 * GAP]
    assert torch.isfinite(p).all()


@pytest.mark.parametrize("value", [0.0, float("nan")])
@pytest.mark.parametrize("warmup", [0, 2])
def test_no_residual_begins_with_an_unusable_gradient(value: float, warmup: int) -> None:
    """Its candidates are found once: at the first basis from a whole gradient, which has to be a good one."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(40, 24, generator=generator))
    config = GaLoreConfig(
        rank=4, update_proj_gap=GAP, residual_percent=5.0, residual_warmup_steps=warmup, oversampling=4, layerwise=True
    )
    optimizer = GaLoreAdamW([{"params": [p], "projected": True, "names": ["a"]}], config, lr=1e-2)
    for at in range(2 * GAP + 1):
        G = torch.randn(40, 24, generator=generator)
        if at == GAP:
            G = torch.full_like(G, value)
        (p * G).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    support = optimizer.state_of("a")["residual_index"]
    assert len(set(support.flatten().tolist())) > 12
    assert torch.isfinite(p).all()


@pytest.mark.parametrize("bits", [32, 16, 8])
def test_moments_stay_with_a_basis_that_stays(bits: int) -> None:
    optimizer = begin(state_bits=bits)
    for at in range(GAP):
        step(optimizer, at)
    before = copy.deepcopy(dict(optimizer.state_of("b")))
    step(optimizer, GAP, spoil={"b": float("nan")})
    after = optimizer.state_of("b")
    for key, value in before.items():
        if isinstance(value, Tensor) and key != "skipped":
            assert torch.equal(after[key], value), key
