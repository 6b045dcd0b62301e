"""The dense scaled residual: what the projection loses, without moments, scaled for each line of the gradient.

Legend (shapes without the leading ``blocks`` dimension; G, R, N, P, lift as in ``core/galore.py``):
    j    a line: a row of G and R (right) | a column (left)
    D    G - lift(R), what the projection loses
    phi  factor of each line, [lines]
    d    ||phi D||_F over all blocks of a matrix; d' is its value in the step before

    phi_j = residual_scale ||N_j|| / ||R_j||            0 where R_j is 0
    phi  <- phi min(1, 1.01 d' / d)                     no limit before the first d > 0; d = 0 leaves d' as it is
    W    <- W - lr wd W - lr scale (lift(N) + phi D),   lift(N) + phi D = lift(N - phi R) + phi G

D is never formed: ||D_j||^2 = ||G_j||^2 - ||R_j||^2, since the columns of P are orthonormal. phi is not linear in G, so
it needs the whole gradient. Source: Chen et al. (Fira), arXiv 2410.01623.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 17  # entries that are squared at a time on a CPU
GROWTH = 1.01  # most that d grows from one step to the next


class Dense(NamedTuple):
    """What ``core.galore.apply_update_`` needs of the dense residual.

    Attributes:
        G: gradient [blocks, m, n].
        R: projected gradient.
        phi: [blocks, lines], 0 in blocks whose gradient is not usable.
    """

    G: Tensor
    R: Tensor
    phi: Tensor


def along_lines(phi: Tensor, side: str) -> Tensor:
    """phi [blocks, lines] as it multiplies G or R: [blocks, lines, 1] (right) or [blocks, 1, lines] (left)."""
    return phi.unsqueeze(-1) if side == "right" else phi.unsqueeze(-2)


def squared_norms(X: Tensor, side: str, dtype: torch.dtype) -> Tensor:
    """||X_j||^2 of every line, [blocks, lines], in ``dtype``."""
    if side == "left" and X.device.type == "cpu" and X.dtype == dtype:
        # A third of the norm's time along columns there; the cache holds the squares of a chunk.
        rows = max(1, CHUNK // (len(X) * X.shape[-1]))
        return functools.reduce(torch.add, [part.square().sum(dim=-2) for part in X.split(rows, dim=-2)])
    return torch.linalg.vector_norm(X, dim=-1 if side == "right" else -2, dtype=dtype).square()


def line_factors(
    norms: Tensor, R: Tensor, N: Tensor, ok: Tensor, side: str, *, residual_scale: float, noise: float
) -> tuple[Tensor, Tensor]:
    """phi before its limit, and d^2 of every line.

    Args:
        norms: ||G_j||^2, [blocks, lines].
        R, N: projected gradient and normalised update.
        ok: [blocks, 1, 1]; where it is 0 both results are 0.
        side: of the projection.
        residual_scale: as in the equation.
        noise: share of ||G_j|| up to which ||R_j|| is rounding error, and counts as 0.

    Returns:
        phi [blocks, lines] in the dtype of R; (phi_j ||D_j||)^2 [blocks, lines] in float64.
    """
    of_R, of_N = squared_norms(R, side, R.dtype), squared_norms(N, side, R.dtype)
    unseen = ((ok[:, 0] > 0.0) & (of_R > norms * (noise * noise))).logical_not_()
    phi = (of_N / of_R).sqrt_().mul_(residual_scale).masked_fill_(unseen, 0.0)
    lost = (norms.double() - of_R).clamp_(min=0.0)
    return phi, lost.mul_(phi).mul_(phi).masked_fill_(unseen, 0.0)


def limit(d: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """The factor that limits phi, and the new d'.

    Args:
        d: of matrices, [matrices], float64.
        before: d' of them, float32; 0 where there was no step with d > 0.
    """
    most = torch.where(before > 0.0, GROWTH * before.double(), torch.inf)
    limited = torch.minimum(d, most)
    factor = torch.where(d > most, most / d, 1.0)
    return factor, torch.where(d > 0.0, limited.to(before.dtype), before)


def noise_of(dtype: torch.dtype, rank: int, size: int) -> float:
    """What rounding leaves of a line that the projection does not see, as a share of ||G_j||.

    Args:
        dtype: of the factors of the projection.
        rank, size: of the basis, [size, rank].
    """
    return torch.finfo(dtype).eps * (rank / size) ** 0.5
