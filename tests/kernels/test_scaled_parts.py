"""Each kernel of the dense scaled residual against float64; bounds as in ``test_kernels.py``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from galore_trainer.core.matrix import LogicalMatrix
from galore_trainer.core.scaled import GROWTH, limit
from galore_trainer.kernels.adam import adam_
from galore_trainer.kernels.project import project
from galore_trainer.kernels.scaled import Moments, limit_growth_, line_factors, without_projected
from galore_trainer.kernels.tables import Layout
from galore_trainer.kernels.update import Dense, apply_update_
from scattered import (
    BOUND,
    JOBS,
    MATRICES,
    basis,
    blocks_of,
    both_dtypes,
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

FP32, BF16 = torch.float32, torch.bfloat16
SCALE, NOISE = 0.7, 1e-3
SCALES = {"residual_scale": SCALE, "noise": NOISE}
NAN = float("nan")


def line_norms(name: str, x: Tensor) -> Tensor:
    """||x_j|| of R or N, or of blocks of G, float64 [matrices x blocks, lines]."""
    return x.double().norm(dim=-1 if MATRICES[name].side == "right" else -2)


def empty_norms(name: str, P: Tensor) -> Tensor:
    _, *shape = MATRICES[name].moment_shape
    return torch.empty(len(P), shape[0 if MATRICES[name].side == "right" else 1], device=P.device)


def along_lines(name: str, phi: Tensor) -> Tensor:
    """phi as a factor of G, R or N."""
    return phi.unsqueeze(-1 if MATRICES[name].side == "right" else -2)


def transposed(tensors: list[Tensor]) -> list[Tensor]:
    """The same tensors, with the first of their last two dimensions contiguous."""
    return [x.mT.contiguous().mT for x in tensors]


def of_job(name: str, i: int) -> slice:
    blocks = MATRICES[name].blocks
    return slice(i * blocks, (i + 1) * blocks)


@every_matrix
@both_dtypes
def test_norms_of_the_gradients_lines(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """R and ok are as without norms; a gradient's norms are the same bits alone as among others."""
    matrix, P = MATRICES[name], basis(name, device, dtype)
    tensors = transposed(stored(name, device, dtype))
    matrix.rows_of(tensors[1])[0, -1, -1] = NAN
    G, form, side, blocks = places(tensors, matrix), layout(name, tensors), matrix.side, matrix.blocks
    norms = empty_norms(name, P)
    R, ok = project(G, form, P, side, blocks, norms=norms)
    R_without, ok_without = project(G, form, P, side, blocks)  # with other tiles, which the interpreter sums otherwise
    torch.testing.assert_close(R, R_without, rtol=0, atol=1e-5, equal_nan=True)
    assert torch.equal(ok, ok_without)
    exact = line_norms(name, blocks_of(name, tensors)).square()
    for i in (0, 2):
        here = of_job(name, i)
        torch.testing.assert_close(norms[here].double(), exact[here], rtol=1e-6, atol=0)
        alone = empty_norms(name, P[here])
        project(places(tensors[i : i + 1], matrix), form, P[here].contiguous(), side, blocks, norms=alone)
        assert torch.equal(alone, norms[here])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter takes one program after the other")
@pytest.mark.parametrize("side", ["right", "left"])
@both_dtypes
def test_large_projections_have_equal_bits_with_norms(side: str, dtype: torch.dtype, device: torch.device) -> None:
    """Many programs that share a multiprocessor: no tile is overwritten while it is read."""
    matrix = LogicalMatrix(length=2048, columns=2048, rank=128, side=side)
    tensors = [random(device, 2048, 2048, seed=i).to(dtype) for i in range(16)]
    P = random(device, 16, 2048, 128, seed=99).to(BF16)
    G, form = places(tensors, matrix), Layout.of(matrix.rows_of(tensors[0]))
    norms = torch.empty(16, 2048, device=device)
    R, _ = project(G, form, P, side, 1, norms=norms)
    assert torch.equal(R, project(G, form, P, side, 1)[0])
    exact = torch.stack(tensors).double().square().sum(-1 if side == "right" else -2)
    torch.testing.assert_close(norms.double(), exact, rtol=1e-6, atol=0)


def test_norms_are_of_gradients_as_they_are_stored(device: torch.device) -> None:
    """Not as rounded for bfloat16 factors."""
    tensors, P = stored("PLAIN", device, FP32), basis("PLAIN", device, BF16)
    norms = empty_norms("PLAIN", P)
    project(places(tensors), layout("PLAIN", tensors), P, "right", 1, norms=norms)
    exact = line_norms("PLAIN", blocks_of("PLAIN", tensors)).square()
    torch.testing.assert_close(norms.double(), exact, rtol=1e-6, atol=0)


