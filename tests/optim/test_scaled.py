"""The dense scaled residual in the optimizer: against the float64 reference, and where it must not move anything."""

from __future__ import annotations

import io
import logging
from typing import Any

import pytest
import torch

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.matrix import LogicalMatrix
from galore_trainer.core.reference import ReferenceMatrix, step_blocks
from galore_trainer.core.sparse import Support
from galore_trainer.errors import OptionError
from galore_trainer.optim.galore_adamw import GaLoreAdamW

HEAD_DIM, GAP, STEPS = 8, 3, 9
LAYOUTS = {"joint": (1, 0, 0), "shared": (1, HEAD_DIM, 1), "grouped": (2, HEAD_DIM, 1), "per_head": (4, HEAD_DIM, 1)}
SHAPE = (32, 20)


def gradients(shape: tuple[int, int] = SHAPE, steps: int = STEPS) -> list[torch.Tensor]:
    """Gradients of growing and falling size, so that the limit of growth is met, with clear leading directions."""
    generator = torch.Generator().manual_seed(1)
    k = min(shape)
    left, right = (torch.linalg.qr(torch.randn(n, k, generator=generator)).Q for n in shape)
    noise = [torch.randn(shape, generator=generator) for _ in range(steps)]
    return [(left * torch.linspace(1.0, 0.05, k)) @ right.T + 0.05 * (1 + i % 4) * n for i, n in enumerate(noise)]


def weight(shape: tuple[int, int] = SHAPE, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype))


def optimizer_of(p: torch.nn.Parameter, matrix: LogicalMatrix | None = None, **settings: Any) -> GaLoreAdamW:
    group: dict[str, Any] = {"params": [p], "names": ["w"], "projected": True}
    if matrix is not None:
        group["matrices"] = [[matrix]]
    config = GaLoreConfig(**{"rank": 5, "update_proj_gap": GAP, "scale": 2.0, "residual": "scaled", **settings})
    return GaLoreAdamW([group], config, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99))


def run(p: torch.nn.Parameter, optimizer: GaLoreAdamW, grads: list[torch.Tensor]) -> torch.Tensor:
    for G in grads:
        p.grad = G.clone().to(p.dtype)
        optimizer.step()
    return p.detach().clone()


