"""Kernels of the dense scaled residual against ``core`` in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from galore_trainer.core import scaled
from galore_trainer.core.galore import lift
from galore_trainer.core.matrix import LogicalMatrix
from galore_trainer.kernels.project import project
from galore_trainer.kernels.scaled import line_factors, without_projected
from galore_trainer.kernels.tables import Layout
from galore_trainer.kernels.update import Dense, apply_update_
from scattered import places, rates

MATRICES = {
    "right": LogicalMatrix(length=50, columns=37, rank=5),
    "left": LogicalMatrix(length=37, columns=50, rank=5, side="left"),
    "blocks": LogicalMatrix(length=48, columns=40, rank=20, blocks=3),
    "interleaved": LogicalMatrix(outer=4, start=6, length=6, columns=33, rank=3, blocks=2),
    "transposed": LogicalMatrix(length=35, columns=34, rank=4, transposed=True),
}


def stored(matrix: LogicalMatrix, dtype: torch.dtype, device: Any, seed: int) -> list[torch.Tensor]:
    """Two tensors that hold the matrix, with other rows between its own where it is interleaved."""
    rows = matrix.rows + (matrix.outer * 12 if matrix.outer > 1 else 0)
    shape = (matrix.columns, rows) if matrix.transposed else (rows, matrix.columns)
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).to(device) for _ in range(2)]


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize(
    ("of_W", "of_G"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
def test_a_step_equals_core_in_float64(name: str, of_W: torch.dtype, of_G: torch.dtype, device: Any) -> None:
    """The second matrix has a gradient that is not usable: it stays, bit for bit."""
    matrix, side = MATRICES[name], MATRICES[name].side
    weights, grads = stored(matrix, of_W, device, 0), stored(matrix, of_G, device, 1)
    matrix.rows_of(grads[0])[0, 2] = 0.0  # a row that the projection does not see, and that is 0
    matrix.rows_of(grads[1])[0, 0, 0] = float("nan")
    before = [w.clone() for w in weights]
    P = torch.linalg.qr(torch.randn(2 * matrix.blocks, *matrix.basis_shape[1:], device=device)).Q.contiguous().to(of_G)
    total, lines = len(P), matrix.moment_shape[1 if side == "right" else 2]
    norms = torch.empty(total, lines, dtype=torch.float32, device=device)
    of_grads, of_weights = ((places(x, matrix), Layout.of(matrix.rows_of(x[0]))) for x in (grads, weights))
    R, _ = project(*of_grads, P, side, matrix.blocks, norms=norms)
    N = torch.randn(R.shape, device=device)
    ok = torch.tensor([1.0, 0.0], device=device)
    phi, lost = line_factors(R, N, norms, ok, matrix.blocks, side, residual_scale=0.7, noise=1e-6)

    one = slice(0, matrix.blocks)
    exact_P, exact_N, G = P[one].double(), N[one].double(), matrix.take(grads[0]).double()
    exact_R = G @ exact_P if side == "right" else exact_P.mT @ G
    along = -1 if side == "right" else -2
    of_R, of_N = exact_R.norm(dim=along), exact_N.norm(dim=along)
    expected = torch.where(of_R > 0.0, 0.7 * of_N / of_R, 0.0)
    torch.testing.assert_close(phi[one].double(), expected, rtol=1e-5, atol=1e-7)
    assert not phi[matrix.blocks :].any()
    assert not lost[matrix.blocks :].any()
    D = G - lift(exact_R, exact_P, side)
    if of_G == torch.float32:  # with a rounded basis ||D||^2 is not the difference of the norms
        torch.testing.assert_close(lost[one], (expected * D.norm(dim=along)) ** 2, rtol=1e-4, atol=1e-8)

    factor = torch.linspace(0.5, 1.0, total, device=device)[:, None]
    phi = phi * factor
    low = of_W if of_W == of_G else torch.bfloat16
    A = without_projected(N, R, phi, ok, side, low)
    dense = Dense(*of_grads, phi)
    apply_update_(
        *of_weights, A, P.to(low), side, ok, matrix.blocks, rates=rates(device, 0.1, 0.01), keys=None, dense=dense
    )
    spread = scaled.along_lines(expected * factor[one].double(), side)
    exact = matrix.take(before[0]).double() * 0.99 - 0.1 * (
        lift(exact_N - spread * exact_R, exact_P, side) + spread * G
    )
    # bfloat16 factors of the lift have 8 bits, a bfloat16 weight near 1 is rounded by at most 2^-8
    atol = 1e-5 if low == torch.float32 else 1e-2
    torch.testing.assert_close(
        matrix.take(weights[0]).double(), exact, rtol=4e-3 if of_W == torch.bfloat16 else 0, atol=atol
    )
    assert torch.equal(weights[1], before[1])
    if matrix.outer > 1:  # rows of other matrices stay
        assert torch.equal(weights[0].view(4, -1, 33)[:, :6], before[0].view(4, -1, 33)[:, :6])
