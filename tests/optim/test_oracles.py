"""The optimizer against its oracles: the float64 reference, galore-torch, and torch.optim.AdamW."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from galore_trainer.config import GaLoreConfig
from galore_trainer.core.matrix import LogicalMatrix
from galore_trainer.core.reference import ReferenceMatrix
from galore_trainer.core.sparse import Support
from galore_trainer.optim.galore_adamw import GaLoreAdamW

SHAPES = [(96, 32), (32, 96), (64, 64), (65, 33), (33, 65), (48, 47), (128, 40)]
GAP, STEPS = 3, 9  # three refreshes


def gradients(shape: tuple[int, int], steps: int = STEPS, seed: int = 1) -> list[torch.Tensor]:
    """Gradients with a decaying spectrum, as real ones have, and well separated singular values."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.linspace(1.0, 0.05, min(shape))
    left = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=generator)).Q
    right = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=generator)).Q
    noise = (torch.randn(shape, generator=generator) for _ in range(steps))
    return [(left * spectrum) @ right.T + 0.05 * n for n in noise]


def weight(shape: tuple[int, int]) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


# galore-torch multiplies a square reverse_std projection from the wrong side: that one pair is left out
@pytest.mark.parametrize(
    ("shape", "proj_type"),
    [(s, t) for s in SHAPES for t in ("std", "reverse_std", "left", "right") if (s, t) != ((64, 64), "reverse_std")],
)
def test_equals_galore_torch(shape: tuple[int, int], proj_type: str) -> None:
    """joint + exact + keep with eps = 0 is galore-torch with eps = 0, within 1e-6, over three refreshes."""
    galore_torch = pytest.importorskip("galore_torch", reason="parity extra not installed")
    ours, theirs = weight(shape), weight(shape)
    config = GaLoreConfig(
        rank=8,
        update_proj_gap=GAP,
        scale=0.25,
        proj_type=proj_type,
        svd="exact",
        momentum_transfer="keep",
        residual_percent=0.0,
    )
    mine = GaLoreAdamW([{"params": [ours], "projected": True}], config, lr=1e-2, eps=0.0)
    settings = {"rank": 8, "update_proj_gap": GAP, "scale": 0.25, "proj_type": proj_type}
    other = galore_torch.GaLoreAdamW(
        [{"params": [theirs], **settings}], lr=1e-2, eps=0.0, weight_decay=0.0, no_deprecation_warning=True
    )
    for G in gradients(shape):
        ours.grad, theirs.grad = G.clone(), G.clone()
        mine.step()
        other.step()
    assert (ours - theirs).abs().max() <= 1e-6
    assert (ours - weight(shape)).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
def test_full_rank_equals_adamw(shape: tuple[int, int]) -> None:
    """At rank min(m, n) and scale 1, with a basis that is a signed permutation, nothing is left of the projection."""
    ours, theirs = weight(shape), weight(shape)
    k = min(shape)
    first = torch.zeros(shape)
    signs = torch.tensor([1.0, -1.0]).repeat(k)[:k]
    first[torch.arange(k), torch.randperm(k, generator=torch.Generator().manual_seed(3))] = signs * torch.linspace(
        2.0, 1.0, k
    )
    later = gradients(shape, steps=8)
    config = GaLoreConfig(rank=k, scale=1.0, update_proj_gap=1000, svd="exact", residual_warmup_steps=2)
    mine = GaLoreAdamW([{"params": [ours], "projected": True}], config, lr=1e-2, weight_decay=0.1)
    other = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    for G in [first, *later]:
        ours.grad, theirs.grad = G.clone(), G.clone()
        mine.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


def test_weight_decay_alone_equals_adamw() -> None:
    ours, theirs = weight((16, 8)), weight((16, 8))
    mine = GaLoreAdamW([{"params": [ours], "projected": True}], GaLoreConfig(rank=2), lr=1e-2, weight_decay=0.3)
    other = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.3)
    for _ in range(5):
        ours.grad, theirs.grad = torch.zeros(16, 8), torch.zeros(16, 8)
        mine.step()
        other.step()
    torch.testing.assert_close(ours, theirs)


