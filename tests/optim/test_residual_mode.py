"""The sparse residual that corrects moments: against torch.optim.AdamW, and against the float64 reference."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.matrix import LogicalMatrix
from galore_trainer.core.reference import ReferenceMatrix
from galore_trainer.core.sparse import Support
from galore_trainer.errors import OptionError
from galore_trainer.hf.table import weight_table
from galore_trainer.optim import residual
from galore_trainer.optim.galore_adamw import GaLoreAdamW
from galore_trainer.optim.lookup import weights_with_gradients

GAP, STEPS, RANK, HEAD_DIM = 3, 9, 5, 8
SHAPE = (32, 20)
MATRICES = {
    "joint left": {"side": "left"},
    "joint": {},
    "shared": {"head_dim": HEAD_DIM, "lenders": 1},
    "grouped": {"blocks": 2, "head_dim": HEAD_DIM, "lenders": 1},
    "per_head": {"blocks": 4, "head_dim": HEAD_DIM, "lenders": 1},
}
WAYS = pytest.mark.parametrize("way", MATRICES)
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def gradients(shape: tuple[int, int] = SHAPE, steps: int = STEPS) -> list[torch.Tensor]:
    """With clear leading directions, so that bases are not decided by rounding."""
    generator = torch.Generator().manual_seed(1)
    k = min(shape)
    left, right = (torch.linalg.qr(torch.randn(n, k, generator=generator)).Q for n in shape)
    noise = [torch.randn(shape, generator=generator) for _ in range(steps)]
    return [(left * torch.linspace(1.0, 0.05, k)) @ right.T + 0.05 * n for n in noise]


def weight(shape: tuple[int, int] = SHAPE, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype))


def optimizer_of(p: torch.nn.Parameter, way: str = "joint", **settings: Any) -> GaLoreAdamW:
    matrix = LogicalMatrix(length=p.shape[0], columns=p.shape[1], rank=RANK, **MATRICES[way])
    mode = {"residual": "sparse", "residual_mode": "moments", "residual_percent": 10.0, "residual_warmup_steps": 2}
    config = GaLoreConfig(**{"rank": RANK, "update_proj_gap": GAP, **mode, **settings})
    group = {"params": [p], "names": ["w"], "projected": True, "matrices": [[matrix]]}
    return GaLoreAdamW([group], config, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99))


def run(p: torch.nn.Parameter, optimizer: torch.optim.Optimizer, grads: list[torch.Tensor]) -> torch.Tensor:
    for G in grads:
        p.grad = G.clone().to(p.dtype)
        optimizer.step()
    return p.detach().clone()


# ---------------------------------------------------------------------- oracles


@WAYS
@TYPES
@pytest.mark.parametrize("scale", ["auto", 0.5])
def test_with_one_basis_and_every_entry_it_is_adamw(way: str, dtype: torch.dtype, scale: float | str) -> None:
    """lift(M) + m is then the average of G; ``residual_scale`` makes up for another scale."""
    ours, theirs = weight(dtype=dtype), weight(dtype=dtype)
    every: dict[str, Any] = {"residual_percent": 100.0, "residual_warmup_steps": 0, "update_proj_gap": 1000}
    if scale != "auto":
        auto = ((32 if way == "joint left" else 20) / RANK) ** 0.5
        every |= {"scale": scale, "residual_scale": auto / scale}
    expected = run(theirs, torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99)), gradients())
    got = run(ours, optimizer_of(ours, way, **every), gradients())
    # in float32 D is a difference of two numbers of the gradient's size, which a small entry's update shows
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13 if dtype == torch.float64 else 2e-5)


@WAYS
def test_at_the_support_it_is_adamw_and_elsewhere_there_is_no_residual(way: str) -> None:
    ours, theirs, without = (weight(dtype=torch.float64) for _ in range(3))
    one_basis = {"residual_warmup_steps": 0, "update_proj_gap": 1000}
    optimizer = optimizer_of(ours, way, **one_basis)
    got = run(ours, optimizer, gradients())
    adamw = run(theirs, torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99)), gradients())
    none = {"residual": "none", "residual_mode": "separate"}
    projected = run(without, optimizer_of(without, way, **one_basis, **none), gradients())
    positions = optimizer.state[ours]["residual_index"].reshape(len(ours), -1).long()
    at_support = torch.zeros(SHAPE, dtype=torch.bool).scatter_(1, positions, True)
    assert 0 < at_support.sum() < at_support.numel()
    torch.testing.assert_close(got, torch.where(at_support, adamw, projected), rtol=0, atol=1e-13)


@WAYS
@TYPES
@pytest.mark.parametrize("selection", ["row", "global"])
@pytest.mark.parametrize("transfer", ["rotate", "reset"])
def test_equals_float64_reference(way: str, dtype: torch.dtype, selection: str, transfer: str) -> None:
    """Over three bases, with a support that is younger than the moments."""
    p, more = weight(dtype=dtype), {"residual_scale": 0.5, "momentum_transfer": transfer}
    optimizer = optimizer_of(p, way, scale=2.0, residual_selection=selection, **more)
    matrix = optimizer.param_groups[0]["matrices"][0][0]
    shared: dict[str, Any] = {"lr": 1e-2, "scale": 2.0, "betas": (0.9, 0.99), "weight_decay": 0.1, **more}
    blocks = p.detach().chunk(matrix.blocks)
    references = [ReferenceMatrix(W, matrix.side, residual_mode="moments", **shared) for W in blocks]
    for step, G in enumerate(gradients()):
        p.grad = G.clone().to(dtype)
        optimizer.step()
        state = optimizer.state[p]
        for b, (reference, part) in enumerate(zip(references, G.chunk(matrix.blocks), strict=True)):
            if step % GAP == 0:
                reference.refresh(state["basis"][b])
            if step == 2:
                rows, columns = Support(state["residual_index"], SHAPE[1]).coordinates(matrix.block_rows)
                reference.choose_support(rows[b], columns[b])
            reference.step(part)
    expected = torch.cat([r.W for r in references])
    # as in test_oracles.py; reset gives V few gradients, and float32 rounding of M and V reaches the update
    atol = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=atol)
    separate = weight(dtype=dtype)
    other = optimizer_of(separate, way, scale=2.0, residual_selection=selection, **more, residual_mode="separate")
    assert (run(separate, other, gradients()) - p).abs().max() > 1e-3


@pytest.mark.parametrize("rounding", [True, False])
def test_bfloat16_weights_end_near_float32_ones(rounding: bool) -> None:
    exact, p = weight((64, 48)), weight((64, 48), torch.bfloat16)
    expected = run(exact, optimizer_of(exact), gradients((64, 48)))
    got = run(p, optimizer_of(p, stochastic_rounding=rounding), gradients((64, 48)))
    # 9 roundings of weights below 4, each by at most 2^-7 up or down
    assert (got.float() - expected).abs().mean() < 0.01


@pytest.mark.parametrize("bits", [16, 8])
def test_moments_of_few_bits_move_the_support_alike(bits: int) -> None:
    exact, p = weight(), weight()
    optimizer = optimizer_of(p, state_bits=bits)
    start = weight().detach()
    expected, got = (run(w, o, gradients()) - start for w, o in ((exact, optimizer_of(exact)), (p, optimizer)))
    assert torch.nn.functional.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > 0.97


@pytest.mark.parametrize("micro", [1, 2])
def test_layer_wise_mode_equals_the_ordinary_one(micro: int) -> None:
    """From what it keeps of a gradient: the projection, and the entries of the support."""
    moved = []
    data = torch.randn(10, 8, 20, generator=torch.Generator().manual_seed(2))
    for mode in ({"layerwise": True}, {"stagger_refresh": True, "first_basis": "sketch"}):
        layer = torch.nn.Linear(20, 32, bias=False)
        layer.weight.data.copy_(weight().detach())
        optimizer = optimizer_of(layer.weight, **mode)
        for batch in data:
            for part in batch.chunk(micro if "layerwise" in mode else 1):
                (layer(part).square().sum() / 100.0).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert "residual_exp_avg" in optimizer.state[layer.weight]
        moved.append(layer.weight.detach())
    torch.testing.assert_close(*moved, rtol=0, atol=1e-5)  # as in test_layerwise.py


def test_equal_weights_move_together_as_one_by_one() -> None:
    """As on a GPU; on a CPU each is alone."""
    moved = []
    for most in (None, 1 << 20):
        params = [weight() for _ in range(3)]
        config = optimizer_of(params[0]).config
        optimizer = GaLoreAdamW([{"params": params, "names": ["a", "b", "c"], "projected": True}], config, lr=1e-2)
        optimizer.max_stack_elements = most
        for step in range(STEPS):
            for p, G in zip(params, (gradients()[(step + i) % STEPS] for i in range(3)), strict=True):
                p.grad = G.clone()
            optimizer.step()
        moved.append(torch.stack([p.detach() for p in params]))
    torch.testing.assert_close(*moved, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- steps that are skipped, ages, kernels


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e25])
def test_a_skipped_step_leaves_weight_and_moments(bad: float) -> None:
    p = weight()
    optimizer = optimizer_of(p)
    grads = gradients()
    before = run(p, optimizer, grads[:4])
    moments = {k: v.clone() for k, v in optimizer.state[p].items() if k.endswith(("exp_avg", "exp_avg_sq", "step"))}
    poisoned = grads[4].clone()
    poisoned[3, 3] = bad
    assert torch.equal(run(p, optimizer, [poisoned]), before)
    assert len(moments) == 6
    assert all(torch.equal(optimizer.state[p][key], value) for key, value in moments.items())


def test_without_eps_entries_that_never_had_a_gradient_stay() -> None:
    """0 / 0 must not become a NaN."""
    p = weight()
    optimizer = optimizer_of(p, residual_percent=100.0, residual_warmup_steps=0)
    optimizer.param_groups[0].update(eps=0.0, weight_decay=0.0)
    grads = [G.clone() for G in gradients()]
    for G in grads:
        G[5:7] = 0.0
    end = run(p, optimizer, grads)
    assert end.isfinite().all()
    assert torch.equal(end[5:7], weight().detach()[5:7])


def test_torch_takes_the_weights_that_kernels_would() -> None:
    """``kernels: auto`` leaves a weight to torch from the choice of its support on."""
    taken = []
    for mode in ("separate", "moments"):
        p = weight()
        optimizer = optimizer_of(p, residual_mode=mode, residual_warmup_steps=0)
        run(p, optimizer, gradients()[:1])
        weights = weights_with_gradients(optimizer.param_groups, optimizer.state, optimizer.placement, optimizer.config)
        (piece,) = (piece for w in weights for piece in w.open())
        taken.append(residual.takes_triton(piece, optimizer.config))
    assert taken == [True, False]
    assert "residual sparse (moments, by torch)" in weight_table(optimizer)


# ---------------------------------------------------------------------- state


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("at", [1, 5])  # among candidates, and with a support
def test_resumed_is_uninterrupted(bits: int, at: int) -> None:
    p, q = weight(), weight()
    grads = gradients()
    whole = run(p, optimizer_of(p, "per_head", state_bits=bits), grads)
    first = optimizer_of(q, "per_head", state_bits=bits)
    run(q, first, grads[:at])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = optimizer_of(q, "per_head", state_bits=bits)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.param_groups[0]["galore"] == first.param_groups[0]["galore"]
    assert torch.equal(run(q, second, grads[at:]), whole)


@pytest.mark.parametrize("scale", ["auto", 10.0])
def test_a_resume_in_the_other_mode_is_refused_by_name(scale: float | str) -> None:
    """No key is new in a saved group: a reader that wants every key finds it in older states, too."""
    modes = ("separate", "moments")
    saved = {}
    for mode in modes:
        p = weight()
        optimizer = optimizer_of(p, residual_mode=mode, scale=scale)
        run(p, optimizer, gradients()[:4])
        saved[mode] = optimizer.state_dict()
    groups = [saved[mode]["param_groups"][0]["galore"] for mode in modes]
    assert groups[0].keys() == groups[1].keys()
    assert not {"residual_mode", "share_heads_of"} & groups[0].keys()
    for mode, other in (modes, modes[::-1]):
        with pytest.raises(OptionError, match=rf"galore\.residual_mode: got '{mode}', wanted '{other}'"):
            optimizer_of(weight(), residual_mode=mode, scale=scale).load_state_dict(saved[other])


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "settings",
    [{"residual": "scaled"}, {"residual": "both"}, {"residual": "none"}, {}, {"residual_percent": 0.0}],
    ids=lambda x: "-".join(map(str, x.values())) or "auto",
)
def test_it_needs_the_sparse_residual_alone(settings: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"galore\.residual_mode: got 'moments beside residual .*residual sparse"):
        GaLoreConfig(residual_mode="moments", **settings)


@pytest.mark.parametrize("settings", [{"residual": "sparse"}, {"residual_percent": 0.6}, {"layerwise": True}])
def test_every_way_to_the_sparse_residual_will_do(settings: dict[str, Any]) -> None:
    assert GaLoreConfig(residual_mode="moments", **settings).resolved_residual == "sparse"


def test_kernels_that_do_not_compute_it_are_refused_by_name() -> None:
    with pytest.raises(OptionError, match=r"galore\.kernels: got 'triton'.*residual_mode moments.*Use auto"):
        GaLoreConfig(residual="sparse", residual_mode="moments", kernels="triton")


def test_a_mode_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(OptionError, match=r"galore\.residual_mode: got 'own', wanted one of separate, moments"):
        GaLoreConfig(residual="sparse", residual_mode="own")  # type: ignore[arg-type]
