"""Eigenvectors of many small symmetric matrices in one launch; cuSOLVER decomposes one after the other.

One-sided Jacobi on the Cholesky factor C = R^T R (Hestenes 1958; Veselic and Hari 1989). Rotations of pairs of rows
make the rows of R orthogonal. Row i is then sigma_i u_i^T, and u_i is an eigenvector of C. The factor is computed in
float64; rotations in float32 are accurate relative to the norm of a row (Demmel and Veselic 1992).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from galore_trainer.kernels.tables import TINY

MAX_SWEEPS = 20  # sweeps through all pairs of rows; 144 rows need nine
TOLERANCE = 1e-5  # largest cosine between rows in the last sweep, whose rotations reduce it far below float32 rounding
WIDTH = 32  # columns of a tile


def eigenvectors(C: Tensor) -> Tensor:
    """Eigenvectors of symmetric positive definite matrices.

    Args:
        C: [matrices, k, k], float64, k at least 2.

    Returns:
        float32 [matrices, k, k], as columns in order of falling eigenvalue, with arbitrary signs. NaN for a matrix that
        is nearly singular, or needs more than ``MAX_SWEEPS`` sweeps.
    """
    count, k, _ = C.shape
    R, info = torch.linalg.cholesky_ex(C, upper=True)
    has_factor = (info == 0)[:, None, None]
    norm = C.diagonal(dim1=-2, dim2=-1).sum(dim=-1).sqrt()[:, None, None]  # of R: float32 holds squares of R / norm
    rows = torch.zeros(count, k, 4 * triton.cdiv(k, 4), dtype=torch.float32, device=C.device)  # aligned for wide loads
    rows[..., :k] = torch.where(has_factor, R / norm, 0.0)  # zeros end after one sweep
    cosines = torch.full((count,), float("nan"), dtype=torch.float32, device=C.device)
    pairs = triton.next_power_of_2(triton.cdiv(k, 2))
    kernel: Any = _orthogonalize
    kernel[(count,)](
        rows,
        cosines,
        K=k,
        STRIDE=rows.shape[-1],
        PAIRS=pairs,
        WIDTH=WIDTH,
        SWEEPS=MAX_SWEEPS,
        DONE=TOLERANCE,
        num_warps=16 if pairs >= 64 else 4 if pairs >= 4 else 1,
        num_stages=1,
    )
    converged = has_factor[..., 0] & (cosines < TOLERANCE).unsqueeze(-1)
    sigma = torch.where(converged, torch.linalg.vector_norm(rows, dim=-1), torch.nan)  # [matrices, k]
    order = sigma.argsort(dim=-1, descending=True)
    vectors = (rows[..., :k] / sigma.unsqueeze(-1)).mT  # as columns
    return vectors.gather(-1, order.unsqueeze(1).expand(-1, k, -1))


@triton.jit
def _orthogonalize(
    X,
    cosines,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
    SWEEPS: tl.constexpr,
    DONE: tl.constexpr,
):
    """A program rotates the rows of one matrix.

    A sweep rotates every pair of rows once, in rounds of disjoint pairs (round-robin tournament). The pairs of a round
    are rotated together.
    """
    X += tl.program_id(0).to(tl.int64) * K * STRIDE
    i = tl.arange(0, PAIRS)
    rounds: tl.constexpr = K - 1 + K % 2  # with an odd number of rows, one row pauses in a round
    largest, sweep = float("inf"), 0  # largest cosine between rows that the last sweep rotated
    while (largest >= DONE) & (sweep < SWEEPS):
        largest_of_pair = tl.zeros((PAIRS,), tl.float32)
        for turn in range(rounds):
            p = tl.where(i == 0, rounds, (turn + i) % rounds)
            q = tl.where(i == 0, turn, (turn - i + rounds) % rounds)
            paired = (i <= rounds // 2) & (p < K) & (q < K)
            p_at, q_at = X + p * STRIDE, X + q * STRIDE
            xx = tl.zeros((PAIRS, WIDTH), tl.float32)
            yy = tl.zeros((PAIRS, WIDTH), tl.float32)
            xy = tl.zeros((PAIRS, WIDTH), tl.float32)
            for first in tl.static_range(0, K, WIDTH):
                j = first + tl.arange(0, WIDTH)
                mask = paired[:, None] & (j < K)[None, :]
                x = tl.load(p_at[:, None] + j[None, :], mask=mask, other=0.0)
                y = tl.load(q_at[:, None] + j[None, :], mask=mask, other=0.0)
                xx += x * x
                yy += y * y
                xy += x * y
            a, b, c = tl.sum(xx, axis=1), tl.sum(yy, axis=1), tl.sum(xy, axis=1)
            norms = tl.sqrt(tl.maximum(a, TINY)) * tl.sqrt(tl.maximum(b, TINY))
            cosine = tl.abs(c) / norms
            slope = (b - a) / (2.0 * tl.where(c == 0.0, 1.0, c))
            tangent = tl.where(slope < 0.0, -1.0, 1.0) / (tl.abs(slope) + tl.sqrt(1.0 + slope * slope))
            tangent = tl.where(c == 0.0, 0.0, tangent)
            cos = 1.0 / tl.sqrt(1.0 + tangent * tangent)
            sin = cos * tangent
            for first in tl.static_range(0, K, WIDTH):
                j = first + tl.arange(0, WIDTH)
                mask = paired[:, None] & (j < K)[None, :]
                x = tl.load(p_at[:, None] + j[None, :], mask=mask, other=0.0)
                y = tl.load(q_at[:, None] + j[None, :], mask=mask, other=0.0)
                tl.store(p_at[:, None] + j[None, :], cos[:, None] * x - sin[:, None] * y, mask=mask)
                tl.store(q_at[:, None] + j[None, :], sin[:, None] * x + cos[:, None] * y, mask=mask)
            tl.debug_barrier()  # other threads read these rows in the next round
            largest_of_pair = tl.maximum(largest_of_pair, cosine)
        largest = tl.max(largest_of_pair, axis=0)
        sweep += 1
    tl.store(cosines + tl.program_id(0), largest)
