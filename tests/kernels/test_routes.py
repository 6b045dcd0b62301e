"""Every route of a step against float64, at ranks up to 1024; the same random numbers round on all of them."""

from __future__ import annotations

import pytest
import torch

from galore_trainer.core.galore import lift
from galore_trainer.kernels.project import project
from galore_trainer.kernels.routes import TABLE, WHOLE, ProjectRoute, Route, UpdateRoute, forced, route_of
from galore_trainer.kernels.tables import Layout
from galore_trainer.kernels.update import Dense, apply_update_
from scattered import (
    BOUND,
    JOBS,
    MATRICES,
    basis,
    blocks_of,
    every_matrix,
    flags,
    keys_of,
    layout,
    lifted,
    moment,
    places,
    random,
    rates,
    stored,
)

LOW = torch.bfloat16
SMALL = Route(ProjectRoute(columns=16), UpdateRoute(16, 32, 4, looped=True, depth=16))  # several of everything
LATE = Route(
    ProjectRoute(lines=32, columns=32, norms=False), UpdateRoute(32, 16, 4, looped=True, depth=32, early=False)
)
WIDE = Route(ProjectRoute(columns=256), UpdateRoute(128, 256, 8, looped=True, depth=64))
DESCRIBED = Route(ProjectRoute(columns=256), UpdateRoute(128, 256, 8, looped=True, depth=64, described=True))
STACKED = Route(ProjectRoute(lines=256), UpdateRoute(64, 128, 8, depth=256))


@every_matrix
@pytest.mark.parametrize("route", [SMALL, LATE], ids=["small", "late"])
def test_a_step_equals_float64(name: str, route: Route, device: torch.device) -> None:
    """R, which gradients are usable, the norms of lines, and weights of which one has to stay."""
    matrix, P, side = MATRICES[name], basis(name, device, LOW), MATRICES[name].side
    tensors, grads = stored(name, device, torch.float32), stored(name, device, LOW, seed=30)
    matrix.rows_of(grads[1])[0, -1, -1] = float("nan")
    lines = matrix.moment_shape[1 if side == "right" else 2]
    norms = torch.empty(len(P), lines, device=device)
    of_grads, of_weights = ((places(x, matrix), layout(name, x)) for x in (grads, tensors))
    before, N, phi = blocks_of(name, tensors).double(), moment(name, device, LOW), random(device, len(P), lines, seed=9)
    with forced(route):
        R, ok = project(*of_grads, P, side, matrix.blocks, norms=norms)
        dense = Dense(*of_grads, phi)
        apply_update_(
            *of_weights, N, P, side, ok, matrix.blocks, rates=rates(device, 0.1, 0.03), keys=None, dense=dense
        )
    assert ok.tolist() == [1.0, 0.0, 1.0]
    G = blocks_of(name, grads).double()
    exact = G @ P.double() if side == "right" else P.double().mT @ G
    size = G.abs() @ P.double().abs() if side == "right" else P.double().abs().mT @ G.abs()
    along = -1 if side == "right" else -2
    moved = before * (1 - 0.03) - 0.1 * (lifted(name, N, P) + phi.double().unsqueeze(along) * G)
    after = blocks_of(name, tensors)
    for i in range(JOBS):
        here = slice(i * matrix.blocks, (i + 1) * matrix.blocks)
        if i == 1:
            assert torch.equal(after[here], before[here].float())
            continue
        assert ((R[here] - exact[here]).abs() <= BOUND * size[here]).all()
        torch.testing.assert_close(norms[here].double(), G[here].square().sum(along), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(after[here], moved[here].float(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("rank", [48, 256, 520, 1024])
def test_ranks_up_to_1024(rank: int, side: str, device: torch.device) -> None:
    """Tiles of their real size, on a matrix that they do not fill; products are exact for the kernels' factors."""
    rows, columns = 150, 300
    inner = columns if side == "right" else rows
    G, W = random(device, rows, columns, seed=1).to(LOW), random(device, rows, columns, seed=2)
    P = (random(device, 1, inner, rank, seed=3) / rank**0.5).to(LOW)
    N = random(device, *((1, rows, rank) if side == "right" else (1, rank, columns)), seed=4).to(LOW)
    exact = G.double() @ P[0].double() if side == "right" else P[0].double().mT @ G.double()
    moved = W.double() - 0.1 * lift(N.double(), P.double(), side)[0]
    for route in (WIDE, DESCRIBED, STACKED) if rank <= 256 else (WIDE, DESCRIBED):
        here, one = W.clone(), torch.ones(1, device=device)
        with forced(route):
            R, _ = project(places([G]), Layout.of(G[None]), P, side, 1)
            apply_update_(
                places([here]), Layout.of(here[None]), N, P, side, one, 1, rates=rates(device, 0.1, count=1), keys=None
            )
        torch.testing.assert_close(R[0].double(), exact, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(here.double(), moved, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_same_numbers_round_on_every_route(side: str, device: torch.device) -> None:
    """Sums of small integers are exact in any order, so that a weight may differ by its noise alone."""
    rows, columns, rank = 40, 70, 24
    generator = torch.Generator().manual_seed(0)
    N, P = (torch.randint(-3, 4, (JOBS, size, rank), generator=generator).to(device, LOW) for size in (rows, columns))
    if side == "left":
        N, P = P.mT.contiguous(), N
    results = []
    for route in (Route(), SMALL, LATE, DESCRIBED, STACKED):
        W = [random(device, rows, columns, seed=i).to(LOW) for i in range(JOBS)]
        with forced(route):
            at, keys = Layout.of(W[0][None]), keys_of(device, 5)
            apply_update_(places(W), at, N, P, side, flags(device), 1, rates=rates(device, 2.0**-9), keys=keys)
        results.append(torch.stack(W))
    assert all(torch.equal(results[0], other) for other in results)


def test_the_table_has_a_route_for_every_rank() -> None:
    largest = [rank for rank, _ in TABLE]
    assert largest == sorted(set(largest))
    assert largest[-1] == WHOLE
    assert {route_of(rank, torch.float32).update.looped for rank in (1, 128, 1024)} == {False}
    for rank in (1, 32, 128, 129, 256, 1024, 4096):
        assert route_of(rank, LOW) == next(route for most, route in TABLE if rank <= most)


def test_float32_factors_have_tiles_of_their_own() -> None:
    with forced(WIDE):
        assert route_of(512, LOW) == WIDE
        assert route_of(512, torch.float32) == Route(small_state=WIDE.small_state)