@every_matrix
def test_line_factors(name: str, device: torch.device) -> None:
    """Lines without R, without N, below the noise, and full ones; a job that is not usable holds NaN and infinities."""
    matrix, ok = MATRICES[name], flags(device, 1.0, 0.0, 1.0)
    R, N = moment(name, device), moment(name, device, seed=61)
    lines = (lambda x: x) if matrix.side == "right" else (lambda x: x.mT)
    lines(R)[0, 0], lines(N)[0, 1], lines(N)[-1, -1] = 0.0, 0.0, 0.0
    seen = line_norms(name, R)
    norms = (seen.square() * torch.rand(seen.shape, device=device).add(1.0)).float()
    norms[0, 2] = (seen[0, 2] / NOISE * 1.1).square()  # below the noise
    norms[0, 3] = (seen[0, 3] / NOISE * 0.9).square()
    norms[-1, 0] = seen[-1, 0].square() * 0.5  # R cannot exceed G but by rounding
    bad = of_job(name, 1)
    R[bad], N[bad], norms[bad] = NAN, float("inf"), NAN
    phi, lost = line_factors(R, N, norms, ok, matrix.blocks, matrix.side, **SCALES)
    exact = SCALE * line_norms(name, N) / seen
    exact[0, 0] = exact[0, 2] = exact[bad] = 0.0
    squares = exact.square() * (norms.double() - seen.square()).clamp(min=0.0)
    squares[bad] = 0.0
    assert phi.dtype == FP32
    assert lost.dtype == torch.float64
    assert exact[0, 1] == 0.0 < exact[0, 3]
    torch.testing.assert_close(phi.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(lost, squares, rtol=0, atol=1e-5 * float((exact.square() * norms.nan_to_num()).max()))
    assert lost[-1, 0] == 0.0
    last = of_job(name, 2)
    alone = line_factors(R[last], N[last], norms[last], ok[2:], matrix.blocks, matrix.side, **SCALES)
    assert torch.equal(alone[0], phi[last])
    assert torch.equal(alone[1], lost[last])


@every_matrix
def test_factors_in_the_pass_of_the_moments(name: str, device: torch.device) -> None:
    """Moments and N are those of ``adam_``, the factors those of its N. A job that is not usable keeps its moments."""
    matrix, ok = MATRICES[name], flags(device, 1.0, 0.0, 1.0)
    R, age = moment(name, device), flags(device, 0.0, 2.0, 999.0)
    R[of_job(name, 1)] = NAN
    norms = (line_norms(name, R).square() * 1.5).float()
    M, V = ([x.square() for x in moment(name, device, seed=s).split(matrix.blocks)] for s in (62, 63))
    M, V = [[x.contiguous() for x in y] for y in (M, V)]
    M_before, V_before = [[x.clone() for x in y] for y in (M, V)]
    t, betas = places(list(age.unbind())), (0.9, 0.999)
    N, moments = torch.empty_like(R), Moments(places(M), places(V), t, betas, 1e-8)
    phi, lost = line_factors(R, N, norms, ok, matrix.blocks, matrix.side, **SCALES, moments=moments)
    expected = adam_(places(M_before), places(V_before), t, R, ok, betas=betas, eps=1e-8, dtype=FP32)
    for i in (0, 2):
        torch.testing.assert_close(N[of_job(name, i)], expected[of_job(name, i)], rtol=1e-6, atol=0)
    for found, other in zip(M + V, M_before + V_before, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-6, atol=1e-12)
    factors = line_factors(R, N, norms, ok, matrix.blocks, matrix.side, **SCALES)
    for found, other in zip((phi, lost), factors, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-6, atol=0)
    assert phi[of_job(name, 1)].abs().max() == 0.0
    assert phi[of_job(name, 2)].min() > 0.0


@every_matrix
@both_dtypes
def test_without_projected(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """N - phi R with one rounding."""
    matrix, ok = MATRICES[name], flags(device, 1.0, 0.0, 1.0)
    N, R = moment(name, device), moment(name, device, seed=61)
    phi = random(device, len(N), line_norms(name, N).shape[1], seed=64)
    A = without_projected(N, R, phi, ok, matrix.side, dtype)
    moved = along_lines(name, phi).double() * R.double()
    exact, size = N.double() - moved, N.double().abs() + moved.abs()
    assert A.dtype == dtype
    unit = 2**-8 if dtype == BF16 else 0.0  # half a unit of bfloat16
    for i in (0, 2):
        here = of_job(name, i)
        assert ((A[here] - exact[here]).abs() <= unit * exact[here].abs() + 2**-23 * size[here]).all()


@every_matrix
@pytest.mark.parametrize(
    ("dtype", "of_gradient", "factors"),
    [(FP32, FP32, FP32), (BF16, BF16, BF16), (FP32, BF16, FP32), (BF16, FP32, BF16), (FP32, FP32, BF16)],
    ids=["fp32", "bf16", "bf16-gradients", "fp32-gradients", "bf16-factors"],
)
def test_dense_update(
    name: str, dtype: torch.dtype, of_gradient: torch.dtype, factors: torch.dtype, device: torch.device
) -> None:
    """Gradients stored otherwise than weights; one rounding; a job that is not usable stays, whatever its gradient."""
    matrix, tensors = MATRICES[name], stored(name, device, dtype)
    before, ok = [x.clone() for x in tensors], flags(device, 1.0, 0.0, 1.0)
    A, P = moment(name, device, factors), basis(name, device, factors)
    gradients = transposed(stored(name, device, of_gradient, seed=20))
    G = blocks_of(name, gradients).double()
    phi = random(device, *line_norms(name, G).shape, seed=64)
    gradients[1].fill_(NAN)
    phi[of_job(name, 1)] = NAN
    apply_update_(
        places(tensors, matrix),
        layout(name, tensors),
        A,
        P,
        matrix.side,
        ok,
        matrix.blocks,
        rates=rates(device, 0.1, 0.03),
        keys=None,
        dense=Dense(places(gradients, matrix), layout(name, gradients), phi),
    )
    moved = lifted(name, A, P) + along_lines(name, phi).double() * G
    exact = blocks_of(name, before).double() * (1 - 0.03) - 0.1 * moved
    for i in (0, 2):
        wanted = before[i].clone()
        matrix.rows_of(wanted).copy_(exact[of_job(name, i)].reshape(matrix.rows_of(wanted).shape))
        rtol, atol = (1e-6, BOUND) if dtype == FP32 else (2**-7, BOUND)
        torch.testing.assert_close(tensors[i], wanted, rtol=rtol, atol=atol)
        if dtype == BF16:
            assert (tensors[i] == wanted).float().mean() > 0.995  # else the sum lay next to a midpoint
    assert torch.equal(tensors[1], before[1])


@pytest.mark.parametrize("side", ["right", "left"])
def test_dense_update_rounds_stochastically_with_the_same_noise(side: str, device: torch.device) -> None:
    """phi G moves a weight to the same bits as the same update that comes from the moments, for the same keys."""
    rows, columns = 40, 36
    lines, other = (rows, columns) if side == "right" else (columns, rows)
    size = random(device, JOBS, lines)  # one number a line
    N = size.to(BF16).unsqueeze(-1 if side == "right" else -2)  # [JOBS, lines, 1] or [JOBS, 1, lines]
    P = torch.ones(JOBS, other, 1, device=device, dtype=BF16)
    gradients = [torch.ones(rows, columns, device=device, dtype=BF16) for _ in range(JOBS)]
    form, phi = Layout.of(gradients[0][None]), size.to(BF16).float()
    found = []
    for A, dense in ((N, None), (torch.zeros_like(N), Dense(places(gradients), form, phi))):
        W = [random(device, rows, columns, seed=i).to(BF16) for i in range(JOBS)]
        apply_update_(
            places(W),
            form,
            A,
            P,
            side,
            flags(device),
            1,
            rates=rates(device, 1e-3),
            keys=keys_of(device, 0),
            dense=dense,
        )
        found.append(torch.stack(W))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["HEADS", "EXPERTS"])
def test_the_parts_make_the_dense_update(name: str, device: torch.device) -> None:
    """lift(N - phi R) + phi G is lift(N) + phi D, and what the lines lose adds up to ||phi D||^2."""
    matrix, P, ok = MATRICES[name], basis(name, device, FP32), flags(device)
    side, blocks = matrix.side, matrix.blocks
    gradients, norms = stored(name, device, FP32), empty_norms(name, P)
    places_G, form = places(gradients, matrix), layout(name, gradients)
    R, _ = project(places_G, form, P, side, blocks, norms=norms)
    N = moment(name, device)
    phi, lost = line_factors(R, N, norms, ok, blocks, side, residual_scale=SCALE, noise=0.0)
    D = along_lines(name, phi).double() * (blocks_of(name, gradients).double() - lifted(name, R, P))
    torch.testing.assert_close(lost.sum(), D.square().sum(), rtol=1e-5, atol=0)
    W = [torch.zeros_like(x) for x in gradients]
    A, dense = without_projected(N, R, phi, ok, side, FP32), Dense(places_G, form, phi)
    apply_update_(places(W, matrix), form, A, P, side, ok, blocks, rates=rates(device, -1.0), keys=None, dense=dense)
    torch.testing.assert_close(blocks_of(name, W).double(), lifted(name, N, P) + D, rtol=1e-5, atol=1e-5)


def test_the_limit_of_growth_is_that_of_core(device: torch.device) -> None:
    """No step before, more than 1 % above it, below it, and nothing to move; lines of more than one round."""
    matrices, blocks, lines = 4, 2, 2600
    lost = random(device, matrices * blocks, lines, seed=70).double().square()
    lost[-blocks:] = 0.0
    sizes = lost.view(matrices, -1).sum(dim=1).sqrt()
    before = (sizes * torch.tensor([0.0, 0.5, 2.0, 1.0], device=device)).float()
    before[-1] = 3.0
    phi = random(device, matrices * blocks, lines, seed=71)
    factors, new = limit(sizes, before)
    expected = (phi.double() * factors.repeat_interleave(blocks)[:, None]).float()
    kept = list(before.clone().unbind())
    limit_growth_(lost, phi, places(kept), GROWTH)
    torch.testing.assert_close(torch.stack(kept), new, rtol=1e-6, atol=0)
    torch.testing.assert_close(phi, expected, rtol=1e-6, atol=0)
    assert factors[1] < 1.0