HEAD_DIM = 8
LAYOUTS = {"joint": (1, 0, 0), "shared": (1, HEAD_DIM, 1), "grouped": (2, HEAD_DIM, 1), "per_head": (4, HEAD_DIM, 1)}


WARMUP = 2
RESIDUALS = {
    "none": {"residual_percent": 0.0},
    "row": {"residual_percent": 10.0, "residual_warmup_steps": WARMUP, "residual_scale": 0.5},
    "global": {"residual_percent": 5.0, "residual_warmup_steps": WARMUP, "residual_selection": "global"},
    "at once": {"residual_percent": 5.0, "residual_warmup_steps": 0},
}


@pytest.mark.parametrize("shape", [(32, 20), (32, 96), (32, 32)])
@pytest.mark.parametrize(("sharing", "side"), [("joint", "left"), *((s, "right") for s in LAYOUTS)])
@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("transfer", ["keep", "align", "rotate", "reset"])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_equals_float64_reference(
    shape: tuple[int, int], sharing: str, side: str, svd: str, transfer: str, residual: str
) -> None:
    """Every way to project follows the literal float64 step, given the same bases and supports."""
    blocks, head_dim, lenders = LAYOUTS[sharing]
    matrix = LogicalMatrix(
        length=shape[0], columns=shape[1], side=side, rank=5, blocks=blocks, head_dim=head_dim, lenders=lenders
    )
    p = weight(shape)
    config = GaLoreConfig(
        rank=5, update_proj_gap=GAP, scale=2.0, svd=svd, momentum_transfer=transfer, **RESIDUALS[residual]
    )
    group = {"params": [p], "names": ["w"], "projected": True, "matrices": [[matrix]]}
    optimizer = GaLoreAdamW([group], config, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99))
    references = [
        ReferenceMatrix(
            W,
            side,
            lr=1e-2,
            scale=2.0,
            betas=(0.9, 0.99),
            weight_decay=0.1,
            momentum_transfer=transfer,
            residual_scale=config.residual_scale,
        )
        for W in p.detach().chunk(blocks)
    ]
    raw: list[torch.Tensor] = []
    for step, G in enumerate(gradients(shape)):
        p.grad = G.clone()
        optimizer.step()
        state = optimizer.state[p]
        raw.append(state["basis"].clone())
        chosen = state.get("residual_index")
        assert (chosen is not None) == (residual != "none" and step + 1 >= config.residual_warmup_steps)
        for b, (reference, part) in enumerate(zip(references, G.chunk(blocks), strict=True)):
            if step % GAP == 0:
                # under align the optimizer's basis has its signs already: aligning it again changes nothing
                reference.refresh(state["basis"][b])
            if chosen is not None and reference.S is None and step >= config.residual_warmup_steps:
                rows, columns = Support(chosen, shape[1]).coordinates(matrix.block_rows)
                reference.choose_support(rows[b], columns[b])
            reference.step(part)
    assert not torch.equal(raw[0], raw[GAP])
    expected = torch.cat([r.W for r in references])
    # 9 steps of lr x scale = 2e-2; float32 rounding of V after a rotation reaches N through a square root, and D[S]
    # is a difference of two numbers of the gradient's size
    torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=3e-6 if residual == "none" else 2e-5)


