"""Clipping inside the step is ``torch.nn.utils.clip_grad_norm_`` and the step without it, to rounding."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig

from cut_weights import Run, build, some_gradients
from galore_trainer.config import GaLoreConfig
from galore_trainer.core.matrix import LogicalMatrix
from galore_trainer.errors import OptionError
from galore_trainer.optim import refresh
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from galore_trainer.optim.step import hold_projections
from galore_trainer.run.memory.simulate import LiveBytes

STEPS, LIMIT = 7, 3.0
USUAL: dict[str, Any] = {"rank": 4, "update_proj_gap": 3, "residual_warmup_steps": 2}
SIZES = [0.01, 0.3, 1.0, 0.0, 2.0, 0.05, 0.4]  # of the gradients of each step: some are below the limit, one is zero
SHAPES = {"tall": (24, 16), "wide": (16, 40), "heads": (24, 20), "fused": (20, 36), "bias": (16,), "embedding": (30, 8)}


def make(dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[dict[str, nn.Parameter], GaLoreAdamW]:
    generator = torch.Generator().manual_seed(0)
    weights = {name: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for name, s in SHAPES.items()}
    config = GaLoreConfig(**{**USUAL, **settings})
    tall = LogicalMatrix(length=24, columns=16, side="right", rank=4)
    wide = LogicalMatrix(length=16, columns=40, side="left", rank=4)
    heads = LogicalMatrix(length=24, columns=20, rank=4, blocks=4, head_dim=6, lenders=1)
    fused = [
        LogicalMatrix(label=part, start=12 * i, length=12, columns=20, rank=4, transposed=True)
        for i, part in enumerate("qkv")
    ]
    names = list(SHAPES)
    projected = {
        "params": [weights[name] for name in names[:4]],
        "names": names[:4],
        "projected": True,
        "matrices": [[tall], [wide], [heads], fused],
    }
    plain = {"params": [weights[name] for name in names[4:]], "names": names[4:]}
    return weights, GaLoreAdamW([projected, plain], config, lr=1e-2, weight_decay=0.1, eps=1e-6)


def give_gradients(
    weights: dict[str, nn.Parameter], step: int, size: float, batches: int = 1, bad: tuple[str, float] | None = None
) -> None:
    """Add up the gradients of some micro-batches; one entry of a weight's may be ``bad``."""
    for batch in range(batches):
        generator = torch.Generator().manual_seed(100 * step + batch)
        for name, p in weights.items():
            grad = (size * torch.randn(p.shape, generator=generator)).to(p)
            if bad is not None and name == bad[0]:
                grad.view(-1)[3] = bad[1]
            (p * grad).sum().backward()


def assert_same(mine: GaLoreAdamW, other: GaLoreAdamW, rtol: float, atol: float) -> None:
    for group, of_other in zip(mine.param_groups, other.param_groups, strict=True):
        for name, p, q in zip(group["names"], group["params"], of_other["params"], strict=True):
            a, b = mine.state[p], other.state[q]
            assert a.keys() == b.keys(), name
            for key, value in [("weight", p), *a.items()]:
                expected = q if key == "weight" else b[key]
                if torch.is_tensor(value):
                    at = f"{name} {key}"
                    torch.testing.assert_close(value, expected, rtol=rtol, atol=atol, msg=lambda m, at=at: f"{at}: {m}")
                else:
                    assert value == expected, (name, key)


def check(settings: dict[str, Any], dtype: torch.dtype, batches: int = 1, bad: Any = None, bad_step: int = -1) -> None:
    """Some steps with clipping inside, and as many with torch's clipping before them."""
    mine, inside = make(dtype, max_grad_norm=LIMIT, **settings)
    theirs, outside = make(dtype, **settings)
    is_double = dtype == torch.float64
    for step, size in enumerate(SIZES):
        for weights in (mine, theirs):
            give_gradients(weights, step, size, batches, bad if step == bad_step else None)
        before = {name: p.grad.clone() for name, p in mine.items() if type(p.grad) is torch.Tensor}
        total = nn.utils.clip_grad_norm_(list(theirs.values()), LIMIT)
        inside.step()
        outside.step()
        assert inside.grad_norm is not None
        norm = inside.grad_norm.to(total)
        torch.testing.assert_close(norm, total, rtol=1e-13 if is_double else 1e-6, atol=0, equal_nan=True)
        for name, grad in before.items():  # bit for bit, NaN too
            kept = mine[name].grad
            assert kept is None or torch.equal(kept.nan_to_num(7.0), grad.nan_to_num(7.0)), name
        inside.zero_grad()
        outside.zero_grad()
    # Sums of squares come in another order, and Adam turns what rounding leaves of zeros into steps of full size.
    assert_same(inside, outside, rtol=1e-9 if is_double else 1e-3, atol=1e-11 if is_double else 1e-5)


