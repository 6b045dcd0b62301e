"""Eigenvectors of many small symmetric matrices at once, where a library takes one after the other.

One-sided Jacobi on the Cholesky factor (Hestenes 1958; Veselic and Hari 1989): with C = R^T R, rotations of pairs of
rows of R until all rows are orthogonal leave sigma_i u_i^T, and u_i are the eigenvectors of C. The factor comes from
float64; rotations in float32 are accurate relative to each row (Demmel and Veselic 1992).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SWEEPS = 20  # through all pairs of rows at most; nine do for 144 rows
ORTHOGONAL = 1e-5  # a cosine that the last sweep may still have met; what it leaves is far below float32
WIDTH = 32  # columns of a tile


def eigenvectors(C: Tensor) -> Tensor:
    """Eigenvectors by falling eigenvalue; NaN where a matrix is too close to singular, or not done in 20 sweeps.

    Args:
        C: [count, k, k], symmetric and positive definite, float64; k at least 2.

    Returns:
        [count, k, k], a column for each, float32; their signs are arbitrary.
    """
    count, k, _ = C.shape
    R, info = torch.linalg.cholesky_ex(C, upper=True)
    possible = (info == 0)[:, None, None]
    size = C.diagonal(dim1=-2, dim2=-1).sum(dim=-1).sqrt()[:, None, None]  # so that float32 holds all squares
    rows = torch.zeros(count, k, 4 * triton.cdiv(k, 4), dtype=torch.float32, device=C.device)  # aligned for wide loads
    rows[..., :k] = torch.where(possible, R / size, 0.0)  # rows of zeros are done at once
    cosines = torch.full((count,), float("nan"), dtype=torch.float32, device=C.device)
    pairs = triton.next_power_of_2(triton.cdiv(k, 2))
    kernel: Any = _orthogonalize
    kernel[(count,)](
        rows, cosines, K=k, STRIDE=rows.shape[-1], PAIRS=pairs, WIDTH=WIDTH, SWEEPS=SWEEPS, DONE=ORTHOGONAL,
        num_warps=16 if pairs >= 64 else 4 if pairs >= 4 else 1, num_stages=1,
    )  # fmt: skip
    done = possible[..., 0] & (cosines < ORTHOGONAL).unsqueeze(-1)
    lengths = torch.where(done, torch.linalg.vector_norm(rows, dim=-1), torch.nan)  # [count, k]
    falling = lengths.argsort(dim=-1, descending=True)
    found = (rows[..., :k] / lengths.unsqueeze(-1)).mT  # a column for each
    return found.gather(-1, falling.unsqueeze(1).expand(-1, k, -1))


@triton.jit
def _orthogonalize(
    X, cosines, K: tl.constexpr, STRIDE: tl.constexpr, PAIRS: tl.constexpr, WIDTH: tl.constexpr,
    SWEEPS: tl.constexpr, DONE: tl.constexpr,
):  # fmt: skip
    """A program rotates the rows of one matrix, all pairs of a round at a time, each pair once in a sweep."""
    X += tl.program_id(0).to(tl.int64) * K * STRIDE
    i = tl.arange(0, PAIRS)
    others: tl.constexpr = K - 1 + K % 2  # that a row meets in a sweep; an odd one out rests
    worst, sweep = float("inf"), 0
    while (worst >= DONE) & (sweep < SWEEPS):
        met = tl.zeros((PAIRS,), tl.float32)
        for turn in range(others):
            p = tl.where(i == 0, others, (turn + i) % others)
            q = tl.where(i == 0, turn, (turn - i + others) % others)
            paired = (i <= others // 2) & (p < K) & (q < K)
            p_at, q_at = X + p * STRIDE, X + q * STRIDE
            xx = tl.zeros((PAIRS, WIDTH), tl.float32)
            yy = tl.zeros((PAIRS, WIDTH), tl.float32)
            xy = tl.zeros((PAIRS, WIDTH), tl.float32)
            for first in tl.static_range(0, K, WIDTH):
                j = first + tl.arange(0, WIDTH)
                here = paired[:, None] & (j < K)[None, :]
                x = tl.load(p_at[:, None] + j[None, :], mask=here, other=0.0)
                y = tl.load(q_at[:, None] + j[None, :], mask=here, other=0.0)
                xx += x * x
                yy += y * y
                xy += x * y
            a, b, c = tl.sum(xx, axis=1), tl.sum(yy, axis=1), tl.sum(xy, axis=1)
            lengths = tl.sqrt(tl.maximum(a, 1.1754943508222875e-38)) * tl.sqrt(tl.maximum(b, 1.1754943508222875e-38))
            cosine = tl.abs(c) / lengths
            slope = (b - a) / (2.0 * tl.where(c == 0.0, 1.0, c))
            tangent = tl.where(slope < 0.0, -1.0, 1.0) / (tl.abs(slope) + tl.sqrt(1.0 + slope * slope))
            tangent = tl.where(c == 0.0, 0.0, tangent)
            cos = 1.0 / tl.sqrt(1.0 + tangent * tangent)
            sin = cos * tangent
            for first in tl.static_range(0, K, WIDTH):
                j = first + tl.arange(0, WIDTH)
                here = paired[:, None] & (j < K)[None, :]
                x = tl.load(p_at[:, None] + j[None, :], mask=here, other=0.0)
                y = tl.load(q_at[:, None] + j[None, :], mask=here, other=0.0)
                tl.store(p_at[:, None] + j[None, :], cos[:, None] * x - sin[:, None] * y, mask=here)
                tl.store(q_at[:, None] + j[None, :], sin[:, None] * x + cos[:, None] * y, mask=here)
            tl.debug_barrier()
            met = tl.maximum(met, cosine)
        worst = tl.max(met, axis=0)
        sweep += 1
    tl.store(cosines + tl.program_id(0), worst)