@pytest.mark.parametrize("selection", ["row", "global"])
@pytest.mark.parametrize(("side", "shape"), [("right", (32, 40)), ("left", (24, 60))])
def test_candidates_find_the_support_of_a_dense_accumulator(selection: str, side: str, shape: tuple[int, int]) -> None:
    """With gradients that repeat up to noise, the support is that of the dense moving average of D."""
    matrix = LogicalMatrix(length=shape[0], columns=shape[1], side=side, rank=4)
    p = weight(shape)
    config = GaLoreConfig(
        rank=4, scale=10.0, residual_percent=5.0, residual_warmup_steps=6, residual_selection=selection, svd="exact"
    )
    optimizer = GaLoreAdamW(
        [{"params": [p], "names": ["w"], "projected": True, "matrices": [[matrix]]}], config, lr=1e-3
    )
    reference = ReferenceMatrix(p.detach(), side, lr=1e-3, scale=10.0)
    fixed = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(8))
    for step, G in enumerate(gradients(shape, steps=6)):
        G = fixed + 0.2 * G
        p.grad = G.clone()
        optimizer.step()
        if step == 0:
            reference.refresh(optimizer.state[p]["basis"][0])
        reference.step(G)
    lines = shape[0] if selection == "row" else 1
    found = optimizer.state[p]["residual_index"][0]
    dense = reference.A.abs().reshape(lines, -1).topk(found.shape[-1], dim=-1).indices
    pairs = zip(found.tolist(), dense.tolist(), strict=True)
    shared = sum(len(set(a) & set(b)) for a, b in pairs) / found.numel()
    assert shared >= 0.9
    assert set(optimizer.state[p]) & {"candidate_index", "candidate_mean"} == set()


@pytest.mark.parametrize(("blocks", "same_as"), [(4, "per_head"), (1, "shared")])
def test_group_size_one_is_per_head_and_all_is_shared(blocks: int, same_as: str) -> None:
    """Groups of one head are per_head, one group of all heads is shared: the same weights, bit for bit."""
    from galore_trainer.targets.geometry import Heads
    from galore_trainer.targets.matrices import project_heads

    results = []
    for config in (
        GaLoreConfig(rank=5, update_proj_gap=GAP, head_sharing="grouped", head_group_size=4 // blocks),
        GaLoreConfig(rank=5, update_proj_gap=GAP, head_sharing=same_as),
    ):
        heads = Heads(num_heads=4, num_kv_heads=4, head_dim=HEAD_DIM)
        matrices = project_heads(
            "q_proj", "q", 32, 20, model_type="llama", heads=heads, config=config, rank=5, transposed=False
        )
        p = weight((32, 20))
        group = {"params": [p], "names": ["w"], "projected": True, "matrices": [matrices]}
        optimizer = GaLoreAdamW([group], config, lr=1e-2)
        for G in gradients((32, 20)):
            p.grad = G.clone()
            optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)


def test_one_shared_head_is_joint_on_the_right() -> None:
    whole = LogicalMatrix(length=16, columns=24, rank=4)
    one_head = LogicalMatrix(length=16, columns=24, rank=4, head_dim=16, lenders=1)
    results = []
    for matrix in (whole, one_head):
        p = weight((16, 24))
        group = {"params": [p], "names": ["w"], "projected": True, "matrices": [[matrix]]}
        optimizer = GaLoreAdamW([group], GaLoreConfig(rank=4, update_proj_gap=GAP), lr=1e-2)
        for G in gradients((16, 24)):
            p.grad = G.clone()
            optimizer.step()
        results.append(p.detach())
    assert torch.equal(*results)