RESIDUALS: list[dict[str, Any]] = [
    {"residual": "none"},
    {"residual": "sparse"},
    {"residual": "scaled"},
    {"residual": "both"},
    {"residual": "sparse", "residual_mode": "moments"},
]


@pytest.mark.parametrize("settings", RESIDUALS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_torch_s_clipping(settings: dict[str, Any], dtype: torch.dtype) -> None:
    check(settings, dtype)


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum_transfer": "reset", "residual": "both"},
        {"momentum_transfer": "keep", "svd": "exact", "residual": "sparse", "residual_selection": "global"},
        {"stagger_refresh": True, "warm_start": True, "residual_warmup_steps": 0},
        {"first_basis": "sketch", "residual": "both"},
        {"layerwise": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("batches", [1, 2])
def test_so_it_does_beside_other_settings(settings: dict[str, Any], batches: int) -> None:
    check(settings, torch.float64, batches)


@pytest.mark.parametrize("settings", [*RESIDUALS[:4], {"layerwise": True}], ids=str)
@pytest.mark.parametrize("bad", [("tall", float("nan")), ("fused", float("inf")), ("bias", float("inf"))], ids=str)
@pytest.mark.parametrize("bad_step", [0, 2, 3])  # 0 and 3 are refreshes
def test_gradients_that_are_not_finite_do_what_they_do_there(settings: Any, bad: Any, bad_step: int) -> None:
    """NaN makes all weights skip the step; infinity makes all gradients zero, and its own weight skip the step."""
    check(settings, torch.float64, bad=bad, bad_step=bad_step)


def test_a_weight_whose_gradient_is_too_large_skips_the_step() -> None:
    """There torch would scale it down; the others get what it leaves them, which is almost nothing, here as there."""
    mine, inside = make(torch.float32, max_grad_norm=LIMIT)
    for step in range(3):
        give_gradients(mine, step, 1.0, bad=("tall", 1.5e19) if step == 2 else None)
        inside.step()
        inside.zero_grad()
    assert inside.check_finite() == {"tall": 1}
    assert float(inside.grad_norm or 0.0) == pytest.approx(1.5e19)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.bfloat16, {"residual": "both"}),
        (torch.bfloat16, {"residual": "none", "state_bits": 8, "plain_state_bits": 8}),
        (torch.bfloat16, {"residual": "scaled", "state_bits": 16, "plain_state_bits": 16}),
        (torch.float32, {"residual": "sparse", "residual_warmup_steps": 0}),
    ],
    ids=str,
)
def test_a_factor_of_a_quarter_is_exact(
    kernels: str, dtype: torch.dtype, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power of two rounds nothing, so that weights, moments and rounding noise are equal bit for bit."""
    if kernels == "triton":
        pytest.importorskip("triton")
        monkeypatch.setattr(refresh, "LIBRARY", 0)  # eigenvectors by the library: interpreted rotations take long
    mine, inside = make(dtype, max_grad_norm=1.0, kernels=kernels, **settings)
    theirs, outside = make(dtype, max_grad_norm=1e9, kernels=kernels, **settings)  # the same kernels, with the factor 1
    for step in range(5):
        for weights in (mine, theirs):
            give_gradients(weights, step, 2.0)
        total = sum(p.grad.double().square().sum() for p in mine.values() if p.grad is not None) ** 0.5
        inside.config = dataclasses.replace(inside.config, max_grad_norm=float(total + 1e-6) / 4.0)
        for p in theirs.values():
            assert p.grad is not None
            p.grad.mul_(0.25)
        for optimizer in (inside, outside):
            optimizer.step()
            optimizer.zero_grad()
    assert_same(inside, outside, rtol=0.0, atol=0.0)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("residual", "bad"), [("both", None), ("both", ("tall", float("nan"))), ("none", ("wide", float("inf")))], ids=str
)
def test_kernels_clip_too(residual: str, bad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(refresh, "LIBRARY", 0)
    check({"kernels": "triton", "residual": residual}, torch.float32, bad=bad, bad_step=2)


@pytest.mark.parametrize("settings", RESIDUALS, ids=str)
def test_a_high_limit_changes_no_bit(settings: dict[str, Any]) -> None:
    mine, inside = make(max_grad_norm=1e9, **settings)
    theirs, outside = make(**settings)
    for step in range(5):
        for weights, optimizer in ((mine, inside), (theirs, outside)):
            give_gradients(weights, step, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert_same(inside, outside, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("kind", ["rows", "anywhere", "one row", "empty"])
@pytest.mark.parametrize("residual", ["none", "both"])
def test_cut_weights_are_clipped_by_the_norm_of_all_processes(kind: str, residual: str) -> None:
    llama = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=46, num_hidden_layers=1, num_attention_heads=4)
    config = GaLoreConfig(rank=4, update_proj_gap=2, residual=residual, residual_warmup_steps=2, proj_type="right")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(llama)
    cut, whole = Run(model, dataclasses.replace(config, max_grad_norm=LIMIT), kind), build(model, config)
    params = {n: p for g in whole.param_groups for n, p in zip(g["names"], g["params"], strict=True)}
    for step in range(5):
        grads = some_gradients(whole, step)
        cut.step({name: grad.clone() for name, grad in grads.items()})
        for name, p in params.items():
            p.grad = grads[name]
        total = nn.utils.clip_grad_norm_(list(params.values()), LIMIT)
        whole.step()
        norms = [optimizer.grad_norm for optimizer in cut.optimizers]
        assert len({float(norm) for norm in norms if norm is not None}) == 1
        torch.testing.assert_close(norms[0], total.double(), rtol=1e-6, atol=0)
    for name, p in params.items():
        torch.testing.assert_close(cut.weights[name], p.detach(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("settings", RESIDUALS, ids=str)
def test_a_step_waits_for_no_device(settings: dict[str, Any]) -> None:
    """Fake tensors have no numbers, so that a step which reads one raises."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        weights, optimizer = make(max_grad_norm=LIMIT, **settings)
        optimizer.make_state()
        for p in weights.values():
            p.grad = torch.empty_like(p)
            optimizer.state[p]["calls"] = 5
            optimizer.state[p]["due"] = 100
        optimizer.step()
        assert optimizer.grad_norm is not None
        assert optimizer.grad_norm.shape == ()


def test_projections_are_held_at_four_bytes_an_entry() -> None:
    """Beside them, before the first weight moves, only norms, flags and norms of lines are alive."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = [nn.Parameter(torch.empty(400, 300)) for _ in range(3)]
        group = {"params": params, "names": list("abc"), "projected": True}
        optimizer = GaLoreAdamW([group], GaLoreConfig(rank=50, max_grad_norm=1.0, residual="none"))
        optimizer.make_state()
        for p in params:
            p.grad = torch.empty_like(p)
            optimizer.state[p].update(calls=5, due=100)
        with LiveBytes() as live, torch.no_grad():
            weights = optimizer.weights_with_gradients()
            live.count([x for w in weights for x in (w.weight, w.grad, *w.state.values())])
            before = live.now
            held = hold_projections(weights, optimizer.config, 0, 1 << 30)
            assert 0 <= live.now - before - 3 * 4 * 400 * 50 < 100
            assert len(held) == 1


@pytest.mark.parametrize("limit", [0.0, -1.0, float("inf"), float("nan"), "1"])
def test_impossible_limits_are_refused(limit: Any) -> None:
    with pytest.raises(OptionError, match=r"galore\.max_grad_norm"):
        GaLoreConfig(max_grad_norm=limit)


def test_the_optimizer_takes_the_limit_too() -> None:
    p = nn.Parameter(torch.ones(8, 8))
    assert GaLoreAdamW([p], max_grad_norm=2.0).config.max_grad_norm == 2.0
    assert GaLoreAdamW([p], GaLoreConfig(max_grad_norm=2.0), max_grad_norm=2.0).config.max_grad_norm == 2.0
    with pytest.raises(OptionError, match="max_grad_norm"):
        GaLoreAdamW([p], GaLoreConfig(max_grad_norm=2.0), max_grad_norm=1.0)