@pytest.mark.parametrize("residual", ["scaled", "both"])
@pytest.mark.parametrize(("sharing", "side"), [("joint", "left"), *((s, "right") for s in LAYOUTS)])
@pytest.mark.parametrize("shape", [(32, 20), (32, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_float64_reference(
    residual: str, sharing: str, side: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    blocks, head_dim, lenders = LAYOUTS[sharing]
    matrix = LogicalMatrix(
        length=shape[0], columns=shape[1], side=side, rank=5, blocks=blocks, head_dim=head_dim, lenders=lenders
    )
    p = weight(shape, dtype)
    percent = {"residual_percent": 10.0, "residual_warmup_steps": 2} if residual == "both" else {}
    optimizer = optimizer_of(p, matrix, residual=residual, residual_scale=0.5, svd="exact", **percent)
    settings: dict[str, Any] = {"lr": 1e-2, "scale": 2.0, "betas": (0.9, 0.99), "weight_decay": 0.1}
    references = [
        ReferenceMatrix(W, side, momentum_transfer="rotate", residual_scale=0.5, scaled=True, **settings)
        for W in p.detach().chunk(blocks)
    ]
    limited = []
    for step, G in enumerate(gradients(shape)):
        p.grad = G.clone().to(dtype)
        optimizer.step()
        state = optimizer.state[p]
        chosen = state.get("residual_index")
        for b, reference in enumerate(references):
            if step % GAP == 0:
                reference.refresh(state["basis"][b])
            if chosen is not None and reference.S is None and step >= 2:
                rows, columns = Support(chosen, shape[1]).coordinates(matrix.block_rows)
                reference.choose_support(rows[b], columns[b])
        limited.append(step_blocks(references, list(G.chunk(blocks))) < 1.0)
        torch.testing.assert_close(float(state["residual_norm"]), references[0].d, rtol=1e-5, atol=0)
    assert any(limited)
    assert not all(limited)
    expected = torch.cat([r.W for r in references])
    # residual_norm has 24 bits, also under float64; the others are as in test_oracles.py
    atol = 1e-6 if dtype == torch.float64 else 3e-6 if residual == "scaled" else 2e-5
    torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=atol)


def test_at_full_rank_it_is_off() -> None:
    """The projection loses nothing there: the same bits as without a residual, and no state for it."""
    ours, theirs = weight(), weight()
    one, other = (optimizer_of(p, rank=20, residual=r) for p, r in ((ours, "scaled"), (theirs, "none")))
    assert torch.equal(run(ours, one, gradients()), run(theirs, other, gradients()))
    assert "residual_norm" not in one.state[ours]


def test_scale_zero_is_no_residual() -> None:
    ours, theirs = weight(), weight()
    with_zero = run(ours, optimizer_of(ours, residual_scale=0.0), gradients())
    torch.testing.assert_close(
        with_zero, run(theirs, optimizer_of(theirs, residual="none"), gradients()), rtol=0, atol=1e-7
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e25])
def test_a_skipped_step_leaves_weight_and_limit(bad: float) -> None:
    p = weight()
    optimizer = optimizer_of(p)
    grads = gradients()
    before = run(p, optimizer, grads[:2])
    norm = optimizer.state[p]["residual_norm"].clone()
    poisoned = grads[2].clone()
    poisoned[3, 3] = bad
    assert torch.equal(run(p, optimizer, [poisoned]), before)
    assert torch.equal(optimizer.state[p]["residual_norm"], norm)


def test_a_zero_gradient_and_zero_lines() -> None:
    """A zero gradient leaves the limit; rows without a gradient move by lift(N) alone, which is 0 there."""
    p = weight()
    optimizer = optimizer_of(p)
    grads = [G.clone() for G in gradients()]
    for G in grads:
        G[5:7] = 0.0
    run(p, optimizer, grads[:2])
    norm = optimizer.state[p]["residual_norm"].clone()
    assert norm > 0.0
    run(p, optimizer, [torch.zeros(SHAPE)])
    assert torch.equal(optimizer.state[p]["residual_norm"], norm)
    end = run(p, optimizer, grads[3:])
    torch.testing.assert_close(end[5:7], weight().detach()[5:7] * (1 - 1e-3) ** STEPS, rtol=1e-5, atol=1e-6)


def test_rows_that_the_basis_does_not_see_are_left_alone() -> None:
    """What rounding leaves of their projection must not become a factor of many millions."""
    p = weight((32, 40))
    optimizer = optimizer_of(p, rank=4, update_proj_gap=1000)
    generator = torch.Generator().manual_seed(5)
    seen, other = torch.linalg.qr(torch.randn(40, 40, generator=generator)).Q.split([4, 36], dim=1)
    first = torch.randn(32, 4, generator=generator) @ seen.T
    G = first.clone()
    G[7] = (other @ torch.randn(36, generator=generator)) * 1e-3
    start = p.detach().clone()
    moved = run(p, optimizer, [first, G, G]) - start
    assert moved.norm(dim=1)[7] < 3 * moved.norm(dim=1).median()


def test_moves_as_torch_stores_bfloat16() -> None:
    """bfloat16 weights end near float32 ones: one rounding a step, to nearest or at random."""
    exact = weight((64, 48))
    expected = run(exact, optimizer_of(exact), gradients((64, 48)))
    for rounding in (True, False):
        p = weight((64, 48), torch.bfloat16)
        got = run(p, optimizer_of(p, stochastic_rounding=rounding), gradients((64, 48)))
        # 9 roundings of weights below 4, each by at most 2^-7 up or down
        assert (got.float() - expected).abs().mean() < 0.01


@pytest.mark.parametrize("residual", ["scaled", "both"])
def test_resumed_is_uninterrupted(residual: str) -> None:
    settings = {"residual": residual} | ({"residual_warmup_steps": 1} if residual == "both" else {})
    p, q = weight(), weight()
    grads = gradients()
    whole = run(p, optimizer_of(p, **settings), grads)
    first = optimizer_of(q, **settings)
    run(q, first, grads[:5])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = optimizer_of(q, **settings)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(run(q, second, grads[5:]), whole)


def test_a_state_without_its_norm_has_no_limit_in_the_next_step() -> None:
    p = weight()
    optimizer = optimizer_of(p)
    run(p, optimizer, gradients()[:3])
    saved = optimizer.state_dict()
    del saved["state"][0]["residual_norm"]
    other = optimizer_of(p)
    other.load_state_dict(saved)
    assert float(other.state[p]["residual_norm"]) == 0.0
    run(p, other, gradients()[3:4])
    assert float(other.state[p]["residual_norm"]) > 0.0


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "scaled"),
        ({"layerwise": True}, "sparse"),
        ({"layerwise": True, "residual_percent": 0.0}, "none"),
        ({"residual_percent": 0.0}, "none"),
        ({"residual_percent": 1.2}, "sparse"),
        ({"residual": "sparse", "residual_percent": 0.0}, "none"),
        ({"residual": "scaled", "residual_percent": 1.2}, "scaled"),
        ({"residual": "both"}, "both"),
        ({"residual": "none", "residual_percent": 1.2}, "none"),
    ],
)
def test_which_residual_is_in_force(settings: dict[str, Any], expected: str) -> None:
    config = GaLoreConfig(**settings)
    assert config.resolved_residual == expected
    assert config.sparse_percent == ((config.residual_percent or 1.2) if expected in ("sparse", "both") else 0.0)