def test_steps_with_zero_lr_and_zero_gradient_on_empty_state_change_nothing() -> None:
    """Checkpoint tools create state this way; afterwards training must run as if it had not happened."""
    results = []
    for prepared in (False, True):
        projected, plain = weight((24, 16)), torch.nn.Parameter(torch.ones(7))
        groups = [{"params": [projected], "projected": True}, {"params": [plain]}]
        optimizer = GaLoreAdamW(groups, GaLoreConfig(rank=4, update_proj_gap=GAP), lr=1e-2, weight_decay=0.1)
        if prepared:
            projected.grad, plain.grad = torch.zeros(24, 16), torch.zeros(7)
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            optimizer.step()
            keys = {"basis", "exp_avg", "exp_avg_sq", "step", "calls", "refreshes", "due", "born", "phase", "skipped"}
            keys.add("residual_norm")
            assert set(optimizer.state[projected]) == keys
            assert torch.equal(projected, weight((24, 16)))
            assert not any(v.any() for v in optimizer.state[projected].values() if torch.is_tensor(v))
            for group in optimizer.param_groups:
                group["lr"] = 1e-2
        for G in gradients((24, 16)):
            projected.grad, plain.grad = G.clone(), torch.ones(7)
            optimizer.step()
        results.append((projected.detach(), plain.detach()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_first_step_of_a_warmup_with_zero_lr_fixes_a_basis() -> None:
    """lr 0 with a real gradient is a scheduler's first step, not a checkpoint tool's."""
    p = weight((24, 16))
    optimizer = GaLoreAdamW([{"params": [p], "projected": True}], GaLoreConfig(rank=4), lr=0.0)
    p.grad = gradients((24, 16))[0]
    optimizer.step()
    assert optimizer.state[p]["refreshes"] == 1
    assert torch.equal(p, weight((24, 16)))


def test_plain_parameters_follow_torch_adamw() -> None:
    shapes = [(5,), (6, 4), (3, 2, 2)]
    ours = [torch.nn.Parameter(torch.ones(s)) for s in shapes]
    theirs = [torch.nn.Parameter(torch.ones(s)) for s in shapes]
    mine = GaLoreAdamW(ours, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6)
    other = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        mine.step()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("rank", "iterations"), itertools.product([4, 12], [0, 1, 2, 3]))
def test_excess_error_falls_with_iterations(rank: int, iterations: int) -> None:
    """Randomization's price over exact: bounded at q = 0, falling in q, under 2 % from q = 1 and 0.5 % at q = 3."""
    from galore_trainer.core.basis import exact, randomized
    from galore_trainer.core.galore import lost_share

    generator = torch.Generator().manual_seed(7)
    spectrum = torch.arange(1, 97).float().pow(-0.8)
    left = torch.linalg.qr(torch.randn(160, 96, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(96, 96, generator=generator)).Q
    G = ((left * spectrum) @ right.T)[None]
    best = lost_share(G, exact([G], rank, "right"), "right")
    excess = []
    for q in (iterations, iterations + 1):
        omega = torch.randn(1, 96, rank + 8, generator=torch.Generator().manual_seed(11))
        excess.append(
            (lost_share(G, randomized([G], rank, "right", omega=omega, iterations=q), "right") / best - 1).item()
        )
    assert excess[1] <= excess[0] + 1e-6
    assert excess[0] <= {0: 0.10, 1: 0.02, 2: 0.01, 3: 0.005}[iterations]
    assert excess[0] >= -1e-6


def test_bases_that_are_finished_together_are_those_of_each_alone() -> None:
    """Of unequal matrices and sides, one of which needs no eigenvectors; each is freed as it is done."""
    from galore_trainer.core.basis import begin_randomized, finish_together, randomized

    generator = torch.Generator().manual_seed(0)
    begun: list[Any] = []
    alone: list[Tensor] = []
    for (blocks, m, n), side, k in (((2, 40, 30), "right", 9), ((1, 20, 50), "left", 9), ((3, 30, 30), "right", 12)):
        G = torch.randn(blocks, m, n, generator=generator)
        omega = torch.randn(blocks, n, k, generator=generator)
        begun.append(begin_randomized([G], 6, side, omega=omega, iterations=1))
        alone.append(randomized([G], 6, side, omega=omega, iterations=1))
    G = torch.randn(1, 8, 30, generator=generator)  # too small for a sketch
    omega = torch.randn(1, 30, 8, generator=generator)
    begun.append(begin_randomized([G], 6, "right", omega=omega))
    alone.append(randomized([G], 6, "right", omega=omega))
    for i, P in enumerate(finish_together(begun)):
        assert torch.equal(P, alone[i])
        assert len(begun) == 3 - i