@pytest.mark.parametrize("residual", ["scaled", "both"])
def test_layer_wise_mode_refuses_it_by_name(residual: str) -> None:
    with pytest.raises(OptionError, match=r"galore\.residual.*layer-wise"):
        GaLoreConfig(layerwise=True, residual=residual)


def test_both_needs_entries() -> None:
    with pytest.raises(OptionError, match=r"galore\.residual_percent"):
        GaLoreConfig(residual="both", residual_percent=0.0)


def old_state(percent: float) -> tuple[torch.nn.Parameter, dict[str, Any]]:
    """A state dict as it was before the residual had a name: it names no residual and no scale."""
    p = weight()
    optimizer = optimizer_of(p, residual="sparse", residual_percent=percent, scale=10.0)
    run(p, optimizer, gradients()[:2])
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["galore"]["residual_percent"] == percent
    assert not {"residual", "scale"} & saved["param_groups"][0]["galore"].keys()
    return p, saved


def test_an_old_state_means_sparse() -> None:
    p, saved = old_state(1.2)
    with pytest.raises(OptionError, match=r"galore\.residual: got 'scaled', wanted 'sparse'.*galore\.residual_percent"):
        optimizer_of(p).load_state_dict(saved)
    optimizer_of(p, residual="sparse", scale=10.0).load_state_dict(saved)


def test_an_old_state_without_entries_means_none() -> None:
    p, saved = old_state(0.0)
    with pytest.raises(OptionError, match=r"galore\.residual: got 'scaled', wanted 'none'"):
        optimizer_of(p).load_state_dict(saved)
    optimizer_of(p, residual="none", scale=10.0).load_state_dict(saved)


def test_scale_auto_takes_over_the_number_of_a_checkpoint(caplog: pytest.LogCaptureFixture) -> None:
    p, saved = old_state(1.2)
    resumed = optimizer_of(p, residual="sparse", scale="auto")
    with caplog.at_level(logging.WARNING):
        resumed.load_state_dict(saved)
    assert "galore.scale: auto is asked for, the checkpoint was trained with 10.0" in caplog.text
    q = torch.nn.Parameter(p.detach().clone())
    same = optimizer_of(q, residual="sparse", scale=10.0)
    same.load_state_dict(saved)
    assert torch.equal(run(p, resumed, gradients()[2:]), run(q, same, gradients()[2:]))


@pytest.mark.parametrize(("shape", "proj_type", "length"), [((32, 20), "right", 20), ((32, 20), "left", 32)])
def test_scale_auto_is_the_root_of_length_by_rank(shape: tuple[int, int], proj_type: str, length: int) -> None:
    p, q = weight(shape), weight(shape)
    auto = run(p, optimizer_of(p, scale="auto", proj_type=proj_type), gradients(shape))
    number = run(q, optimizer_of(q, scale=(length / 5) ** 0.5, proj_type=proj_type), gradients(shape))
    assert torch.equal(auto, number)


def test_a_taken_over_scale_is_saved_again() -> None:
    p, saved = old_state(1.2)
    resumed = optimizer_of(p, residual="sparse", scale="auto")
    resumed.load_state_dict(saved)
    again = optimizer_of(p, residual="sparse", scale="auto")
    again.load_state_dict(resumed.state_dict())
    assert again.param_groups[0]["galore"]["scale"] == 10.0


@pytest.mark.parametrize("residual", ["scaled", "both", "sparse", "none"])
@pytest.mark.parametrize("scale", ["auto", 10.0, 0.25])
def test_residual_and_scale_are_saved(residual: str, scale: float | str) -> None:
    """Under the keys that older state dicts have: a reader that wants every key finds it in both."""
    p = weight()
    one = optimizer_of(p, residual=residual, scale=scale)
    run(p, one, gradients()[:2])
    saved = one.state_dict()
    assert saved["param_groups"][0]["galore"].keys() == old_state(1.2)[1]["param_groups"][0]["galore"].keys()
    other = optimizer_of(p, residual=residual, scale=scale)
    other.load_state_dict(saved)
    assert other.param_groups[0]["galore"] == one.param_groups[0]["galore"]
    with pytest.raises(OptionError, match=r"galore\.residual"):
        optimizer_of(p, residual="none" if residual != "none" else "scaled", scale=scale).load_state_dict(saved)


@pytest.mark.parametrize("text", ["scaled", "scaled x, scale auto", "scaled 0, scale much", None])
def test_a_saved_residual_that_cannot_be_read_is_named(text: str | None) -> None:
    p = weight()
    optimizer = optimizer_of(p)
    run(p, optimizer, gradients()[:2])
    saved = optimizer.state_dict()
    saved["param_groups"][0]["galore"]["residual_percent"] = text
    with pytest.raises(OptionError, match=r"checkpoint: got .*residual_percent"):
        optimizer_of(p).load_state_dict(saved)
